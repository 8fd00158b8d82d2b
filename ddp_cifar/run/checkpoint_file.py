"""Checkpoint files: their format, durable writes and verified reads.

A checkpoint is a plain dict of tensors, numbers and strings, which `torch.load(path, weights_only=True)` accepts: `model`,
`optimizer`, `progress`, `config`, `classes` (class names), `image_shape` (channels, height, width) and `normalization` (`mean`
and `std`); `ema` (averaged weights) and `scaler` (for fp16) if the run has them; and `digest`, a sha256 of the rest. One that was
saved when a rank was lost also has `rows`, the last rows of metrics.
"""

import errno
import hashlib
import io
import os
import re
import socket
import textwrap
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddp_cifar.errors import UserError, first_line

State = dict[str, Any]

PARTS = ("model", "optimizer", "progress", "config")
"""The keys of every checkpoint."""

MAX_VALUES = 1_000_000
"""The most dicts, lists, keys, numbers and tensors in a file. A checkpoint has thousands."""

MAX_GROWTH, MIN_LIMIT_BYTES = 4, 64 * 2**20
"""The tensors of a file may have MAX_GROWTH times its bytes, because tensors may share memory, plus MIN_LIMIT_BYTES."""


def digest(state: object) -> str:
    """Return a sha256 of nested dicts, lists and tensors: equal only if all keys, numbers and tensors are bitwise identical.

    The memory order and the device of a tensor do not matter.
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


def snapshot(state: State, *, pinned: bool = True) -> tuple[State, Callable[[], None]]:
    """Return a copy of `state` on the CPU, and a function that waits until the copy is complete.

    The caller may change `state` immediately: a GPU copies in stream order, before any work that follows. The copy is in
    pinned memory, whose allocation may wait for all streams of the GPU. Unless `pinned`, it waits for the current one only.
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
        return torch.empty_like(value, device="cpu", pin_memory=pinned).copy_(value.detach(), non_blocking=pinned)

    copied = copy(state)
    if not on_cuda:
        return copied, lambda: None
    done = torch.cuda.Event()
    done.record()
    return copied, done.synchronize


def save_checkpoint(path: Path, state: State) -> None:
    """Write `state` to `path` durably and atomically: afterwards, `path` is either unchanged or complete.

    Raises `OSError` if it cannot be written, and leaves no partial file.
    """
    buffer = io.BytesIO()  # in memory first, so that a full disk is an OSError here and not an abort inside torch
    torch.save({**state, "digest": digest(state)}, buffer)
    write_durably(path, buffer.getbuffer())


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a temporary file, fsync, rename, fsync the folder: `path` is either unchanged or complete.

    Raises `OSError` if it cannot be written, and leaves no partial file.
    """
    # the name is unique: several ranks, and two threads of a rank, may write the same checkpoint
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_native_id()}.tmp")
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
    """Return the state in `path`, on the CPU. Raises `UserError` if it is missing, damaged, or not a ddp_cifar checkpoint."""
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}: expected a checkpoint file, or the run_dir of a run")
    state = read_file(path)
    missing = [part for part in (*PARTS, "digest") if part not in state] if isinstance(state, dict) else list(PARTS)
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of a run: it has no {missing[0]}, expected {', '.join(PARTS)}; "
            f"to start a new run from weights alone, use model.init={path}"
        )
    for part in PARTS:
        if not isinstance(state[part], dict) or not all(isinstance(key, str) for key in state[part]):
            raise UserError(f"{path} is damaged: its {part} is not a dict of names; use another checkpoint")
    if not _has_progress(state["progress"]):
        raise UserError(f"{path} is damaged: its progress is not numbers of steps and epochs; use another checkpoint")
    verify_digest(path, state)
    return state  # type: ignore[no-any-return]


def _has_progress(progress: State) -> bool:
    counts = [progress.get(name) for name in ("step", "epoch", "step_in_epoch")]
    results = progress.get("results")
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and isinstance(results, dict)
        and all(isinstance(tag, str) and isinstance(value, float | int) for tag, value in results.items())
    )


def verify_digest(path: Path, state: State) -> None:
    """Remove the digest from a checkpoint's state. Raises `UserError` if it does not match the content."""
    expected = state.pop("digest")
    if digest(state) != expected:
        raise UserError(f"{path} is damaged: its content does not match its checksum; use an older checkpoint")


def read_file(path: Path) -> Any:
    """Return the content of a `torch.save` file, on the CPU.

    Raises `UserError` if it is damaged, could run code, or would need much more memory than its size.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a regular file: expected a checkpoint, or a file of weights")
    num_bytes = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > num_bytes:
                raise UserError(
                    f"{path} is compressed, from {unpacked:,} to {num_bytes:,} bytes: torch.save does not do that"
                )
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_size(path, content, num_bytes)
        return content
    except UserError:
        raise
    except Exception as error:  # torch raises many exception types for damaged files
        if blocked := re.search(r"GLOBAL (\S+) whose module", str(error)):
            raise UserError(
                f"{path} would call {blocked[1]} on loading: it is not a file of weights; do not load it"
            ) from error
        if "Unsupported global" in str(error):
            raise UserError(
                f"{path} is a pickle of whole objects, such as a module, and could run code on loading; to convert it, run this "
                f"where its class is defined: m = torch.load({str(path)!r}, weights_only=False); "
                f"torch.save((m['net'] if isinstance(m, dict) else m).state_dict(), 'weights.pt')"
            ) from error
        reason = textwrap.shorten(first_line(error), 120, placeholder=" ...")
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}): it is damaged, or not a ddp_cifar checkpoint"
        ) from error


def _check_size(path: Path, content: object, num_bytes: int) -> None:
    """Raise `UserError` if `content` repeats few bytes or values so often that a copy or a digest of it would not end.

    A tensor may repeat one number (stride 0), and nested lists may share their items.
    """
    limit, tensor_bytes = MAX_GROWTH * num_bytes + MIN_LIMIT_BYTES, 0
    left = [content]
    for _ in range(MAX_VALUES):
        if not left:
            return
        value = left.pop()
        if isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
        elif isinstance(value, Tensor):
            tensor_bytes += value.numel() * value.element_size()
            if tensor_bytes > limit:
                break
    raise UserError(
        f"{path} has {num_bytes:,} bytes, but its values would need far more memory: it is not a file of weights"
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file. Raises `UserError` if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a safetensors file ({first_line(error)}): it is damaged") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure, if the file system supports it, as vfat and SMB do not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
