"""Quantization for Hugging Face Transformers: one scheme and one checkpoint from PTQ to serving."""

from importlib.metadata import version as _version

from hfquant.errors import (
    CalibrationError,
    ConfigError,
    FormatError,
    HfQuantError,
    KernelError,
    SchemeError,
)
from hfquant.hf.config import HfQuantConfig
from hfquant.hf.export import export_model
from hfquant.hf.importing import import_model
from hfquant.hf.info import QuantizationInfo, get_quantization_info
from hfquant.hf.plain_module import load_quantized, save_quantized
from hfquant.hf.quantize import dequantize_model, quantize_model_ptq
from hfquant.hf.verify import verify_checkpoint


__all__ = [
    "CalibrationError",
    "ConfigError",
    "FormatError",
    "HfQuantConfig",
    "HfQuantError",
    "KernelError",
    "QuantizationInfo",
    "SchemeError",
    "dequantize_model",
    "export_model",
    "get_quantization_info",
    "import_model",
    "load_quantized",
    "quantize_model_ptq",
    "save_quantized",
    "verify_checkpoint",
]

__version__ = _version("hfquant")
