"""The embedding table on packed weights."""

from torch import Tensor, nn

from hfquant.kernels.quant_embedding import quant_embedding
from hfquant.nn.packed_module import FloatWeight, PackedModule


class QuantEmbedding(PackedModule, nn.Embedding):
    """Rows of a packed table ``[V, K]``, times ``embed_scale`` where the float class scales its output."""

    @staticmethod
    def weights_of(module: nn.Module) -> dict[str, FloatWeight]:
        """The table."""
        assert isinstance(module, nn.Embedding)
        return {"weight": FloatWeight(tuple(module.weight.shape))}

    @staticmethod
    def stands_for(module: nn.Module) -> bool:
        """Whether ``module`` is ``nn.Embedding``, or a Transformers class that multiplies it by ``embed_scale``."""
        scaled = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
        plain = type(module) is nn.Embedding and module.max_norm is None
        return isinstance(module, nn.Embedding) and (plain or scaled)

    def refill_embed_scale(self) -> None:
        """Set the scale buffer, which no checkpoint holds, from the number beside it.

        Transformers fills such buffers by the module's class, which is another one while the table is packed.
        """
        buffer, value = self._buffers.get("embed_scale"), getattr(self, "scalar_embed_scale", None)
        if buffer is not None and value is not None:
            buffer.fill_(value)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``[*ids.shape, K]`` in ``compute_dtype``."""
        out = quant_embedding(
            ids,
            *self.packed(),
            bits=self.scheme.weight.bits,
            embedding_dim=self.embedding_dim,
            dtype=self.compute_dtype,
        )
        scale = getattr(self, "embed_scale", None)
        if scale is None:
            return out
        return out * (scale.to(out.dtype) if isinstance(scale, Tensor) else scale)
