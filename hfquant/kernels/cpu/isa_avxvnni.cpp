// Kernels for AVX-VNNI: AVX2 with the INT8 dot product (Intel Alder Lake 2021, AMD Zen 5, and later).
#if defined(__x86_64__)
#include <immintrin.h>
#include <cstdint>
#include <cstring>

#include "kernels.h"

// Standard headers come first: their inline functions must not be compiled for an instruction set that the machine
// may lack, because the linker keeps one copy for everybody.
#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#define HFQUANT_AVXVNNI
namespace hfquant {
#include "simd_avx2.h"
#include "rows.h"
#include "training_rows.h"
#include "gelu_rows.h"
#include "between_rows.h"
#include "panel.h"
#include "attention_rows.h"
#include "few_rows.h"
#include "tiles.h"

KERNEL_TABLE(hfquant_avxvnni, "avxvnni", 4)
}  // namespace hfquant
#pragma GCC pop_options
#endif
