"""Quantization for Hugging Face Transformers: one scheme and one checkpoint from PTQ to serving."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING

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
from hfquant.hf.finetune import merge_adapters, prepare_model_for_finetuning
from hfquant.hf.importing import import_model
from hfquant.hf.info import QuantizationInfo, get_quantization_info
from hfquant.hf.plain_module import load_quantized, save_quantized
from hfquant.hf.plan import plan_quantization
from hfquant.hf.qat import convert_model_qat, prepare_model_qat
from hfquant.hf.quantize import dequantize_model, quantize_model_ptq
from hfquant.hf.verify import verify_checkpoint


if _TYPE_CHECKING:
    from hfquant.training.callback import QatCallback
    from hfquant.training.config import TrainingConfig
    from hfquant.training.finetune_callback import FinetuneCallback
    from hfquant.training.trainer import QuantTrainer

__all__ = [
    "CalibrationError",
    "ConfigError",
    "FinetuneCallback",
    "FormatError",
    "HfQuantConfig",
    "HfQuantError",
    "KernelError",
    "QatCallback",
    "QuantTrainer",
    "QuantizationInfo",
    "SchemeError",
    "TrainingConfig",
    "convert_model_qat",
    "dequantize_model",
    "export_model",
    "get_quantization_info",
    "import_model",
    "load_quantized",
    "merge_adapters",
    "plan_quantization",
    "prepare_model_for_finetuning",
    "prepare_model_qat",
    "quantize_model_ptq",
    "save_quantized",
    "verify_checkpoint",
]

__version__ = _version("hfquant")

# Transformers' Trainer takes over a second to import, and programs that only run models do not need it.
_LAZY = {
    "FinetuneCallback": "finetune_callback",
    "QatCallback": "callback",
    "QuantTrainer": "trainer",
    "TrainingConfig": "config",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"hfquant.training.{_LAZY[name]}"), name)
