"""Triton's linear kernels in the interpreter; ``test_triton_interpreted.py`` runs this in a process of its own."""

import tests.support.triton_interpreter  # noqa: F401  isort: skip

from itertools import product

import pytest
import torch

from hfquant.kernels.expert_linear.reference import expert_linear_reference
from hfquant.kernels.expert_linear.triton import expert_linear_triton
from hfquant.kernels.int4_linear.triton import int4_linear_triton
from hfquant.kernels.int8_linear import triton as int8
from hfquant.kernels.packed_matmul import triton as packed_matmul
from tests.support.linear_case import INTEGER_KINDS, KINDS, LinearCase
from tests.support.tolerance import assert_close


# NumPy warns of infinity times zero, which a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

LINEARS = {4: int4_linear_triton, 8: int8.int8_linear_triton}
HALF = [torch.bfloat16, torch.float16]
SHAPES = [(1, 256, 40), (5, 512, 70), (17, 256, 16), (9, 640, 1), (40, 256, 33)]
ODD_SHAPES = [(1, 100, 5), (9, 7, 3), (3, 1032, 6), (17, 2, 2)]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[132, 1], ids=["many-processors", "one-processor"])
def _processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow and wide tiles."""
    for module in (packed_matmul, int8):
        monkeypatch.setattr(module, "processors", lambda device: request.param)


def check(case: LinearCase, kind: str, *, exact: bool = False, bias: bool = True) -> None:
    given = case.arguments(kind)
    shift = case.bias if bias else None
    arguments = given.get("input_scale"), shift, given.get("dynamic", False), given.get("asymmetric", False)
    result = LINEARS[case.bits](case.x, *case.packed, *arguments)
    assert result.dtype == case.x.dtype
    if exact:
        assert torch.equal(result, case.run(case.x, kind, bias=shift))
    case.bias = case.bias if bias else torch.zeros_like(case.bias)
    assert_close(result, case.oracle(kind), case.plain(kind))


@pytest.mark.usefixtures("_processors")
@pytest.mark.parametrize("group", [32, 64, 128, None], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_only_groups(bits: int, shape: tuple[int, int, int], group: int | None) -> None:
    m, k, n = shape
    for number, (dtype, symmetric) in enumerate(product(HALF, (True, False))):
        if (number + m) % 2 == 0 or group == 32:  # each pair at some shape of each group
            check(LinearCase(m, k, n, bits, group, symmetric, dtype), "weight_only", bias=symmetric)


@pytest.mark.parametrize("group", [16, 256], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_other_groups(bits: int, group: int) -> None:
    check(LinearCase(3, 512, 20, bits, group, False, torch.bfloat16), "weight_only")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_fill_no_tile(bits: int, shape: tuple[int, int, int], kind: str) -> None:
    for dtype, symmetric in zip(HALF, (True, False), strict=True):
        check(
            LinearCase(*shape, bits, None, symmetric, dtype),
            kind,
            exact=bits == 8 and symmetric and kind != "weight_only",
        )


@pytest.mark.usefixtures("_processors")
@pytest.mark.parametrize("kind", INTEGER_KINDS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 512, 70), (16, 512, 17), (20, 100, 33), (66, 128, 40)], ids=str)
def test_integer_products_equal_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, kind: str) -> None:
    check(LinearCase(*shape, 8, None, True, dtype), kind, exact=True)


@pytest.mark.parametrize("k", [64, 2100])
def test_sums_of_weights_by_a_launch_of_their_own(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "SUMMED_ROWS", 0)
    monkeypatch.setattr(int8, "processors", lambda device: 1)
    calls, sums = [], int8.weight_sums
    monkeypatch.setattr(int8, "weight_sums", lambda *given: calls.append(given) or sums(*given))
    check(LinearCase(20, k, 33, 8, None, True, torch.bfloat16), "dynamic-asym", exact=True)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", INTEGER_KINDS)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 64)], ids=str)
def test_integer_activations_on_grouped_weights(bits: int, group: int, kind: str) -> None:
    for m, dtype in ((3, torch.bfloat16), (66, torch.float16)):
        check(LinearCase(m, 128, 20, bits, group, m == 3, dtype), kind)


@pytest.mark.parametrize(
    ("dtype", "group", "m"), [(torch.float32, 32, 3), (torch.bfloat16, 48, 3), (torch.bfloat16, 32, 65)]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_products(bits: int, dtype: torch.dtype, group: int, m: int) -> None:
    check(LinearCase(m, 96, 12, bits, group, False, dtype), "weight_only")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_strided_and_batched_activations(bits: int, kind: str) -> None:
    case = LinearCase(6, 128, 9, bits, dtype=torch.bfloat16)
    given = case.arguments(kind)
    arguments = given.get("input_scale"), None, given.get("dynamic", False), given.get("asymmetric", False)
    expected = LINEARS[bits](case.x, *case.packed, *arguments)
    strided = torch.empty(6, 256, dtype=torch.bfloat16)[:, ::2].copy_(case.x)
    assert torch.equal(LINEARS[bits](strided, *case.packed, *arguments), expected)
    assert torch.equal(LINEARS[bits](case.x.view(2, 3, 128), *case.packed, *arguments), expected.view(2, 3, 9))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bad_row_stays_bad_and_alone(bits: int, kind: str, bad: float) -> None:
    case = LinearCase(3, 128, 5, bits, dtype=torch.bfloat16)
    case.x[1, 3] = bad
    given = case.arguments(kind)
    kind_arguments = given.get("dynamic", False), given.get("asymmetric", False)
    out = LINEARS[bits](case.x, *case.packed, given.get("input_scale"), None, *kind_arguments)
    assert bool(torch.isfinite(out[[0, 2]]).all())
    if not (kind == "static" and bad == float("inf")):  # a stored range saturates
        assert not bool(torch.isfinite(out[1]).any())


@pytest.mark.parametrize(("dtype", "symmetric"), [(torch.bfloat16, True), (torch.float16, False)], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 64), (8, None)], ids=str)
@pytest.mark.parametrize("ends", [[0, 3, 3, 25, 26], [0, 0, 0, 0, 0], [30, 30, 30, 30, 30]], ids=str)
def test_experts(ends: list[int], bits: int, group: int | None, symmetric: bool, dtype: torch.dtype) -> None:
    one = LinearCase(30, 128, 20, bits, group, symmetric, dtype)
    cases = [one, *(LinearCase(1, 128, 20, bits, group, symmetric, dtype) for _ in range(4))]
    packed = [None if one.packed[i] is None else torch.stack([c.packed[i] for c in cases]) for i in range(3)]
    bias, limits = torch.stack([c.bias for c in cases]), torch.tensor(ends, dtype=torch.int32)
    result = expert_linear_triton(one.x, limits, *packed, None, bias, False, False, bits)
    plain = expert_linear_reference(one.x, limits, *packed, None, bias, False, False, bits)
    oracle, start = torch.zeros(30, 20, dtype=torch.float64), 0
    for case, end in zip(cases, ends, strict=True):
        oracle[start:end] = one.x[start:end].double() @ case.weight.t() + case.bias.double()
        start = end
    assert_close(result, oracle, plain)
    assert bool((result[start:] == 0).all())
