"""`python -m ddp_cifar.prepare` prepares data before a run."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from image_folders import write_tree

Shell = Callable[..., Any]


def test_training_decodes_nothing_after_prepare_under_torchrun(shell: Shell, tmp_path: Path) -> None:
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
    assert not re.search(r"\b(decoding|decoded) ", trained.out)


def test_prepare_accepts_a_recipe(shell: Shell) -> None:
    done = shell(sys.executable, "-m", "ddp_cifar.prepare", "configs/demo.yaml", "data.shapes.train_images=100")
    assert done.status == 0, done.err
    assert "shapes is ready: 100 train" in done.out
