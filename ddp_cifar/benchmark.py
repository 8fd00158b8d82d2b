"""How fast a recipe trains here, and how far that is from what the machine can do.

    [torchrun ...] python -m ddp_cifar.benchmark [CONFIG.yaml] [key=value ...]

The real Trainer, as the config has it, over random images, which cost as much as real ones: no download. Beside it the same
steps without the exchange of gradients, the bare computation on one batch, and a matrix product take turns in slices, so that a
machine that is slower in one minute than in the next is so for all of them.
"""

import copy
import dataclasses
import functools
import json
import math
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddp_cifar.checkpoint import NullCheckpoints
from ddp_cifar.command import Arguments, check_counts, megabytes, run_command, show, writing
from ddp_cifar.config import Config, load_config
from ddp_cifar.data.dataset import DataSet, Split
from ddp_cifar.distributed import World, open_world
from ddp_cifar.environment import name_of
from ddp_cifar.errors import UserError
from ddp_cifar.metrics import peak_memory
from ddp_cifar.optim import build_optimizer
from ddp_cifar.tracking import NullTracker, Scalars
from ddp_cifar.train import TABLES, build_trainer, set_up_kernels
from ddp_cifar.trainer import Trainer

Rates = dict[str, list[float]]
"""Contender -> its rate in each round: images/s, or operations/s."""

NUM_IMAGES = 50_000  # as CIFAR-10 has
SLICE_S = 1.0
SETTLE_S = 0.3  # what a contender has left to do in the background it does in this time, and not at the next one's cost
PHASES = ("data", "forward", "backward", "optimizer")
MATRIX_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Rows of the square matrices whose products are tried for the highest rate."""
NEVER = 10**9


def main(argv: Sequence[str]) -> int:
    """Measure as `argv` says, print the table on rank 0, and return the exit status."""
    parser = Arguments("ddp_cifar.benchmark", __doc__)
    parser.add_argument("arguments", metavar="CONFIG.yaml key=value", nargs="*", help="as train takes them")
    parser.add_argument("--rounds", type=int, default=7, help="slices of each contender that are timed (7)")
    parser.add_argument("--steps", type=int, help="steps of a slice (as many as take about a second)")
    parser.add_argument("--json", type=Path, help="write all of it to this file")
    options = parser.parse_intermixed_args(argv)
    check_counts(options, "rounds", "steps")
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.parent}; make it first")
    config = load_config(options.arguments, TABLES)
    with open_world(config.device, config.backend) as world:
        set_up_kernels(config.train, world)
        result = measure(config, world, options.rounds, options.steps)
        if world.is_main:
            show(table(result))
            if options.json:
                with writing(options.json):
                    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


# -- contenders that take turns


def random_dataset(num_images: int, image_size: int = 32, num_classes: int = 10) -> DataSet:
    """Random images to train on, and none to evaluate on."""
    random = torch.Generator().manual_seed(0)
    shape = (num_images, 3, image_size, image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=random)
    labels = torch.randint(num_classes, (num_images,), generator=random)
    return DataSet(Split.of(images, labels), None, tuple(f"class {i}" for i in range(num_classes)))


def make_trainer(world: World, data: DataSet, config: Config) -> Trainer:
    """As the command `train` builds it, but that it saves nothing."""
    return build_trainer(config, world, data, NullCheckpoints(Path("nowhere"), keep=1))


def train_on(trainer: Trainer, steps: int) -> None:
    """Let the trainer train so many steps, from the epoch's start if it has not as many left.

    So each slice also draws the epoch's order and crops, which in a run happens once an epoch.
    """
    if trainer.progress.step_in_epoch + steps > trainer.plan.steps_per_epoch:
        trainer.progress.step_in_epoch = 0
    trainer.last_step = trainer.progress.step + steps
    trainer.train_epoch()


def seconds_of(run: Callable[[], None], world: World) -> float:
    """What it takes all ranks that begin together, by the slowest one's time."""
    dist.barrier()
    _finish(world.device)
    started = time.perf_counter()
    run()
    _finish(world.device)
    seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=world.side)
    return seconds.item()


def timed(run: Callable[[], None], amount: float, world: World) -> Callable[[], float]:
    """A function that runs a slice of `amount` images, or operations, over all ranks and returns its rate."""
    return lambda: amount / seconds_of(run, world)


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Rates:
    """Each contender's rate in each round. A contender runs its slice of work and returns its rate.

    They take turns, since a shared machine is faster in one minute than in the next; every other round goes backwards.
    """
    for run in contenders.values():
        run()  # warm-up: kernels are chosen, DDP settles its buckets, workers start
    rates: Rates = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in reversed(names) if number % 2 else names:
            time.sleep(SETTLE_S)
            rates[name].append(contenders[name]())
    return rates


def computation(trainer: Trainer, steps: int) -> Callable[[], None]:
    """The trainer's forward and backward passes and updates, of a rank's micro-batches, on one batch; nothing else."""
    config, plan = trainer.config, trainer.plan
    model = copy.deepcopy(trainer.model)
    if config.train.compile != "off":
        model.compile(mode=config.train.compile, dynamic=False)
    optimizer = build_optimizer(model, config.optim)
    images = torch.randn(plan.micro_batch_size, *trainer.train.image_shape, device=trainer.world.device)
    images = images.to(memory_format=trainer.train.memory_format)
    labels = torch.randint(len(trainer.classes), (len(images),), device=images.device)

    def run() -> None:
        model.train()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            for _ in range(plan.grad_accum_steps):
                with trainer.autocast():
                    logits = model(images)
                F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

    return run


# -- what the machine can do


def model_flops(model: nn.Module, image_shape: Sequence[int]) -> float:
    """Floating-point operations of an image's forward and backward pass: of convolutions and matrix products, two for each
    multiply-add, as torch's FlopCounterMode counts them."""
    shadow = copy.deepcopy(model).to("meta").train()
    images = torch.empty(2, *image_shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        shadow(images).sum().backward()
    return float(counter.get_total_flops()) / len(images)


def matrix_product(size: int, precision: str, device: torch.device) -> tuple[Callable[[], None], float]:
    """A product of square matrices of `size` rows in `precision`, and its floating-point operations."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)

    def run() -> None:
        torch.matmul(left, right, out=out)

    return run, 2.0 * size**3


# -- the measurement


class _Phases(NullTracker):
    """Keeps the seconds of each phase of a step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, scalars: Scalars, step: int) -> None:
        self.rows.append({phase: float(scalars[f"time/{phase}_s"]) for phase in PHASES})


def measure(config: Config, world: World, rounds: int, steps: int | None) -> dict[str, Any]:
    """All that the command reports. Every rank must call it."""
    began = time.perf_counter()
    quiet = {"fingerprint_every": None, "profile_steps": None, "max_steps": None, "epochs": NEVER}
    config = _with(config, "train", quiet)
    config = _with(config, "checkpoint", {"every_steps": None, "every_minutes": None})
    size = config.train.global_batch_size  # a whole number of steps an epoch: each has as many images
    data = random_dataset(math.ceil(NUM_IMAGES / size) * size, config.data.image_size)
    trainer = make_trainer(world, data, config)
    train_on(trainer, 2)
    warm_up_s = time.perf_counter() - began
    if steps is None:
        step_s = seconds_of(functools.partial(train_on, trainer, 3), world) / 3
        steps = max(3, math.ceil(SLICE_S / step_s))
    steps = min(steps, trainer.plan.steps_per_epoch)
    phases = _Phases()
    trainer.config = _with(trainer.config, "train", {"log_every": 1 if steps < 20 else 20})
    images = steps * config.train.global_batch_size

    def step_alone() -> None:
        with trainer.ddp.no_sync():  # and so gradients stay where they are
            train_on(trainer, steps)

    contenders: dict[str, tuple[Callable[[], None], float]] = {
        "training": (functools.partial(_with_tracker, trainer, phases, steps), images),
        "computation": (computation(trainer, steps), images),
    }
    if trainer.tree is None and world.world_size > 1:
        contenders["without exchange"] = (step_alone, images)
    for size in MATRIX_SIZES.get(world.device.type, (1024,)):
        product, operations = matrix_product(size, trainer.precision, world.device)
        repeats = max(1, round(_repeats(product, world)))
        run = functools.partial(_repeat, product, repeats)
        contenders[f"matrix product {size}"] = (run, repeats * operations * world.world_size)
    runs = {name: timed(run, amount, world) for name, (run, amount) in contenders.items()}
    rates = take_turns(runs, rounds)
    phases_of = phases.rows[-max(1, len(phases.rows) * rounds // (rounds + 1)) :]
    memory = max(number for (number,) in world.gather([peak_memory(world.device)]))
    return summarize(
        trainer,
        rates,
        {phase: statistics.median(row[phase] for row in phases_of) for phase in PHASES},
        flops=model_flops(trainer.model, trainer.train.image_shape),
        memory=memory,
        warm_up_s=warm_up_s,
        steps=steps,
        hosts=sorted(set(world.gather_objects(socket.gethostname()))),
    )


def summarize(
    trainer: Trainer,
    rates: Rates,
    phases: Mapping[str, float],
    *,
    flops: float,
    memory: int,
    warm_up_s: float,
    steps: int,
    hosts: Sequence[str],
) -> dict[str, Any]:
    """The figures that follow from the rates. Ratios are medians of each round's."""
    plan, world, config = trainer.plan, trainer.world, trainer.config

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    products = [name for name in rates if name.startswith("matrix product")]
    best = max(products, key=lambda name: statistics.median(rates[name]))
    images_per_s = statistics.median(rates["training"])
    return {
        "torch": str(torch.__version__),
        "device": name_of(world.device),
        "hosts": list(hosts),
        "world_size": world.world_size,
        "backend": world.backend,
        "threads": torch.get_num_threads(),
        "model": config.model.name,
        "precision": trainer.precision,
        "compile": config.train.compile,
        "hook": config.comm.hook,
        "global_batch_size": plan.global_batch_size,
        "micro_batch_size": plan.micro_batch_size,
        "grad_accum_steps": plan.grad_accum_steps,
        "steps_a_slice": steps,
        "rounds": len(rates["training"]),
        "images_per_s": images_per_s,
        "images_per_s_min": min(rates["training"]),
        "images_per_s_max": max(rates["training"]),
        "step_s": plan.global_batch_size / images_per_s,
        "phases_s": dict(phases),
        "data_share": phases["data"] / sum(phases.values()),
        "of_computation": ratio("training", "computation"),
        "exposed_communication": 1 - ratio("training", "without exchange") if "without exchange" in rates else None,
        "flops_an_image": flops,
        "flops_per_s": flops * images_per_s,
        "matrix_flops_per_s": statistics.median(rates[best]),
        "utilisation": flops * ratio("training", best),
        "computation_utilisation": flops * ratio("computation", best),
        "gradient_bytes": sum(parameter.numel() * 4 for parameter in trainer.model.parameters()),
        "peak_memory": memory,
        "warm_up_s": warm_up_s,
        "rates": rates,
    }


def table(result: Mapping[str, Any]) -> str:
    """The figures as a table in Markdown."""
    milliseconds = {name: f"{1000 * seconds:.2f}" for name, seconds in result["phases_s"].items()}
    exposed = result["exposed_communication"]
    rows = {
        "machine": f"{result['world_size']} ranks on {', '.join(result['hosts'])}; {result['device']}, {result['backend']}, "
        f"torch {result['torch']}, {result['threads']} CPU threads a rank",
        "recipe": f"{result['model']}, {result['precision']}, compile {result['compile']}, "
        f"{result['global_batch_size']} images a step in micro-batches of {result['micro_batch_size']}, "
        f"{result['grad_accum_steps']} a rank",
        "images/s": f"{result['images_per_s']:,.0f} ({result['images_per_s_min']:,.0f} - {result['images_per_s_max']:,.0f}), "
        f"median of {result['rounds']} slices of {result['steps_a_slice']} steps",
        "a step": f"{1000 * result['step_s']:.2f} ms: "
        + ", ".join(f"{name} {ms}" for name, ms in milliseconds.items()),
        "waiting for data": f"{result['data_share']:.1%} of a step",
        "exposed communication": "none, with one rank or train.reproducible"
        if exposed is None
        else f"{exposed:.1%} of a step",
        "of the bare computation": f"{result['of_computation']:.1%}",
        "model FLOP/s": f"{result['flops_per_s'] / 1e12:,.3f} T, {result['flops_an_image'] / 1e9:.3f} G an image",
        "utilisation": f"{result['utilisation']:.1%} of the {result['matrix_flops_per_s'] / 1e12:,.3f} T of a matrix product "
        f"here in {result['precision']} (the bare computation: {result['computation_utilisation']:.1%})",
        "peak memory": f"{megabytes(result['peak_memory'])} a rank",
        "warm-up": f"{result['warm_up_s']:.1f} s, apart from the above",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


# -- insides


def _with_tracker(trainer: Trainer, tracker: NullTracker, steps: int) -> None:
    kept, trainer.tracker = trainer.tracker, tracker
    train_on(trainer, steps)
    trainer.tracker = kept


def _with(config: Config, section: str, values: Mapping[str, Any]) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def _repeats(product: Callable[[], None], world: World) -> float:
    """How often a product fits into half a slice, by the slowest rank."""
    product()
    return SLICE_S / 2 / seconds_of(product, world)


def _repeat(run: Callable[[], None], times: int) -> None:
    for _ in range(times):
        run()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run_command(main)
