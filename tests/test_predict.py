"""`predict` on ranks of the test's process pool. test_use.py runs it as a user would."""

import csv
import json
import os
from pathlib import Path

import pytest
from helpers import run_on, save_untrained
from image_folders import write_tree
from ranks import RankPool

from ddp_cifar.distributed.world import World


@pytest.fixture
def checkpoint(alone: World, tmp_path: Path) -> Path:
    """Classifies 16 x 16 images as ant, bee or cow. The images are in `images`; two of them are broken."""
    root = write_tree(tmp_path / "images", per_class=4)
    save_untrained(tmp_path / "tiny.pt", alone, "data.name=imagefolder", f"data.root={root}", "data.image_size=16")
    (root / "test" / "bee" / "1.png").write_bytes(b"no image")
    (root / "test" / "cow" / "9.jpg").symlink_to("/proc/self/mem")  # even root cannot read its first byte
    return tmp_path / "tiny.pt"


def predicted(world: World, checkpoint: Path, *options: str) -> str:
    """The text that predict writes, with five images per forward pass."""
    output = checkpoint.with_name(f"on {world.world_size} ranks")
    arguments = (str(checkpoint), str(checkpoint.parent / "images" / "test"), "--output", str(output))
    assert run_on(world, "predict", *arguments, "--batch-size", "5", *options) == ""
    return output.read_text()


def test_rows_are_in_the_order_of_the_files_on_any_number_of_ranks(ranks: RankPool, checkpoint: Path) -> None:
    """13 files are three batches: on two ranks, one has two of them."""
    texts = [ranks.run(predicted, size, checkpoint)[0] for size in (1, 2, 3)]
    assert len(set(texts)) == 1
    rows = list(csv.DictReader(texts[0].splitlines()))
    names = [*(f"{name}/{i}.png" for name in ("ant", "bee", "cow") for i in range(4)), "cow/9.jpg"]
    assert [os.path.relpath(row["file"], checkpoint.parent / "images" / "test") for row in rows] == names
    errors = {name: row["error"] for name, row in zip(names, rows, strict=True) if row["error"]}
    assert errors == {
        "bee/1.png": "cannot identify image file",
        "cow/9.jpg": "it cannot be read (Input/output error)",
    }


def test_top_k_writes_the_most_likely_classes_in_both_formats(alone: World, checkpoint: Path) -> None:
    complete = [json.loads(line) for line in predicted(alone, checkpoint, "--format", "jsonl").splitlines()]
    short = [
        json.loads(line) for line in predicted(alone, checkpoint, "--format", "jsonl", "--top-k", "2").splitlines()
    ]
    table = list(csv.DictReader(predicted(alone, checkpoint, "--top-k", "2").splitlines()))
    columns = ["file", "class", "top1", "top1_probability", "top2", "top2_probability", "error"]
    assert list(table[0]) == columns
    for row, brief, cells in zip(complete, short, table, strict=True):
        if "error" in row:
            assert brief == row
            assert cells == dict.fromkeys(columns, "") | row
            continue
        first, second, _ = sorted(row["probabilities"], key=row["probabilities"].get, reverse=True)
        top = [{"class": name, "probability": row["probabilities"][name]} for name in (first, second)]
        assert brief == {"file": row["file"], "class": first, "top": top}
        assert (cells["class"], cells["top1"], cells["top2"]) == (first, first, second)
        assert cells["top2_probability"] == f"{row['probabilities'][second]:.6f}"


def test_top_k_is_at_most_the_number_of_classes(alone: World, checkpoint: Path) -> None:
    message = run_on(alone, "predict", str(checkpoint), str(checkpoint), "--top-k", "4")
    assert message == "--top-k 4 is out of range: expected 1 to 3, the number of classes"
    assert "--top-k 0 is out of range" in run_on(alone, "predict", "no.pt", "no.png", "--top-k", "0")
