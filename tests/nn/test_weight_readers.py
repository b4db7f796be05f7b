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
    assert weights_read_by(Reader) == {"multiplied", "cast", "stack"}
    assert weights_read_by(Child) == weights_read_by(Reader)
    found = read_by_owner(nn.Sequential(Child()))
    assert found == dict.fromkeys(("0.multiplied", "0.cast", "0.stack.0", "0.stack.1"), "Child")


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
