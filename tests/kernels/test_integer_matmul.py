import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from hfquant.kernels import integer_matmul as matmul


SHAPES = [
    (1, 1, 1),
    (1, 1024, 1),
    (3, 1025, 5),
    (2, 3000, 1),
    (17, 64, 33),
    (64, 7, 1),
    (1, 7, 64),
    (2, 65_537, 2),
    (2, 200_000, 3),
    (0, 8, 3),
    (3, 8, 0),
    (3, 0, 2),
]

has_fast_int_mm = matmul._has_fast_int_mm


@pytest.fixture(params=["int_mm", "float"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "float":
        monkeypatch.setattr(matmul, "_has_fast_int_mm", lambda a: False)
    elif not has_fast_int_mm(torch.empty(2, 2)):
        pytest.skip("torch._int_mm is not used on this machine")


def exact(a: Tensor, b: Tensor) -> Tensor:
    return (a.long() @ b.long().t()).float()


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_products_are_exact(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = random_codes(m, k), random_codes(n, k, seed=1)
    found = matmul.integer_matmul(a, b)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact(a, b))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127)])
@pytest.mark.parametrize("k", [2, 1023, 1024, 1025, 65_536, 65_537, 140_000])
def test_the_largest_sums_are_exact(k: int, left: int, right: int) -> None:
    # Adding pairs of products in int16, as x86 without VNNI does, saturates here.
    a, b = torch.full((5, k), left, dtype=torch.int8), torch.full((6, k), right, dtype=torch.int8)
    a[1:3] = random_codes(2, k).sign() * 127
    assert torch.equal(matmul.integer_matmul(a, b), exact(a, b))


@pytest.mark.usefixtures("implementation")
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 80), st.integers(1, 40), st.integers(0, 2**16))
def test_odd_sizes_are_exact(m: int, k: int, n: int, seed: int) -> None:
    a, b = random_codes(m, k, seed=seed), random_codes(n, k, seed=seed + 1)
    assert torch.equal(matmul.integer_matmul(a, b), exact(a, b))


@pytest.mark.usefixtures("implementation")
def test_views_are_multiplied() -> None:
    a, b = random_codes(40, 12).t(), random_codes(10, 80)[::2, ::2]
    assert torch.equal(matmul.integer_matmul(a, b), exact(a, b))


@pytest.mark.parametrize(
    ("capability", "vnni", "fast"), [("AVX512", True, True), ("AVX512", False, False), ("AVX2", True, False)]
)
def test_int_mm_is_trusted_only_where_it_is_exact(
    capability: str, vnni: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    assert has_fast_int_mm(torch.empty(2, 2)) is fast
    assert has_fast_int_mm(torch.empty(2, 1)) is False
    assert has_fast_int_mm(torch.empty(2, 2, device="meta")) is False
