"""A rank's own machine: its name, device, cores, limits, data, memory and disk."""

import contextlib
import fcntl
import hashlib
import os
import resource
import shutil
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

import torch

from ddp_cifar.checks.here import LOOKING_S, Here, LeftOut, Problem
from ddp_cifar.command import megabytes
from ddp_cifar.data import files_of, outline_dataset
from ddp_cifar.data.sampler import plan_batches
from ddp_cifar.distributed import open_world_alone, pick_device
from ddp_cifar.dry_run import footprint_of
from ddp_cifar.environment import output_of, versions
from ddp_cifar.models import build_model

FEW_FILES = 256
"""Open files that a rank needs, beside 16 for each other rank."""
MOST_SIZES = 20_000
"""Files whose sizes count as well: to ask for those of millions takes a file server minutes."""
HASHED_BYTES = 512 * 2**20
"""Of the data's files, in an order that is the same on each node."""


def look_around(here: Here) -> None:
    """The checks that a rank makes by itself."""
    here.facts |= {"versions": versions(), "hostname": socket.gethostname()}
    if torch.cuda.is_available():
        query = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        here.facts["versions"] |= {"driver": driver} if (driver := output_of("nvidia-smi", *query)) else {}
    here.check("host", check_host)
    here.check("device", check_device)
    here.check("cores", check_cores)
    here.check("limits", check_limits)
    here.check("data", check_data, patience_s=LOOKING_S)
    here.check("batch", check_batch)


def check_host(here: Here) -> str:
    """The host's name leads to an address of its own that others can use, and back."""
    name = socket.gethostname()
    interfaces = addresses_by_interface()
    every = [each for _, each in socket.if_nameindex()]
    here.facts["addresses"] = sorted(interfaces.values())
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if chosen:
        if chosen not in every:
            raise Problem(
                f"GLOO_SOCKET_IFNAME={chosen}, but the interfaces are {', '.join(every)}", "name one of these"
            )
        if chosen in interfaces:
            here.facts["address"] = interfaces[chosen]
        return f"{name}, {interfaces.get(chosen, 'no IPv4 address')} on {chosen} (GLOO_SOCKET_IFNAME)"
    mend = (
        f"mend it in /etc/hosts or the DNS, or choose an interface with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, one of "
        f"{_others(interfaces)}"
    )
    try:
        found = addresses_of(name)
    except OSError as error:
        raise Problem(f"the host name {name} leads to no address ({error.strerror})", mend) from error
    version_4 = {each for each in found if ":" not in each}
    address = min(version_4 or found, key=lambda each: (_is_loopback(each), each))
    if _is_loopback(address) and here.num_nodes > 1:
        raise Problem(f"the host name {name} leads to {address}, by which other nodes would reach themselves", mend)
    if not _is_own(address):
        own = ", ".join(interfaces.values())
        raise Problem(f"the host name {name} leads to {address}, which is none of its own ({own})", mend)
    here.facts["address"] = address
    with contextlib.suppress(OSError):
        found_name, aliases, _ = socket.gethostbyaddr(address)
        if name.split(".")[0] not in {each.split(".")[0] for each in (found_name, *aliases)} and here.num_nodes > 1:
            raise Problem(f"{name} is {address}, but that address is {found_name}'s", mend, is_warning=True)
    interface = next((each for each, own in interfaces.items() if own == address), "")
    return f"{name}, {address}" + (f" on {interface}" if interface else "")


def addresses_of(name: str) -> set[str]:
    """IPv4 and IPv6 addresses that a name leads to. Raises `OSError` if there are none."""
    return {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _is_own(address: str) -> bool:
    """True for an address of this machine: to others no socket can be bound."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def addresses_by_interface() -> dict[str, str]:
    """The first IPv4 address of each network interface of this machine."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _others(interfaces: dict[str, str]) -> str:
    return ", ".join(name for name, address in interfaces.items() if not address.startswith("127.")) or "none"


def check_device(here: Here) -> str:
    """This rank's device is there and multiplies matrices right: whole numbers, whose sums fp32 holds exactly."""
    device = pick_device(here.config.device, here.local_rank, here.local_world_size, here.world_size)
    here.device, name = device, device.type
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{device}, {properties.name}"
        here.facts["device"] = f"{here.host} {properties.uuid}"
    matrix = torch.randint(-8, 9, (512, 512), generator=torch.Generator().manual_seed(here.rank))
    expected = matrix.double() @ matrix.double()
    on_device = matrix.to(device, torch.float32)
    if not torch.equal((on_device @ on_device).cpu().double(), expected):
        raise Problem(f"{name} computes a matrix product wrong", "take this node out of the job, and tell the site")
    if device.type == "cuda" and (gpus := torch.cuda.device_count()) > here.local_world_size:
        raise Problem(
            f"{name}, but this node has {gpus} GPUs for {here.local_world_size} ranks",
            "set NPROC_PER_NODE to use all, or ask for fewer",
            is_warning=True,
        )
    return name


def check_cores(here: Here) -> str:
    """A core for each thread of the node's ranks."""
    cores, ranks, threads = available_cores(), here.local_world_size, torch.get_num_threads()
    found = f"{cores:g} cores for {ranks} ranks x {threads} threads"
    if cores < ranks * threads:
        raise Problem(
            found,
            "give the job more cores (sbatch --cpus-per-task=N or --exclusive), or ranks fewer threads (OMP_NUM_THREADS)",
            is_warning=here.device is not None and here.device.type == "cuda" and cores >= ranks,
        )
    return found


def check_limits(here: Here) -> str:
    """Open files, and shared memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FEW_FILES + 16 * here.world_size
    if files != resource.RLIM_INFINITY and files < needed:
        raise Problem(
            f"{files} open files are allowed, {needed} may be needed",
            f"ulimit -n {needed}, in slurm/site.sh or the shell",
        )
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    needed_shm = 64 * 2**20 * here.local_world_size  # NCCL's buffers between the GPUs of a node
    if torch.cuda.is_available() and here.local_world_size > 1 and free < needed_shm:
        raise Problem(
            f"/dev/shm has {megabytes(free)} free, NCCL may need {megabytes(needed_shm)}",
            "give the container more (--shm-size), or empty it",
        )
    return f"{files} open files, /dev/shm {megabytes(free)}"


def check_data(here: Here) -> str:
    """The data are there and can be read; what the model needs for them."""
    if not here.is_first_of_node:
        raise LeftOut
    config = here.config
    with open_world_alone() as world:
        here.dataset = outline_dataset(config.data, world)
    files = files_of(config.data)
    missing = [path for path in files if not path.exists()]
    if missing:
        raise Problem(
            f"{missing[0]} is not there",
            "python -m ddp_cifar.prepare has it there; else the run downloads it",
            is_warning=True,
        )
    if not files:
        return config.data.name
    digest, count, size = digest_of(files)
    here.facts["data"] = digest
    return f"{count} of {len(files)} files read, {megabytes(size)}, sha256 {digest[:8]}"


def check_batch(here: Here) -> str:
    """The batch divides over the ranks that the run is to have; and what a rank holds of it."""
    if here.dataset is None:
        raise LeftOut
    config, ranks = here.config, here.num_nodes * here.local_world_size
    model = build_model(config.model, len(here.dataset.classes), here.dataset.train.image_size)
    micro = config.train.micro_batch_size or -(-config.train.global_batch_size // ranks)
    footprint = footprint_of(config, micro, here.dataset, model)
    here.facts |= {"memory": footprint.memory, "checkpoint": footprint.checkpoint}
    return str(plan_batches(config.train, ranks, len(here.dataset.train)))


def of_the_first(here: Here, name: str) -> float:
    """A fact that the first rank of each node has found. Raises `LeftOut` where none has."""
    for facts in here.everyone:
        if name in facts:
            return float(facts[name])
    raise LeftOut


def digest_of(files: Sequence[Path]) -> tuple[str, int, int]:
    """A hash of the files' bytes, of how many files, and of how many bytes: of some, where there is more than can be read soon.

    Which ones depends on their names and sizes alone, and so is the same wherever they are the same.
    """
    sha, count, size = hashlib.sha256(), 0, 0
    root = os.path.commonpath([path.parent for path in files])
    names = {os.path.relpath(path, root): path for path in files}
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    for name in order[:MOST_SIZES]:
        sha.update(f"{name}\0{names[name].stat().st_size}\0".encode(errors="surrogateescape"))
    for name in order:
        if size >= HASHED_BYTES:
            break
        try:
            content = names[name].read_bytes()
        except OSError as error:
            raise Problem(
                f"{names[name]} cannot be read ({error.strerror})", "mend its permissions, or the disk"
            ) from error
        sha.update(content)
        count, size = count + 1, size + len(content)
    return sha.hexdigest(), count, size


def check_memory(here: Here) -> str:
    """Room for what a rank holds: each on its own GPU, or a node's ranks in its memory."""
    needed = of_the_first(here, "memory")
    if here.device is not None and here.device.type == "cuda":
        free, total = map(float, torch.cuda.mem_get_info(here.device))
        what = "GPU memory"
    elif here.is_first_of_node:
        # torch itself, twice: the estimate is of what stays, not of what comes and goes in a step
        needed = here.local_world_size * (2 * needed + 0.5e9)
        free, total = available_memory()
        what = "memory"
    else:
        raise LeftOut
    found = f"{megabytes(free)} of {megabytes(total)} of {what} free, about {megabytes(needed)} needed"
    if free < needed:
        raise Problem(
            found, "end what else runs there, or ask for more (sbatch --mem), or a smaller train.micro_batch_size"
        )
    return found


def available_memory() -> tuple[float, float]:
    """(free, total) bytes of this machine, or of the control group that leaves the least."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (1024.0 * int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    for group in control_groups("memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):  # a group without a limit says "max"
                most = float((group / limit).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                left = max(0.0, most - float((group / used).read_text()) + float(stat.get(cache, 0)))
                free, total = min(free, left), min(total, most)
    return free, total


def control_groups(controller: str) -> list[Path]:
    """The folders of the control groups that this process is in, from its own to the root, for version 1 or 2."""
    root = Path("/sys/fs/cgroup")
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names == "" or controller in names.split(","):
                top = root / names if names and (root / names).is_dir() else root / controller if names else root
                own = top / path.lstrip("/")
                found += [each for each in (own, *own.parents) if each.is_relative_to(top)]
    return found


def available_cores() -> float:
    """Cores that this process may use: those it is bound to, or its control groups' quota, whichever is less."""
    cores = float(len(os.sched_getaffinity(0)))
    for group in control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # one without a quota says "max", or -1
            quota, period = (group / "cpu.max").read_text().split()
            cores = min(cores, float(quota) / float(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            cores = min(cores, float(quota) / float(period)) if float(quota) > 0 else cores
    return cores


def check_disk(here: Here) -> str:
    """Room for the checkpoints that are kept, and one more while it is written."""
    if not here.is_first_of_node:
        raise LeftOut
    checkpoint, count = of_the_first(here, "checkpoint"), here.config.checkpoint.keep + 1
    folder = Path(here.config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, count * checkpoint
    found = f"{megabytes(free)} free for run_dir, {megabytes(needed)} needed for {count} checkpoints"
    if free < needed:
        raise Problem(found, "make room, choose another run_dir, or a smaller checkpoint.keep")
    return found
