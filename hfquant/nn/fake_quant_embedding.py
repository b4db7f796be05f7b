"""The embedding table of quantization-aware training."""

from torch import Tensor, nn

from hfquant.kernels.fake_quant_embedding import fake_quant_embedding
from hfquant.kernels.fake_quant_linear import GridWeight
from hfquant.nn.fake_quant_module import FakeQuantModule


class FakeQuantEmbedding(FakeQuantModule, nn.Embedding):
    """``nn.Embedding`` that looks up what ``QuantEmbedding`` will, in the float table it trains."""

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``[*ids.shape, K]`` in ``compute_dtype``."""
        if self.bypassed:
            out = nn.functional.embedding(ids, self.weight).to(self.compute_dtype)
        else:
            log_scale = self.beside("weight", "log_scale")
            assert log_scale is not None
            grid = GridWeight(self.weight, log_scale, self.scale(), self.zero_point())
            out = fake_quant_embedding(
                ids,
                grid,
                bits=self.scheme.weight.bits,
                dtype=self.compute_dtype,
                padding_idx=self.padding_idx,
                blend=self.blend,
            )
        scale = getattr(self, "embed_scale", None)
        if scale is None:
            return out
        return out * (scale.to(out.dtype) if isinstance(scale, Tensor) else scale)
