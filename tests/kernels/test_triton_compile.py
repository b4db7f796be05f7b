"""Every Triton kernel, built for four GPUs that are not here: what it needs, and what its hot loop is made of.

The tiles are those that the launch code picks for a GPU with 132 processors. A kernel passes if it fits into shared
memory, does not spill in any way that matters, multiplies on tensor cores, moves 16 bytes a thread, and spends few
instructions on each weight: at 4.3 TB/s an H200 can issue 3.6 to 4.0 for each INT4 weight and twice that for INT8.
"""

import re
from typing import Any

import pytest
import torch


pytest.importorskip("triton", reason="Triton is optional, and has no wheel for this platform")

from hfquant.kernels.dequantize.triton import ROWS, WORDS, dequantize_kernel
from hfquant.kernels.fake_quantize.triton import TILE, fake_quantize_backward_kernel, fake_quantize_kernel
from hfquant.kernels.grid import triton as grid
from hfquant.kernels.grid_weight.triton import grid_weight_backward_kernel, grid_weight_kernel
from hfquant.kernels.int8_linear import triton as int8
from hfquant.kernels.packed_matmul import triton as packed_matmul
from hfquant.kernels.quantize_rows.triton import COLUMNS, WHOLE, quantize_rows_kernel
from tests.support.triton_compiler import SHARED_BYTES, Built, compile_kernel


TARGETS = sorted(SHARED_BYTES)
DIVISIBLE = ("N", "K", "UNITS", "WIDTH", "GROUPS", "G", "GROUP_WORDS")
TENSOR_CORE = r"\b(HGMMA|IGMMA|HMMA|IMMA|UTC\w*MMA)\b"
WIDE_LOAD, WIDE_STORE = r"LDG\S*\.128|LDGSTS\S*\.128", r"STG\S*\.128"
DEVICE = torch.device("cpu")
EXPERTS = 8

# name: (outputs, rows, group or 0 for one scale a row, bits, dtype, what differs, instructions a weight at most)
MATMULS: dict[str, tuple[int, int, int, int, str, str, float]] = {
    "int4-g128-m1": (14336, 1, 128, 4, "bf16", "", 2.2),
    "int4-g128-m1-fp16": (14336, 1, 128, 4, "fp16", "", 2.2),
    "int4-g128-m1-4096": (4096, 1, 128, 4, "bf16", "", 2.5),
    "int4-g128-m16": (14336, 16, 128, 4, "bf16", "", 2.6),
    "int4-g128-m64": (14336, 64, 128, 4, "bf16", "", 4.0),
    "int4-g64-m1": (14336, 1, 64, 4, "bf16", "", 2.6),
    "int4-g32-m1": (14336, 1, 32, 4, "bf16", "", 3.2),
    "int4-g128-m1-zero": (14336, 1, 128, 4, "bf16", "zero", 3.4),
    "int4-g128-m1-ragged": (14336, 1, 128, 4, "bf16", "ragged", 2.4),
    "int4-g128-experts": (1536, 16 * EXPERTS, 128, 4, "bf16", "experts", 2.9),
    "int8-channel-m1": (14336, 1, 0, 8, "bf16", "", 4.0),
    "int8-g128-m16": (14336, 16, 128, 8, "fp16", "", 4.5),
}
MORE_MATMULS: dict[str, tuple[int, int, int, int, str, str, float]] = {
    "int4-channel-m1": (14336, 1, 0, 4, "bf16", "", 2.2),
    "int4-g128-m1-1024": (1024, 1, 128, 4, "bf16", "", 3.2),
    "int4-g64-m16": (14336, 16, 64, 4, "bf16", "", 3.0),
    "int4-g64-m64": (14336, 64, 64, 4, "fp16", "", 4.0),
    "int4-g32-m16": (14336, 16, 32, 4, "bf16", "", 3.6),
    "int4-g32-m1-fp16": (4096, 1, 32, 4, "fp16", "", 3.6),
    "int4-g32-m64": (14336, 64, 32, 4, "bf16", "", 4.6),
    "int4-g16-m1": (14336, 1, 16, 4, "bf16", "", 4.5),
    "int4-g32-m1-zero": (14336, 1, 32, 4, "bf16", "zero", 4.8),
    "int4-g32-m16-zero": (14336, 16, 32, 4, "bf16", "zero", 5.0),
    "int4-g64-m16-zero": (14336, 16, 64, 4, "bf16", "zero", 4.4),
    "int4-g16-m16-zero": (14336, 16, 16, 4, "bf16", "zero", 6.5),
    "int4-g32-m64-zero": (14336, 64, 32, 4, "bf16", "zero", 6.5),
    "int8-g32-m1": (14336, 1, 32, 8, "bf16", "", 4.8),
    "int8-channel-m64": (14336, 64, 0, 8, "bf16", "", 6.0),
}


@pytest.fixture(autouse=True)
def _a_gpu_of_132_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (packed_matmul, int8):
        monkeypatch.setattr(module, "processors", lambda device: 132)


def fits(built: Built, capability: int) -> None:
    # A negative value for masked loads of int8: Triton 3.6 fills a word with its sign, the interpreter does not.
    assert "0xffffffffffffff" not in built.ptx
    assert built.shared <= SHARED_BYTES[capability]
    spilling = built.opcodes()["LDL"] + built.opcodes()["STL"]
    assert built.spilled <= 32
    assert spilling <= 0.01 * len(built.loop())


def check_matmul(case: tuple[int, int, int, int, str, str, float], capability: int) -> None:
    n, m, group, bits, dtype, special, limit = case
    experts = EXPERTS if special == "experts" else 0
    outputs, rows, asymmetric = n * max(experts, 1), m // max(experts, 1), special == "zero"
    tile = packed_matmul.choose_tile(outputs, rows, 4096, group, bits, DEVICE, asymmetric=asymmetric)
    tile["EVEN"] = special != "ragged"
    pointers = {"x_ptr": f"*{dtype}", "w_ptr": "*i16" if bits == 4 else "*i8", "s_ptr": "*bf16", "out_ptr": f"*{dtype}"}
    optional: dict[str, Any] = {"bias_ptr": None, "row_scale_ptr": None}
    optional |= {"z_ptr": "*i32" if special == "zero" else None, "end_ptr": "*i32" if experts else None}
    sizes = dict.fromkeys(("M", "N", "K", "UNITS", "ZERO_WORDS"), "i32")
    constants = {"BITS": bits, "EXPERTS": experts, "PADDED": max(experts, 1), "ASM": True}
    arguments = pointers | optional | sizes | constants | tile
    built = compile_kernel(packed_matmul.packed_matmul_kernel, arguments, capability, num_warps=4, divisible=DIVISIBLE)
    fits(built, capability)
    assert built.has(TENSOR_CORE)
    assert built.has(WIDE_LOAD)
    weights = tile["S"] * tile["BK"] * tile["BN"]
    spent = len(built.loop()) * 128 / weights
    print(f"sm_{capability}: {spent:.2f} instructions a weight, {built.registers} registers")  # noqa: T201
    assert spent <= limit


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", MATMULS)
def test_packed_matmul(name: str, capability: int) -> None:
    check_matmul(MATMULS[name], capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", MORE_MATMULS)
def test_more_packed_matmuls(name: str, capability: int) -> None:
    check_matmul(MORE_MATMULS[name], capability)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("n", "m", "limit"),
    [
        (14336, 1, 0.9),
        (14336, 16, 1.0),
        (4096, 32, 1.3),
        (14336, 32, 1.6),
        (4096, 64, 2.0),
        (8192, 64, 1.6),
        (14336, 64, 2.0),
        (4096, 512, 4.0),
        (14336, 4096, 4.0),
    ],
)
def test_int8_matmul(n: int, m: int, limit: float, asymmetric: bool, capability: int) -> None:
    kernel, tile, warps = int8.choose_kernel(n, m, 4096, DEVICE, asymmetric=asymmetric)
    pointers = {
        "x_ptr": "*i8",
        "w_ptr": "*i8",
        "sw_ptr": "*bf16",
        "sx_ptr": "*fp32",
        "zx_ptr": "*i8" if asymmetric else None,
        "bias_ptr": "*bf16",
        "out_ptr": "*bf16",
    }
    summed = asymmetric and m > int8.SUMMED_ROWS
    if kernel is int8.int8_many_rows_kernel:
        pointers["sums_ptr"] = "*i32" if summed else None
    arguments = pointers | dict.fromkeys(("M", "N", "K", "WIDTH"), "i32") | tile | {"ASM": True}
    built = compile_kernel(kernel, arguments, capability, num_warps=warps, divisible=DIVISIBLE, enable_fp_fusion=False)
    fits(built, capability)
    assert built.has(r"\b(IGMMA|IMMA|UTC\w*MMA)\b")
    assert built.has(WIDE_LOAD)
    limit += 0.2 * asymmetric  # the product with ones
    spent = len(built.loop()) * 32 * warps / (tile.get("S", 1) * tile["BK"] * tile["BN"])
    print(f"sm_{capability}: {spent:.2f} instructions a weight, {built.registers} registers")  # noqa: T201
    assert spent <= limit


ELEMENTWISE = {
    "dequantize-int4": (
        dequantize_kernel,
        {"ids_ptr": None, "w_ptr": "*i32", "s_ptr": "*bf16", "z_ptr": None, "out_ptr": "*bf16"}
        | dict.fromkeys(("ROWS_OUT", "ROWS_IN", "K", "WIDTH", "GROUPS", "ZERO_WORDS"), "i32")
        | {"BITS": 4, "GROUP": 128, "BR": ROWS, "BW": WORDS},
        WIDE_STORE,
    ),
    "weight-sums": (
        int8.weight_sums_kernel,
        {"w_ptr": "*i8", "sums_ptr": "*i32", "WIDTH": "i32", "K": "i32", "BK": 2048},
        WIDE_LOAD,
    ),
    "embedding-int8": (
        dequantize_kernel,
        {"ids_ptr": "*i64", "w_ptr": "*i32", "s_ptr": "*bf16", "z_ptr": "*i32", "out_ptr": "*fp32"}
        | dict.fromkeys(("ROWS_OUT", "ROWS_IN", "K", "WIDTH", "GROUPS", "ZERO_WORDS"), "i32")
        | {"BITS": 8, "GROUP": 64, "BR": ROWS, "BW": WORDS},
        WIDE_STORE,
    ),
    "quantize-rows": (
        quantize_rows_kernel,
        {"x_ptr": "*bf16", "static_ptr": None, "codes_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i8", "K": "i32"}
        | {"ASYMMETRIC": True, "BK": WHOLE, "ONCE": True},
        WIDE_LOAD,
    ),
    "quantize-long-rows": (
        quantize_rows_kernel,
        {"x_ptr": "*bf16", "static_ptr": None, "codes_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i8", "K": "i32"}
        | {"ASYMMETRIC": True, "BK": COLUMNS, "ONCE": False},
        WIDE_LOAD,
    ),
    "fake-quantize": (
        fake_quantize_kernel,
        {"x_ptr": "*bf16", "s_ptr": "*fp32", "z_ptr": None, "out_ptr": "*bf16", "GROUPS": "i32", "G": "i32"}
        | {"BITS": 4, "BG": TILE // 128, "BK": 128},
        WIDE_LOAD,
    ),
    "fake-quantize-backward": (
        fake_quantize_backward_kernel,
        dict.fromkeys(("grad_ptr", "x_ptr", "grad_x_ptr"), "*bf16")
        | {"s_ptr": "*fp32", "z_ptr": None, "grad_s_ptr": "*fp32", "GROUPS": "i32", "G": "i32"}
        | {"BITS": 4, "BG": TILE // 128, "BK": 128},
        WIDE_LOAD,
    ),
    "grid-weight": (
        grid_weight_kernel,
        {"codes_ptr": "*i32", "residual_ptr": "*i32", "delta_ptr": "*bf16", "s_ptr": "*fp32", "out_ptr": "*bf16"}
        | {"GROUPS": "i32", "GROUP_WORDS": "i32", "BG": 16, "BW": 16},
        WIDE_LOAD,
    ),
    "grid-weight-backward": (
        grid_weight_backward_kernel,
        {"grad_ptr": "*bf16", "codes_ptr": "*i32", "residual_ptr": "*i32", "delta_ptr": "*bf16", "s_ptr": "*fp32"}
        | {"grad_delta_ptr": "*bf16", "grad_s_ptr": "*fp32"}
        | {"GROUPS": "i32", "GROUP_WORDS": "i32", "BG": 16, "BW": 16},
        WIDE_LOAD,
    ),
}


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name: str, capability: int) -> None:
    kernel, arguments, wide = ELEMENTWISE[name]
    built = compile_kernel(kernel, arguments, capability, num_warps=4, divisible=DIVISIBLE, enable_fp_fusion=False)
    fits(built, capability)
    assert built.has(wide)
    divides = "quantize" in name and not name.startswith("de")
    if divides or name.startswith("grid"):
        assert ("div.rn.f32" in built.ptx) == divides  # exact division; approximate ones flip ties
        assert "0f4B400000" in built.ptx  # the number that rounds when added and taken away again
        assert "0fCB400000" in built.ptx


@pytest.mark.gpu
def test_the_probe_runs() -> None:
    assert grid.probe(torch.device("cuda")) is None


def run_assembly(text: str, words: torch.Tensor, dtype: torch.dtype, second: int = 0) -> torch.Tensor:
    """What the few instructions in ``text`` leave in ``$0`` for 32-bit ``words`` in ``$1`` and ``second`` in ``$2``."""
    values: dict[str, torch.Tensor] = {"$1": words, "$2": torch.tensor(second)}

    def read(operand: str) -> torch.Tensor:
        return values[operand] if operand in values else torch.tensor(int(operand, 0))

    def floats(operand: str) -> torch.Tensor:
        return read(operand).expand(words.shape).to(torch.int32).view(dtype).view(-1, 2)

    for name, operands in re.findall(r"^\s*((?:mov|shr|lop3|xor|fma|sub)\S*) (.*);$", text, flags=re.MULTILINE):
        target, *sources = operands.split(", ")
        if name == "mov.b32":
            values[target] = read(sources[0])
        elif name == "shr.u32":
            values[target] = read(sources[0]) >> read(sources[1])
        elif name == "xor.b32":
            values[target] = read(sources[0]) ^ read(sources[1])
        elif name == "lop3.b32":
            assert sources[3] == "0xea"  # the table of (a & b) | c
            values[target] = (read(sources[0]) & read(sources[1])) | read(sources[2])
        elif name == "fma.rn.bf16x2":
            a, b, c = (floats(source).double() for source in sources)
            values[target] = (a * b + c).to(dtype)
        else:
            assert name == "sub.rn.f16x2"
            values[target] = (floats(sources[0]).double() - floats(sources[1]).double()).to(dtype)
    return values["$0"]


@pytest.mark.parametrize(("position", "dtype"), [(0, torch.float16), (1, torch.bfloat16)])
def test_assembly_unpacks_every_word(position: int, dtype: torch.dtype) -> None:
    source = re.findall(r'asm=f"""(.*?)"""', grid.nibble_codes.src, flags=re.DOTALL)[position]
    low, high = torch.arange(1 << 16), torch.arange(1 << 16).flip(0)
    for j in range(4):
        text = source.replace("{4 * J}", str(4 * j))
        expected = torch.stack([(half >> 4 * j & 15) - 8 for half in (low, high)], 1)
        assert torch.equal(run_assembly(text, low | high << 16, dtype), expected.to(dtype))


def test_assembly_flips_the_sign_of_every_byte() -> None:
    texts = re.findall(r'"(xor.*?)"', grid.signed_codes.src)
    assert len(set(texts)) == 2
    stored = torch.arange(1 << 16) * 0x10001
    codes = stored.to(torch.int32).view(torch.int8) ^ -128
    for text in texts:
        result = run_assembly(text, stored, torch.int8, second=0x80808080)
        assert torch.equal(result.to(torch.int32).view(torch.int8), codes)
