"""`evaluate` on ranks of the test's process pool. test_use.py runs it as a user would."""

import csv
import json
from pathlib import Path

import pytest
import torch
from helpers import run_on, save_untrained
from image_folders import write_tree
from ranks import RankPool

from ddp_cifar.distributed.world import World
from ddp_cifar.tracking.quality import Quality


def evaluated(world: World, checkpoint: Path, *options: str) -> tuple[str, str]:
    """The text of --output and --json."""
    output, table = (checkpoint.with_name(f"{name} on {world.world_size} ranks") for name in ("output", "json"))
    arguments = (str(checkpoint), "--output", str(output), "--json", str(table), "eval.batch_size=2", *options)
    assert run_on(world, "evaluate", *arguments) == ""
    return output.read_text(), table.read_text()


def predictions_of_files(world: World, checkpoint: Path, root: Path) -> dict[str, str]:
    """The class that predict finds for each file."""
    output = checkpoint.with_name("predicted.csv")
    assert run_on(world, "predict", str(checkpoint), str(root), "--output", str(output)) == ""
    return {str(Path(row["file"]).relative_to(root)): row["class"] for row in csv.DictReader(output.open())}


def test_each_row_has_the_file_of_its_image_even_if_files_before_it_are_skipped(
    ranks: RankPool, alone: World, tmp_path: Path
) -> None:
    """Also for held-out images, which are an unordered part of the training images."""
    root = write_tree(tmp_path / "images")
    for split in ("train", "test"):
        (root / split / "ant" / "2.png").write_bytes(b"no image")
    data = ("data.name=imagefolder", f"data.root={root}", "data.on_corrupt=skip", "data.val_images=5")
    checkpoint = tmp_path / "tiny.pt"
    dataset = save_untrained(checkpoint, alone, *data)
    expected = predictions_of_files(alone, checkpoint, root)
    assert dataset.val is not None
    for name, split in (("test", dataset.test), ("val", dataset.val)):
        texts = [ranks.run(evaluated, size, checkpoint, "--split", name)[0] for size in (1, 3)]
        assert len(set(texts)) == 1
        rows = list(csv.DictReader(texts[0][0].splitlines()))
        assert list(rows[0]) == ["file", "label", "class", "probability"]
        assert [row["label"] for row in rows] == [dataset.classes[label] for label in split.labels]
        assert all(row["file"].startswith(f"{'test' if name == 'test' else 'train'}/{row['label']}/") for row in rows)
        assert all(row["class"] == expected[row["file"]] for row in rows)
        assert not any(row["file"].endswith("ant/2.png") for row in rows)
    assert len(rows) == 5


SHAPES = ("data.name=shapes", "data.shapes.train_images=40", "data.shapes.test_images=12")


def test_without_files_a_row_has_the_index_of_its_image(
    alone: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = save_untrained(tmp_path / "tiny.pt", alone, *SHAPES)
    output, table = evaluated(alone, tmp_path / "tiny.pt", "--format", "jsonl")
    rows = [json.loads(line) for line in output.splitlines()]
    assert [row["index"] for row in rows] == list(range(12))
    found = json.loads(table)
    confusion = found["confusion"]
    for row in rows:
        confusion[dataset.classes.index(row["label"])][dataset.classes.index(row["class"])] -= 1
        assert 0.1 <= row["probability"] <= 1
    assert not any(map(any, confusion))
    balanced, f1 = (f"{100 * found[name]:.2f}%" for name in ("balanced_accuracy", "macro_f1"))
    assert f"balanced accuracy {balanced}, macro F1 {f1}" in capsys.readouterr().out


def test_balanced_accuracy_and_macro_f1_agree_with_scikit_learn() -> None:
    """Its results for these labels, with version 1.9. Class 3 is predicted without images, and 4 is in neither."""
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 1, 1, 3, 2, 0, 0])
    quality = Quality.of(torch.nn.functional.one_hot(predicted, 5).float(), labels)
    assert quality.balanced_accuracy == pytest.approx(0.5)
    assert quality.macro_f1 == pytest.approx(0.3928571428571429)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_progress_bar_is_shown_on_a_terminal(
    alone: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    save_untrained(tmp_path / "tiny.pt", alone, *SHAPES)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    evaluated(alone, tmp_path / "tiny.pt")
    assert ("0/6" in capsys.readouterr().err) == is_terminal
