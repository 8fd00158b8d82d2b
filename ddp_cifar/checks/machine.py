"""Checks of a rank's machine: its name, device, cores, limits, data, memory and disk."""

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

from ddp_cifar.checks.control_groups import available_cores, available_memory
from ddp_cifar.checks.rank_context import LOOKING_S, Problem, RankContext, Skipped
from ddp_cifar.command import megabytes
from ddp_cifar.data import dataset_metadata, files_of
from ddp_cifar.data.batch_plan import plan_batches
from ddp_cifar.data.dataset import choose_device_for
from ddp_cifar.distributed.rendezvous import open_world_alone, pick_device
from ddp_cifar.dry_run import footprint_of
from ddp_cifar.models import build_model
from ddp_cifar.run.environment import output_of, versions
from ddp_cifar.training.build import check_micro_batches
from ddp_cifar.training.parameters import freeze

FEW_FILES = 256
"""Open files that a rank needs, plus 16 per rank of the run."""

MAX_SIZES = 20_000
"""The most files whose sizes are hashed. A file server needs minutes to list millions of files."""

HASHED_BYTES = 512 * 2**20
"""The most bytes of data files that are hashed, in an order that is the same on each node."""


def look_around(here: RankContext) -> None:
    """Do the checks that need no other rank."""
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


def check_host(here: RankContext) -> str:
    """Check that the host name resolves to an address of this host that others can reach, and the address to the name."""
    name = socket.gethostname()
    interfaces = addresses_by_interface()
    every = [each for _, each in socket.if_nameindex()]
    here.facts["addresses"] = sorted(interfaces.values())
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if chosen:
        if chosen not in every:
            raise Problem(
                f"GLOO_SOCKET_IFNAME={chosen} does not exist, expected one of {', '.join(every)}", "use one of these"
            )
        if chosen in interfaces:
            here.facts["address"] = interfaces[chosen]
        return f"{name}, {interfaces.get(chosen, 'no IPv4 address')} on {chosen} (GLOO_SOCKET_IFNAME)"
    hint = (
        f"fix it in /etc/hosts or DNS, or choose an interface with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, one of "
        f"{_others(interfaces)}"
    )
    try:
        found = addresses_of(name)
    except OSError as error:
        raise Problem(f"the host name {name} does not resolve to an address ({error.strerror})", hint) from error
    version_4 = {each for each in found if ":" not in each}
    address = min(version_4 or found, key=lambda each: (_is_loopback(each), each))
    if _is_loopback(address) and here.num_nodes > 1:
        raise Problem(
            f"the host name {name} resolves to {address}, a loopback address that other nodes cannot use", hint
        )
    if not _is_own(address):
        own = ", ".join(interfaces.values())
        raise Problem(f"the host name {name} resolves to {address}, expected one of its own addresses: {own}", hint)
    here.facts["address"] = address
    with contextlib.suppress(OSError):
        found_name, aliases, _ = socket.gethostbyaddr(address)
        if name.split(".")[0] not in {each.split(".")[0] for each in (found_name, *aliases)} and here.num_nodes > 1:
            raise Problem(
                f"{name} resolves to {address}, but this address resolves to {found_name}", hint, is_warning=True
            )
    interface = next((each for each, own in interfaces.items() if own == address), "")
    return f"{name}, {address}" + (f" on {interface}" if interface else "")


def addresses_of(name: str) -> set[str]:
    """Return the IPv4 and IPv6 addresses that a name resolves to. Raises `OSError` if there are none."""
    return {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _is_own(address: str) -> bool:
    """True for an address of this machine: a socket cannot bind to any other."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def addresses_by_interface() -> dict[str, str]:
    """Return the first IPv4 address of each network interface of this machine."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # the interface has no IPv4 address
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _others(interfaces: dict[str, str]) -> str:
    return ", ".join(name for name, address in interfaces.items() if not address.startswith("127.")) or "none"


def check_device(here: RankContext) -> str:
    """Check that this rank's device exists and multiplies matrices correctly, with integers that are exact in fp32."""
    config = here.config
    device = pick_device(config.device, config.backend, here.local_rank, here.local_world_size, here.world_size)
    here.device, name = device, device.type
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{device}, {properties.name}"
        here.facts["device"] = f"{here.host} {properties.uuid}"
    matrix = torch.randint(-8, 9, (512, 512), generator=torch.Generator().manual_seed(here.rank))
    expected = matrix.double() @ matrix.double()
    on_device = matrix.to(device, torch.float32)
    if not torch.equal((on_device @ on_device).cpu().double(), expected):
        raise Problem(f"{name} computes a wrong matrix product", "exclude this node, and report it to your site")
    if device.type == "cuda" and (gpus := torch.cuda.device_count()) > here.local_world_size:
        raise Problem(
            f"{name}, but this node has {gpus} GPUs for {here.local_world_size} ranks",
            "set NPROC_PER_NODE to use all of them, or request fewer",
            is_warning=True,
        )
    return name


def check_cores(here: RankContext) -> str:
    """Check that the node has a core for each CPU thread of its ranks."""
    cores, ranks, threads = available_cores(), here.local_world_size, torch.get_num_threads()
    found = f"{cores:g} cores for {ranks} ranks x {threads} threads"
    if cores < ranks * threads:
        raise Problem(
            found,
            "request more cores (sbatch --cpus-per-task=N or --exclusive), or reduce the CPU threads per rank (OMP_NUM_THREADS)",
            is_warning=here.device is not None and here.device.type == "cuda" and cores >= ranks,
        )
    return found


def check_limits(here: RankContext) -> str:
    """Check the limits on open files and shared memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FEW_FILES + 16 * here.world_size
    if files != resource.RLIM_INFINITY and files < needed:
        raise Problem(
            f"the limit is {files} open files, {needed} may be needed",
            f"set ulimit -n {needed} in slurm/site.sh or in the shell",
        )
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    needed_shm = 64 * 2**20 * here.local_world_size  # NCCL's buffers between the GPUs of a node
    if torch.cuda.is_available() and here.local_world_size > 1 and free < needed_shm:
        raise Problem(
            f"/dev/shm has {megabytes(free)} free, NCCL may need {megabytes(needed_shm)}",
            "increase the container's shared memory (--shm-size), or delete files in /dev/shm",
        )
    return f"{files} open files, /dev/shm {megabytes(free)}"


def check_data(here: RankContext) -> str:
    """Check that the data exist and can be read. Stores their shape and a hash."""
    if not here.is_first_of_node:
        raise Skipped
    config = here.config
    with open_world_alone() as world:
        here.dataset = dataset_metadata(config.data, world)
    files = files_of(config.data)
    missing = [path for path in files if not path.exists()]
    if missing:
        raise Problem(
            f"{missing[0]} does not exist",
            "download it with python -m ddp_cifar.prepare; otherwise the run downloads it",
            is_warning=True,
        )
    if not files:
        return config.data.name
    digest, count, size = digest_of(files)
    here.facts["data"] = digest
    return f"{count} of {len(files)} files read, {megabytes(size)}, sha256 {digest[:8]}"


def check_batch(here: RankContext) -> str:
    """Check that the batch can be split across ranks. Stores the memory that a rank needs for training and for the images,
    and the checkpoint size.
    """
    if here.dataset is None:
        raise Skipped
    config, train, absent = here.config, here.dataset.train, here.num_nodes - here.num_agents
    # the number of ranks on the missing nodes is unknown
    most = max(facts["local_world_size"] for facts in here.arrived)
    model = build_model(config.model, len(here.dataset.classes), train.image_shape)
    freeze(model, config.model.freeze)
    here.facts["checkpoint"] = footprint_of(config, 1, here.dataset, model).checkpoint  # for any batch size
    plan = plan_batches(config.train, here.world_size + absent * most, len(train))
    check_micro_batches(config, plan, model, here.dataset)
    footprint = footprint_of(config, plan.micro_batch_size, here.dataset, model)
    here.facts |= {"memory": footprint.training, "images": footprint.images}
    return f"{plan}" + (f", with {most} ranks assumed per missing node" if absent else "")


def of_the_first(here: RankContext, name: str) -> float:
    """Return a fact that the first rank of each node finds. Raises `Skipped` if no rank has found it."""
    for facts in here.everyone:
        if name in facts:
            return float(facts[name])
    raise Skipped


def digest_of(files: Sequence[Path]) -> tuple[str, int, int]:
    """Return a hash of the files' content, the number of hashed files, and their bytes. Large data are hashed partially.

    The choice of hashed files depends only on names and sizes, so that equal data have equal hashes.
    """
    sha, count, size = hashlib.sha256(), 0, 0
    root = os.path.commonpath([path.parent for path in files])
    names = {os.path.relpath(path, root): path for path in files}
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    for name in order[:MAX_SIZES]:
        sha.update(f"{name}\0{names[name].stat().st_size}\0".encode(errors="surrogateescape"))
    for name in order:
        if size >= HASHED_BYTES:
            break
        try:
            content = names[name].read_bytes()
        except OSError as error:
            raise Problem(
                f"{names[name]} cannot be read ({error.strerror})", "fix its permissions, or the disk"
            ) from error
        sha.update(content)
        count, size = count + 1, size + len(content)
    return sha.hexdigest(), count, size


def check_memory(here: RankContext) -> str:
    """Check that there is enough memory: on each rank's GPU, or on the node for all of its ranks."""
    needed, images = of_the_first(here, "memory"), of_the_first(here, "images")
    if here.device is not None and here.device.type == "cuda":
        if choose_device_for(images, here.device, here.config.data.residency) == here.device:
            needed += images
        free, total = map(float, torch.cuda.mem_get_info(here.device))
        what = "GPU memory"
    elif here.is_first_of_node:
        # 0.5 GB for torch itself; twice the estimate, as it does not include the temporary tensors of a step
        needed = here.local_world_size * (2 * (needed + images) + 0.5e9)
        free, total = available_memory()
        what = "memory"
    else:
        raise Skipped
    found = f"{megabytes(free)} of {megabytes(total)} of {what} free, about {megabytes(needed)} needed"
    if free < needed:
        raise Problem(
            found,
            "stop other processes there, request more memory (sbatch --mem), or use a smaller train.micro_batch_size",
        )
    return found


def check_disk(here: RankContext) -> str:
    """Check that there is disk space for the checkpoints that are kept, and for one more while it is written."""
    if not here.is_first_of_node:
        raise Skipped
    checkpoint, count = of_the_first(here, "checkpoint"), here.config.checkpoint.keep + 1
    folder = Path(here.config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, count * checkpoint
    found = f"{megabytes(free)} free for run_dir, {megabytes(needed)} needed for {count} checkpoints"
    if free < needed:
        raise Problem(found, "free disk space, choose another run_dir, or use a smaller checkpoint.keep")
    return found
