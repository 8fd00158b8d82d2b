"""Every user error prints one line and exits with status 2, and no data is lost."""

import fcntl
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddp_cifar.config import DataConfig
from ddp_cifar.data import build_dataset
from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.models.cnn import CNN

Train = Callable[..., Any]
TINY = (
    "data.name=shapes",
    "data.shapes.train_images=64",
    "data.shapes.test_images=20",
    "train.global_batch_size=32",
    "train.micro_batch_size=16",
    "train.epochs=1",
    "train.log_every=1",
    "device=cpu",
)


def one_line(outcome: Any, *expected: str) -> str:
    assert outcome.status == 2, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("[rank 0]")
    assert "error: " in lines[0]
    for text in expected:
        assert text in lines[0]
    return str(lines[0])


CONFIG_ERRORS = [
    (["optim.lrr=1"], ["optim.lrr is not a key", "did you mean optim.lr?"]),
    (["lr=1"], ["lr is not a key", "did you mean optim.lr?"]),
    (["epochs=3"], ["did you mean train.epochs?"]),
    (["optm.lr=1"], ["did you mean optim.lr?"]),
    (["zzz=1"], ["zzz is not a key", "--help"]),
    (["optim=3"], ["optim is a section", "optim.name"]),
    (["optim.lr.x=1"], ["optim.lr.x is not a key"]),
    (["optim.lr=fast"], ["optim.lr=fast", "wrong type", "float"]),
    (["train.epochs=2.5"], ["train.epochs=2.5", "wrong type", "int"]),
    (["train.epochs="], ["train.epochs=null", "wrong type"]),
    (["train.epochs=[1, 2]"], ["train.epochs=[1, 2]", "wrong type"]),
    (["optim.step_clamp.enabled=maybe"], ["optim.step_clamp.enabled=maybe", "bool"]),
    (["precision=fp8"], ["precision=fp8", "auto | fp32 | tf32 | bf16 | fp16"]),
    (["device=gpu"], ["device=gpu", "auto | cpu | cuda | mps"]),
    (["optim.lr=-1"], ["optim.lr=-1.0 is out of range", "above 0"]),
    (["optim.lr=nan"], ["optim.lr=nan is out of range"]),
    (["optim.lr=inf"], ["optim.lr=inf is out of range"]),
    (["train.epochs=0"], ["train.epochs=0 is out of range", "1 or more"]),
    (["optim.step_clamp.limit=10"], ["optim.step_clamp.limit=10", "1000"]),
    (["train.micro_batch_size=0"], ["train.micro_batch_size=0", "1 or more, or null"]),
    (["data.val_images=-1"], ["data.val_images=-1"]),
    (["seed=-1"], ["seed=-1"]),
    (["run_dir="], ["run_dir=''"]),
    (["data.name=imagenet"], ["data.name=imagenet", "cifar10, imagefolder, shapes"]),
    (["model.name=vgg"], ["model.name=vgg", "cnn"]),
    (["optim.name=lion"], ["optim.name=lion", "adam, adamw, sgd"]),
    (["train.global_batch_size=0"], ["train.global_batch_size=0", "1 or more"]),
    (["nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    (["dmo"], ["known names: article, cifar10, demo, resnet18, speed; did you mean demo?"]),
    (["elsewhere/demo.yaml"], ["elsewhere/demo.yaml: No such file", "did you mean demo?"]),
    (["configs"], ["configs", "Is a directory"]),
    (["configs/demo.yaml", "configs/article.yaml"], ["'configs/article.yaml'", "key=value"]),
    (["--epochs", "3"], ["--help"]),
    (["optim.lr={"], ["optim.lr={"]),
    (["run_dir=${nothing}"], ["nothing"]),
    (["backend=nccl", "device=cpu"], ["backend=nccl", "device=cuda"]),
    (["device=cuda"], ["device=cuda", "no usable GPU"]),
    (["optim.schedule=linear"], ["optim.schedule=linear is unknown", "constant, cosine, multistep, polynomial"]),
    (["optim.groups=[{match: a, lr: 1}]"], ["optim.groups=[{'match': 'a', 'lr': 1}]", "match: str, lr_factor: float"]),
    (["train.patience_epochs=3"], ["train.patience_epochs=3 needs validation images", "set data.val_images"]),
    (["optim.lr=???"], ["optim.lr=???", "no value"]),
    (["device=mps"], ["device=mps", "no Apple GPU"]),
    (["model.name=./mine:network"], ["model.name=./mine:network is a relative name", "package.module:function"]),
]


@pytest.mark.parametrize(("arguments", "expected"), CONFIG_ERRORS, ids=[" ".join(case[0]) for case in CONFIG_ERRORS])
def test_an_error_in_the_config(train: Train, tmp_path: Path, arguments: list[str], expected: list[str]) -> None:
    if "device=cuda" in arguments and torch.cuda.is_available():
        arguments = ["backend=nccl", "device=cpu"]
        expected = []
    run_dir = tmp_path / "run"
    if not any(argument.startswith("run_dir") for argument in arguments):
        arguments = [*arguments, f"run_dir={run_dir}"]
    one_line(train(*arguments), *expected)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim:\n  lrr: 1\n", ["optim.lrr is not a key", "did you mean optim.lr?"]),
        ("optim:\n  lr: fast\n", ["optim.lr=fast"]),
        ("optim:\n  lr: -1\n", ["optim.lr=-1"]),
        ("optim: 3\n", ["optim"]),
        ("seed: 1\nseed: 2\n", ["duplicate key seed", "line 1"]),
        ("seed: [1, 2\n", ["not YAML", "line"]),
        ("just words\n", ["contains no keys"]),
        ("- a\n- b\n", ["contains no keys"]),
    ],
)
def test_an_error_in_the_config_file(train: Train, tmp_path: Path, text: str, expected: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    line = one_line(train(str(recipe), f"run_dir={tmp_path / 'run'}"), *expected)
    assert "recipe.yaml" in line or "out of range" in line


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({**LAUNCHED, "WORLD_SIZE": "many"}, ["WORLD_SIZE='many'", "torchrun"]),
        ({**LAUNCHED, "RANK": "4", "WORLD_SIZE": "2"}, ["RANK=4", "WORLD_SIZE=2", "torchrun"]),
        ({"RANK": "0"}, ["MASTER_ADDR", "torchrun"]),
        ({"WORLD_SIZE": "2"}, ["RANK", "torchrun"]),
    ],
)
def test_an_error_in_the_environment(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], expected: list[str]
) -> None:
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        outcome = train(f"run_dir={tmp_path / 'run'}")
    one_line(outcome, *expected)


# -- data


def test_cifar10_that_is_missing_and_cannot_be_downloaded(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR10.url", "http://127.0.0.1:1/cifar-10-python.tar.gz")
    outcome = train(f"run_dir={tmp_path / 'run'}", f"data.root={tmp_path / 'data'}", "device=cpu")
    one_line(outcome, "CIFAR-10 is not in", "cannot be downloaded", "Connection refused", "data.name=shapes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small valid folder of images."""
    root = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(16):
                Image.new("RGB", (32, 32), (i, 0, 0)).save(root / split / name / f"{i:02d}.png")
    return root


def spoil(root: Path, how: str) -> None:
    victim = root / "train" / "bee" / "05.png"
    if how == "no root":
        shutil.rmtree(root)
    elif how == "no test":
        shutil.rmtree(root / "test")
    elif how == "no classes":
        shutil.rmtree(root / "train" / "ant")
        shutil.rmtree(root / "train" / "bee")
    elif how == "empty class":
        shutil.rmtree(root / "train" / "ant")
        (root / "train" / "ant").mkdir()
    elif how == "unknown class":
        (root / "test" / "cat").mkdir()
        shutil.copy(victim, root / "test" / "cat")
    elif how == "corrupt":
        victim.write_bytes(victim.read_bytes()[:40])
    elif how == "not an image":
        victim.write_text("hello")
    elif how == "one class":
        shutil.rmtree(root / "train" / "ant")
    elif how == "damaged cache":
        config = DataConfig(name="imagefolder", root=str(root))
        with open_world("cpu") as world:
            build_dataset(config, world)
        next((root / ".cache").glob("*/train.images")).write_bytes(b"short")
    elif how == "cache in the way":
        (root / ".cache").write_text("a file")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("no root", ["images/train", "does not exist"]),
        ("no test", ["images/test", "does not exist", "data.val_images"]),
        ("no classes", ["images/train has no class folders"]),
        ("empty class", ["train/ant contains no images"]),
        ("unknown class", ["test/cat", "without training images", "ant, bee"]),
        ("corrupt", ["bee/05.png cannot be decoded", "data.on_corrupt=skip"]),
        ("not an image", ["bee/05.png cannot be decoded (cannot identify image file)"]),
        ("one class", ["only one class folder, bee", "two or more classes"]),
        ("damaged cache", ["damaged", "train.images has 5 bytes", "remove that folder"]),
        ("cache in the way", ["cannot write the decoded images", "data.cache"]),
    ],
)
def test_an_error_in_a_folder_of_images(
    train: Train, folder: Path, tmp_path: Path, how: str, expected: list[str]
) -> None:
    spoil(folder, how)
    arguments = [*TINY[3:], "data.name=imagefolder", f"data.root={folder}", f"run_dir={tmp_path / 'run'}"]
    one_line(train(*arguments), *expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optim.implementation=capturable"], ["capturable", "needs a GPU"]),
        (["data.image_size=64"], ["data.image_size=64", "32 x 32"]),
        (["precision=tf32"], ["precision=tf32", "GPU", "cpu"]),
        (["model.init=nowhere.pt"], ["model.init=nowhere.pt does not exist"]),
        (["model.init=docs"], ["model.init=docs has no checkpoints"]),
        (["data.val_images=64"], ["data.val_images=64", "64 training images"]),
        (
            ["data.shapes.train_images=66", "model.name=torchvision", "model.args.name=resnet18"],
            [
                "model.name=torchvision cannot train on one image",
                "Expected more than 1 value",
                "train.global_batch_size=31",
            ],
        ),
        (["data.shapes.train_images=3"], ["data.shapes.train_images=3", "10 or more"]),
    ],
)
def test_settings_that_do_not_fit_the_data_or_the_device(
    train: Train, tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    one_line(train(*TINY, f"run_dir={tmp_path / 'run'}", *arguments), *expected)


# -- run_dir and resume


@pytest.fixture
def finished(train: Train, tmp_path: Path) -> Path:
    """A run_dir with a run of one epoch."""
    run_dir = tmp_path / "run"
    assert train(*TINY, f"run_dir={run_dir}").status == 0
    return run_dir


def test_starting_a_finished_run_again_reports_it_finished(train: Train, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    outcome = train(*TINY, f"run_dir={finished}")
    assert outcome.status == 0
    assert "is finished: epoch 1, step 2" in outcome.out
    assert "test accuracy" in outcome.out
    assert (finished / "metrics.jsonl").read_text() == before
    assert (finished / "status").read_text() == "finished\n"


def test_a_run_that_ended_early_is_finished(train: Train, tmp_path: Path) -> None:
    constant = ("model.name=helpers:Tiny", "model.freeze=[1.*, 5.*]", "optim.lr=1e-12")  # the accuracy does not change
    early = (*TINY, *constant, "data.val_images=32", "train.epochs=4", "train.patience_epochs=1", f"run_dir={tmp_path}")
    assert "ending early: no better validation accuracy since step 1" in train(*early).out
    assert (tmp_path / "status").read_text() == "finished\n"
    outcome = train(*early)
    assert "is finished: epoch 2, step 2" in outcome.out
    assert "to continue, raise train.patience_epochs" in outcome.out


def test_a_finished_run_continues_with_more_epochs_and_logs_changed_settings(train: Train, finished: Path) -> None:
    outcome = train(*TINY, f"run_dir={finished}", "train.epochs=2", "eval.batch_size=7")
    assert outcome.status == 0
    assert "eval.batch_size=500, now 7; train.epochs=1, now 2" in outcome.out
    steps = [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "optim.lr=0.5",
        "optim.name=sgd",
        "data.shapes.seed=3",
        "train.global_batch_size=64",
        "data.val_images=16",
    ],
)
def test_a_changed_setting_of_the_run_is_rejected_with_an_error_that_names_the_key(
    train: Train, finished: Path, change: str
) -> None:
    key, _, value = change.partition("=")
    outcome = train(*TINY, "train.epochs=2", f"run_dir={finished}", change)
    one_line(outcome, "step_00000002.pt", f"{key}=", f"now {value}", "another run_dir")
    assert (finished / "status").read_text() == "finished\n"


def test_a_resume_with_different_data_is_rejected(train: Train, folder: Path, tmp_path: Path) -> None:
    arguments = [*TINY[3:], "data.name=imagefolder", f"data.root={folder}", f"run_dir={tmp_path / 'run'}"]
    assert train(*arguments).status == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.copy(folder / "train" / "ant" / "00.png", folder / "train" / "ant" / "99.png")
    shutil.copy(folder / "train" / "bee" / "00.png", folder / "train" / "bee" / "99.png")
    line = one_line(train(*arguments, "train.epochs=2"), "other data", "32 train", "34 train", "another run_dir")
    assert "2 classes" in line
    for name in ("ant", "bee"):
        (folder / "train" / name / "99.png").unlink()
    Image.new("RGB", (32, 32), "teal").save(folder / "train" / "ant" / "00.png")
    one_line(train(*arguments, "train.epochs=2"), "other data", "pixels", "another run_dir")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == rows


def test_a_task_that_torchrun_did_not_start_does_not_train_alone(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    one_line(train(*TINY, f"run_dir={tmp_path / 'run'}"), "one of 2 tasks (SLURM_NTASKS)", "slurm/train.sh")
    assert not (tmp_path / "run").exists()


def test_the_next_start_fixes_the_status_after_a_crash_behind_the_last_save(train: Train, finished: Path) -> None:
    (finished / "status").write_text("running\n")
    assert train(*TINY, f"run_dir={finished}").status == 0
    assert (finished / "status").read_text() == "finished\n"


def test_resume_never_rejects_a_run_dir_that_has_a_run(train: Train, finished: Path) -> None:
    one_line(train(*TINY, f"run_dir={finished}", "resume=never"), "resume=never", "step_00000002.pt", "run_dir")


def test_a_run_can_start_from_the_checkpoint_of_another_run(train: Train, finished: Path, tmp_path: Path) -> None:
    arguments = (*TINY, f"run_dir={tmp_path / 'second'}", "train.epochs=2")
    outcome = train(*arguments, f"resume={finished / 'checkpoints' / 'latest.pt'}")
    assert outcome.status == 0
    assert "resuming from" in outcome.out
    outcome = train(*arguments, f"resume={finished}", "train.epochs=3")
    assert outcome.status == 0
    assert "resumes from its own newest checkpoint" in outcome.out


@pytest.mark.parametrize(
    ("resume", "expected"),
    [
        ("nowhere.pt", ["there is no checkpoint nowhere.pt"]),
        ("configs/demo.yaml", ["configs/demo.yaml cannot be read as a checkpoint"]),
        ("docs", ["resume=docs has no checkpoints"]),
    ],
)
def test_resume_from_a_path_that_is_not_a_checkpoint(
    train: Train, tmp_path: Path, resume: str, expected: list[str]
) -> None:
    one_line(train(*TINY, f"run_dir={tmp_path / 'run'}", f"resume={resume}"), *expected)


def test_resume_from_weights_only_or_from_another_model(train: Train, finished: Path, tmp_path: Path) -> None:
    state = torch.load(finished / "checkpoints" / "latest.pt", weights_only=True)
    torch.save(state["model"], tmp_path / "weights.pt")
    arguments = (*TINY, "train.epochs=2", f"run_dir={tmp_path / 'new'}")
    one_line(
        train(*arguments, f"resume={tmp_path / 'weights.pt'}"), "weights.pt is not a checkpoint of a run", "optimizer"
    )

    from ddp_cifar.run.checkpoint_file import save_checkpoint

    state.pop("digest")
    state["model"]["fc_layer.6.weight"] = torch.zeros(3, 512)
    save_checkpoint(tmp_path / "three.pt", state)
    one_line(
        train(*arguments, f"resume={tmp_path / 'three.pt'}"), "three.pt does not fit", "fc_layer.6.weight", "(3, 512)"
    )
    del state["model"]["fc_layer.6.weight"]
    save_checkpoint(tmp_path / "none.pt", state)
    one_line(train(*arguments, f"resume={tmp_path / 'none.pt'}"), "none.pt does not fit", "fc_layer.6.weight")


@pytest.mark.parametrize(("key", "is_dict"), [("model.init", False), ("resume", True)])
def test_a_pickled_module_is_rejected_and_the_conversion_in_the_error_works(
    train: Train, tmp_path: Path, key: str, is_dict: bool
) -> None:
    """The original script saves `{"net": net.module, "epoch": epoch}`. The error has a command that converts it."""
    torch.save({"net": CNN(), "epoch": 0} if is_dict else CNN(), path := tmp_path / "ckpt.t7")
    line = one_line(train(*TINY, f"run_dir={tmp_path / 'run'}", f"{key}={path}"), "pickle", "convert it")
    command = line[line.index("m = torch.load(") :].replace("weights.pt", str(tmp_path / "weights.pt"))
    exec(command, {"torch": torch})
    outcome = train(*TINY, f"run_dir={tmp_path / 'run'}", f"model.init={tmp_path / 'weights.pt'}")
    assert outcome.status == 0, outcome.err
    assert "weights from" in outcome.out


def test_init_from_a_file_without_suitable_weights(train: Train, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    for name, expected in (("list", "has no weights"), ("numbers", "has no weights"), ("other", "does not fit")):
        one_line(train(*TINY, f"run_dir={tmp_path / 'run'}", f"model.init={tmp_path / name}.pt"), expected)


def test_a_run_dir_with_only_damaged_checkpoints_is_rejected(train: Train, finished: Path) -> None:
    (finished / "checkpoints" / "step_00000002.pt").write_bytes(b"")
    outcome = train(*TINY, f"run_dir={finished}")
    assert outcome.status == 2
    assert "none of the 1 checkpoints" in outcome.err.splitlines()[-1]
    assert (finished / "checkpoints" / "step_00000002.pt").exists()


def test_a_run_dir_that_cannot_be_written(train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one_line(train(*TINY, f"run_dir={tmp_path / 'file' / 'run'}"), "cannot write to run_dir", "Not a directory")


@pytest.mark.parametrize("victim", ["logs", "config.yaml", "metrics.jsonl"])
def test_a_run_dir_with_a_file_or_folder_in_the_way(train: Train, tmp_path: Path, victim: str) -> None:
    (tmp_path / "run").mkdir()
    if victim == "logs":
        (tmp_path / "run" / victim).write_text("")
    else:
        (tmp_path / "run" / victim).mkdir()
    one_line(train(*TINY, f"run_dir={tmp_path / 'run'}"), "cannot write", "another run_dir")


def test_a_second_run_in_the_same_run_dir_is_rejected(train: Train, tmp_path: Path) -> None:
    from ddp_cifar.run.run_dir import RunDir

    holder = RunDir(str(tmp_path / "run"))
    holder.claim()
    one_line(train(*TINY, f"run_dir={tmp_path / 'run'}"), "is in use by pid", "another run_dir")


def test_a_run_waits_for_a_run_dir_that_another_node_has_locked(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file server may still keep the lock of a lost node."""
    from ddp_cifar.run import run_dir

    monkeypatch.setattr(run_dir, "CLAIM_TIMEOUT_S", 0.1)
    monkeypatch.setattr(run_dir, "LOST_NODE_TIMEOUT_S", 1.0)
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "lock", "w+") as lock:
        lock.write("pid 7 on elsewhere\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = train(*TINY, f"run_dir={tmp_path / 'run'}")
        assert outcome.status == 2
        assert "is in use by pid 7 on elsewhere: waiting 1 s, in case its node is lost" in outcome.out
        assert "is in use by pid 7 on elsewhere; wait for that run" in outcome.err
        threading.Timer(0.5, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        assert train(*TINY, f"run_dir={tmp_path / 'run'}").status == 0


def test_a_run_that_cannot_save_its_checkpoints_exits_with_status_3(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddp_cifar.run.checkpoint_store.save_checkpoint", full)
    # as under a torchrun that restarts ranks, which cannot record why they must not be restarted
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "missing" / "error.json"))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    written = tmp_path / "run" / "logs" / "rank_0.log"
    written.parent.mkdir(parents=True)
    written.symlink_to("/dev/full")
    outcome = train(*TINY, f"run_dir={tmp_path / 'run'}")
    assert outcome.status == 3
    assert "was not saved (No space left on device)" in outcome.err
    assert outcome.err.count(f"cannot write {written} (No space left on device)") == 1
    assert "Traceback" not in outcome.err
    assert "finished" in outcome.out


# -- under the launchers


def test_under_torchrun_the_error_is_in_the_output(shell: Callable[..., Any], tmp_path: Path) -> None:
    outcome = shell("torchrun", "--nproc_per_node=2", "-m", "ddp_cifar.train", "optim.lrr=1", f"run_dir={tmp_path}/run")
    assert outcome.status == 1
    assert "error: optim.lrr is not a key of the config; did you mean optim.lr?" in outcome.err
    assert 'File "' not in outcome.err.split("FAILED")[-1], "torchrun's report contains a traceback of ddp_cifar"


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_under_local_sh_the_error_is_the_last_line(shell: Callable[..., Any], tmp_path: Path, nodes: str) -> None:
    outcome = shell("launch/local.sh", "optim.lrr=1", f"run_dir={tmp_path}/run", NNODES=nodes, NPROC_PER_NODE="1")
    assert outcome.status == 2
    last = outcome.err.splitlines()[-1]
    assert "error: optim.lrr is not a key of the config; did you mean optim.lr?" in last
