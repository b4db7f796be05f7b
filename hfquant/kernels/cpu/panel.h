// Panels: 32 rows of a weight, transposed for `tiles`, on the vector type V of the including file.

namespace {

constexpr int TILE = V::REGISTERS == 32 ? 12 : 4, HALF = TILE / 2;  // TILE x 2 accumulators, 2 vectors of weights, 1 of activations

// Bytes of a tile to prefetch ahead: those of long rows come from the cache that other programs use too, and the
// processor's own prefetcher stops at the end of each page.
constexpr int AHEAD = 2048;

template <int N>
struct Count {
  constexpr int operator()() const { return N; }
};

// Calls `work` with how many of MOST rows to compute, as a type: the last tile is often short of rows.
template <int MOST, class Work>
INLINE void with_rows(int64_t rows, const Work& work) {
  if (MOST > 4 && rows <= MOST / 3)
    work(Count<(MOST > 4 ? MOST / 3 : MOST)>());
  else if (MOST > 4 && rows <= MOST * 2 / 3)
    work(Count<(MOST > 4 ? MOST * 2 / 3 : MOST)>());
  else
    work(Count<MOST>());
}

// Row `i` of a block; the last one of the weight in place of those that are not there.
INLINE int64_t row_of_block(const Weight& w, int64_t block, int i) {
  const int64_t row = block * BLOCK + i;
  return row < w.rows ? row : w.rows - 1;
}

// Sums of the codes of each group of a panel's columns, without their zero points; floats if there are several groups.
void sum_columns(const Weight& w, const uint8_t* panel, const int32_t* zeros, int32_t* out) {
  const int64_t quads = panel_depth(w) / 4, group = w.in_features / w.groups;
  const int64_t length = w.groups == 1 ? quads : group / 4;
  for (int column = 0; column < BLOCK; column += V::LANES)
    for (int64_t g = 0; g < w.groups; g++) {
      const int64_t last = (g + 1) * length < quads ? (g + 1) * length : quads;
      V::I sum = V::zero(), others[3] = {sum, sum, sum};  // four, because each addition waits for the one before it
      int64_t q = g * length;
      for (; q + 4 <= last; q += 4) {
        V::dot(sum, V::load(panel + (q * BLOCK + column) * 4), V::set(0x01010101));
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++)
          V::dot(others[i], V::load(panel + ((q + 1 + i) * BLOCK + column) * 4), V::set(0x01010101));
      }
      for (; q < last; q++) V::dot(sum, V::load(panel + (q * BLOCK + column) * 4), V::set(0x01010101));
      sum = V::add(V::add(sum, others[0]), V::add(others[1], others[2]));
      const V::I zero = w.zero ? V::load(zeros + g * BLOCK + column) : V::set(1 << (w.bits - 1));
      sum = V::sub(sum, V::mul(zero, V::set(int32_t(group))));
      if (w.groups == 1)
        V::store(out + column, sum);
      else
        V::storef((float*)out + g * BLOCK + column, V::to_float(sum));
    }
}

// Word `i` of each row, from a panel's column on, in the place of quad 0 (of quads 0 and 1: INT4).
template <int BITS>
INLINE void store_word(V::I v, int64_t i, uint8_t* panel) {
  uint8_t* to = panel + i * (8 / BITS) * BLOCK * 4;
  V::store(to, BITS == 4 ? V::low(v) : v);
  if (BITS == 4) V::store(to + BLOCK * 4, V::high(v));
}

// Calls `store(column, i, words)` with word `i` of the rows `column`, `column + 1`, ... of a block; past the last row it is
// read again, past the end of a row there are zeros.
template <class Store>
INLINE void each_word(const Weight& w, int64_t block, const Store& store) {
  const int64_t words = panel_depth(w) * w.bits / 32;
  for (int column = 0; column < BLOCK; column += V::LANES) {
    int64_t rows[V::LANES];
    for (int i = 0; i < V::LANES; i++) rows[i] = row_of_block(w, block, column + i);
    V::I word[V::LANES];
    for (int64_t j = 0; j < words; j += V::LANES) {
      const int64_t left = w.row_bytes - j * 4;
      if (left > 0) V::transpose(w.codes + j * 4, w.row_bytes, rows, left, word);
      if (left > 0 && words - j >= V::LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < V::LANES; i++) store(column, j + i, word[i]);
      } else {
        for (int64_t i = j; i < words && i < j + V::LANES; i++) store(column, i, left > 0 ? word[i - j] : V::zero());
      }
    }
  }
}

// Scales [groups, BLOCK] and, unless the weight is symmetric, zero points [groups, BLOCK] of a block, one after the other.
INLINE void pack_scales(const Weight& w, int64_t block, float* scales) {
  for (int column = 0; column < BLOCK; column += V::LANES) {
    int64_t rows[V::LANES];
    for (int i = 0; i < V::LANES; i++) rows[i] = row_of_block(w, block, column + i);
    V::I pair[V::LANES];  // of bfloat16 scales
    for (int64_t first = 0; first < w.groups; first += 2 * V::LANES) {
      V::transpose((const uint8_t*)(w.scale + first), w.groups * 2, rows, (w.groups - first) * 2, pair);
      for (int64_t g = first; g < w.groups && g < first + 2 * V::LANES; g++) {
        const V::I both = pair[(g - first) / 2];
        V::store(scales + g * BLOCK + column, g % 2 ? V::high_half(both) : V::times256(V::times256(both)));
      }
    }
  }
  int32_t* zeros = (int32_t*)(scales + w.groups * BLOCK);
  for (int i = 0; w.zero && i < BLOCK; i++) {
    const int64_t row = row_of_block(w, block, i);
    for (int64_t g = 0; g < w.groups; g++) zeros[g * BLOCK + i] = zero_point(w, row, g);
  }
}

// A panel: unsigned codes [K / 4, BLOCK, 4], float scales [groups, BLOCK], int32 zero points [groups, BLOCK], sums likewise.
void pack_panel(const Weight& w, int64_t block, uint8_t* panel) {
  const int64_t depth = panel_depth(w);
  const auto store_as = [&](auto bits) __attribute__((always_inline)) {
    each_word(w, block, [&](int column, int64_t i, V::I word) __attribute__((always_inline)) {
      store_word<bits()>(word, i, panel + column * 4);
    });
  };
  w.bits == 4 ? store_as(Count<4>()) : store_as(Count<8>());
  float* scales = (float*)(panel + depth * BLOCK);
  pack_scales(w, block, scales);
  int32_t* zeros = (int32_t*)(scales + w.groups * BLOCK);
  sum_columns(w, panel, zeros, zeros + w.groups * BLOCK);
}

// The codes of the block behind one that is being multiplied: they come into the cache meanwhile, a few with each of
// `products`. All at once they would keep other loads waiting.
struct NextBlock {
  const uint8_t* codes = nullptr;
  int64_t lines = 0, step = 0;  // for each product, and bytes from one to the next

  NextBlock() = default;
  NextBlock(const Weight& w, int64_t block, int64_t products) {
    const int64_t start = (block + 1) * BLOCK, bytes = w.rows - start >= BLOCK ? BLOCK * w.row_bytes : 0;
    codes = w.codes + (bytes ? start * w.row_bytes : 0);
    lines = bytes / (64 * products) + 1;
    step = (bytes + lines * products - 1) / (lines * products);
  }
  INLINE void fetch_line() {
    V::prefetch(codes);
    codes += step;
  }
  INLINE void fetch() {
    for (int64_t i = 0; i < lines; i++) fetch_line();
  }
};

}  // namespace
