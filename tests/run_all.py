"""Run all tests: `python tests/run_all.py [options of pytest]`.

Tests on the Slurm cluster mostly wait for its timers, so they run beside all others. Their output follows at the end.
"""

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
LOG = CHECKOUT / ".pytest_cache" / "slurm.log"
NO_TESTS = 5  # pytest's exit status if no test is selected


def main(options: list[str]) -> int:
    """Return 0 if no test failed."""
    command = [sys.executable, "-m", "pytest", *options]
    LOG.parent.mkdir(exist_ok=True)
    with open(LOG, "wb") as log:
        slurm = subprocess.Popen(
            [*command, "-o", "cache_dir=.pytest_cache/slurm", "tests/slurm"],
            cwd=CHECKOUT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    others = subprocess.Popen([*command, "--ignore=tests/slurm"], cwd=CHECKOUT)
    statuses = [others.wait(), slurm.wait()]
    print("\n== Tests on the Slurm cluster", flush=True)
    sys.stdout.write(LOG.read_text(errors="replace"))
    return int(any(status not in (0, NO_TESTS) for status in statuses))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
