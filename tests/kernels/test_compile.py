"""The ops inside modules that are traced: no graph break, any number of rows, the same results and gradients."""

import pytest
import torch
from torch import Tensor, nn

from tests.support.linear_case import LinearCase


class AllOps(nn.Module):
    """Every kind of linear, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LinearCase(1, 64, 48, 4, 16, False)
        self.second = LinearCase(1, 48, 33, 8)
        self.third = LinearCase(1, 33, 7, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first.run(x, "weight_only", bias=self.first.bias)
        x = self.second.run(x, "dynamic", bias=self.second.bias)
        return self.third.run(x, "static")


def assert_compiled_is_eager(backend: str) -> None:
    model = AllOps()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for shape in ((2, 64), (7, 64), (64, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))
    x, y = torch.randn(5, 64, requires_grad=True), torch.randn(5, 64, requires_grad=True)
    y.data.copy_(x.data)
    compiled(x).square().sum().backward()
    model(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_ops_are_traced_whole() -> None:
    torch._dynamo.reset()
    assert_compiled_is_eager("aot_eager")


@pytest.mark.slow
def test_ops_compile_with_inductor() -> None:
    torch._dynamo.reset()
    assert_compiled_is_eager("inductor")


def test_shapes_are_known_without_data() -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        out = AllOps()(torch.empty(2, 3, 64))
    assert out.shape == (2, 3, 7)
    assert out.dtype == torch.float32
