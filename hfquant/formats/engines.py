"""What serving engines can run: checked before a file is written, so that no one meets it at load time.

Sources: vLLM 0.32 and its CPU build, SGLang 0.5.23, Transformers 5.23 with compressed-tensors 0.20, llama.cpp; what was
run and what was only read is in docs/engines.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hfquant.errors import ConfigError, SchemeError
from hfquant.schemes import LayerScheme


FORMATS_OF_ENGINE = {
    "vllm": ("compressed-tensors", "gptq"),
    "sglang": ("compressed-tensors", "gptq"),
    "transformers": ("compressed-tensors", "gptq", "gguf", "dense"),
    "llama.cpp": ("gguf",),
}

MARLIN_GROUPS = (None, 32, 64, 128)
"""Group sizes of vLLM's and SGLang's 4-bit GPU kernels."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that servers merge into one: all must have one scheme."""

ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "w2", "c_proj")
"""Layers that tensor parallelism splits along their inputs; the others are split along their outputs."""


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a checkpoint; ``scheme`` is ``None`` where it stays in float."""

    scheme: LayerScheme | None
    out_features: int
    in_features: int


def check_engine(
    engine: str,
    file_format: str,
    layers: Mapping[str, LinearLayer],
    *,
    tensor_parallel: int = 1,
    attention_heads: int | None = None,
) -> None:
    """Refuse what ``engine`` cannot run.

    Args:
        engine: A key of ``FORMATS_OF_ENGINE``.
        file_format: What is about to be written.
        layers: Name in the checkpoint -> layer, for all linear layers but the output head.
        tensor_parallel: Devices that share each layer.
        attention_heads: Of the model, which the devices share too.

    Raises:
        ConfigError: For an unknown engine, or a format it does not read.
        SchemeError: Listing the layers it cannot run, with what would work.
    """
    formats = FORMATS_OF_ENGINE.get(engine)
    if formats is None:
        raise ConfigError(f"engine {engine!r}: expected one of {', '.join(FORMATS_OF_ENGINE)}")
    if file_format not in formats:
        raise ConfigError(f"{engine} does not read {file_format}; export to {' or '.join(formats)}")
    problems: list[str] = []
    if attention_heads is not None and attention_heads % tensor_parallel:
        problems.append(f"{attention_heads} attention heads do not split over {tensor_parallel} devices")
    for name, layer in layers.items():
        if layer.scheme is not None:
            found = _scheme_problem(engine, file_format, layer.scheme)
            if found is not None:
                problems.append(f"{name} ({layer.scheme}): {found}")
        problems += _parallel_problems(name, layer, tensor_parallel)
    if engine in ("vllm", "sglang"):
        problems += _fusion_problems(layers)
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise SchemeError(f"{engine} cannot run this model:\n  {shown}")


def _scheme_problem(engine: str, file_format: str, scheme: LayerScheme) -> str | None:
    weight, activation = scheme.weight, scheme.activation
    server = engine in ("vllm", "sglang")
    if file_format == "gptq" and server and not weight.symmetric:
        return "GPTQ is read with symmetric weights only; quantize with symmetric=True"
    if engine == "transformers" and file_format == "compressed-tensors" and not weight.symmetric:
        return "compressed-tensors 0.18 to 0.20 cannot load packed zero points; quantize with symmetric=True"
    if activation is not None and server:
        if not weight.symmetric:
            return "weights must be symmetric where activations are INT8; quantize with symmetric=True"
        if weight.bits == 8 and weight.group_size is not None:
            return "INT8 with INT8 activations takes one scale per channel; quantize with group_size=-1"
        if weight.bits == 4 and engine == "sglang":
            return "INT4 weights with INT8 activations are not served; quantize with quantization_type='weight_only'"
        if not activation.symmetric and engine == "sglang":
            return "activations have no zero points there; quantize with activation_symmetric=True"
    if activation is None and server and weight.group_size not in MARLIN_GROUPS:
        return f"group_size {weight.group_size} has no GPU kernel; quantize with group_size=32, 64, 128 or -1"
    return None


def _parallel_problems(name: str, layer: LinearLayer, devices: int) -> Iterator[str]:
    if devices == 1:
        return
    if name.rpartition(".")[2] in ROW_PARALLEL:
        step = devices * ((layer.scheme.weight.group_size if layer.scheme else None) or 1)
        if layer.in_features % step:
            yield f"{name}: {layer.in_features} inputs do not split into {devices} parts of whole groups (of {step})"
    elif layer.out_features % devices:
        yield f"{name}: {layer.out_features} outputs do not split over {devices} devices"


def _fusion_problems(layers: Mapping[str, LinearLayer]) -> Iterator[str]:
    parents = {name.rpartition(".")[0] for name in layers}
    for parent in sorted(parents):
        for members in FUSED:
            present = [f"{parent}.{member}" for member in members if f"{parent}.{member}" in layers]
            schemes = {str(layers[name].scheme or "float") for name in present}
            if len(schemes) > 1:
                yield f"{parent}: {', '.join(members)} are fused and need one scheme: {', '.join(sorted(schemes))}"
