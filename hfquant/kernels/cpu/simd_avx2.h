// 256-bit vectors; with HFQUANT_AVXVNNI the dot product is one instruction.
#define INLINE inline __attribute__((always_inline))

namespace {

struct V {
  static constexpr int LANES = 8, BYTES = 32, REGISTERS = 16;
  using I = __m256i;
  using F = __m256;

  static INLINE I load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static INLINE I load_partial(const void* p, int64_t bytes) {
    if (bytes >= 32) return load(p);
    alignas(32) uint8_t whole[32] = {};
    memcpy(whole, p, bytes);
    return load(whole);
  }
  static INLINE void store(void* p, I v) { _mm256_storeu_si256((__m256i*)p, v); }
  static INLINE I zero() { return _mm256_setzero_si256(); }
  static INLINE I set(int32_t v) { return _mm256_set1_epi32(v); }
  static INLINE I quad(const void* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
  }
  static INLINE I low(I v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  // Of every 8 bytes the even ones, then the odd ones.
  static INLINE I evens_first(I v) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(order));
  }
  static INLINE I high(I v) { return low(_mm256_srli_epi16(v, 4)); }
#ifdef HFQUANT_AVXVNNI
  static INLINE void dot(I& sum, I u8, I s8) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u8), "x"(s8));
  }
#else
  // maddubs adds two products in int16. Seven bits of the unsigned operand keep that exact: 2 * 127 * 128 = 32512.
  // The eighth bit stands for 128 times the signed operand, whose pairs fit easily.
  static INLINE void dot(I& sum, I u8, I s8) {
    const I seven = _mm256_maddubs_epi16(_mm256_and_si256(u8, _mm256_set1_epi8(127)), s8);
    const I chosen = _mm256_and_si256(s8, _mm256_cmpgt_epi8(_mm256_setzero_si256(), u8));
    const I eighth = _mm256_maddubs_epi16(_mm256_set1_epi8(1), chosen);
    const I both = _mm256_add_epi32(_mm256_madd_epi16(seven, _mm256_set1_epi16(1)),
                                    _mm256_madd_epi16(eighth, _mm256_set1_epi16(128)));
    sum = _mm256_add_epi32(sum, both);
  }
#endif
  // Adds up 8 bytes in each 64 bits, while these are less than 2**31.
  static INLINE void add_up(I& sum, I u8) { sum = _mm256_add_epi64(sum, _mm256_sad_epu8(u8, zero())); }
  static INLINE I add_bytes(I a, I b) { return _mm256_add_epi8(a, b); }
  static INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static INLINE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static INLINE I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static INLINE I times256(I v) { return _mm256_slli_epi32(v, 8); }
  static INLINE I high_half(I v) { return _mm256_and_si256(v, _mm256_set1_epi32(int(0xFFFF0000))); }
  static INLINE int32_t total(I v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
  }

  static INLINE F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static INLINE F setf(float v) { return _mm256_set1_ps(v); }
  static INLINE F zerof() { return _mm256_setzero_ps(); }
  static INLINE F loadf(const float* p) { return _mm256_loadu_ps(p); }
  static INLINE void storef(float* p, F v) { _mm256_storeu_ps(p, v); }
  static INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static INLINE F mulf(F a, F b) { return _mm256_mul_ps(a, b); }
  static INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static INLINE F addf(F a, F b) { return _mm256_add_ps(a, b); }
  static INLINE void totals(const I (&v)[4], int32_t* out) {
    for (int i = 0; i < 4; i++) out[i] = total(v[i]);
  }
  static INLINE void totalsf(const F (&v)[4], float* out) {
    for (int i = 0; i < 4; i++) out[i] = totalf(v[i]);
  }
  static INLINE F maxf(F a, F b) { return _mm256_max_ps(a, b); }
  static INLINE F minf(F a, F b) { return _mm256_min_ps(a, b); }
  // Of 16 values those that the lowest four bits of `index` count.
  static INLINE F lookup(const float* values, F index) {
    const I i = _mm256_castps_si256(index);
    const F low = _mm256_permutevar8x32_ps(loadf(values), i), high = _mm256_permutevar8x32_ps(loadf(values + 8), i);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
  }
  static INLINE float largest(F v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static INLINE void add_product(F& sum, F a, F b) { __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }
  static INLINE float totalf(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  // Scale of each lane: lane i takes bfloat16 `p[index[i]]`, with `count` of them in memory.
  static INLINE F scales(const uint16_t* p, int count, const int32_t* index) {
    if (count == 1) return _mm256_castsi256_ps(set(int32_t(p[0]) << 16));
    __m128i raw;
    if (count == 8) {
      raw = _mm_loadu_si128((const __m128i*)p);
    } else {
      uint16_t whole[8] = {};
      for (int i = 0; i < count; i++) whole[i] = p[i];
      raw = _mm_loadu_si128((const __m128i*)whole);
    }
    const I bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
    return _mm256_permutevar8x32_ps(_mm256_castsi256_ps(bits), load(index));
  }
  static constexpr bool SHUFFLES = true;
  // 2, 4 or 8 bytes, over and over.
  template <int COUNT>
  static INLINE I repeated(const void* p) {
    int64_t v = 0;
    memcpy(&v, p, COUNT);
    if (COUNT == 2) return _mm256_set1_epi16(int16_t(v));
    return COUNT == 4 ? _mm256_set1_epi32(int32_t(v)) : _mm256_set1_epi64x(v);
  }
  // Bytes that are chosen by `bytes` from each 16, as floats.
  static INLINE F shuffle(I v, I bytes) { return _mm256_castsi256_ps(_mm256_shuffle_epi8(v, bytes)); }
  // Zero point of each lane, likewise from one byte each.
  static INLINE I zeros(const uint8_t* p, int count, const int32_t* index) {
    uint8_t whole[8] = {};
    for (int i = 0; i < count; i++) whole[i] = p[i];
    return _mm256_permutevar8x32_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)whole)), load(index));
  }

  // Vectors of word j of all 8 rows, for 8 words: what is left of a row behind `bytes` counts as zero.
  static INLINE void transpose(const uint8_t* p, int64_t stride, const int64_t* rows, int64_t bytes, I out[LANES]) {
    I r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = load_partial(p + rows[i] * stride, bytes);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      out[j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x20);
      out[4 + j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x31);
    }
  }
  // Into the second cache: what is fetched far ahead in several streams would push activations out of the first.
  static INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
};

}  // namespace
