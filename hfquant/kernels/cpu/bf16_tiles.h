// The product of many rows of bfloat16, on AVX-512 with BF16. Codes without their zero points, at most 255 in magnitude,
// are exact in bfloat16, and so are their products with activations in float32, which sums them up.

namespace {

// Pairs of INT8 codes of a word, less their zero points, as bfloat16: one vector each, to `to` and on.
INLINE void store_byte_pairs(V::I word, V::F zeros, uint8_t* to) {
  // In the lowest bits of a float of 2**23, or in bits 8 to 15 of one of 2**15, a byte counts as it is.
  const V::F first = V::addf(zeros, V::setf(0x1p23f)), second = V::addf(zeros, V::setf(0x1p15f));
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m512i two = i ? _mm512_srli_epi32(word, 16) : word;
    const __m512i a = _mm512_ternarylogic_epi32(two, V::set(0xFF), V::set(0x4B000000), 0xEA);  // two & mask | float
    const __m512i b = _mm512_ternarylogic_epi32(two, V::set(0xFF00), V::set(0x47000000), 0xEA);
    const __m512i low = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(a), first));
    const __m512i high = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(b), second));
    V::store(to + i * BLOCK * 4, _mm512_or_si512(_mm512_srli_epi32(low, 16), high));  // the lower halves are zero
  }
}

// The same of INT4 codes; zero points are in both halves of a word.
template <int PAIR = 0>
INLINE void store_pairs(V::I word, V::I zeros, uint8_t* to) {
  alignas(64) static const uint16_t table[32] = {  // of -15 to 15, by the low five bits
      0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120,
      0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0xC180, 0xC170, 0xC160, 0xC150, 0xC140, 0xC130,
      0xC120, 0xC110, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80};
  constexpr int FIRST = 8 * PAIR, SECOND = (FIRST + 4 + 16) % 32;  // right rotations, into bits 0 and 16
  const __m512i codes = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_ror_epi32(word, FIRST), _mm512_ror_epi32(word, SECOND));
  const __m512i values = _mm512_sub_epi16(V::low(codes), zeros);
  V::store(to, _mm512_permutexvar_epi16(values, _mm512_load_si512(table)));
  if constexpr (PAIR < 3) store_pairs<PAIR + 1>(word, zeros, to + BLOCK * 4);
}

// The same for INT4 with zero points of 8: whatever the bits above a code, the low five choose its value from a table.
template <int PAIR = 0>
INLINE void store_symmetric_pairs(__m512i word, uint8_t* to) {
  alignas(64) static const uint16_t table[32] = {
      0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000,
      0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040,
      0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
  constexpr int HALF_WORD = PAIR / 2 * 2, SHIFT = PAIR % 2 * 8;  // in bytes, in bits
  const __m128i twice = _mm_add_epi8(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13), _mm_set1_epi8(HALF_WORD));
  const __m512i halves = _mm512_shuffle_epi8(word, _mm512_broadcast_i32x4(twice));
  const __m512i codes = _mm512_srlv_epi16(halves, _mm512_set1_epi32(SHIFT | (SHIFT + 4) << 16));
  V::store(to, _mm512_permutexvar_epi16(codes, _mm512_load_si512(table)));
  if constexpr (PAIR < 3) store_symmetric_pairs<PAIR + 1>(word, to + BLOCK * 4);
}

template <int BITS>
void pack_bf16_bits(const Weight& w, int64_t block, uint8_t* panel) {
  constexpr int CODES = 32 / BITS;  // of a word
  const int64_t depth = panel_depth(w), group_words = w.groups == 1 ? depth : w.in_features / w.groups / CODES;
  float* scales = (float*)(panel + depth * BLOCK * 2);
  const int32_t* zeros = (const int32_t*)(scales + w.groups * BLOCK);
  pack_scales(w, block, scales);
  const auto store = [&](int column, int64_t i, V::I word) __attribute__((always_inline)) {
    uint8_t* to = panel + (i * (CODES / 2) * BLOCK + column) * 4;
    if (!w.zero) return BITS == 4 ? store_symmetric_pairs(word, to) : store_byte_pairs(word, V::setf(128), to);
    const int64_t group = i / group_words;  // padding behind the last group: activations are zero there
    const V::I zero = V::load(zeros + (group < w.groups ? group : w.groups - 1) * BLOCK + column);
    if (BITS == 8) return store_byte_pairs(word, V::to_float(zero), to);
    store_pairs(word, _mm512_or_si512(zero, _mm512_slli_epi32(zero, 16)), to);
  };
  each_word(w, block, store);
}

void pack_bf16(const Weight& w, int64_t block, uint8_t* panel) {
  w.bits == 4 ? pack_bf16_bits<4>(w, block, panel) : pack_bf16_bits<8>(w, block, panel);
}

void round_row_bf16(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += V::LANES) {
    const __mmask16 mask = count - i < V::LANES ? (1u << (count - i)) - 1 : 0xFFFF;
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + i));
    _mm256_mask_storeu_epi16(out + i, mask, rounded);
  }
}

// A tile [K / 2, TILE, 2] from rows [TILE, depth].
void arrange_bf16(const uint16_t* rows, int64_t depth, uint16_t* out) {
  transpose_quads<TILE>((const int8_t*)rows, depth * 2, depth / 2, (int8_t*)out);
}

// Sums of ROWS rows and two vectors of columns over `pairs` pairs of inputs.
template <int ROWS>
INLINE void multiply_bf16(const uint8_t* panel, const uint16_t* x, int64_t pairs, NextBlock& block,
                          __m512 (&total)[ROWS][2]) {
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) total[m][0] = total[m][1] = V::zerof();
  NextBlock next = block;  // in registers
  for (int64_t q = 0; q < pairs; q++, panel += BLOCK * 4, x += TILE * 2) {
    const __m512i a = V::load(panel), b = V::load(panel + V::BYTES);
    V::prefetch((const char*)x + AHEAD);
    next.fetch_line();
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
      const __m512i pair = V::quad(x + m * 2);
      // Inline assembly, as for integers (simd_avx512.h).
      __asm__("vdpbf16ps %2, %1, %0" : "+v"(total[m][0]) : "v"(a), "v"(pair));
      __asm__("vdpbf16ps %2, %1, %0" : "+v"(total[m][1]) : "v"(b), "v"(pair));
    }
  }
  block = next;
}

// ROWS rows of a tile, from row `first` on; with several groups half a register tile, the other half takes their sums.
template <int ROWS>
void bf16_tile(const Weight& w, const uint8_t* panel, const uint16_t* x, int first, NextBlock& next, float* values) {
  const int64_t depth = panel_depth(w), length = w.groups == 1 ? depth / 2 : w.in_features / w.groups / 2;
  const float* scales = (const float*)(panel + depth * BLOCK * 2);
  __m512 value[ROWS][2];
  x += first * 2;
  values += first * BLOCK;
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) value[m][0] = value[m][1] = V::zerof();
  for (int64_t g = 0; g < w.groups; g++, panel += length * BLOCK * 4, x += length * TILE * 2) {
    __m512 total[ROWS][2];
    multiply_bf16<ROWS>(panel, x, length, next, total);
    const __m512 low = V::loadf(scales + g * BLOCK), high = V::loadf(scales + g * BLOCK + V::LANES);
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
      value[m][0] = V::fma(total[m][0], low, value[m][0]);
      value[m][1] = V::fma(total[m][1], high, value[m][1]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) {
    V::storef(values + m * BLOCK, value[m][0]);
    V::storef(values + m * BLOCK + V::LANES, value[m][1]);
  }
}

void bf16_tiles(const Weight& w, const Bf16Rows& x, const Output& out, int64_t block, int64_t first, int64_t last,
                const uint8_t* panel) {
  const int64_t start = block * BLOCK;
  const int count = w.rows - start < BLOCK ? int(w.rows - start) : BLOCK;
  NextBlock next(w, block, (last - first) * (panel_depth(w) / 2) * (w.groups == 1 ? 1 : 2));
  alignas(64) float values[TILE * BLOCK];
  for (int64_t t = first; t < last; t++) {
    const uint16_t* tile = x.pairs + t * panel_depth(w) * TILE;
    const int64_t left = x.rows - t * TILE;
    if (w.groups == 1)
      with_rows<TILE>(left, [&](auto rows) __attribute__((always_inline)) {
        bf16_tile<rows()>(w, panel, tile, 0, next, values);
      });
    for (int half = 0; w.groups > 1 && half < 2 && left > half * HALF; half++)
      with_rows<HALF>(left - half * HALF, [&](auto rows) __attribute__((always_inline)) {
        bf16_tile<rows()>(w, panel, tile, half * HALF, next, values);
      });
    for (int m = 0; m < TILE && t * TILE + m < x.rows; m++) store_row(out, t * TILE + m, start, count, values + m * BLOCK);
  }
}

}  // namespace
