"""Files made by a stranger: nothing of theirs runs, nothing is written where they say, memory stays bounded, and each ends in
one line. docs/security.md states these promises."""

import contextlib
import io
import json
import os
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import compress, crc32

import numpy as np
import pytest
import torch
from helpers import run_on, save_untrained
from image_folders import write_tree

from ddp_cifar import checkpoints
from ddp_cifar.compare import Run
from ddp_cifar.config import DataConfig, load_config
from ddp_cifar.data import build_dataset
from ddp_cifar.data.cache import make_once
from ddp_cifar.data.decode import DecodeError, decode
from ddp_cifar.distributed.rendezvous import open_world
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.inference import load_trained
from ddp_cifar.log import printable
from ddp_cifar.registry import BUILT_IN
from ddp_cifar.run.checkpoint_file import digest, load_checkpoint
from ddp_cifar.run.resume import load_init
from ddp_cifar.run.run_dir import RunDir
from ddp_cifar.run.signs import read_sign
from ddp_cifar.sweep import expand
from ddp_cifar.tracking.jsonl import drop_later_rows

State = dict[str, Any]
CHECKOUT = Path(__file__).parent.parent
MAX_GROWTH_MB = 300
"""The bound of docs/security.md on what an error about a small file may cost."""

SHAPES = ("data.name=shapes", "data.shapes.train_images=40", "data.shapes.test_images=12")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a module that leaves a file `ran` when it is imported or called."""
    (tmp_path / "strange.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\ndef function(*_, **__): Path('ran').touch()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    assert not (tmp_path / "ran").exists(), "the file's code ran"


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Fail if the peak memory of this process grows by more than the bound."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_mb()
    yield
    assert peak_mb() - before < MAX_GROWTH_MB


def peak_mb() -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1000


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> State:
    """The state of a sound checkpoint."""

    path = tmp_path_factory.mktemp("sound") / "tiny.pt"
    with open_world("cpu") as world:
        save_untrained(path, world, *SHAPES)
    return load_checkpoint(path)


def write(path: Path, state: object) -> None:
    """Write a checkpoint with a valid digest, as an attacker can."""
    content = {**state, "digest": digest(state)} if isinstance(state, dict) else state
    torch.save(content, path)


def with_config(state: State, **values: object) -> State:
    """`state` with other values in its config: `model__name` is the key model.name."""
    config = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in state["config"].items()}
    for key, value in values.items():
        section, _, name = key.partition("__")
        config[section] = {**config[section], name: value} if name else value
    return {**state, "config": config}


def names_everywhere(state: State) -> State:
    sections = {key.replace(".", "__"): "strange:function" for key in BUILT_IN}
    return with_config(state, **sections)


class Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def write_pickle(path: Path, state: State) -> None:
    torch.save({**state, "extra": Command(), "digest": ""}, path)


def rewrite(path: Path, state: State, change: Callable[[str, bytes], bytes], compression: int = 0) -> None:
    """Write a checkpoint, and then its archive again with changed entries."""
    torch.save({**state, "digest": digest(state)}, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as before, zipfile.ZipFile(path, "w", compression) as after:
        for name in before.namelist():
            after.writestr(name, change(name, before.read(name)))


def write_compressed(path: Path, state: State) -> None:
    """25 GB of zeros in 25 MB would take minutes to make: 200 MB show the same."""
    zeros = {**state, "model": {"weight": torch.zeros(50_000_000)}}
    rewrite(path, zeros, lambda name, content: content, zipfile.ZIP_DEFLATED)


def write_short_storage(path: Path, state: State) -> None:
    rewrite(path, state, lambda name, content: content[:8] if "/data/" in name else content)


def write_truncated(path: Path, state: State) -> None:
    write(path, state)
    path.write_bytes(path.read_bytes()[:-1000])


def write_laughs(path: Path, state: State) -> None:
    """A list of two lists, which are the same list of two lists, 50 levels deep."""
    laugh: list[Any] = ["ha"]
    for _ in range(50):
        laugh = [laugh, laugh]
    torch.save({**state, "laugh": laugh, "digest": ""}, path)


def write_expanded(path: Path, state: State) -> None:
    torch.save({**state, "model": {"weight": torch.zeros(1).expand(10**11)}, "digest": ""}, path)


def write_pipe(path: Path, _: State) -> None:
    os.mkfifo(path)


def write_device(path: Path, _: State) -> None:
    path.symlink_to("/dev/zero")


WIDE = {"name": "torchvision", "args": {"name": "mobilenet_v2", "width_mult": 3000.0}}
MANY = {"name": "torchvision", "args": {"name": "mobilenet_v2", "inverted_residual_setting": [[6, 96, 10**7, 1]]}}

CHECKPOINTS: dict[str, tuple[Callable[[Path, State], None], str]] = {
    "names of functions": (lambda p, s: write(p, names_everywhere(s)), "model.name=strange:function"),
    "a pickled call": (write_pickle, "would call posix.system on loading"),
    "compressed": (write_compressed, "is compressed, from"),
    "a storage shorter than its tensor": (write_short_storage, "cannot be read as a checkpoint"),
    "truncated": (write_truncated, "cannot be read as a checkpoint"),
    "shared lists": (write_laughs, "would need far more memory"),
    "one number as a large tensor": (write_expanded, "would need far more memory"),
    "a pipe": (write_pipe, "is not a regular file"),
    "a device": (write_device, "is not a regular file"),
    "not a dict": (lambda p, s: write(p, [1, 2]), "is not a checkpoint"),
    "a config without names": (lambda p, s: write(p, {**s, "config": {1: 2}}), "its config is not a dict of names"),
    "a config that is text": (lambda p, s: write(p, {**s, "config": "seed: 1"}), "its config is not a dict of names"),
    "a config of one key": (lambda p, s: write(p, {**s, "config": {"seed": [1]}}), "seed=[1] has the wrong type"),
    "a wrong type": (lambda p, s: write(p, with_config(s, seed=[1])), "seed=[1] has the wrong type"),
    "an interpolation": (lambda p, s: write(p, with_config(s, seed="${oc.env:HOME}")), "seed"),
    "progress that is text": (lambda p, s: write(p, {**s, "progress": {"step": "1"}}), "its progress is not numbers"),
    "classes that are no names": (lambda p, s: write(p, {**s, "classes": 10**9}), "the names of its classes"),
    "a huge image": (lambda p, s: write(p, {**s, "image_shape": [3, 10**6, 10**6]}), "the (C, H, W) of its images"),
    "weights that are no tensors": (lambda p, s: write(p, {**s, "model": {"weight": "none"}}), "has no weights"),
    "a wide model": (lambda p, s: write(p, with_config(s, model=WIDE)), "has more parameters"),
    "a long model": (lambda p, s: write(p, with_config(s, model=MANY)), "has more parameters"),
    "no normalization": (lambda p, s: write(p, {**s, "normalization": {"mean": "a"}}), "normalization is not a mean"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint(name: str, folder: Path, checkpoint: State, alone: World) -> None:
    """Through each command that reads one."""
    write_it, expected = CHECKPOINTS[name]
    path = folder / "strange.pt"
    write_it(path, checkpoint)
    image = next(write_tree(folder / "images").rglob("*.png"))
    with bounded_memory():
        said = [
            run_on(alone, "evaluate", str(path)),
            run_on(alone, "predict", str(path), str(image)),
            run_on(alone, "export", str(path), "--format", "safetensors"),
        ]
        with pytest.raises(UserError) as raised:
            load_trained(path)
    said.append(str(raised.value))
    in_data = {
        "classes that are no names",
        "a huge image",
        "no normalization",
    }  # evaluate and export read the data set's first
    for number, line in enumerate(said):
        assert "\n" not in line
        assert expected in line or (name in in_data and number == 0), line
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == ["images", "strange.pt", "strange.py"]


@pytest.mark.parametrize(
    "name", ["a pickled call", "compressed", "shared lists", "one number as a large tensor", "a pipe"]
)
def test_initial_weights(name: str, folder: Path, checkpoint: State) -> None:
    write_it, _ = CHECKPOINTS[name]
    write_it(folder / "strange.pt", checkpoint)
    with bounded_memory(), pytest.raises(UserError) as raised:
        load_init("strange.pt")
    assert "\n" not in str(raised.value)


def test_a_resume_does_not_call_functions_that_only_the_checkpoint_names(
    folder: Path, checkpoint: State, train: Callable[..., Any]
) -> None:
    write(folder / "strange.pt", names_everywhere(checkpoint))
    tiny = ("model.name=tiny", "device=cpu", *SHAPES, "train.max_steps=1", "run_dir=run")
    done = train(*tiny, "resume=strange.pt")
    assert done.status == 2
    assert "has other settings: augment.name=strange:function, now null" in done.err


def test_names_that_are_consented_to_are_called(folder: Path, checkpoint: State, alone: World) -> None:
    state = with_config(checkpoint, model__name="helpers:Tiny", optim__name="strange:function")
    write(folder / "mine.pt", state)
    assert "model.name=helpers:Tiny; if you trust it, add --trust" in run_on(alone, "evaluate", "mine.pt")
    assert run_on(alone, "evaluate", "mine.pt", "--trust") == ""
    assert run_on(alone, "evaluate", "mine.pt", "model.name=helpers:Tiny") == ""
    assert run_on(alone, "export", "mine.pt", "--format", "safetensors", "--output", "m.safetensors", "--trust") == ""
    load_trained("mine.pt", trust=True)


def test_the_names_are_listed(folder: Path, checkpoint: State, capsys: pytest.CaptureFixture[str]) -> None:

    write(folder / "step_00000001.pt", with_config(checkpoint, model__name="strange:function"))
    checkpoints.main([str(folder)])
    assert "user-defined code: model.name=strange:function" in capsys.readouterr().out


def test_folders_that_only_the_checkpoint_names_are_not_written_to(folder: Path, alone: World) -> None:
    root = write_tree(folder / "images")
    data = ("data.name=imagefolder", f"data.root={root}")
    save_untrained(folder / "tiny.pt", alone, *data)
    for cached in (root / ".cache").iterdir():
        if cached.is_dir():
            for file in cached.iterdir():
                file.unlink()
            cached.rmdir()
    before = sorted(root.rglob("*"))
    assert f"to write there, add data.root={root}" in run_on(alone, "evaluate", "tiny.pt")
    assert sorted(root.rglob("*")) == before
    assert run_on(alone, "evaluate", "tiny.pt", f"data.root={root}") == ""


def test_control_characters_in_names_do_not_reach_the_terminal(
    folder: Path, checkpoint: State, alone: World, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = [f"\x1b]0;title\x07\x1b[2J{i}" for i in range(10)]
    write(folder / "tiny.pt", {**checkpoint, "classes": classes})
    line = run_on(alone, "evaluate", "tiny.pt")

    assert "\x1b" not in printable(line)
    assert "\\x1b" in printable(line)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "aliases": BOMB,
    "depth": "[" * 100_000,
    "a tag": "seed: !!python/object/apply:os.system ['touch ran']\n",
    "not text": b"\xff\xfe\x00",
    "a list": "- 1\n",
}


@pytest.mark.parametrize("name", [*YAML, "a device", "a pipe"])
def test_a_recipe_a_sweep_and_the_config_of_a_run(name: str, folder: Path) -> None:

    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("")
    for path in (folder / "recipe.yaml", folder / "run" / "config.yaml"):
        if name in YAML:
            text = YAML[name]
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        else:
            {"a device": write_device, "a pipe": write_pipe}[name](path, {})
    for read in (
        lambda: load_config([str(folder / "recipe.yaml")]),
        lambda: expand(folder / "recipe.yaml", []),
        lambda: Run.read(folder / "run"),
    ):
        with bounded_memory(), pytest.raises(UserError) as raised:
            read()
        assert "\n" not in str(raised.value)


ROWS = {
    "an endless line": "x" * 40_000_000,
    "a list": "[1, 2]\n",
    "a step that is text": '{"step": "1"}\n',
    "a scalar that is a list": '{"step": 1, "test/accuracy": [1]}\n',
    "deep": "[" * 100_000 + "\n",
    "no JSON": "step: 1\n",
}


@pytest.mark.parametrize("name", [*ROWS, "a device"])
def test_the_metrics_of_a_run(name: str, folder: Path) -> None:
    """compare says what is wrong; a resume drops such rows, or says so."""

    (folder / "config.yaml").write_text("seed: 1\n")
    metrics = folder / "metrics.jsonl"
    metrics.symlink_to("/dev/zero") if name == "a device" else metrics.write_text(ROWS[name])
    with bounded_memory(), pytest.raises(UserError) as raised:
        Run.read(folder)
    assert "\n" not in str(raised.value)
    with contextlib.suppress(UserError, OSError):
        assert drop_later_rows(metrics, 10, 10)[0] == []


def test_the_starts_the_status_and_the_heartbeats_of_a_run(folder: Path) -> None:

    run_dir = RunDir(str(folder))
    run_dir.starts.write_text(
        '[1]\n{"time": "now", "step": 1, "world_size": 1}\n{"time": 1.0, "step": 1, "world_size": 1}\n'
    )
    assert [start.time for start in run_dir.read_starts()] == [1.0]
    (folder / "status").write_text("finished\nmore\n" + "x" * 40_000_000)
    assert run_dir.read_status() == "finished"
    sign = {"rank": 0, "host": "", "pid": 1, "ticks": 1, "beats": 1, "step": "one", "time": 1.0}
    (folder / "rank_0").write_text(json.dumps(sign))
    assert read_sign(folder, 0) is None


def test_an_image_of_60000_x_60000_pixels(folder: Path) -> None:
    """A PNG of 130 bytes: its header, and no data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + crc32(kind + content).to_bytes(4, "big")

    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path = folder / "large.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with bounded_memory(), pytest.raises(DecodeError, match="it has 60,000 x 60,000 pixels"):
        decode(path, (3, 32, 32))


def test_a_cache_with_objects(folder: Path, alone: World) -> None:
    root = write_tree(folder / "images")
    config = DataConfig(name="imagefolder", root=str(root))
    build_dataset(config, alone)
    (index,) = root.glob(".cache/*/index.npz")
    np.savez(index, classes=np.array([Command()], dtype=object), skipped=np.array([Command()], dtype=object))
    with pytest.raises(UserError, match="are damaged") as raised:
        build_dataset(config, alone)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_cache_planted_by_another_user(when: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in /tmp, where others may create folders too; the test acts as a user who is neither root nor the owner."""
    theirs, mine = os.getuid(), os.getuid() + 1

    def plant(*_: object) -> None:
        (folder / "planted" / "content").mkdir(parents=True)
        os.chown(folder / "planted", mine + 1, -1) if theirs == 0 else None

    monkeypatch.setattr(os, "geteuid", lambda: mine)
    if when == "before":
        plant()
    with pytest.raises(UserError, match=r"planted belongs to another user \(uid \d+\)"):
        make_once(folder / "planted", plant)


def test_a_planted_link_in_place_of_a_lock_is_not_followed(folder: Path) -> None:
    (folder / "mine").write_text("precious")
    (folder / ".made.lock").symlink_to(folder / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        make_once(folder / "made", lambda temporary: None)
    assert (folder / "mine").read_text() == "precious"


STRANGE = (
    "$(touch ran)",
    "`touch ran` ",
    "'; touch ran; '",
    "line\nline",
    "-rf",
    'a"b',
    "c\\d",
    "* e",
    "é ü",
    "a;b&c|d",
)


def test_arguments_of_a_sweep_reach_the_shell_unchanged(folder: Path) -> None:
    (folder / "sweep.yaml").write_text(f"grid:\n  data.root: {json.dumps(STRANGE)}\n")
    script = f"""set -euo pipefail; source {CHECKOUT}/launch/common.sh
python -m ddp_cifar.sweep --null sweep.yaml data.name=shapes >runs
while read_arguments; do printf '%s\\0' "${{arguments[@]}}"; done <runs"""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    said = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, check=True).stdout.decode()
    found = [text.removeprefix("data.root=") for text in said.split("\0") if text.startswith("data.root=")]
    assert found == list(STRANGE)


@pytest.mark.parametrize("host", ["-oProxyCommand=touch${IFS}ran", "$(touch${IFS}ran)", "a;touch${IFS}ran"])
def test_a_host_that_is_an_option_or_a_command(host: str, folder: Path) -> None:
    (folder / "hosts").write_text(f"{host}\n")
    script = CHECKOUT / "launch" / "ssh.sh"
    said = subprocess.run([script, "hosts"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert said.returncode == 2
    assert "expected a host of letters, digits" in said.stderr
