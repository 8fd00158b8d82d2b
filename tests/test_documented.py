"""Every documented command is run here or by another test, and is checked by a dry run with its number of ranks."""

import re
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torchvision
from documented import PAGES, command_of, commands_in, commands_of, copy_checkout, modules_of, pages
from launched import CHECKOUT
from PIL import Image

import ddp_cifar.dry_run
from ddp_cifar.config import Config

Train = Callable[..., Any]
Shell = Callable[..., Any]

SHORT = ("train.max_steps=1", "train.compile=off", "precision=auto", "eval.batch_size=20", "device=cpu")
SHAPES = ("data.name=shapes", "data.shapes.train_images=64", "data.shapes.test_images=20")

CANNOT = {
    r"^tests/compat\.sh$": "downloads several gigabytes for every version of torch",
    r"^make (demo|test|test-all|install|soak|dashboard)\b": "takes minutes; only its target in the Makefile is checked",
    r"^(make install PYTHON|git (clone|worktree)|pip install|module )": "installs software, copies a checkout, or is local",
    r"^export PYTHON_EXEC=": "needs a cluster's module with torch",
    r"^(apt-get|python3 -m venv|source|conda) ": "installs packages, or creates an environment",
    r"^(sinfo|squeue|sacct|scontrol|df|tail|pip list) ": "queries a cluster or machine that does not exist here",
    r"^scancel ": "cancels a job; tests/slurm/test_train.py sends these signals",
    r"^ssh -L": "needs another machine",
    r"^py-spy ": "is not installed by the project",
    r"^(touch|echo .* >) (RUN_DIR|runs)\S*/(STOP|SAVE|PROFILE)$": "tests/test_faults.py does this to running runs",
    r"^cp slurm/site": "tests/slurm/test_train.py uses another site.sh",
    r"^(srun_options=|sbatch --container|sbatch --mem$)": "part of a script, or only an option",
    r"^kubectl |^sed .* kubectl ": "needs a cluster; tests/test_kubernetes.py runs the manifest",
    r"^(podman|apptainer) |^mkdir -p runs$": "builds or runs an image; tests/test_containers.py checks its recipes",
    r"^wandb sync |^export (MLFLOW_TRACKING_URI|WANDB_MODE)=": "needs an account or a server, or sets a variable",
    r"^torch\.save": "needs the class of the original script",
    r"^torchrun (is not on PATH|--max-restarts)|^\.\.\. is not": "is a message or an option",
    r"^python -c": "checks CUDA on a GPU machine",
}
"""Commands that are not run, with the reason."""

SPEED = "test_benchmarks.py::test_the_speed_benchmark_compares_with_the_best_plain_ddp_and_the_ceiling"
GPU = "test_benchmarks.py::test_every_part_of_the_gpu_script_runs_on_the_cpu"
RUN_BY = {
    r"\blaunch/(local|scaling|preflight)\.sh": "test_launch.py::test_the_commands_of_launch_readme_run",
    r"^launch/sweep\.sh": "test_sweep.py::test_a_sweep_of_four_runs_is_interrupted_and_resumed",
    r"\blaunch/ssh\.sh": "slurm/test_ssh.py::test_a_run_on_two_hosts_finishes",
    r"\blaunch/node\.sh": "slurm/test_train.py::test_nodes_that_are_started_by_hand_form_one_run",
    r"\blaunch/kubernetes/pod\.sh": "test_kubernetes.py::test_a_killed_pod_is_replaced_and_the_others_restart_their_ranks",
    r"^slurm/sweep\.sh": "slurm/test_train.py::test_a_canceled_sweep_continues_with_the_unfinished_runs",
    r"^slurm/chain\.sh": "slurm/test_train.py::test_a_chain_resumes_without_requeues_and_cancels_the_remaining_jobs",
    r"^salloc ": "slurm/test_train.py::test_a_run_in_an_interactive_allocation_finishes",
    r"slurm/preflight\.sh": "slurm/test_planted_faults.py::test_a_healthy_cluster_passes_on_slurm",
    r"slurm/evaluate\.sh": "slurm/test_train.py::test_the_scripts_of_a_copy_run_that_copy_with_its_site_settings",
    r"^sbatch .*slurm/train\.sh": "slurm/test_train.py::test_the_scripts_of_a_copy_run_that_copy_with_its_site_settings",
    r"^slurm/train\.sh": "slurm/test_train.py::test_run_directly_the_script_checks_the_run_and_then_submits",
    r"benchmarks/(speed|bare_ddp|peers)\.py": SPEED,
    r"benchmarks/data_path\.py": "test_benchmarks.py::test_the_data_path_benchmark_compares_with_one_worker",
    r"benchmarks/survival\.py": "test_benchmarks.py::test_the_survival_benchmark_compares_on_with_off",
    r"benchmarks/(gpu\.sh|reproducible\.py|repeats\.py)": GPU,
    r"benchmarks/ranks\.py": "test_benchmarks.py::test_a_rank_has_two_more_connections_than_bare_ddp_opens",
    r"benchmarks/(records|hooks)\.py|benchmarks/slow_link": "test_benchmarks.py::test_the_other_benchmarks_run_on_two_ranks",
    r"benchmarks/versions\.py": "test_benchmarks.py::test_the_versions_benchmark_compares_this_checkout_with_another",
    r"benchmarks/predict\.py": "test_benchmarks.py::test_the_predict_benchmark_reports_speed_memory_and_search",
    r"benchmarks/startup\.py": "test_benchmarks.py::test_the_startup_benchmark_compares_with_a_bare_script",
    r"-m ddp_cifar\.benchmark": "test_benchmark.py::test_the_benchmark_reports_what_it_measured",
    r"docs/article/time_to_accuracy\.py": "test_benchmarks.py::test_the_plot_of_time_to_accuracy_comes_from_its_rows",
    r"docs/article/plot\.py": "test_benchmarks.py::test_the_plot_and_table_of_the_original_script_come_from_metrics",
    r"^tensorboard ": "tracking/test_dashboard.py::",
    r"-m ddp_cifar\.preflight$": "test_launch.py::test_the_commands_of_launch_readme_run",
    r"runs/(four|two)\b": "test_documented.py::test_two_runs_are_compared_as_the_page_says",
    r"data\.name=mine:stripes": "test_extending.py::",
    r"ddp_cifar\.config\.reference": "config/test_reference.py::test_the_config_reference_matches_the_schema",
    r"augment\.name=(augmentations|color):": "data/test_augment.py::test_the_augmentations_of_the_page_differ_per_image",
    r"^torchrun --nproc_per_node=2 program\.py": "test_api.py::test_the_program_of_the_python_page_runs_on_two_ranks",
    r"^(pip wheel|ddp-cifar) ": "test_packaging.py::test_an_installed_wheel_trains_and_evaluates_in_an_empty_folder",
    r"^python tests/soak\.py": "test_faults.py::test_random_kills_leave_state_and_rows_bitwise_identical",
    r"^python tests/healthy\.py": "training/test_verification.py::test_healthy_runs_are_not_accused",
    r"^python tests/recovery\.py": "test_faults.py::test_the_recovery_from_a_killed_rank_is_measured",
    r"^launch/check_node\.sh": "slurm/test_train.py::test_a_spare_node_replaces_a_lost_one",
    r"^slurm/guard\.sh": "slurm/test_train.py::test_a_job_that_loses_the_node_of_its_script_is_requeued",
    r"-m ddp_cifar\.sync ": "tracking/test_services.py::test_a_run_without_a_tracker_is_sent_afterwards",
    r"^tests/\S+\.py$": "",
}
"""The test that runs each command that needs a cluster, several hosts, minutes, or special checks."""


@dataclass(frozen=True)
class Start:
    """The module and the number of ranks that a command starts."""

    module: str
    arguments: tuple[str, ...]
    nodes: int = 1
    ranks: int = 1
    """Per node."""


def start_of(text: str) -> Start | None:
    """Parse a command; None if it starts no module of this project on ranks. Raises ValueError if it cannot be parsed."""
    words = shlex.split(text)
    environment = {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    program, *rest = words
    if re.match(r"(train|optim|eval|data|model)\.\w+", program):  # in a diff: only arguments
        return Start("train", tuple(words))
    if program == "...":
        return Start("train", tuple(rest[2:] if rest[:1] == ["-m"] else rest))
    nodes, ranks = int(environment.get("NNODES", 1)), int(environment.get("NPROC_PER_NODE", 1))
    module = environment.get("MODULE", "ddp_cifar.train").rpartition(".")[2]
    if program == "torchrun" and (found := re.match(r"--nproc_per_node=(\d+)$", rest[0])):
        return Start(rest[2].rpartition(".")[2], tuple(rest[3:]), 1, int(found[1])) if rest[1] == "-m" else None
    if program == "python" and rest[0] == "-m":
        return Start(rest[1].rpartition(".")[2], tuple(rest[2:]))
    if program == "ddp-cifar":
        return Start(rest[0], tuple(rest[1:]))
    if program in ("launch/local.sh", "launch/node.sh"):
        return Start(module, tuple(rest), nodes, ranks)
    if program == "launch/preflight.sh":
        return Start("preflight", tuple(rest), nodes, ranks)
    if program == "launch/ssh.sh":
        return Start(module, tuple(rest[1:]), 2, ranks)
    if program == "launch/scaling.sh":
        return Start("benchmark", tuple(rest[1:]))
    if program in ("sbatch", "salloc") or program.startswith("slurm/"):
        script, options, arguments = _read_slurm(program, rest)
        if script not in ("train", "chain", "preflight"):
            return None
        size = {name: int(value) for name, value in re.findall(r"--(nodes|gpus-per-node)=(\d+)", " ".join(options))}
        return Start(
            "train" if script == "chain" else script, arguments, size.get("nodes", 1), size.get("gpus-per-node", 1)
        )
    return None


def _read_slurm(program: str, rest: list[str]) -> tuple[str, list[str], tuple[str, ...]]:
    """The script's name, the options of sbatch, and the arguments after the script or after --."""
    at = 0 if program.startswith("slurm/") else next(i + 1 for i, word in enumerate(rest) if word.startswith("slurm/"))
    script = program if at == 0 else rest[at - 1]
    split = rest.index("--") + 1 if at == 0 and "--" in rest else at
    arguments = tuple(word.replace("%a", "1") for word in rest[split:])
    return Path(script).stem, rest[:split], arguments


class Judge:
    """Checks commands, each once."""

    def __init__(self, train: Train, folder: Path) -> None:
        self.train = train
        self.folder = folder
        """Contains a folder of images and a finished run."""
        self.known: dict[Start, str] = {}
        self.counts: Counter[str] = Counter()

    def problem(self, text: str) -> str:
        """The problem of a command, or "" if there is none."""
        if any(re.search(pattern, text) for pattern in CANNOT):
            self.counts["listed"] += 1
            return self._make(text)
        try:
            start = start_of(self.substitute(text))
        except (ValueError, IndexError, StopIteration):
            return "it cannot be parsed"
        elsewhere = any(re.search(pattern, text) for pattern in RUN_BY)
        script = re.search(r"(?<!\S)(?:launch|slurm|benchmarks|tests)/\S+\.(?:sh|py)\b", text)
        if script and not (CHECKOUT / script[0]).exists():
            return f"{script[0]} does not exist"
        if start and start.module in ("train", "preflight", "benchmark"):
            self.counts["dry-run"] += 1
            if start not in self.known:
                self.known[start] = self._dry_run(start)
            if self.known[start]:
                return self.known[start]
        if elsewhere:
            self.counts["run by another test"] += 1
            return ""
        if is_run_here(text) or text.startswith("diff <(grep"):
            self.counts["run here"] += 1
            return ""
        return "" if start and start.module == "train" else "no test runs it, and no reason is given"

    def substitute(self, text: str) -> str:
        """The command with its placeholders replaced."""
        return substitute(text, self.folder)

    def _dry_run(self, start: Start) -> str:
        """Check the command by a dry run with its own number of ranks and batch sizes; return the error or ""."""
        arguments = re.sub(r"--(json|rounds|steps)[ =]\S+", "", shlex.join(start.arguments))
        size = (
            ()
            if "--dry-run" in arguments
            else ("--dry-run", f"--nodes={start.nodes}", f"--nproc-per-node={start.ranks}")
        )
        end = (f"run_dir={self.folder / 'new'}",)
        outcome = self.train(*size, *shlex.split(arguments), *end)
        return "" if outcome.status == 0 else str(outcome.err.strip().splitlines()[-1])

    def _make(self, text: str) -> str:
        if not text.startswith("make "):
            return ""
        makefile = (CHECKOUT / "Makefile").read_text()
        target = text.split()[1]
        return "" if re.search(rf"^{target}:", makefile, re.MULTILINE) else f"the Makefile has no {target}"


def substitute(text: str, folder: Path) -> str:
    """The command with its placeholders replaced by existing files and values."""
    run = folder / "run"
    for pattern, real in {
        r"\[CONFIG\.yaml\]|(?<!\S)CONFIG\.yaml": "configs/demo.yaml",
        r"\[sbatch options\]": "--nodes=2 --gpus-per-node=8",
        r"\[--micro 32\]": "--micro 32",
        r"\[(key=value|option of hooks\.py|--json|--rounds|--split|RATE|DATA_ROOT)[^]]*\]": "",
        r"(?<!\S)key=value\b": "",
        r"(?<=\S)\s+\.\.\.": "",
        r"\bCHECKPOINT\|RUN_DIR\b|\bRUN_DIR\b|\bCHECKPOINT\b|\bweights\.pt\b|\bruns/(demo|cifar10|whole|cut)\b(?!\S)": str(
            run
        ),
        r"\bIMAGE_OR_FOLDER\b": str(folder / "images" / "test"),
        r"\bFOLDER\b": str(folder),
        r"\bdata\.root=(DIR|\$SCRATCH/data)\b": f"data.root={folder / 'images'}",
        r"\bSWEEP\.yaml\b": "configs/sweeps/lr.yaml",
        r"\b(HOSTS_FILE|hosts)\b": "hosts",
        r"\b(FIRST_HOST|node1)\b": "127.0.0.1",
        r"chain\.sh N\b": "chain.sh 8",
        r"\bNPROC_PER_NODE=N\b": "NPROC_PER_NODE=4",
        r"--nproc_per_node=N\b": "--nproc_per_node=2",
        r"\bprecision=P\b": "precision=fp32",
        r"\bmine:": "documented_example:",
    }.items():
        text = re.sub(pattern, real, text)
    return text


def is_run_here(text: str) -> bool:
    """True for commands with at most two ranks on one node, and for the first command of the README."""
    if text == "torchrun --nproc_per_node=4 -m ddp_cifar.train":
        return True
    if any(re.search(pattern, text) for pattern in (*CANNOT, *RUN_BY)):
        return False
    start = start_of(substitute(text, Path("folder")))
    return start is not None and start.nodes * start.ranks <= 2 and "--dry-run" not in text


def images_in(folder: Path) -> None:
    for split, count in (("train", 20), ("test", 5)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (i, 0, 9)).save(folder / split / name / f"{i}.png")


EXAMPLE = """
import torch
from torch import nn
from ddp_cifar.data import DataSet, Split

def images(root):
    part = Split.of(torch.zeros(64, 3, 16, 16, dtype=torch.uint8), torch.arange(64) % 2)
    return DataSet(train=part, test=part, classes=("a", "b"))

stripes = images

def network(num_classes, image_size, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, width), nn.Linear(width, num_classes))

class Printer:
    def __init__(self, config, run_dir): pass
    def log(self, scalars, step): pass
    def close(self): pass
"""


@pytest.fixture(scope="module")
def things(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of a user: images, a finished run, a custom module."""
    folder = tmp_path_factory.mktemp("documented")
    copy_checkout(folder)
    images_in(folder / "images")
    (folder / "documented_example.py").write_text(EXAMPLE)
    for name, code in modules_of("docs/augmentation.md").items():
        (folder / name).write_text(code)
    trained = shell("python", "-m", "ddp_cifar.train", *SHAPES, *SHORT, f"run_dir={folder / 'run'}")
    assert trained.status == 0, trained
    return folder


@pytest.fixture
def judge(train: Train, things: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    monkeypatch.syspath_prepend(str(things))
    # instead of a download
    weights = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: weights)
    # commands that differ only in their ranks and batches share the trial of the model and its footprint
    for name in ("try_training", "footprint_of"):
        monkeypatch.setattr(ddp_cifar.dry_run, name, once_per_model(getattr(ddp_cifar.dry_run, name)))
    return Judge(train, things)


RESULTS: dict[str, Any] = {}


def once_per_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a memory of its results, by everything that they depend on."""

    def remembered(*arguments: Any) -> Any:
        config = next(argument for argument in arguments if isinstance(argument, Config))
        numbers = [argument for argument in arguments if isinstance(argument, int | str | tuple)]
        parts = (config.model, config.optim, config.augment, config.data, config.train.loss, config.precision, numbers)
        key = f"{function.__name__} {parts}"
        if key not in RESULTS:
            RESULTS[key] = function(*arguments)
        return RESULTS[key]

    return remembered


def test_every_documented_command_is_checked(judge: Judge, capfd: pytest.CaptureFixture[str]) -> None:
    commands = [command for page in pages() for command in commands_of(page)]
    problems = [f"{command}\n    {problem}" for command in commands if (problem := judge.problem(command.text))]
    with capfd.disabled():
        counts = ", ".join(f"{count} {how}" for how, count in judge.counts.items())
        print(f"\n{len(commands)} documented commands ({len(judge.known)} different dry runs): {counts}")
    assert not problems, "\n".join(problems)
    assert len(commands) > 200


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (
            "    sbatch --nodes=4 --gpus-per-node=8 slurm/train.sh train.global_batch_size=16",
            "use train.global_batch_size=32 or more",
        ),
        (
            "and `torchrun --nproc_per_node=3 -m ddp_cifar.train train.reproducible=true train.micro_batch_size=256`",
            "supports at most 2 ranks",
        ),
        ("```diff\n+train.epoch=50\n```", "did you mean train.epochs?"),
        ("    launch/lokal.sh configs/demo.yaml", "launch/lokal.sh does not exist"),
        ("`... train.micro_batch=3`", "train.micro_batch is not a key"),
        ("    make dmeo", "no test runs it"),
        ("    frobnicate now", "no test runs it"),
    ],
)
def test_a_broken_command_is_detected(judge: Judge, page: str, expected: str) -> None:
    (command,) = commands_in(page, "page.md")
    assert expected in judge.problem(command.text)


def test_every_entry_of_the_lists_is_used() -> None:
    texts = [command.text for page in pages() for command in commands_of(page)]
    unused = [pattern for pattern in (*CANNOT, *RUN_BY) if not any(re.search(pattern, text) for text in texts)]
    assert not unused
    for place in filter(None, RUN_BY.values()):
        file, _, name = place.partition("::")
        assert f"def {name}(" in (CHECKOUT / "tests" / file).read_text() or not name, place
    assert all(list(CHECKOUT.glob(pattern)) for pattern in PAGES)


HERE = list(
    dict.fromkeys(command.text for page in pages() for command in commands_of(page) if is_run_here(command.text))
)


@pytest.mark.slow
@pytest.mark.parametrize("text", HERE)
def test_a_documented_command_runs(judge: Judge, shell: Shell, train: Train, tmp_path: Path, text: str) -> None:
    """Training is shortened by additional arguments; training on one process runs in the test process."""
    line = judge.substitute(text)
    start = start_of(line)
    assert start
    short: tuple[str, ...] = ()
    if start.module in ("train", "prepare"):
        has_data = any(word.startswith(("data.name=imagefolder", "data.name=doc")) for word in start.arguments)
        root = any(word.startswith("data.root=/") for word in start.arguments)
        data = () if has_data else ("data.name=imagefolder",) if root else SHAPES
        val = ("data.val_images=10",) if "data.val_images" in text else ()
        short = (*SHORT, *data, *val, f"run_dir={tmp_path / 'new'}")
    if start.module == "train" and start.ranks == 1 and not re.search("launch/|reproducible", text):
        done = train(*start.arguments, *short)
    else:
        line = line.replace("runs/sweeps/lr/*/", str(judge.folder / "run"))
        line = re.sub(r"^\.\.\. (-m ddp_cifar\.train )?", "python -m ddp_cifar.train ", line)
        done = shell("bash", "-c", f"{line} {shlex.join(short)}", cwd=judge.folder / "a copy")
    assert done.status == 0, done.out + done.err


@pytest.mark.slow
def test_two_runs_are_compared_as_the_page_says(shell: Shell, tmp_path: Path) -> None:
    copy, page = copy_checkout(tmp_path), "docs/reproducibility.md"
    short = shlex.join(
        (*SHAPES, "train.max_steps=2", "train.global_batch_size=32", "train.micro_batch_size=8", "device=cpu")
    )
    for name in ("four", "two"):
        done = shell(
            "bash", "-c", f"{command_of(page, f'run_dir=runs/{name}')} train.fingerprint_every=1 {short}", cwd=copy
        )
        assert done.status == 0, done.err
    done = shell("bash", "-c", command_of(page, "^diff"), cwd=copy)
    assert (done.status, done.out) == (0, "")
    assert (copy / "runs" / "two" / "metrics.jsonl").read_text().count('"fingerprint"') == 3
