"""A folder of images as a data set. User errors are in test_mistakes.py."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import write_tree
from PIL import Image
from ranks import RankPool

from ddp_cifar.config import DataConfig
from ddp_cifar.data import build_dataset
from ddp_cifar.data.dataset import Moments
from ddp_cifar.data.decode import decode
from ddp_cifar.data.imagefolder import FORMAT
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.log import log

Shell = Callable[..., Any]


def config_for(root: Path, **changes: Any) -> DataConfig:
    return dataclasses.replace(DataConfig(name="imagefolder", root=str(root)), **changes)


def entries(root: Path) -> list[Path]:
    """The folders of decoded images."""
    return sorted((root / ".cache").glob("imagefolder-*"))


RED, GREEN = (255, 0, 0), (0, 255, 0)


def test_a_folder_of_images_is_read_exactly(alone: World, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = {}
    for split in ("train", "test"):
        for name in ("owl", "ant", "emu"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                pixels[split, name, i] = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels[split, name, i]).save(folder / f"{i}.png")
        (tmp_path / split / "notes.txt").write_text("not a class")
        (tmp_path / split / "owl" / ".DS_Store").write_text("not an image")
    dataset = build_dataset(DataConfig(name="imagefolder", root=str(tmp_path)), alone)
    assert dataset.classes == ("ant", "emu", "owl")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for split, images in (("train", dataset.train.images), ("test", dataset.test.images)):
        for index, image in enumerate(images):
            expected = pixels[split, dataset.classes[index // 3], index % 3]
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_three_classes_of_another_image_size_can_be_trained(train: Callable[..., Any], tmp_path: Path) -> None:
    """The network's last layer has three outputs; images of 40 x 36 pixels become 24 x 24."""
    root = write_tree(tmp_path / "images", per_class=6)
    outcome = train(
        "data.name=imagefolder",
        f"data.root={root}",
        "data.image_size=24",
        f"run_dir={tmp_path / 'run'}",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
        "train.epochs=1",
        "device=cpu",
    )
    assert outcome.status == 0, outcome.err
    assert "18 train, 18 test images of 3 classes" in outcome.out
    state = torch.load(tmp_path / "run" / "checkpoints" / "latest.pt", weights_only=True)
    assert state["model"]["fc_layer.6.weight"].shape == (3, 512)
    assert state["model"]["fc_layer.1.weight"].shape == (1024, 256 * 3 * 3)


def test_grayscale_images_of_another_shape_are_decoded_and_their_statistics_are_kept(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree(tmp_path)
    config = config_for(root, image_size=[16, 24], channels=1)
    before = build_dataset(config, alone)
    assert before.train.image_shape == (1, 16, 24)
    expected = torch.tensor(decode(root / "train/ant/0.png", (1, 16, 24))).permute(2, 0, 1)
    assert torch.equal(before.train.images[0], expected)
    pixels = before.train.images.double() / 255
    assert before.pixel_moments.mean == pytest.approx([pixels.mean().item()])
    assert before.pixel_moments.std == pytest.approx([pixels.std(correction=0).item()])
    # a second start reads no pixels
    monkeypatch.setattr(Moments, "of", None)
    monkeypatch.setattr("zlib.crc32", None)
    after = build_dataset(config, alone)
    assert after.pixel_moments == before.pixel_moments
    assert after.describe() == before.describe()


def test_held_out_images_can_replace_a_test_folder(alone: World, tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "test").rename(root / "elsewhere")
    dataset = build_dataset(config_for(root, val_images=3), alone)
    assert dataset.test is None
    assert dataset.val is not None
    assert (len(dataset.train), len(dataset.val)) == (9, 3)


def test_a_trained_network_needs_only_a_test_folder(alone: World, tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    both = build_dataset(config_for(root), alone)
    assert len(build_dataset(config_for(root), alone, test_of=both.classes).train) == 12
    (root / "train").rename(root / "elsewhere")
    test = build_dataset(config_for(root, val_images=3), alone, test_of=both.classes)
    assert (len(test.train), test.val, test.classes) == (0, None, both.classes)
    assert both.test is not None
    assert test.test is not None
    assert torch.equal(test.test.images, both.test.images)
    assert torch.equal(test.test.labels, both.test.labels)
    for classes in (both.classes[:1], ("x", *both.classes[1:])):
        with pytest.raises(UserError, match="is not a class that the network was trained on: expected only "):
            build_dataset(config_for(root), alone, test_of=classes)


def test_corrupt_files_are_skipped_if_on_corrupt_is_skip(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree(tmp_path)
    (root / "train" / "bee" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    warnings: list[str] = []
    monkeypatch.setattr(log, "warning", warnings.append)
    for _ in range(2):  # first decoded, then from the cache
        dataset = build_dataset(config_for(root, on_corrupt="skip"), alone)
        assert dataset.train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
        assert torch.equal(
            dataset.train.images[4], torch.tensor(decode(root / "train/bee/0.png", (3, 32, 32))).permute(2, 0, 1)
        )
    assert len(warnings) == 2
    assert all("skipping 1 files" in line and "bee/1.png" in line for line in warnings)
    with pytest.raises(UserError, match=r"bee/1\.png cannot be decoded .*data\.on_corrupt=skip"):
        build_dataset(config_for(root), alone)


def test_a_class_without_a_valid_file_is_rejected_even_with_skip(alone: World, tmp_path: Path) -> None:
    root = write_tree(tmp_path, per_class=1)
    (root / "train" / "bee" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the files of train/bee"):
        build_dataset(config_for(root, on_corrupt="skip"), alone)


def test_a_broken_link_counts_as_a_corrupt_file(alone: World, tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "train" / "bee" / "7.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"bee/7\.png cannot be decoded \(.*No such file or directory\)"):
        build_dataset(config_for(root), alone)
    assert len(build_dataset(config_for(root, on_corrupt="skip"), alone).train) == 12


@pytest.mark.parametrize("num_files", [4, 100])  # decoded by this process, and by workers
def test_a_file_that_cannot_be_read_is_not_skipped(alone: World, tmp_path: Path, num_files: int) -> None:
    root = write_tree(tmp_path, per_class=num_files)
    (root / "train" / "bee" / "7.jpg").symlink_to("/proc/self/mem")  # even root cannot read its first byte
    with pytest.raises(UserError, match=r"bee/7\.jpg cannot be read \(Input/output error\)"):
        build_dataset(config_for(root, on_corrupt="skip"), alone)
    assert entries(root) == []


def test_a_class_folder_that_is_a_broken_link_is_rejected(alone: World, tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "train" / "dog").symlink_to("/not/mounted")
    with pytest.raises(UserError, match="train/dog is a link to /not/mounted, which does not exist"):
        build_dataset(config_for(root), alone)


def test_names_need_not_be_utf8(shell: Shell, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "images")
    for split in ("train", "test"):
        os.rename(root / split / "bee", os.fsencode(root / split) + b"/b\xe9e")
    with open(os.fsencode(root) + b"/train/b\xe9e/\xff.png", "wb") as file:
        file.write(b"no image")
    arguments = ("data.name=imagefolder", f"data.root={root}", f"run_dir={tmp_path / 'run'}", "train.epochs=1")
    sizes = ("train.global_batch_size=12", "train.micro_batch_size=12")
    failed = shell("launch/local.sh", *arguments, *sizes, NPROC_PER_NODE="1")
    assert failed.status == 2
    assert "cannot be decoded" in failed.err.splitlines()[-1]
    assert "Traceback" not in failed.out
    trained = shell(sys.executable, "-m", "ddp_cifar.train", *arguments, *sizes, "data.on_corrupt=skip")
    assert trained.status == 0, trained.err
    assert "Traceback" not in trained.err


def test_images_are_decoded_only_once(alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path)
    first = build_dataset(config_for(root), alone)
    monkeypatch.setattr("ddp_cifar.data.imagefolder.decode_all", None)  # a call would raise
    again = build_dataset(config_for(root), alone)
    assert torch.equal(first.train.images, again.train.images)
    assert first.describe() == again.describe()
    assert len(entries(root)) == 1


@pytest.mark.parametrize(
    "change", ["touched", "other pixels", "added", "removed", "channels", "renamed", "size", "corrupt", "format"]
)
def test_a_change_of_any_input_creates_another_cache(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    root = write_tree(tmp_path)
    before = build_dataset(config_for(root), alone)
    changes: dict[str, Any] = {}
    victim = root / "train" / "cow" / "2.png"
    if change == "touched":
        os.utime(victim, ns=(0, 1))
    elif change == "other pixels":
        Image.new("RGB", (40, 36), RED).save(victim)
    elif change == "added":
        Image.new("RGB", (40, 36), RED).save(victim.with_name("9.png"))
    elif change == "removed":
        victim.unlink()
    elif change == "renamed":
        victim.rename(victim.with_name("9.png"))
    elif change == "size":
        changes = {"image_size": 16}
    elif change == "channels":
        changes = {"channels": 1}
    elif change == "corrupt":
        changes = {"on_corrupt": "skip"}
    elif change == "format":
        monkeypatch.setattr("ddp_cifar.data.imagefolder.FORMAT", FORMAT + 1)
    after = build_dataset(config_for(root, **changes), alone)
    assert len(entries(root)) == 2
    if change == "other pixels":
        assert not torch.equal(before.train.images[10], after.train.images[10])
        assert after.train.images[10, :, 5, 5].tolist() == [255, 0, 0]
    assert len(after.train) == 12 + {"added": 1, "removed": -1}.get(change, 0)


def test_a_copied_tree_keeps_its_cache(alone: World, tmp_path: Path) -> None:
    """The key has no absolute path: a tree may be moved, or mounted elsewhere on another node."""
    root = write_tree(tmp_path / "here")
    build_dataset(config_for(root), alone)
    root.rename(tmp_path / "there")
    build_dataset(config_for(tmp_path / "there"), alone)
    assert len(entries(tmp_path / "there")) == 1


def read_on_a_rank(world: World, root: Path) -> tuple[int, str, bool]:
    dataset = build_dataset(config_for(root), world)
    maps = Path("/proc/self/maps").read_text()
    return int(dataset.train.images.sum()), dataset.describe(), "train.images" in maps


def test_one_rank_decodes_and_all_map_the_same_file(ranks: RankPool, tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    results = ranks.run(read_on_a_rank, 4, root)
    assert len(set(results)) == 1
    assert results[0][2], "the images are not a memory map"
    assert len(entries(root)) == 1


def test_an_error_on_one_rank_is_raised_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "train" / "bee" / "1.png").write_bytes(b"no image")
    assert all("bee/1.png cannot be decoded" in message for message in ranks.run(message_on_a_rank, 2, root))


def message_on_a_rank(world: World, root: Path) -> str:
    try:
        build_dataset(config_for(root), world)
    except UserError as error:
        return str(error)
    return "no error"


PREPARE = (sys.executable, "-m", "ddp_cifar.prepare", "data.name=imagefolder")


def test_concurrent_starts_create_one_cache(tmp_path: Path) -> None:
    root = write_tree(tmp_path, per_class=150)
    started = [
        subprocess.Popen([*PREPARE, f"data.root={root}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert all("450 train, 450 test images of 3 classes" in output for output in outputs)
    assert sum("decoded in" in output for output in outputs) == 1, (
        "one process decodes, the others wait for it or use its result"
    )
    assert [path.name for path in (root / ".cache").iterdir() if "tmp" in path.name] == []
    assert len(entries(root)) == 1


def test_a_start_killed_while_decoding_leaves_no_cache(alone: World, tmp_path: Path) -> None:
    root = write_tree(tmp_path, per_class=400)
    process = subprocess.Popen([*PREPARE, f"data.root={root}"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "decoding" in line:
            break
    process.kill()
    process.wait()
    assert entries(root) == []
    assert len(build_dataset(config_for(root), alone).train) == 1200
    assert not list((root / ".cache").glob(".*tmp*")), "the temporary folder of the killed process still exists"


def test_nested_folders_and_stray_files_are_read_or_reported(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree(tmp_path)
    before = len(build_dataset(config_for(root), alone).train)
    nested = root / "train" / "bee" / "2024" / "may"
    nested.mkdir(parents=True)
    (root / "train" / "bee" / "0.png").rename(nested / "0.png")
    (root / "train" / "stray.png").write_bytes(b"beside the class folders")
    (root / "train" / "bee" / "notes.txt").write_text("no image")
    warnings: list[str] = []
    monkeypatch.setattr(log, "warning", warnings.append)
    assert len(build_dataset(config_for(root), alone).train) == before
    assert warnings == [f"skipping 2 files of train that are not images, such as {root}/train/stray.png"]
