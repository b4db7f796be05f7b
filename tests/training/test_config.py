from dataclasses import fields
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hfquant import ConfigError, HfQuantConfig, TrainingConfig
from hfquant.hf.config import USER_FIELDS
from hfquant.training.config import OF_THE_RUN, SchemeFields


def test_quantization_is_off_by_default(tmp_path: Path) -> None:
    config = TrainingConfig(output_dir=str(tmp_path), use_cpu=True)
    assert isinstance(config, TrainingArguments)
    assert config.quantization_mode is None
    assert config.quantization_bits == 8
    assert config.enable_quantized_finetuning is False


def test_the_scheme_has_the_fields_of_hfquantconfig_and_no_other() -> None:
    names = {field.name for field in fields(SchemeFields)}
    assert names == set(USER_FIELDS) - set(OF_THE_RUN)
    assert not names & {field.name for field in fields(TrainingArguments)}


def test_the_scheme_reaches_hfquantconfig(tmp_path: Path) -> None:
    given = {"quantization_bits": 4, "group_size": 32, "symmetric": False, "skip_modules": ["lm_head"]}
    given |= {"overrides": {"mlp": {"quantization_bits": 8}}, "embedding_bits": 16, "algorithm": "rtn"}
    config = TrainingConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    assert config.quantization_config().to_dict() == HfQuantConfig(**given).to_dict()


def test_the_command_line_sets_every_kind_of_field(tmp_path: Path) -> None:
    words = f"--output_dir {tmp_path} --use_cpu --quantization_mode qat --quantization_bits 4 --group_size 32"
    words += " --symmetric false --skip_modules lm_head embed --adapter_alpha 8 --quantization_type weight_only"
    given = [*words.split(), "--overrides", '{"mlp": {"quantization_bits": 8}}']
    (config,) = HfArgumentParser(TrainingConfig).parse_args_into_dataclasses(given)
    assert (config.quantization_mode, config.quantization_bits, config.group_size) == ("qat", 4, 32)
    assert (config.symmetric, config.skip_modules, config.adapter_alpha) == (False, ["lm_head", "embed"], 8.0)
    assert config.overrides == {"mlp": {"quantization_bits": 8}}


def test_yaml_without_quantization_leaves_it_off(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 2e-5\nmax_steps: 3\nuse_cpu: true\n")
    config = TrainingConfig.from_yaml(file, output_dir=str(tmp_path))
    assert config.quantization_mode is None
    assert config.learning_rate == 2e-5  # YAML 1.1 reads 2e-5 as a string


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantisation_mode: qat", "quantisation_mode is not a field; did you mean 'quantization_mode'"),
        ("quantization_bit: 4", "quantization_bit is not a field; did you mean 'quantization_bits'"),
        ("quantization_mode: qta", "quantization_mode='qta': expected one of 'ptq', 'qat'"),
        ("quantization_bits: 3", "quantization_bits=3"),
        ("quantization_bits: '4'", "quantization_bits='4'"),
        ("qat_variant: half", "qat_variant='half'"),
        ("adapter_rank: 0", "adapter_rank=0: expected an integer at least 1"),
        ("distillation_weight: 2", "distillation_weight=2: expected a number from 0 to 1"),
        ("distillation_weight: 0.5", "needs quantization_mode='qat'"),
        ("distillation_temperature: 0", "expected more than 0"),
        ("qat_blend_steps: -1", "qat_blend_steps=-1"),
        ("learning_rate: fast", "learning_rate='fast': expected a number"),
        ("quantization_mode: qat\nenable_quantized_finetuning: true", "set one of them"),
        ("- a", "expected a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_wrong_fields_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.from_yaml(file, output_dir=str(tmp_path), use_cpu=True)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        TrainingConfig.from_yaml(tmp_path / "none.yaml")
