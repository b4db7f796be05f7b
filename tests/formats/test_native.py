"""The native format itself: hashes, versions, and golden checkpoints that must load for ever."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hfquant.errors import FormatError
from hfquant.formats.native import check_format_version, content_metadata, tensor_sha256
from hfquant.numerics.packing import unpack
from tests.support.tiny_models import text_inputs
from tests.support.tolerance import SAME_VALUES


GOLDEN = Path(__file__).parents[1] / "golden"


def test_hashes_are_of_the_stored_bytes() -> None:
    tensor = torch.tensor([[1, -2], [3, 4]], dtype=torch.int16)
    expected = hashlib.sha256(b"\x01\x00\xfe\xff\x03\x00\x04\x00").hexdigest()
    assert tensor_sha256(tensor) == expected
    assert tensor_sha256(tensor.t().contiguous().t()) == expected
    assert tensor_sha256(torch.zeros(0)) == hashlib.sha256(b"").hexdigest()
    assert tensor_sha256(torch.tensor(1.0).bfloat16()) == hashlib.sha256(b"\x80\x3f").hexdigest()


def test_the_save_id_is_that_of_the_content() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    first = content_metadata({"a": a, "b": b})
    assert first == content_metadata({"b": b, "a": a})
    assert len(first["hfquant_save_id"]) == 32
    assert first["hfquant_save_id"] != content_metadata({"a": b, "b": a})["hfquant_save_id"]
    assert json.loads(first["hfquant_sha256"]) == {"a": tensor_sha256(a), "b": tensor_sha256(b)}


def test_what_is_not_in_memory_gets_a_random_id() -> None:
    offloaded = {"a": torch.empty(2, device="meta")}
    first, second = content_metadata(offloaded), content_metadata(offloaded)
    assert first.keys() == {"hfquant_save_id"}
    assert first != second


def test_versions() -> None:
    check_format_version(1, "0.1.0")
    with pytest.raises(FormatError, match=r"format version 2.*needs hfquant 0\.7\.0 or newer"):
        check_format_version(2, "0.7.0")
    for bad in (0, -1, "1", None, True, 1.0):
        with pytest.raises(FormatError, match="format_version="):
            check_format_version(bad, None)


@pytest.mark.parametrize("name", ["int4-g16", "int8-dynamic", "int4-asymmetric"])
def test_golden_checkpoints_load_for_ever(name: str) -> None:
    expected = load_file(GOLDEN / name / "expected.st")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    with torch.no_grad():
        logits = model(**text_inputs()).logits
    torch.testing.assert_close(logits, expected["logits"], **SAME_VALUES)
    linear = model.model.layers[0].mlp.down_proj
    codes = unpack(linear.weight, bits=linear.scheme.weight.bits, length=linear.in_features)
    assert torch.equal(codes, expected["codes"])


@pytest.mark.parametrize("name", ["int4-g16", "int8-dynamic", "int4-asymmetric"])
def test_golden_checkpoints_hold_what_they_say(name: str) -> None:
    config = json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"]
    with safe_open(GOLDEN / name / "model.safetensors", framework="pt") as stored:
        assert stored.metadata()["hfquant_save_id"] == config["save_id"]
        digests = json.loads(stored.metadata()["hfquant_sha256"])
        assert sorted(digests) == sorted(stored.keys())
        for key, digest in digests.items():
            assert tensor_sha256(stored.get_tensor(key)) == digest
