"""The checks of a preflight on this rank, with time limits, and rank 0's report on all ranks."""

import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from ddp_cifar.checks.common import RUN_DIR_HINT, compare, missing_ranks
from ddp_cifar.checks.machine import look_around
from ddp_cifar.checks.network import AT_FAULT, UNREACHED, Link, share
from ddp_cifar.checks.rank_context import FAIL, LOOKING_S, OK, WARNING, Outcome, RankContext, tell, wait_for
from ddp_cifar.command import EXIT_FAILED, megabytes, record_error, writing
from ddp_cifar.errors import UserError
from ddp_cifar.log import log, show

SIGN_S = 1.0
"""The interval between heartbeats of a rank."""
REPORTS_S = 5.0
"""The time limit for exchanges that need only the store."""
HINTS = {
    "data": "check the file system of data.root on that node",
    "run_dir": RUN_DIR_HINT,
    "disk": "check the file system of run_dir on that node",
    "device": "check that node's GPUs (nvidia-smi)",
    "group": UNREACHED,
}
"""The hint for a blocked check, if the network is not the likely cause."""


def watch(here: RankContext) -> None:
    """Run all checks, each with a time limit, until they are done or this process is asked to stop.

    A network, a GPU or a file system can block a thread forever.
    """
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
        found = f"this check is blocked on {here.host} and timed out"
        here.outcomes.append(Outcome(here.at, FAIL, found, HINTS.get(here.at, AT_FAULT)))


def report(here: RankContext, began: float, patience_s: float) -> int:
    """Send all outcomes to rank 0, which prints them. Return the exit status on rank 0, and 0 on the others."""
    own = {"outcomes": [asdict(outcome) for outcome in here.outcomes], "facts": here.facts}
    here.line.set(f"report/{here.rank}", json.dumps(own))
    if here.rank != 0:
        if not wait_for(here.line, "verdict", [0], 2 * patience_s, alive=True):
            raise UserError(
                f"rank {here.rank} on {here.host} got no answer from rank 0: it exited or cannot be reached"
            )
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
    wait_for(here.line, "bye", there, REPORTS_S)  # the store closes when rank 0 exits
    if num_failed:
        message = f"the preflight failed: {lines[0].removeprefix(FAIL).strip()}" + (
            f" (and {num_failed - 1} more above)" if num_failed > 1 else ""
        )
        log.error(message)
        record_error(message, EXIT_FAILED)
        return EXIT_FAILED
    log.info(f"the preflight passed in {time.monotonic() - began:.0f} s")
    return 0


class Row(NamedTuple):
    """The results of a rank on rank 0."""

    facts: dict[str, Any]
    outcomes: list[Outcome]
    is_silent: bool = False

    @property
    def rank(self) -> int:
        return int(self.facts["rank"])


def collect(here: RankContext, patience_s: float) -> list[Row]:
    """Return each rank's facts and outcomes; for a rank that stopped responding, a failure of its last check."""
    store = here.line
    reported = wait_for(store, "report", [facts["rank"] for facts in here.arrived], patience_s, alive=True)
    rows = []
    for rank in reported:
        found = json.loads(store.get(f"report/{rank}"))
        rows.append(Row(found["facts"], [Outcome(**outcome) for outcome in found["outcomes"]]))
    for facts in here.arrived:
        if (rank := facts["rank"]) not in reported:
            at = store.get(f"at/{rank}").decode() if store.check([f"at/{rank}"]) else "the start"
            hint = "check that the node is up and can still reach the others"
            found = f"the rank stopped responding during the check '{at}'"
            rows.append(Row(facts, [Outcome(at, FAIL, found, hint)], is_silent=True))
    return sorted(rows, key=lambda row: row.rank)


def table(rows: Sequence[Row]) -> str:
    """Return a table with a row per rank and a column per check."""
    checks = list(dict.fromkeys(outcome.check for row in rows for outcome in row.outcomes))
    host_width = max(4, *(len(row.facts["host"]) for row in rows))
    lines = [" ".join(["rank", f"{'host':<{host_width}}", *(f"{check:<{max(7, len(check))}}" for check in checks)])]
    for row in rows:
        verdicts = {outcome.check: outcome.verdict for outcome in row.outcomes}
        cells = [f"{verdicts.get(check, ''):<{max(7, len(check))}}" for check in checks]
        lines.append(" ".join([f"{row.rank:>4}", f"{row.facts['host']:<{host_width}}", *cells]).rstrip())
    return "\n".join(lines)


def findings(rows: Sequence[Row]) -> list[str]:
    """Return a line for each problem, failures first. Ranks with the same problem share a line."""
    found: dict[Outcome, list[Row]] = {}
    for row in rows:
        for outcome in row.outcomes:
            if outcome.verdict in (FAIL, WARNING):
                found.setdefault(outcome, []).append(row)
    lines = []

    def order(item: tuple[Outcome, list[Row]]) -> tuple[bool, bool]:
        """Sort failures first; among them, the ranks that stopped responding, since other ranks waited for them."""
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


def measurements(here: RankContext) -> list[str]:
    """Return lines with rank 0's environment and measurements."""
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
            f"{slowest}/s / {median}/s / {fastest}/s; slowest: rank {slow.one} ({hosts[slow.one]}) - rank {slow.other} "
            f"({hosts[slow.other]})"
        )
    return lines
