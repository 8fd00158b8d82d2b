"""The checkpoints of a run: save in the background, find the newest good one, remove old ones."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ddp_cifar.errors import UserError
from ddp_cifar.log import log
from ddp_cifar.run.checkpoint_file import State, digest, load_checkpoint, save_checkpoint, snapshot
from ddp_cifar.run.run_dir import SURVIVORS, lock_file
from ddp_cifar.text_files import read_text

VERIFIED = "verified"
"""The file with the number of the last step at which the devices were checked."""

SURVIVOR_TIMEOUT_S = 20.0
"""The longest wait for another rank to save the last completed step. torchrun kills a rank 30 s after another one has failed."""


def load_newest(folder: Path, key: str) -> "Loaded":
    """Return the newest good checkpoint of a run_dir or a folder of checkpoints. `key` is the config key for errors."""
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = Checkpoints(checkpoints, keep=1).load_latest()
    if found is None:
        raise UserError(f"{key}={folder} has no checkpoints; expected a checkpoint file, or the run_dir of a run")
    return found


class Loaded(NamedTuple):
    """A checkpoint in memory, and its path."""

    path: Path
    state: State


class Checkpoints:
    """The checkpoints of one run: files `step_NNNNNNNN.pt`, and links `latest.pt` and `best.pt`."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.failed_saves = 0
        self._warned = False
        """True after the warning that links cannot be set."""
        self.last_good: Path | None = None
        self.bad: set[Path] = set()
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def paths(self) -> list[Path]:
        """Return all checkpoints, newest first."""
        return sorted(self.folder.glob("step_*.pt"), reverse=True)

    def load_latest(self) -> Loaded | None:
        """Return the newest good checkpoint, or None if there are no checkpoints. Log a warning for each newer bad one.

        Raises `UserError` if all are bad.
        """
        paths = self.paths()
        for path in paths:
            try:
                loaded = Loaded(path, load_checkpoint(path))
                self.last_good = path
                return loaded
            except UserError as error:
                log.warning(f"skipping a checkpoint: {error}")
                self.bad.add(path)
        if paths:
            raise UserError(
                f"none of the {len(paths)} checkpoints in {self.folder} is good; restore one, or use another run_dir"
            )
        return None

    def save(
        self, state: State, step: int, best_step: int | None = None, first: Callable[[], None] = lambda: None
    ) -> None:
        """Save a copy of `state` on a thread. The caller may change `state` immediately.

        `best_step` is the step of the best checkpoint so far. The thread calls `first` before it writes the checkpoint. If an
        earlier save is not finished, this one is skipped with a warning.
        """
        if not self.finish(timeout_s=0):
            self._failed(self._path(step), "the previous one is still being written")
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

    def save_as_survivor(self, state: State, step: int, epoch: int) -> None:
        """Save `state`, which is the same on every rank that is left, unless another rank has saved it. Waits for the disk.

        It is the state after `step` steps and `epoch` whole epochs. After the last step of an epoch, another rank may be an
        epoch further; its state counts. If the state is not the same on another rank, none is saved: nobody knows which one is
        right. Raises `OSError`.
        """
        if not self.folder.is_dir():  # a trainer without a run_dir
            return
        copied, wait = snapshot(state, pinned=False)  # a collective on another stream may never end
        wait()
        own, path = digest(_common(copied)), self._path(step)
        with open(self.folder / SURVIVORS, "a+") as file:
            with contextlib.suppress(OSError):  # without lock support, several ranks write the same state
                if not lock_file(file, SURVIVOR_TIMEOUT_S):
                    log.warning(f"{path} was not saved here: another rank still writes it")
                    return
            file.seek(0)
            rows = [line.split() for line in file]
            others = {other for *where, other in rows if where == [str(step), str(epoch)]}
            if [str(step), str(epoch + 1)] in [where for *where, _ in rows]:
                return
            if not others:
                save_checkpoint(path, copied)
                log.info(f"saved the last completed step to {path}")
            elif others != {own}:
                path.unlink(missing_ok=True)
                log.warning(f"{path} was removed: the ranks that are left have different states")
            file.write(f"{step} {epoch} {own}\n")

    def finish(self, timeout_s: float | None = None) -> bool:
        """Wait until the last save is on the disk; False if it takes longer than `timeout_s`."""
        if self._writer:
            self._writer.join(timeout_s)
            if self._writer.is_alive():
                return False
            self._writer = None
        if self._error:
            error, self._error = self._error, None
            raise error
        return True

    @property
    def verified_step(self) -> int:
        """The last step at which a check of the devices has found nothing wrong, 0 without one."""
        with contextlib.suppress(OSError, ValueError):
            return int(read_text(self.folder / VERIFIED))
        return 0

    def verify(self, step: int) -> None:
        """Note that the devices have been checked in the state after `step` steps. Older checkpoints can be trusted."""
        with contextlib.suppress(OSError):
            temporary = self.folder / f"{VERIFIED}.tmp"
            temporary.write_text(f"{step}\n")
            os.replace(temporary, self.folder / VERIFIED)

    def distrust(self, start: int) -> None:
        """Rename the checkpoints after `verified_step` to unverified_*, so that no run resumes from them.

        If no check has ever been made, those after the step `start`, from which the run was started. Call `finish` before.
        """
        verified, paths = self._path(self.verified_step or start), self.paths()
        try:
            for path in (path for path in paths if path > verified):
                path.rename(path.with_name(f"unverified_{path.name}"))
        except OSError as error:  # the other ranks wait for this one
            log.warning(f"cannot rename checkpoints that cannot be trusted ({error.strerror}); remove the newest ones")
        self.last_good = next((path for path in paths if path <= verified), None)
        for name in ("latest.pt", "best.pt"):
            if not (link := self.folder / name).exists():
                link.unlink(missing_ok=True)
        if self.last_good:
            self.link(self.last_good, None)

    def link(self, latest: Path, best_step: int | None) -> None:
        """Set `latest.pt` and `best.pt`. A resume also calls it, as a kill may happen after a save and before its links."""
        for name, path in (("latest.pt", latest), ("best.pt", None if best_step is None else self._path(best_step))):
            link = self.folder / name
            # the best checkpoint may have failed to save
            if path and path.exists() and not (link.is_symlink() and os.readlink(link) == path.name):
                try:
                    _link(link, path)
                except OSError as error:  # such as a file system without links
                    if not self._warned:
                        log.warning(f"cannot link {link} to {path.name} ({error.strerror}); use step_*.pt instead")
                    self._warned = True

    def _write(self, state: State, step: int, best_step: int | None, first: Callable[[], None]) -> None:
        """Write a checkpoint, set the links, and remove old ones. A failure is counted and logged; training continues."""
        path = self._path(step)
        try:
            first()
            save_checkpoint(path, state)
        except OSError as error:
            self._failed(path, error.strerror or str(error))
            return
        self.bad.discard(path)
        self.last_good = path
        self.link(path, best_step)
        try:
            self._remove_old(best_step)
        except OSError as error:
            log.warning(f"cannot remove old checkpoints ({error.strerror}); training continues")

    def _failed(self, path: Path, reason: str) -> None:
        self.failed_saves += 1
        log.warning(f"checkpoint {path} was not saved ({reason}); training continues and older checkpoints are kept")

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.pt"

    def _remove_old(self, best_step: int | None) -> None:
        best = self.folder / "best.pt"
        # damaged ones do not count toward `keep`, and are left for the user to inspect
        good = [path for path in self.paths() if path not in self.bad]
        keep = {path.name for path in good[: self.keep]} | ({os.readlink(best)} if best.is_symlink() else set())
        keep |= set() if best_step is None else {self._path(best_step).name}  # also without links
        verified = self._path(self.verified_step)
        keep.update([path.name for path in good if path <= verified][:1])
        for path in good:
            if path.name not in keep:
                path.unlink()


class NullCheckpoints(Checkpoints):
    """Saves only as a survivor. Used on every rank except 0, so that the training loop is the same on all ranks."""

    def __init__(self, checkpoints: Checkpoints | None) -> None:
        """`checkpoints`: those of rank 0, if the trainer has any."""
        super().__init__(checkpoints.folder if checkpoints else Path(os.devnull), keep=1)

    def save(
        self, state: State, step: int, best_step: int | None = None, first: Callable[[], None] = lambda: None
    ) -> None:
        pass

    def verify(self, step: int) -> None:
        pass

    def distrust(self, start: int) -> None:
        pass

    def finish(self, timeout_s: float | None = None) -> bool:
        return True


def _common(state: State) -> State:
    """Return the part of a state that is equal on all ranks."""
    progress = {key: value for key, value in state["progress"].items() if key != "conditions"}
    return {"progress": progress} | {key: state[key] for key in ("model", "optimizer", "ema", "scaler") if key in state}


def _link(link: Path, target: Path) -> None:
    """Point `link` at a file in the same folder, atomically."""
    temporary = link.with_name(f"{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)
