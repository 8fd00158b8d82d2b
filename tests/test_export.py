"""`export` in this process. test_use.py runs it as a user would."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import config_of, run_on, save_untrained
from image_folders import write_tree
from safetensors import safe_open

from ddp_cifar.data.normalization import VALUES
from ddp_cifar.distributed.world import World
from ddp_cifar.inference import formats, load_trained
from ddp_cifar.log import log
from ddp_cifar.run.checkpoint_file import load_checkpoint, save_checkpoint
from ddp_cifar.run.resume import load_init
from ddp_cifar.training.build import build_trainer

SHAPES = ("data.name=shapes", "data.shapes.train_images=40", "data.shapes.test_images=12")


def test_safetensors_have_the_averaged_weights_and_start_another_run(alone: World, tmp_path: Path) -> None:
    dataset = save_untrained(tmp_path / "tiny.pt", alone, *SHAPES, "train.ema_decay=0.9")
    state = load_checkpoint(tmp_path / "tiny.pt")
    state["ema"] = {name: tensor + 1 for name, tensor in state["ema"].items()}
    save_checkpoint(tmp_path / "tiny.pt", state)
    output = tmp_path / "weights.safetensors"
    assert run_on(alone, "export", str(tmp_path / "tiny.pt"), "--format", "safetensors", "--output", str(output)) == ""
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert {name: json.loads(text) for name, text in metadata.items() if name != "model"} == {
        "classes": list(dataset.classes),
        "image_shape": [3, 32, 32],
        "model_args": {},
        **{name: list(values) for name, values in VALUES["cifar10"].items()},
    }
    assert metadata["model"] == "tiny"
    config = config_of("model.name=tiny", "device=cpu")
    weights = build_trainer(config, alone, dataset, None, load_init(str(output))).model.state_dict()
    assert weights.keys() == state["ema"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in state["ema"].items())


def test_weights_that_are_read_back_differently_are_not_written(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_untrained(tmp_path / "tiny.pt", alone, *SHAPES)
    save = formats.save
    monkeypatch.setattr(
        formats, "save", lambda weights, metadata: save({k: v * 1.0001 for k, v in weights.items()}, metadata)
    )
    output = tmp_path / "weights.safetensors"
    error = run_on(alone, "export", str(tmp_path / "tiny.pt"), "--format", "safetensors", "--output", str(output))
    assert error.startswith(f"{output} was not written: the weights read back differ")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.pt"]


def test_without_its_data_an_export_is_compared_on_random_images(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree(tmp_path / "images")
    save_untrained(tmp_path / "tiny.pt", alone, "data.name=imagefolder", f"data.root={root}")
    shutil.rmtree(root)
    lines: list[str] = []
    monkeypatch.setattr(log, "warning", lines.append)
    monkeypatch.setattr(log, "info", lines.append)
    arguments = (str(tmp_path / "tiny.pt"), "--format", "pt2", "--output", str(tmp_path / "tiny.pt2"))
    assert run_on(alone, "export", *arguments, "--images", "100") == ""
    reason = f"the folder {root}/train does not exist"
    assert lines[0].startswith(f"comparing on 100 random images, because the data set cannot be read: {reason}")
    assert "largest difference of a logit on 100 images" in lines[-1]
    assert len(lines) == 2


def test_the_comparison_shows_a_progress_bar_on_a_terminal(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_untrained(tmp_path / "tiny.pt", alone, *SHAPES)
    network = load_trained(tmp_path / "tiny.pt")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    formats.compare_logits(network, network, torch.zeros(130, 3, 32, 32, dtype=torch.uint8))
    assert "comparing:   0%" in (shown := capsys.readouterr().err)
    assert "/3" in shown


def test_weights_need_a_name_that_model_init_recognizes(alone: World) -> None:
    error = run_on(alone, "export", "tiny.pt", "--format", "safetensors", "--output", "weights.bin")
    assert error == "--output weights.bin must end with .safetensors, so that model.init can read it"
