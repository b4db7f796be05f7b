// Softmax attention of some rows, on the vector type V of the including file. The order of every sum depends on the keys
// alone, so that a token has the same bits in a prefill as by itself, in any batch, on any number of threads.

namespace {

constexpr int PANEL = 2 * V::LANES;  // keys, or values of a head, that a register tile computes
constexpr float NEVER = -__builtin_inff();  // score of a key that is not seen

// c [ROWS, PANEL] = c * factors (nothing where there are none) + a [ROWS, depth] * b [depth, PANEL]; rows of `a` are
// ATTENTION_KEYS apart.
template <int ROWS>
INLINE void add_products(const float* a, int64_t depth, const float* b, const float* factors, float* c, int64_t stride) {
  V::F sums[ROWS][2];
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) {
    sums[m][0] = factors ? V::mulf(V::loadf(c + m * stride), V::setf(factors[m])) : V::zerof();
    sums[m][1] = factors ? V::mulf(V::loadf(c + m * stride + V::LANES), V::setf(factors[m])) : V::zerof();
  }
  for (int64_t k = 0; k < depth; k++, b += PANEL) {
    const V::F left = V::loadf(b), right = V::loadf(b + V::LANES);
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++) {
      const V::F x = V::setf(a[m * ATTENTION_KEYS + k]);
      V::add_product(sums[m][0], left, x);
      V::add_product(sums[m][1], right, x);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; m++) {
    V::storef(c + m * stride, sums[m][0]);
    V::storef(c + m * stride + V::LANES, sums[m][1]);
  }
}

// Rows of one key head: row r is query head r % group of token r / group.
class AttentionSpan {
 public:
  AttentionSpan(const Attention& a, int64_t batch, int64_t key_head, int64_t first, int64_t last, float* scratch)
      : a_(a), batch_(batch), key_head_(key_head), group_(a.heads / a.key_heads), first_(first), last_(last),
        bytes_(a.type == Float::f32 ? 4 : 2), width_(round_up(a.value_size, PANEL)) {
    const int64_t rows = round_up(last - first, TILE), parts = (a.size + ATTENTION_KEYS - 1) / ATTENTION_KEYS;
    const auto take = [&](int64_t count) {
      float* piece = scratch;
      scratch += round_up(count, 16);
      return piece;
    };
    queries_ = take(rows * parts * ATTENTION_KEYS);
    sums_ = take(rows * width_);
    scores_ = take(TILE * ATTENTION_KEYS);
    keys_ = take(ATTENTION_KEYS * a.size);
    values_ = take(ATTENTION_KEYS * width_);
    largest_ = take(rows);
    total_ = take(rows);
    read_ = take(V::LANES * (a.size + a.value_size));
    memset(sums_, 0, rows * width_ * 4);
    const int64_t whole = (last - first) / TILE * parts * TILE * ATTENTION_KEYS;  // rows that are not there are zero
    memset(queries_ + whole, 0, (rows * parts * ATTENTION_KEYS - whole) * 4);
    for (int64_t i = 0; i < rows; i++) largest_[i] = NEVER, total_[i] = 0;
  }

  void run() {
    for (int64_t r = first_; r < last_; r++) read_query(r);
    const int64_t seen = a_.causal ? (last_ - 1) / group_ + 1 : a_.keys, keys = seen < a_.keys ? seen : a_.keys;
    for (int64_t k = 0; k < keys; k += ATTENTION_KEYS) {
      const int64_t rest = keys - k < ATTENTION_KEYS ? keys - k : ATTENTION_KEYS, count = seen_of(first_, last_, k, rest);
      if (count) pack(k, count);
      for (int64_t r = first_; r < last_ && count; r += TILE) {
        const int64_t end = r + TILE < last_ ? r + TILE : last_, causal = keys_of(end - 1, k, count);
        const int64_t most = causal > 0 ? seen_of(r, end, k, causal) : 0;
        if (most)
          with_rows<TILE>(end - r, [&](auto rows) __attribute__((always_inline)) { tile<rows()>(r, end, k, most); });
      }
    }
    for (int64_t r = first_; r < last_; r++) write(r);
  }

 private:
  const char* head(const Heads& from, int64_t head) const {
    return from.data + (batch_ * from.strides[0] + head * from.strides[1]) * bytes_;
  }
  void fetch(const char* row, int64_t size) const {
    for (int64_t i = 0; i < size * bytes_; i += 64) V::prefetch(row + i);
  }
  int64_t head_of(int64_t r) const { return key_head_ * group_ + r % group_; }

  // How many of `count` keys from `k` on row `r` may see.
  int64_t keys_of(int64_t r, int64_t k, int64_t count) const {
    const int64_t left = r / group_ + 1 - k;
    return a_.causal && left < count ? left : count;
  }

  int64_t mask_at(int64_t r, int64_t k) const {
    const int64_t* strides = a_.mask_strides;
    return batch_ * strides[0] + head_of(r) * strides[1] + r / group_ * strides[2] + k;
  }

  // How many of `count` keys from `k` on hold all that the mask leaves any of these rows.
  int64_t seen_of(int64_t r, int64_t end, int64_t k, int64_t count) const {
    if (a_.mask != Mask::chosen) return count;
    int64_t most = 0;
    for (; r < end && most < count; r++) {
      const auto* mask = (const uint8_t*)a_.mask_data + mask_at(r, k);
      if (!memchr(mask + most, 1, count - most)) continue;
      for (most = count; !mask[most - 1];) most--;
    }
    return most;
  }

  // Scaled, in parts of as many inputs as a block has keys, [tile, part, TILE, ATTENTION_KEYS].
  void read_query(int64_t r) {
    const int64_t i = r - first_, parts = (a_.size + ATTENTION_KEYS - 1) / ATTENTION_KEYS;
    const char* from = head(a_.q, head_of(r)) + r / group_ * a_.q.strides[2] * bytes_;
    const float* x = floats_of(from, a_.type, a_.size, read_);
    // Heads of a token lie side by side, so that the rows of one are far apart for a prefetcher.
    fetch(from + 16 / group_ * a_.q.strides[2] * bytes_, a_.size);
    float* to = queries_ + (i / TILE * parts * TILE + i % TILE) * ATTENTION_KEYS;
    for (int64_t d = 0; d < a_.size; d += ATTENTION_KEYS, to += TILE * ATTENTION_KEYS) {
      const int64_t count = a_.size - d < ATTENTION_KEYS ? a_.size - d : ATTENTION_KEYS;
      for (int64_t i = 0; i < count; i++) to[i] = x[d + i] * a_.scale;
    }
  }

  // Keys transposed [keys / PANEL, size, PANEL], values [width / PANEL, ATTENTION_KEYS, PANEL].
  void pack(int64_t k, int64_t count) {
    const char* keys = head(a_.k, key_head_) + k * a_.k.strides[2] * bytes_;
    const char* values = head(a_.v, key_head_) + k * a_.v.strides[2] * bytes_;
    for (int64_t i = 0; i < count; i += V::LANES) {
      // A cache was last read a token ago, and the weights of the model have come by since.
      for (int64_t j = i; j < i + V::LANES && j < count; j++) {
        fetch(keys + (j + V::LANES) * a_.k.strides[2] * bytes_, a_.size);
        fetch(values + j * a_.v.strides[2] * bytes_, a_.value_size);
      }
      pack_keys(keys, i, count);
    }
    for (int64_t i = 0; i < count; i++) {
      const float* row = floats_of(values + i * a_.v.strides[2] * bytes_, a_.type, a_.value_size, read_);
      for (int64_t j = 0; j < width_; j += PANEL) {
        float* to = values_ + (j * ATTENTION_KEYS + i * PANEL);
        const int64_t left = a_.value_size - j;
        if (left < PANEL) memset(to, 0, PANEL * 4);
        memcpy(to, row + j, (left < PANEL ? left : PANEL) * 4);
      }
    }
  }

  // A vector of keys; the last one stands in for those that are not there.
  void pack_keys(const char* keys, int64_t i, int64_t count) {
    const int64_t step = a_.k.strides[2] * bytes_;
    int64_t rows[V::LANES];
    for (int64_t j = 0; j < V::LANES; j++) rows[j] = i + j < count ? i + j : count - 1;
    const bool as_is = a_.type == Float::f32;
    for (int64_t j = 0; !as_is && j < V::LANES; j++) {
      to_float(keys + rows[j] * step, a_.type, a_.size, read_ + j * a_.size);
      rows[j] = j;
    }
    const auto* from = (const uint8_t*)(as_is ? keys : (const char*)read_);
    float* to = keys_ + i / PANEL * PANEL * a_.size + i % PANEL;
    for (int64_t d = 0; d < a_.size; d += V::LANES) {
      V::I word[V::LANES];
      V::transpose(from + d * 4, as_is ? step : a_.size * 4, rows, (a_.size - d) * 4, word);
      for (int64_t j = 0; j < V::LANES && d + j < a_.size; j++) V::store(to + (d + j) * PANEL, word[j]);
    }
  }

  // Rows `r .. end` and `most` keys from `k` on.
  template <int ROWS>
  INLINE void tile(int64_t r, int64_t end, int64_t k, int64_t most) {
    const int64_t i = r - first_, parts = (a_.size + ATTENTION_KEYS - 1) / ATTENTION_KEYS;
    const float* queries = queries_ + i * parts * ATTENTION_KEYS;
    float factors[TILE];
    for (float& factor : factors) factor = 1;
    for (int64_t c = 0; c < most; c += PANEL)
      for (int64_t p = 0; p < parts; p++) {
        const int64_t d = p * ATTENTION_KEYS, depth = a_.size - d < ATTENTION_KEYS ? a_.size - d : ATTENTION_KEYS;
        add_products<ROWS>(queries + d * TILE, depth, keys_ + c * a_.size + d * PANEL, p ? factors : nullptr, scores_ + c,
                           ATTENTION_KEYS);
      }
    softmax(r, end, k, most, factors);
    for (int64_t j = 0; j < width_; j += PANEL)
      add_products<ROWS>(scores_, most, values_ + j * ATTENTION_KEYS, factors, sums_ + i * width_ + j, width_);
  }

  // Turns scores into weights relative to the largest of each row so far, and gives what weights before are worth now.
  void softmax(int64_t r, int64_t end, int64_t k, int64_t most, float* factors) {
    const int64_t first = r - first_, padded = round_up(most, V::LANES);
    float bases[TILE] = {}, before[TILE] = {};
    for (int64_t m = 0; m < end - r; m++) {
      float* scores = scores_ + m * ATTENTION_KEYS;
      if (a_.mask != Mask::none) add_mask(r + m, k, most, scores);
      const int64_t live = keys_of(r + m, k, most);
      for (int64_t j = live < 0 ? 0 : live; j < padded; j++) scores[j] = NEVER;
      V::F top = V::setf(largest_[first + m]);
      for (int64_t j = 0; j < padded; j += V::LANES) top = V::maxf(top, V::loadf(scores + j));
      const float largest = V::largest(top);
      bases[m] = largest == NEVER ? 0 : largest;
      before[m] = largest_[first + m] - bases[m];
      largest_[first + m] = largest;
    }
    for (int m = 0; m < TILE; m++) factors[m] = weight(before[m]);
    for (int64_t m = 0; m < end - r; m++) {
      float *scores = scores_ + m * ATTENTION_KEYS, base = bases[m];
      for (int64_t j = 0; j < padded; j++) scores[j] = weight(scores[j] - base);
      V::F sum = V::zerof();
      for (int64_t j = 0; j < padded; j += V::LANES) sum = V::addf(sum, V::loadf(scores + j));
      total_[first + m] = total_[first + m] * factors[m] + V::totalf(sum);
    }
  }

  static INLINE float weight(float x) { return x < -87.0f ? 0.0f : exponential(x); }

  void add_mask(int64_t r, int64_t k, int64_t count, float* scores) const {
    if (a_.mask == Mask::chosen) {
      const auto* mask = (const uint8_t*)a_.mask_data + mask_at(r, k);
      for (int64_t j = 0; j < count; j++) scores[j] = mask[j] ? scores[j] : NEVER;
    } else {
      float scratch[ATTENTION_KEYS];
      const float* mask = floats_of((const char*)a_.mask_data + mask_at(r, k) * bytes_, a_.type, count, scratch);
      for (int64_t j = 0; j < count; j++) scores[j] += mask[j];
    }
  }

  // A row that sees nothing is zero.
  void write(int64_t r) {
    const int64_t i = r - first_, t = r / group_;
    float* sums = sums_ + i * width_;
    const float factor = total_[i] == 0 ? 0 : 1 / total_[i];
    for (int64_t j = 0; j < a_.value_size; j++) sums[j] *= factor;
    char* out = a_.out + ((batch_ * a_.tokens + t) * a_.heads + head_of(r)) * a_.value_size * bytes_;
    from_float(sums, a_.type, a_.value_size, out);
  }

  const Attention& a_;
  const int64_t batch_, key_head_, group_, first_, last_, bytes_, width_;
  float *queries_, *sums_, *scores_, *keys_, *values_, *largest_, *total_, *read_;
};

void attention_rows(const Attention& a, int64_t batch, int64_t key_head, int64_t first, int64_t last, float* scratch) {
  AttentionSpan(a, batch, key_head, first, last, scratch).run();
}

}  // namespace
