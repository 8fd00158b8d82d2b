"""The image files of a folder."""

import os
from pathlib import Path

import pytest
from PIL import Image

from ddp_cifar.data.files import find_image_files


def make_image(path: Path, file_format: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9)).save(path, file_format)


def test_images_are_found_at_any_depth_through_links_and_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ant"
    make_image(folder / "b.png", "PNG")
    make_image(folder / "photo.jfif", "JPEG")
    make_image(folder / "without_suffix", "PNG")
    make_image(folder / "2024" / "may" / "a.JPG", "JPEG")
    make_image(tmp_path / "elsewhere" / "c.png", "PNG")
    make_image(folder / ".hidden" / "d.png", "PNG")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(tmp_path)
    (folder / "notes.txt").write_text("no image")
    os.mkfifo(folder / "pipe")
    images, others = find_image_files(folder)
    names = [os.path.relpath(path, folder) for path in images]
    assert names[:3] == ["b.png", "photo.jfif", "without_suffix"]
    assert {"2024/may/a.JPG", "linked/c.png"} <= set(names)
    assert not any(".hidden" in name for name in names)
    assert len(names) < 10, "the loop is followed once at most"
    assert [path for path in others if os.path.dirname(path) == str(folder)] == [
        f"{folder}/notes.txt",
        f"{folder}/pipe",
    ]
    monkeypatch.chdir(folder)
    assert find_image_files(Path("."))[0][:3] == ["b.png", "photo.jfif", "without_suffix"]
