"""Using a trained network: evaluate, predict and compare agree with the Trainer and with each other."""

import csv
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import config_of
from PIL import Image

from ddp_cifar.data import DataSet, build_dataset
from ddp_cifar.distributed.world import World
from ddp_cifar.inference import TrainedNetwork
from ddp_cifar.run.checkpoint_file import load_checkpoint, save_checkpoint
from ddp_cifar.tracking.quality import Quality

Shell = Callable[..., Any]
PYTHON = ("python", "-m")
TWO_RANKS = ("torchrun", "--standalone", "--nproc_per_node=2", "-m")
RECIPE = (
    "data.name=shapes",
    "data.shapes.train_images=600",
    "data.shapes.test_images=150",
    "data.val_images=40",
    "train.epochs=3",
    "train.global_batch_size=32",
    "train.micro_batch_size=16",
    "train.ema_decay=0.9",
    "optim.warmup_epochs=0.5",
    "eval.batch_size=20",
    "device=cpu",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shell: Shell) -> Path:
    """The run_dir of a short run on two ranks."""
    run_dir = tmp_path_factory.mktemp("use") / "run"
    done = shell(*TWO_RANKS, "ddp_cifar.train", *RECIPE, f"run_dir={run_dir}", timeout=300)
    assert done.status == 0, done.err
    return run_dir


def last_evaluation(run_dir: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in reversed(rows) if "test/accuracy" in row)


def evaluation(shell: Shell, launcher: tuple[str, ...], run_dir: Path, out: Path, *arguments: str) -> dict[str, Any]:
    done = shell(*launcher, "ddp_cifar.evaluate", str(run_dir), "--json", str(out), *arguments, timeout=200)
    assert done.status == 0, done.err
    return dict(json.loads(out.read_text())) | {"terminal": done.out}


@pytest.mark.parametrize("launcher", [PYTHON, TWO_RANKS])
def test_evaluate_agrees_with_the_trainer(
    shell: Shell, trained: Path, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    png = tmp_path / "confusion"
    found = evaluation(shell, launcher, trained, tmp_path / "e.json", "--png", str(png))
    expected = last_evaluation(trained)
    assert found["accuracy"] == expected["test/accuracy"]
    assert found["loss"] == pytest.approx(expected["test/loss"], abs=1e-6)
    assert found["images"] == 150
    assert sum(map(sum, found["confusion"])) == 150
    assert sum(row[i] for i, row in enumerate(found["confusion"])) == round(150 * found["accuracy"])
    assert f"accuracy {100 * expected['test/accuracy']:.2f}%" in found["terminal"]
    assert png.read_bytes().startswith(b"\x89PNG")

    held_out = evaluation(shell, PYTHON, trained, tmp_path / "v.json", "--split", "val")
    assert held_out["accuracy"] == expected["val/accuracy"]
    assert held_out["images"] == 40


def test_flip_tta_gives_an_image_and_its_mirror_image_the_same_logits() -> None:
    from ddp_cifar.training.evaluation import flip_tta

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5)).eval()
    images = torch.randn(4, 3, 8, 8)
    assert torch.allclose(flip_tta(model, images), flip_tta(model, images.flip(3)), atol=1e-6)
    assert torch.allclose(flip_tta(model, images), (model(images) + model(images.flip(3))) / 2)


def test_quality_matches_a_calculation_by_hand() -> None:
    logits = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [4.0, 0, 0], [0, 4.0, 0]])
    quality = Quality.of(logits, torch.tensor([0, 0, 0, 1]))
    assert quality.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert quality.recall.tolist()[:2] == pytest.approx([2 / 3, 1])
    assert quality.precision.tolist()[:2] == pytest.approx([1, 1 / 2])
    assert math.isnan(quality.recall[2])
    assert math.isnan(quality.top5_accuracy)
    confidence = math.exp(4) / (math.exp(4) + 2)  # of every image; three of four are right
    assert quality.calibration_error == pytest.approx(abs(0.75 - confidence))
    described = quality.as_dict(("a", "b", "c"))
    assert described["classes"][2] == {"name": "c", "images": 0, "precision": None, "recall": None}
    json.dumps(described, allow_nan=False)
    six = Quality.of(torch.eye(6) * torch.tensor([1.0, 1, 1, 1, 1, -1]), torch.arange(6))
    assert six.top5_accuracy == pytest.approx(5 / 6)


@pytest.fixture
def files(alone: World, tmp_path: Path) -> tuple[Path, DataSet]:
    """The test images as files, some in a subfolder, and the data set."""
    dataset = build_dataset(config_of(*RECIPE).data, alone)
    assert dataset.test
    folder = tmp_path / "images"
    (folder / "inside").mkdir(parents=True)
    for i in range(len(dataset.test)):
        pixels = dataset.test.images[int(dataset.test.sample_ids[i])].permute(1, 2, 0).numpy()
        place = folder / "inside" if i % 2 else folder
        Image.fromarray(pixels).save(place / f"{i:03d}.png")
    return folder, dataset


@pytest.mark.parametrize("launcher", [PYTHON, TWO_RANKS])
def test_predict_agrees_with_evaluate_to_the_last_image(
    shell: Shell, trained: Path, files: tuple[Path, DataSet], tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    folder, dataset = files
    out = tmp_path / "rows.jsonl"
    options = ("--format", "jsonl", "--output", str(out), "--batch-size", "20")
    done = shell(*launcher, "ddp_cifar.predict", str(trained), str(folder), *options, timeout=200)
    assert done.status == 0, done.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 150
    confusion = [[0] * 10 for _ in range(10)]
    for row in rows:
        label = int(dataset.test.labels[int(Path(row["file"]).stem)])  # type: ignore[union-attr]
        confusion[label][dataset.classes.index(row["class"])] += 1
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert max(row["probabilities"], key=row["probabilities"].get) == row["class"]
    assert confusion == evaluation(shell, PYTHON, trained, tmp_path / "e.json")["confusion"]


def test_predict_accepts_any_size_and_mode_and_reports_a_broken_file(
    shell: Shell, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, mode, size in (
        ("a.png", "RGB", (90, 40)),
        ("b.png", "L", (20, 31)),
        ("c.png", "RGBA", (64, 64)),
        ("d.jpg", "CMYK", (33, 80)),
    ):
        Image.new(mode, size).save(folder / name)
    (folder / "e.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not asked for")
    done = shell(*PYTHON, "ddp_cifar.predict", str(trained), str(folder))
    assert done.status == 0, done.err
    rows = list(csv.DictReader(done.out.splitlines()))
    assert [Path(row["file"]).name for row in rows] == ["a.png", "b.png", "c.png", "d.jpg", "e.jpg"]
    assert all(row["class"] and not row["error"] for row in rows[:4])
    assert rows[4]["class"] == ""
    assert "cannot identify image file" in rows[4]["error"]
    assert "e.jpg is skipped: cannot identify image file" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "{run}/nothing"), "there is no checkpoint"),
        (("evaluate", "{run}", "--split", "tset"), "invalid choice: 'tset'"),
        (("evaluate", "{run}", "eval.batchsize=3"), "did you mean eval.batch_size?"),
        (("evaluate", "{run}", "data.shapes.train_images=5"), "data.shapes.train_images=5 is out of range"),
        (
            ("evaluate", "{run}", "data.val_images=0", "--split", "val"),
            "--split val: data.name=shapes has no val images",
        ),
        (
            ("evaluate", "{run}", "data.val_images=50", "--split", "val"),
            "--split val would not be the images held out in training: the checkpoint was trained on 560 train, 40 val",
        ),
        (("evaluate", "{run}", "model.name=resnet9"), "does not fit the model: it has no stem.0.weight"),
        (
            ("evaluate", "{run}", "--json", "{run}/no/where.json"),
            "where.json (No such file or directory): choose another file",
        ),
        (("evaluate",), "the following arguments are required: CHECKPOINT"),
        (("predict", "{run}", "{run}/nothing"), "nothing does not exist: expected an image or a folder of images"),
        (("predict", "{run}", "{run}/logs"), "has no images: expected files of the types .bmp"),
        (("predict", "{run}", "{run}/status"), "none of the 1 files can be decoded as an image"),
        (("compare", "{run}", "{run}/logs"), "is not a run_dir (No such file or directory"),
    ],
)
def test_user_errors_are_one_line(
    command: Callable[..., Any], trained: Path, arguments: tuple[str, ...], message: str
) -> None:
    module, *rest = arguments
    error = command(module, *(argument.replace("{run}", str(trained)) for argument in rest))
    assert message in error
    assert "\n" not in error


@pytest.fixture
def command() -> Callable[..., str]:
    """Runs a command in this process and returns its error message."""
    import importlib

    from ddp_cifar.errors import UserError

    def run(module: str, *arguments: str) -> str:
        with pytest.raises(UserError) as error:
            importlib.import_module(f"ddp_cifar.{module}").main(arguments)
        return str(error.value)

    return run


def a_run(folder: Path, seed: int, accuracies: list[float], fingerprints: list[str], **config: Any) -> Path:
    folder.mkdir()
    settings = {"seed": seed, "run_dir": str(folder), "train": {"global_batch_size": 64, **config}}
    (folder / "config.yaml").write_text(json.dumps(settings))
    (folder / "status").write_text("finished\n")
    rows: list[dict[str, Any]] = [{"step": 5 * (i + 1), "fingerprint": text} for i, text in enumerate(fingerprints)]
    rows += [{"step": 10 * (i + 1), "train/epoch": i + 1, "test/accuracy": value} for i, value in enumerate(accuracies)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    return folder


def test_compare_reports_where_runs_diverge_and_the_spread_over_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddp_cifar.compare import main

    a = a_run(tmp_path / "a", 0, [0.5, 0.7, 0.6], ["01", "02", "03"])
    b = a_run(tmp_path / "b", 0, [0.5, 0.7, 0.6], ["01", "02", "04"])
    c = a_run(tmp_path / "c", 1, [0.5, 0.8], ["11", "12"])
    d = a_run(tmp_path / "d", 1, [0.5, 0.9], ["11", "12"], epochs=9)
    plot, table = tmp_path / "plot.png", tmp_path / "table.json"
    assert main([str(a), str(b), str(c), str(d), "--png", str(plot), "--json", str(table)]) == 0
    out = capsys.readouterr().out
    assert f"{a} and {b}: weights diverge after step 10, by step 15" in out
    assert out.count("weights") == 1, "other pairs have different configs"
    assert "over 2 seeds (0, 1): accuracy 70.00%, standard deviation 14.14%" in out
    assert re.search(rf"{a} +finished +0 +\d+ +3 +30 +60\.00% +70\.00% +-", out)
    assert [row["accuracy"] for row in json.loads(table.read_text())] == [0.6, 0.6, 0.8, 0.9]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_checkpoint_of_another_machine_works_on_this_one(
    shell: Shell, trained: Path, files: tuple[Path, DataSet], tmp_path: Path
) -> None:
    """Trained over nccl in tf32, with a tracker and an optimizer that are not installed here."""
    state = load_checkpoint(trained / "checkpoints" / "latest.pt")
    state["config"] |= {"backend": "nccl", "device": "cuda", "precision": "tf32", "tracking": {"name": "gone:T"}}
    state["config"]["optim"]["name"] = "gone:O"
    save_checkpoint(tmp_path / "other.pt", state)
    folder, _ = files
    checkpoint, cpu = str(tmp_path / "other.pt"), "device=cpu"
    assert evaluation(shell, PYTHON, tmp_path / "other.pt", tmp_path / "e.json", cpu)["precision"] in ("fp32", "bf16")
    done = shell(*PYTHON, "ddp_cifar.predict", checkpoint, str(folder), "--device", "cpu")
    assert done.status == 0, done.err
    output = str(tmp_path / "m.pt2")
    done = shell(*PYTHON, "ddp_cifar.export", checkpoint, "--format", "pt2", "--output", output)
    assert done.status == 0, done.err


def test_predict_handles_odd_names_and_closed_pipes(
    shell: Shell, trained: Path, files: tuple[Path, DataSet], tmp_path: Path
) -> None:
    """A folder named like an image, a name that is not UTF-8, and a reader that closes the pipe."""
    folder, _ = files
    (folder / "inside.jpg").mkdir()
    os.rename(folder / "000.png", os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    command = f"python -m ddp_cifar.predict {trained} {folder} --device cpu"
    done = shell("bash", "-c", f"set -o pipefail; {command} | tail -n +2 | cut -d, -f 1 | sort | uniq | wc -l")
    assert (done.status, done.out.strip()) == (0, "150"), done.err
    done = shell("bash", "-c", f"set -o pipefail; {command} | head -n 1")
    assert done.status == 0, done.err
    assert "Broken" not in done.err
    assert "Traceback" not in done.err


def test_predict_rejects_an_older_checkpoint_without_class_names(trained: Path, tmp_path: Path, command: Any) -> None:
    state = load_checkpoint(trained / "checkpoints" / "latest.pt")
    del state["classes"]
    save_checkpoint(tmp_path / "old.pt", state)
    assert "has no class names" in command("predict", str(tmp_path / "old.pt"), str(tmp_path / "old.pt"))


def test_predict_rejects_a_network_whose_images_are_not_files(trained: Path, tmp_path: Path, command: Any) -> None:
    state = load_checkpoint(trained / "checkpoints/latest.pt")
    save_checkpoint(tmp_path / "five.pt", state | {"image_shape": [5, 32, 32]})
    error = command("predict", str(tmp_path / "five.pt"), str(tmp_path))
    assert "was trained on images of 5 channels: image files have 1 or 3" in error


@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_an_exported_file_gives_the_logits_of_the_checkpoint(
    shell: Shell, trained: Path, files: tuple[Path, DataSet], tmp_path: Path, form: str
) -> None:
    """The file is loaded on its own, with a different batch size than at export."""
    output = tmp_path / f"model.{form}"
    done = shell(*PYTHON, "ddp_cifar.export", str(trained), "--format", form, "--output", str(output), timeout=200)
    assert done.status == 0, done.err
    said = re.search(r"largest difference of a logit on 150 images: (\S+)", done.err + done.out)
    assert said
    assert float(said[1]) <= 1e-4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".export", "model"))] == [output.name]

    _, dataset = files
    assert dataset.test
    images = dataset.test.images[dataset.test.sample_ids].contiguous()
    names: dict[str, str] = {"classes": ""}
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        names = session.get_modelmeta().custom_metadata_map
    else:
        logits = torch.export.load(output, extra_files=names).module()(images)
    assert json.loads(names["classes"]) == list(dataset.classes)
    found = evaluation(shell, PYTHON, trained, tmp_path / "e.json", "precision=fp32")
    assert Quality.of(logits, dataset.test.labels).confusion.tolist() == found["confusion"]


@pytest.mark.slow
@pytest.mark.parametrize("model", [("resnet18",), ("resnet9",), ("torchvision", "model.args.name=mobilenet_v3_small")])
def test_other_models_can_be_exported(shell: Shell, tmp_path: Path, model: tuple[str, ...]) -> None:
    arguments = (f"model.name={model[0]}", *model[1:], "train.max_steps=1", f"run_dir={tmp_path / 'run'}")
    assert shell(*PYTHON, "ddp_cifar.train", *RECIPE, *arguments, timeout=200).status == 0
    for form in ("pt2", "onnx"):
        output = str(tmp_path / f"model.{form}")
        done = shell(
            *PYTHON, "ddp_cifar.export", str(tmp_path / "run"), "--format", form, "--output", output, timeout=300
        )
        assert done.status == 0, done.err


def test_an_export_that_differs_from_the_checkpoint_is_not_written(
    trained: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = TrainedNetwork.__init__

    def build_wrong(network: TrainedNetwork, *arguments: Any) -> None:
        build(network, *arguments)
        network.scale *= 1.1

    monkeypatch.setattr(TrainedNetwork, "__init__", build_wrong)
    error = command("export", str(trained), "--format", "pt2", "--output", str(tmp_path / "m.pt2"))
    assert re.search(
        r"m.pt2 was not written: largest difference of a logit on 150 images: \S+, expected at most 0.0001", error
    )
    assert not list(tmp_path.iterdir())
    missing = str(tmp_path / "no" / "m.pt2")
    assert "cannot write" in command("export", str(trained), "--format", "pt2", "--output", missing)
