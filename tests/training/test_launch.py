"""The example script under launchers: accelerate's, and torchrun with two processes."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from hfquant import get_quantization_info
from tests.support.distributed import run_launched
from tests.support.processes import ROOT


LAUNCHERS = {
    # without MPI, accelerate runs a CPU job in one process, whatever --num_processes says
    "accelerate": (
        "-m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no "
        "--num_cpu_threads_per_process 1 --dynamo_backend no",
        {"rng_state.pth"},
    ),
    "torchrun": (
        "-m torch.distributed.run --standalone --nproc_per_node 2",
        {"rng_state_0.pth", "rng_state_1.pth"},
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched_example_ends_in_a_quantized_checkpoint(launcher: str, tmp_path: Path) -> None:
    launch, states = LAUNCHERS[launcher]
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    words = f"{ROOT}/examples/05_qat_trainer.py --model {tmp_path}/float --context 16 --output_dir {tmp_path}/out"
    words += " --use_cpu --report_to none --quantization_mode qat --quantization_bits 8 --quantization_type static"
    words += " --calibration_batches 2 --max_steps 3 --save_steps 2 --per_device_train_batch_size 2"
    words += " --ddp_backend gloo" if launcher == "torchrun" else ""
    printed = run_launched(launch, words)
    assert "same logits as in training: True" in printed
    found = {path.name for path in (tmp_path / "out/checkpoint-2").iterdir()}
    assert {name for name in found if name.startswith("rng_state")} == states
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "final")
    assert get_quantization_info(model).quantization_type == "static"
