// The matrix products, on the vector type V of the including file.

namespace {

constexpr int64_t MAX_IN_FEATURES = 65536;  // 255 * 128 * 65536 < 2**31: sums of products stay within int32

enum Mode { CHANNEL, GROUP, GROUP_ZERO };

// Which scale each lane of each chunk takes: scale `first[chunk] + index[chunk * LANES + lane]`, `count` of them.
struct Lanes {
  int32_t index[MAX_IN_FEATURES / 4 + V::LANES];
  int32_t first[MAX_IN_FEATURES / V::BYTES + 1];
  int32_t count[MAX_IN_FEATURES / V::BYTES + 1];

  void fill(const Weight& w) {
    const int64_t group = w.in_features / w.groups, width = 32 / w.bits;
    const int64_t chunk = width * V::LANES, chunks = (w.in_features + chunk - 1) / chunk;
    int64_t g = 0, end = group;
    for (int64_t c = 0; c < chunks; c++)
      for (int lane = 0; lane < V::LANES; lane++) {
        if (c * chunk + lane * width >= end && g + 1 < w.groups) g++, end += group;
        if (lane == 0) first[c] = int32_t(g);
        index[c * V::LANES + lane] = int32_t(g) - first[c];
        count[c] = int32_t(g) - first[c] + 1;
      }
  }
};

// One byte for each zero point of a row.
INLINE const uint8_t* unpack_zeros(const Weight& w, int64_t row, uint8_t* out) {
  const uint8_t* packed = w.zero + row * w.zero_bytes;
  if (w.bits == 8) return packed;
  for (int64_t i = 0; i < (w.groups + 1) / 2; i++) {
    out[2 * i] = packed[i] & 15;
    out[2 * i + 1] = packed[i] >> 4;
  }
  return out;
}

// M rows of activations times R rows of the weight. Weights stay in registers; each is loaded once.
// SHIFT: activations have a code of zero.
template <int BITS, int PLANES, int M, int R, Mode MODE, bool SHIFT>
struct FewRows {
  const Weight& w;
  const int8_t* x[M];       // [PLANES, chunks, chunk]
  const int32_t* sums[M];   // [PLANES, chunks, LANES]
  const uint8_t* codes[R];  // rows of the weight
  const uint16_t* scales[R];
  const uint8_t* zeros[R];
  int64_t chunks;
  const float* steps[M];    // scale of each chunk, of float activations
  const int32_t* ones;      // [chunks, LANES]
  V::F shift[M];            // minus the code of zero
  V::I total[M][R], weights[R];
  V::F value[M][R];

  template <bool WHOLE>
  INLINE void step(int64_t c, const Lanes* lanes) {
    constexpr int CHUNK = V::BYTES * 8 / BITS;
    V::I low[R], high[R], zero[R];
    V::F scale[R], sum_of_codes[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const uint8_t* p = codes[r] + c * V::BYTES;
      const V::I v = WHOLE ? V::load(p) : V::load_partial(p, w.row_bytes - c * V::BYTES);
      V::prefetch(p + R * w.row_bytes);
      low[r] = BITS == 4 ? V::low(v) : v;
      if (BITS == 4) high[r] = V::high(v);
      if (SHIFT && MODE == CHANNEL) {
        V::dot(weights[r], low[r], V::set(0x01010101));
        if (BITS == 4) V::dot(weights[r], high[r], V::set(0x01010101));
      }
      if (MODE == CHANNEL) continue;
      const int32_t* index = lanes->index + c * V::LANES;
      scale[r] = V::scales(scales[r] + lanes->first[c], lanes->count[c], index);
      if (MODE == GROUP_ZERO) zero[r] = V::zeros(zeros[r] + lanes->first[c], lanes->count[c], index);
      if (SHIFT) {
        const V::I start = V::load(ones + c * V::LANES);
        V::I sum = MODE == GROUP ? start : V::zero();
        V::dot(sum, low[r], V::set(0x01010101));
        if (BITS == 4) V::dot(sum, high[r], V::set(0x01010101));
        if (MODE == GROUP_ZERO) sum = V::sub(sum, V::mul(zero[r], start));
        sum_of_codes[r] = V::to_float(sum);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      V::F product[R];
#pragma GCC unroll 3
      for (int p = 0; p < PLANES; p++) {
        const int8_t* a = x[m] + (p * chunks + c) * CHUNK;
        const V::I first = V::load(a), second = BITS == 4 ? V::load(a + V::BYTES) : first;
        V::I start = V::zero();
        if (MODE != CHANNEL) start = V::load(sums[m] + (p * chunks + c) * V::LANES);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          if (MODE == CHANNEL) {
            V::dot(total[m][r], low[r], first);
            if (BITS == 4) V::dot(total[m][r], high[r], second);
            continue;
          }
          V::I sum = MODE == GROUP ? start : V::zero();
          V::dot(sum, low[r], first);
          if (BITS == 4) V::dot(sum, high[r], second);
          if (MODE == GROUP_ZERO) sum = V::sub(sum, V::mul(zero[r], start));
          const V::F f = SHIFT ? V::fma(shift[m], sum_of_codes[r], V::to_float(sum)) : V::to_float(sum);
          product[r] = p == 0 ? f : V::fma(f, V::setf(p == 1 ? 0x1p-8f : 0x1p-16f), product[r]);
        }
      }
      if (MODE != CHANNEL)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const V::F f = PLANES == 1 ? product[r] : V::mulf(product[r], V::setf(steps[m][c]));
          value[m][r] = V::fma(f, scale[r], value[m][r]);
        }
    }
  }

  INLINE void run(const Lanes* lanes) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        value[m][r] = V::zerof();
        total[m][r] = V::zero();
      }
    for (int r = 0; r < R; r++) weights[r] = V::zero();
    const int64_t whole = w.row_bytes / V::BYTES;
    for (int64_t c = 0; c < whole; c++) step<true>(c, lanes);
    if (whole < chunks) step<false>(whole, lanes);
  }
};

// Rows m0 .. m0 + M of the activations times the rows of one block, into `tile [M, BLOCK]`, without bias.
template <int BITS, int PLANES, int M, Mode MODE, bool SHIFT>
void few_tile(const Weight& w, const Activations& a, int64_t m0, int64_t n0, const Lanes* lanes, float* tile) {
  constexpr int R = M * PLANES <= V::REGISTERS / 8 ? 4 : 2, CHUNK = V::BYTES * 8 / BITS;
  const int64_t chunks = (w.in_features + CHUNK - 1) / CHUNK;
  FewRows<BITS, PLANES, M, R, MODE, SHIFT> rows{w};
  rows.chunks = chunks;
  rows.ones = a.ones;
  const int32_t* row_sums[M];
  int32_t code_of_zero[M];
  for (int m = 0; m < M; m++) {  // past the last row it is computed again
    const int64_t row = m0 + m < a.rows ? m0 + m : a.rows - 1;
    rows.x[m] = a.codes + row * PLANES * chunks * CHUNK;
    rows.sums[m] = a.sums + row * PLANES * chunks * V::LANES;
    rows.steps[m] = a.scale + row * (PLANES == 1 ? 1 : chunks);
    row_sums[m] = a.row_sums + row * PLANES;
    code_of_zero[m] = SHIFT ? a.zeros[row] : 0;
    rows.shift[m] = V::setf(float(-code_of_zero[m]));
  }
  uint8_t zeros[MODE == GROUP_ZERO ? R : 1][MODE == GROUP_ZERO ? MAX_IN_FEATURES / 4 + 2 : 1];
  for (int i = 0; i < BLOCK && n0 + i < w.rows; i += R) {
    int64_t n[R];
    for (int r = 0; r < R; r++) {
      n[r] = n0 + i + r < w.rows ? n0 + i + r : w.rows - 1;
      rows.codes[r] = w.codes + n[r] * w.row_bytes;
      rows.scales[r] = w.scale + n[r] * w.groups;
      if (MODE == GROUP_ZERO) rows.zeros[r] = unpack_zeros(w, n[r], zeros[r]);
    }
    rows.run(lanes);
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++) {
        float& out = tile[m * BLOCK + i + r];
        if (MODE == CHANNEL) {
          const int64_t zero = zero_point(w, n[r], 0);
          int64_t sum = V::total(rows.total[m][r]) - zero * *row_sums[m];
          if (SHIFT) sum -= code_of_zero[m] * (V::total(rows.weights[r]) - zero * w.in_features);
          out = float(sum) * float_of(uint32_t(w.scale[n[r]]) << 16) * *rows.steps[m];
        } else {
          out = PLANES == 1 ? V::totalf(rows.value[m][r]) * *rows.steps[m] : V::totalf(rows.value[m][r]);
        }
      }
  }
}

template <int BITS, int PLANES, Mode MODE, bool SHIFT>
void few_blocks(const Weight& w, const Activations& a, const Output& out, int64_t first, int64_t last) {
  constexpr int LARGE = PLANES == 1 && V::REGISTERS == 32 ? 8 : 4;
  alignas(64) float tile[LARGE * BLOCK];
  Lanes lanes_of_groups;
  const Lanes* lanes = &lanes_of_groups;
  if (MODE != CHANNEL) lanes_of_groups.fill(w);
  for (int64_t n0 = first * BLOCK; n0 < last * BLOCK; n0 += BLOCK)
    for (int64_t m0 = 0; m0 < a.rows; m0 += LARGE) {
      const int64_t left = a.rows - m0;
      const int count = w.rows - n0 < BLOCK ? int(w.rows - n0) : BLOCK;
      if (left == 1)
        few_tile<BITS, PLANES, 1, MODE, SHIFT>(w, a, m0, n0, lanes, tile);
      else if (left == 2 && V::REGISTERS == 32)
        few_tile<BITS, PLANES, 2, MODE, SHIFT>(w, a, m0, n0, lanes, tile);
      else if (left <= 4)
        few_tile<BITS, PLANES, 4, MODE, SHIFT>(w, a, m0, n0, lanes, tile);
      else
        few_tile<BITS, PLANES, LARGE, MODE, SHIFT>(w, a, m0, n0, lanes, tile);
      for (int m = 0; m < LARGE && m < left; m++) store_row(out, m0 + m, n0, count, tile + m * BLOCK);
    }
}

template <int BITS, bool SHIFT>
void few_quantized(const Weight& w, const Activations& a, const Output& out, int64_t first, int64_t last) {
  if (w.groups == 1) return few_blocks<BITS, 1, CHANNEL, SHIFT>(w, a, out, first, last);
  w.zero ? few_blocks<BITS, 1, GROUP_ZERO, SHIFT>(w, a, out, first, last)
         : few_blocks<BITS, 1, GROUP, SHIFT>(w, a, out, first, last);
}

template <int BITS>
void few_bits(const Weight& w, const Activations& a, const Output& out, int64_t first, int64_t last) {
  if (a.planes == 1 && a.zeros) return few_quantized<BITS, true>(w, a, out, first, last);
  if (a.planes == 1) return few_quantized<BITS, false>(w, a, out, first, last);
  if (a.planes == 2 && w.zero) return few_blocks<BITS, 2, GROUP_ZERO, false>(w, a, out, first, last);
  if (a.planes == 2) return few_blocks<BITS, 2, GROUP, false>(w, a, out, first, last);
  if (w.zero) return few_blocks<BITS, 3, GROUP_ZERO, false>(w, a, out, first, last);
  few_blocks<BITS, 3, GROUP, false>(w, a, out, first, last);
}

void few_rows(const Weight& w, const Activations& a, const Output& out, int64_t first, int64_t last) {
  w.bits == 4 ? few_bits<4>(w, a, out, first, last) : few_bits<8>(w, a, out, first, last);
}

constexpr int TILE = V::REGISTERS == 32 ? 12 : 4;  // TILE x 2 accumulators, 2 vectors of weights, 1 of activations

// Integer sums of ROWS rows and two vectors of columns over `quads` quads. `sums` start them (ZERO: correct them).
template <bool ZERO, int ROWS>
INLINE void multiply(const uint8_t* panel, const int8_t* x, int64_t quads, const int32_t* sums, const int32_t* zero,
                     V::I (&total)[ROWS][2]) {
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) {
    const V::I start = ZERO ? V::zero() : V::set(sums[m]);
    total[m][0] = start;
    total[m][1] = start;
  }
  for (int64_t q = 0; q < quads; q++, panel += BLOCK * 4, x += TILE * 4) {
    const V::I a = V::load(panel), b = V::load(panel + V::BYTES);
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
      const V::I quad = V::quad(x + m * 4);
      V::dot(total[m][0], a, quad);
      V::dot(total[m][1], b, quad);
    }
  }
  if (ZERO)
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
      total[m][0] = V::sub(total[m][0], V::mul(V::load(zero), V::set(sums[m])));
      total[m][1] = V::sub(total[m][1], V::mul(V::load(zero + V::LANES), V::set(sums[m])));
    }
}

// One scale for the whole row of the weight: a full register tile of integers, scaled once.
template <bool ZERO>
void tile_of_channels(const uint8_t* panel, const int8_t* x, int64_t quads, const int32_t* sums, const float* scale,
                      const int32_t* zero, const int32_t* x_zeros, const int32_t* code_sums, float* values) {
  V::I total[TILE][2];
  multiply<ZERO, TILE>(panel, x, quads, sums, zero, total);
  if (x_zeros)
#pragma GCC unroll 12
    for (int m = 0; m < TILE; m++) {
      total[m][0] = V::sub(total[m][0], V::mul(V::load(code_sums), V::set(x_zeros[m])));
      total[m][1] = V::sub(total[m][1], V::mul(V::load(code_sums + V::LANES), V::set(x_zeros[m])));
    }
#pragma GCC unroll 12
  for (int m = 0; m < TILE; m++) {
    V::storef(values + m * BLOCK, V::mulf(V::to_float(total[m][0]), V::loadf(scale)));
    V::storef(values + m * BLOCK + V::LANES, V::mulf(V::to_float(total[m][1]), V::loadf(scale + V::LANES)));
  }
}

// Segments with scales of their own: half a register tile of integers, the other half float sums.
template <bool ZERO, bool DIGITS, bool SHIFT>
void tile_of_segments(const Weight& w, const Activations& a, int64_t t, int half, const uint8_t* panel, int column,
                      float* values) {
  constexpr int ROWS = TILE / 2;
  const int64_t depth = panel_depth(w), quads = depth / 4, segments = segments_of(w, a.planes);
  const int64_t length = segments == 1 ? quads : segment_of(w, a.planes) / 4, sharing = segments / w.groups;
  const float* scales = (const float*)(panel + depth * BLOCK) + column;
  const int32_t* zeros = (const int32_t*)(panel + depth * BLOCK + w.groups * BLOCK * 4) + column;
  const float* sums_of_codes = (const float*)(zeros + w.groups * BLOCK);
  const float* steps = a.scale + (t * TILE + half * ROWS) * segments;
  V::F value[ROWS][2];
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) value[m][0] = value[m][1] = V::zerof();
  for (int p = 0; p < a.planes; p++) {
    const int8_t* x = a.codes + (t * a.planes + p) * depth * TILE + half * ROWS * 4;
    const int32_t* sums = a.sums + (t * a.planes + p) * segments * TILE + half * ROWS;
    const float factor = p == 0 ? 1.0f : p == 1 ? 0x1p-8f : 0x1p-16f;
    for (int64_t i = 0, g = 0, share = sharing; i < segments; i++, sums += TILE) {
      const int64_t q = i * length, n = quads - q < length ? quads - q : length;
      V::I total[ROWS][2];
      multiply<ZERO, ROWS>(panel + (q * BLOCK + column) * 4, x + q * TILE * 4, n, sums, zeros + g * BLOCK, total);
      const V::F first = V::loadf(scales + g * BLOCK), second = V::loadf(scales + g * BLOCK + V::LANES);
#pragma GCC unroll 12
      for (int m = 0; m < ROWS; m++) {
        V::F f0 = V::to_float(total[m][0]), f1 = V::to_float(total[m][1]);
        if (SHIFT) {
          const V::F shift = V::setf(float(-a.zeros[t * TILE + half * ROWS + m]));
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
    V::storef(values + (half * ROWS + m) * BLOCK, value[m][0]);
    V::storef(values + (half * ROWS + m) * BLOCK + V::LANES, value[m][1]);
  }
}

template <bool ZERO, bool DIGITS, bool SHIFT>
void tile_block(const Weight& w, const Activations& a, const Output& out, int64_t block, int64_t first, int64_t last,
                const uint8_t* panel) {
  const int64_t depth = panel_depth(w), start = block * BLOCK;
  const float* scales = (const float*)(panel + depth * BLOCK);
  const int32_t* zeros = (const int32_t*)(scales + w.groups * BLOCK);
  const int32_t* code_sums = zeros + w.groups * BLOCK;
  const int count = w.rows - start < BLOCK ? int(w.rows - start) : BLOCK;
  // While this block is multiplied the next one comes into the cache, a part with each tile.
  const uint8_t* next = w.codes + (start + BLOCK) * w.row_bytes;
  const int64_t next_bytes = w.rows - start >= 2 * BLOCK ? BLOCK * w.row_bytes : 0;
  const int64_t share = round_up(next_bytes / (last - first) + 1, 64);
  alignas(64) float values[TILE * BLOCK];
  for (int64_t t = first; t < last; t++) {
    const int64_t from = (t - first) * share, to = from + share < next_bytes ? from + share : next_bytes;
    for (int64_t i = from; i < to; i += 64) V::prefetch(next + i);
    for (int column = 0; column < BLOCK; column += 2 * V::LANES)
      if (!DIGITS && w.groups == 1) {
        tile_of_channels<ZERO>(panel + column * 4, a.codes + t * depth * TILE, depth / 4, a.sums + t * TILE,
                               scales + column, zeros + column, SHIFT ? a.zeros + t * TILE : nullptr,
                               code_sums + column, values + column);
      } else {
        tile_of_segments<ZERO, DIGITS, SHIFT>(w, a, t, 0, panel, column, values + column);
        tile_of_segments<ZERO, DIGITS, SHIFT>(w, a, t, 1, panel, column, values + column);
      }
    for (int m = 0; m < TILE && t * TILE + m < a.rows; m++) {
      float* row = values + m * BLOCK;
      if (!DIGITS)
        for (int i = 0; i < BLOCK; i++) row[i] *= a.scale[t * TILE + m];
      store_row(out, t * TILE + m, start, count, row);
    }
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

#define KERNEL_TABLE(NAME, TEXT, FEW)                                                                             \
  extern "C" const Kernels NAME = {TEXT,        V::BYTES,           TILE,     FEW,   quantize_row, to_float, from_float, \
                                   arrange_few, arrange_tile<TILE>, few_rows, tiles, pack_panel,   dequantize_row,       \
                                   grid_row,    grid_gradients};
