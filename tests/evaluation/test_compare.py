import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from hfquant import quantize_model_ptq
from hfquant.errors import CalibrationError
from hfquant.evaluation.compare import compare_models, sentence_embeddings, sentence_similarity, spearman
from hfquant.evaluation.perplexity import perplexity
from tests.support.tiny_models import build


IDS = torch.arange(40) % 100 + 3


def test_a_model_equals_itself() -> None:
    model = build("llama")
    found = compare_models(model, {"same": copy.deepcopy(model)}, IDS, context=20, progress=False)["same"]
    assert found.mean_kl == pytest.approx(0, abs=1e-7)
    assert found.top1_agreement == 1
    assert found.perplexity == found.reference_perplexity
    assert (found.tokens, found.context) == (38, 20)


def test_against_the_formulas() -> None:
    model, quantized = build("llama"), quantize_model_ptq(build("llama"), quantization_bits=4, progress=False)
    found = compare_models(model, {"int4": quantized}, IDS, context=40, progress=False)["int4"]
    with torch.no_grad():
        p = torch.log_softmax(model(IDS.unsqueeze(0)).logits[0, :-1].double(), -1)
        q = torch.log_softmax(quantized(IDS.unsqueeze(0)).logits[0, :-1].double(), -1)
    assert found.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.perplexity == pytest.approx(perplexity(quantized, IDS, context=40, progress=False).perplexity)
    assert found.reference_perplexity == pytest.approx(perplexity(model, IDS, context=40, progress=False).perplexity)
    assert found.mean_kl > 0.001


def test_many_models_share_one_pass() -> None:
    model, calls = build("llama"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    others = {str(bits): quantize_model_ptq(build("llama"), quantization_bits=bits, progress=False) for bits in (4, 8)}
    found = compare_models(model, others, IDS, context=20, progress=False)
    assert len(calls) == 2
    assert found["8"].mean_kl < found["4"].mean_kl
    assert found["8"].reference_perplexity == found["4"].reference_perplexity


@pytest.mark.parametrize("seed", range(5))
def test_spearman_against_scipy_with_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 6, (50,), generator=generator).double()
    b = a + torch.randint(0, 9, (50,), generator=generator)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a.numpy(), b.numpy())[0], abs=1e-12)
    assert spearman(a, a * 3 + 1) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)


@pytest.mark.parametrize("values", [torch.zeros(0), torch.zeros(1), torch.ones(5)])
def test_spearman_of_nothing_is_refused(values: Tensor) -> None:
    with pytest.raises(CalibrationError, match="rank correlation"):
        spearman(values, torch.arange(values.numel()).float())


class Encoder(nn.Module):
    """The hidden state of a token is a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


class Digits:
    """A tokenizer of digits that pads with 9."""

    def __call__(self, texts: list[str], **_: Any) -> Any:
        longest = max(len(text) for text in texts)
        ids = torch.tensor([[int(c) for c in text.ljust(longest, "9")] for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        batch = {"input_ids": ids, "attention_mask": mask}
        return type("Batch", (dict,), {"to": lambda self, device: self})(batch)


def test_padding_does_not_count() -> None:
    encoder = Encoder()
    together = sentence_embeddings(encoder, Digits(), ["12", "345678"])
    alone = sentence_embeddings(encoder, Digits(), ["12"])
    assert torch.allclose(together[0], alone[0])
    mean = encoder.table.weight[[1, 2]].mean(0)
    assert torch.allclose(alone[0], mean / mean.norm(), atol=1e-6)
    similarity = sentence_similarity(encoder, Digits(), [("12", "12"), ("12", "345678")])
    assert float(similarity[0]) == pytest.approx(1, abs=1e-6)
    assert float(similarity[1]) == pytest.approx(float(together[0] @ together[1]), abs=1e-6)
    assert not math.isclose(float(similarity[1]), 1, abs_tol=1e-3)
