"""The public names are those that ``__init__`` re-exports, and the package documents all it defines."""

import ast
import re
from pathlib import Path

import pytest

import hfquant


ROOT = Path(__file__).parents[2]
PUBLIC = [
    "CalibrationError",
    "ConfigError",
    "FinetuneCallback",
    "FormatError",
    "HfQuantConfig",
    "HfQuantError",
    "KernelError",
    "QatCallback",
    "QuantTrainer",
    "QuantizationInfo",
    "SchemeError",
    "TrainingConfig",
    "convert_model_qat",
    "dequantize_model",
    "export_model",
    "get_quantization_info",
    "import_model",
    "load_quantized",
    "merge_adapters",
    "plan_quantization",
    "prepare_model_for_finetuning",
    "prepare_model_qat",
    "quantize_model_ptq",
    "save_quantized",
    "verify_checkpoint",
]
FILES = sorted((ROOT / "hfquant").rglob("*.py"))


def test_the_public_names_are_these() -> None:
    folders = {path.stem for path in (ROOT / "hfquant").iterdir()}
    assert all(hasattr(hfquant, name) for name in PUBLIC)  # some are imported when they are asked for
    names = {name for name in vars(hfquant) if not name.startswith("_")} - folders | set(hfquant._LAZY)
    assert sorted(names) == PUBLIC
    assert hfquant.__all__ == PUBLIC


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    nodes = [tree, *(n for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef)))]
    nested = {id(inner) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) for inner in ast.walk(n)} - {
        id(n) for n in nodes if n in tree.body
    }
    for node in nodes:
        name = getattr(node, "name", path.name)
        is_method = any(node in c.body for c in ast.walk(tree) if isinstance(c, ast.ClassDef))
        if name.startswith("_") or (id(node) in nested and not is_method):
            continue
        assert ast.get_docstring(node), f"{path}: {name} has no docstring"


def test_changelog_names_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[.*?\] ?(\S*)", changelog, flags=re.MULTILINE)
    assert versions[0] == hfquant.__version__
