"""Every instruction set this machine has, against the reference: exact for integers, within the policy for floats."""

import copy
import multiprocessing
import subprocess
import sys
import threading
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from hfquant.errors import KernelError
from hfquant.kernels import native
from hfquant.kernels.dequantize import dequantize_weight
from hfquant.kernels.dispatch import choices
from hfquant.kernels.fake_quantize.reference import fake_quantize_backward_reference, fake_quantize_reference
from hfquant.kernels.grid_weight.reference import grid_weight_backward_reference, grid_weight_reference
from hfquant.kernels.int8_linear.reference import quant_linear_reference
from hfquant.kernels.quantize_rows import quantize_rows
from hfquant.kernels.quantize_rows.reference import quantize_rows_reference
from hfquant.numerics.affine import code_range, round_scale, scale_to_bits
from hfquant.numerics.packing import pack
from tests.support.linear_case import DTYPES, INTEGER_KINDS, KINDS, LinearCase
from tests.support.packed import pack_
from tests.support.tolerance import GRADIENT_FACTOR, PRECISION_ERRORS, assert_close


SETS = [name for name, usable in native.instruction_sets().items() if usable]
pytestmark = pytest.mark.skipif(not SETS, reason="the native kernels are not built")

ROWS = [1, 2, 3, 5, 8, 9, 13, 40]
ONE = int(scale_to_bits(torch.ones(1)))
SHAPES = [(64, 3), (100, 1), (97, 33), (576, 65), (1025, 31)]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> object:
    with native.selected(request.param):
        yield request.param


def reference(case: LinearCase, x: Tensor, kind: str, bias: Tensor | None) -> Tensor:
    given = case.arguments(kind)
    scale, dynamic, asymmetric = (given.get(name) for name in ("input_scale", "dynamic", "asymmetric"))
    return quant_linear_reference(x, *case.packed, scale, bias, bool(dynamic), bool(asymmetric), bits=case.bits)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", INTEGER_KINDS)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_layers_are_the_reference_bit_for_bit(bits: int, m: int, kind: str) -> None:
    for k, n in SHAPES:
        for dtype in DTYPES:
            case = LinearCase(m, k, n, bits, None, True, dtype)
            assert torch.equal(case.run(case.x, kind, bias=case.bias), reference(case, case.x, kind, case.bias))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", INTEGER_KINDS)
@pytest.mark.parametrize(("m", "k", "n"), [(2, 16400, 9), (4, 4224, 35), (8, 2049, 40), (7, 9001, 33), (8, 8192, 5)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_long_rows_are_multiplied_in_parts(bits: int, symmetric: bool, m: int, k: int, n: int, kind: str) -> None:
    case = LinearCase(m, k, n, bits, None, symmetric)
    result = case.run(case.x, kind, bias=case.bias)
    assert_close(result, case.oracle(kind), case.plain(kind))
    if symmetric:
        assert torch.equal(result, reference(case, case.x, kind, case.bias))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 4, 7, 13, 26])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_any_size(bits: int, symmetric: bool, m: int, kind: str) -> None:
    for k, n, group in ((64, 5, 16), (96, 33, 32), (192, 40, 64), (288, 7, 96), (512, 9, 256), (97, 34, None)):
        for dtype in DTYPES:
            case = LinearCase(m, k, n, bits, group, symmetric, dtype)
            assert_close(case.run(case.x, kind, bias=case.bias), case.oracle(kind), case.plain(kind))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_small_integers_in_bfloat16_are_exact(bits: int, symmetric: bool) -> None:
    for m, (k, group) in product((3, 9, 26), ((64, None), (100, None), (96, 32), (1032, 24))):
        case = LinearCase(m, k, 35, bits, group, symmetric, torch.bfloat16)
        x = torch.randint(-8, 9, (m, k)).bfloat16()
        case.packed = (case.packed[0], torch.full_like(case.packed[1], ONE), case.packed[2])
        zero = 0 if case.zero is None else case.zero.repeat_interleave(group or k, 1)
        exact = x.double() @ (case.codes - zero).double().T
        assert torch.equal(case.run(x, "weight_only"), exact.bfloat16())
        columns = torch.empty(k, m, dtype=torch.bfloat16).T.copy_(x)
        assert torch.equal(case.run(columns, "weight_only"), exact.bfloat16())


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_row_whose_code_of_zero_is_the_first_or_the_last(bits: int, symmetric: bool) -> None:
    for sign, group in product((-1, 1), (16, 32, 96)):
        case = LinearCase(1, 288, 40, bits, group, symmetric)
        case.x = sign * torch.rand(1, 288)
        zero = quantize_rows(case.x, None, asymmetric=True)[2]
        assert int(zero) == (127 if sign < 0 else -128)
        assert_close(
            case.run(case.x, "dynamic-asym", bias=case.bias), case.oracle("dynamic-asym"), case.plain("dynamic-asym")
        )


@pytest.fixture
def restored_precision() -> object:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("instruction_set", "restored_precision")
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, None), (8, 32)])
def test_float32_layers_heed_the_precision_that_torch_is_set_to(bits: int, group: int | None, symmetric: bool) -> None:
    for m in (1, 3, 8, 27):
        case = LinearCase(m, 288, 40, bits, group, symmetric)
        case.x[:1, :1] = 1  # without the outlier
        oracle, found, quantized = case.oracle("weight_only"), {}, case.run(case.x, "dynamic")
        for precision, allowed in PRECISION_ERRORS.items():
            torch.set_float32_matmul_precision(precision)
            found[precision] = case.run(case.x, "weight_only", bias=case.bias)
            assert float((found[precision].double() - oracle).abs().max()) <= allowed * float(oracle.abs().max())
            assert torch.equal(case.run(case.x, "dynamic"), quantized)
        assert not torch.equal(found["highest"], found["high"])


@pytest.mark.usefixtures("restored_precision")
def test_modules_heed_the_precision_compiled_or_not() -> None:
    module, x = pack_(nn.Linear(96, 40), "int8-channel"), torch.randn(20, 96)
    values = nn.Linear(96, 40).requires_grad_(False)
    values.weight.copy_(dequantize_weight(*module.packed(), bits=8, in_features=96, dtype=torch.float32))
    values.bias.copy_(module.bias.detach())
    oracle, compiled = values.double()(x.double()), torch.compile(module, fullgraph=True)
    errors = []
    for precision, allowed in PRECISION_ERRORS.items():
        torch.set_float32_matmul_precision(precision)
        torch.compiler.reset()
        with torch.no_grad():
            found = module(x)
            assert torch.equal(found, compiled(x))
        assert torch.equal(found, module(x).detach())
        errors.append(float((found.double() - oracle).abs().max() / oracle.abs().max()))
        assert errors[-1] <= allowed
    assert errors[0] < errors[1] <= errors[2]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("value", [-128, 127])
def test_the_largest_sums_are_exact(value: int) -> None:
    for k, m in ((65_536, 1), (65_536, 13), (2048, 5)):
        case = LinearCase(m, k, 3, 8)
        case.codes.fill_(value)
        case.packed = (torch.full_like(case.packed[0], 0 if value < 0 else -1), *case.packed[1:])
        x = torch.full((m, k), -300.0) * float(case.input_scale)  # saturates at -128
        assert torch.equal(case.run(x, "static"), reference(case, x, "static", None))
        for sign in (-1, 1):  # rows without a value of the other sign have all 255 steps on one side
            x = sign * torch.rand(m, k)
            assert torch.equal(case.run(x, "dynamic-asym"), reference(case, x, "dynamic-asym", None))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_digits_do_not_overflow(bits: int, symmetric: bool) -> None:
    for m, group, low in product((1, 2, 13), (16, 32, 64, None), (True, False)):
        case = LinearCase(m, 128, 3, bits, group, symmetric)
        code = -(1 << (bits - 1)) if low else (1 << (bits - 1)) - 1
        values = torch.full((3, 128), code, dtype=torch.int8)
        case.packed = (pack(values, bits=bits), *case.packed[1:])
        zero = 0 if case.zero is None else case.zero.repeat_interleave(group or 128, 1)
        case.weight = (values - zero).double() * case.scale.repeat_interleave(group or 128, 1)
        for sign in (-1, 1):
            case.x = torch.full((m, 128), sign * 127 / 64)  # 127 steps, the most there are
            assert_close(
                case.run(case.x, "weight_only", bias=case.bias), case.oracle("weight_only"), case.plain("weight_only")
            )


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_activations_are_exact(dtype: torch.dtype) -> None:
    halves = torch.arange(-130, 130).repeat(2).float() / 2  # ties
    rows = [halves * 2.0**e for e in (-130, -100, 0, 3, 100) if dtype == torch.float32 or e in (0, 3)]
    x = torch.stack([*rows, torch.randn(520) * 3, torch.rand(520), -torch.rand(520), torch.zeros(520)]).to(dtype)
    for scale in (None, torch.tensor([0.5]), torch.tensor([3e-5])):
        for asymmetric in (False, True):
            found = quantize_rows(x, scale, asymmetric=asymmetric)
            expected = quantize_rows_reference(x, scale, asymmetric)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1].expand_as(found[1]))
            assert torch.equal(found[2], expected[2])


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_dequantizes_exactly(bits: int) -> None:
    case = LinearCase(1, 520, 67, bits, 8, False)
    for dtype in DTYPES:
        found = dequantize_weight(*case.packed, bits=bits, in_features=520, dtype=dtype)
        assert torch.equal(found, case.weight.float().to(dtype))


@pytest.mark.usefixtures("instruction_set")
def test_nan_scales_give_nan() -> None:
    case = LinearCase(3, 64, 5, 8)
    unfilled = scale_to_bits(torch.full((5, 1), torch.nan))
    for kind in KINDS:
        case.packed = (case.packed[0], unfilled, None)
        assert bool(case.run(case.x, kind).isnan().all())


def test_results_do_not_depend_on_threads() -> None:
    case = LinearCase(33, 576, 700, 4, 32)
    expected = [case.run(case.x[:m], kind) for m in (1, 33) for kind in KINDS]
    torch.set_num_threads(2)
    try:
        found = [case.run(case.x[:m], kind) for m in (1, 33) for kind in KINDS]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_threads_share_the_kernels() -> None:
    case, wrong = LinearCase(3, 576, 100, 4, 32), []
    expected = case.run(case.x, "dynamic")

    def work() -> None:
        for _ in range(50):
            if not torch.equal(case.run(case.x, "dynamic"), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(case: LinearCase, expected: Tensor) -> None:
    sys.exit(0 if torch.equal(case.run(case.x, "dynamic"), expected) else 1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_computes_the_same() -> None:
    case = LinearCase(3, 576, 100, 4, 32)
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(case, case.run(case.x, "dynamic")))
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int4-g16", "int8-channel", "int4-channel-asym"])
def test_a_layer_stays_close_to_the_restored_one(scheme: str, dtype: torch.dtype) -> None:
    module = pack_(nn.Linear(96, 40).to(dtype), scheme)
    x = torch.randn(5, 96).to(dtype)
    found, plain = module(x), copy.deepcopy(module)
    plain.restore_()
    oracle = x.double() @ plain.weight.double().t() + plain.bias.double()
    assert_close(found, oracle, plain(x))


def test_what_is_not_native_goes_to_the_reference() -> None:
    case = LinearCase(3, 60, 5, 4, 4)  # groups of 4 do not fill a lane of 8 codes
    assert_close(case.run(case.x, "dynamic", bias=case.bias), case.oracle("dynamic"), case.plain("dynamic"))
    assert case.run(case.x.double(), "weight_only").dtype == torch.float64


def test_the_table_says_what_runs() -> None:
    def linear() -> str:
        return next(c.implementation for c in choices() if (c.op, c.device) == ("int8_linear", "cpu"))

    assert linear() == "native"
    with native.selected("reference"):
        assert linear() == "reference"
    with pytest.raises(KernelError, match="HFQUANT_KERNELS=sse9: this machine and build have .*scalar"):
        native.select("sse9")


def test_the_environment_chooses() -> None:
    program = "from hfquant.kernels import native; print(native.name(), native.reason())"
    scalar = "scalar the best" if SETS == ["scalar"] else "scalar chosen in place of"
    for choice, expected in (("scalar", scalar), ("reference", "native switched off")):
        done = subprocess.run(
            [sys.executable, "-c", program], env={"HFQUANT_KERNELS": choice}, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(expected)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", [4, 8])
def test_values_that_training_rounds_are_those_of_the_reference(bits: int, isa: str) -> None:
    low, high = code_range(bits)
    shapes = ((3, 64), 16), ((5, 1100), 1100), ((2, 2, 1536), 512), ((1, 40), 8), ((4, 36), 12), ((7, 1), 1)
    for shape, group in shapes:
        groups = (*shape[:-1], shape[-1] // group)
        for symmetric in (True, False):
            sign = torch.tensor([-1.0, 1.0])[torch.randint(2, groups)]
            scale = round_scale((torch.rand(groups) + 0.5) * sign)
            zero = None if symmetric else torch.randint(low, high + 1, groups, dtype=torch.int8)
            x, grad = torch.randn(shape) * high * 0.6, torch.randn(shape)
            ends = torch.tensor([0.5, -0.5, 1.5, 1e30, -1e30, torch.inf, high + 0.5, low - 0.5])[: shape[-1]]
            x.view(-1, shape[-1])[0, :8] = ends * scale.view(-1, groups[-1])[0, 0]  # ties, and clipped ones
            x.view(-1)[-1] = torch.nan
            arguments = x, scale, zero, bits
            expected_x, expected_scale = fake_quantize_backward_reference(grad, *arguments)
            with native.selected(isa):
                found = torch.ops.hfquant.fake_quantize_cpu(*arguments)
                assert torch.equal(torch.ops.hfquant.fake_quantize(*arguments).nan_to_num(7.0), found.nan_to_num(7.0))
                found_x, found_scale = torch.ops.hfquant.fake_quantize_backward_cpu(grad, *arguments)
            assert torch.equal(found.nan_to_num(7.0), fake_quantize_reference(*arguments).nan_to_num(7.0))
            assert torch.equal(found_x, expected_x)
            wide = fake_quantize_backward_reference(grad.double(), x, scale.double(), zero, bits)[1]
            assert torch.equal(found_scale.isnan(), expected_scale.isnan())
            fine = ~expected_scale.isnan()
            assert_close(found_scale[fine], wide[fine], expected_scale[fine], factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_grid_adapters_are_those_of_the_reference(bits: int, isa: str) -> None:
    low, high = code_range(bits)
    for n, k, group in ((3, 64, 16), (5, 1100, 1100), (2, 1536, 512), (1, 40, 8), (4, 36, 12)):
        for symmetric, kept, dtype in product((True, False), (True, False), (torch.float32, torch.bfloat16)):
            codes = pack(torch.randint(low, high + 1, (n, k), dtype=torch.int8), bits=bits)
            residual = pack(torch.randint(-7, 8, (n, k), dtype=torch.int8), bits=4) if kept else None
            delta = torch.randn(n, k) * 2
            delta[0, :8] = torch.tensor([0.5, -0.5, 1.5, 1e9, -1e9, torch.inf, 7.5, -8.5])  # ties, and clipped ones
            delta[-1, -1] = torch.nan
            scale = (torch.rand(n, k // group) + 0.5) * torch.tensor([-1.0, 1.0])[torch.randint(2, (n, k // group))]
            zero = pack(torch.randint(low, high + 1, (n, k // group), dtype=torch.int8), bits=bits)
            zero = None if symmetric else zero
            arguments = codes, residual, delta, scale, zero, bits
            expected = grid_weight_reference(*arguments, dtype)
            grad = torch.randn(n, k)
            expected_delta, expected_scale = grid_weight_backward_reference(grad, *arguments)
            with native.selected(isa):
                found = torch.ops.hfquant.grid_weight_cpu(*arguments, dtype)
                assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
                assert torch.equal(found, torch.ops.hfquant.grid_weight(*arguments, dtype)) or bool(found.isnan().any())
                found_delta, found_scale = torch.ops.hfquant.grid_weight_backward(grad, *arguments)
            assert torch.equal(found_delta, expected_delta)
            wide = torch.ops.hfquant.grid_weight_backward(
                grad.double(), codes, residual, delta.double(), scale.double(), zero, bits
            )[1]
            assert bool(found_scale[-1, -1].isnan())
            fine = ~found_scale.isnan()
            assert_close(found_scale[fine], wide[fine], expected_scale[fine], factor=GRADIENT_FACTOR)


def test_precision_that_torch_does_not_tell_is_the_highest() -> None:
    code = (
        "import torch; torch.backends.fp32_precision = 'tf32'; from hfquant.kernels import native; "
        "assert native.float32_precision() == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
