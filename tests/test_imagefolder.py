"""One's own images: every kind of file, the cache, and prepare. One-line mistakes are in test_mistakes.py."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import RankPool
from torchvision import transforms

from ddp_cifar.config import DataConfig
from ddp_cifar.data import build_dataset
from ddp_cifar.data.cache import make_once
from ddp_cifar.data.decode import DecodeError, decode, decode_all
from ddp_cifar.data.imagefolder import FORMAT
from ddp_cifar.distributed import World
from ddp_cifar.errors import UserError
from ddp_cifar.log import log

Shell = Callable[..., Any]
CLASSES = ("ant", "bee", "cow")


def write_tree(root: Path, *, per_class: int = 4, size: tuple[int, int] = (40, 36), seed: int = 0) -> Path:
    """Three classes of random images."""
    random = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = random.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def config_for(root: Path, **changes: Any) -> DataConfig:
    return dataclasses.replace(DataConfig(name="imagefolder", root=str(root)), **changes)


def entries(root: Path) -> list[Path]:
    """The folders of decoded images."""
    return sorted((root / ".cache").glob("imagefolder-*"))


# -- kinds of files

RED, GREEN = (255, 0, 0), (0, 255, 0)


def halves(mode: str, left: Any, right: Any, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """An image of two colours, side by side."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def corners_of(path: Path) -> tuple[list[int], list[int]]:
    """The pixels at the upper left and at the lower right of what `decode` makes of a file."""
    pixels = decode(path, 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    return pixels[1, 1].tolist(), pixels[-2, -2].tolist()


def palette(image: Image.Image) -> Image.Image:
    return image.convert("P", palette=Image.Palette.ADAPTIVE)


def sixteen_bits(left: int, right: int) -> Image.Image:
    values = np.full((32, 32), right, dtype=np.uint16)
    values[:, :16] = left
    return Image.fromarray(values)


KINDS: dict[str, tuple[Image.Image, str, list[int], list[int]]] = {
    "rgb": (halves("RGB", RED, GREEN), "png", [255, 0, 0], [0, 255, 0]),
    "grey": (halves("L", 10, 200), "png", [10] * 3, [200] * 3),
    "one bit": (halves("1", 0, 1), "png", [0] * 3, [255] * 3),
    "palette": (palette(halves("RGB", RED, GREEN)), "png", [255, 0, 0], [0, 255, 0]),
    "animation": (palette(halves("RGB", RED, GREEN)), "gif", [255, 0, 0], [0, 255, 0]),
    "alpha": (halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)), "png", [255, 0, 0], [255, 255, 255]),
    "half transparent": (halves("RGBA", (0, 0, 0, 128), (0, 0, 0, 255)), "png", [127] * 3, [0] * 3),
    "grey with alpha": (halves("LA", (10, 255), (10, 0)), "png", [10] * 3, [255] * 3),
    "cmyk": (halves("CMYK", (0, 255, 255, 0), (255, 0, 255, 0)), "tif", [255, 0, 0], [0, 255, 0]),
    "16 bits": (sixteen_bits(0x0A80, 0xC8FF), "png", [0x0A] * 3, [0xC8] * 3),
    "16 bits tiff": (sixteen_bits(0x0A80, 0xC8FF), "tif", [0x0A] * 3, [0xC8] * 3),
    "webp": (halves("RGB", (128, 128, 128), (128, 128, 128)), "webp", [128] * 3, [128] * 3),
    "portrait": (halves("RGB", RED, GREEN, (32, 50)), "png", [255, 0, 0], [0, 255, 0]),
    "landscape": (halves("RGB", RED, GREEN, (100, 64)), "png", [255, 0, 0], [0, 255, 0]),
    "smaller": (halves("RGB", RED, GREEN, (8, 8)), "png", [255, 0, 0], [0, 255, 0]),
    "one row": (Image.new("RGB", (300, 1), RED), "png", [255, 0, 0], [255, 0, 0]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_comes_out_right(tmp_path: Path, kind: str) -> None:
    image, suffix, left, right = KINDS[kind]
    image.save(path := tmp_path / f"image.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert corners_of(path) == (left, right)


def test_a_palette_with_a_transparent_colour_is_laid_on_white(tmp_path: Path) -> None:
    image = palette(halves("RGB", RED, GREEN))
    image.save(path := tmp_path / "image.png", transparency=image.getpixel((0, 0)))
    assert corners_of(path) == ([255, 255, 255], [0, 255, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_as_its_exif_data_say(tmp_path: Path, orientation: int) -> None:
    """Each file shows red over green once it is turned."""
    upright = halves("RGB", RED, GREEN, (64, 48)).transpose(Image.Transpose.ROTATE_270)  # red above
    turn_back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that makes the file from the upright one
    stored = upright.transpose(Image.Transpose(turn_back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path := tmp_path / "image.jpg", exif=exif, quality=95, subsampling=0)
    pixels = decode(path, 32).astype(int)
    above, below = pixels[2, 16], pixels[-3, 16]
    assert above[0] > 200 > 60 > above[1]
    assert below[1] > 200 > 60 > below[0]


@pytest.mark.parametrize("size", [(32, 32), (80, 50), (50, 80), (20, 24), (333, 200)])
def test_it_is_torchvisions_resize_and_centre_crop(tmp_path: Path, size: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.linspace(0, 4, size[0]), np.linspace(0, 3, size[1]))
    smooth = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x * y / 3)], axis=2)
    image = Image.fromarray(((smooth + 1) * 127).astype(np.uint8))
    image.save(path := tmp_path / "image.png")
    theirs = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])(image)
    difference = np.abs(decode(path, 32).astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= (0 if size == (32, 32) else 12), "they cut at a whole pixel, we need not"
    assert difference.mean() <= 3


def test_a_large_jpeg_is_as_good_from_a_reduced_decoding(tmp_path: Path) -> None:
    x, y = np.meshgrid(np.linspace(0, 9, 900), np.linspace(0, 5, 700))
    smooth = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x)], axis=2)
    image = Image.fromarray(((smooth + 1) * 127).astype(np.uint8))
    image.save(tmp_path / "image.jpg", quality=95)
    image.save(tmp_path / "image.png")
    difference = np.abs(decode(tmp_path / "image.jpg", 32).astype(int) - decode(tmp_path / "image.png", 32).astype(int))
    assert difference.mean() <= 2


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 200_000)])
def test_numbers_of_an_unknown_range_are_refused(tmp_path: Path, mode: str, value: float) -> None:
    Image.new(mode, (32, 32), value).save(path := tmp_path / "image.tif")
    with pytest.raises(DecodeError, match="32 bits, whose range is not known"):
        decode(path, 32)


def test_an_image_may_be_larger_than_what_pillow_takes_for_an_attack(tmp_path: Path) -> None:
    Image.new("L", (14_000, 13_000), 128).save(path := tmp_path / "image.jpg")
    assert corners_of(path) == ([128] * 3, [128] * 3)


def test_several_processes_give_what_one_gives_in_order(tmp_path: Path) -> None:
    root = write_tree(tmp_path, per_class=60)
    (root / "train" / "bee" / "7.png").write_bytes(b"no image")
    paths = sorted((root / "train").glob("*/*.png"))
    alone = list(decode_all(paths, 32, num_workers=1))
    assert list(decode_all(paths, 32, num_workers=3)) == alone
    assert [type(decoded) for decoded in alone].count(str) == 1


def test_a_worker_that_is_killed_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    paths = sorted((write_tree(tmp_path, per_class=100, size=(100, 100)) / "train").glob("*/*.png"))
    decoded = decode_all(paths, 32, num_workers=2)
    next(decoded)
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if "decode.py" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a process that decoded .*png ended"):
        list(decoded)


# -- a tree


def test_a_folder_of_images_is_read_as_it_is(alone: World, tmp_path: Path) -> None:
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


def test_three_classes_of_other_sizes_train(train: Callable[..., Any], tmp_path: Path) -> None:
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


def test_held_out_images_can_stand_in_for_a_test_folder(alone: World, tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "test").rename(root / "elsewhere")
    dataset = build_dataset(config_for(root, val_images=3), alone)
    assert dataset.test is None
    assert dataset.val is not None
    assert (len(dataset.train), len(dataset.val)) == (9, 3)


def test_corrupt_files_are_skipped_where_that_is_asked_for(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree(tmp_path)
    (root / "train" / "bee" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    warnings: list[str] = []
    monkeypatch.setattr(log, "warning", warnings.append)
    for _ in range(2):  # as it is decoded, and from the cache
        dataset = build_dataset(config_for(root, on_corrupt="skip"), alone)
        assert dataset.train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
        assert torch.equal(dataset.train.images[4], torch.tensor(decode(root / "train/bee/0.png", 32)).permute(2, 0, 1))
    assert len(warnings) == 2
    assert all("1 files are left out" in line and "bee/1.png" in line for line in warnings)
    with pytest.raises(UserError, match=r"bee/1\.png cannot be decoded .*data\.on_corrupt=skip"):
        build_dataset(config_for(root), alone)


def test_a_class_without_a_good_file_is_refused_even_so(alone: World, tmp_path: Path) -> None:
    root = write_tree(tmp_path, per_class=1)
    (root / "train" / "bee" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the files of train/bee"):
        build_dataset(config_for(root, on_corrupt="skip"), alone)


def test_a_link_to_nowhere_is_as_a_corrupt_file(alone: World, tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "train" / "bee" / "7.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"bee/7\.png cannot be decoded \(.*No such file or directory\)"):
        build_dataset(config_for(root), alone)
    assert len(build_dataset(config_for(root, on_corrupt="skip"), alone).train) == 12


@pytest.mark.parametrize("num_files", [4, 100])  # decoded by this process, and by others
def test_a_file_that_cannot_be_read_is_not_skipped(alone: World, tmp_path: Path, num_files: int) -> None:
    root = write_tree(tmp_path, per_class=num_files)
    (root / "train" / "bee" / "7.jpg").mkdir()  # even root cannot read it
    with pytest.raises(UserError, match=r"bee/7\.jpg cannot be read \(Is a directory\)"):
        build_dataset(config_for(root, on_corrupt="skip"), alone)
    assert entries(root) == []


def test_a_class_folder_that_leads_nowhere_is_refused(alone: World, tmp_path: Path) -> None:
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
    refused = shell("launch/local.sh", *arguments, *sizes, NPROC_PER_NODE="1")
    assert refused.status == 2
    assert "cannot be decoded" in refused.err.splitlines()[-1]
    assert "Traceback" not in refused.out
    trained = shell(sys.executable, "-m", "ddp_cifar.train", *arguments, *sizes, "data.on_corrupt=skip")
    assert trained.status == 0, trained.err
    assert "Traceback" not in trained.err


# -- the cache


def test_images_are_decoded_once(alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path)
    first = build_dataset(config_for(root), alone)
    monkeypatch.setattr("ddp_cifar.data.imagefolder.decode_all", None)  # a call would raise
    again = build_dataset(config_for(root), alone)
    assert torch.equal(first.train.images, again.train.images)
    assert first.describe() == again.describe()
    assert len(entries(root)) == 1


@pytest.mark.parametrize(
    "change", ["touched", "other pixels", "added", "removed", "renamed", "size", "corrupt", "format"]
)
def test_whatever_the_images_depend_on_makes_another_cache(
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
    """The key has no absolute path: a tree may be moved, or seen elsewhere on another node."""
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


def test_what_one_rank_finds_wrong_every_rank_raises(ranks: RankPool, tmp_path: Path) -> None:
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


def test_two_starts_at_once_make_one_cache(tmp_path: Path) -> None:
    root = write_tree(tmp_path, per_class=150)
    started = [
        subprocess.Popen([*PREPARE, f"data.root={root}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert all("450 train, 450 test images of 3 classes" in output for output in outputs)
    assert sum("decoded in" in output for output in outputs) == 1, "one decodes, the others wait or find it"
    assert [path.name for path in (root / ".cache").iterdir() if "tmp" in path.name] == []
    assert len(entries(root)) == 1


def test_a_start_that_is_killed_leaves_nothing_that_another_would_take(alone: World, tmp_path: Path) -> None:
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
    assert not list((root / ".cache").glob(".*tmp*")), "what the killed one left is not cleared away"


def test_what_another_host_is_making_is_left_alone(tmp_path: Path) -> None:
    """Some cluster file systems' locks hold within a host only."""
    (tmp_path / ".made.tmp-another-host-17").mkdir()
    make_once(tmp_path / "made", lambda temporary: None)
    assert (tmp_path / ".made.tmp-another-host-17").is_dir()


def test_decoding_waits_for_who_takes_the_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a slow disk would let all images pile up in memory."""
    monkeypatch.setattr("ddp_cifar.data.decode.CHUNK_FILES", 1)
    paths = sorted((write_tree(tmp_path, per_class=20) / "train").glob("*/*.png"))
    submitted = []
    submit = ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *arguments: submitted.append(1) or submit(*arguments))
    decoded = decode_all(paths, 32, num_workers=2)
    next(decoded)
    assert len(submitted) == 4
    assert len(list(decoded)) == 59


def test_without_locks_two_that_make_it_end_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system without flock: the second finds the first one's result when it is done."""
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = tmp_path / "made"

    def make(temporary: Path) -> None:
        (temporary / "content").write_text("ours")
        folder.mkdir()
        (folder / "content").write_text("theirs")

    make_once(folder, make)
    assert (folder / "content").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


# -- prepare


def test_prepare_under_torchrun_then_training_decodes_nothing(shell: Shell, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "images")
    cache = tmp_path / "elsewhere"
    keys = ("data.name=imagefolder", f"data.root={root}", f"data.cache={cache}")
    prepared = shell("torchrun", "--standalone", "--nproc_per_node=2", "-m", "ddp_cifar.prepare", *keys)
    assert prepared.status == 0, prepared.err
    assert prepared.out.count("decoded in") == 1
    assert "imagefolder is ready: 12 train, 12 test images of 3 classes" in prepared.out
    assert not (root / ".cache").exists()

    sizes = ("train.global_batch_size=12", "train.micro_batch_size=6", "train.epochs=1", f"run_dir={tmp_path / 'run'}")
    trained = shell("torchrun", "--standalone", "--nproc_per_node=2", "-m", "ddp_cifar.train", *keys, *sizes)
    assert trained.status == 0, trained.err
    assert "decod" not in trained.out


def test_prepare_takes_a_recipe(shell: Shell) -> None:
    done = shell(sys.executable, "-m", "ddp_cifar.prepare", "configs/demo.yaml", "data.shapes.train_images=100")
    assert done.status == 0, done.err
    assert "shapes is ready: 100 train" in done.out
