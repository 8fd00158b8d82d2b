"""Image files of all kinds become upright RGB squares."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import write_tree
from PIL import Image
from torchvision import transforms

from ddp_cifar.data.dataset import to_grayscale
from ddp_cifar.data.decode import DecodeError, decode, decode_all

RED, GREEN = (255, 0, 0), (0, 255, 0)


SHAPE = (3, 32, 32)


def halves(mode: str, left: Any, right: Any, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """An image with two colors side by side."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def corners_of(path: Path) -> tuple[list[int], list[int]]:
    """The upper left and the lower right pixel of the decoded file."""
    pixels = decode(path, SHAPE)
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
    "grayscale": (halves("L", 10, 200), "png", [10] * 3, [200] * 3),
    "one bit": (halves("1", 0, 1), "png", [0] * 3, [255] * 3),
    "palette": (palette(halves("RGB", RED, GREEN)), "png", [255, 0, 0], [0, 255, 0]),
    "animation": (palette(halves("RGB", RED, GREEN)), "gif", [255, 0, 0], [0, 255, 0]),
    "alpha": (halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)), "png", [255, 0, 0], [255, 255, 255]),
    "half transparent": (halves("RGBA", (0, 0, 0, 128), (0, 0, 0, 255)), "png", [127] * 3, [0] * 3),
    "grayscale with alpha": (halves("LA", (10, 255), (10, 0)), "png", [10] * 3, [255] * 3),
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
def test_every_kind_of_file_is_decoded_correctly(tmp_path: Path, kind: str) -> None:
    image, suffix, left, right = KINDS[kind]
    image.save(path := tmp_path / f"image.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert corners_of(path) == (left, right)


def test_a_transparent_palette_color_becomes_white(tmp_path: Path) -> None:
    image = palette(halves("RGB", RED, GREEN))
    image.save(path := tmp_path / "image.png", transparency=image.getpixel((0, 0)))
    assert corners_of(path) == ([255, 255, 255], [0, 255, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_rotated_according_to_its_exif_data(tmp_path: Path, orientation: int) -> None:
    """Each file shows red above green after the rotation."""
    upright = halves("RGB", RED, GREEN, (64, 48)).transpose(Image.Transpose.ROTATE_270)  # red on top
    turn_back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Image.Transpose from the upright image to the file
    stored = upright.transpose(Image.Transpose(turn_back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path := tmp_path / "image.jpg", exif=exif, quality=95, subsampling=0)
    pixels = decode(path, SHAPE).astype(int)
    above, below = pixels[2, 16], pixels[-3, 16]
    assert above[0] > 200 > 60 > above[1]
    assert below[1] > 200 > 60 > below[0]


def test_a_center_of_another_aspect_is_cropped_from_a_tall_and_a_wide_image(tmp_path: Path) -> None:
    for size, blue in (((64, 200), (0, 50, 64, 150)), ((300, 100), (118, 0, 182, 100))):
        image = Image.new("RGB", size, "red")
        image.paste("blue", blue)  # all but a border of the crop
        image.save(path := tmp_path / f"{size[0]}.png")
        pixels = decode(path, (3, 50, 32))
        assert pixels.shape == (50, 32, 3)
        assert pixels[2:-2, 2:-2].reshape(-1, 3).tolist() == [[0, 0, 255]] * (46 * 28)


def test_grayscale_pixels_are_those_of_pillow(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(path := tmp_path / "image.png")
    expected = np.asarray(image.convert("L"))
    assert np.array_equal(decode(path, (1, 32, 32))[..., 0], expected)
    ours = to_grayscale(torch.tensor(pixels).permute(2, 0, 1).unsqueeze(0))
    assert np.array_equal(ours[0, 0].numpy(), expected)


@pytest.mark.parametrize("size", [(32, 32), (80, 50), (50, 80), (20, 24), (333, 200)])
def test_decoding_matches_torchvisions_resize_and_center_crop(tmp_path: Path, size: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.linspace(0, 4, size[0]), np.linspace(0, 3, size[1]))
    smooth = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x * y / 3)], axis=2)
    image = Image.fromarray(((smooth + 1) * 127).astype(np.uint8))
    image.save(path := tmp_path / "image.png")
    theirs = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])(image)
    difference = np.abs(decode(path, SHAPE).astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= (0 if size == (32, 32) else 12), "torchvision crops at whole pixels, decode does not"
    assert difference.mean() <= 3


def test_reduced_decoding_of_a_large_jpeg_keeps_its_quality(tmp_path: Path) -> None:
    x, y = np.meshgrid(np.linspace(0, 9, 900), np.linspace(0, 5, 700))
    smooth = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x)], axis=2)
    image = Image.fromarray(((smooth + 1) * 127).astype(np.uint8))
    image.save(tmp_path / "image.jpg", quality=95)
    image.save(tmp_path / "image.png")
    difference = np.abs(
        decode(tmp_path / "image.jpg", SHAPE).astype(int) - decode(tmp_path / "image.png", SHAPE).astype(int)
    )
    assert difference.mean() <= 2


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 200_000)])
def test_values_of_unknown_range_are_rejected(tmp_path: Path, mode: str, value: float) -> None:
    Image.new(mode, (32, 32), value).save(path := tmp_path / "image.tif")
    with pytest.raises(DecodeError, match="32-bit values of unknown range"):
        decode(path, SHAPE)


def test_an_image_may_exceed_pillows_size_limit(tmp_path: Path) -> None:
    Image.new("L", (14_000, 13_000), 128).save(path := tmp_path / "image.jpg")
    assert corners_of(path) == ([128] * 3, [128] * 3)


def test_several_processes_give_the_same_results_in_the_same_order_as_one(tmp_path: Path) -> None:
    root = write_tree(tmp_path, per_class=60)
    (root / "train" / "bee" / "7.png").write_bytes(b"no image")
    paths = sorted((root / "train").glob("*/*.png"))
    alone = list(decode_all(paths, SHAPE, num_workers=1))
    assert list(decode_all(paths, SHAPE, num_workers=3)) == alone
    assert [type(decoded) for decoded in alone].count(str) == 1


def test_a_killed_worker_raises_an_error_instead_of_blocking(tmp_path: Path) -> None:
    paths = sorted((write_tree(tmp_path, per_class=100, size=(100, 100)) / "train").glob("*/*.png"))
    decoded = decode_all(paths, SHAPE, num_workers=2)
    next(decoded)
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if "decode.py" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a worker process exited while decoding .*png"):
        list(decoded)


def test_decoding_waits_for_its_consumer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, with a slow disk, all images would accumulate in memory."""
    monkeypatch.setattr("ddp_cifar.data.decode.CHUNK_FILES", 1)
    paths = sorted((write_tree(tmp_path, per_class=20) / "train").glob("*/*.png"))
    submitted = []
    submit = ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *arguments: submitted.append(1) or submit(*arguments))
    decoded = decode_all(paths, SHAPE, num_workers=2)
    next(decoded)
    assert len(submitted) == 4
    assert len(list(decoded)) == 59
