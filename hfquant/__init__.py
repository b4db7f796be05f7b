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
from hfquant.hf.info import QuantizationInfo, get_quantization_info
from hfquant.hf.plain_module import load_quantized, save_quantized
from hfquant.hf.plan import plan_quantization
from hfquant.hf.quantize import dequantize_model, quantize_model_ptq


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
    "get_quantization_info",
    "load_quantized",
    "plan_quantization",
    "quantize_model_ptq",
    "save_quantized",
]

__version__ = _version("hfquant")
