"""`train --dry-run`: its description matches the run, and it rejects what a run would reject."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import config_of
from launched import CHECKOUT
from PIL import Image
from test_mistakes import TINY, one_line

from ddp_cifar.data import build_dataset, dataset_metadata
from ddp_cifar.distributed.world import World

Train = Callable[..., Any]


def dry_run(train: Train, *arguments: str) -> dict[str, str]:
    outcome = train("--dry-run", *arguments)
    assert outcome.status == 0, outcome
    return {name.strip(): text for name, text in re.findall(r"^(.{15}) (.*)$", outcome.out, re.MULTILINE)}


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
def test_dataset_metadata_has_the_shape_of_the_data(alone: World, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    config = config_of(*arguments, f"data.root={images_in(tmp_path / 'images')}").data
    metadata = dataset_metadata(config, alone)
    assert not (tmp_path / "images" / ".cache").exists()
    dataset = build_dataset(config, alone)
    for name in ("train", "val", "test"):
        expected, found = getattr(dataset, name), getattr(metadata, name)
        assert (expected is None) == (found is None)
        if expected:
            assert (len(found), found.images.shape) == (len(expected), expected.images.shape)
            assert found.images.device.type == "meta"
    assert metadata.classes == dataset.classes


def test_cifar10_is_described_without_a_download(train: Train, tmp_path: Path) -> None:
    root = f"data.root={tmp_path}"
    outcome = train("--dry-run", "--nodes", "2", "--nproc-per-node=4", root, f"run_dir={tmp_path / 'run'}")
    assert "CIFAR-10 is not in data.root=" in outcome.err
    assert "to download it now, run python -m ddp_cifar.prepare" in outcome.err
    assert "50,000 train, 10,000 test images of 10 classes, 32 x 32 pixels" in outcome.out
    assert "5,852,170 parameters" in outcome.out
    assert "8 (2 nodes x 4)" in outcome.out
    assert (
        "512 images per step = 8 ranks x 1 micro-batch of 64 images; 98 steps per epoch of 50000 images" in outcome.out
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("optim.name=sgd", "train.ema_decay=0.9", "model.freeze=[conv_layer.*]"),
        ("optim.name=torch.optim:RMSprop", "model.name=resnet9"),
    ],
)
def test_a_checkpoint_has_the_predicted_size(train: Train, tmp_path: Path, more: tuple[str, ...]) -> None:
    arguments = (*TINY, *more, f"run_dir={tmp_path / 'run'}")
    predicted = dry_run(train, *arguments)
    assert "(new)" in predicted["run_dir"]
    done = train(*arguments)
    assert done.status == 0
    assert predicted["step"] in done.out, "the run has the same plan"
    size = os.path.getsize(tmp_path / "run" / "checkpoints" / "latest.pt") / 1e6
    assert float(predicted["checkpoint"].split()[0]) == pytest.approx(size, rel=0.01)
    assert "(finished: epoch 1, step 2" in dry_run(train, *arguments)["run_dir"]
    assert "(resumes from epoch 1, step 2" in dry_run(train, *arguments, "train.epochs=3")["run_dir"]


def test_memory_per_rank_is_the_sum_of_its_parts(train: Train) -> None:
    """Computed by hand: four bytes per number for weights, gradients and Adam's two moments; plus the images."""
    text = dry_run(train, *TINY)["memory per rank"]
    total, state, activations, images = (int(number) for number in re.findall(r"(\d+) MB", text))
    assert state == pytest.approx(4 * 4 * 5_852_170 / 1e6, abs=1)
    assert images == 0
    assert total == pytest.approx(state + activations, abs=1)
    twice = dry_run(train, *TINY, "train.micro_batch_size=32")["memory per rank"]
    # the tensors that autograd keeps grow with the images, except for the bf16 copy of the weights
    assert activations < int(re.findall(r"(\d+) MB", twice)[2]) < 2 * activations


def test_frozen_parameters_groups_and_an_early_end_are_described(train: Train) -> None:
    groups = "optim.groups=[{match: fc_layer.6.*, lr_factor: 10, weight_decay: 0.5}]"
    early = ("data.val_images=8", "train.patience_epochs=2")
    lines = dry_run(train, *TINY, "model.freeze=[conv_layer.*]", groups, *early)
    assert "frozen: 1,126,912 of 5,852,170 parameters, and the statistics of 3 BatchNorm layers" in lines["model"]
    first, second = lines["optimizer"].split("; ")
    assert first == "adam: 4,720,128 parameters with lr 0.001, weight decay 0"
    assert second == "5,130 parameters with lr 0.01, weight decay 0.5"
    assert lines["total"] == "1 epochs, 2 steps, or 2 epochs without a better validation accuracy"


SIZES = [(1, 1), (1, 3), (1, 8), (2, 4), (4, 8), (8, 8)]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CHECKOUT / "configs").glob("*.yaml")))
def test_every_recipe_works_on_any_number_of_ranks(train: Train, tmp_path: Path, recipe: str) -> None:
    for nodes, ranks in SIZES:
        lines = dry_run(
            train, f"--nodes={nodes}", f"--nproc-per-node={ranks}", f"configs/{recipe}.yaml", f"run_dir={tmp_path}"
        )
        assert f"= {nodes * ranks} rank" in lines["step"]


def test_with_more_ranks_than_micro_batches_there_is_advice_on_batchnorm_and_equal_results(
    train: Train, tmp_path: Path
) -> None:
    arguments = ("--nproc-per-node=4", *TINY, f"run_dir={tmp_path / 'run'}")
    out = train("--dry-run", *arguments).out
    assert "BatchNorm now sees 8 images per micro-batch, and results differ from those on 1 to 2 ranks" in out
    assert "With train.micro_batch_size=8 results are the same on 1 to 4 ranks" in out
    assert "images per GPU" not in out, "the run is on the CPU"
    out = train("--dry-run", *arguments, "device=auto").out
    assert "8 images per GPU and step are too few" in out
    out = train("--dry-run", *arguments, "train.micro_batch_size=7").out
    assert (
        "4 ranks have 1 to 2 of 5 micro-batches each, and a rank waits for 38% of a step on average: train.micro_batch_size=4"
        in out
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--nodes=0",), ("--nodes 0 is out of range",)),
        (("--nproc-per-node", "x"), ("argument --nproc-per-node/--nproc_per_node: invalid int value: 'x'",)),
        (("--ndoes=2",), ("unrecognized arguments: --ndoes=2", "--help lists")),
        (("--nodes=33",), ("train.global_batch_size=32", "ranks (33)", "at most 32 ranks")),
        (
            ("train.reproducible=true", "--nodes=3"),
            ("supports at most 2 ranks, found 3", "train.micro_batch_size=11 or less"),
        ),
        (
            ("data.shapes.train_images=66", "model.name=torchvision", "model.args.name=resnet18"),
            ("model.name=torchvision cannot train on one image", "use train.global_batch_size=31"),
        ),
        (("optim.lrr=1",), ("optim.lrr", "did you mean optim.lr?")),
        (("model.args.width=1",), ("model.args", "width")),
        (("optim.name=torch.optim:RMSprop", "optim.args.alfa=1"), ("optim.name=torch.optim:RMSprop", "alfa")),
        (("model.init=nowhere.pt",), ("model.init=nowhere.pt does not exist",)),
        (("data.name=imagefolder", "data.root=nowhere"), ("the folder nowhere/train does not exist",)),
        (("data.image_size=64",), ("data.image_size=64", "32 x 32")),
        (("train.class_weights=[1,2]",), ("train.class_weights has 2 numbers", "10 classes")),
        (("data.channels=1", "data.mean=imagenet"), ("data.mean=imagenet has 3 values", "1 channels")),
    ],
)
def test_a_user_error_of_the_run_is_found(
    train: Train, tmp_path: Path, arguments: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    one_line(train("--dry-run", *TINY, f"run_dir={tmp_path / 'run'}", *arguments), *expected)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_needs_a_gpu_is_accepted_unless_the_run_is_on_the_cpu(train: Train, tmp_path: Path) -> None:
    arguments = (*TINY, f"run_dir={tmp_path / 'run'}", "optim.implementation=capturable")
    assert dry_run(train, *arguments, "device=cuda")["optimizer"].startswith("adam")
    one_line(train("--dry-run", *arguments, "device=cpu"), "optim.implementation=capturable needs a GPU")


def test_images_that_stay_on_the_host_are_not_counted_as_memory_of_the_gpu(train: Train, tmp_path: Path) -> None:
    arguments = (*TINY, f"run_dir={tmp_path / 'run'}", "data.residency=host")
    assert dry_run(train, *arguments, "device=cuda")["memory per rank"].endswith("images 0 MB (data.residency=host)")
    assert not dry_run(train, *arguments, "device=cpu")["memory per rank"].endswith("(data.residency=host)")


def test_a_resume_with_other_settings_is_rejected(train: Train, tmp_path: Path) -> None:
    arguments = (*TINY, f"run_dir={tmp_path / 'run'}")
    assert train(*arguments).status == 0
    one_line(train("--dry-run", *arguments, "optim.lr=0.5"), "optim.lr=", "now 0.5", "another run_dir")


def test_the_dry_run_rejects_torchrun(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    one_line(train("--dry-run", *TINY), "--dry-run runs on one process, found 2")
    assert not torch.distributed.is_initialized()
