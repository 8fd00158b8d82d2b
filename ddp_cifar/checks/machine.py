"""A rank's own machine: its name, device, cores, limits, data, memory and disk."""

import contextlib
import fcntl
import hashlib
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import ddp_cifar
from ddp_cifar.checks.here import Here, LeftOut, Problem
from ddp_cifar.command import megabytes
from ddp_cifar.data import files_of, outline_dataset
from ddp_cifar.data.sampler import plan_batches
from ddp_cifar.distributed import open_world_alone, pick_device
from ddp_cifar.dry_run import footprint_of
from ddp_cifar.models import build_model

FEW_FILES = 256
"""Open files that a rank needs, beside 16 for each other rank."""
HASHED_BYTES = 512 * 2**20
"""Of the data's files, in an order that is the same on each node."""


def look_around(here: Here) -> None:
    """The checks that a rank makes by itself."""
    here.facts |= {"rank": here.rank, "local_rank": here.local_rank, "host": here.host, "versions": versions()}
    here.check("host", check_host)
    here.check("device", check_device)
    here.check("cores", check_cores)
    here.check("limits", check_limits)
    here.check("data", check_data)
    here.check("memory", check_memory)
    here.check("disk", check_disk)


def versions() -> dict[str, str]:
    """What must be the same on all ranks."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "project": _project()}
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    return found


def _project() -> str:
    """A hash of the package's files, which tells an edited checkout from the same commit's."""
    folder = Path(ddp_cifar.__file__).parent
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sha.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", "-c", "safe.directory=*", "-C", str(folder), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        if done.returncode == 0:
            return f"{done.stdout.strip()}, files {sha.hexdigest()[:8]}"
    return f"files {sha.hexdigest()[:8]}"


def check_host(here: Here) -> str:
    """The host's name leads to an address of its own that others can use, and back."""
    interfaces = addresses_by_interface()
    here.facts["addresses"] = sorted(interfaces.values())
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if chosen:
        if chosen not in interfaces:
            raise Problem(
                f"GLOO_SOCKET_IFNAME={chosen}, but the interfaces are {', '.join(interfaces)}", "name one of these"
            )
        here.facts["address"] = interfaces[chosen]
        return f"{here.host}, {interfaces[chosen]} on {chosen} (GLOO_SOCKET_IFNAME)"
    mend = (
        f"mend it in /etc/hosts or the DNS, or choose an interface with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, one of "
        f"{_others(interfaces)}"
    )
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(here.host, None, socket.AF_INET)}
    except OSError as error:
        raise Problem(f"the host name {here.host} leads to no address ({error.strerror})", mend) from error
    address = min(found, key=lambda each: (each.startswith("127."), each))
    if address.startswith("127.") and here.num_nodes > 1:
        raise Problem(
            f"the host name {here.host} leads to {address}, by which other nodes would reach themselves", mend
        )
    if address not in interfaces.values():
        raise Problem(
            f"the host name {here.host} leads to {address}, which is none of its own ({', '.join(interfaces.values())})",
            mend,
        )
    here.facts["address"] = address
    interface = next(name for name, own in interfaces.items() if own == address)
    with contextlib.suppress(OSError):
        name, aliases, _ = socket.gethostbyaddr(address)
        if here.host.split(".")[0] not in {each.split(".")[0] for each in (name, *aliases)} and here.num_nodes > 1:
            raise Problem(f"{here.host} is {address}, but that address is {name}'s", mend, is_warning=True)
    return f"{here.host}, {address} on {interface}"


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
    name = device.type
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{device}, {properties.name}"
        here.facts["device"] = f"{here.host} {properties.uuid}"
    matrix = torch.randint(-8, 9, (512, 512), generator=torch.Generator().manual_seed(here.rank))
    expected = matrix.double() @ matrix.double()
    on_device = matrix.to(device, torch.float32)
    if not torch.equal((on_device @ on_device).cpu().double(), expected):
        raise Problem(f"{name} computes a matrix product wrong", "take this node out of the job, and tell the site")
    return name


def check_cores(here: Here) -> str:
    """A core for each thread of the node's ranks."""
    cores, ranks, threads = len(os.sched_getaffinity(0)), here.local_world_size, torch.get_num_threads()
    found = f"{cores} cores for {ranks} ranks x {threads} threads"
    if cores < ranks * threads:
        raise Problem(
            found,
            "give the job more cores (sbatch --cpus-per-task=N or --exclusive), or ranks fewer threads (OMP_NUM_THREADS)",
            is_warning=here.config.device == "cuda" and cores >= ranks,
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
        dataset = outline_dataset(config.data, world)
    plan = plan_batches(config.train, here.world_size, len(dataset.train))
    model = build_model(config.model, len(dataset.classes), dataset.train.image_size)
    here.footprint = footprint_of(config, plan, dataset, model)
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


def digest_of(files: Sequence[Path]) -> tuple[str, int, int]:
    """A hash of the files' bytes, of how many files, and of how many bytes: of some, where there is more than can be read soon.

    Which ones depends on their names and sizes alone, and so is the same wherever they are the same.
    """
    sha, count, size = hashlib.sha256(), 0, 0
    root = os.path.commonpath([path.parent for path in files])
    names = {os.path.relpath(path, root): path for path in files}
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    for name in order:
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
    """Room for what a rank holds."""
    if here.footprint is None:
        raise LeftOut
    needed = here.footprint.memory
    if here.config.device != "cpu" and torch.cuda.is_available():
        free, total = map(float, torch.cuda.mem_get_info(here.local_rank % torch.cuda.device_count()))
        what = "GPU memory"
    else:
        # torch itself, twice: the estimate is of what stays, not of what comes and goes in a step
        needed = here.local_world_size * (2 * needed + 0.5e9)
        free, total = available_memory()
        what = "memory"
    found = f"{megabytes(free)} of {megabytes(total)} of {what} free, about {megabytes(needed)} needed"
    if free < needed:
        raise Problem(
            found, "end what else runs there, or ask for more (sbatch --mem), or a smaller train.micro_batch_size"
        )
    return found


def available_memory() -> tuple[float, float]:
    """(free, total) bytes of this machine, or of the control group that it is in."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (1024.0 * int(lines[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most = float(Path(limit).read_text())
            if most < total:
                return max(0.0, most - float(Path(used).read_text())), most
    return free, total


def check_disk(here: Here) -> str:
    """Room for the checkpoints that are kept, and one more while it is written."""
    if here.footprint is None:
        raise LeftOut
    folder = Path(here.config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, (here.config.checkpoint.keep + 1) * here.footprint.checkpoint
    found = f"{megabytes(free)} free for run_dir, {megabytes(needed)} needed for {here.config.checkpoint.keep + 1} checkpoints"
    if free < needed:
        raise Problem(found, "make room, choose another run_dir, or a smaller checkpoint.keep")
    return found
