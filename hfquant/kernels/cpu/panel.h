// Panels: 32 rows of a weight, transposed for `tiles`, on the vector type V of the including file.

namespace {

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
INLINE void store_word(V::I v, int bits, int64_t i, uint8_t* panel) {
  uint8_t* to = panel + i * (8 / bits) * BLOCK * 4;
  V::store(to, bits == 4 ? V::low(v) : v);
  if (bits == 4) V::store(to + BLOCK * 4, V::high(v));
}

// A panel: unsigned codes [K / 4, BLOCK, 4], float scales [groups, BLOCK], int32 zero points [groups, BLOCK], sums likewise.
void pack_panel(const Weight& w, int64_t block, uint8_t* panel) {
  const int64_t depth = panel_depth(w), words = depth * w.bits / 32;
  for (int column = 0; column < BLOCK; column += V::LANES) {
    int64_t rows[V::LANES];
    for (int i = 0; i < V::LANES; i++) {  // past the last row it is packed again
      const int64_t row = block * BLOCK + column + i;
      rows[i] = row < w.rows ? row : w.rows - 1;
    }
    V::I word[V::LANES];
    for (int64_t j = 0; j < words; j += V::LANES) {
      const int64_t left = w.row_bytes - j * 4;
      if (left > 0) V::transpose(w.codes + j * 4, w.row_bytes, rows, left, word);
      if (left > 0 && words - j >= V::LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < V::LANES; i++) store_word(word[i], w.bits, j + i, panel + column * 4);
      } else {
        for (int64_t i = j; i < words && i < j + V::LANES; i++)
          store_word(left > 0 ? word[i - j] : V::zero(), w.bits, i, panel + column * 4);
      }
    }
  }
  float* scales = (float*)(panel + depth * BLOCK);
  int32_t* zeros = (int32_t*)(scales + w.groups * BLOCK);
  for (int i = 0; i < BLOCK; i++) {
    const int64_t row = block * BLOCK + i < w.rows ? block * BLOCK + i : w.rows - 1;
    for (int64_t g = 0; g < w.groups; g++) {
      scales[g * BLOCK + i] = float_of(uint32_t(w.scale[row * w.groups + g]) << 16);
      if (w.zero) zeros[g * BLOCK + i] = zero_point(w, row, g);
    }
  }
  sum_columns(w, panel, zeros, zeros + w.groups * BLOCK);
}

}  // namespace
