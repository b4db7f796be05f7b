"""``HfQuantQuantizer``: what Transformers calls while it loads, saves and dequantizes a model."""

import ctypes
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers import HfQuantizer, auto, register_quantizer
from transformers.utils import logging

from hfquant.errors import ConfigError, HfQuantError
from hfquant.finetune.adapted import FinetuneState
from hfquant.finetune.merge import check_rounded, merged_state_dict
from hfquant.formats.native import SAVE_ID_KEY, content_metadata
from hfquant.hf.bitsandbytes import BACKEND, bitsandbytes_quantizer
from hfquant.hf.checkpoint import check_checkpoint, read_modules
from hfquant.hf.config import QUANT_METHOD, HfQuantConfig
from hfquant.hf.fuse import fuse_model_
from hfquant.hf.peft import install
from hfquant.hf.roles import model_roles, tie_companions, untie_companions
from hfquant.nn.packed_module import PackedModule, companion_name
from hfquant.nn.quant_embedding import QuantEmbedding
from hfquant.nn.select import ASKED, Selection, has_expert_weights, select_modules, unmatched_patterns
from hfquant.nn.swap import keep_packed_from_ddp_, packed_modules, restore_modules_, swap_modules_
from hfquant.numerics.residual import rounding_residual
from hfquant.ptq.layer_result import LayerResult
from hfquant.ptq.quantize_matrix import CALIBRATED
from hfquant.ptq.store import quantize_and_keep


logger = logging.get_logger(__name__)

ALIGNMENT = 64
"""Bytes: the cache line, and torch's own alignment of the memory it allocates on a CPU."""


class QuantizeWhileLoading(ConversionOps):
    """Turns one float tensor of a checkpoint into packed ones, as soon as it is read."""

    def __init__(self, hf_quantizer: "HfQuantQuantizer") -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Quantize the only tensor of ``input_dict``; returns it and its companions by name."""
        ((name, value),) = input_dict.items()
        model = kwargs["model"]
        tensor = value[0] if isinstance(value, list) else value
        return self.hf_quantizer.quantize_parameter(model, kwargs.get("full_layer_name") or name, tensor)


class HfQuantQuantizer(HfQuantizer):
    """Quantizes on the fly while loading, or loads what was quantized before.

    Attributes:
        selection: What is quantized and what is kept, with reasons.
        error: The first error while quantizing on the fly. Transformers reports errors of single tensors as a table
            and a RuntimeError without cause; this one is raised in its place.
        results: How each weight was quantized, where this process calibrated.
        finetuning: What a model in fine-tuning carries, else ``None``.
    """

    requires_calibration = False
    quantization_config: HfQuantConfig
    pre_quantized: bool

    def __new__(cls, quantization_config: HfQuantConfig | None = None, **kwargs: Any) -> Any:
        """Another backend brings its own quantizer; copies are made without a config."""
        config = quantization_config
        if config is not None and config.backend == BACKEND and not config.modules:
            return bitsandbytes_quantizer(config, **kwargs)
        return super().__new__(cls)

    def __init__(self, quantization_config: HfQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.selection = Selection()
        self.error: HfQuantError | None = None
        self.filled: set[str] = set()
        self.prepared_for_qat = False
        self.results: list[LayerResult] = []
        self.finetuning: FinetuneState | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to quantize on the fly to disk: Transformers would read the float file again.

        Raises:
            ConfigError: If ``device_map`` sends layers to disk.
        """
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "device_map sends layers to disk; quantizing while loading cannot. Quantize and save the model first, "
                "then load the saved one with this device_map"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        if self.pre_quantized:
            config.check_requested()
            schemes = read_modules(config, model)
            ties = {name: owner for name, owner in module_ties(model).items() if name in schemes and owner in schemes}
            self.selection = Selection(schemes, {}, ties)
        else:
            self.select(model)
            self._refuse_static()
        swap_modules_(model, self.selection.schemes, self.selection.ties)
        tie_companions(model, self.selection.ties)
        if not self.pre_quantized:
            expect_float_weights_(model)
        elif checkpoint_files is not None:
            check_checkpoint(model, checkpoint_files, config)
        return model

    def select(self, model: PreTrainedModel) -> None:
        """Decide what to quantize and write it into the config.

        Raises:
            ConfigError: If the settings do not fit the model.
        """
        config = self.quantization_config
        settings = config.resolve()
        patterns = (*settings.skip_modules, *(override.pattern for override in settings.overrides))
        for text in unmatched_patterns(patterns, model):
            logger.warning(
                f"hfquant: {text!r} in skip_modules or overrides matches no module of {type(model).__name__}"
            )
        self.selection = select_modules(model, settings, model_roles(model), strict=bool(config.strict))
        experts = {
            reason
            for name, reason in self.selection.kept.items()
            if has_expert_weights(model.get_submodule(name)) and not reason.startswith(ASKED)
        }
        for reason in sorted(experts):
            logger.warning(f"hfquant: experts of {type(model).__name__} stay in float: {reason}")

    def _refuse_static(self) -> None:
        if self.quantization_config.algorithm in CALIBRATED:
            raise ConfigError(
                f"algorithm={self.quantization_config.algorithm!r} needs calibration data, which from_pretrained "
                "cannot take; load the float model and call quantize_model_ptq(model, ..., calibration_data=...)"
            )
        if self.quantization_config.budget() is not None:
            raise ConfigError(
                "target_bits, target_size and target_error compare all layers, and from_pretrained quantizes weight by "
                "weight; load the float model and call quantize_model_ptq(model, ...)"
            )
        for name, scheme in self.selection.schemes.items():
            if scheme.quantization_type == "static":
                raise ConfigError(
                    f"quantization_type='static' ({name}) needs calibration data, which from_pretrained cannot take; "
                    "load the float model and call quantize_model_ptq(model, ..., calibration_data=...)"
                )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether ``param_name`` is a float tensor that has to be packed now."""
        if self.pre_quantized:
            return False  # or Transformers would accept tensors of any shape
        module_name, _, key = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        return isinstance(module, PackedModule) and key in module.float_weights

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that packs one tensor."""
        return QuantizeWhileLoading(self)

    def quantize_parameter(self, model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Packed tensors, by full name, for the float tensor ``name``."""
        module_name, _, key = name.rpartition(".")
        module = model.get_submodule(module_name)
        assert isinstance(module, PackedModule)
        self.filled.add(module_name)
        try:
            rows, config = module.float_weights[key].to_rows(tensor), self.quantization_config
            algorithm, store = config.resolved_algorithm, config.resume
            result = quantize_and_keep(rows, module.scheme.weight, algorithm=algorithm, name=name, store=store)
        except HfQuantError as error:
            # Raised here it would end as a RuntimeError without its message; it is raised after loading instead.
            self.error = self.error or error
            return {f"{module_name}.{n}": torch.zeros_like(p, device="cpu") for n, p in module.packed_parameters(key)}
        module.sqnr_db[key] = result.sqnr_db
        named = list(zip(("", "scale", "zero_point"), result.packed, strict=True))
        if module.scheme.residual:
            rows = module.float_weights[key].to_rows(tensor)
            named.append(("residual", rounding_residual(rows, result.packed, bits=module.scheme.weight.bits)))
        prefix = f"{module_name}." if module_name else ""
        return {prefix + (companion_name(key, s) if s else key): t for s, t in named if t is not None}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.error is not None:
            raise self.error
        if not self.pre_quantized:
            self._restore_unfilled(model)
        for module in model.modules():
            if isinstance(module, QuantEmbedding):
                module.refill_embed_scale()
        align_float_parameters_(model)
        return_freed_memory()
        # The names in our files are those of the state dict; there is nothing to convert back on saving.
        model._weight_conversions = []
        if self.pre_quantized and self.quantization_config.dequantize:
            return dequantize_in_place(model, model.dtype)
        self.quantization_config.freeze({n: str(s) for n, s in self.selection.schemes.items()}, version("hfquant"))
        self.pre_quantized = True
        keep_packed_from_ddp_(model)
        fuse_model_(model)
        return model

    def _restore_unfilled(self, model: PreTrainedModel) -> None:
        """Weights the checkpoint does not have (a new classifier, say) stay float and are initialised as ever."""
        for name, module in list(packed_modules(model)):
            if name in self.filled or name in self.selection.ties:
                continue
            for key in module.float_weights:
                words = torch.zeros_like(module.packed(key).weight, dtype=torch.int32)
                module._parameters[key] = torch.nn.Parameter(words, requires_grad=False)
            module.restore_()
            model._init_weights(module)
            del self.selection.schemes[name]
            self.selection.kept[name] = "not in the checkpoint: newly initialised"

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Called by ``save_pretrained`` first: hashes the content, and puts the save id into config and shards."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        is_checkpoint = self.finetuning is not None and self.finetuning.writes_checkpoints
        state_dict = merged_state_dict(model, checkpoint=is_checkpoint)
        if self.finetuning is not None:
            self.quantization_config.finetuning = self.finetuning.summary(model)
        for key in model._keys_to_ignore_on_save or ():
            state_dict.pop(key, None)
        state_dict = remove_tied_weights_from_state_dict(state_dict, model)
        metadata = content_metadata(state_dict)
        self.quantization_config.save_id = metadata[SAVE_ID_KEY]
        return state_dict, metadata

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        check_rounded(model)  # below: save_pretrained leaves the dtype's name in the config, which is what is asked for
        return dequantize_in_place(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def is_serializable(self) -> bool:
        """Quantized models are saved like any other."""
        return True

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes of one packed word, for device maps: while quantizing, float placeholders stand for the words."""
        return None if self.pre_quantized else 4.0

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top; gradients flow through packed layers."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the model it belongs to is prepared for it; packed integers themselves do not train."""
        return self.prepared_for_qat or self.finetuning is not None

    @property
    def is_compileable(self) -> bool:
        """Packed layers are ops that torch.compile keeps whole."""
        return True


def expect_float_weights_(model: PreTrainedModel) -> None:
    """Let the packed weights (on the meta device) have the float dtype of what is about to be read.

    Transformers 5.17 casts a tensor to the dtype of the parameter it is for, also when it is to be quantized first:
    weights cast to int32 would all be zero.
    """
    for _, module in packed_modules(model):
        for key in module.float_weights:
            words = module.packed(key).weight
            placeholder = torch.empty(words.shape, dtype=module.compute_dtype, device=words.device)
            module._parameters[key] = torch.nn.Parameter(placeholder, requires_grad=False)


def align_float_parameters_(model: PreTrainedModel) -> None:
    """Move float parameters that are mapped from a file at an odd address to aligned memory.

    Torch's float kernels pick another path, and round differently in the last bit, for unaligned weights; a reloaded
    model would then differ from the one that was saved. Packed weights are unpacked into aligned memory anyway.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.is_meta and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def return_freed_memory() -> None:
    """Give memory that is free again back to the system.

    glibc keeps what the temporaries of hundreds of layers leave behind; for a 1B model that is as much as the model.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in other C libraries
        if trim is not None:
            trim(0)


def module_ties(model: PreTrainedModel) -> dict[str, str]:
    """Module name -> module whose weight it is tied to, as Transformers declares it."""
    ties = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        if target.endswith(".weight") and source.endswith(".weight"):
            ties[target.removesuffix(".weight")] = source.removesuffix(".weight")
    return ties


def dequantize_in_place(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Float modules again, everything in ``dtype``; how the checkpoint was loaded is forgotten."""
    restore_modules_(model, dtype)
    untie_companions(model)
    if dtype is not None and any(p.dtype != dtype for p in model.parameters() if p.is_floating_point()):
        model.is_quantized = False
        model.to(dtype)
    if "_weight_conversions" in model.__dict__:
        del model._weight_conversions
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)
    return model


def float_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """Dtype of the first float parameter of ``model``, or what its packed modules compute in if it has none."""
    floats = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(floats, None) or next((module.compute_dtype for _, module in packed_modules(model)), None)


# OLMo's norms have no weights, so no float parameter is left, and Transformers' own property raises StopIteration.
PreTrainedModel.dtype = property(float_dtype)

if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(HfQuantQuantizer)
if HfQuantConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
    # Without this a config passed for a quantized checkpoint (dequantize=True) is ignored.
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (HfQuantConfig,)
install()
