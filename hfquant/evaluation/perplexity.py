"""Perplexity of causal language models over fixed windows of text."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from hfquant.errors import CalibrationError


@dataclass(frozen=True)
class Perplexity:
    """The result of one evaluation.

    Attributes:
        perplexity: ``exp`` of the mean negative log likelihood in nats.
        tokens: Predicted tokens; the first of each window is context only.
        context: Tokens in a window.
    """

    perplexity: float
    tokens: int
    context: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def windows(token_ids: Tensor, context: int) -> Iterator[Tensor]:
    """Split ``token_ids [T]`` (int64) into consecutive windows ``[1, context]``; a rest of one token is dropped.

    Raises:
        CalibrationError: If there are fewer than two tokens, or ``context`` is below 2.
    """
    if token_ids.numel() < 2 or context < 2:
        raise CalibrationError(f"{token_ids.numel()} tokens in windows of {context}: at least 2 of each are needed")
    for window in token_ids.split(context):
        if window.numel() > 1:
            yield window.unsqueeze(0)


@torch.no_grad()
def perplexity(model: nn.Module, token_ids: Tensor, *, context: int = 512, progress: bool = True) -> Perplexity:
    """Perplexity of ``model`` on a text, in windows that do not overlap.

    Args:
        model: Causal language model of Transformers.
        token_ids: The text ``[T]``, int64.
        context: Tokens in a window.
        progress: Show a progress bar.
    """
    device = next(model.parameters()).device
    parts = list(windows(token_ids, context))
    total = 0.0
    for window in tqdm(parts, desc="Perplexity", unit="window", disable=not progress):
        total += float(negative_log_likelihood(model(window.to(device)).logits, window.to(device)))
    count = sum(part.numel() - 1 for part in parts)
    return Perplexity(math.exp(total / count), count, context)


def negative_log_likelihood(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Sum over predicted tokens in nats, float64; ``logits [1, T, V]`` predict ``token_ids [1, T]`` from the second."""
    losses = cross_entropy(logits[0, :-1].float(), token_ids[0, 1:], reduction="none")
    return losses.double().sum()
