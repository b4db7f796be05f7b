from pathlib import Path

import pytest

from hfquant.errors import FormatError
from hfquant.formats.staging import staged_folder


def fill(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


def test_the_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "model"
    with staged_folder(target) as folder:
        fill(folder, "new")
        assert not target.exists()
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_an_old_checkpoint_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    fill(target, "old")
    (target / "model-00001-of-00002.safetensors").write_text("stale")
    with staged_folder(target) as folder:
        fill(folder, "new")
        assert (target / "config.json").read_text() == "old"
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_save_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model"
    target.mkdir()
    fill(target, "old")
    with pytest.raises(error):  # noqa: PT012, SIM117
        with staged_folder(target) as folder:
            fill(folder, "half")
            raise error
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_foreign_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FormatError, match=r"no config\.json"), staged_folder(tmp_path):
        pass
    with pytest.raises(FormatError, match="is a file"), staged_folder(tmp_path / "thesis.tex"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_permissions_are_those_of_a_new_folder(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "model") as folder:
        fill(folder, "x")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "other").stat().st_mode
