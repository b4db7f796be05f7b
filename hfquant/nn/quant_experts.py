"""Fused experts of a mixture (Mixtral, Qwen3-MoE, ...) on packed weights."""

from typing import Any

import torch
from torch import Tensor, nn

from hfquant.kernels.expert_linear import expert_linear
from hfquant.nn.packed_module import FloatWeight, PackedModule, autocast_input
from hfquant.nn.quant_linear import LINEAR_OPS


DENSE = ("Llama4TextExperts",)
"""Classes that get all tokens once for each expert, rows of 0 for the experts that a token did not choose."""


class QuantExperts(PackedModule):
    """All experts of one layer, with weights ``[E, N, K]``; routes tokens as Transformers' own experts do.

    Stands for the classes that Transformers marks with ``use_experts_implementation``: ``gate_up_proj`` (or ``up_proj``
    where there is no gate) and ``down_proj``, with optional biases, concatenated or interleaved gates, transposed
    weights, and a norm after each expert. And for those of Llama 4, which compute every expert for every token; here
    only those that were chosen are computed, the others give 0.
    """

    @staticmethod
    def stands_for(module: nn.Module) -> bool:
        """Whether ``module`` keeps its experts in the way this class computes them."""
        dense = type(module).__name__ in DENSE
        gated = getattr(module, "has_gate", dense)
        needed = (
            ()
            if dense
            else ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate" if gated else "act_fn")
        )
        weights = ("gate_up_proj" if gated else "up_proj", "down_proj")
        return all(hasattr(module, name) for name in needed) and all(
            getattr(module._parameters.get(name), "ndim", 0) == 3 for name in weights
        )

    @staticmethod
    def weights_of(module: nn.Module) -> dict[str, FloatWeight]:
        """The 3-D parameters, as ``[E, N, K]``."""
        transposed = bool(getattr(module, "is_transposed", type(module).__name__ in DENSE))
        weights = {}
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 3:
                *experts, rows, columns = parameter.shape
                shape = (*experts, columns, rows) if transposed else (*experts, rows, columns)
                weights[name] = FloatWeight(shape, transposed)
        return weights

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Weighted sum of the chosen experts.

        Args:
            hidden_states: Tokens ``[M, K]``.
            top_k_index: Chosen experts of each token ``[M, top_k]``, int64; ``num_experts`` means none. Without it the
                first ``M / num_experts`` rows are for the first expert, and so on, each times its weight already.
            top_k_weights: Their weights ``[M, top_k]``.

        Returns:
            ``[M, K]`` in the dtype of ``hidden_states``.
        """
        if top_k_index is None or top_k_weights is None:
            top_k_index, top_k_weights = self._rows_in_use(hidden_states), torch.ones_like(hidden_states[:, :1])
        if self.input_observer is None:
            return self._sorted_by_expert(hidden_states, top_k_index, top_k_weights)
        out = torch.zeros_like(hidden_states)
        experts: int = self.num_experts  # type: ignore[assignment]
        chosen = torch.nn.functional.one_hot(top_k_index, experts + 1).permute(2, 1, 0)[:experts]
        for expert in chosen.sum((-1, -2)).nonzero().flatten().tolist():
            slot, token = torch.where(chosen[expert])
            state = self._expert(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, state.to(out.dtype))
        return out

    def _rows_in_use(self, hidden_states: Tensor) -> Tensor:
        """The expert of each row ``[M, 1]``; none for a row of 0, which gives 0 as there are no biases."""
        experts: int = self.num_experts  # type: ignore[assignment]
        expert = torch.arange(experts, device=hidden_states.device).repeat_interleave(hidden_states.shape[0] // experts)
        return expert.where((hidden_states != 0).any(-1), experts).unsqueeze(-1)

    def _sorted_by_expert(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # One call for all experts, and nothing that waits for a GPU: this can be compiled and captured in a graph.
        experts: int = self.num_experts  # type: ignore[assignment]
        chosen, order = top_k_index.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(experts, device=chosen.device), right=True).int()
        token = order // top_k_index.shape[-1]
        state = self._expert(ends, hidden_states[token]) * top_k_weights.flatten()[order, None]
        return torch.zeros_like(hidden_states).index_add_(0, token, state.to(hidden_states.dtype))

    def _expert(self, expert: int | Tensor, x: Tensor) -> Tensor:
        own: Any = self
        if "gate_up_proj" in self.float_weights:
            gate: Any = getattr(self.float_class, "_apply_gate", _apply_gate)
            x = gate(self, self._linear("gate_up_proj", expert, x))
        else:
            x = own.act_fn(self._linear("up_proj", expert, x))
        x = self._linear("down_proj", expert, x)
        return own.post_expert_norm(x) if getattr(own, "has_post_expert_norm", False) else x

    def _linear(self, name: str, expert: int | Tensor, x: Tensor) -> Tensor:
        packed, bias, x = self.packed(name), self._parameters.get(f"{name}_bias"), autocast_input(x)
        if isinstance(expert, Tensor):  # the ends of the rows of every expert
            arguments = self.activation_arguments(x, name)
            return expert_linear(x, expert, *packed, bits=self.scheme.weight.bits, bias=bias, **arguments)
        return LINEAR_OPS[self.scheme.weight.bits](
            x,
            *(None if tensor is None else tensor[expert] for tensor in packed),
            bias=None if bias is None else bias[expert],
            **self.activation_arguments(x, name),
        )


def _apply_gate(experts: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * experts.act_fn(gate)  # type: ignore[no-any-return]


def one_after_the_other(experts: Any, name: str, ends: Tensor, x: Tensor) -> Tensor:
    """``experts._linear`` of every expert on its own rows, for modules that train.

    Args:
        experts: The module.
        name: Of the float parameter.
        ends: The number of rows up to and with each expert; rows behind the last have none.
        x: Activations ``[M, K]``, rows sorted by expert.

    Returns:
        ``[M, N]``.
    """
    bounds = [0, *ends.tolist()]
    spans = [(e, slice(*span)) for e, span in enumerate(zip(bounds, bounds[1:], strict=False)) if span[0] < span[1]]
    parts = [experts._linear(name, e, x[rows]) for e, rows in spans]
    rest = x.new_zeros(x.shape[0] - bounds[-1], experts.float_weights[name].shape[-2])
    return torch.cat([*parts, rest.to(parts[0].dtype if parts else x.dtype)])
