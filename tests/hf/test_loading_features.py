"""What users of Transformers do with models, done with quantized ones."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline
from transformers.trainer_utils import validate_quantization_for_training

from hfquant import CalibrationError, ConfigError, HfQuantConfig, KernelError, SchemeError, quantize_model_ptq
from hfquant.nn.fused import unfuse_modules_
from hfquant.nn.quant_linear import QuantLinear
from tests.support.tiny_models import build, output, text_inputs
from tests.support.tolerance import SAME_VALUES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    build("llama-tied").save_pretrained(folder / "float")
    quantize_model_ptq(build("llama-tied"), quantization_bits=4, progress=False).save_pretrained(folder / "int4")
    return folder


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("source", ["float", "int4"])
def test_device_map(source: str, device_map: object, checkpoint: Path) -> None:
    options = {"quantization_config": HfQuantConfig(quantization_bits=4)} if source == "float" else {}
    model = AutoModelForCausalLM.from_pretrained(checkpoint / source, device_map=device_map, **options)
    expected = AutoModelForCausalLM.from_pretrained(checkpoint / "int4")
    assert torch.equal(output(model, "llama"), output(expected, "llama"))


def test_disk_offload_of_a_quantized_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint / "int4", device_map=device_map, offload_folder=tmp_path
        )
        expected = AutoModelForCausalLM.from_pretrained(checkpoint / "int4")
        assert torch.equal(output(model, "llama"), output(expected, "llama"))
        model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(output(again, "llama"), output(expected, "llama"))


def test_quantizing_to_disk_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save the model first"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint / "float",
            quantization_config=HfQuantConfig(quantization_bits=4),
            device_map={"model": "disk", "lm_head": "cpu"},
            offload_folder=tmp_path,
        )


def test_config_as_a_dictionary(checkpoint: Path) -> None:
    fields = {"quant_method": "hfquant", "quantization_bits": 4}
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "float", quantization_config=fields)
    expected = AutoModelForCausalLM.from_pretrained(checkpoint / "int4")
    assert torch.equal(output(model, "llama"), output(expected, "llama"))


def test_pipeline(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "int4")
    features = pipeline("feature-extraction", model=model.model, tokenizer=_Tokens(), framework="pt")
    assert len(features("anything")[0]) == 16


class _Tokens:
    """The least a pipeline needs of a tokenizer."""

    model_input_names = ("input_ids",)

    def __call__(self, *_: object, **__: object) -> dict[str, torch.Tensor]:
        return text_inputs()


def test_copies_compute_the_same(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "int4")
    expected = output(model, "llama")
    clone = copy.deepcopy(model)
    assert clone.lm_head.weight is clone.model.embed_tokens.weight
    assert torch.equal(output(clone, "llama"), expected)
    other = quantize_model_ptq(build("llama-tied"), quantization_bits=4, algorithm="rtn", progress=False)
    assert not torch.equal(output(other, "llama"), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, "llama"), expected)


def test_casting_the_model_casts_what_is_float(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "int4")
    before = {key: value.clone() for key, value in model.state_dict().items() if not value.is_floating_point()}
    model.to(torch.bfloat16)
    assert output(model, "llama").dtype == torch.bfloat16
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("fields", [{"quantization_bits": 4}, {"quantization_bits": 8}], ids=["int4", "int8"])
def test_compiled_without_a_graph_break(fields: dict[str, int]) -> None:
    model = quantize_model_ptq(build("llama"), progress=False, **fields)
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, QuantLinear)
    with torch.no_grad():
        compiled = torch.compile(linear, fullgraph=True, dynamic=True)
        for rows in (3, 5):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), linear(x), **SAME_VALUES)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = whole(**text_inputs(), use_cache=False).logits
    unfuse_modules_(model)  # a compiler fuses by itself, and rounds norms otherwise
    torch.testing.assert_close(logits, output(model, "llama"), **SAME_VALUES)


def test_static_needs_calibration_data() -> None:
    with pytest.raises(CalibrationError, match="needs calibration_data"):
        quantize_model_ptq(build("llama"), quantization_type="static", progress=False)
    with pytest.raises(CalibrationError, match="empty"):
        quantize_model_ptq(build("llama"), quantization_type="static", calibration_data=[], progress=False)


@pytest.mark.parametrize(
    "fields", [{"quantization_type": "static"}, {"overrides": {"mlp": {"quantization_type": "static"}}}]
)
def test_static_while_loading_is_refused(fields: dict[str, object], checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="quantize_model_ptq"):
        AutoModelForCausalLM.from_pretrained(checkpoint / "float", quantization_config=HfQuantConfig(**fields))


def test_calibration_data_that_is_not_used_draws_a_warning() -> None:
    with pytest.warns(UserWarning, match="calibration_data is not used: quantization_type='weight_only'.*'search'"):
        quantize_model_ptq(
            build("llama"), quantization_bits=4, algorithm="search", calibration_data=[text_inputs()], progress=False
        )


def test_quantizing_twice_is_refused() -> None:
    model = quantize_model_ptq(build("llama"), quantization_bits=4, progress=False)
    with pytest.raises(ConfigError, match="quantized by hfquant already"):
        quantize_model_ptq(model, quantization_bits=8, progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_named(bad: float, tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    model.save_pretrained(tmp_path)
    message = r"model.layers.1.mlp.up_proj.weight: 1 weights are NaN or infinite"
    with pytest.raises(SchemeError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HfQuantConfig(quantization_bits=4))
    with pytest.raises(SchemeError, match=message):
        quantize_model_ptq(model, quantization_bits=4, progress=False)


def test_inputs_cast_to_the_weights_dtype_are_refused() -> None:
    model = quantize_model_ptq(build("llama"), quantization_bits=4, progress=False)
    linear = model.lm_head
    with pytest.raises(KernelError, match="skip_modules"):
        linear(torch.randn(2, 64).to(linear.weight.dtype))


def test_gradients_reach_the_inputs_and_the_trainer_asks_for_adapters() -> None:
    model = quantize_model_ptq(build("llama"), quantization_bits=4, progress=False)
    embeddings = torch.randn(1, 5, 64, requires_grad=True)
    model(inputs_embeds=embeddings, labels=torch.arange(5).unsqueeze(0)).loss.backward()
    assert float(embeddings.grad.abs().sum()) > 0
    assert not any(p.requires_grad for n, p in model.named_parameters() if "norm" not in n)
    with pytest.raises(ValueError, match="fine-tuning on purely quantized models"):
        validate_quantization_for_training(model)


def test_a_model_is_left_as_from_pretrained_leaves_it(checkpoint: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint / "int4")
    in_memory = quantize_model_ptq(build("llama-tied"), quantization_bits=4, progress=False)
    for model in (loaded, in_memory):
        assert model.is_quantized
        assert model.quantization_method == "hfquant"
        assert model.config.quantization_config is model.hf_quantizer.quantization_config
        assert model.hf_quantizer.is_serializable()
    assert loaded.config.quantization_config.modules == in_memory.config.quantization_config.modules
