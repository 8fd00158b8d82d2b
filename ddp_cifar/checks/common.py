"""Checks of everything that ranks share: arrival of all ranks, software, data, host names, one run_dir for all nodes."""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from ddp_cifar.checks.machine import addresses_of, check_disk, check_memory
from ddp_cifar.checks.rank_context import Problem, RankContext, Skipped, first_of_node, wait_for
from ddp_cifar.run.checkpoint_file import write_durably
from ddp_cifar.run.run_dir import RunDir, lock_file

PROBE_BYTES = 2**20
NO_LOCK_HINT = "make sure that no two jobs use the same run_dir; Lustre supports locks if it is mounted with -o flock"
RUN_DIR_HINT = "put run_dir on a file system that all nodes share"


def compare(here: RankContext) -> None:
    """Compare the facts of all ranks."""
    here.check("versions", check_versions)
    here.check("own device", check_own_device)
    here.check("same data", check_same_data)
    here.check("memory", check_memory)
    here.check("names", check_names)
    here.check("run_dir", check_run_dir, RUN_DIR_HINT)
    # after run_dir: a node that looks up a folder before it exists may cache that it does not exist
    here.check("disk", check_disk)


def missing_ranks(here: RankContext) -> list[str]:
    """Describe the ranks that have not arrived, by the other ranks of their node or by elimination among the hosts."""
    arrived = {facts["rank"]: facts["host"] for facts in here.arrived}
    hosts: dict[int, str] = {}  # the host of every rank whose node has at least one arrived rank
    for facts in here.arrived:
        first = first_of_node(facts)
        hosts |= dict.fromkeys(range(first, first + facts["local_world_size"]), facts["host"])
    lines = [f"rank {rank} on {host}" for rank, host in sorted(hosts.items()) if rank not in arrived]
    # two kinds of nodes are not among these: nodes whose ranks are all lost, and nodes on which no rank was started
    lost = [rank for rank in range(here.world_size) if rank not in hosts]
    num_lost = here.num_agents - len(set(map(first_of_node, here.arrived)))
    absent = here.num_nodes - here.num_agents
    found = {_short(host) for host in arrived.values()}
    others = [host for host in here.options.hosts if _short(host) not in found]
    if len(others) != num_lost + absent:
        others = []  # the ranks' host names differ from those in --hosts
    if lost:
        where = (" or " if absent else " and ").join(others) or (
            f"{num_lost} node{'s' * (num_lost > 1)} from which no rank arrived"
        )
        lines.append(f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))} on {where}")
    if absent and others and not lost:
        lines += [f"node {host}" for host in others]
    elif absent:
        lines.append(f"{absent} of {here.num_nodes} nodes (found: {', '.join(sorted(set(arrived.values())))})")
    return lines


def _short(host: str) -> str:
    """Return a host name without its domain, since a scheduler omits the domain. An address is returned unchanged."""
    return host if host.replace(".", "").isdigit() else host.split(".")[0]


def check_arrival(here: RankContext) -> str:
    """Check that all ranks have arrived, on the expected nodes."""
    if missing := missing_ranks(here):
        raise Problem(
            f"missing: {', '.join(missing)}",
            "check that the node is up, that the environment starts there, and that it can reach this node",
        )
    expected = {_short(host) for host in here.options.hosts}
    heads = [facts for facts in here.arrived if facts["local_rank"] == 0]
    if expected and (unexpected := {facts["host"] for facts in heads if _short(facts["host"]) not in expected}):
        raise Problem(
            f"ranks on {', '.join(sorted(unexpected))}, expected only {','.join(here.options.hosts)}",
            "the launcher and the scheduler disagree; check whether another job uses the same port for its rendezvous",
            is_warning=True,
        )
    uneven = len({facts["local_world_size"] for facts in heads}) > 1
    each = ", ".join(f"{facts['local_world_size']} on {facts['host']}" for facts in heads)
    return f"{here.world_size} ranks on {len(heads)} nodes" + f" ({each})" * uneven


def odd_one_out(here: RankContext, values: dict[int, Any]) -> tuple[Any, Any] | None:
    """Return (this rank's value, the value of most nodes) if they differ. Rank 0's value decides a tie."""
    if here.rank not in values:
        return None
    nodes = {facts["rank"]: first_of_node(facts) for facts in here.everyone}
    votes = dict.fromkeys((nodes[rank], json.dumps(value)) for rank, value in values.items())  # one per node and value
    counts = Counter(text for _, text in votes)
    most, first = max(counts.values()), json.dumps(values[min(values)])
    usual = first if counts[first] == most else max(counts, key=counts.__getitem__)
    local = json.dumps(values[here.rank])
    return None if local == usual else (json.loads(local), json.loads(usual))


def check_versions(here: RankContext) -> str:
    """Check that each software version is the same as on most nodes, among the nodes that have it."""
    local = here.facts["versions"]
    different = []
    for name in local:
        known = {facts["rank"]: facts["versions"][name] for facts in here.everyone if name in facts["versions"]}
        # a copied checkout has no commit; a machine without a GPU has no driver (the device check reports that)
        if odd := odd_one_out(here, known):
            different.append(f"{name} {odd[0]}, others {odd[1]}")
    if different:
        raise Problem(
            f"{here.host} has {'; '.join(different)}",
            "use one environment and one checkout, in a folder that all nodes share",
        )
    return ", ".join(f"{name} {version}" for name, version in local.items())


def check_own_device(here: RankContext) -> str:
    """Check that no two ranks share a GPU, and that no node has fewer ranks than others."""
    if "device" not in here.facts:
        raise Skipped
    sharing = [
        facts["rank"]
        for facts in here.everyone
        if facts.get("device") == here.facts["device"] and facts["rank"] != here.rank
    ]
    if sharing and here.config.backend != "gloo":
        raise Problem(
            f"its GPU is also used by rank {', '.join(map(str, sharing))}",
            "start one agent per node (--ntasks-per-node=1), and set NPROC_PER_NODE to the node's number of GPUs",
        )
    most = max(facts["local_world_size"] for facts in here.everyone)
    if here.local_world_size < most:
        raise Problem(
            f"{here.host} has fewer ranks ({here.local_world_size}) than other nodes ({most})",
            "if it should have the same number of GPUs, check them (nvidia-smi) or set NPROC_PER_NODE; the run works either way",
            is_warning=True,
        )
    return "shared, which backend=gloo supports" if sharing else "not shared"


def check_same_data(here: RankContext) -> str:
    """Check that the data files are the same as on most nodes."""
    if "data" not in here.facts:
        raise Skipped
    if odd := odd_one_out(here, {facts["rank"]: facts["data"] for facts in here.everyone if "data" in facts}):
        raise Problem(
            f"the files of data.root={here.config.data.root} on {here.host} differ from those of the other nodes (sha256 "
            f"{odd[0][:8]}, others {odd[1][:8]})",
            "copy them again, or use one folder that all nodes share",
        )
    return f"sha256 {here.facts['data'][:8]}"


def check_names(here: RankContext) -> str:
    """Check that the names of the other nodes resolve to their addresses on this node too."""
    if not here.is_first_of_node or here.num_nodes == 1:
        raise Skipped
    wrong = []
    for host, facts in {facts["host"]: facts for facts in here.everyone}.items():
        if host == here.host or "address" not in facts:
            continue
        try:
            found = addresses_of(facts["hostname"])
        except OSError:
            found = set()
        if not found & {facts["address"], *facts["addresses"]}:
            wrong.append(
                f"{facts['hostname']} resolves to {', '.join(sorted(found)) or 'nothing'}, expected {facts['address']}"
            )
    if wrong:
        raise Problem(f"on {here.host}, {'; '.join(wrong)}", "fix /etc/hosts or DNS there", is_warning=True)
    return "all resolve"


def check_run_dir(here: RankContext) -> str:
    """Check that run_dir is one folder for all nodes: all nodes see a file that one node writes, and a lock that it holds."""
    run_dir, patience = RunDir(here.config.run_dir).path, here.options.patience
    try:
        if here.rank == 0:
            here.store.set("run_dir/name", f".preflight-{uuid.uuid4().hex[:8]}")
        folder = run_dir / here.store.get("run_dir/name").decode()
        if here.rank == 0:
            new = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
            return _first_of_run_dir(here, folder, new)
        if not here.is_first_of_node:
            raise Skipped
        here.store.wait(["run_dir/written"], timedelta(seconds=patience))
        if (written := here.store.get("run_dir/written").decode()) == "no":
            raise Skipped  # rank 0 reports the reason
        _expect_file(
            folder / "rank_0",
            written,
            patience / 3,
            f"run_dir={run_dir} on {here.host} is not the same folder as on {here.arrived[0]['host']}",
        )
        write_durably(folder / f"rank_{here.rank}", os.urandom(PROBE_BYTES))
        with open(folder / "lock", "r+") as lock:  # NFS does not lock files that are open only for reading
            if not lock_file(lock, timeout_s=0):
                return "shared"
        raise Problem(
            f"a lock on run_dir={run_dir} has no effect on other nodes",
            NO_LOCK_HINT,
            is_warning=True,
        )
    except OSError as error:
        raise Problem(f"run_dir={run_dir}: {error.strerror} ({error.filename})", RUN_DIR_HINT) from error
    finally:
        here.store.set(f"run_dir/{here.rank}", "done")


def _first_of_run_dir(here: RankContext, folder: Path, new: Sequence[Path]) -> str:
    """Do rank 0's part: create a folder, hold the lock while other nodes check it, read their files, remove everything."""
    others = [facts for facts in here.everyone if facts["local_rank"] == 0 and facts["rank"] != 0]
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(_remove, folder, new)
        try:
            folder.mkdir(parents=True)
            lock = cleanup.enter_context(open(folder / "lock", "w"))
            content = os.urandom(PROBE_BYTES)
            write_durably(folder / "rank_0", content)
            no_lock = ""
            try:
                lock_file(lock, timeout_s=0)
            except OSError as error:
                no_lock = str(error.strerror)
        except OSError:
            here.store.set("run_dir/written", "no")
            raise
        here.store.set("run_dir/written", hashlib.sha256(content).hexdigest())
        wait_for(here.store, "run_dir", [facts["rank"] for facts in others], 2 * here.options.patience)
        unseen = [facts["host"] for facts in others if not (folder / f"rank_{facts['rank']}").exists()]
    if no_lock:
        raise Problem(f"run_dir={here.config.run_dir} cannot be locked ({no_lock})", NO_LOCK_HINT, is_warning=True)
    if unseen:
        raise Problem(
            f"files that {', '.join(unseen)} wrote to run_dir={here.config.run_dir} are not visible on {here.host}",
            RUN_DIR_HINT,
        )
    return f"{here.config.run_dir}: shared by {len(others) + 1} nodes" if others else f"{here.config.run_dir}: writable"


def _remove(folder: Path, new: Sequence[Path]) -> None:
    """Remove the folder with its content, and the empty ones of its `new` parent folders."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in new:
        with contextlib.suppress(OSError):
            path.rmdir()


def _expect_file(path: Path, sha256: str, patience_s: float, otherwise: str) -> None:
    """Wait for a file that another node has written, since a file server may show it with a delay."""
    deadline = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise Problem(otherwise, RUN_DIR_HINT)
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(path.parent.parent)  # makes the client ask the file server for new files
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise Problem(f"{path} has different content here than on the node of rank 0", RUN_DIR_HINT)
