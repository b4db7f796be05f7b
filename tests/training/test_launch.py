"""The example script under accelerate, on two processes."""

import os
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from hfquant import get_quantization_info
from tests.support.processes import ROOT


def test_accelerate_launches_the_example_on_two_processes(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += " --num_cpu_threads_per_process 1 --dynamo_backend no --main_process_port 0"
    launch += f" {ROOT}/examples/05_qat_trainer.py"
    words = f"--model {tmp_path}/float --context 16 --output_dir {tmp_path}/out --use_cpu --report_to none"
    words += " --quantization_mode qat --quantization_bits 8 --quantization_type static --calibration_batches 2"
    words += " --max_steps 3 --save_strategy no --per_device_train_batch_size 2"
    done = subprocess.run(
        [sys.executable, *launch.split(), *words.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        # the example compares with what was trained, bit for bit
        env=os.environ | {"HFQUANT_KERNELS": "reference"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "same logits as in training: True" in done.stdout
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "final")
    assert get_quantization_info(model).quantization_type == "static"
