"""The adapter ``"grid"``: a low-rank change inside the rounding, codes and scales move, merging changes no code.

    weight = scale * (clamp(round(code + residual / 16 + alpha / rank * B @ A / initial_scale)) - zero_point)

``B @ A`` is a change of the weight in its own units, so that ranks, alphas and learning rates are those of LoRA.

The residual says where a weight lies between two codes. Without one nothing would change before the adapter moves a
weight by half a step, so that where PTQ did not keep it, seeded dither stands for it: the codes are the same at first,
and of a change by ``c`` steps a share ``c`` of the codes follows.

References:
    Bondarenko et al. 2024 (LR-QAT), section 3, https://arxiv.org/abs/2406.06385.
"""

import zlib
from collections.abc import Iterable

import torch
from torch import nn
from tqdm.auto import tqdm

from hfquant.finetune.scales import train_scales_
from hfquant.nn.adapted_module import AdaptedModule
from hfquant.nn.fake_quant_module import Adapter
from hfquant.numerics.residual import dither


def add_grid_adapters_(
    model: nn.Module, names: Iterable[str], adapter: Adapter, *, seed: int, progress: bool = True
) -> str:
    """Give the named packed modules an adapter inside the rounding, and let their scales train, in place.

    Args:
        model: With the packed modules.
        names: Of those.
        adapter: Its rank, and how much it counts.
        seed: Of ``A`` and of the dither; each weight draws from a generator of its own.
        progress: Show a progress bar.

    Returns:
        Where the residuals are from: ``"ptq"``, ``"dither"`` or ``"mixed"``.
    """
    sources = set()
    for name in tqdm(list(names), desc="Adding adapters", unit="layer", disable=not progress):
        train_scales_(model, [name])
        module = model.get_submodule(name)
        assert isinstance(module, AdaptedModule)
        sources.add("ptq" if module.scheme.residual else "dither")
        for key, weight in module.float_weights.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}.{key}".encode()))
            residual = None if module.scheme.residual else dither(weight.shape, generator)
            module.add_lora_(key, adapter, residual, generator)
    return sources.pop() if len(sources) == 1 else "mixed"
