"""Quantize, save and load a plain nn.Module that is no Transformers model.

python examples/04_plain_module.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

from hfquant import dequantize_model, load_quantized, quantize_model_ptq, save_quantized


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 10))


def main(smoke: bool = False) -> None:
    torch.manual_seed(0)
    model, x = make_model().eval(), torch.randn(4, 128)
    quantize_model_ptq(model, quantization_bits=4, group_size=32)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_quantized(model, Path(folder) / "int4")
        reloaded = load_quantized(make_model(), Path(folder) / "int4").eval()
        assert torch.equal(model(x), reloaded(x))
        floats = dequantize_model(reloaded)
        # In another order of additions, on native kernels; HFQUANT_KERNELS=reference makes it equal to the last bit.
        torch.testing.assert_close(model(x), floats(x))
    print("saved, loaded: equal outputs; dequantized: the same to float32 rounding")


if __name__ == "__main__":
    main()
