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
def nibble_codes(w, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Codes (-8 to 7) of nibble ``J`` of each int16 of ``w``, the least significant first, in ``DTYPE``.

    A nibble becomes the last bits of a float between 128 and 144 (bfloat16) or 1024 and 1040 (float16), from which
    136 or 1032 is taken: exact, and two weights for each instruction (Kim et al. 2022, https://arxiv.org/abs/2211.10017).
    Each nibble is a text of its own: of one with four results, Triton 3.8 sends three through shared memory.
    """
    if not ASM:
        nibble = (w >> (4 * J)) & 0xF
        if tl.float16 == DTYPE:
            codes = (nibble | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1032.0
        else:
            codes = (nibble | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 136.0
    elif tl.float16 == DTYPE:
        codes = tl.inline_asm_elementwise(
            asm=f"""{{
            .reg .b32 a, off;
            mov.b32 off, 0x64086408;
            shr.u32 a, $1, {4 * J};
            lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea;
            sub.rn.f16x2 $0, a, off;
            }}""",
            constraints="=r,r",
            args=[w],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        codes = tl.inline_asm_elementwise(
            asm=f"""{{
            .reg .b32 a, one, off;
            mov.b32 one, 0x3f803f80;
            mov.b32 off, 0xc308c308;
            shr.u32 a, $1, {4 * J};
            lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, a, one, off;
            }}""",
            constraints="=r,r",
            args=[w],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return codes


@triton.jit
def signed_codes(w, ASM: tl.constexpr, SWAP: tl.constexpr = False):
    """Codes of stored INT8 bytes ``w``, whose sign bits are flipped; four for each instruction.

    Triton 3.8 flips byte by byte where it is not told otherwise. And it copies codes that two products take to shared
    memory for the second: with ``SWAP`` they come from another text, and become the same registers in the assembler.
    """
    if not ASM:
        codes = w ^ -128
    else:
        codes = tl.inline_asm_elementwise(
            asm="xor.b32 $0, $2, $1;" if SWAP else "xor.b32 $0, $1, $2;",
            constraints="=r,r,r",
            args=[
                w,
                tl.full(w.shape, -128, tl.int8),
            ],  # a word of its own: with one operand, sm_80 would prefetch bytes
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return codes


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
