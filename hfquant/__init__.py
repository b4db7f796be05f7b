"""Quantization for Hugging Face Transformers: one scheme and one checkpoint from PTQ to serving."""

from importlib.metadata import version as _version

from hfquant.errors import (
    CalibrationError as CalibrationError,
    ConfigError as ConfigError,
    FormatError as FormatError,
    HfQuantError as HfQuantError,
    KernelError as KernelError,
    SchemeError as SchemeError,
)
from hfquant.hf.config import HfQuantConfig as HfQuantConfig
from hfquant.hf.info import QuantizationInfo as QuantizationInfo, get_quantization_info as get_quantization_info
from hfquant.hf.plain_module import load_quantized as load_quantized, save_quantized as save_quantized
from hfquant.hf.quantize import dequantize_model as dequantize_model, quantize_model_ptq as quantize_model_ptq


__version__ = _version("hfquant")
