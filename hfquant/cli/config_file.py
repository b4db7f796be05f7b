"""Quantization settings from a YAML or JSON file; options given on the command line win over it."""

from pathlib import Path
from typing import Any

import yaml

from hfquant.cli.output import one_line
from hfquant.errors import ConfigError
from hfquant.hf.config import USER_FIELDS, nearest


def load_config_file(path: str | Path) -> dict[str, Any]:
    """The fields of ``HfQuantConfig`` that the file sets.

    Raises:
        ConfigError: If the file is missing, is not a mapping, or sets an unknown field.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, found {type(content).__name__}")
    for name in content:
        if name not in USER_FIELDS:
            raise ConfigError(f"{path}: {name} is not a field{nearest(str(name), USER_FIELDS)}")
    return content
