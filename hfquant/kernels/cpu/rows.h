// Single rows: conversion, quantization and arrangement of activations, dequantization of weights. Plain loops that
// the compiler vectorizes for the instruction set of the including file.

namespace {

INLINE uint32_t bits_of(float v) {
  uint32_t out;
  memcpy(&out, &v, 4);
  return out;
}

INLINE float float_of(uint32_t v) {
  float out;
  memcpy(&out, &v, 4);
  return out;
}

INLINE float from_half(uint16_t h) {
  const uint32_t magnitude = h & 0x7FFF, sign = uint32_t(h & 0x8000) << 16;
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  return float_of((magnitude >= 0x7C00 ? 0x7F800000u | magnitude << 13 : finite) | sign);
}

// Nearest half, ties to even.
INLINE uint16_t to_half(float v) {
  const uint32_t a = bits_of(v) & 0x7FFFFFFF, sign = (bits_of(v) >> 16) & 0x8000;
  const uint32_t large = a > 0x7F800000 ? 0x7E00 : 0x7C00;
  const uint32_t small = bits_of(float_of(a) + 0.5f) - bits_of(0.5f);  // the addition rounds at the last subnormal bit
  const uint32_t normal = (a - (112u << 23) + 0xFFF + ((a >> 13) & 1)) >> 13;
  return uint16_t(sign | (a >= 0x47800000 ? large : a < 0x38800000 ? small : normal));
}

// Nearest bfloat16, ties to even.
INLINE uint16_t to_bfloat(float v) {
  const uint32_t u = bits_of(v);
  return uint16_t((u & 0x7FFFFFFF) > 0x7F800000 ? (u >> 16) | 0x40 : (u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

void to_float(const void* x, Float type, int64_t count, float* out) {
  const uint16_t* half = (const uint16_t*)x;
  if (type == Float::f32) memcpy(out, x, count * 4);
  if (type == Float::bf16)
    for (int64_t i = 0; i < count; i++) out[i] = float_of(uint32_t(half[i]) << 16);
  if (type == Float::f16)
    for (int64_t i = 0; i < count; i++) out[i] = from_half(half[i]);
}

INLINE void from_float(const float* x, Float type, int64_t count, void* out) {
  uint16_t* half = (uint16_t*)out;
  if (type == Float::f32) memcpy(out, x, count * 4);
  if (type == Float::bf16)
    for (int64_t i = 0; i < count; i++) half[i] = to_bfloat(x[i]);
  if (type == Float::f16)
    for (int64_t i = 0; i < count; i++) half[i] = to_half(x[i]);
}

constexpr float ROUND = 12582912.0f;  // 1.5 * 2**23: adding and subtracting it rounds to the nearest even integer

// Steps from zero to the nearest code; `zero` is the code of zero.
INLINE float nearest_code(float steps, float zero) {
  const float highest = 127.0f - zero, lowest = -128.0f - zero;
  const float high = steps < highest ? steps : highest, low = high > lowest ? high : lowest;
  return (low + ROUND) - ROUND;
}

// Codes of `count` <= 64 values by the reciprocal; returns the bits of the largest distance from a code.
INLINE uint32_t round_part(const float* x, int count, float inverse, float zero, int8_t* codes) {
  uint32_t distance = 0;
  for (int i = 0; i < count; i++) {
    const float steps = x[i] * inverse, nearest = nearest_code(steps, zero);
    const uint32_t off = bits_of(steps - nearest) & 0x7FFFFFFF;
    distance = off > distance ? off : distance;
    codes[i] = int8_t(int32_t(nearest + zero));
  }
  return distance;
}

// Codes `round(x / scale) + zero`. Multiplying by the reciprocal is off by less than 1e-4, so only near a tie can it round
// another way: such parts are divided, and so are those that saturate. (Division alone would cost as much as a layer.)
void round_row(const float* x, int64_t count, float scale, float zero, int8_t* codes) {
  const float inverse = 1.0f / scale, near_tie = 0.4999f;
  const bool divide = !(scale >= 0x1p-120f && scale <= 0x1p120f);
  for (int64_t start = 0; start < count; start += 64) {
    const int n = count - start < 64 ? int(count - start) : 64;
    const float* part = x + start;
    const uint32_t distance =
        n == 64 ? round_part(part, 64, inverse, zero, codes + start) : round_part(part, n, inverse, zero, codes + start);
    if (divide || distance > bits_of(near_tie))
      for (int i = 0; i < n; i++) codes[start + i] = int8_t(int32_t(nearest_code(part[i] / scale, zero) + zero));
  }
}

// Digits of x / scale in base 256, signed: x = scale * (d0 + d1 / 256 + d2 / 65536), scale a power of two such that
// |x / scale| <= 127. The remainder is at most 2**-17 (three digits) or 2**-9 (two) of a step.
INLINE float split_block(const float* x, int64_t count, int planes, uint32_t largest, int8_t* codes, int64_t padded) {
  // Exponent such that the largest magnitude is in (63.5, 127] steps; far below float32's range digits are zero.
  int exponent = int(largest >> 23) - 127 - 6 + ((largest & 0x7FFFFF) > 0x7E0000 ? 1 : 0);
  exponent = exponent < -100 ? -100 : exponent;
  const float scale = float_of(uint32_t(exponent + 127) << 23);
  const float steps = (planes == 3 ? 65536.0f : 256.0f) / scale;
  int8_t *first = codes, *second = codes + padded, *third = codes + 2 * padded;
  for (int64_t i = 0; i < count; i++) {
    const float scaled = x[i] * steps;  // exact: a power of two
    int32_t v = int32_t(scaled + (scaled < 0 ? -0.5f : 0.5f));
    if (planes == 3) {
      third[i] = int8_t(v);
      v = (v - int8_t(v)) >> 8;
    }
    second[i] = int8_t(v);
    first[i] = int8_t((v - int8_t(v)) >> 8);
  }
  return scale;
}

INLINE uint32_t largest_magnitude(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// Bits of a float to an integer of the same order, and back.
INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

// The grid of a row that spans its range, zero included: the scale, and the code of zero. NaN if a value is not finite.
INLINE float spanning_scale(const float* x, int64_t count, float* zero) {
  int32_t lowest = 0, highest = 0;  // as integers in the order of the floats: those are compared several at a time
  for (int64_t i = 0; i < count; i++) {
    const int32_t key = ordered(int32_t(bits_of(x[i])));
    lowest = key < lowest ? key : lowest;
    highest = key > highest ? key : highest;
  }
  *zero = 0;
  if (highest >= 0x7F800000 || lowest <= ordered(int32_t(0xFF800000))) return float_of(0x7FC00000);
  const float low = float_of(uint32_t(ordered(lowest))), high = float_of(uint32_t(highest));
  const float scale = (high - low) / 255.0f, steps = low / (scale == 0 ? 1.0f : scale);
  const float code = -128.0f - ((steps + ROUND) - ROUND);
  *zero = code < -128.0f ? -128.0f : code > 127.0f ? 127.0f : code;
  return scale;
}

// The scale of a row, and the code of zero; NaN if a value is one, or has no largest magnitude.
INLINE float row_scale(const float* x, int64_t count, const float* given, float* zero) {
  if (zero && !given) return spanning_scale(x, count, zero);
  const uint32_t largest = largest_magnitude(x, count);
  if (given ? largest > 0x7F800000 : largest >= 0x7F800000) return float_of(0x7FC00000);
  return given ? *given : float_of(largest) / 127.0f;
}

void quantize_row(const float* x, int64_t count, int planes, int64_t block, const float* given, int8_t* codes,
                  int64_t padded, float* scales, float* zero) {
  if (zero) *zero = 0;
  for (int p = 0; p < planes; p++) memset(codes + p * padded + count, 0, padded - count);
  const float scale = row_scale(x, count, given, zero);
  const int64_t blocks = planes == 1 ? 1 : (count + block - 1) / block;
  if (scale != scale) {  // the row is NaN
    for (int p = 0; p < planes; p++) memset(codes + p * padded, 0, count);
    for (int64_t b = 0; b < blocks; b++) scales[b] = scale;
    return;
  }
  if (planes == 1) {
    scales[0] = scale == 0 && !given ? 1.0f : scale;
    return round_row(x, count, scales[0], zero ? *zero : 0, codes);
  }
  const auto split = [&](int64_t b, int64_t size) __attribute__((always_inline)) {
    const float* part = x + b * block;
    scales[b] = split_block(part, size, planes, largest_magnitude(part, size), codes + b * block, padded);
  };
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t left = count - b * block, size = left < block ? left : block;
    size == 32 ? split(b, 32) : size == 128 ? split(b, 128) : split(b, size);
  }
}

// Splits pairs as INT4 bytes hold them: even codes (low halves) and odd ones.
INLINE void split_pairs(const int8_t* codes, int64_t pairs, int8_t* even, int8_t* odd) {
  for (int64_t i = 0; i < pairs; i++) {
    even[i] = codes[2 * i];
    odd[i] = codes[2 * i + 1];
  }
}

INLINE int32_t sum_of(const int8_t* codes, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; i++) sum += codes[i];
  return sum;
}

void arrange_few(const Weight& w, int planes, const int8_t* natural, int64_t padded, int8_t* codes, int32_t* sums,
                 int32_t* row_sum) {
  const int64_t chunk = chunk_of(w, planes, V::BYTES), chunks = (w.in_features + chunk - 1) / chunk;
  const V::I factor = V::set(w.zero ? 0x01010101 : w.bits == 4 ? 0x08080808 : int32_t(0x80808080));
  *row_sum = sum_of(natural, w.in_features);
  for (int p = 0; p < planes; p++, natural += padded, codes += chunks * chunk)
    for (int64_t c = 0; c < chunks; c++) {
      const int8_t* part = natural + c * chunk;
      if (w.bits == 4)
        split_pairs(part, V::BYTES, codes + c * chunk, codes + c * chunk + V::BYTES);
      else
        memcpy(codes + c * chunk, part, chunk);
    }
  if (w.groups == 1 && planes == 1) return;
  codes -= planes * chunks * chunk;
  for (int part = 0; part < parts_of(w.bits, planes); part++)
    for (int64_t c = 0; c < chunks; c++, sums += V::LANES) {
      const int last = part == 0 && parts_of(w.bits, planes) == 2 ? 1 : planes;
      V::I sum = V::zero();
      for (int p = part; p < last; p++) {
        sum = V::times256(sum);
        for (int64_t i = 0; i < chunk; i += V::BYTES) V::dot(sum, factor, V::load(codes + (p * chunks + c) * chunk + i));
      }
      V::store(sums, w.zero ? sum : V::sub(V::zero(), sum));
    }
}

// Quads [quads, TILE, 4] from rows [TILE] of codes that are `stride` bytes apart.
template <int TILE>
INLINE void transpose_quads(const int8_t* rows, int64_t stride, int64_t quads, int8_t* out) {
  int64_t q = 0;
  if (TILE <= V::LANES && V::SHUFFLES) {
    int64_t index[V::LANES];
    for (int i = 0; i < V::LANES; i++) index[i] = i < TILE ? i : TILE - 1;
    V::I word[V::LANES];
    for (; q + V::LANES <= quads; q += V::LANES) {
      V::transpose((const uint8_t*)rows + q * 4, stride, index, V::BYTES, word);
#pragma GCC unroll 16
      for (int i = 0; i < V::LANES - 1; i++) V::store(out + (q + i) * TILE * 4, word[i]);  // the next one covers what is too much
      alignas(64) int8_t last[V::BYTES];
      V::store(last, word[V::LANES - 1]);
      memcpy(out + (q + V::LANES - 1) * TILE * 4, last, TILE * 4);
    }
  }
  for (; q < quads; q++)
    for (int row = 0; row < TILE; row++) memcpy(out + (q * TILE + row) * 4, rows + row * stride + q * 4, 4);
}

// Sums of each row of a tile [quads, TILE, 4] over segments of `length` quads, times `factor`: [segments, TILE].
template <int TILE>
INLINE void sum_segments(const int8_t* codes, int64_t quads, int64_t length, int64_t segments, int32_t factor, int32_t* sums) {
  constexpr int PARTS = (TILE + V::LANES - 1) / V::LANES, LAST = TILE - (PARTS - 1) * V::LANES;  // vectors of a quad
  for (int64_t i = 0; i < segments; i++, sums += TILE) {
    const int64_t end = (i + 1) * length < quads ? (i + 1) * length : quads;
    for (int part = 0; part < PARTS; part++) {
      const int8_t* from = codes + part * V::BYTES;
      V::I sum = V::zero();
      for (int64_t q = i * length; q < end; q++)  // what is loaded behind the rows of a quad is the next one's
        V::dot(sum, V::set(0x01010101), q + V::LANES < quads ? V::load(from + q * TILE * 4) : V::load_partial(from + q * TILE * 4, LAST * 4));
      alignas(64) int32_t out[V::LANES];
      V::store(out, V::mul(sum, V::set(factor)));
      memcpy(sums + part * V::LANES, out, (part + 1 < PARTS ? V::LANES : LAST) * 4);
    }
  }
}

template <int TILE>
void arrange_tile(const Weight& w, int planes, int8_t* natural, int64_t padded, int8_t* codes, int32_t* sums) {
  const int64_t depth = panel_depth(w), segments = segments_of(w, planes);
  const int64_t length = segments == 1 ? depth : segment_of(w, planes);
  const int32_t factor = w.zero ? 1 : -(1 << (w.bits - 1));
  for (int p = 0; p < planes; p++, natural += padded, codes += depth * TILE, sums += segments * TILE) {
    for (int row = 0; w.bits == 4 && row < TILE; row++) {
      int8_t* from = natural + row * planes * padded;
      for (int64_t k = 0; k < depth; k += V::BYTES) V::store(from + k, V::evens_first(V::load(from + k)));
    }
    transpose_quads<TILE>(natural, planes * padded, depth / 4, codes);
    sum_segments<TILE>(codes, depth / 4, length / 4, segments, factor, sums);
  }
}

INLINE int zero_point(const Weight& w, int64_t row, int64_t group) {
  if (!w.zero) return 1 << (w.bits - 1);
  const uint8_t* packed = w.zero + row * w.zero_bytes;
  return w.bits == 8 ? packed[group] : packed[group / 2] >> (group % 2 * 4) & 15;
}

void dequantize_row(const Weight& w, int64_t row, Float type, void* out) {
  constexpr int PART = 512;
  const int64_t group = w.in_features / w.groups, size = type == Float::f32 ? 4 : 2;
  const uint8_t* packed = w.codes + row * w.row_bytes;
  uint8_t unpacked[PART];
  float values[PART];
  for (int64_t start = 0; start < w.in_features; start += PART) {
    const int n = w.in_features - start < PART ? int(w.in_features - start) : PART;
    const uint8_t* codes = w.bits == 8 ? packed + start : unpacked;
    if (w.bits == 4)
      for (int i = 0; i < (n + 1) / 2; i++) {
        unpacked[2 * i] = packed[start / 2 + i] & 15;
        unpacked[2 * i + 1] = packed[start / 2 + i] >> 4;
      }
    for (int i = 0; i < n;) {
      const int64_t g = (start + i) / group, left = (g + 1) * group - start;
      const int end = left < n ? int(left) : n, zero = zero_point(w, row, g);
      const float scale = float_of(uint32_t(w.scale[row * w.groups + g]) << 16);
      for (; i < end; i++) values[i] = float(codes[i] - zero) * scale;
    }
    from_float(values, type, n, (char*)out + start * size);
  }
}

}  // namespace
