"""Every YAML under configs/ is read by the real parser, and opens with the command that uses it."""

from pathlib import Path

import pytest

from hfquant import HfQuantConfig
from hfquant.cli.config_file import load_config_file


CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert 0 < len(CONFIGS) <= 12


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_valid(path: Path) -> None:
    settings = HfQuantConfig(**load_config_file(path)).resolve()
    assert settings.bits in (4, 8)
    first = path.read_text().splitlines()[0]
    assert first.startswith("# hfquant quantize MODEL -o OUT --config configs/ptq/" + path.name)
