"""Makes Triton's interpreter compute bfloat16; import it before any kernel, in a process of its own.

``TRITON_INTERPRET=1`` runs kernels on CPU tensors with NumPy, which has no bfloat16: products, sums, comparisons and
reductions then work on the raw 16 bits, silently, and casts truncate (seen in Triton 3.6.0 and 3.9.0). Here they are
computed in float32 and rounded to the nearest bfloat16, ties to even. Triton 3.6.0 also cannot take a loop bound from
a tensor with NumPy 2.4.
"""

import os


os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


BUILDER, HANDLE, BF16 = interpreter.InterpreterBuilder, interpreter.TensorHandle, tl.bfloat16


def widen(bits: np.ndarray) -> np.ndarray:
    """Float32 values of bfloat16 bit patterns."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def narrow(values: np.ndarray) -> np.ndarray:
    """Bit patterns of the bfloat16 values nearest to float32 ``values``."""
    exact = np.array(values, dtype=np.float32, order="C")
    bits = exact.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(exact), np.uint16(0x7FC0), rounded).reshape(exact.shape)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, HANDLE) and value.dtype.scalar == BF16


def _widened(value: Any) -> Any:
    return HANDLE(widen(value.data), tl.float32) if _is_bf16(value) else value


def _narrowed(value: Any) -> Any:
    return value if value.data.dtype == np.bool_ else HANDLE(narrow(value.data), BF16)


def _wrap(name: str, operands: int) -> None:
    original = getattr(BUILDER, name)

    def operation(self: Any, *arguments: Any) -> Any:
        if any(map(_is_bf16, arguments[:operands])):
            widened = [_widened(a) for a in arguments[:operands]]
            return _narrowed(original(self, *widened, *arguments[operands:]))
        return original(self, *arguments)

    setattr(BUILDER, name, operation)


def _wrap_casts() -> None:
    cast, to_float = BUILDER.cast_impl, BUILDER.create_fp_to_fp

    def convert(self: Any, source: Any, target: Any) -> Any:
        kind, wanted = source.dtype.scalar, target.scalar
        if kind == wanted:
            return source
        if wanted == BF16:
            return HANDLE(narrow(source.data.astype(np.float32)), BF16)
        source = _widened(source)
        return source if wanted == tl.float32 and kind == BF16 else cast(self, source, target)

    def convert_float(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        involved = BF16 in (source.dtype.scalar, target.scalar)
        return convert(self, source, target) if involved else to_float(self, source, target, rounding)

    BUILDER.cast_impl, BUILDER.create_fp_to_fp = convert, convert_float
    BUILDER.get_bf16 = lambda self, value: HANDLE(narrow(np.array([value], dtype=np.float32)), BF16)


def _wrap_products() -> None:
    dot = BUILDER.create_dot
    BUILDER.create_dot = lambda self, a, b, *rest: dot(self, _widened(a), _widened(b), *rest)


def _wrap_reductions(kind: type) -> None:
    apply = kind.apply_impl

    def operation(self: Any, tensors: tuple[Any, ...]) -> Any:
        assert all(t.dtype.scalar != BF16 for t in tensors), "reduce float32: bfloat16 sums differ between devices"
        return apply(self, tensors)

    kind.apply_impl = operation


def _wrap_loop_bounds() -> None:
    patch: Callable[..., None] = interpreter._patch_lang_tensor

    def patched(tensor: Any, *rest: Any) -> None:
        patch(tensor, *rest)

        def index(self: Any) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        rest[0].set_attr(tensor, "__index__", index) if rest else setattr(tensor, "__index__", index)

    interpreter._patch_lang_tensor = patched


for _name, _operands in (("binary_op", 2), ("ternary_op", 3), ("unary_op", 1), ("create_fma", 3)):
    _wrap(_name, _operands)
_wrap_casts()
_wrap_products()
_wrap_reductions(interpreter.ReduceOps)
_wrap_reductions(interpreter.ScanOps)
_wrap_loop_bounds()
