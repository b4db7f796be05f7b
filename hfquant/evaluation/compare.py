"""A quantized model beside the original: divergence, agreement, perplexity in one pass, and sentence similarity."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfquant.errors import CalibrationError
from hfquant.evaluation.perplexity import windows
from hfquant.numerics.metrics import log_probability_kl


ROWS_AT_A_TIME = 128
"""Positions whose distributions are in memory at once."""


@dataclass(frozen=True)
class Comparison:
    """A model against its original, on the same tokens.

    Attributes:
        perplexity: Of the model.
        reference_perplexity: Of the original.
        mean_kl: Mean KL(original || model) per position, in nats.
        top1_agreement: Share of positions with the same most likely token, from 0 to 1.
        tokens: Positions compared.
        context: Tokens in a window.
    """

    perplexity: float
    reference_perplexity: float
    mean_kl: float
    top1_agreement: float
    tokens: int
    context: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


@torch.no_grad()
def compare_models(
    reference: nn.Module,
    models: Mapping[str, nn.Module],
    token_ids: Tensor,
    *,
    context: int = 512,
    progress: bool = True,
) -> dict[str, Comparison]:
    """Run causal language models over the same windows as the original, which runs once for all of them.

    Args:
        reference: The original.
        models: The models that are judged, by name.
        token_ids: The text ``[T]``, int64.
        context: Tokens in a window.
        progress: Show a progress bar.

    Returns:
        A comparison for each name.
    """
    parts = list(windows(token_ids, context))
    count = sum(part.numel() - 1 for part in parts)
    totals = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    reference_loss = 0.0
    for window in tqdm(parts, desc="Comparing", unit="window", disable=not progress):
        theirs = token_log_probabilities(reference, window)
        reference_loss += sequence_loss(theirs, window)
        for name, model in models.items():
            totals[name] += _measure(theirs, token_log_probabilities(model, window), window)
    return {
        name: Comparison(
            perplexity=math.exp(float(loss) / count),
            reference_perplexity=math.exp(reference_loss / count),
            mean_kl=float(divergence) / count,
            top1_agreement=float(same) / count,
            tokens=count,
            context=context,
        )
        for name, (loss, divergence, same) in totals.items()
    }


def token_log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    """Log probabilities ``[T - 1, V]``, float32, that ``model`` gives each token of ``window [1, T]`` but the first.

    They stay on the model's device.
    """
    return torch.log_softmax(model(window.to(_device(model))).logits[0, :-1].float(), dim=-1)


def sequence_loss(log_probabilities: Tensor, window: Tensor) -> float:
    """Sum of the negative log likelihoods in nats of ``window [1, T]`` after its first token."""
    following = window[0, 1:].unsqueeze(-1).to(log_probabilities.device)
    return -float(log_probabilities.gather(-1, following).double().sum())


def _measure(reference: Tensor, ours: Tensor, window: Tensor) -> Tensor:
    """Negative log likelihood, divergence and equal top tokens, summed over the window: ``[3]``, float64."""
    reference = reference.to(ours.device)
    parts = zip(reference.split(ROWS_AT_A_TIME), ours.split(ROWS_AT_A_TIME), strict=True)
    divergence = sum(float(log_probability_kl(theirs, mine).double().sum()) for theirs, mine in parts)
    same = int((reference.argmax(-1) == ours.argmax(-1)).sum())
    return torch.tensor([sequence_loss(ours, window), divergence, same], dtype=torch.float64)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def sentence_embeddings(model: nn.Module, tokenizer: Any, sentences: Sequence[str], *, batch_size: int = 32) -> Tensor:
    """Mean-pooled, normalised embeddings ``[len(sentences), K]``, float32, of an encoder.

    Args:
        model: Encoder whose output has ``last_hidden_state``.
        tokenizer: Its tokenizer.
        sentences: Texts.
        batch_size: Sentences in one forward pass; padding is masked out of the mean.
    """
    pooled = []
    for start in range(0, len(sentences), batch_size):
        part = list(sentences[start : start + batch_size])
        batch = tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(_device(model))
        mask = batch["attention_mask"].unsqueeze(-1).float()
        hidden = model(**batch).last_hidden_state.float()
        pooled.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.nn.functional.normalize(torch.cat(pooled), dim=-1)


def sentence_similarity(model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Cosine similarity ``[len(pairs)]`` of each pair of sentences."""
    first = sentence_embeddings(model, tokenizer, [pair[0] for pair in pairs])
    second = sentence_embeddings(model, tokenizer, [pair[1] for pair in pairs])
    return (first * second).sum(-1)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of ``a [T]`` and ``b [T]``, ties averaged.

    Raises:
        CalibrationError: If there are fewer than two values, or one side is constant.
    """
    ranks = torch.stack((_ranks(a), _ranks(b)))
    if a.numel() < 2 or bool((ranks == ranks[:, :1]).all(-1).any()):
        raise CalibrationError("a rank correlation needs at least two different values on both sides")
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values share the mean of theirs; float64."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    ranks: Tensor = ((last - counts) + (last - 1)).double().div(2)
    return ranks[inverse]
