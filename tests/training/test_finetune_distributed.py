"""Two gloo processes fine-tune what one does, replicated (DDP) and sharded (FSDP2)."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfquant import quantize_model_ptq
from tests.support.distributed import run_launched, run_ranks
from tests.support.processes import ROOT


WORKER = """
import sys, torch
from safetensors.torch import save_file
torch.set_num_threads(1)
from hfquant import ConfigError, prepare_model_for_finetuning
from hfquant.hf.rounding import round_anew, set_rounding
from hfquant.finetune.adapted import adapted_modules
from tests.support.distributed import connect, train_steps
from tests.support.finetune import packed_model
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
connect(rank, world, folder)
found = {}
RUNS = ("grid", "int4", "llama-tied"), ("scales", "int8-static", "llama-tied"), ("grid", "int4", "mixtral")
for adapter, scheme, name in RUNS:
    for sharded in (False, True):
        model = packed_model(name, scheme)
        model = model if sharded else model.double()
        prepare_model_for_finetuning(model, adapter, rank=4, progress=False)
        layers, kind = model.model.layers, f"{adapter}-{name}-{'fsdp' if sharded else 'ddp'}"
        losses = train_steps(model, layers, rank, world, sharded=sharded, unused=name == "mixtral")
        found[f"{kind}.losses"] = losses
        if not sharded:
            found |= {f"{kind}.codes.{n}.{k}": m.codes(k) for n, m in adapted_modules(model) for k in m.float_weights}
            found |= {f"{kind}.{n}": p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        elif world > 1:
            assert type(layers[0].self_attn.q_proj.weight).__name__ == "DTensor"
            try:
                set_rounding(model, False)
                raise AssertionError("a sharded model cannot be rounded anew")
            except ConfigError as error:
                assert "sharded" in str(error) or adapter == "scales"
for name in ("llama-tied", "mixtral"):
    model = packed_model(name).double()
    prepare_model_for_finetuning(model, rank=4, progress=False)
    set_rounding(model, False)
    data = [{"input_ids": torch.arange(3 + i, 19 + i).unsqueeze(0)} for i in range(3)]
    def before_step(step, optimizer):
        if step == 3:
            # the first process decides, should the others come to something else
            round_anew(model, data[::-1] if rank and name == "mixtral" else data, optimizer=optimizer, progress=False)
    kind = f"delay-{name}-ddp"
    found[f"{kind}.losses"] = train_steps(
        model, model.model.layers, rank, world, sharded=False, unused=name == "mixtral", before_step=before_step)
    found |= {f"{kind}.codes.{n}.{k}": m.codes(k) for n, m in adapted_modules(model) for k in m.float_weights}
    found |= {f"{kind}.{n}": p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    found |= {f"{kind}.codes.{n}": p.detach().clone() for n, p in model.named_parameters() if p.dtype == torch.int16}
save_file(found, f"{folder}/{world}-{rank}.safetensors")
"""


def test_two_processes_fine_tune_what_one_does(tmp_path: Path) -> None:
    (one,), (first, second) = run_ranks(WORKER, tmp_path, 1), run_ranks(WORKER, tmp_path, 2)
    assert sum(".codes." in name for name in one) > 20
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        if ".codes." in name:
            assert torch.equal(first[name], tensor), name
        elif "-fsdp." in name:
            assert torch.allclose(first[name], tensor, rtol=1e-5, atol=0), name
        else:
            assert tensor.dtype == torch.float64, name
            assert float((first[name] - tensor).abs().max()) <= 1e-9, name


def test_two_processes_of_the_trainer_write_one_checkpoint(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    quantize_model_ptq(LlamaForCausalLM(config), quantization_bits=4, progress=False).save_pretrained(tmp_path / "int4")
    launch = f"-m torch.distributed.run --standalone --nproc_per_node 2 {ROOT}/examples/07_finetune_quantized.py"
    words = f"--model {tmp_path}/int4 --context 16 --output_dir {tmp_path}/out --use_cpu --ddp_backend gloo"
    words += " --adapter grid --adapter_rank 4 --max_steps 4 --save_steps 2 --learning_rate 1e-2 --report_to none"
    words += " --enable_quantized_finetuning --adapter_delay_steps 3 --calibration_batches 2"
    printed = run_launched(launch, words)
    assert printed.count("same logits as in training: True") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-2", "checkpoint-4", "final"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (tmp_path / "out/checkpoint-4").iterdir()}
