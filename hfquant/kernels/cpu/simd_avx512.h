// 512-bit vectors with VNNI.
#define INLINE inline __attribute__((always_inline))

namespace {

struct V {
  static constexpr int LANES = 16, BYTES = 64, REGISTERS = 32;
  using I = __m512i;
  using F = __m512;

  static INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
  static INLINE I load_partial(const void* p, int64_t bytes) {
    return _mm512_maskz_loadu_epi8(bytes >= 64 ? ~0ull : (1ull << bytes) - 1, p);
  }
  static INLINE void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  static INLINE I zero() { return _mm512_setzero_si512(); }
  static INLINE I set(int32_t v) { return _mm512_set1_epi32(v); }
  static INLINE I quad(const void* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
  }
  static INLINE I low(I v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  // Of every 8 bytes the even ones, then the odd ones.
  static INLINE I evens_first(I v) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(order));
  }
  static INLINE I high(I v) { return low(_mm512_srli_epi16(v, 4)); }
  // Inline assembly: with the intrinsic GCC 12 copies accumulators and spills a register tile (2x slower).
  static INLINE void dot(I& sum, I u8, I s8) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8)); }
  // Adds up bytes; in fewer instructions than their differences from zero take.
  static INLINE void add_up(I& sum, I u8) { dot(sum, u8, set(0x01010101)); }
  static INLINE I add_bytes(I a, I b) { return _mm512_add_epi8(a, b); }
  static INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static INLINE I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static INLINE I times256(I v) { return _mm512_slli_epi32(v, 8); }
  static INLINE I high_half(I v) { return _mm512_and_si512(v, _mm512_set1_epi32(int(0xFFFF0000))); }
  static INLINE int32_t total(I v) { return _mm512_reduce_add_epi32(v); }
  // The totals of four vectors.
  static INLINE void totals(const I (&v)[4], int32_t* out) {
    const I ab = add(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const I cd = add(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    const I all = add(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128((__m128i*)out, sums);
  }

  static INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static INLINE F setf(float v) { return _mm512_set1_ps(v); }
  static INLINE F zerof() { return _mm512_setzero_ps(); }
  static INLINE F loadf(const float* p) { return _mm512_loadu_ps(p); }
  static INLINE void storef(float* p, F v) { _mm512_storeu_ps(p, v); }
  static INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static INLINE F mulf(F a, F b) { return _mm512_mul_ps(a, b); }
  static INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static INLINE F addf(F a, F b) { return _mm512_add_ps(a, b); }
  static INLINE F maxf(F a, F b) { return _mm512_max_ps(a, b); }
  static INLINE F minf(F a, F b) { return _mm512_min_ps(a, b); }
  // Of 16 values those that the lowest four bits of `index` count.
  static INLINE F lookup(const float* values, F index) { return _mm512_permutexvar_ps(_mm512_castps_si512(index), loadf(values)); }
  static INLINE float largest(F v) { return _mm512_reduce_max_ps(v); }
  // Inline assembly for the same reason as above.
  static INLINE void add_product(F& sum, F a, F b) { __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
  static INLINE float totalf(F v) { return _mm512_reduce_add_ps(v); }
  static INLINE void totalsf(const F (&v)[4], float* out) {
    const F ab = addf(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const F cd = addf(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const F all = addf(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }

  // Scale of each lane: lane i takes bfloat16 `p[index[i]]`, with `count` of them in memory.
  static INLINE F scales(const uint16_t* p, int count, const int32_t* index) {
    const __m256i raw = _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
    return _mm512_permutexvar_ps(_mm512_loadu_si512(index), _mm512_castsi512_ps(bits));
  }
  static constexpr bool SHUFFLES = true;
  // 2, 4 or 8 bytes, over and over.
  template <int COUNT>
  static INLINE I repeated(const void* p) {
    int64_t v = 0;
    memcpy(&v, p, COUNT);
    if (COUNT == 2) return _mm512_set1_epi16(int16_t(v));
    return COUNT == 4 ? _mm512_set1_epi32(int32_t(v)) : _mm512_set1_epi64(v);
  }
  // Bytes that are chosen by `bytes` from each 16, as floats.
  static INLINE F shuffle(I v, I bytes) { return _mm512_castsi512_ps(_mm512_shuffle_epi8(v, bytes)); }
  // Zero point of each lane, likewise from one byte each.
  static INLINE I zeros(const uint8_t* p, int count, const int32_t* index) {
    const __m128i raw = _mm_maskz_loadu_epi8((__mmask16)((1u << count) - 1), p);
    return _mm512_permutexvar_epi32(_mm512_loadu_si512(index), _mm512_cvtepu8_epi32(raw));
  }

  // Vectors of word j of all 16 rows, for 16 words: what is left of a row behind `bytes` counts as zero.
  static INLINE void transpose(const uint8_t* p, int64_t stride, const int64_t* rows, int64_t bytes, I out[LANES]) {
    const __mmask64 mask = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi8(mask, p + rows[i] * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // r[4i + j]: word 4q + j of rows 4i .. 4i + 3, in 128-bit quarter q
      r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {  // a 4 x 4 transpose of quarters
      const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
      const __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
      out[j] = _mm512_shuffle_i32x4(a, b, 0x88);
      out[8 + j] = _mm512_shuffle_i32x4(a, b, 0xDD);
      out[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
      out[12 + j] = _mm512_shuffle_i32x4(c, d, 0xDD);
    }
  }
  // Into the second cache: what is fetched far ahead in several streams would push activations out of the first.
  static INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
};

}  // namespace
