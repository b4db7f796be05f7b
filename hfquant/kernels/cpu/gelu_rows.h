// GELU, x * (1 - Q(x)), with Q(x) the weight that the normal distribution has above x; on the vector type V of the including file.
// Q is 16 polynomials, each on the 0.4 around a multiple of 0.4 (least squares in 400 Chebyshev nodes), so that its error is less
// than the rounding of float32; above 5.8, where x * Q(x) < 2e-8, it is zero.

namespace {

// Coefficients of Q(x) = erfc(x / sqrt 2) / 2 for the powers of n - 2.5 x, n = 0 .. 15.
alignas(64) constexpr float NORMAL_TAIL[6][16] = {
    {5.0e-01f, 3.4457827e-01f, 2.1185541e-01f, 1.1506967e-01f, 5.479929e-02f, 2.275013e-02f, 8.197535e-03f, 2.5551303e-03f,
     6.871383e-04f, 1.5910891e-04f, 3.1671407e-05f, 5.4126044e-06f, 7.93345e-07f, 9.964802e-08f, 1.0718265e-08f, 0},
    {1.5957691e-01f, 1.4730805e-01f, 1.1587662e-01f, 7.7674426e-02f, 4.4368334e-02f, 2.1596387e-02f, 8.957812e-03f, 3.16618e-03f,
     9.536352e-04f, 2.4476086e-04f, 5.3532163e-05f, 9.977023e-06f, 1.5845313e-06f, 2.1444443e-07f, 2.4731094e-08f, 0},
    {-7.475479e-08f, 1.1784252e-02f, 1.8539844e-02f, 1.8641736e-02f, 1.4198009e-02f, 8.638748e-03f, 4.299851e-03f, 1.7730702e-03f,
     6.103002e-04f, 1.762043e-04f, 4.2813754e-05f, 8.7754115e-06f, 1.5199249e-06f, 2.2274936e-07f, 2.764968e-08f, 0},
    {-4.255983e-03f, -3.2996472e-03f, -1.112456e-03f, 9.113055e-04f, 1.8456859e-03f, 1.7277213e-03f, 1.1370697e-03f, 5.7752576e-04f,
     2.3497804e-04f, 7.8059944e-05f, 2.1410555e-05f, 4.883626e-06f, 9.308997e-07f, 1.4881164e-07f, 2.0002267e-08f, 0},
    {-2.0542616e-06f, -4.4204926e-04f, -5.789647e-04f, -3.8641933e-04f, -8.481266e-05f, 1.1311572e-04f, 1.5714989e-04f, 1.14326525e-04f,
     5.9198843e-05f, 2.365344e-05f, 7.5501594e-06f, 1.9613499e-06f, 4.1935883e-07f, 7.4350076e-08f, 1.0987721e-08f, 0},
    {9.938572e-05f, 6.4486136e-05f, -1.0315894e-05f, -5.8501206e-05f, -5.4664655e-05f, -2.3119252e-05f, 2.8935294e-06f, 1.1655003e-05f,
     9.424918e-06f, 4.8860356e-06f, 1.879753e-06f, 5.657557e-07f, 1.367223e-07f, 2.6933554e-08f, 4.36727e-09f, 0}};

// The same of 1 / (1 + e**t), t = 2 sqrt(2 / pi) (x + 0.044715 x**3): GELU with tanh (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415).
alignas(64) constexpr float TANH_TAIL[6][16] = {
    {5.0e-01f, 3.4459707e-01f, 2.1196039e-01f, 1.152477e-01f, 5.4914396e-02f, 2.270115e-02f, 8.032018e-03f, 2.3888904e-03f,
     5.8423943e-04f, 1.14605944e-04f, 1.7561673e-05f, 2.0459622e-06f, 1.7633593e-07f, 1.09400595e-08f, 4.754154e-10f, 0},
    {1.5957691e-01f, 1.4725591e-01f, 1.1577206e-01f, 7.7657945e-02f, 4.450373e-02f, 2.1760082e-02f, 9.015329e-03f, 3.1210498e-03f,
     8.8467257e-04f, 2.0030975e-04f, 3.5268546e-05f, 4.6974546e-06f, 4.604072e-07f, 3.230819e-08f, 1.5795419e-09f, 0},
    {-7.828367e-08f, 1.1825961e-02f, 1.853586e-02f, 1.8565234e-02f, 1.4141596e-02f, 8.667198e-03f, 4.3637007e-03f, 1.8053857e-03f,
     6.0539047e-04f, 1.6087922e-04f, 3.2994667e-05f, 5.0795616e-06f, 5.709604e-07f, 4.558653e-08f, 2.5153932e-09f, 0},
    {-4.2770733e-03f, -3.3004868e-03f, -1.0850686e-03f, 9.2396536e-04f, 1.8217365e-03f, 1.7028397e-03f, 1.1390296e-03f, 5.9240387e-04f,
     2.4310862e-04f, 7.776871e-05f, 1.8951972e-05f, 3.4273137e-06f, 4.4786182e-07f, 4.1187985e-08f, 2.5967597e-09f, 0},
    {-2.1511405e-06f, -4.5043172e-04f, -5.817133e-04f, -3.775088e-04f, -7.878652e-05f, 1.0817693e-04f, 1.5104096e-04f, 1.1413479e-04f,
     6.172916e-05f, 2.4974124e-05f, 7.51759e-06f, 1.651907e-06f, 2.5913533e-07f, 2.836195e-08f, 2.1160658e-09f, 0},
    {1.0159117e-04f, 6.500284e-05f, -1.281655e-05f, -5.9780265e-05f, -5.2535725e-05f, -2.1593367e-05f, 2.0059297e-06f, 1.0579754e-05f,
     9.401438e-06f, 5.242745e-06f, 2.0324364e-06f, 5.52941e-07f, 1.0446606e-07f, 1.34841e-08f, 1.1668562e-09f, 0}};

using Tail = float[6][16];

INLINE const Tail& tail_of(Gate kind) { return kind == Gate::gelu ? NORMAL_TAIL : TANH_TAIL; }

INLINE V::F gelu(V::F x, const Tail& tail) {
  const V::F end = V::setf(6.16f), most = V::minf(x, end);  // an infinity stays where the product with zero is NaN, below
  const V::F size = V::maxf(most, V::mulf(most, V::setf(-1.0f))), clamped = V::minf(size, end);
  const V::F shifted = V::fma(clamped, V::setf(2.5f), V::setf(ROUND)), n = V::addf(shifted, V::setf(-ROUND));
  const V::F off = V::fma(clamped, V::setf(-2.5f), n);
  V::F q = V::lookup(tail[5], shifted);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; i--) q = V::fma(q, off, V::lookup(tail[i], shifted));
  return V::fma(V::mulf(size, V::setf(-1.0f)), q, V::maxf(V::zerof(), x));
}

// `values [count]`, in whole vectors; there is room for them.
INLINE void gelu_part(const float* x, int64_t count, const Tail& tail, float* values) {
  int64_t i = 0;
  for (; i + V::LANES <= count; i += V::LANES) V::storef(values + i, gelu(V::loadf(x + i), tail));
  if (i == count) return;
  float last[V::LANES] = {};
  memcpy(last, x + i, (count - i) * 4);
  V::storef(values + i, gelu(V::loadf(last), tail));
}

}  // namespace
