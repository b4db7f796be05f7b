"""The grid and the packed layout in Triton; every other ``triton.py`` builds on these functions.

Division (``tl.div_rn``) and rounding (half to even) are those of ``numerics/affine.py``, so codes equal the CPU's.
Inline assembly unpacks INT4 on a GPU; each piece has a twin in plain Triton, which the interpreter runs.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction


@triton.jit
def round_half_even(x):
    """Nearest integers of float32 ``x``, ties to even; beyond 2**22 only the sign and the size are right."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2**23, where one step is 1.0


@triton.jit
def clamp_codes(steps, BITS: tl.constexpr):
    """``steps`` within the codes of ``BITS`` bits; NaN stays NaN."""
    low: tl.constexpr = -(1 << (BITS - 1))
    clamped = tl.minimum(tl.maximum(steps, low * 1.0), -low - 1.0)
    return tl.where(steps == steps, clamped, steps)


@triton.jit
def unpack_words(words, BITS: tl.constexpr):
    """Codes ``[A, B, 32 // BITS]`` (int32) of words ``[A, B]``."""
    shift = tl.arange(0, 32 // BITS) * BITS
    unsigned = (words[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    return unsigned - (1 << (BITS - 1))


@triton.jit
def load_zero_point(pointer, group, mask, BITS: tl.constexpr):
    """Zero points of the groups numbered ``group`` in a packed row that starts at ``pointer``, float32."""
    word = tl.load(pointer + group // (32 // BITS), mask=mask, other=0)
    unsigned = (word >> (group % (32 // BITS) * BITS)) & ((1 << BITS) - 1)
    return (unsigned - (1 << (BITS - 1))).to(tl.float32)


@triton.jit
def _nibble(w, J: tl.constexpr, DTYPE: tl.constexpr):
    nibble = (w >> (4 * J)) & 0xF
    if tl.float16 == DTYPE:
        codes = (nibble | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1032.0
    else:
        codes = (nibble | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 136.0
    return codes


@triton.jit
def _nibbles_float16(w):
    """The four codes of each int16, by assembly: two weights for each instruction."""
    return tl.inline_asm_elementwise(
        asm="""{
        .reg .b32 a, b, c, d, off;
        mov.b32 off, 0x64086408;
        shr.u32 b, $4, 4;
        shr.u32 c, $4, 8;
        shr.u32 d, $4, 12;
        lop3.b32 a, $4, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 b, b, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 c, c, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 d, d, 0x000f000f, 0x64006400, 0xea;
        sub.rn.f16x2 $0, a, off;
        sub.rn.f16x2 $1, b, off;
        sub.rn.f16x2 $2, c, off;
        sub.rn.f16x2 $3, d, off;
        }""",
        constraints="=r,=r,=r,=r,r",
        args=[w],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _nibbles_bfloat16(w):
    """The same in bfloat16."""
    return tl.inline_asm_elementwise(
        asm="""{
        .reg .b32 a, b, c, d, one, off;
        mov.b32 one, 0x3f803f80;
        mov.b32 off, 0xc308c308;
        shr.u32 b, $4, 4;
        shr.u32 c, $4, 8;
        shr.u32 d, $4, 12;
        lop3.b32 a, $4, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 c, c, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 d, d, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $0, a, one, off;
        fma.rn.bf16x2 $1, b, one, off;
        fma.rn.bf16x2 $2, c, one, off;
        fma.rn.bf16x2 $3, d, one, off;
        }""",
        constraints="=r,=r,=r,=r,r",
        args=[w],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def unpack_nibbles(w, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The four codes (-8 to 7) in each int16 of ``w``, least significant first, as four tensors of ``DTYPE``.

    A nibble becomes the last bits of a float between 128 and 144 (bfloat16) or 1024 and 1040 (float16), from which
    136 or 1032 is taken: exact, and two weights for each instruction (Kim et al. 2022, https://arxiv.org/abs/2211.10017).
    """
    if not ASM:
        a, b, c, d = _nibble(w, 0, DTYPE), _nibble(w, 1, DTYPE), _nibble(w, 2, DTYPE), _nibble(w, 3, DTYPE)
    elif tl.float16 == DTYPE:
        a, b, c, d = _nibbles_float16(w)
    else:
        a, b, c, d = _nibbles_bfloat16(w)
    return a, b, c, d


@triton.jit
def _probe_kernel(out_ptr):
    tl.store(out_ptr, round_half_even(tl.load(out_ptr)).to(tl.float32))


INTERPRETED = not isinstance(_probe_kernel, JITFunction)
"""Whether ``TRITON_INTERPRET=1`` was set when this was imported: kernels then run on CPU tensors, one by one."""


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``."""
    return 132 if INTERPRETED else int(torch.cuda.get_device_properties(device).multi_processor_count)


def probe(device: torch.device) -> str | None:
    """Why kernels cannot be built and run on ``device``, or ``None`` if they can."""
    value = torch.tensor([2.5], device=device)
    try:
        with torch.cuda.device_of(value):
            _probe_kernel[(1,)](value)
    except Exception as error:  # a missing compiler, an old driver, a card Triton does not know: all mean "not here"
        return f"Triton cannot run here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None if float(value) == 2.0 else "Triton's probe kernel gave a wrong result"


def rows_of(x: Tensor) -> Tensor:
    """``x [..., K]`` as contiguous rows ``[M, K]``."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
