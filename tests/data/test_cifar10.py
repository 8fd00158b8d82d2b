"""CIFAR-10 as torchvision stores it."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ddp_cifar.config import DataConfig
from ddp_cifar.data import build_dataset
from ddp_cifar.distributed.world import World


def test_cifar10_is_read_from_disk_by_torchvision(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in the real format with a few random images each. Their checksums replace those of the real files."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, calculate_md5(str(folder / name))]

    def batch() -> dict[str, object]:
        return {"data": random.integers(256, size=(4, 3072), dtype=np.uint8), "labels": [0, 3, 9, 1]}

    names = [[name for name, _ in files] for files in (CIFAR10.train_list, CIFAR10.test_list)]
    monkeypatch.setattr(CIFAR10, "train_list", [write(name, batch()) for name in names[0]])
    first = batch()
    monkeypatch.setattr(CIFAR10, "test_list", [write(name, first) for name in names[1]])
    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})

    dataset = build_dataset(DataConfig(name="cifar10", root=str(tmp_path)), alone)
    assert len(dataset.train) == 20
    assert dataset.test.labels.tolist() == [0, 3, 9, 1]
    pixels = torch.from_numpy(np.array(first["data"])).view(4, 3, 32, 32)
    assert torch.equal(dataset.test.images, pixels)
