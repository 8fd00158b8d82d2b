"""Each benchmark runs and reports its contenders. docs/performance.md has the figures; these runs are too short for any."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_folders import write_tree
from launched import CHECKOUT

Shell = Callable[..., Any]


@pytest.mark.slow
def test_the_speed_benchmark_compares_with_the_best_plain_ddp_and_the_ceiling(shell: Shell, tmp_path: Path) -> None:
    options = ("--rounds", "2", "--steps", "1", "--batch", "8", "--json", str(tmp_path / "speed.json"))
    done = shell("torchrun", "--standalone", "--nproc_per_node=2", "benchmarks/speed.py", *options, timeout=300)
    assert done.status == 0, done.err
    results = json.loads((tmp_path / "speed.json").read_text())
    rates = results["rates"]
    assert set(rates) == {f"plain DDP, workers={w}" for w in (0, 1, 2)} | {"ddp_cifar", "ceiling"}
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
    assert [comparison["target"] for comparison in results["comparisons"]] == [2.3, 0.93]
    assert "| ddp_cifar / ceiling |" in done.out


@pytest.mark.slow
def test_the_data_path_benchmark_compares_with_one_worker(shell: Shell, tmp_path: Path) -> None:
    options = ("--rounds", "1", "--images", "512", "--json", str(tmp_path / "data.json"))
    done = shell(sys.executable, "benchmarks/data_path.py", *options, timeout=300)
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "data.json").read_text())["comparisons"][0]["reference"] == "DataLoader, workers=1"


@pytest.mark.slow
def test_the_survival_benchmark_compares_on_with_off(shell: Shell, tmp_path: Path) -> None:
    options = ("--rounds", "2", "--steps", "3", "--batch", "8", "--json", str(tmp_path / "survival.json"))
    done = shell("torchrun", "--standalone", "--nproc_per_node=2", "benchmarks/survival.py", *options, timeout=300)
    assert done.status == 0, done.err
    (comparison,) = json.loads((tmp_path / "survival.json").read_text())["comparisons"]
    assert (comparison["contender"], comparison["reference"], comparison["target"]) == ("on", "off", 0.98)


@pytest.mark.slow
def test_every_part_of_the_gpu_script_runs_on_the_cpu(shell: Shell, tmp_path: Path) -> None:
    images, found = write_tree(tmp_path / "images", per_class=20, size=(32, 32)), tmp_path / "found"
    for call in ("1", "2"):
        done = shell("benchmarks/gpu.sh", "--short", call, str(found), str(images), timeout=470)
        assert done.status == 0, done.out
        assert "skipped" not in done.out
    outputs = {path.stem: path.read_text() for path in found.glob("*.txt")}
    assert set(outputs) == {
        *("benchmark-8-off", "prepare", "speed-0", "speed", "benchmark-128-in-32-off"),
        *("article", "article-table", "repeats", "reproducible", "ranks-1", "ranks-2", "peers"),
    }
    assert all(f"== {name}: exit status 0 after " in text for name, text in outputs.items())
    assert json.loads((found / "repeats.json").read_text()) == {
        "reproducible": {"repeated": True, "resumed": True, "on two ranks": True}
    }
    (comparison,) = json.loads((found / "reproducible.json").read_text())["comparisons"]
    assert (comparison["contender"], comparison["reference"], comparison["target"]) == ("on", "off", 0.95)
    assert (found / "article.png").exists()


def test_the_gpu_script_says_what_it_expects(shell: Shell, tmp_path: Path) -> None:
    for arguments in ((), ("3", str(tmp_path)), (str(tmp_path),)):
        done = shell("benchmarks/gpu.sh", *arguments)
        assert done.status != 0
        assert "expected benchmarks/gpu.sh [--short] 1|2 FOLDER [DATA_ROOT]" in done.err


@pytest.mark.slow
def test_a_rank_has_two_more_connections_than_bare_ddp_opens(shell: Shell, tmp_path: Path) -> None:
    """However many ranks there are: those of a ring for control messages."""
    options = (*"--ranks 5 --rounds 1 --steps 3 8 --batch 1 --json".split(), str(tmp_path / "found.json"))
    done = shell(sys.executable, "benchmarks/ranks.py", *options, timeout=300)
    assert done.status == 0, done.out + done.err
    found = json.loads((tmp_path / "found.json").read_text())["5"]
    assert found["ddp_cifar"]["connections"] == found["bare"]["connections"] + 2
    assert found["ddp_cifar"]["collectives_per_step"] <= found["bare"]["collectives_per_step"] + 2
    assert "| TCP connections per rank | 7 / 5 |" in done.out


@pytest.mark.slow
def test_the_versions_benchmark_compares_this_checkout_with_another(shell: Shell, tmp_path: Path) -> None:
    options = ("--rounds", "2", "--steps", "1", "--batch", "8", "--json", str(tmp_path / "versions.json"))
    done = shell(sys.executable, "benchmarks/versions.py", str(CHECKOUT), "optim.lr=0.01", *options, timeout=300)
    assert done.status == 0, done.out + done.err
    results = json.loads((tmp_path / "versions.json").read_text())
    assert {name: len(rates) for name, rates in results["rates"].items()} == {"this checkout": 2, "the other": 2}
    assert "median of the ratios: " in done.out


def test_the_plot_and_table_of_the_original_script_come_from_metrics(shell: Shell, tmp_path: Path) -> None:
    rows = [
        {"step": 391 * n, "train/epoch": n, "train/epoch_loss": 1.5 / n, "train/accuracy": 0.5, "test/accuracy": 0.5}
        for n in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [{"step": 1, "train/loss": 2.0}, *rows])
    )
    arguments = (str(tmp_path / "metrics.jsonl"), str(tmp_path / "curves.png"))
    done = shell(sys.executable, "docs/article/plot.py", *arguments)
    assert done.status == 0, done.err
    assert "| 2 | 0.750 | 50.0 % | 50.0 % | 1.068 | 65.8 % | 65.7 % |" in done.out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_of_time_to_accuracy_comes_from_its_rows(shell: Shell, tmp_path: Path) -> None:
    done = shell(sys.executable, "docs/article/time_to_accuracy.py", str(tmp_path / "curves.png"))
    assert done.status == 0, done.err
    assert "| original script | 1 | 35 | 50 | 85.09 % | |" in done.out
    assert "| cifar10.yaml | 3 | 20 | 30 | 87.01 ± 0.34 % |" in done.out
    assert "| speed.yaml | 3 | 5 | 6 | 85.77 ± 0.18 % |" in done.out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "names"), [("hooks", {"hook none", "hook fp16", "hook bf16"}), ("records", {"on", "off"})]
)
def test_the_other_benchmarks_run_on_two_ranks(script: str, names: set[str], shell: Shell, tmp_path: Path) -> None:
    options = ("--rounds", "1", "--steps", "2", "--batch", "8", "--json", str(tmp_path / "found.json"))
    done = shell("torchrun", "--standalone", "--nproc_per_node=2", f"benchmarks/{script}.py", *options, timeout=300)
    assert done.status == 0, done.err
    assert set(json.loads((tmp_path / "found.json").read_text())["rates"]) == names


@pytest.mark.slow
def test_the_startup_benchmark_compares_with_a_bare_script(shell: Shell, tmp_path: Path) -> None:
    options = ("--rounds", "1", "--batch", "8", "--json", str(tmp_path / "found.json"))
    done = shell(sys.executable, "benchmarks/startup.py", *options, timeout=300)
    assert done.status == 0, done.out + done.err
    assert set(json.loads((tmp_path / "found.json").read_text())["rates"]) == {"ddp_cifar", "a bare script"}


@pytest.mark.slow
def test_the_predict_benchmark_reports_speed_memory_and_search(shell: Shell, tmp_path: Path) -> None:
    options = ("--rounds", "1", "--ranks", "1", "--files", "2", "70", "--json", str(tmp_path / "found.json"))
    done = shell(sys.executable, "benchmarks/predict.py", *options)
    assert done.status == 0, done.out + done.err
    assert set(json.loads((tmp_path / "found.json").read_text())["rates"]) == {"1 ranks"}
    assert "peak memory of 1 rank by round: " in done.out
    assert "| find_image_files / os.walk |" in done.out
