"""Kill real runs repeatedly at random moments until they finish, and compare them with an uninterrupted run.

    python tests/soak.py --kills 200        or        make soak KILLS=200

The sha256 of the whole state must be equal, and so must every row of metrics.jsonl (without its time keys), which includes the
sample ledger.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from launched import Result, processes, send, start, wait_until

END_S = 90  # the time limit for all processes of a run to exit after a kill


def kill_once(run_dir: Path, launcher: "subprocess.Popen[bytes]", chance: random.Random) -> str:
    """Wait for a random time, then kill processes of the run. Return the action, or "" if the run finished before it."""
    folder = run_dir / "checkpoints"
    moment = chance.choice(["start", "training", "training", "writing"])
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
        return ""
    victims = processes(run_dir)
    how = chance.choice(["kill a rank", "kill all", "kill torchrun", "TERM a rank", "TERM the launcher"])
    if how == "kill a rank" and victims["ranks"]:
        send([chance.choice(victims["ranks"])], signal.SIGKILL)
    elif how == "kill torchrun" and victims["agents"]:
        send(victims["agents"], signal.SIGKILL)
    elif how == "TERM a rank" and victims["ranks"]:
        send([chance.choice(victims["ranks"])], signal.SIGTERM)
    elif how == "TERM the launcher":
        send([launcher.pid], signal.SIGTERM)
    else:
        how = "kill all"
        send([pid for group in victims.values() for pid in group], signal.SIGKILL)
    return f"{how}, {moment}"


def _newer(path: Path, than: float) -> bool:
    return path.exists() and path.stat().st_mtime > than


def run_until_finished(run_dir: Path, ranks: int, chance: random.Random, kills: int) -> list[str]:
    """Start the run until it finishes, with up to `kills` kills; return the actions. Raises if a start does not exit in time."""
    done: list[str] = []
    while True:
        launcher = start(run_dir, ranks)
        how = kill_once(run_dir, launcher, chance) if len(done) < kills else ""
        done += [how] if how else []
        if os.environ.get("SOAK_TRACE"):
            print(f"{time.strftime('%T')} start {len(done)}: {how or 'no kill'}", flush=True)
        limit = END_S if len(done) <= kills else 600
        try:
            launcher.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            if how:
                raise AssertionError(f"still running {limit} s after: {done[-1:]}; see {run_dir}") from None
        exited = wait_until(lambda: not any(processes(run_dir).values()), END_S)
        assert exited, f"processes left after: {done[-1:]}; see {run_dir}"
        if (run_dir / "status").exists() and (run_dir / "status").read_text() == "finished\n":
            return done


def main() -> None:
    parser = argparse.ArgumentParser(
        description="kill runs at random moments and compare them with an uninterrupted run"
    )
    parser.add_argument("--kills", type=int, default=200, help="total number of kills (default 200)")
    parser.add_argument("--a-run", type=int, default=10, help="kills per run before it may finish (default 10)")
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[2, 4], help="numbers of ranks, used in turn (default 2 4)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills (default 0)")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    chance = random.Random(options.seed)
    uninterrupted: dict[int, Result] = {}
    for ranks in options.ranks:
        run_until_finished(folder / f"uninterrupted-{ranks}", ranks, chance, kills=0)
        uninterrupted[ranks] = Result.of(folder / f"uninterrupted-{ranks}")
    done: list[str] = []
    lost: list[int] = []
    runs = 0
    while len(done) < options.kills:
        ranks = options.ranks[runs % len(options.ranks)]
        run_dir = folder / f"run-{runs}"
        done += run_until_finished(run_dir, ranks, chance, min(options.a_run, options.kills - len(done)))
        result = Result.of(run_dir)
        assert result.rows == uninterrupted[ranks].rows, f"the rows in {run_dir} differ"
        assert result.state == uninterrupted[ranks].state, f"the state in {run_dir} differs"
        last = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[-1])
        lost.append(last["steps_lost"])
        runs += 1
        print(
            f"run {runs}: {ranks} ranks, {len(done)} kills so far, {last['steps_lost']} steps lost: equal", flush=True
        )
        shutil.rmtree(run_dir)
    shutil.rmtree(folder)
    print(
        f"{runs} runs, {len(done)} kills, all equal to the uninterrupted run; steps lost per run: "
        f"{statistics.median(lost)} (median)"
    )
    for how, count in sorted(Counter(done).items()):
        print(f"  {count:4d}  {how}")


if __name__ == "__main__":
    main()
