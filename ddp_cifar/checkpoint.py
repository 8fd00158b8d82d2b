"""Checkpoints: written whole or not at all, verified when read, the newest good one found, old ones removed.

A checkpoint is a plain dict of tensors, numbers and strings, which `torch.load(path, weights_only=True)` takes:
`model`, `optimizer`, `progress`, `config`, `classes` (their names) and `image_size` (in pixels); `ema` (averaged weights)
and `scaler` (of fp16) where the run has them; and `digest`, a sha256 of the rest.
"""

import hashlib
import io
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddp_cifar.config import Config, flatten, to_dict
from ddp_cifar.errors import UserError
from ddp_cifar.log import log

State = dict[str, Any]
PARTS = ("model", "optimizer", "progress", "config")  # and, where they are on, "ema" and "scaler"

# What makes a run the run it is: keys, or sections, that a resume must find as they were ...
IDENTITY = (
    "seed",
    "data",
    "model",
    "optim",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.label_smoothing",
    "train.ema_decay",
)
# ... but for those in them that change where or how something is done, not what
NOT_IDENTITY = (
    "data.root",
    "data.cache",
    "data.on_corrupt",
    "data.residency",
    "model.init",
    "optim.implementation",
)


def digest(state: object) -> str:
    """sha256 of nested dicts, lists and tensors: equal if and only if every key, number and bit of a tensor is.

    Apart from a tensor's memory order and device, which do not change what it says.
    """
    sha = hashlib.sha256()

    def feed(value: object) -> None:
        if isinstance(value, Mapping):
            sha.update(f"dict {len(value)}\0".encode())
            for key, item in value.items():
                feed(key)
                feed(item)
        elif isinstance(value, list | tuple):
            sha.update(f"list {len(value)}\0".encode())
            for item in value:
                feed(item)
        elif isinstance(value, Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}\0".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(f"{type(value).__name__} {value!r}\0".encode())

    feed(state)
    return sha.hexdigest()


def snapshot(state: State) -> tuple[State, Callable[[], None]]:
    """A copy of `state` on the CPU that goes on being what `state` is now, and a function that waits until it is whole.

    A GPU copies in its own order, between the steps before and after, while the host goes on.
    """
    on_cuda = False

    def copy(value: Any) -> Any:
        nonlocal on_cuda
        if isinstance(value, Mapping):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copy(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if value.device.type != "cuda":
            return value.detach().to("cpu", copy=True)
        on_cuda = True
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)

    copied = copy(state)
    if not on_cuda:
        return copied, lambda: None
    done = torch.cuda.Event()
    done.record()
    return copied, done.synchronize


def save_checkpoint(path: Path, state: State) -> None:
    """Write `state` to `path`, durably: whatever happens, `path` is as it was before, or whole.

    Raises `OSError` if it cannot be written, and then leaves nothing behind.
    """
    buffer = io.BytesIO()  # in memory first: a full disk then is an OSError here, and not an abort inside torch
    torch.save({**state, "digest": digest(state)}, buffer)
    write_durably(path, buffer.getbuffer())


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a file under another name, fsync, rename, fsync of the folder: `path` is as it was before, or whole.

    Raises `OSError` if it cannot be written, and then leaves nothing behind.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> State:
    """The state in `path`, on the CPU. Raises `UserError` if it is missing, damaged, or not a checkpoint of ours."""
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}: expected a checkpoint file, or the run_dir of a run")
    state = _read(path)
    missing = [part for part in (*PARTS, "digest") if part not in state] if isinstance(state, dict) else list(PARTS)
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of a run: it has no {missing[0]}, expected {', '.join(PARTS)}; "
            f"weights alone can be a new run's start, with model.init={path}"
        )
    _verify(path, state)
    return state  # type: ignore[no-any-return]


def _verify(path: Path, state: State) -> None:
    """Take the digest out of a checkpoint and raise `UserError` if it is not that of the rest."""
    expected = state.pop("digest")
    if digest(state) != expected:
        raise UserError(f"{path} is damaged: its content does not match its checksum; use an older checkpoint")


def load_init(init: str) -> Mapping[str, Tensor]:
    """The weights that the config key `model.init` names: a checkpoint's (the averaged ones, if it has them), a
    run_dir's newest checkpoint's, or a saved state dict's.

    Raises `UserError` if there are none.
    """
    path = Path(init)
    if path.is_dir():
        content: Any = load_newest(path, "model.init").state
    elif path.exists():
        content = _read(path)
    else:
        raise UserError(f"model.init={path} does not exist: expected random, a checkpoint, a run_dir or a state dict")
    if isinstance(content, dict) and "digest" in content:
        _verify(path, content)
    weights: Any = content.get("ema", content.get("model", content)) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise UserError(f"model.init={path} holds no weights: expected a checkpoint of ours, or a saved state dict")
    return weights


def load_newest(folder: Path, key: str) -> "Loaded":
    """The newest good checkpoint of a run_dir, or of a folder of checkpoints, that the config's `key` names."""
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = Checkpoints(checkpoints, keep=1).load_latest()
    if found is None:
        raise UserError(f"{key}={folder} has no checkpoints: expected a checkpoint, or the run_dir of a run")
    return found


def _read(path: Path) -> Any:
    """What `torch.save` wrote to `path`, on the CPU. Raises `UserError` if it is damaged or could run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        if "Unsupported global" in str(error):
            raise UserError(
                f"{path} is a pickle of whole objects, such as a module, which could run code on loading: where its class is "
                f"defined, convert it with: "
                f"torch.save(torch.load({str(path)!r}, weights_only=False)['net'].state_dict(), 'weights.pt')"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason[:120]}): it is damaged, or not one of ours"
        ) from error


class Loaded(NamedTuple):
    """A checkpoint that was read."""

    path: Path
    state: State


class Checkpoints:
    """The checkpoints of one run: `step_NNNNNNNN.pt`, and the links `latest.pt` and `best.pt`."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.failed_saves = 0
        self.last_good: Path | None = None
        self.bad: set[Path] = set()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def paths(self) -> list[Path]:
        """All checkpoints, the newest first."""
        return sorted(self.folder.glob("step_*.pt"), reverse=True)

    def load_latest(self) -> Loaded | None:
        """The newest good checkpoint; a warning names each bad one that is newer. None if there are none at all.

        Raises `UserError` if there are some but all are bad.
        """
        paths = self.paths()
        for path in paths:
            try:
                loaded = Loaded(path, load_checkpoint(path))
                self.last_good = path
                return loaded
            except UserError as error:
                log.warning(f"skipped: {error}")
                self.bad.add(path)
        if paths:
            raise UserError(
                f"none of the {len(paths)} checkpoints in {self.folder} is good: restore one, or take another run_dir"
            )
        return None

    def save(
        self, state: State, step: int, best_step: int | None = None, first: Callable[[], None] = lambda: None
    ) -> None:
        """Save `state` as it is now, on a thread; the caller may change it at once.

        `best_step`: whose checkpoint is the best so far. `first` is called on the thread: what must be on the disk before
        the checkpoint is. While an earlier save is still being written, this one is left out, with a warning.
        """
        if not self.finish(timeout_s=0):
            self._failed(self._path(step), "the one before is still being written")
            return
        copied, wait = snapshot(state)

        def write() -> None:
            try:
                wait()
                self._write(copied, step, best_step, first)
            except BaseException as error:
                self._error = error

        self._writer = threading.Thread(target=write, name="checkpoint")
        self._writer.start()

    def finish(self, timeout_s: float | None = None) -> bool:
        """Wait until what was saved is on the disk; False if it is not within `timeout_s`."""
        if self._writer:
            self._writer.join(timeout_s)
            if self._writer.is_alive():
                return False
            self._writer = None
        if self._error:
            error, self._error = self._error, None
            raise error
        return True

    def link(self, latest: Path, best_step: int | None) -> None:
        """Set `latest.pt` and `best.pt`. For a run that goes on: a kill may have come between a checkpoint and its links."""
        for name, path in (("latest.pt", latest), ("best.pt", None if best_step is None else self._path(best_step))):
            link = self.folder / name
            # the best may be one that could not be saved
            if path and path.exists() and not (link.is_symlink() and os.readlink(link) == path.name):
                _link(link, path)

    def _write(self, state: State, step: int, best_step: int | None, first: Callable[[], None]) -> None:
        """Write, set the links and remove good ones beyond `keep`. A failure is a warning, and counted: training goes on."""
        path = self._path(step)
        try:
            first()
            save_checkpoint(path, state)
            self.bad.discard(path)
            self.last_good = path
            self.link(path, best_step)
            self._remove_old()
        except OSError as error:
            self._failed(path, error.strerror or str(error))

    def _failed(self, path: Path, reason: str) -> None:
        self.failed_saves += 1
        log.warning(f"checkpoint {path} was not saved ({reason}); training goes on, older checkpoints are kept")

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.pt"

    def _remove_old(self) -> None:
        best = self.folder / "best.pt"
        # one that was found damaged takes no good one's place, and is left for its owner to look at
        good = [path for path in self.paths() if path not in self.bad]
        keep = {path.name for path in good[: self.keep]} | ({os.readlink(best)} if best.is_symlink() else set())
        for path in good:
            if path.name not in keep:
                path.unlink()


class NullCheckpoints(Checkpoints):
    """Saves nothing: every rank but 0 has one, so that the loop need not ask which rank it is on."""

    def save(
        self, state: State, step: int, best_step: int | None = None, first: Callable[[], None] = lambda: None
    ) -> None:
        pass

    def finish(self, timeout_s: float | None = None) -> bool:
        return True


def find_checkpoint(resume: str, own: Checkpoints, *, mend: bool = True) -> Loaded | None:
    """The checkpoint that the config key `resume` asks for, or None to start anew.

    `own` are the checkpoints of the run's own folder, whose links are set right unless `mend` is false. Raises `UserError`
    as `resume`'s documentation says.
    """
    if resume == "never":
        if own.paths():
            raise UserError(
                f"resume=never, but {own.folder.parent} has a run already ({own.paths()[0].name}): "
                f"take another run_dir, remove that one, or go on with resume=auto"
            )
        return None
    latest = own.load_latest()
    if latest and mend:
        try:
            own.link(latest.path, latest.state["progress"].get("best_step"))
        except OSError as error:
            log.warning(f"links in {own.folder} could not be set ({error.strerror}); nothing of ours needs them")
    path = Path(resume)
    if resume == "auto" or (latest and path.parent.resolve() != own.folder.resolve()):
        if resume != "auto":
            log.info(f"resume={resume} was this run's start; it goes on from its own newest checkpoint")
        return latest
    found = load_newest(path, "resume") if path.is_dir() else Loaded(path, load_checkpoint(path))
    if latest and found.path.resolve() != latest.path.resolve():
        raise UserError(
            f"resume={resume} is not the newest checkpoint of its run ({latest.path.name} is): "
            f"to go on from it, take another run_dir"
        )
    if not latest:
        # another run's best is not in this run_dir
        found.state["progress"] |= {"best_val_accuracy": -1.0, "best_step": None}
    return found


def check_same_run(checkpoint: Loaded, config: Config) -> None:
    """Raise `UserError` where `config` and a checkpoint's differ in what makes the run; log other differences."""
    now = flatten(to_dict(config))
    before = flatten(to_dict(Config())) | flatten(checkpoint.state["config"])  # a key it is too old for has its default
    refused: list[str] = []
    logged: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, "not set"), now.get(key, "not set")
        if old == new or key in ("run_dir", "resume"):
            continue
        identity = key not in NOT_IDENTITY and any(key == name or key.startswith(f"{name}.") for name in IDENTITY)
        (refused if identity else logged).append(f"{key}={_shown(old)}, now {_shown(new)}")
    if refused:
        raise UserError(
            f"{checkpoint.path} was made with {'; '.join(refused)}: set what it had, or start a new run with another run_dir"
        )
    if logged:
        log.info(f"other settings than when {checkpoint.path.name} was made: {'; '.join(logged)}")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str, *, new_head: bool = False) -> list[str]:
    """Load a state dict, with DataParallel's or DistributedDataParallel's `module.` in front of its names or without.

    With `new_head`, a last layer for another number of classes keeps the weights it has; returns their names.
    Raises `UserError` if a name or a shape does not fit the model.
    """
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    own = model.state_dict()
    kept = _other_head(weights, own) if new_head else []
    weights |= {name: own[name] for name in kept}
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            kind = "has no" if name not in weights else "has a"
            raise UserError(f"{source} does not fit the model: it {kind} {name}; check model.name")
        if weights[name].shape != own[name].shape:
            raise UserError(
                f"{source} does not fit the model: {name} has shape {tuple(weights[name].shape)}, "
                f"expected {tuple(own[name].shape)}; check model.name, data.image_size and the number of classes"
            )
    model.load_state_dict(weights)
    return kept


def _other_head(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """The last layer's weights, if they differ in the number of its outputs and nothing else."""
    layer = list(own)[-1].rpartition(".")[0] + "."
    names = [name for name in own if name.startswith(layer) and name in weights]
    if all(weights[name].shape[1:] == own[name].shape[1:] for name in names):
        return [name for name in names if weights[name].shape != own[name].shape]
    return []


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def _link(link: Path, target: Path) -> None:
    """Point `link` at a file of its own folder; it never is absent meanwhile."""
    temporary = link.with_name(f"{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
