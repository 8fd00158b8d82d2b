"""Folders of images for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cow")


def write_tree(root: Path, *, per_class: int = 4, size: tuple[int, int] = (40, 36), seed: int = 0) -> Path:
    """Write three classes of random images."""
    random = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = random.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
