"""Run all tests: `python tests/run_all.py [options of pytest]`.

Tests that mostly wait, for Slurm's timers or for runs that are killed, run beside all others. Their output follows at the end.
"""

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
WAITING = ("tests/slurm", "tests/test_faults.py", "tests/test_diagnose.py")
LOG = CHECKOUT / ".pytest_cache" / "waiting.log"
NO_TESTS = 5  # pytest's exit status if no test is selected


def main(options: list[str]) -> int:
    """Return 0 if no test failed."""
    command = [sys.executable, "-m", "pytest", *options]
    LOG.parent.mkdir(exist_ok=True)
    with open(LOG, "wb") as log:
        waiting = subprocess.Popen(
            [*command, "-o", "cache_dir=.pytest_cache/waiting", *WAITING],
            cwd=CHECKOUT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    others = subprocess.Popen([*command, *(f"--ignore={path}" for path in WAITING)], cwd=CHECKOUT)
    statuses = [others.wait(), waiting.wait()]
    print("\n== Tests that mostly wait", flush=True)
    sys.stdout.write(LOG.read_text(errors="replace"))
    return int(any(status not in (0, NO_TESTS) for status in statuses))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
