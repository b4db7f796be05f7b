// The table of CPU kernels; one per instruction set, all with the same results. See docs/kernels.md for the layouts.
#pragma once
#include <cstdint>

#if defined(__x86_64__) && !defined(HFQUANT_SCALAR)
#define HFQUANT_X86  // there are tables for vectors
#endif

namespace hfquant {

constexpr int BLOCK = 32;      // output features that one unit of work computes
constexpr int MAX_PLANES = 3;  // INT8 digits of one activation: 1 quantized, 2 half precision, 3 float32

enum class Float : int { f32, bf16, f16 };
enum class Gate : int64_t { none = -1, silu, gelu_tanh, gelu };

// A packed weight as numerics/packing.py defines it: rows of unsigned codes, lowest bits first.
struct Weight {
  const uint8_t* codes;   // [N, row_bytes]
  const uint16_t* scale;  // [N, groups], bfloat16 bit patterns
  const uint8_t* zero;    // [N, zero_bytes] packed like the codes, or null for symmetric
  int64_t rows, in_features, row_bytes, groups, zero_bytes;
  int bits;
};

// Activations as a kernel wants them; the caller owns the memory. `chunk` is what one vector of weights multiplies.
//   few rows:  codes [M, planes, chunks, chunk] (rows may be further apart), sums [M, parts, chunks, lanes]   (of 4 or 8 codes)
//   tiles:     codes [tiles, planes, K / 4, tile, 4], sums [tiles, planes, segments, tile]
// With a symmetric weight sums are multiplied by -2**(bits-1), so that an accumulator can start from them.
// Quantized activations have one scale a row. Digits of float ones have one a chunk [M, chunks] or a segment
// [M, segments], so that an outlier costs only its neighbours precision.
struct Activations {
  int64_t rows;
  int planes;
  const int8_t* codes;
  int64_t row_codes;  // from one row to the next; few rows only
  const int32_t* sums;
  const int32_t* row_sums;  // [M]; few rows of one plane only
  const float* scale;
  // Codes of zero [M], or null for symmetric activations: every product takes them times the sum of the weights off.
  const int32_t* zeros;
  const int32_t* ones;  // sums of a row of ones [chunks, lanes]; few rows only
  // The sums of the only row are those of codes less their zero, which is folded into products; few rows, several groups.
  bool folded = false;
};

// Rows of bfloat16 as tiles [tiles, K / 2, tile, 2].
struct Bf16Rows {
  int64_t rows;
  const uint16_t* pairs;
};

struct Output {
  void* data;  // [M, N]
  Float type;
  const float* bias;  // [N] or null
  int64_t columns;    // N
  Gate act = Gate::none;
};

// A weight with an adapter inside its rounding, in float32: codes are round(code + residual / 16 + delta).
struct Grid {
  Weight weight;            // without scales
  const uint8_t* residual;  // [N, residual_bytes], four bits each, or null
  int64_t residual_bytes;
  const float* delta;  // [N, K], in steps
  const float* scale;  // [N, groups]
};

// Values that training rounds, in float32: codes are round(x / scale) + zero.
struct Values {
  const float* x;      // [rows, length]
  const float* scale;  // [rows, groups]
  const int8_t* zero;  // [rows, groups] or null
  int64_t rows, length, groups;
  int bits;
};

constexpr int ATTENTION_KEYS = 128;  // keys of attention that are worked on at once

// Heads [batch, heads, tokens, size]; strides are those of the first three dimensions, in values.
struct Heads {
  const char* data;
  int64_t strides[3];
};

enum class Mask : int { none, chosen, added };

struct Attention {
  Heads q, k, v;
  char* out;  // [batch, tokens, heads, value_size]
  Float type;
  Mask mask;              // which keys a token sees, or what is added to its scores
  const void* mask_data;  // [batch, heads, tokens, keys]
  int64_t mask_strides[3];
  int64_t heads, key_heads, tokens, keys, size, value_size;
  float scale;
  bool causal;  // token t sees keys 0 .. t
};

struct Kernels {
  const char* name;
  int vector_bytes;  // of one register
  int tile;          // rows of activations in a register tile
  int few;           // up to this many rows are multiplied row by row, without tiles
  // Codes [planes, padded] and scales of row `x [K]`; `given` is a static scale or null. Float activations (planes > 1)
  // have a scale for every `block` inputs. With `zero` and no given scale codes span the row's range; it gets the code
  // of zero.
  void (*quantize_row)(const float* x, int64_t count, int planes, int64_t block, const float* given, int8_t* codes,
                       int64_t padded, float* scales, float* zero);
  void (*to_float)(const void* x, Float type, int64_t count, float* out);
  void (*from_float)(const float* x, Float type, int64_t count, void* out);
  // Fills codes, sums and the row sum of one row for `few`, from `codes [planes, padded]` in natural order.
  void (*arrange_few)(const Weight&, int planes, const int8_t* natural, int64_t padded, int8_t* codes, int32_t* sums,
                      int32_t* row_sums);
  // The same for a tile, from `natural [tile, planes, padded]`, which is changed.
  void (*arrange_tile)(const Weight&, int planes, int8_t* natural, int64_t padded, int8_t* codes, int32_t* sums);
  void (*few_rows)(const Weight&, const Activations&, const Output&, int64_t first_block, int64_t last_block);
  void (*tiles)(const Weight&, const Activations&, const Output&, int64_t block, int64_t first_tile, int64_t last_tile,
                const uint8_t* panel);
  // Makes the panel of one block for `tiles`: codes [K / 4, BLOCK, 4], scales [groups, BLOCK], zero points likewise,
  // sums of codes without their zero points [groups, BLOCK], as floats where there are several groups.
  void (*pack_panel)(const Weight&, int64_t block, uint8_t* panel);
  // Float values of one row [K].
  void (*dequantize_row)(const Weight&, int64_t row, Float type, void* out);
  // The same of a weight with an adapter.
  void (*grid_row)(const Grid&, int64_t row, Float type, void* out);
  // Gradients of delta [K] and of the scales [groups] of one row, from that of the float values.
  void (*grid_gradients)(const Grid&, int64_t row, const float* grad, float* grad_delta, float* grad_scale);
  // The values that the codes of one row stand for.
  void (*fake_quantize_row)(const Values&, int64_t row, float* out);
  // Gradients of x [length] and of the scales [groups] of one row, from that of those values.
  void (*fake_quantize_gradients)(const Values&, int64_t row, const float* grad, float* grad_x, float* grad_scale);
  // x / sqrt(mean(x**2) + eps) * weight of a row, through `values [count]`, which may be `out` itself where that is float32.
  // With `round_first` the quotient is rounded to `type` before the weight.
  void (*rms_norm_row)(const float* x, Float type, int64_t count, const float* weight, float eps, bool round_first,
                       float* values, void* out);
  // act(gate) * up, each rounded to `type`; only act(gate) where there is no `up`.
  void (*gated_row)(const void* gate, const void* up, Float type, int64_t count, Gate kind, void* out);
  // The rotary embedding of one head; `values` has room for two rows.
  void (*rotate_row)(const float* x, Float type, int64_t count, const float* cos, const float* sin, float* values, void* out);
  // Attention of rows `first .. last` of a key head; row r is query head r % group of token r / group.
  void (*attention_rows)(const Attention&, int64_t batch, int64_t key_head, int64_t first, int64_t last, float* scratch);
  // Tiles of bfloat16 activations, multiplied as they are; null where the processor has no such product.
  void (*bf16_tiles)(const Weight&, const Bf16Rows&, const Output&, int64_t block, int64_t first_tile, int64_t last_tile,
                     const uint8_t* panel);
  // The panel for them: codes without their zero points as bfloat16 [K / 2, BLOCK, 2], scales [groups, BLOCK].
  void (*pack_bf16)(const Weight&, int64_t block, uint8_t* panel);
  // A row of float32 as bfloat16, denormals as zero; one tile of activations, from rows [tile, depth].
  void (*round_row_bf16)(const float* x, int64_t count, uint16_t* out);
  void (*arrange_bf16)(const uint16_t* rows, int64_t depth, uint16_t* out);
};

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Vectors of INT8 weights that meet digits of activations before these are scaled; those of INT4 hold two codes a byte.
constexpr int vectors_of(int bits, int planes, bool one_scale) { return bits == 8 && planes > 1 && one_scale ? 2 : 1; }

// Codes that are multiplied before sums are scaled.
inline int64_t chunk_of(const Weight& w, int planes, int vector_bytes) {
  return int64_t(vector_bytes) * 8 / w.bits * vectors_of(w.bits, planes, w.groups == 1);
}

// Integers that the products of few rows with all digits need: one holds 8 * 15 * 128 * 65793 (INT4, three digits) or
// 8 * 255 * 128 * 257 (INT8, two) of the lowest digit; INT8 with three keeps the first digit apart.
constexpr int parts_of(int bits, int planes) { return bits == 8 && planes == 3 ? 2 : 1; }

// Inputs of a row of tiles: whole words, so that INT4 has pairs of quads.
inline int64_t panel_depth(const Weight& w) { return round_up(w.in_features, 8); }

// Inputs that a register tile sums up in integers: a group, but at most 128 where activations have scales of their own.
inline int64_t segment_of(const Weight& w, int planes) {
  const int64_t group = w.in_features / w.groups;
  return planes > 1 && (w.groups == 1 || group % 128 == 0) && group > 128 ? 128 : group;
}

inline int64_t segments_of(const Weight& w, int planes) {
  const int64_t segment = segment_of(w, planes);
  return (w.in_features + segment - 1) / segment;
}

// Bytes of a panel: codes, scales, zero points and sums.
inline int64_t panel_bytes(const Weight& w) {
  return panel_depth(w) * BLOCK + w.groups * BLOCK * 12 + 64;
}

// Bytes of a panel of bfloat16 values.
inline int64_t bf16_panel_bytes(const Weight& w) { return panel_bytes(w) + panel_depth(w) * BLOCK; }

// Floats of scratch memory that attention needs for so many rows.
inline int64_t attention_scratch(const Attention& a, int64_t rows) {
  const int64_t width = round_up(a.value_size, 32), padded = round_up(rows, 12);
  return padded * (round_up(a.size, ATTENTION_KEYS) + width + 2) + ATTENTION_KEYS * (a.size + width + 12) +
         16 * (a.size + a.value_size) + 256;
}

extern "C" const Kernels hfquant_scalar;
#ifdef HFQUANT_X86
extern "C" const Kernels hfquant_avx2;
extern "C" const Kernels hfquant_avxvnni;
extern "C" const Kernels hfquant_avx512;
const Kernels& kernels_avx512bf16();  // those of avx512 and the product of bfloat16
#endif

}  // namespace hfquant
