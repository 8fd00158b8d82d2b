"""Inflict faults on real runs at random moments until they finish, and compare them with an uninterrupted run.

    python tests/soak.py --kills 200        or        make soak KILLS=200

The sha256 of the whole state must be equal, and so must every row of metrics.jsonl (without its time keys), which includes the
sample ledger. As long as one rank survives, a fault loses no step, or one if it meets an update.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from launched import Result, parent_of, processes, send, start, wait_until

END_S = 90  # the time limit for all processes of a run to exit after a fault


ARGUMENTS = ("train.fingerprint_every=1", "train.silent_timeout_s=4", "train.hang_timeout_s=30")
"""Rows at each step, so that the last completed step is known. A process that is stopped counts as lost after 4 s."""

VARIANTS: tuple[tuple[dict[str, str], tuple[str, ...]], ...] = (
    ({"NPROC_PER_NODE": "2"}, ()),
    ({"NPROC_PER_NODE": "4"}, ("precision=fp16",)),
    ({"NPROC_PER_NODE": "1", "NNODES": "2"}, ("train.reproducible=true",)),
    ({"NPROC_PER_NODE": "2", "NNODES": "2"}, ()),
)
"""The environment and the arguments of the runs, used in turn. With NNODES=2 there are two torchrun agents."""

FAULTS = (
    "kill a rank",
    "kill a rank",
    "kill a node",
    "kill torchrun",
    "stop a rank",
    "pause a rank",
    "TERM a rank",
    "TERM",
)
"""In all of them, a rank survives. `--kill-all` adds one in which none does."""


def plan_fault(chance: random.Random, faults: tuple[str, ...]) -> tuple[str, str]:
    """Return the next fault and its moment. A rank that stops before all ranks have met is found only by the rendezvous."""
    how = chance.choice(faults)
    moments = (
        ["training", "training", "writing"] if how == "stop a rank" else ["start", "training", "training", "writing"]
    )
    return how, chance.choice(moments)


def inflict(run_dir: Path, launcher: "subprocess.Popen[bytes]", fault: tuple[str, str], chance: random.Random) -> bool:
    """Wait for a random time, then inflict the fault on the run. Return false if the run finished before it."""
    folder = run_dir / "checkpoints"
    how, moment = fault
    ended = lambda: launcher.poll() is not None  # noqa: E731
    if moment == "start":
        wait_until(ended, chance.uniform(0, 6))
    else:
        begun = time.time()
        moved = lambda: ended() or _newer(run_dir / "metrics.jsonl", begun)  # noqa: E731
        wait_until(moved, 60)
        wait_until(ended, chance.uniform(0, 2.5))
        if moment == "writing":
            wait_until(lambda: ended() or any(folder.glob("*.tmp")), 20)
            time.sleep(chance.uniform(0, 0.02))
    if ended():
        return False
    victims = processes(run_dir)
    ranks = [chance.choice(victims["ranks"])] if victims["ranks"] else []
    if how == "TERM":
        send([launcher.pid], signal.SIGTERM)
    elif how == "kill torchrun":
        send(victims["agents"], signal.SIGKILL)
    elif how == "kill a node" and victims["agents"]:
        agent = chance.choice(victims["agents"])
        local = [pid for pid in victims["ranks"] if parent_of(pid) == agent]
        send([agent, *(local if len(victims["agents"]) > 1 else ranks)], signal.SIGKILL)
    elif how == "kill all":
        send([pid for group in victims.values() for pid in group], signal.SIGKILL)
    elif how == "pause a rank":
        send(ranks, signal.SIGSTOP)
        time.sleep(1)
        send(ranks, signal.SIGCONT)
    else:
        numbers = {"kill a rank": signal.SIGKILL, "stop a rank": signal.SIGSTOP, "TERM a rank": signal.SIGTERM}
        send(ranks, numbers.get(how, signal.SIGKILL))
    return True


def last_step(run_dir: Path) -> int:
    """Return the last completed step, as far as rank 0 has recorded it."""
    path = run_dir / "metrics.jsonl"
    rows = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    return max((int(json.loads(row)["step"]) for row in rows), default=0)


def steps_of_starts(run_dir: Path) -> list[int]:
    """Return the step from which each start of the run has resumed."""
    path = run_dir / "starts.jsonl"
    return [int(json.loads(line)["step"]) for line in path.read_text().splitlines()] if path.exists() else []


def _newer(path: Path, than: float) -> bool:
    return path.exists() and path.stat().st_mtime > than


def run_until_finished(
    run_dir: Path,
    variant: tuple[dict[str, str], tuple[str, ...]],
    chance: random.Random,
    kills: int,
    faults: tuple[str, ...] = FAULTS,
) -> list[tuple[str, int]]:
    """Start the run until it finishes, with up to `kills` faults; return each one and the steps that it has lost.

    Raises if a start does not exit in time.
    """
    environment, arguments = variant
    done: list[tuple[str, int]] = []
    pending: tuple[str, int, int] | None = None
    while True:
        launcher = start(run_dir, 0, *ARGUMENTS, *arguments, **environment)
        fault = plan_fault(chance, faults)
        how = " at ".join(fault) if len(done) < kills and inflict(run_dir, launcher, fault, chance) else ""
        if os.environ.get("SOAK_TRACE"):
            print(f"{time.strftime('%T')} start {len(done)}: {how or 'no fault'}", flush=True)
        limit = 600 if fault[0] == "pause a rank" or not how else END_S
        try:
            launcher.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running {limit} s after: {how}; see {run_dir}") from None
        exited = wait_until(lambda: not any(processes(run_dir).values()), END_S)
        assert exited, f"processes left after: {how}; see {run_dir}"
        starts = steps_of_starts(run_dir)
        assert starts or how, f"the run does not start; see {run_dir}"
        if pending and len(starts) > pending[2]:
            done[-1] = pending[0], max(0, pending[1] - starts[pending[2]])
            pending = None
        if how:
            pending = how, last_step(run_dir), len(starts)
            done.append((how, 0))
        if (run_dir / "status").exists() and (run_dir / "status").read_text() == "finished\n":
            return done


def main() -> None:
    parser = argparse.ArgumentParser(
        description="inflict faults on runs at random moments and compare them with an uninterrupted run"
    )
    parser.add_argument("--kills", type=int, default=200, help="total number of faults (default 200)")
    parser.add_argument("--a-run", type=int, default=10, help="faults per run before it may finish (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (default 0)")
    parser.add_argument("--kill-all", action="store_true", help="also kill all processes at once, which loses steps")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    chance = random.Random(options.seed)
    faults = (*FAULTS, "kill all") if options.kill_all else FAULTS
    uninterrupted: list[Result] = []
    for number, variant in enumerate(VARIANTS):
        run_until_finished(folder / f"uninterrupted-{number}", variant, chance, kills=0)
        uninterrupted.append(Result.of(folder / f"uninterrupted-{number}"))
    done: list[tuple[str, int]] = []
    runs = 0
    while len(done) < options.kills:
        number = runs % len(VARIANTS)
        run_dir = folder / f"run-{runs}"
        new = run_until_finished(
            run_dir, VARIANTS[number], chance, min(options.a_run, options.kills - len(done)), faults
        )
        done += new
        result = Result.of(run_dir)
        assert result.rows == uninterrupted[number].rows, f"the rows in {run_dir} differ"
        assert result.state == uninterrupted[number].state, f"the state in {run_dir} differs"
        lost = [(how, steps) for how, steps in new if steps]
        assert all(steps <= 1 or how.startswith("kill all") for how, steps in lost), f"steps lost in {run_dir}: {lost}"
        runs += 1
        print(f"run {runs}: {VARIANTS[number]}, {len(done)} faults so far: equal, {lost or 'no step lost'}", flush=True)
        shutil.rmtree(run_dir)
    shutil.rmtree(folder)
    print(f"{runs} runs, {len(done)} faults, all equal to the uninterrupted runs")
    for how, count in sorted(Counter(how for how, _ in done).items()):
        print(f"  {count:4d}  {how}: {sum(steps for name, steps in done if name == how)} steps lost")


if __name__ == "__main__":
    main()
