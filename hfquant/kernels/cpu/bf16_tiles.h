// The product of many rows of bfloat16, on AVX-512 with BF16. Codes without their zero points, at most 255 in magnitude,
// are exact in bfloat16, and so are their products with activations in float32, which sums them up.

namespace {

// Two codes of each of 16 rows, in the low bits of 16, less their zero points, as bfloat16.
template <int BITS>
INLINE __m512i bf16_of_codes(__m512i codes, __m512i zeros) {
  const __m512i values = _mm512_sub_epi16(_mm512_and_si512(codes, _mm512_set1_epi16((1 << BITS) - 1)), zeros);
  if (BITS == 4) {  // -15 to 15: a table of 32, indexed by the low five bits
    alignas(64) static const uint16_t table[32] = {
        0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0xC180, 0xC170, 0xC160, 0xC150, 0xC140, 0xC130,
        0xC120, 0xC110, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80};
    return _mm512_permutexvar_epi16(values, _mm512_load_si512(table));
  }
  const __m512 low = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(values, 16), 16));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_srai_epi32(values, 16));
  return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high));
}

// Pairs of codes of a word, one vector each, to `to` and on.
template <int BITS, int PAIR = 0>
INLINE void store_pairs(__m512i word, __m512i zeros, uint8_t* to) {
  constexpr int FIRST = 2 * PAIR * BITS, SECOND = (FIRST + BITS + 16) % 32;  // right rotations, into bits 0 and 16
  const __m512i codes = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_ror_epi32(word, FIRST), _mm512_ror_epi32(word, SECOND));
  V::store(to, bf16_of_codes<BITS>(codes, zeros));
  if constexpr (PAIR + 1 < 16 / BITS) store_pairs<BITS, PAIR + 1>(word, zeros, to + BLOCK * 4);
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
  if (BITS == 4 && !w.zero)
    return each_word(w, block, [&](int column, int64_t i, V::I word) __attribute__((always_inline)) {
      store_symmetric_pairs(word, panel + (i * (CODES / 2) * BLOCK + column) * 4);
    });
  each_word(w, block, [&](int column, int64_t i, V::I word) __attribute__((always_inline)) {
    __m512i zero = V::set((1 << (BITS - 1)) * 0x10001);
    if (w.zero) {
      const int64_t group = i / group_words;  // padding behind the last group: activations are zero there
      const __m512i one = V::load(zeros + (group < w.groups ? group : w.groups - 1) * BLOCK + column);
      zero = _mm512_or_si512(one, _mm512_slli_epi32(one, 16));
    }
    store_pairs<BITS>(word, zero, panel + (i * (CODES / 2) * BLOCK + column) * 4);
  });
}

void pack_bf16(const Weight& w, int64_t block, uint8_t* panel) {
  w.bits == 4 ? pack_bf16_bits<4>(w, block, panel) : pack_bf16_bits<8>(w, block, panel);
}

// Sums of ROWS rows and two vectors of columns over `pairs` pairs of inputs.
template <int ROWS>
INLINE void multiply_bf16(const uint8_t* panel, const uint16_t* x, int64_t pairs, __m512 (&total)[ROWS][2]) {
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) total[m][0] = total[m][1] = V::zerof();
  for (int64_t q = 0; q < pairs; q++, panel += BLOCK * 4, x += TILE * 2) {
    const __m512i a = V::load(panel), b = V::load(panel + V::BYTES);
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
      const __m512i pair = V::quad(x + m * 2);
      // Inline assembly, as for integers (simd_avx512.h).
      __asm__("vdpbf16ps %2, %1, %0" : "+v"(total[m][0]) : "v"(a), "v"(pair));
      __asm__("vdpbf16ps %2, %1, %0" : "+v"(total[m][1]) : "v"(b), "v"(pair));
    }
  }
}

// ROWS rows of a tile, from row `first` on; with several groups half a register tile, the other half takes their sums.
template <int ROWS>
void bf16_tile(const Weight& w, const uint8_t* panel, const uint16_t* x, int first, float* values) {
  const int64_t depth = panel_depth(w), length = w.groups == 1 ? depth / 2 : w.in_features / w.groups / 2;
  const float* scales = (const float*)(panel + depth * BLOCK * 2);
  __m512 value[ROWS][2];
  x += first * 2;
  values += first * BLOCK;
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) value[m][0] = value[m][1] = V::zerof();
  for (int64_t g = 0; g < w.groups; g++, panel += length * BLOCK * 4, x += length * TILE * 2) {
    __m512 total[ROWS][2];
    multiply_bf16<ROWS>(panel, x, length, total);
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
  const NextBlock next(w, block, last - first);
  alignas(64) float values[TILE * BLOCK];
  for (int64_t t = first; t < last; t++) {
    next.fetch(t - first);
    const uint16_t* tile = x.pairs + t * panel_depth(w) * TILE;
    const int64_t left = x.rows - t * TILE;
    if (w.groups == 1)
      with_rows<TILE>(left, [&](auto rows) __attribute__((always_inline)) {
        bf16_tile<rows()>(w, panel, tile, 0, values);
      });
    for (int half = 0; w.groups > 1 && half < 2 && left > half * HALF; half++)
      with_rows<HALF>(left - half * HALF, [&](auto rows) __attribute__((always_inline)) {
        bf16_tile<rows()>(w, panel, tile, half * HALF, values);
      });
    for (int m = 0; m < TILE && t * TILE + m < x.rows; m++) store_row(out, t * TILE + m, start, count, values + m * BLOCK);
  }
}

}  // namespace
