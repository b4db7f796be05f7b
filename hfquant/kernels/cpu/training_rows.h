// Rows of weights that training rounds: float weights, and packed ones with an adapter inside the rounding. Included
// behind rows.h.

namespace {

constexpr int GRID_PART = 512;  // weights at a time; even, so that pairs are never divided

INLINE void unpack_pairs(const uint8_t* packed, int count, uint8_t* out) {
  for (int i = 0; i < (count + 1) / 2; i++) {
    out[2 * i] = packed[i] & 15;
    out[2 * i + 1] = packed[i] >> 4;
  }
}

// Steps of `n` weights from `start`, rounded to even, before clipping. Beyond 2**22 only sign and size are right.
INLINE void grid_steps(const Grid& g, int64_t row, int64_t start, int n, float* steps) {
  const Weight& w = g.weight;
  uint8_t codes[GRID_PART], residual[GRID_PART];
  const uint8_t* packed = w.codes + row * w.row_bytes + start * w.bits / 8;
  const float* delta = g.delta + row * w.in_features + start;
  const float offset = float(1 << (w.bits - 1));
  if (w.bits == 4)
    unpack_pairs(packed, n, codes);
  else
    memcpy(codes, packed, n);
  if (g.residual) {
    unpack_pairs(g.residual + row * g.residual_bytes + start / 2, n, residual);
    for (int i = 0; i < n; i++) {
      const float code = (float(codes[i]) - offset) + (float(residual[i]) - 8.0f) * 0.0625f;
      steps[i] = ((code + delta[i]) + ROUND) - ROUND;
    }
    return;
  }
  for (int i = 0; i < n; i++) steps[i] = (((float(codes[i]) - offset) + delta[i]) + ROUND) - ROUND;
}

// Within the codes; NaN stays NaN.
INLINE float clipped(float steps, float low, float high) {
  const float most = steps > high ? high : steps;
  return most < low ? low : most;
}

void grid_row(const Grid& g, int64_t row, Float type, void* out) {
  const Weight& w = g.weight;
  const int64_t group = w.in_features / w.groups, size = type == Float::f32 ? 4 : 2;
  const float high = float((1 << (w.bits - 1)) - 1), low = -high - 1;
  float steps[GRID_PART];
  for (int64_t start = 0; start < w.in_features; start += GRID_PART) {
    const int n = w.in_features - start < GRID_PART ? int(w.in_features - start) : GRID_PART;
    grid_steps(g, row, start, n, steps);
    for (int i = 0; i < n;) {
      const int64_t at = (start + i) / group, left = (at + 1) * group - start;
      const int end = left < n ? int(left) : n;
      const float zero = float(zero_point(w, row, at) - (1 << (w.bits - 1))), scale = g.scale[row * w.groups + at];
      for (; i < end; i++) steps[i] = (clipped(steps[i], low, high) - zero) * scale;
    }
    from_float(steps, type, n, (char*)out + start * size);
  }
}

void grid_gradients(const Grid& g, int64_t row, const float* grad, float* grad_delta, float* grad_scale) {
  const Weight& w = g.weight;
  const int64_t group = w.in_features / w.groups;
  const float high = float((1 << (w.bits - 1)) - 1), low = -high - 1;
  float steps[GRID_PART];
  for (int64_t at = 0; at < w.groups; at++) grad_scale[at] = 0;
  for (int64_t start = 0; start < w.in_features; start += GRID_PART) {
    const int n = w.in_features - start < GRID_PART ? int(w.in_features - start) : GRID_PART;
    grid_steps(g, row, start, n, steps);
    for (int i = 0; i < n;) {
      const int64_t at = (start + i) / group, left = (at + 1) * group - start;
      const int end = left < n ? int(left) : n;
      const float zero = float(zero_point(w, row, at) - (1 << (w.bits - 1))), scale = g.scale[row * w.groups + at];
      float sums[16] = {};
      for (; i + 16 <= end; i += 16)
        for (int j = 0; j < 16; j++) {
          const float step = steps[i + j], code = clipped(step, low, high), from = grad[start + i + j];
          grad_delta[start + i + j] = code == step ? from * scale : 0.0f;
          sums[j] += from * (code - zero);
        }
      for (; i < end; i++) {
        const float code = clipped(steps[i], low, high), from = grad[start + i];
        grad_delta[start + i] = code == steps[i] ? from * scale : 0.0f;
        sums[0] += from * (code - zero);
      }
      for (int j = 8; j; j /= 2)
        for (int k = 0; k < j; k++) sums[k] += sums[k + j];
      grad_scale[at] += sums[0];
    }
  }
}

// Steps from the scale's zero, then codes before clipping; beyond 2**22 only sign and size are right.
INLINE float rounded_steps(float steps, float zero) { return ((steps + ROUND) - ROUND) + zero; }

void fake_quantize_row(const Values& v, int64_t row, float* out) {
  const int64_t group = v.length / v.groups;
  const float high = float((1 << (v.bits - 1)) - 1), low = -high - 1;
  for (int64_t at = row * v.groups; at < (row + 1) * v.groups; at++) {
    const float scale = v.scale[at], zero = v.zero ? v.zero[at] : 0.0f;
    const float* x = v.x + at * group;
    float* y = out + (at - row * v.groups) * group;
    for (int64_t i = 0; i < group; i++) y[i] = (clipped(rounded_steps(x[i] / scale, zero), low, high) - zero) * scale;
  }
}

// Sum of products, in lanes: the same order whatever the instruction set.
INLINE float product_sum(const float* __restrict a, const float* __restrict b, int64_t count) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16; j++) sums[j] += a[i + j] * b[i + j];
  for (; i < count; i++) sums[0] += a[i] * b[i];
  for (int j = 8; j; j /= 2)
    for (int k = 0; k < j; k++) sums[k] += sums[k + j];
  return sums[0];
}

void fake_quantize_gradients(const Values& v, int64_t row, const float* grad, float* grad_x, float* grad_scale) {
  const int64_t group = v.length / v.groups;
  const float high = float((1 << (v.bits - 1)) - 1), low = -high - 1;
  float error[GRID_PART];  // d value / d scale
  for (int64_t g = 0; g < v.groups; g++) {
    const int64_t at = row * v.groups + g;
    const float scale = v.scale[at], zero = v.zero ? v.zero[at] : 0.0f;
    float sum = 0;
    for (int64_t start = 0; start < group; start += GRID_PART) {
      const int n = group - start < GRID_PART ? int(group - start) : GRID_PART;
      const float* __restrict x = v.x + at * group + start;
      const float* __restrict from = grad + g * group + start;
      float* __restrict to = grad_x + g * group + start;
      for (int i = 0; i < n; i++) {
        const float steps = x[i] / scale, code = rounded_steps(steps, zero), kept = clipped(code, low, high);
        const float upstream = from[i];  // read in any case: a branch would keep the loop from being vectors
        to[i] = kept == code ? upstream : 0.0f;
        error[i] = (kept - zero) - (kept == code ? steps : 0.0f);
      }
      sum += product_sum(from, error, n);
    }
    grad_scale[g] = sum;
  }
}

}  // namespace
