"""`train --dry-run`: what it says is what a run then does, and what it refuses a run would refuse."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import config_of
from PIL import Image
from test_mistakes import TINY, one_line

from ddp_cifar.data import build_dataset, outline_dataset
from ddp_cifar.distributed import World

Train = Callable[..., Any]


def look(train: Train, *arguments: str) -> dict[str, str]:
    outcome = train("--dry-run", *arguments)
    assert outcome.status == 0, outcome
    return {name.strip(): text for name, text in re.findall(r"^(.{14}) (.*)$", outcome.out, re.MULTILINE)}


def images_in(folder: Path) -> Path:
    for split, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20 + i, 12), (i, 0, 9)).save(folder / split / name / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("data.name=shapes", "data.shapes.train_images=50", "data.shapes.test_images=20", "data.val_images=7"),
        ("data.name=imagefolder", "data.image_size=16"),
        ("data.name=imagefolder", "data.val_images=3"),
    ],
)
def test_an_outline_has_the_shape_of_the_data(alone: World, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    config = config_of(*arguments, f"data.root={images_in(tmp_path / 'images')}").data
    outline = outline_dataset(config, alone)
    assert not (tmp_path / "images" / ".cache").exists()
    dataset = build_dataset(config, alone)
    for name in ("train", "val", "test"):
        expected, found = getattr(dataset, name), getattr(outline, name)
        assert (expected is None) == (found is None)
        if expected:
            assert (len(found), found.images.shape) == (len(expected), expected.images.shape)
            assert found.images.device.type == "meta"
    assert outline.classes == dataset.classes


def test_cifar10_is_outlined_without_being_there(train: Train, tmp_path: Path) -> None:
    root = f"data.root={tmp_path}"
    outcome = train("--dry-run", "--nodes", "2", "--nproc-per-node=4", root, f"run_dir={tmp_path / 'run'}")
    assert "CIFAR-10 is not in data.root=" in outcome.err
    assert "python -m ddp_cifar.prepare has it there beforehand" in outcome.err
    assert "50,000 train, 10,000 test images of 10 classes, 32 x 32 pixels" in outcome.out
    assert "5,852,170 parameters" in outcome.out
    assert "8 (2 nodes x 4)" in outcome.out
    assert "512 images a step = 8 ranks x 64 images, 98 steps an epoch of 50000 images" in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more",
    [(), ("optim.name=sgd", "train.ema_decay=0.9"), ("optim.name=torch.optim:RMSprop", "model.name=resnet9")],
)
def test_a_checkpoint_has_the_size_that_was_foretold(train: Train, tmp_path: Path, more: tuple[str, ...]) -> None:
    arguments = (*TINY, *more, f"run_dir={tmp_path / 'run'}")
    foretold = look(train, *arguments)
    assert "(new)" in foretold["run_dir"]
    done = train(*arguments)
    assert done.status == 0
    assert foretold["a step"] in done.out, "the plan is the run's"
    size = os.path.getsize(tmp_path / "run" / "checkpoints" / "latest.pt") / 1e6
    assert float(foretold["a checkpoint"].split()[0]) == pytest.approx(size, rel=0.01)
    assert "(finished: epoch 1, step 2" in look(train, *arguments)["run_dir"]
    assert "(goes on from epoch 1, step 2" in look(train, *arguments, "train.epochs=3")["run_dir"]


def test_memory_is_the_sum_of_what_a_rank_holds(train: Train) -> None:
    """By hand: four bytes a number, of the weights, their gradients and Adam's two moments; and the images."""
    said = look(train, *TINY)["memory a rank"]
    total, state, activations, images = (int(number) for number in re.findall(r"(\d+) MB", said))
    assert state == pytest.approx(4 * 4 * 5_852_170 / 1e6, abs=1)
    assert images == 0
    assert total == pytest.approx(state + activations, abs=1)
    twice = look(train, *TINY, "train.micro_batch_size=32")["memory a rank"]
    # what autograd keeps grows with the images, but for the weights in bf16 that it keeps once
    assert activations < int(re.findall(r"(\d+) MB", twice)[2]) < 2 * activations


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--nodes=0",), ("--nodes 0 is out of range",)),
        (("--nproc-per-node", "x"), ("argument --nproc-per-node/--nproc_per_node: invalid int value: 'x'",)),
        (("--ndoes=2",), ("unrecognized arguments: --ndoes=2", "--help lists")),
        (("--nodes=3",), ("2 micro-batches of 16 images", "3 ranks")),
        (("optim.lrr=1",), ("optim.lrr", "did you mean optim.lr?")),
        (("model.args.width=1",), ("model.args", "does not take")),
        (("optim.name=torch.optim:RMSprop", "optim.args.alfa=1"), ("optim.name=torch.optim:RMSprop", "alfa")),
        (("model.init=nowhere.pt",), ("model.init=nowhere.pt does not exist",)),
        (("data.name=imagefolder", "data.root=nowhere"), ("needs the folder nowhere/train",)),
        (("data.image_size=64",), ("data.image_size=64", "32 x 32")),
    ],
)
def test_what_a_run_would_refuse(
    train: Train, tmp_path: Path, arguments: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    one_line(train("--dry-run", *TINY, f"run_dir={tmp_path / 'run'}", *arguments), *expected)
    assert not (tmp_path / "run").exists()


def test_a_resume_that_would_be_refused(train: Train, tmp_path: Path) -> None:
    arguments = (*TINY, f"run_dir={tmp_path / 'run'}")
    assert train(*arguments).status == 0
    one_line(train("--dry-run", *arguments, "optim.lr=0.5"), "optim.lr=", "now 0.5", "another run_dir")


def test_it_is_for_one_process(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    one_line(train("--dry-run", *TINY), "--dry-run runs on one process, found 2")
    assert not torch.distributed.is_initialized()
