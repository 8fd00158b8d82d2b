"""Run all tests: `python tests/run_all.py [options of pytest]`.

Two groups run at the same time, as most of them mostly wait: for Slurm's timers, or for runs that are killed. The output of the
groups other than the first follows at the end.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
WAITING: Mapping[str, Sequence[str]] = {
    "slurm": ["tests/slurm"],
    "faults": ["tests/test_faults.py"],
    "diagnose": ["tests/test_diagnose.py"],
}
"""The groups that mostly wait, the longest first. All other tests are a group as well."""

NO_TESTS = 5  # pytest's exit status if no test is selected


def main(options: Sequence[str]) -> int:
    """Return 0 if no test failed."""
    others = [f"--ignore={path}" for paths in WAITING.values() for path in paths]
    cache = CHECKOUT / ".pytest_cache"
    cache.mkdir(exist_ok=True)

    def run(group: str) -> int:
        command = [sys.executable, "-m", "pytest", *options]
        if group == "others":
            return subprocess.run([*command, *others], cwd=CHECKOUT).returncode
        command += ["-o", f"cache_dir={cache / group}", *WAITING[group]]
        with open(cache / f"{group}.log", "wb") as log:
            return subprocess.run(command, cwd=CHECKOUT, stdout=log, stderr=subprocess.STDOUT).returncode

    with ThreadPoolExecutor(2) as lanes:
        statuses = list(lanes.map(run, ["others", *WAITING]))
    for group in WAITING:
        print(f"\n== {group}", flush=True)
        sys.stdout.write((cache / f"{group}.log").read_text(errors="replace"))
    return int(any(status not in (0, NO_TESTS) for status in statuses))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
