"""Files stay within 400 lines, functions within 40, the package within its budget."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[2] / "hfquant"
FILES = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(path for path in (PACKAGE / "kernels/cpu").iterdir() if path.suffix in (".cpp", ".h"))
FILE_LINES, FUNCTION_LINES, PACKAGE_LINES = 400, 40, 20303


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node) <= FUNCTION_LINES, f"{path}: {node.name} has {code_lines(node)} lines"


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.name)
def test_native_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES


def code_lines(node: ast.FunctionDef) -> int:
    """Lines of a function from ``def`` to its end, without the docstring."""
    docstring = node.body[0] if ast.get_docstring(node) else None
    documented = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return node.end_lineno - node.lineno + 1 - documented


def test_package_stays_small() -> None:
    total = sum(len(path.read_text().splitlines()) for path in FILES)
    assert total <= PACKAGE_LINES, f"the package has {total} lines"
