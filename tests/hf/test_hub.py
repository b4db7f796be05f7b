"""Pushing and pulling against a Hub on this machine, LFS included, in processes of their own."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from hfquant import ConfigError, export_model, quantize_model_ptq
from hfquant.hf.hub import model_card
from tests.support.hub_server import Hub, serving, validate_card
from tests.support.processes import run_python
from tests.support.tiny_models import build, output


CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\npipeline_tag: text-generation\n---\n# Base\n"


def online(hub: Hub, home: Path, program: str, *arguments: object) -> str:
    """Run a program whose Hub is ``hub``; what it printed."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    done = run_python(program, *map(str, arguments), HF_HUB_DISABLE_XET="1", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def saved(folder: Path, name: str = "llama", size: str = "5GB", **fields: Any) -> Path:
    model = quantize_model_ptq(build(name), progress=False, **{"quantization_bits": 4, **fields})
    model.save_pretrained(folder, max_shard_size=size)
    save_file({"output": output(model, name)}, folder.with_suffix(".expected"))
    return folder


PUSH = "import sys\nfrom hfquant.cli.main import app\napp(sys.argv[1:])"

PULL = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from tests.support.tiny_models import output
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[3])
assert torch.equal(output(model, "llama"), load_file(sys.argv[2])["output"])
print("equal")
"""


@pytest.mark.parametrize("lfs", [(), (".safetensors",)], ids=["regular", "lfs"])
def test_pushed_and_pulled_is_the_same_and_stale_shards_go(lfs: tuple[str, ...], tmp_path: Path) -> None:
    with serving(*lfs) as hub:
        hub.commit("base/model", {"README.md": CARD.encode()})
        many, one = saved(tmp_path / "many", size="20KB"), saved(tmp_path / "one", algorithm="rtn")
        online(hub, tmp_path / "home", PUSH, "push", many, "tester/q", "--base-model", "base/model", "--private")
        assert sum(name.endswith(".safetensors") for name in hub.head("tester/q")[1]) > 2
        assert hub.private["tester/q"]
        if lfs:
            online(hub, tmp_path / "a", PULL, "tester/q", many.with_suffix(".expected"), "main")
        commits = len(hub.repositories["tester/q"])
        online(hub, tmp_path / "home", PUSH, "push", one, "tester/q")
        assert len(hub.repositories["tester/q"]) == commits + 1
        files = hub.head("tester/q")[1]
        assert [name for name in files if "model" in name] == ["model.safetensors"]
        assert bool(hub.lfs_files) == bool(lfs)
        assert online(hub, tmp_path / "b", PULL, "tester/q", one.with_suffix(".expected"), "main") == "equal\n"
        if lfs:
            report = online(hub, tmp_path / "b", PUSH, "verify", "tester/q", "--json")
            assert json.loads(report)["problems"] == []


def test_branches_and_pull_requests(tmp_path: Path) -> None:
    with serving() as hub:
        folder = saved(tmp_path / "model")
        online(hub, tmp_path / "home", PUSH, "push", folder, "tester/q", "--revision", "int4")
        assert list(hub.head("tester/q")[1]) == [".gitattributes"]
        online(hub, tmp_path / "a", PULL, "tester/q", folder.with_suffix(".expected"), "int4")
        result = online(hub, tmp_path / "home", PUSH, "push", folder, "tester/q", "--create-pr", "--json")
        assert json.loads(result)["url"].endswith("/tester/q/discussions/1")


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("tester/plain", max_shard_size=sys.argv[2])
"""


def test_push_to_hub_of_the_model_itself(tmp_path: Path) -> None:
    with serving() as hub:
        folder = saved(tmp_path / "model")
        online(hub, tmp_path / "home", PLAIN, folder, "20KB")
        online(hub, tmp_path / "a", PULL, "tester/plain", folder.with_suffix(".expected"), "main")


MIXED = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained("tester/plain")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_stale_mix_of_plain_pushes_is_refused(tmp_path: Path) -> None:
    with serving() as hub:
        online(hub, tmp_path / "home", PLAIN, saved(tmp_path / "one"), "5GB")
        online(hub, tmp_path / "home", PLAIN, saved(tmp_path / "two", algorithm="rtn"), "20KB")
        assert "FormatError model.safetensors is of another save" in online(hub, tmp_path / "a", MIXED)


ADAPTER = """
import sys, torch, hfquant
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("tester/q")
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
model.save_pretrained(sys.argv[1])
from safetensors.torch import save_file
from tests.support.tiny_models import output
save_file({"output": output(model, "llama")}, sys.argv[2])
"""

PULL_ADAPTER = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tests.support.tiny_models import output
model = AutoPeftModelForCausalLM.from_pretrained("tester/adapter").eval()
torch.testing.assert_close(output(model, "llama"), load_file(sys.argv[1])["output"], rtol=0, atol=0)
print("equal")
"""


def test_adapters_are_pushed_and_pulled(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with serving() as hub:
        online(hub, tmp_path / "home", PUSH, "push", saved(tmp_path / "model"), "tester/q")
        online(hub, tmp_path / "home", ADAPTER, tmp_path / "adapter", tmp_path / "expected")
        (tmp_path / "adapter" / "README.md").unlink()
        words = ("push", tmp_path / "adapter", "tester/adapter", "--base-model", "tester/q")
        online(hub, tmp_path / "home", PUSH, *words)
        head = ModelCard(hub.head("tester/adapter")[1]["README.md"].decode()).data
        assert (head.base_model_relation, head.library_name) == ("adapter", "peft")
        assert online(hub, tmp_path / "b", PULL_ADAPTER, tmp_path / "expected") == "equal\n"


def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    with serving() as hub:
        hub.commit("base/model", {"README.md": CARD.encode()})
        (tmp_path / "quality.json").write_text(json.dumps({"perplexity": 12.345, "mean_kl": 0.0123, "tokens": 9}))
        words = ("--base-model", "base/model", "--quality", tmp_path / "quality.json")
        folder = saved(tmp_path / "model")
        online(hub, tmp_path / "home", PUSH, "push", folder, "tester/q", *words)
        text = hub.head("tester/q")[1]["README.md"].decode()
        card = ModelCard(text)
        found = card.data.to_dict()
        assert found["tags"] == ["hfquant", "4-bit", "8-bit"]
        assert (found["base_model"], found["base_model_relation"]) == ("base/model", "quantized")
        assert (found["library_name"], found["license"], found["language"]) == ("transformers", "apache-2.0", ["en"])
        assert "| perplexity | 12.35 |" in text
        assert validate_card(text) == []
        snippet = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
        check = "\nfrom transformers import LlamaForCausalLM\nassert isinstance(model, LlamaForCausalLM)"
        online(hub, tmp_path / "b", snippet + check)


@pytest.mark.parametrize("file_format", ["compressed-tensors", "gptq", "gguf", "dense"])
def test_cards_of_exports(file_format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantize_model_ptq(build("llama"), quantization_bits=4, group_size=32, progress=False)
    export_model(model, file_format, tmp_path / "x", progress=False)
    card = model_card(tmp_path / "x", repo_id="tester/x", metadata={"license": "mit"})
    assert validate_card(str(card)) == []
    assert card.data.license == "mit"
    expected = {"dense": ["hfquant"], "gguf": ["hfquant", "gguf"]}
    assert card.data.tags == expected.get(file_format, ["hfquant", file_format, "4-bit"])
    assert ("gguf_file=" in card.text) == (file_format == "gguf")


def test_there_must_be_something_to_push(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(ConfigError, match="not quantized"):
        model_card(tmp_path / "float")
