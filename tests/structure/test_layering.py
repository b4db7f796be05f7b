"""A module may import only from layers below its own."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[2] / "hfquant"
LAYERS = [
    {"errors"},
    {"schemes"},
    {"numerics"},
    {"kernels"},
    {"nn"},
    {"ptq", "qat", "finetune", "formats"},
    {"hf", "evaluation"},
    {"training"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
KNOWS_TRANSFORMERS = {"hf", "evaluation", "training", "cli"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            assert node.module != "hfquant", f"{path}: import from the defining module"
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_point_down(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = imported(path)
    if here == "__init__":
        return
    for there in {name.split(".")[1] for name in names if name.startswith("hfquant.")} - {here}:
        assert LEVEL[there] < LEVEL[here], f"{path} ({here}) imports {there}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_transformers_stays_in_the_upper_layers(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    uses = any(name.split(".")[0] == "transformers" for name in imported(path))
    assert not uses or here in KNOWS_TRANSFORMERS
