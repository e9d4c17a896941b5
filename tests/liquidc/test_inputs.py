"""The files of a model beside its weights: links are followed, what is no file is not opened."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from liquidc.errors import InputError
from liquidc.inputs import DirectoryInput

COPIES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
COPIES += ("generation_config.json", "chat_template.jinja")


def small_files(model: Path) -> None:
    for name in COPIES[2:5]:
        (model / name).write_text("{}")
    (model / COPIES[5]).write_text("x")


def test_links_to_every_file(model_directory: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model_directory, tmp_path / "model"))
    small_files(model)
    before = DirectoryInput(model)
    want = (before.sha256, before.files())
    assert set(want[1]) == set(COPIES)
    (tmp_path / "blobs").mkdir()
    for path in sorted(model.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    linked = DirectoryInput(model)
    linked.check()
    assert (linked.sha256, linked.files()) == want


@pytest.mark.parametrize("kind", ["fifo", "link to nothing", "directory"])
@pytest.mark.parametrize("name", COPIES)
def test_what_is_no_file_is_refused(
    name: str, kind: str, model_directory: Path, tmp_path: Path
) -> None:
    """At once: a FIFO without a writer would never be read to its end."""
    model = Path(shutil.copytree(model_directory, tmp_path / "model"))
    small_files(model)
    (model / name).unlink()
    match kind:
        case "fifo":
            os.mkfifo(model / name)
        case "directory":
            (model / name).mkdir()
        case _:
            (model / name).symlink_to("../blobs/none")
    with pytest.raises(InputError, match=rf"{name}: can't be read \(") as caught:
        DirectoryInput(model).check()
    assert "\n" not in str(caught.value)
