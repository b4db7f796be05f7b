import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hfquant.errors import CalibrationError
from hfquant.evaluation.perplexity import perplexity, windows
from tests.support.tiny_models import build


class Uniform(nn.Module):
    """Every token is as likely as any other, except that 3 follows everything with probability 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor) -> SimpleNamespace:
        logits = torch.full((*ids.shape, 8), math.log(0.5 / 7))
        logits[..., 3] = math.log(0.5)
        return SimpleNamespace(logits=logits)


def test_perplexity_by_hand() -> None:
    found = perplexity(Uniform(), torch.tensor([0, 3, 3, 1, 2]), context=5, progress=False)
    expected = math.exp(-(2 * math.log(0.5) + 2 * math.log(0.5 / 7)) / 4)
    assert found.perplexity == pytest.approx(expected, rel=1e-6)
    assert (found.tokens, found.context) == (4, 5)
    assert found.to_dict() == {"perplexity": found.perplexity, "tokens": 4, "context": 5}


def test_the_first_token_of_each_window_is_context_only() -> None:
    assert [w.shape[1] for w in windows(torch.arange(11), 5)] == [5, 5]  # the last token would stand alone
    assert perplexity(Uniform(), torch.arange(10) % 8, context=5, progress=False).tokens == 8


@pytest.mark.parametrize(("tokens", "context"), [(0, 5), (1, 5), (9, 1)])
def test_too_little_text_is_refused(tokens: int, context: int) -> None:
    with pytest.raises(CalibrationError, match="at least 2"):
        perplexity(Uniform(), torch.arange(tokens), context=context, progress=False)


def test_windows_are_independent_of_each_other() -> None:
    model, ids = build("llama"), torch.arange(32) % 100 + 3
    parts = [perplexity(model, part, context=16, progress=False).perplexity for part in ids.split(16)]
    whole = perplexity(model, ids, context=16, progress=False).perplexity
    assert math.log(whole) == pytest.approx(sum(math.log(part) for part in parts) / 2, rel=1e-6)
