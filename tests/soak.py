"""Kills a real run at random moments, again and again, until it is finished, and compares it with the same run unbroken.

    python tests/soak.py --kills 200        or        make soak KILLS=200

The whole state's sha256, every row of metrics.jsonl but for its keys of time, and the ledger in them must be equal.
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

END_S = 90  # within which every process of a run is gone after a kill


def kill_once(run_dir: Path, launcher: "subprocess.Popen[bytes]", chance: random.Random) -> str:
    """Let the run go for a random while, then kill some of it; returns what was done, "" if it was finished before."""
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
    """Start the run again and again, with up to `kills` kills; returns what was done. Raises if it does not end in between."""
    done: list[str] = []
    while True:
        launcher = start(run_dir, ranks)
        how = kill_once(run_dir, launcher, chance) if len(done) < kills else ""
        done += [how] if how else []
        if os.environ.get("SOAK_TRACE"):
            print(f"{time.strftime('%T')} start {len(done)}: {how or 'let go'}", flush=True)
        limit = END_S if len(done) <= kills else 600
        try:
            launcher.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            if how:
                raise AssertionError(f"still there {limit} s after: {done[-1:]}; see {run_dir}") from None
        gone = wait_until(lambda: not any(processes(run_dir).values()), END_S)
        assert gone, f"processes left after: {done[-1:]}; see {run_dir}"
        if (run_dir / "status").exists() and (run_dir / "status").read_text() == "finished\n":
            return done


def main() -> None:
    parser = argparse.ArgumentParser(description="kills a run at random moments and compares it with the unbroken one")
    parser.add_argument("--kills", type=int, default=200, help="in all (200)")
    parser.add_argument("--a-run", type=int, default=10, help="kills of one run before it may finish (10)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="runs take turns with so many (2 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (0)")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    chance = random.Random(options.seed)
    unbroken: dict[int, Result] = {}
    for ranks in options.ranks:
        run_until_finished(folder / f"unbroken-{ranks}", ranks, chance, kills=0)
        unbroken[ranks] = Result.of(folder / f"unbroken-{ranks}")
    done: list[str] = []
    lost: list[int] = []
    runs = 0
    while len(done) < options.kills:
        ranks = options.ranks[runs % len(options.ranks)]
        run_dir = folder / f"run-{runs}"
        done += run_until_finished(run_dir, ranks, chance, min(options.a_run, options.kills - len(done)))
        result = Result.of(run_dir)
        assert result.rows == unbroken[ranks].rows, f"other rows in {run_dir}"
        assert result.state == unbroken[ranks].state, f"another state in {run_dir}"
        last = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[-1])
        lost.append(last["steps_lost"])
        runs += 1
        print(
            f"run {runs}: {ranks} ranks, {len(done)} kills so far, {last['steps_lost']} steps lost: equal", flush=True
        )
        shutil.rmtree(run_dir)
    shutil.rmtree(folder)
    print(
        f"{runs} runs, {len(done)} kills, all equal to the unbroken run; steps lost a run: {statistics.median(lost)} (median)"
    )
    for how, count in sorted(Counter(done).items()):
        print(f"  {count:4d}  {how}")


if __name__ == "__main__":
    main()
