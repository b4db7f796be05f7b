// Rows of what lies between quantized layers: norms, gated activations, rotary embedding. On the vector type V of the
// including file, or plain loops that the compiler vectorizes.

namespace {

constexpr int BETWEEN_PART = 256;  // values of a row that are worked on at once

// `x [count]` as float32, through `scratch [count]` unless it is.
INLINE const float* floats_of(const void* x, Float type, int64_t count, float* scratch) {
  if (type == Float::f32) return (const float*)x;
  to_float(x, type, count, scratch);
  return scratch;
}

// Rounds to `type` and back.
INLINE void round_to(Float type, int64_t count, float* values) {
  uint16_t half[BETWEEN_PART];
  for (int64_t i = 0; type != Float::f32 && i < count; i += BETWEEN_PART) {
    const int64_t n = count - i < BETWEEN_PART ? count - i : BETWEEN_PART;
    from_float(values + i, type, n, half);
    to_float(half, type, n, values + i);
  }
}

INLINE float sum_of_squares(const float* x, int64_t count) {
  V::F sums[4] = {V::zerof(), V::zerof(), V::zerof(), V::zerof()};
  int64_t i = 0;
  for (; i + 4 * V::LANES <= count; i += 4 * V::LANES)
    for (int j = 0; j < 4; j++) {
      const V::F v = V::loadf(x + i + j * V::LANES);
      sums[j] = V::fma(v, v, sums[j]);
    }
  float total = V::totalf(V::addf(V::addf(sums[0], sums[1]), V::addf(sums[2], sums[3])));
  for (; i < count; i++) total += x[i] * x[i];
  return total;
}

void rms_norm_row(const float* x, Float type, int64_t count, const float* weight, float eps, bool round_first, float* values,
                  void* out) {
  const float factor = 1.0f / __builtin_sqrtf(sum_of_squares(x, count) / float(count) + eps);
  for (int64_t i = 0; i < count; i++) values[i] = x[i] * factor;
  if (round_first) round_to(type, count, values);
  for (int64_t i = 0; i < count; i++) values[i] *= weight[i];
  if (values != out) from_float(values, type, count, out);
}

// e**x to 2e-7 of it; infinity above 88.7. NaN stays.
INLINE float exponential(float x) {
  const float low = x < -87.0f ? -87.0f : x, clamped = low > 89.0f ? 89.0f : low;
  const float n = V::fused(clamped, 1.44269504f, ROUND) - ROUND;
  const float r = V::fused(n, 2.12194440e-4f, V::fused(n, -0.693359375f, clamped));  // log 2 in two parts
  float p = 1.0f / 5040;
  p = V::fused(p, r, 1.0f / 720);
  p = V::fused(p, r, 1.0f / 120);
  p = V::fused(p, r, 1.0f / 24);
  p = V::fused(p, r, 1.0f / 6);
  p = V::fused(p, r, 0.5f);
  p = V::fused(V::fused(p, r, 1.0f), r, 1.0f);
  return p * float_of(uint32_t(int32_t(n) + 127) << 23);
}

// act(gate); `values` are not `gate`, and have room for whole vectors.
INLINE void act_part(const float* gate, int64_t count, Gate kind, float* values) {
  if (kind == Gate::silu)
    for (int64_t i = 0; i < count; i++) values[i] = gate[i] / (1.0f + exponential(-gate[i]));
  else
    gelu_part(gate, count, tail_of(kind), values);
}

// The result may be the gate.
void gated_row(const void* gate, const void* up, Float type, int64_t count, Gate kind, void* out) {
  float left[BETWEEN_PART], right[BETWEEN_PART], values[BETWEEN_PART];
  const int64_t size = type == Float::f32 ? 4 : 2;
  for (int64_t i = 0; i < count; i += BETWEEN_PART) {
    const int64_t n = count - i < BETWEEN_PART ? count - i : BETWEEN_PART;
    act_part(floats_of((const char*)gate + i * size, type, n, left), n, kind, values);
    if (up) {
      const float* u = floats_of((const char*)up + i * size, type, n, right);
      round_to(type, n, values);
      for (int64_t j = 0; j < n; j++) values[j] *= u[j];
    }
    from_float(values, type, n, (char*)out + i * size);
  }
}

INLINE void store_values(const Output& out, int64_t m, int64_t n0, int count, float* values) {
  if (out.bias)
    for (int i = 0; i < count; i++) values[i] += out.bias[n0 + i];
  float acted[BETWEEN_PART];
  if (out.act != Gate::none) {
    round_to(out.type, count, values);
    act_part(values, count, out.act, acted);
    values = acted;
  }
  const int64_t size = out.type == Float::f32 ? 4 : 2;
  from_float(values, out.type, count, (char*)out.data + (m * out.columns + n0) * size);
}

// Writes `act(values [count] + bias)` to row `m` of the result, from column `n0`.
INLINE void store_row(const Output& out, int64_t m, int64_t n0, int count, float* values) {
  count == BLOCK ? store_values(out, m, n0, BLOCK, values) : store_values(out, m, n0, count, values);
}

// x * cos + (-x2, x1) * sin for the halves x1, x2 of `x [count]`, rounded to `type` after every operation.
void rotate_row(const float* x, Float type, int64_t count, const float* cos, const float* sin, float* values, void* out) {
  const int64_t half = count / 2;
  float* turned = values + count;
  for (int64_t i = 0; i < half; i++) {
    turned[i] = -x[half + i] * sin[i];
    turned[half + i] = x[i] * sin[half + i];
  }
  for (int64_t i = 0; i < count; i++) values[i] = x[i] * cos[i];
  round_to(type, count, turned);
  round_to(type, count, values);
  float* to = type == Float::f32 ? (float*)out : values;
  for (int64_t i = 0; i < count; i++) to[i] = values[i] + turned[i];
  if (type != Float::f32) from_float(values, type, count, out);
}

}  // namespace
