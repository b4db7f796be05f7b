// Plain C++ with the same interface as the vector headers: four lanes, on any processor.
#define INLINE inline __attribute__((always_inline))

namespace {

struct V {
  static constexpr int LANES = 4, BYTES = 16, REGISTERS = 16;
  struct I {
    int32_t v[LANES];
  };
  struct F {
    float v[LANES];
  };

#define LANEWISE(RESULT, EXPRESSION)                        \
  {                                                         \
    RESULT out;                                             \
    for (int i = 0; i < LANES; i++) out.v[i] = EXPRESSION;  \
    return out;                                             \
  }
  static INLINE I load(const void* p) {
    I out;
    memcpy(out.v, p, BYTES);
    return out;
  }
  static INLINE I load_partial(const void* p, int64_t bytes) {
    I out = {};
    memcpy(out.v, p, bytes < BYTES ? bytes : BYTES);
    return out;
  }
  static INLINE void store(void* p, I v) { memcpy(p, v.v, BYTES); }
  static INLINE I zero() { return {}; }
  static INLINE I set(int32_t v) LANEWISE(I, v)
  static INLINE I quad(const void* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return set(v);
  }
  static INLINE I low(I v) LANEWISE(I, v.v[i] & 0x0F0F0F0F)
  // Of every 8 bytes the even ones, then the odd ones.
  static INLINE I evens_first(I v) {
    I out;
    for (int i = 0; i < BYTES; i++) ((uint8_t*)out.v)[i] = ((const uint8_t*)v.v)[i / 8 * 8 + i % 4 * 2 + i % 8 / 4];
    return out;
  }
  static INLINE I high(I v) LANEWISE(I, (v.v[i] >> 4) & 0x0F0F0F0F)
  static INLINE void dot(I& sum, I u8, I s8) {
    uint8_t u[BYTES];
    int8_t s[BYTES];
    memcpy(u, u8.v, BYTES);
    memcpy(s, s8.v, BYTES);
    for (int i = 0; i < LANES; i++)
      for (int j = 0; j < 4; j++) sum.v[i] = wrap(int64_t(sum.v[i]) + u[4 * i + j] * s[4 * i + j]);
  }
  // Partial sums may leave int32 and come back, as in the vector instructions.
  static INLINE int32_t wrap(int64_t v) { return int32_t(uint32_t(uint64_t(v))); }
  static INLINE void add_up(I& sum, I u8) { dot(sum, u8, set(0x01010101)); }
  static INLINE I add_bytes(I a, I b) LANEWISE(I, a.v[i] + b.v[i])  // of small ones: nothing is carried
  static INLINE I add(I a, I b) LANEWISE(I, wrap(int64_t(a.v[i]) + b.v[i]))
  static INLINE I sub(I a, I b) LANEWISE(I, wrap(int64_t(a.v[i]) - b.v[i]))
  static INLINE I mul(I a, I b) LANEWISE(I, wrap(int64_t(a.v[i]) * b.v[i]))
  static INLINE I times256(I v) LANEWISE(I, wrap(int64_t(v.v[i]) * 256))
  static INLINE I high_half(I v) LANEWISE(I, int32_t(uint32_t(v.v[i]) & 0xFFFF0000u))
  static INLINE int32_t total(I v) { return wrap(int64_t(v.v[0]) + v.v[1] + v.v[2] + v.v[3]); }

  static INLINE F to_float(I v) LANEWISE(F, float(v.v[i]))
  static INLINE F setf(float v) LANEWISE(F, v)
  static INLINE F zerof() { return {}; }
  static INLINE F loadf(const float* p) LANEWISE(F, p[i])
  static INLINE void storef(float* p, F v) { memcpy(p, v.v, BYTES); }
  static INLINE F fma(F a, F b, F c) LANEWISE(F, a.v[i] * b.v[i] + c.v[i])
  static INLINE F mulf(F a, F b) LANEWISE(F, a.v[i] * b.v[i])
  static INLINE float fused(float a, float b, float c) { return a * b + c; }
  static INLINE F addf(F a, F b) LANEWISE(F, a.v[i] + b.v[i])
  static INLINE void totals(const I (&v)[4], int32_t* out) {
    for (int i = 0; i < 4; i++) out[i] = total(v[i]);
  }
  static INLINE void totalsf(const F (&v)[4], float* out) {
    for (int i = 0; i < 4; i++) out[i] = totalf(v[i]);
  }
  static INLINE float largest(F v) {
    const F pairs = maxf(v, {{v.v[2], v.v[3], v.v[2], v.v[3]}});
    return pairs.v[0] > pairs.v[1] ? pairs.v[0] : pairs.v[1];
  }
  static INLINE F maxf(F a, F b) LANEWISE(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
  static INLINE F minf(F a, F b) LANEWISE(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
  // Of 16 values those that the lowest four bits of `index` count.
  static INLINE F lookup(const float* values, F index) {
    int32_t at[LANES];
    memcpy(at, index.v, BYTES);
    LANEWISE(F, values[at[i] & 15])
  }
  static INLINE void add_product(F& sum, F a, F b) { sum = fma(a, b, sum); }
  static INLINE float totalf(F v) { return (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]); }

  static INLINE float bfloat(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float out;
    memcpy(&out, &wide, 4);
    return out;
  }
  static INLINE F scales(const uint16_t* p, int, const int32_t* index) LANEWISE(F, bfloat(p[index[i]]))
  static constexpr bool SHUFFLES = false;
  template <int>
  static INLINE I repeated(const void*) { return {}; }
  static INLINE F shuffle(I, I) { return {}; }
  static INLINE I zeros(const uint8_t* p, int, const int32_t* index) LANEWISE(I, p[index[i]])

  static INLINE void transpose(const uint8_t* p, int64_t stride, const int64_t* rows, int64_t bytes, I out[LANES]) {
    for (int i = 0; i < LANES; i++) {
      const I row = load_partial(p + rows[i] * stride, bytes);
      for (int j = 0; j < LANES; j++) out[j].v[i] = row.v[j];
    }
  }
  static INLINE void prefetch(const void*) {}
#undef LANEWISE
};

}  // namespace
