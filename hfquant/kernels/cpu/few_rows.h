// The product of few rows, on the vector type V of the including file.

namespace {

constexpr int64_t MAX_IN_FEATURES = 65536;  // 255 * 128 * 65536 < 2**31: sums of products stay within int32

constexpr int64_t NEAR_BYTES = 16 << 10;  // of activations that stay in a first-level cache of 32 kB, beside weights that pass

// Bytes to prefetch ahead: the processor's own prefetcher stops at the end of each page. Behind the end of a short stream
// much of it would be for nothing (the layers of SmolLM2, INT8: 6.8 ms with 8192, 6.5 ms with 2048; one thread, Zen 4).
INLINE int64_t prefetch_ahead(int64_t stream_bytes) { return stream_bytes < 1 << 19 ? 2048 : 8192; }
// With several rows of activations: 4096 x 4096 is 7 % faster than with 8192, 5632 x 2048 17 % (docs/kernels.md).
constexpr int64_t FAR_AHEAD = 24 << 10;

enum Mode { CHANNEL, CHANNEL_ZERO, GROUP, GROUP_ZERO };  // how scales and zero points go; CHANNEL_ZERO: of digits only

// Which scale each lane of each chunk takes: scale `first[chunk] + index[chunk * LANES + lane]`, `count` of them.
struct Lanes {
  int32_t index[MAX_IN_FEATURES / 4 + V::LANES];
  int32_t first[MAX_IN_FEATURES / V::BYTES + 1];
  int32_t count[MAX_IN_FEATURES / V::BYTES + 1];
  int even;                             // scales of each whole chunk if they are 1, 2 or 4, else 0
  alignas(64) uint8_t bytes[V::BYTES];  // of them, repeated, that each lane takes then

  void fill(const Weight& w) {
    const int64_t group = w.in_features / w.groups, width = 32 / w.bits;
    const int64_t chunk = width * V::LANES, chunks = (w.in_features + chunk - 1) / chunk;
    const int scales = group % chunk == 0 ? 1 : chunk % group == 0 ? int(chunk / group) : 0;
    even = V::SHUFFLES && (scales == 1 || scales == 2 || scales == 4) ? scales : 0;
    for (int i = 0; i < V::BYTES; i++)
      bytes[i] = i % 4 < 2 ? 0x80 : uint8_t(i / 4 * scales / V::LANES * 2 + i % 2);  // a bfloat16 is the upper half
    for (int64_t c = 0; c < chunks; c++) {
      int64_t g = c * chunk / group, end = (g + 1) * group;
      first[c] = int32_t(g);
      if (even && !w.zero && (c + 1) * chunk <= w.in_features) continue;  // nothing else is needed
      for (int lane = 0; lane < V::LANES; lane++) {
        if (c * chunk + lane * width >= end && g + 1 < w.groups) g++, end += group;
        index[c * V::LANES + lane] = int32_t(g) - first[c];
        count[c] = int32_t(g) - first[c] + 1;
      }
    }
  }
};

// Scales of the lanes of a chunk; PER: that many in each whole chunk, or 0.
template <int PER>
INLINE V::F scales_of(const uint16_t* row, int64_t first, int count, const int32_t* index, V::I bytes) {
  return PER ? V::shuffle(V::template repeated<(PER ? PER : 1) * 2>(row + first), bytes) : V::scales(row + first, count, index);
}

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

// How the codes of zero of activations are taken off: by the sums of the weights, which rows share, or in each product.
enum Shift { NONE, BY_SUMS, FOLDED };

// M rows of activations times R rows of the weight. Weights stay in registers; each is loaded once.
template <int BITS, int PLANES, int M, int R, Mode MODE, Shift SHIFT>
struct FewRows {
  static constexpr int PARTS = parts_of(BITS, PLANES);
  static constexpr bool ONE_SCALE = MODE == CHANNEL || MODE == CHANNEL_ZERO;  // of a row of the weight
  static constexpr bool INTEGER = ONE_SCALE && PLANES == 1;                   // until the end of the row
  static constexpr bool ZERO = MODE == GROUP_ZERO || MODE == CHANNEL_ZERO;
  static constexpr int VECTORS = vectors_of(BITS, PLANES, ONE_SCALE), STEP = VECTORS * V::BYTES;
  static constexpr bool TWO = BITS == 4 || VECTORS == 2;  // vectors of codes, once unpacked
  const Weight& w;
  const int8_t* x[M];       // [PLANES, chunks, chunk]
  const int32_t* sums[M];   // [PARTS, chunks, LANES]
  const uint8_t* codes[R];  // rows of the weight
  const uint16_t* scales[R];
  const uint8_t* zeros[R];
  int64_t chunks, ahead;
  const float* steps[M];    // scale of each chunk, of float activations
  const int32_t* ones;      // [chunks, LANES]
  V::F shift[M];            // minus the code of zero
  V::I minus_zero;          // the same in every byte, FOLDED
  V::I row_zero[R];         // zero point of a row of the weight, CHANNEL_ZERO
  struct Sums {
    union {
      V::I total[M][R];  // INTEGER
      V::F value[M][R];
    };
    V::I weights[R];
  };
  Sums* kept;               // if `from` is not 0, those of what is behind it

  template <bool WHOLE, int PER>
  INLINE void step(int64_t c, const Lanes* lanes, V::I bytes, V::I (&total)[M][R], V::I (&weights)[R],
                   V::F (&value)[M][R]) const {
    constexpr int CHUNK = STEP * 8 / BITS;
    V::I low[R], high[R], both[R], zero[R];
    V::F scale[R], sum_of_codes[R];
    const int64_t left = WHOLE ? STEP : w.row_bytes - c * STEP;  // of all rows: masks are made once
    const int64_t first = ONE_SCALE ? 0 : PER > 1 ? c * PER : lanes->first[c];
    const int count = ONE_SCALE || (PER && !ZERO) ? 0 : lanes->count[c];
    const int32_t* index = ONE_SCALE ? nullptr : lanes->index + c * V::LANES;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const uint8_t* p = codes[r] + c * STEP;
      const V::I v = WHOLE ? V::load(p) : V::load_partial(p, left);
      V::prefetch(p + (M == 1 ? ahead : FAR_AHEAD));  // with more rows there is no register left for it
      low[r] = BITS == 4 ? V::low(v) : v;
      if (BITS == 4) high[r] = V::high(v);
      if (VECTORS == 2) {
        high[r] = WHOLE ? V::load(p + V::BYTES) : left > V::BYTES ? V::load_partial(p + V::BYTES, left - V::BYTES) : V::zero();
        V::prefetch(p + V::BYTES + (M == 1 ? ahead : FAR_AHEAD));
      }
      if (SHIFT != NONE && BITS == 4) both[r] = V::add_bytes(low[r], high[r]);
      if (SHIFT == BY_SUMS && INTEGER) V::add_up(weights[r], BITS == 4 ? both[r] : low[r]);
      if (ONE_SCALE) continue;
      scale[r] = scales_of<PER>(scales[r], first, count, index, bytes);
      if (MODE == GROUP_ZERO) zero[r] = V::zeros(zeros[r] + first, count, index);
      if (SHIFT == BY_SUMS) {
        const V::I start = V::load(ones + c * V::LANES);
        V::I sum = MODE == GROUP ? start : V::zero();
        V::dot(sum, BITS == 4 ? both[r] : low[r], V::set(0x01010101));
        if (MODE == GROUP_ZERO) sum = V::sub(sum, V::mul(zero[r], start));
        sum_of_codes[r] = V::to_float(sum);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      if (INTEGER) {
        const int8_t* a = x[m] + c * CHUNK;
        const V::I first = V::load(a), second = TWO ? V::load(a + V::BYTES) : first;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          V::dot(total[m][r], low[r], first);
          if (TWO) V::dot(total[m][r], high[r], second);
        }
        continue;
      }
      V::F product[R];
#pragma GCC unroll 2
      for (int part = 0; part < PARTS; part++) {
        const int last = PARTS == 1 || part > 0 ? PLANES : 1;
        const V::I start = V::load(sums[m] + (part * chunks + c) * V::LANES);
        V::I sum[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[r] = MODE == GROUP && PLANES == 1 ? start : V::zero();
#pragma GCC unroll 3
        for (int p = part; p < last; p++) {
          const int8_t* a = x[m] + (p * chunks + c) * CHUNK;
          const V::I first = V::load(a), second = TWO ? V::load(a + V::BYTES) : first;
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) {
            if (p > part) sum[r] = V::times256(sum[r]);
            V::dot(sum[r], low[r], first);
            if (TWO) V::dot(sum[r], high[r], second);
            if (SHIFT == FOLDED) V::dot(sum[r], BITS == 4 ? both[r] : low[r], minus_zero);
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          if (!ZERO && PLANES > 1) sum[r] = V::add(sum[r], start);
          if (ZERO) sum[r] = V::sub(sum[r], V::mul(ONE_SCALE ? row_zero[r] : zero[r], start));
          const V::F f = SHIFT == BY_SUMS ? V::fma(shift[m], sum_of_codes[r], V::to_float(sum[r])) : V::to_float(sum[r]);
          product[r] = part == 0 ? f : V::fma(product[r], V::setf(65536.0f), f);
        }
      }
      // Products are in steps of the last digit.
      const V::F step = V::setf(PLANES == 1 ? 1.0f : steps[m][c] * (PLANES == 2 ? 0x1p-8f : 0x1p-16f));
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
        value[m][r] = ONE_SCALE ? V::fma(product[r], step, value[m][r])
                                : V::fma(PLANES == 1 ? product[r] : V::mulf(product[r], step), scale[r], value[m][r]);
    }
  }

  // Chunks `from` .. `to`.
  INLINE void run(const Lanes* lanes, int64_t from, int64_t to) {
    // Accumulators stay in registers only where nothing indexes them with a variable.
    V::I total_here[M][R], weights_here[R];
    V::F value_here[M][R];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        value_here[m][r] = V::zerof();
        total_here[m][r] = INTEGER && from ? kept->total[m][r] : V::zero();
      }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) weights_here[r] = INTEGER && from ? kept->weights[r] : V::zero();
    const int64_t whole = to * STEP <= w.row_bytes ? to : to - 1;
    const int even = ONE_SCALE ? 0 : lanes->even;
    const V::I bytes = even ? V::load(lanes->bytes) : V::zero();
    const auto steps = [&](auto per) __attribute__((always_inline)) {
      for (int64_t c = from; c < whole; c++) step<true, per()>(c, lanes, bytes, total_here, weights_here, value_here);
    };
    if constexpr (ONE_SCALE)  // without the closure: with it accumulators of 8 rows went to memory
      for (int64_t c = from; c < whole; c++) step<true, 0>(c, lanes, bytes, total_here, weights_here, value_here);
    else if (even == 4)
      steps(Count<4>());
    else if (even == 2)
      steps(Count<2>());
    else if (even == 1)
      steps(Count<1>());
    else
      steps(Count<0>());
    if (whole < to) step<false, 0>(whole, lanes, bytes, total_here, weights_here, value_here);
#pragma GCC unroll 4
    for (int r = 0; INTEGER && r < R; r++) kept->weights[r] = weights_here[r];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
        if (INTEGER)
          kept->total[m][r] = total_here[m][r];
        else
          kept->value[m][r] = value_here[m][r];
  }
};

// Rows of the weight that one thread multiplies, in as many parts as it reads side by side. The processor's prefetcher
// follows streams that are far apart; four short rows next to each other it takes for one, read out of order (one
// thread of an AMD EPYC, Zen 4: 13 GB/s; far apart: 25 GB/s).
struct Streams {
  static constexpr int COUNT = 4, PART = BLOCK / COUNT;
  int64_t first, last, length;
  Streams(int64_t first, int64_t last) : first(first), last(last), length((last - first + COUNT - 1) / COUNT) {}
  INLINE int64_t row(int stream, int64_t i) const { return first + stream * length + i; }
  // How many rows there are of a part from row i on.
  INLINE int rows(int stream, int64_t i) const {
    const int64_t left = last - row(stream, i), end = left < length - i ? left : length - i;
    return end < PART ? int(end) : PART;
  }
};

// Totals of vectors; of four the additions are shared.
INLINE void totals_of_four(const V::I* v, int32_t* out) { V::totals({v[0], v[1], v[2], v[3]}, out); }
INLINE void totals_of_four(const V::F* v, float* out) { V::totalsf({v[0], v[1], v[2], v[3]}, out); }
INLINE int32_t total_of(V::I v) { return V::total(v); }
INLINE float total_of(V::F v) { return V::totalf(v); }
template <class T, class Out>
INLINE void totals(const T* v, int count, Out* out) {
  int i = 0;
#pragma GCC unroll 4
  for (; i + 4 <= count; i += 4) totals_of_four(v + i, out + i);
  for (; i < count; i++) out[i] = total_of(v[i]);
}

// Rows m0 .. m0 + M of the activations times rows i .. i + PART of every stream, into `tile [STREAMS, M, PART]`, without
// bias.
template <int BITS, int PLANES, int M, Mode MODE, Shift SHIFT>
void few_tile(const Weight& w, const Activations& a, int64_t m0, const Streams& streams, int64_t i, const Lanes* lanes,
              float* tile) {
  using Few = FewRows<BITS, PLANES, M, (M * PLANES <= V::REGISTERS / 8 ? 4 : 2), MODE, SHIFT>;
  constexpr int R = M * PLANES <= V::REGISTERS / 8 ? 4 : 2, CHUNK = Few::STEP * 8 / BITS;
  const int64_t chunks = (w.in_features + CHUNK - 1) / CHUNK;
  Few rows{w};
  rows.chunks = chunks;
  rows.ahead = prefetch_ahead(streams.length * w.row_bytes);
  rows.ones = a.ones;
  int32_t row_sums[M];
  int32_t code_of_zero[M];
  for (int m = 0; m < M; m++) {  // past the last row it is computed again
    const int64_t row = m0 + m < a.rows ? m0 + m : a.rows - 1;
    rows.x[m] = a.codes + row * a.row_codes;
    rows.sums[m] = a.sums + row * parts_of(BITS, PLANES) * chunks * V::LANES;
    rows.steps[m] = a.scale + row * (PLANES == 1 ? 1 : chunks);
    row_sums[m] = Few::INTEGER ? a.row_sums[row] : 0;
    code_of_zero[m] = SHIFT != NONE ? a.zeros[row] : 0;
    rows.shift[m] = V::setf(float(-code_of_zero[m]));
    if (SHIFT == FOLDED) rows.minus_zero = V::set((-code_of_zero[m] & 0xFF) * 0x01010101);
  }
  uint8_t zeros[MODE == GROUP_ZERO ? R : 1][MODE == GROUP_ZERO ? MAX_IN_FEATURES / 4 + 2 : 1];
  const int64_t count = i + Streams::PART < streams.length ? Streams::PART : streams.length - i;
  // Several long rows of activations are multiplied a part at a time, which stays in the nearest cache. What vectors of
  // one row add up to is found later, for all rows of the weight: they would wait for it (576 x 1536: 5 to 10 % longer).
  constexpr bool IN_PARTS = Few::INTEGER && M > 1, LATER = M == 1;
  constexpr int PAIRS = Streams::COUNT / R;
  typename Few::Sums kept[IN_PARTS || LATER ? Streams::PART * PAIRS : 1];
  const int64_t parts = IN_PARTS ? (M * chunks * CHUNK + NEAR_BYTES - 1) / NEAR_BYTES : 1, part = (chunks + parts - 1) / parts;
  const auto row_of = [&](int stream, int j) __attribute__((always_inline)) {
    const int64_t row = streams.row(stream, i + j);
    return row < streams.last ? row : streams.last - 1;
  };
  const auto finish = [&](int j, int s) __attribute__((always_inline)) {
    const typename Few::Sums& of = kept[IN_PARTS || LATER ? j * PAIRS + s / R : 0];
    int32_t sums[M][R], sums_of_codes[R];
    float values[M][R];
    Few::INTEGER ? totals(of.total[0], M * R, sums[0]) : totals(of.value[0], M * R, values[0]);
    if (Few::INTEGER && SHIFT != NONE) totals(of.weights, R, sums_of_codes);
    for (int r = 0; r < R; r++) {
      const int64_t n = row_of(s + r, j);
      const float scale = Few::ONE_SCALE ? float_of(uint32_t(w.scale[n]) << 16) : 1.0f;
      const int64_t zero = Few::INTEGER ? zero_point(w, n, 0) : 0;
      const int64_t shifted = Few::INTEGER && SHIFT != NONE ? sums_of_codes[r] - zero * w.in_features : 0;
      for (int m = 0; m < M; m++) {
        float& out = tile[((s + r) * M + m) * Streams::PART + j];
        if (Few::INTEGER)
          out = float(sums[m][r] - zero * row_sums[m] - code_of_zero[m] * shifted) * scale * *rows.steps[m];
        else
          out = values[m][r] * (PLANES == 1 ? *rows.steps[m] : scale);
      }
    }
  };
  for (int64_t from = 0; from < chunks; from += part) {
    const int64_t to = from + part < chunks ? from + part : chunks;
    for (int j = 0; j < count; j++)
      for (int s = 0; s < Streams::COUNT; s += R) {
        for (int r = 0; r < R; r++) {
          const int64_t n = row_of(s + r, j);
          rows.codes[r] = w.codes + n * w.row_bytes;
          rows.scales[r] = w.scale + n * w.groups;
          if (MODE == GROUP_ZERO) rows.zeros[r] = unpack_zeros(w, n, zeros[r]);
          if (MODE == CHANNEL_ZERO) rows.row_zero[r] = V::set(zero_point(w, n, 0));
        }
        rows.kept = &kept[IN_PARTS || LATER ? j * PAIRS + s / R : 0];
        rows.run(lanes, from, to);
        if (!LATER && to == chunks) finish(j, s);
      }
  }
  for (int j = 0; LATER && j < count; j++)
    for (int s = 0; s < Streams::COUNT; s += R) finish(j, s);
}

template <int BITS, int PLANES, int M, Mode MODE, Shift SHIFT>
void few_part(const Weight& w, const Activations& a, const Output& out, int64_t m0, const Streams& streams, int64_t i,
              const Lanes* lanes) {
  alignas(64) float tile[Streams::COUNT * M * Streams::PART];
  few_tile<BITS, PLANES, M, MODE, SHIFT>(w, a, m0, streams, i, lanes, tile);
  for (int s = 0; s < Streams::COUNT; s++)
    for (int m = 0; m < M && m0 + m < a.rows; m++)
      if (streams.rows(s, i) > 0)
        store_row(out, m0 + m, streams.row(s, i), streams.rows(s, i), tile + (s * M + m) * Streams::PART);
}

// Rows of activations that are multiplied at once: as many as accumulators fit into registers, or the compiler keeps
// them in memory and two passes over a part that is in the cache are faster.
constexpr int rows_at_once(int planes, Mode mode) {
  return V::REGISTERS < 32 ? 4 : planes > 1 ? 2 : mode == CHANNEL ? 8 : 4;
}

template <int BITS, int PLANES, Mode MODE, Shift SHIFT>
void few_blocks(const Weight& w, const Activations& a, const Output& out, int64_t first, int64_t last) {
  constexpr int LARGE = rows_at_once(PLANES, MODE);
  Lanes lanes_of_groups;
  const Lanes* lanes = &lanes_of_groups;
  if (MODE == GROUP || MODE == GROUP_ZERO) lanes_of_groups.fill(w);
  const Streams streams(first * BLOCK, last * BLOCK < w.rows ? last * BLOCK : w.rows);
  for (int64_t i = 0; i < streams.length; i += Streams::PART)
    for (int64_t m0 = 0; m0 < a.rows; m0 += LARGE) {
      const int64_t left = a.rows - m0;
      if (SHIFT != NONE && MODE != CHANNEL && a.folded)
        few_part<BITS, PLANES, 1, MODE, (SHIFT == NONE ? NONE : FOLDED)>(w, a, out, m0, streams, i, lanes);
      else if (left == 1)
        few_part<BITS, PLANES, 1, MODE, SHIFT>(w, a, out, m0, streams, i, lanes);
      else if (left == 2 && V::REGISTERS == 32)
        few_part<BITS, PLANES, V::REGISTERS == 32 ? 2 : LARGE, MODE, SHIFT>(w, a, out, m0, streams, i, lanes);
      else if (left <= 4)
        few_part<BITS, PLANES, LARGE < 4 ? LARGE : 4, MODE, SHIFT>(w, a, out, m0, streams, i, lanes);
      else
        few_part<BITS, PLANES, LARGE, MODE, SHIFT>(w, a, out, m0, streams, i, lanes);
    }
}

template <int BITS, Shift SHIFT>
void few_quantized(const Weight& w, const Activations& a, const Output& out, int64_t first, int64_t last) {
  if (w.groups == 1) return few_blocks<BITS, 1, CHANNEL, SHIFT>(w, a, out, first, last);
  w.zero ? few_blocks<BITS, 1, GROUP_ZERO, SHIFT>(w, a, out, first, last)
         : few_blocks<BITS, 1, GROUP, SHIFT>(w, a, out, first, last);
}

template <int BITS, int PLANES>
void few_digits(const Weight& w, const Activations& a, const Output& out, int64_t first, int64_t last) {
  if (w.groups == 1)
    return w.zero ? few_blocks<BITS, PLANES, CHANNEL_ZERO, NONE>(w, a, out, first, last)
                  : few_blocks<BITS, PLANES, CHANNEL, NONE>(w, a, out, first, last);
  w.zero ? few_blocks<BITS, PLANES, GROUP_ZERO, NONE>(w, a, out, first, last)
         : few_blocks<BITS, PLANES, GROUP, NONE>(w, a, out, first, last);
}

template <int BITS>
void few_bits(const Weight& w, const Activations& a, const Output& out, int64_t first, int64_t last) {
  if (a.planes == 1 && a.zeros) return few_quantized<BITS, BY_SUMS>(w, a, out, first, last);
  if (a.planes == 1) return few_quantized<BITS, NONE>(w, a, out, first, last);
  a.planes == 2 ? few_digits<BITS, 2>(w, a, out, first, last) : few_digits<BITS, 3>(w, a, out, first, last);
}

void few_rows(const Weight& w, const Activations& a, const Output& out, int64_t first, int64_t last) {
  w.bits == 4 ? few_bits<4>(w, a, out, first, last) : few_bits<8>(w, a, out, first, last);
}

}  // namespace
