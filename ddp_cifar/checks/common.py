"""What ranks have in common: that all are there, software, data, names, one run_dir for all nodes."""

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

from ddp_cifar.checkpoint import write_durably
from ddp_cifar.checks.here import Here, LeftOut, Problem, wait_for
from ddp_cifar.checks.machine import addresses_of, check_disk, check_memory
from ddp_cifar.run_dir import RunDir, lock_file

PROBE_BYTES = 2**20
NO_LOCK_HINT = "see to it that no two jobs use one run_dir; Lustre has locks where it is mounted with -o flock"
RUN_DIR_HINT = "see to it that run_dir is on a file system that all nodes share"


def compare(here: Here) -> None:
    """The checks of what is the same on all ranks, by their facts."""
    here.check("versions", check_versions)
    here.check("own device", check_own_device)
    here.check("same data", check_same_data)
    here.check("memory", check_memory)
    here.check("names", check_names)
    here.check("run_dir", check_run_dir, RUN_DIR_HINT)
    # after it: to ask for a folder that is not there yet can have a node keep that answer
    here.check("disk", check_disk)


def missing_ranks(here: Here) -> list[str]:
    """Who has not arrived, in words, by elimination."""
    arrived = {facts["rank"]: facts["host"] for facts in here.arrived}
    hosts = {rank // here.local_world_size: host for rank, host in arrived.items()}
    lines = []
    for rank in range(here.world_size):
        if rank not in arrived:
            where = hosts.get(rank // here.local_world_size, f"node {rank // here.local_world_size}")
            lines.append(f"rank {rank} on {where}")
    absent = here.num_nodes - here.world_size // here.local_world_size
    if absent > 0:
        found = {_short(host) for host in arrived.values()}
        missing = [host for host in here.options.hosts if _short(host) not in found]
        if len(missing) == absent:
            lines += [f"the node {host}" for host in missing]
        else:
            lines.append(f"{absent} of {here.num_nodes} nodes (found: {', '.join(sorted(set(arrived.values())))})")
    return lines


def _short(host: str) -> str:
    """Without its domain, which a scheduler leaves out and a host name may have; an address is whole."""
    return host if host.replace(".", "").isdigit() else host.split(".")[0]


def check_arrival(here: Here) -> str:
    """All ranks are there, on the nodes that were asked for."""
    if missing := missing_ranks(here):
        raise Problem(
            f"not there: {', '.join(missing)}",
            "look at that node: is it up, does the environment start there, does it reach this one?",
        )
    per_node = Counter(facts["host"] for facts in here.arrived)
    if len(set(per_node.values())) > 1:
        raise Problem(
            f"nodes have different numbers of ranks: {dict(per_node)}", "set NPROC_PER_NODE, the same on all nodes"
        )
    expected = {_short(host) for host in here.options.hosts}
    if expected and (unexpected := [host for host in per_node if _short(host) not in expected]):
        raise Problem(
            f"ranks on {', '.join(sorted(unexpected))}, which are not among {','.join(here.options.hosts)}",
            "the launcher and the scheduler differ: is another job meeting at the same port?",
            is_warning=True,
        )
    return f"{here.world_size} ranks on {len(per_node)} nodes"


def odd_one_out(here: Here, values: dict[int, Any]) -> tuple[Any, Any] | None:
    """(this rank's value, the value that most ranks have), if they differ; rank 0's counts where none has the most."""
    if here.rank not in values:
        return None
    counts = Counter(json.dumps(value) for value in values.values())
    most, first = max(counts.values()), json.dumps(values[min(values)])
    usual = first if counts[first] == most else max(counts, key=counts.__getitem__)
    own = json.dumps(values[here.rank])
    return None if own == usual else (json.loads(own), json.loads(usual))


def check_versions(here: Here) -> str:
    """Software is what it is on most ranks: each part by itself, among those that have it."""
    own = here.facts["versions"]
    different = []
    for name in own:
        known = {facts["rank"]: facts["versions"][name] for facts in here.everyone if name in facts["versions"]}
        # a checkout that was copied has no commit; a machine without a GPU has no driver, which the device check finds
        if odd := odd_one_out(here, known):
            different.append(f"{name} {odd[0]}, others {odd[1]}")
    if different:
        raise Problem(
            f"{here.host} has {'; '.join(different)}",
            "use one environment and one checkout, on a folder that all nodes see",
        )
    return ", ".join(f"{name} {version}" for name, version in own.items())


def check_own_device(here: Here) -> str:
    """No two ranks share a GPU."""
    if "device" not in here.facts:
        raise LeftOut
    sharing = [
        facts["rank"]
        for facts in here.everyone
        if facts.get("device") == here.facts["device"] and facts["rank"] != here.rank
    ]
    if sharing:
        raise Problem(
            f"its GPU is also that of rank {', '.join(map(str, sharing))}",
            "one agent a node: --ntasks-per-node=1, and NPROC_PER_NODE its GPUs",
        )
    return "its own"


def check_same_data(here: Here) -> str:
    """The data's files have the bytes that they have on most nodes."""
    if "data" not in here.facts:
        raise LeftOut
    if odd := odd_one_out(here, {facts["rank"]: facts["data"] for facts in here.everyone if "data" in facts}):
        raise Problem(
            f"the files of data.root={here.config.data.root} on {here.host} are not those of the other nodes (sha256 "
            f"{odd[0][:8]}, others {odd[1][:8]})",
            "copy them anew, or use one folder that all nodes see",
        )
    return f"sha256 {here.facts['data'][:8]}"


def check_names(here: Here) -> str:
    """The other nodes' names lead to their addresses from here as well."""
    if not here.is_first_of_node or here.num_nodes == 1:
        raise LeftOut
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
                f"{facts['hostname']} leads to {', '.join(sorted(found)) or 'nothing'}, it is {facts['address']}"
            )
    if wrong:
        raise Problem(f"seen from {here.host}: {'; '.join(wrong)}", "mend /etc/hosts or the DNS there", is_warning=True)
    return "as seen from here"


def check_run_dir(here: Here) -> str:
    """run_dir is one folder for all nodes: what one writes, fsyncs and renames, the others read; a lock is everybody's."""
    run_dir, patience = RunDir(here.config.run_dir).path, here.options.patience
    try:
        if here.rank == 0:
            here.store.set("run_dir/name", f".preflight-{uuid.uuid4().hex[:8]}")
        folder = run_dir / here.store.get("run_dir/name").decode()
        if here.rank == 0:
            new = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
            return _first_of_run_dir(here, folder, new)
        if not here.is_first_of_node:
            raise LeftOut
        here.store.wait(["run_dir/written"], timedelta(seconds=patience))
        if (written := here.store.get("run_dir/written").decode()) == "no":
            raise LeftOut  # rank 0 has said why
        _expect_file(
            folder / "rank_0",
            written,
            patience / 3,
            f"run_dir={run_dir} on {here.host} is not the folder that it is on {here.arrived[0]['host']}",
        )
        write_durably(folder / f"rank_{here.rank}", os.urandom(PROBE_BYTES))
        with open(folder / "lock", "r+") as lock:  # NFS gives none on what is open for reading alone
            if not lock_file(lock, patience_s=0):
                return "shared"
        raise Problem(
            f"a lock on run_dir={run_dir} does not hold on other nodes",
            NO_LOCK_HINT,
            is_warning=True,
        )
    except OSError as error:
        raise Problem(f"run_dir={run_dir}: {error.strerror} ({error.filename})", RUN_DIR_HINT) from error
    finally:
        here.store.set(f"run_dir/{here.rank}", "done")


def _first_of_run_dir(here: Here, folder: Path, new: Sequence[Path]) -> str:
    """Rank 0's part: make the folder, hold the lock while the others look, and see what they wrote; nothing of it stays."""
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
                lock_file(lock, patience_s=0)
            except OSError as error:
                no_lock = str(error.strerror)
        except OSError:
            here.store.set("run_dir/written", "no")
            raise
        here.store.set("run_dir/written", hashlib.sha256(content).hexdigest())
        wait_for(here.store, "run_dir", [facts["rank"] for facts in others], 2 * here.options.patience)
        unseen = [facts["host"] for facts in others if not (folder / f"rank_{facts['rank']}").exists()]
    if no_lock:
        raise Problem(f"run_dir={here.config.run_dir} takes no lock ({no_lock})", NO_LOCK_HINT, is_warning=True)
    if unseen:
        raise Problem(
            f"what {', '.join(unseen)} wrote to run_dir={here.config.run_dir} is not seen on {here.host}",
            RUN_DIR_HINT,
        )
    return f"{here.config.run_dir}: shared by {len(others) + 1} nodes" if others else f"{here.config.run_dir}: written"


def _remove(folder: Path, new: Sequence[Path]) -> None:
    """The folder with what is in it, and the `new` ones around it, where they are empty."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in new:
        with contextlib.suppress(OSError):
            path.rmdir()


def _expect_file(path: Path, sha256: str, patience_s: float, otherwise: str) -> None:
    """Wait for a file that another node has written: a file server may tell of it a little late."""
    deadline = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise Problem(otherwise, RUN_DIR_HINT)
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(path.parent.parent)  # has a file server asked for what is new in there
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise Problem(f"{path} has other bytes than were written on rank 0's node", RUN_DIR_HINT)
