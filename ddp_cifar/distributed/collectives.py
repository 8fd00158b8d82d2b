"""The last collectives of each rank, from torch's flight recorder, and which rank the others wait for according to them."""

import contextlib
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ddp_cifar.errors import is_library, short_name

RECENT = 12
"""Collectives to keep per group, besides those that have not ended."""

PURPOSES = {
    "training/step.py": "gradient bucket",
    "training/warmup.py": "gradient bucket",
    "training/totals.py": "the losses and counts",
    "training/buffers.py": "the buffers",
    "training/tree_sum.py": "gradients",
    "training/rank_exchange.py": "the ranks' status",
    "training/evaluation.py": "the logits of an evaluation",
    "data/__init__.py": "the description of the data",
}
"""What a collective is for, by the innermost file that has called it, apart from torch and distributed/world.py."""


@dataclass(frozen=True)
class Collective:
    """One call of a collective by one rank."""

    group: str
    """The name of its process group, "" for the main one."""
    number: int
    """Its number in the group, from 1. Ranks that call the same collectives have equal numbers."""
    name: str
    """As torch calls it: all_reduce, broadcast."""
    sizes: Sequence[Sequence[int]]
    """The shapes of the rank's input tensors."""
    purpose: str
    """What it is for, or where it was called; "" if it is not known."""
    step: int
    """The step in which it was called, from 1; 0 if it is not known."""
    ended: bool
    """False while the rank waits for it."""

    @property
    def kind(self) -> tuple[str, object]:
        """What is equal on all ranks. With `train.reproducible`, ranks with more micro-batches send larger tensors."""
        return self.name, [] if "gradients" in self.group else self.sizes

    def __str__(self) -> str:
        step = f" in step {self.step:,}" if self.step else ""
        sizes = " and ".join("x".join(map(str, size)) or "1" for size in self.sizes)
        return f"the {self.name.replace('_', '-')} of {self.purpose or f'{sizes} elements'}{step}"


def recent_collectives(step_at: Callable[[float], int], *, purposes: bool) -> list[Collective]:
    """Return this rank's last collectives of each group, oldest first. Can be called from any thread.

    `step_at` returns the step of a Unix time, from 1, or 0. With `purposes`, say what they are for, which takes 1.2 s of CPU
    time. The list is empty if this version of torch records none.
    """
    groups: dict[str, list[Collective]] = defaultdict(list)
    buckets: Counter[int] = Counter()
    for entry in flight_records(stacks=purposes):
        found = _collective(entry, step_at(entry["time_created_ns"] / 1e9))
        if found.purpose == "gradient bucket":
            buckets[found.step] += 1
            found = Collective(**{**vars(found), "purpose": f"gradient bucket {buckets[found.step]}"})
        groups[found.group].append(found)
    return [
        found
        for calls in groups.values()
        for i, found in enumerate(calls, RECENT - len(calls))
        if i >= 0 or not found.ended
    ]


def flight_records(*, stacks: bool) -> list[dict[str, Any]]:
    """Return the content of torch's flight recorders for gloo and for NCCL, with Python stacks if `stacks`."""
    entries: list[dict[str, Any]] = []
    with contextlib.suppress(ImportError, AttributeError, TypeError, ValueError, KeyError, RuntimeError):
        from torch._C import _distributed_c10d as c10d

        for name in ("_dump_fr_trace", "_dump_nccl_trace"):
            if dump := getattr(c10d, name, None):
                found = pickle.loads(dump(includeCollectives=True, includeStackTraces=stacks, onlyActive=False))
                entries += [entry for entry in found.get("entries", []) if not entry.get("is_p2p")]
    return entries


def _collective(entry: Mapping[str, Any], step: int) -> Collective:
    group, description = entry["process_group"]
    return Collective(
        group="" if description == "default_pg" else description or group,
        number=entry["collective_seq_id"],
        name=entry["profiling_name"].rpartition(":")[2],
        sizes=[list(sizes) for sizes in entry["input_sizes"]],
        purpose=_purpose(entry["frames"]) if "frames" in entry else "",
        step=step,
        # gloo leaves the state at "scheduled", and only retires what has ended
        ended=bool(entry.get("retired")) or entry.get("state") == "completed",
    )


def _purpose(frames: Sequence[Mapping[str, Any]]) -> str:
    """What a collective is for, by the Python frames of its call, innermost first."""
    for frame in frames:
        name = short_name(frame["filename"])
        if not is_library(frame["filename"]) and name != "distributed/world.py":
            return PURPOSES.get(name, f"{name}:{frame['line']}")
    return "gradient bucket"  # on a GPU, DDP calls it from a thread of autograd


class Wait(NamedTuple):
    """What ranks wait for."""

    text: str = ""
    """Which ranks wait in which collective; "" if it is not known."""
    ranks: Sequence[int] = ()
    """The ranks for which the others wait."""
    differs: bool = False
    """True if these ranks have entered another collective."""


def find_wait(calls: Mapping[int, Sequence[Collective]]) -> Wait:
    """Find out what ranks wait for, from the last collectives of each rank, as far as they are known."""
    if different := _first_difference(calls):
        return different
    waits = {rank: [call for call in own if not call.ended] for rank, own in calls.items()}
    open_calls = [call for own in waits.values() for call in own]
    if not open_calls:
        return Wait()
    groups = {call.group for call in open_calls}
    group = "" if "" in groups else min(groups)  # ranks wait for the control group only in passing
    number = min(call.number for call in open_calls if call.group == group)
    entered = {
        rank: [call for call in own if (call.group, call.number) == (group, number)] for rank, own in calls.items()
    }
    waiting = [rank for rank, found in entered.items() if found and not found[0].ended]
    missing = [rank for rank, own in calls.items() if not entered[rank] and _last(own, group) < number]
    call = entered[waiting[0]][0]
    text = f"{ranks_text(waiting)} {'waits' if len(waiting) == 1 else 'wait'} in {call}"
    return Wait(f"{text}; {ranks_text(missing)} never entered it" if missing else text, missing)


def _first_difference(calls: Mapping[int, Sequence[Collective]]) -> Wait | None:
    """Find the ranks that have entered another collective than most ranks; None if there are none."""
    by_number: dict[tuple[str, int], dict[int, Collective]] = defaultdict(dict)
    for rank, own in calls.items():
        for call in own:
            by_number[call.group, call.number][rank] = call
    for _, found in sorted(by_number.items(), key=lambda item: item[0][1]):
        kinds = Counter(repr(call.kind) for call in found.values())
        if len(kinds) == 1:
            continue
        most = kinds.most_common(1)[0][0]
        usual = [rank for rank, call in found.items() if repr(call.kind) == most]
        others = [rank for rank in found if rank not in usual]
        has = "have" if 1 < len(others) < len(usual) else "has"
        call, expected = found[others[0]], found[usual[0]]
        is_tie = len(others) >= len(usual)
        who = "one of them" if is_tie else ranks_text(others)
        text = (
            f"{ranks_text(others)} entered {call}, but {ranks_text(usual)} {expected}: {who} {has} skipped a collective, or "
            f"{has} called another one"
        )
        return Wait(text, [] if is_tie else others, differs=True)
    return None


def _last(calls: Iterable[Collective], group: str) -> int:
    return max((call.number for call in calls if call.group == group), default=0)


def ranks_text(ranks: Sequence[int]) -> str:
    """Format ranks: `rank 3`; `ranks 0 and 1`; `ranks 0 to 5, 7 and 9`."""
    runs: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], rank
        else:
            runs.append((rank, rank))
    parts: list[str] = []
    for first, last in runs:
        parts += [f"{first} to {last}"] if last > first + 1 else [str(rank) for rank in range(first, last + 1)]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
