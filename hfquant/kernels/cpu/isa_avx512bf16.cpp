// Kernels for AVX-512 with VNNI and BF16 (Intel Cooper Lake and Sapphire Rapids, AMD Zen 4, and later).
#if defined(__x86_64__)
#include <immintrin.h>
#include <cstdint>
#include <cstring>

#include "kernels.h"

// Standard headers come first: their inline functions must not be compiled for an instruction set that the machine
// may lack, because the linker keeps one copy for everybody.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma")
#pragma GCC diagnostic ignored "-Wunused-function"  // of the shared headers only a part is needed here
namespace hfquant {
#include "simd_avx512.h"
#include "rows.h"
#include "gelu_rows.h"
#include "between_rows.h"
#include "panel.h"
#include "bf16_tiles.h"
}  // namespace hfquant
#pragma GCC pop_options

namespace hfquant {

const Kernels& kernels_avx512bf16() {
  static const Kernels table = [] {
    Kernels out = hfquant_avx512;
    out.name = "avx512bf16";
    out.bf16_tiles = bf16_tiles;
    out.pack_bf16 = pack_bf16;
    out.round_row_bf16 = round_row_bf16;
    out.arrange_bf16 = arrange_bf16;
    return out;
  }();
  return table;
}

}  // namespace hfquant
#endif
