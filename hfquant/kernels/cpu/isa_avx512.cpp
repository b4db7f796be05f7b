// Kernels for AVX-512 with VNNI (Intel Cascade Lake 2019, AMD Zen 4, and later).
#if defined(__x86_64__)
#include <immintrin.h>
#include <cstdint>
#include <cstring>

#include "kernels.h"

// Standard headers come first: their inline functions must not be compiled for an instruction set that the machine
// may lack, because the linker keeps one copy for everybody.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
namespace hfquant {
#include "simd_avx512.h"
#include "rows.h"
#include "training_rows.h"
#include "gelu_rows.h"
#include "between_rows.h"
#include "panel.h"
#include "attention_rows.h"
#include "few_rows.h"
#include "tiles.h"

KERNEL_TABLE(hfquant_avx512, "avx512", 8)
}  // namespace hfquant
#pragma GCC pop_options
#endif
