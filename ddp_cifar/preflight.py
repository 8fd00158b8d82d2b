"""Is the cluster fit for a run? `[torchrun ...] python -m ddp_cifar.preflight [CONFIG.yaml] [key=value ...]`.

Started as the run will be, with its arguments: by launch/preflight.sh, slurm/preflight.sh, launch/ssh.sh. Each rank looks at its
own machine, then at what it shares with the others: run_dir, data, the network. Rank 0 prints a row a rank with a verdict a
check, then all that is wrong, each with a hint. Exits with 1 if a check failed. docs/diagnosing.md says what each finding means.
"""

import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ddp_cifar.checks.common import RUN_DIR_HINT, check_arrival, compare, missing_ranks
from ddp_cifar.checks.here import (
    CHECK_PATIENCE,
    FAIL,
    LOOKING_S,
    OK,
    WARNING,
    Here,
    Outcome,
    meet,
    tell,
    wait_for,
)
from ddp_cifar.checks.machine import look_around
from ddp_cifar.checks.network import AT_FAULT, UNREACHED, Link, share
from ddp_cifar.command import EXIT_FAILED, Arguments, megabytes, record_error, run_command, show, writing
from ddp_cifar.config import load_config
from ddp_cifar.distributed import local_place, place_from_environment
from ddp_cifar.errors import UserError
from ddp_cifar.log import log
from ddp_cifar.train import TABLES

SIGN_S = 1.0
"""From one sign of life of a rank to the next."""
REPORTS_S = 5.0
"""For what goes through the store alone."""
HINTS = {
    "data": "look at the file system of data.root on that node",
    "run_dir": RUN_DIR_HINT,
    "disk": "look at the file system of run_dir on that node",
    "device": "look at that node's GPUs (nvidia-smi)",
    "group": UNREACHED,
}
"""What to do about a check that blocks, where it is not the network."""


def main(argv: Sequence[str]) -> int:
    """Look at everything, print it on rank 0, and return the exit status."""
    parser = Arguments("ddp_cifar.preflight", __doc__)
    parser.add_argument("arguments", metavar="CONFIG.yaml key=value", nargs="*", help="the run's, as train takes them")
    parser.add_argument("--json", type=Path, help="write all of it to this file")
    parser.add_argument("--nodes", type=int, help="how many are expected (those that torchrun has)")
    parser.add_argument(
        "--hosts",
        type=lambda names: [name for name in names.split(",") if name],
        default=[],
        help="their names, with commas between, so that a missing one can be named",
    )
    parser.add_argument("--patience", type=float, default=30.0, help="seconds that ranks wait for each other (30)")
    parser.add_argument("--max-latency-ms", type=float, default=5.0, help="of a link between nodes (5)")
    parser.add_argument("--min-mb-per-s", type=float, default=20.0, help="of a link between nodes (20)")
    options = parser.parse_intermixed_args(argv)
    check_options(options)
    config = load_config(options.arguments, TABLES)
    rank, world_size = place_from_environment()
    here = Here(config, options, rank, world_size, *local_place())
    began = time.monotonic()
    here.facts |= {"rank": rank, "local_rank": here.local_rank, "host": here.host}
    # before it is known to the others: from then on one of them may be gone at any moment
    signal.signal(signal.SIGTERM, lambda *_: here.ended.set())
    meet(here)
    here.check("arrival", check_arrival)
    watch(here)
    return report(here, began, REPORTS_S if here.ended.is_set() else CHECK_PATIENCE * options.patience + REPORTS_S)


def check_options(options: Any) -> None:
    """Raises `UserError` for a value that makes no sense."""
    for name in ("patience", "max_latency_ms", "min_mb_per_s", "nodes"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g} is out of range: expected a number above 0")
    if options.json and not os.access(options.json.absolute().parent, os.W_OK):
        raise UserError(f"--json {options.json}: {options.json.absolute().parent} is no folder that can be written")


def watch(here: Here) -> None:
    """Do all checks, but no longer than each may take, or until this process is asked to end.

    A network, a GPU or a file system can block a thread for good.
    """
    # of a collective that does not end, torch's watchdog would end this process, and nobody would say what was found
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    here.begin("host")
    failures: list[BaseException] = []

    def checks() -> None:
        try:
            look_around(here)
            here.begin("waiting for the others", LOOKING_S + here.options.patience)
            ranks = [facts["rank"] for facts in here.arrived]
            here.everyone = tell(here, "facts", ranks, LOOKING_S, alive=True)
            compare(here)
            share(here)
        except BaseException as error:
            failures.append(error)

    worker = threading.Thread(target=checks, name="checks", daemon=True)
    worker.start()
    signs = 0
    while worker.is_alive() and not here.ended.is_set() and time.monotonic() < here.deadline:
        worker.join(SIGN_S)
        signs += 1
        here.line.set(f"alive/{here.rank}", str(signs))
    if failures:
        raise failures[0]
    if worker.is_alive() and not here.ended.is_set():
        found = f"this check did not end: it blocks, on {here.host}"
        here.outcomes.append(Outcome(here.at, FAIL, found, HINTS.get(here.at, AT_FAULT)))


def report(here: Here, began: float, patience_s: float) -> int:
    """Bring all outcomes to rank 0, which prints them; returns the exit status there, and 0 elsewhere."""
    own = {"outcomes": [asdict(outcome) for outcome in here.outcomes], "facts": here.facts}
    here.line.set(f"report/{here.rank}", json.dumps(own))
    if here.rank != 0:
        if not wait_for(here.line, "verdict", [0], 2 * patience_s, alive=True):
            raise UserError(f"rank {here.rank} on {here.host} had no word from rank 0, which is gone or out of reach")
        here.line.set(f"bye/{here.rank}", "")
        return 0
    rows = collect(here, patience_s)
    lines = findings(rows)
    show(table(rows))
    if lines:
        show("\n" + "\n".join(lines))
    show("\n" + "\n".join(measurements(here)))
    num_failed = sum(line.startswith(FAIL) for line in lines)
    here.line.set("verdict/0", "")
    if here.options.json:
        content = {
            "ok": num_failed == 0,
            "seconds": time.monotonic() - began,
            "missing": missing_ranks(here),
            "ranks": [{**row.facts, "outcomes": [asdict(outcome) for outcome in row.outcomes]} for row in rows],
            **here.measured,
        }
        with writing(here.options.json):
            here.options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    there = [row.rank for row in rows if row.rank != 0 and not row.is_silent]
    wait_for(here.line, "bye", there, REPORTS_S)  # the store ends with rank 0
    if num_failed:
        message = f"the preflight failed: {lines[0].removeprefix(FAIL).strip()}" + (
            f" (and {num_failed - 1} more, above)" if num_failed > 1 else ""
        )
        log.error(message)
        record_error(message, EXIT_FAILED)
        return EXIT_FAILED
    log.info(f"the preflight passed, in {time.monotonic() - began:.0f} s")
    return 0


class Row(NamedTuple):
    """What rank 0 knows of a rank in the end."""

    facts: dict[str, Any]
    outcomes: list[Outcome]
    is_silent: bool = False

    @property
    def rank(self) -> int:
        return int(self.facts["rank"])


def collect(here: Here, patience_s: float) -> list[Row]:
    """Each rank's facts and outcomes; of one that has arrived and then fell silent, the check that it was at."""
    store = here.line
    reported = wait_for(store, "report", [facts["rank"] for facts in here.arrived], patience_s, alive=True)
    rows = []
    for rank in reported:
        found = json.loads(store.get(f"report/{rank}"))
        rows.append(Row(found["facts"], [Outcome(**outcome) for outcome in found["outcomes"]]))
    for facts in here.arrived:
        if (rank := facts["rank"]) not in reported:
            at = store.get(f"at/{rank}").decode() if store.check([f"at/{rank}"]) else "the start"
            hint = "look at that node: is it up, and does it still reach the others?"
            rows.append(Row(facts, [Outcome(at, FAIL, f"it fell silent in the check '{at}'", hint)], is_silent=True))
    return sorted(rows, key=lambda row: row.rank)


def table(rows: Sequence[Row]) -> str:
    """A row a rank, a column a check."""
    checks = list(dict.fromkeys(outcome.check for row in rows for outcome in row.outcomes))
    host_width = max(4, *(len(row.facts["host"]) for row in rows))
    lines = [" ".join(["rank", f"{'host':<{host_width}}", *(f"{check:<{max(7, len(check))}}" for check in checks)])]
    for row in rows:
        verdicts = {outcome.check: outcome.verdict for outcome in row.outcomes}
        cells = [f"{verdicts.get(check, ''):<{max(7, len(check))}}" for check in checks]
        lines.append(" ".join([f"{row.rank:>4}", f"{row.facts['host']:<{host_width}}", *cells]).rstrip())
    return "\n".join(lines)


def findings(rows: Sequence[Row]) -> list[str]:
    """A line for each thing that is wrong, failures first; ranks that found the same share one."""
    found: dict[Outcome, list[Row]] = {}
    for row in rows:
        for outcome in row.outcomes:
            if outcome.verdict in (FAIL, WARNING):
                found.setdefault(outcome, []).append(row)
    lines = []

    def order(item: tuple[Outcome, list[Row]]) -> tuple[bool, bool]:
        """Failures first, and of them the ranks that are gone, for which others have waited."""
        outcome, those = item
        return outcome.verdict != FAIL, not any(row.is_silent for row in those)

    for outcome, those in sorted(found.items(), key=order):
        where = ", ".join(dict.fromkeys(row.facts["host"] for row in those))
        who = f"rank{'s' * (len(those) > 1)} {', '.join(str(row.rank) for row in those)} ({where})"
        lines.append(
            f"{outcome.verdict} {outcome.check}, {who}: {outcome.found}"
            + (f". To do: {outcome.hint}" if outcome.hint else "")
        )
    return lines


def measurements(here: Here) -> list[str]:
    """What rank 0 has measured and is, for the record."""
    lines = [
        f"{outcome.check:<12} {outcome.found}" for outcome in here.outcomes if outcome.verdict == OK and outcome.found
    ]
    for row in here.measured.get("all_reduce", []):
        lines.append(
            f"all-reduce of {row['bytes'] / 1024:,.0f} KiB: {row['min_s'] * 1e3:.2f} / {row['median_s'] * 1e3:.2f} / "
            f"{row['max_s'] * 1e3:.2f} ms (min / median / max), bus {megabytes(row['bus_bytes_per_s'])}/s"
        )
    if links := [Link(**link) for link in here.measured.get("links", [])]:
        hosts = {facts["rank"]: facts["host"] for facts in here.arrived}
        latencies, speeds = sorted(link.latency_s * 1e3 for link in links), sorted(link.bytes_per_s for link in links)
        slow = min(links, key=lambda link: link.bytes_per_s)
        slowest, median, fastest = map(megabytes, (speeds[0], statistics.median(speeds), speeds[-1]))
        lines.append(
            f"links: {len(links)}, latency {latencies[0]:.2f} / {statistics.median(latencies):.2f} / {latencies[-1]:.2f} ms, "
            f"{slowest}/s / {median}/s / {fastest}/s; the slowest: rank {slow.one} ({hosts[slow.one]}) - rank {slow.other} "
            f"({hosts[slow.other]})"
        )
    return lines


if __name__ == "__main__":
    run_command(main)
