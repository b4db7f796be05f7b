"""Every YAML under configs/ is read by the real parser, and opens with the command that uses it."""

from pathlib import Path

import pytest

from hfquant import HfQuantConfig, TrainingConfig
from hfquant.cli.config_file import load_config_file
from hfquant.cli.train import RUN_FIELDS
from hfquant.training.config import read_yaml


FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted((FOLDER / "ptq").glob("*.yaml"))
TRAINING = sorted([*FOLDER.glob("qat-*.yaml"), *FOLDER.glob("finetune-*.yaml")])


def test_there_are_configs() -> None:
    assert 0 < len(CONFIGS) <= 12


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_valid(path: Path) -> None:
    settings = HfQuantConfig(**load_config_file(path)).resolve()
    assert settings.bits in (4, 8)
    first = path.read_text().splitlines()[0]
    assert first.startswith("# hfquant quantize MODEL -o OUT --config configs/ptq/" + path.name)


def test_every_config_is_tested() -> None:
    assert sorted(FOLDER.rglob("*.yaml")) == sorted(CONFIGS + TRAINING)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_training_config_is_valid(path: Path, tmp_path: Path) -> None:
    fields = {key: value for key, value in read_yaml(path).items() if key not in RUN_FIELDS}
    config = TrainingConfig.from_fields(fields | {"output_dir": str(tmp_path), "use_cpu": True}, where=path.name)
    finetunes = path.stem.startswith("finetune")
    assert config.quantization_mode == (None if finetunes else "qat")
    assert config.enable_quantized_finetuning == finetunes
    first = path.read_text().splitlines()[0]
    assert first == f"# hfquant train --config configs/{path.name} --model MODEL --text FILE -o OUT"
