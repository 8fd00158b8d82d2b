"""launch/scaling.sh: efficiency over numbers of ranks."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import CHECKOUT

from ddp_cifar import scaling

Shell = Callable[..., Any]


def test_scaling_reports_the_efficiency(tmp_path: Path) -> None:
    for kind, ranks, rate, images in (
        ("weak", 1, 100, 128),
        ("weak", 2, 180, 256),
        ("weak", 4, 300, 512),
        ("strong", 3, 240, 512),
        ("strong", 4, 280, 512),
    ):
        result = {
            "world_size": ranks,
            "images_per_s": rate,
            "images_per_s_min": rate - 5,
            "images_per_s_max": rate + 5,
            "global_batch_size": images,
            "step_s": images / rate,
            "exposed_communication": None if ranks == 1 else 0.1,
            **dict.fromkeys(("model", "precision", "device", "backend", "threads", "torch"), "x"),
        }
        (tmp_path / f"{kind}-{ranks}.json").write_text(json.dumps(result))
    assert scaling.main([str(tmp_path)]) == 0
    text = (tmp_path / "scaling.md").read_text()
    assert "| 1 | 128 | 100 (95 - 105) | 1.00 | 1280.0 ms | - |" in text
    assert "| 4 | 128 | 300 (295 - 305) | 0.75 | 1706.7 ms | 10.0% |" in text
    assert "| 3 | 170 to 171 | 240 (235 - 245) | 1.00 |" in text
    assert "| 4 | 128 | 280 (275 - 285) | 0.88 |" in text, "relative to the smallest number of ranks"
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_result_gives_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "weak-1.json").write_text("{")
    with pytest.raises(Exception, match=r"weak-1\.json is not a benchmark result"):
        scaling.read(tmp_path)


@pytest.mark.slow
def test_scaling_over_two_and_three_ranks(shell: Shell, tmp_path: Path) -> None:
    options = ("train.max_steps=null", "--rounds", "1", "--steps", "1")
    done = shell("launch/scaling.sh", str(tmp_path / "out"), *options, RANKS="2 3", IMAGES="7", timeout=300)
    assert done.status == 0, done.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"weak-2.json", "weak-3.json", "strong-2.json", "strong-3.json", "scaling.md", "scaling.png"}
    strong = json.loads((tmp_path / "out" / "strong-2.json").read_text())
    assert (strong["global_batch_size"], strong["micro_batch_size"], strong["threads"]) == (21, 11, 1)
    assert "| 2 | 10 to 11 |" in (tmp_path / "out" / "scaling.md").read_text()


FAKE_TORCHRUN = """#!{python}
import json, sys

options = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv if "=" in argument)
ranks, batch = (int(options[name]) for name in ("nproc-per-node", "train.global_batch_size"))
result = dict.fromkeys(("model", "precision", "device", "backend", "threads", "torch"), "x")
result |= dict.fromkeys(("images_per_s", "images_per_s_min", "images_per_s_max", "step_s"), 1.0)
result |= dict(world_size=ranks, global_batch_size=batch, exposed_communication=None)
result["micro"] = int(options["train.micro_batch_size"])
json.dump(result, open(sys.argv[sys.argv.index("--json") + 1], "w"))
"""


@pytest.mark.parametrize(
    ("settings", "micro_batch_sizes"),
    [
        ({"MAX_RANKS": "6"}, {1: 48, 2: 24, 4: 12, 6: 8}),
        ({"MAX_RANKS": "4"}, {1: 32, 2: 16, 4: 8}),
        ({"MAX_RANKS": "1"}, {1: 8}),
        ({"MAX_RANKS": "4", "RANKS": "1 3 7"}, {1: 56, 3: 19, 7: 8}),
    ],
)
def test_scaling_measures_any_numbers_of_ranks(
    settings: dict[str, str], micro_batch_sizes: dict[int, int], shell: Shell, tmp_path: Path
) -> None:
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(FAKE_TORCHRUN.format(python=sys.executable))
    torchrun.chmod(0o755)
    path = f'PATH={shlex.quote(str(tmp_path))}:"$PATH"'
    done = shell("bash", "-c", f"{path} launch/scaling.sh {shlex.quote(str(tmp_path / 'out'))}", IMAGES="8", **settings)
    assert done.status == 0, done.err
    most = max(micro_batch_sizes)
    for kind in ("weak", "strong"):
        found = {r["world_size"]: r for r in (json.loads(p.read_text()) for p in tmp_path.glob(f"out/{kind}-*.json"))}
        sizes = micro_batch_sizes if kind == "strong" else dict.fromkeys(micro_batch_sizes, 8)
        assert {ranks: result["micro"] for ranks, result in found.items()} == sizes
        for ranks, result in found.items():
            assert result["global_batch_size"] == 8 * (most if kind == "strong" else ranks)


def test_an_invalid_number_of_ranks_gives_an_error_that_names_it(shell: Shell, tmp_path: Path) -> None:
    done = shell("launch/scaling.sh", str(tmp_path / "out"), RANKS="1 two")
    assert done.status == 2
    assert done.err == "error: RANKS=two is invalid: expected a positive integer\n"


@pytest.mark.parametrize(
    ("first", "found"),
    [
        *((text, f"'{text}'") for text in ("", "demo", "configs/demo.yaml", "optim.lr=1", "--rounds")),
        ("two\nlines=1", r"$'two\nlines=1'"),
    ],
)
def test_another_first_argument_than_a_folder_gives_one_line(
    first: str, found: str, shell: Shell, tmp_path: Path
) -> None:
    done = shell(str(CHECKOUT / "launch" / "scaling.sh"), first, "train.max_steps=1", cwd=tmp_path)
    assert done.status == 2
    assert done.err == (
        f"error: found {found} instead of a folder for the results, such as runs/scaling: "
        "expected launch/scaling.sh FOLDER [CONFIG.yaml] [key=value ...]\n"
    )
    assert list(tmp_path.iterdir()) == []
