"""Checkpoints load in new processes that never import hfquant, and compute the same to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hfquant import quantize_model_ptq
from tests.support.processes import BLOCKED, compare_in_new_process, run_python, save_with_expectation
from tests.support.tiny_models import TINY, build


SCHEMES: dict[str, dict[str, Any]] = {
    "int8-weight-only": {"quantization_bits": 8, "quantization_type": "weight_only"},
    "int8-dynamic": {"quantization_bits": 8},
    "int8-static": {"quantization_bits": 8, "quantization_type": "static"},
    "int4-g32": {"quantization_bits": 4, "group_size": 32},
    "int4-asymmetric": {"quantization_bits": 4, "symmetric": False},
    "int4-dynamic": {"quantization_bits": 4, "quantization_type": "dynamic", "embedding_bits": 4},
    "int4-static": {"quantization_bits": 4, "quantization_type": "static", "embedding_bits": 16},
}
MODELS = ["llama-tied", "bert", "mixtral", "gpt2", "t5", "whisper", "vit"]
VARIANTS: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "5GB"),
    "bfloat16-sharded": (torch.bfloat16, "20KB"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_same_output_and_tokens(scheme: str, variant: str, tmp_path: Path) -> None:
    dtype, size = VARIANTS[variant]
    saved = []
    for name in MODELS:
        fields = dict(SCHEMES[scheme])
        build(name).save_pretrained(tmp_path / "float" / name)
        # as a user gets it: `.to(dtype)` would cast buffers (rotary frequencies) that loading leaves alone
        model = type(build(name)).from_pretrained(tmp_path / "float" / name, dtype=dtype)
        if fields.get("quantization_type") == "static":
            batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in TINY[name].inputs().items()}
            fields["calibration_data"] = [batch]
        quantize_model_ptq(model, progress=False, **fields)
        assert model.dtype == dtype
        saved.append(save_with_expectation(model, name, tmp_path / name, max_shard_size=size))
    assert compare_in_new_process(saved) == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = quantize_model_ptq(build("llama"), quantization_bits=4, progress=False)
    return save_with_expectation(model, "llama", tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.mark.parametrize(
    "first",
    [
        "import torch, transformers",
        "import transformers, torch",
        "import transformers.quantizers.auto",
        "from transformers import PreTrainedModel",
        "from transformers import AutoModelForCausalLM",
        "import hfquant",
    ],
)
def test_any_order_of_imports(first: str, checkpoint: list[str]) -> None:
    program = f"{first}\nfrom transformers import AutoModelForCausalLM as A\nimport sys\n"
    program += "m = A.from_pretrained(sys.argv[1]); print(type(m.lm_head).__name__)"
    done = run_python(program, checkpoint[0])
    assert done.stdout.split() == ["QuantLinear"], done.stderr[-2000:]


LOAD = "import sys\nfrom transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained(sys.argv[1])"


def test_without_hfquant_it_raises(checkpoint: list[str]) -> None:
    done = run_python(BLOCKED + LOAD, checkpoint[0], HFQUANT_AUTOLOAD="0")
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr


def test_switched_off_it_raises_too(checkpoint: list[str]) -> None:
    done = run_python(LOAD, checkpoint[0], HFQUANT_AUTOLOAD="0")
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr


def test_broken_install_says_what_is_missing(checkpoint: list[str]) -> None:
    done = run_python(BLOCKED + LOAD, checkpoint[0])
    assert done.returncode != 0
    assert "No module named 'hfquant'" in done.stderr


def test_registering_is_quick_and_imports_nothing() -> None:
    program = (
        "import sys, time, hfquant_autoload as a\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_Finder']\n"
        "start = time.perf_counter(); a.register(); print(time.perf_counter() - start)\n"
        "print('transformers' in sys.modules or 'torch' in sys.modules or 'hfquant' in sys.modules)"
    )
    seconds, imported = run_python(program).stdout.split()
    assert float(seconds) < 1e-3
    assert imported == "False"


def test_torch_alone_does_not_import_the_package() -> None:
    program = "import torch, sys; print('hfquant' in sys.modules, 'hfquant_autoload' in sys.modules)"
    assert run_python(program).stdout.split() == ["False", "True"]


def test_registering_twice_is_once() -> None:
    program = (
        "import hfquant_autoload as a, sys; a.register(); a.register()\n"
        "print(sum(type(f).__name__ == '_Finder' for f in sys.meta_path))"
    )
    assert run_python(program).stdout.split() == ["1"]
