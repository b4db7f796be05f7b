// Kernels for any processor.
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace hfquant {
#include "simd_scalar.h"
#include "rows.h"
#include "training_rows.h"
#include "gelu_rows.h"
#include "between_rows.h"
#include "panel.h"
#include "attention_rows.h"
#include "few_rows.h"
#include "tiles.h"

KERNEL_TABLE(hfquant_scalar, "scalar", 4)
}  // namespace hfquant
