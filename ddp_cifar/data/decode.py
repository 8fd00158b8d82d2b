"""One image file as pixels: whatever its size, mode and turn, an upright RGB square comes out."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"}


class DecodeError(ValueError):
    """A file is not an image that can be used; the message says why."""


def decode(path: Path, image_size: int) -> NDArray[np.uint8]:
    """(image_size, image_size, 3): the short side is scaled to `image_size`, and the middle kept.

    Turned as its EXIF data says; 16-bit greys are scaled to 8 bits; transparent parts become white; of an animation it is
    the first picture. Raises `DecodeError` if the file cannot be decoded, or holds floating-point numbers.
    """
    try:
        with Image.open(path) as image:
            # a large JPEG is decoded at a half, quarter or eighth of its size, still twice what is needed
            image.draft(None, (2 * image_size, 2 * image_size))
            upright = _to_rgb(ImageOps.exif_transpose(image))
            side = min(upright.size)
            left, top = (upright.width - side) / 2, (upright.height - side) / 2
            square = (left, top, left + side, top + side)
            return np.asarray(upright.resize((image_size, image_size), Image.Resampling.BILINEAR, box=square))
    except DecodeError:
        raise
    except Exception as error:  # a decoder may raise anything for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Pillow says "cannot identify image file PATH"; the path is in front already
        raise DecodeError(reason.replace(f" {str(path)!r}", "")) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DecodeError("it holds floating-point numbers, whose range is not known")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion would cut them off at 255
        values: NDArray[Any] = np.asarray(image)
        return Image.fromarray((values // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        on_white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(on_white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
