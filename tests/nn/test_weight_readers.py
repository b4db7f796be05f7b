import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from hfquant.nn.weight_readers import read_by_owner, weights_read_by


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.multiplied, self.cast = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.moved, self.set_up = nn.Linear(4, 4), nn.Linear(4, 4)
        self.stack = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def _init_weights(self) -> None:
        nn.init.zeros_(self.set_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.moved.weight.device)).to(self.cast.weight.dtype)
        for index in range(2):
            x = linear(x, self.stack[index].weight)
        return x @ self.multiplied.weight


class Child(Reader):
    """Inherits what it reads."""


def test_reads_are_found_and_what_is_only_called_is_not() -> None:
    assert weights_read_by(Reader) == {(True, ("multiplied",)), (True, ("cast",)), (True, ("stack",))}
    assert weights_read_by(Child) == weights_read_by(Reader)
    found = read_by_owner(nn.Sequential(Child()))
    assert found == dict.fromkeys(("0.multiplied", "0.cast", "0.stack.0", "0.stack.1"), "Child")


class Deep(nn.Module):
    """Reads further down, and through variables; its docstring's self.inner.called.weight does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = Child(), nn.Embedding(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"mlp": Child()}) for _ in range(2))
        self.blocks[1].mlp.cast = None

    def get_rows(self, table: nn.Embedding, blocks: nn.ModuleList) -> list[Tensor]:
        first = [block.mlp.called.weight for block in blocks]
        return [*first, table.weight, self.inner.set_up.weight, self.blocks[0].mlp.moved.weight]

    def get_dtype(self) -> torch.dtype:
        return self.inner.called.weight.dtype


def test_reads_further_down_and_through_variables_are_found() -> None:
    found = {name for name, owner in read_by_owner(Deep()).items() if owner == "Deep"}
    blocks = {f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("called", "moved")}
    assert found == {"table", "inner.set_up", *blocks}


def test_a_class_without_source_reads_nothing() -> None:
    namespace: dict[str, type[nn.Module]] = {}
    program = "class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.own.weight"
    exec(program, {"nn": nn}, namespace)
    assert weights_read_by(namespace["Made"]) == frozenset()


def test_models_of_transformers_that_read_weights() -> None:
    with torch.device("meta"):
        mamba = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=8))
        t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=8))
    assert "backbone.layers.0.mixer.dt_proj" in read_by_owner(mamba)
    assert set(read_by_owner(t5)) == {
        "encoder.block.0.layer.1.DenseReluDense.wo",
        "decoder.block.0.layer.2.DenseReluDense.wo",
    }
