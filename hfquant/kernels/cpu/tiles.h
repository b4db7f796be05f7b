// The product of many rows, on the vector type V of the including file; and the table of all kernels.

namespace {

// Integer sums of ROWS rows and two vectors of columns over `quads` quads. `sums` start them (ZERO: correct them).
// NEXT: of the next digit, on top of 256 times what is there. A line of `block`, if there is one, is fetched with each quad.
template <bool ZERO, int ROWS, bool NEXT = false>
INLINE void multiply(const uint8_t* panel, const int8_t* x, int64_t quads, const int32_t* sums, const int32_t* zero,
                     V::I (&total)[ROWS][2], NextBlock* block = nullptr) {
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) {
    const V::I start = ZERO ? V::zero() : V::set(sums[m]);
    total[m][0] = NEXT ? V::add(V::times256(total[m][0]), start) : start;
    total[m][1] = NEXT ? V::add(V::times256(total[m][1]), start) : start;
  }
  NextBlock next{};  // in registers
  if (block) next = *block;
  for (int64_t q = 0; q < quads; q++, panel += BLOCK * 4, x += TILE * 4) {
    const V::I a = V::load(panel), b = V::load(panel + V::BYTES);
    V::prefetch((const char*)x + AHEAD);
    if (block) next.fetch_line();
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
      const V::I quad = V::quad(x + m * 4);
      V::dot(total[m][0], a, quad);
      V::dot(total[m][1], b, quad);
    }
  }
  if (block) *block = next;
  if (ZERO)
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
      total[m][0] = V::sub(total[m][0], V::mul(V::load(zero), V::set(sums[m])));
      total[m][1] = V::sub(total[m][1], V::mul(V::load(zero + V::LANES), V::set(sums[m])));
    }
}

// One scale for the whole row of the weight: a full register tile of integers, scaled once.
template <bool ZERO, int ROWS>
void tile_of_channels(const uint8_t* panel, const int8_t* x, int64_t quads, const int32_t* sums, const float* scale,
                      const int32_t* zero, const int32_t* x_zeros, const int32_t* code_sums, NextBlock& next, float* values) {
  V::I total[ROWS][2];
  multiply<ZERO, ROWS>(panel, x, quads, sums, zero, total, &next);
  if (x_zeros)
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
      total[m][0] = V::sub(total[m][0], V::mul(V::load(code_sums), V::set(x_zeros[m])));
      total[m][1] = V::sub(total[m][1], V::mul(V::load(code_sums + V::LANES), V::set(x_zeros[m])));
    }
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) {
    V::storef(values + m * BLOCK, V::mulf(V::to_float(total[m][0]), V::loadf(scale)));
    V::storef(values + m * BLOCK + V::LANES, V::mulf(V::to_float(total[m][1]), V::loadf(scale + V::LANES)));
  }
}

// Segments with scales of their own: half a register tile of integers, the other half float sums.
template <bool ZERO, bool DIGITS, bool SHIFT, int ROWS>
void tile_of_segments(const Weight& w, const Activations& a, int64_t t, int half, const uint8_t* panel, int column,
                      NextBlock& block, float* values) {
  const int64_t depth = panel_depth(w), quads = depth / 4, segments = segments_of(w, a.planes);
  const int64_t length = segments == 1 ? quads : segment_of(w, a.planes) / 4, sharing = segments / w.groups;
  const float* scales = (const float*)(panel + depth * BLOCK) + column;
  const int32_t* zeros = (const int32_t*)(panel + depth * BLOCK + w.groups * BLOCK * 4) + column;
  const float* sums_of_codes = (const float*)(zeros + w.groups * BLOCK);
  const float* steps = a.scale + (t * TILE + half * HALF) * segments;
  V::F value[ROWS][2];
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) value[m][0] = value[m][1] = V::zerof();
  // All digits in one integer: 2**31 > 32 * 8 * 127 * 65536; a sum that leaves int32 on the way comes back.
  const bool at_once = DIGITS && !ZERO && w.bits == 4 && length <= 8;
  for (int p = 0; p < (at_once ? 1 : a.planes); p++) {
    const int8_t* x = a.codes + (t * a.planes + p) * depth * TILE + half * HALF * 4;
    const int32_t* sums = a.sums + (t * a.planes + p) * segments * TILE + half * HALF;
    const int last = at_once ? a.planes - 1 : p;  // digit
    const float factor = last == 0 ? 1.0f : last == 1 ? 0x1p-8f : 0x1p-16f;
    for (int64_t i = 0, g = 0, share = sharing; i < segments; i++, sums += TILE) {
      const int64_t q = i * length, n = quads - q < length ? quads - q : length;
      block.fetch();
      V::I total[ROWS][2];
      multiply<ZERO, ROWS>(panel + (q * BLOCK + column) * 4, x + q * TILE * 4, n, sums, zeros + g * BLOCK, total);
      if (DIGITS && !ZERO)
        for (int next = 1; at_once && next < a.planes; next++)
          multiply<ZERO, ROWS, true>(panel + (q * BLOCK + column) * 4, x + (next * depth + q * 4) * TILE, n,
                                     sums + next * segments * TILE, nullptr, total);
      const V::F first = V::loadf(scales + g * BLOCK), second = V::loadf(scales + g * BLOCK + V::LANES);
#pragma GCC unroll 12
      for (int m = 0; m < ROWS; m++) {
        V::F f0 = V::to_float(total[m][0]), f1 = V::to_float(total[m][1]);
        if (SHIFT) {
          const V::F shift = V::setf(float(-a.zeros[t * TILE + half * HALF + m]));
          f0 = V::fma(shift, V::loadf(sums_of_codes + g * BLOCK), f0);
          f1 = V::fma(shift, V::loadf(sums_of_codes + g * BLOCK + V::LANES), f1);
        }
        if (DIGITS) {
          const V::F step = V::setf(steps[m * segments + i] * factor);
          f0 = V::mulf(f0, step);
          f1 = V::mulf(f1, step);
        }
        value[m][0] = V::fma(f0, first, value[m][0]);
        value[m][1] = V::fma(f1, second, value[m][1]);
      }
      if (--share == 0) g++, share = sharing;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) {
    V::storef(values + (half * HALF + m) * BLOCK, value[m][0]);
    V::storef(values + (half * HALF + m) * BLOCK + V::LANES, value[m][1]);
  }
}

// Writes `act(values [count] * scale + bias)` to row `m` of the result, from column `n0`.
INLINE void store_scaled(const Output& out, int64_t m, int64_t n0, int count, float scale, float* values) {
  const bool whole = out.type == Float::f32 && count == BLOCK && out.act != Gate::silu;
  float* to = whole ? (float*)out.data + m * out.columns + n0 : values;
  for (int i = 0; i < BLOCK; i += V::LANES) {
    V::F v = V::mulf(V::loadf(values + i), V::setf(scale));
    if (whole && out.bias) v = V::addf(v, V::loadf(out.bias + n0 + i));
    if (whole && out.act != Gate::none) v = gelu(v, tail_of(out.act));
    V::storef(to + i, v);
  }
  if (!whole) store_row(out, m, n0, count, values);
}

template <bool ZERO, bool DIGITS, bool SHIFT>
void tile_block(const Weight& w, const Activations& a, const Output& out, int64_t block, int64_t first, int64_t last,
                const uint8_t* panel) {
  const int64_t depth = panel_depth(w), start = block * BLOCK;
  const float* scales = (const float*)(panel + depth * BLOCK);
  const int32_t* zeros = (const int32_t*)(scales + w.groups * BLOCK);
  const int32_t* code_sums = zeros + w.groups * BLOCK;
  const int count = w.rows - start < BLOCK ? int(w.rows - start) : BLOCK;
  const bool channels = !DIGITS && w.groups == 1;
  const int64_t products = channels ? depth / 4 : 2 * segments_of(w, a.planes) * a.planes;  // of a tile and two vectors
  NextBlock next(w, block, (last - first) * (BLOCK / (2 * V::LANES)) * products);
  alignas(64) float values[TILE * BLOCK];
  for (int64_t t = first; t < last; t++) {
    for (int column = 0; column < BLOCK; column += 2 * V::LANES)
      if (channels) {
        with_rows<TILE>(a.rows - t * TILE, [&](auto rows) __attribute__((always_inline)) {
          tile_of_channels<ZERO, rows()>(panel + column * 4, a.codes + t * depth * TILE, depth / 4, a.sums + t * TILE,
                                         scales + column, zeros + column, SHIFT ? a.zeros + t * TILE : nullptr,
                                         code_sums + column, next, values + column);
        });
      } else {
        for (int half = 0; half < 2 && a.rows > t * TILE + half * HALF; half++)
          with_rows<HALF>(a.rows - t * TILE - half * HALF, [&](auto rows) __attribute__((always_inline)) {
            tile_of_segments<ZERO, DIGITS, SHIFT, rows()>(w, a, t, half, panel, column, next, values + column);
          });
      }
    for (int m = 0; m < TILE && t * TILE + m < a.rows; m++)
      store_scaled(out, t * TILE + m, start, count, DIGITS ? 1.0f : a.scale[t * TILE + m], values + m * BLOCK);
  }
}

void tiles(const Weight& w, const Activations& a, const Output& out, int64_t block, int64_t first, int64_t last,
           const uint8_t* panel) {
  if (a.planes == 1 && a.zeros)
    w.zero ? tile_block<true, false, true>(w, a, out, block, first, last, panel)
           : tile_block<false, false, true>(w, a, out, block, first, last, panel);
  else if (a.planes == 1)
    w.zero ? tile_block<true, false, false>(w, a, out, block, first, last, panel)
           : tile_block<false, false, false>(w, a, out, block, first, last, panel);
  else
    w.zero ? tile_block<true, true, false>(w, a, out, block, first, last, panel)
           : tile_block<false, true, false>(w, a, out, block, first, last, panel);
}

}  // namespace

#define KERNEL_TABLE(NAME, TEXT, FEW)                                                                                    \
  extern "C" const Kernels NAME = {TEXT,        V::BYTES,           TILE,     FEW,   quantize_row, to_float, from_float, \
                                   arrange_few, arrange_tile<TILE>, few_rows, tiles, pack_panel,   dequantize_row,       \
                                   grid_row,    grid_gradients, fake_quantize_row, fake_quantize_gradients,              \
                                   rms_norm_row, gated_row, rotate_row, attention_rows, nullptr, nullptr, nullptr, nullptr};
