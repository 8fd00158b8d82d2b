"""The choice of the checkpoint that a run resumes from, and the check that both belong to the same run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from ddp_cifar.config import Config, flatten, keys_with_role, to_dict
from ddp_cifar.errors import UserError
from ddp_cifar.log import log
from ddp_cifar.run.checkpoint_file import load_checkpoint, read_file, read_safetensors, verify_digest
from ddp_cifar.run.checkpoint_store import Checkpoints, Loaded, load_newest

STATE_DICT_KEYS = ("ema", "model", "state_dict", "model_state_dict", "net")
"""Keys under which training scripts save a state dict. The first one that is found is used."""


def load_init(init: str) -> Mapping[str, Tensor]:
    """Return the weights that the config key `model.init` names.

    `init` is a checkpoint (its averaged weights, if it has them), a run_dir (its newest checkpoint), or a saved state dict.
    Raises `UserError` if it has no weights.
    """
    path = Path(init)
    if path.is_dir():
        content: Any = load_newest(path, "model.init").state
    elif path.suffix == ".safetensors" and path.exists():
        content = read_safetensors(path)
    elif path.exists():
        content = read_file(path)
    else:
        raise UserError(f"model.init={path} does not exist; expected random, a checkpoint, a run_dir or a state dict")
    if isinstance(content, dict) and "digest" in content:
        verify_digest(path, content)
    return find_weights(content, f"model.init={path}")


def find_weights(content: object, source: str) -> Mapping[str, Tensor]:
    """Return `content` if it is a state dict, or the one under one of `STATE_DICT_KEYS`. Raises `UserError` without one."""
    candidates = [content, *(content.get(key) for key in STATE_DICT_KEYS)] if isinstance(content, Mapping) else []
    for candidate in candidates:
        if _is_state_dict(candidate):
            return candidate
    found = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        found = f"a dict with the keys {', '.join(map(str, list(content)[:10])) or '(none)'}"
    raise UserError(
        f"{source} has no weights: found {found}; expected a state dict, or one under {', '.join(STATE_DICT_KEYS)}"
    )


def _is_state_dict(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def find_checkpoint(resume: str, own: Checkpoints, *, fix_links: bool = True) -> Loaded | None:
    """Return the checkpoint that the config key `resume` selects, or None to start from scratch.

    `own` has the checkpoints of the run_dir. Its links are repaired unless `fix_links` is false. Raises `UserError` as documented
    for `resume`.
    """
    if resume == "never":
        if own.paths():
            raise UserError(
                f"resume=never, but {own.folder.parent} already has a run ({own.paths()[0].name}); "
                f"use another run_dir, remove that one, or resume it with resume=auto"
            )
        return None
    latest = own.load_latest()
    if latest and fix_links:
        try:
            own.link(latest.path, latest.state["progress"].get("best_step"))
        except OSError as error:
            log.warning(f"cannot set the links in {own.folder} ({error.strerror}); ddp_cifar does not need them")
    path = Path(resume)
    if resume == "auto" or (latest and path.parent.resolve() != own.folder.resolve()):
        if resume != "auto":
            log.info(f"this run started from resume={resume}; it now resumes from its own newest checkpoint")
        return latest
    found = load_newest(path, "resume") if path.is_dir() else Loaded(path, load_checkpoint(path))
    if latest and found.path.resolve() != latest.path.resolve():
        raise UserError(
            f"resume={resume} is not the newest checkpoint of its run, which is {latest.path.name}; "
            f"to resume from an older one, use another run_dir"
        )
    if not latest:
        # the best checkpoint and the rows of metrics of the other run are not in this run_dir
        found.state["progress"] |= {"best_val_accuracy": -1.0, "best_step": None}
        found.state.pop("rows", None)
    return found


def check_same_run(checkpoint: Loaded, config: Config) -> None:
    """Raise `UserError` if `config` and the checkpoint's differ in a key that identifies the run; log other differences."""
    now = flatten(to_dict(config))
    before = flatten(to_dict(Config())) | flatten(checkpoint.state["config"])  # keys newer than it have their defaults
    rejected: list[str] = []
    logged: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, "not set"), now.get(key, "not set")
        if old == new or key in ("run_dir", "resume"):
            continue
        (rejected if key in keys_with_role("identity") else logged).append(f"{key}={_shown(old)}, now {_shown(new)}")
    if rejected:
        raise UserError(
            f"{checkpoint.path} has other settings: {'; '.join(rejected)}; use the old values, or start a new run with "
            f"another run_dir"
        )
    if logged:
        log.info(f"settings changed since {checkpoint.path.name}: {'; '.join(logged)}")


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
