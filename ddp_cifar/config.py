"""Every setting, once: its name, type, default, unit and effect; and how a command line becomes a `Config`.

The dataclass defaults are the CIFAR-10 recipe. A YAML file overrides them, and `key=value` arguments override the file:

    python -m ddp_cifar.train configs/demo.yaml optim.lr=0.002 run_dir=runs/faster
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddp_cifar.errors import UserError
from ddp_cifar.named import find


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{key}={value} is out of range: expected {expected}")


@dataclass(frozen=True)
class ShapesConfig:
    train_images: int = 5000
    """Training images to draw for data.name=shapes."""
    test_images: int = 1000
    """Test images to draw for data.name=shapes."""
    seed: int = 0
    """Seed of the drawings. Apart from `seed`, so that runs with other seeds learn from the same images."""

    def __post_init__(self) -> None:
        _require(self.train_images >= 10, "data.shapes.train_images", self.train_images, "10 or more")
        _require(self.test_images >= 10, "data.shapes.test_images", self.test_images, "10 or more")


@dataclass(frozen=True)
class DataConfig:
    name: str = "cifar10"
    """cifar10 (downloaded once), imagefolder (data.root/train/CLASS/*, data.root/test/CLASS/*), shapes (drawn on the spot), or
    package.module:function of your own, which returns a ddp_cifar.data.DataSet (docs/extending.md)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of a function of your own: data.args.KEY=VALUE."""
    root: str = "data"
    """Folder of the images; cifar10 is downloaded into it. On several nodes: a folder that every node sees."""
    image_size: int = 32
    """Height and width, in pixels, that imagefolder brings images to: the short side is scaled, the middle kept.
    cifar10 and shapes have 32."""
    cache: str = "auto"
    """Folder where imagefolder keeps the decoded images, which all ranks of a node then share. auto: .cache in data.root."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """A file of imagefolder that cannot be decoded: refuse to start and name it, or skip it with a warning."""
    val_images: int = 0
    """Training images held out to choose the best checkpoint by; always the same ones, whatever the seed. 0: no `best`.
    With some, imagefolder needs no test folder."""
    residency: Literal["auto", "device", "host"] = "auto"
    """Where the images are while a GPU trains: on the device, or in the host's memory, from which batches are sent ahead of
    their use. auto: on the device where they take at most half of its free memory."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)

    def __post_init__(self) -> None:
        _require(8 <= self.image_size <= 1024, "data.image_size", self.image_size, "8 to 1024")
        _require(bool(self.cache.strip()), "data.cache", repr(self.cache), "auto or a folder's name")
        _require(self.val_images >= 0, "data.val_images", self.val_images, "0 or more")


@dataclass(frozen=True)
class ModelConfig:
    name: str = "cnn"
    """The network: cnn is the article's (six convolutions, three linear layers, 5,852,170 parameters for ten classes);
    resnet18 and resnet9, for small images; torchvision, with model.args.name one of its classifiers; or
    package.module:function of your own, which returns a torch.nn.Module (docs/extending.md)."""
    args: dict[str, Any] = field(default_factory=dict)
    """The network's own arguments: model.args.KEY=VALUE."""
    init: str = "random"
    """Weights to start from. PATH: those of a checkpoint, a run_dir's newest, or a saved state dict; where the number of
    classes differs, the last layer starts anew."""


@dataclass(frozen=True)
class StepClampConfig:
    enabled: bool = True
    """Hold the step count of adam and adamw between `reset_to` and `limit`, as the article does. sgd has none."""
    after_epoch: int = 17
    """Epochs completed before the clamp acts (the article: `epoch > 16`, the 18th on)."""
    limit: int = 1024
    """An Adam step count that has reached this ..."""
    reset_to: int = 1000
    """... goes back to this. Near 1000 the bias correction scales an update by sqrt(1 - 0.999^1000) = 0.795."""

    def __post_init__(self) -> None:
        _require(self.after_epoch >= 0, "optim.step_clamp.after_epoch", self.after_epoch, "0 or more")
        _require(self.reset_to >= 1, "optim.step_clamp.reset_to", self.reset_to, "1 or more")
        _require(
            self.limit >= self.reset_to, "optim.step_clamp.limit", self.limit, f"{self.reset_to} (reset_to) or more"
        )


@dataclass(frozen=True)
class OptimConfig:
    name: str = "adam"
    """adam (as in the article), adamw, sgd, or package.module:Class, such as torch.optim:RMSprop."""
    args: dict[str, Any] = field(default_factory=dict)
    """More arguments of the optimizer: optim.args.KEY=VALUE."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """adam, sgd: L2 penalty, added to the gradient. adamw: share of `lr` by which weights shrink in an update."""
    momentum: float = 0.9
    """Momentum of sgd (Nesterov's when above 0); adam and adamw do not read it."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """The rate after the warm-up: constant, or a half cosine that reaches 0 at the end of train.epochs."""
    warmup_epochs: float = 1.0
    """Epochs over which the rate rises linearly from 0 to `lr`."""
    implementation: Literal["auto", "default", "foreach", "fused", "capturable"] = "auto"
    """Which of torch's equal implementations computes the update. auto: fused, the fastest."""
    step_clamp: StepClampConfig = field(default_factory=StepClampConfig)

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optim.lr", self.lr, "a number above 0")
        _require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "0 to below 1")
        _require(0 <= self.warmup_epochs < math.inf, "optim.warmup_epochs", self.warmup_epochs, "0 or more")


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 30
    """Passes over the training set. The learning-rate schedule spans all of them."""
    max_steps: int | None = None
    """End the run at this step, wherever that is. The schedule stays as `epochs` makes it; a larger value goes on."""
    global_batch_size: int = 512
    """Images an update sees, over all ranks. Images a rank and accumulation follow from it and are printed."""
    micro_batch_size: int | None = 64
    """Images of one forward pass on one rank. Fixed, any number of ranks computes the same gradients, BatchNorm and
    dropout included; null: global_batch_size / ranks, plain DDP, and results depend on the number of ranks."""
    clip_norm: float | None = None
    """Scale the gradient down to this norm where it is larger. null: never."""
    label_smoothing: float = 0.0
    """Share of a training label that is spread evenly over all classes."""
    ema_decay: float | None = None
    """Keep a running average of the weights, of which an update changes a share of 1 - ema_decay; it is what is evaluated,
    and is in the checkpoint as `ema`. null: none."""
    channels_last: bool = True
    """Keep images and weights in channels-last memory order, which convolutions prefer."""
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    """The mode in which torch.compile makes kernels of the network and of the augmentation, on a GPU. reduce-overhead also
    replays them as CUDA graphs, which pays where launching kernels takes longer than running them (small micro-batches)."""
    profile_steps: list[int] | None = None
    """[FIRST, LAST]: steps of the run whose kernels are recorded, in RUN_DIR/profile, for TensorBoard and Perfetto; the
    longest are printed. null: none."""
    log_every: int = 20
    """Steps from one row of metrics.jsonl and TensorBoard to the next."""
    deterministic: bool = False
    """Take only kernels of torch that repeat their bits, which a resume on a GPU needs to be exact. Slower; no change on a
    CPU, whose kernels all do."""
    reproducible: bool = False
    """Compute the same bits on any number of ranks: 1, 2, 4 ... up to the micro-batches of a step, which must be a power of
    two. Sums over micro-batches are taken in a fixed order; kernels are as with `deterministic`."""
    threads: int | None = None
    """CPU threads a rank. null: OMP_NUM_THREADS; with `reproducible` on a CPU 1, as bits depend on it."""
    max_hours: float | None = None
    """Ask the run to stop this long after its processes started (anew, where torchrun restarts them): it saves, and leaves
    with status `stopped`. null: never."""
    deadline: float | None = None
    """The same as unix time, in seconds: `$(date -d 'tomorrow 8:00' +%s)`. null: none."""
    agree_every: int = 5
    """Steps, or batches of an evaluation, from one exchange among ranks of what they were asked (to stop, to save) to the
    next. A request acts after at most twice as many."""
    hang_timeout_s: float = 300.0
    """End the run, naming the silent ranks, once no rank has completed a step, or a batch of an evaluation, for so long."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A gradient that is not finite: end the run, or leave out its update. `skip` waits for the device in every step."""
    fingerprint_every: int | None = 200
    """Steps from one fingerprint of the weights to the next: a row of metrics.jsonl, by which runs are compared, as all
    ranks are; each epoch's end has one too. null: at the end of an epoch alone."""
    straggler_factor: float | None = 2.0
    """Report a rank, once, whose own work took this many times as long as the other ranks' over `log_every` steps, twice in
    a row. null: never."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "train.epochs", self.epochs, "1 or more")
        _require(self.max_steps is None or self.max_steps >= 1, "train.max_steps", self.max_steps, "1 or more, or null")
        _require(self.global_batch_size >= 1, "train.global_batch_size", self.global_batch_size, "1 or more")
        _require(
            self.micro_batch_size is None or 1 <= self.micro_batch_size <= self.global_batch_size,
            "train.micro_batch_size",
            self.micro_batch_size,
            f"1 to {self.global_batch_size} (train.global_batch_size), or null",
        )
        _require(
            self.clip_norm is None or 0 < self.clip_norm < math.inf,
            "train.clip_norm",
            self.clip_norm,
            "a number above 0, or null",
        )
        _require(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "0 to below 1")
        _require(self.ema_decay is None or 0 < self.ema_decay < 1, "train.ema_decay", self.ema_decay, "0 to 1, or null")
        _require(self.log_every >= 1, "train.log_every", self.log_every, "1 or more")
        hours = self.max_hours
        _require(hours is None or 0 < hours < math.inf, "train.max_hours", hours, "a number above 0, or null")
        _require(
            self.deadline is None or 0 < self.deadline < math.inf,
            "train.deadline",
            self.deadline,
            "a unix time, or null",
        )
        steps = self.profile_steps
        _require(
            steps is None or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
            "train.profile_steps",
            steps,
            "[FIRST, LAST] with 1 <= FIRST <= LAST, or null",
        )
        _require(self.agree_every >= 1, "train.agree_every", self.agree_every, "1 or more")
        # torch's own limit for a collective is half an hour, and names no rank
        _require(2 <= self.hang_timeout_s <= 1500, "train.hang_timeout_s", self.hang_timeout_s, "2 to 1500")
        _require(self.threads is None or self.threads >= 1, "train.threads", self.threads, "1 or more, or null")
        every = self.fingerprint_every
        _require(every is None or every >= 1, "train.fingerprint_every", every, "1 or more, or null")
        factor = self.straggler_factor
        _require(factor is None or 1 < factor < math.inf, "train.straggler_factor", factor, "above 1, or null")


@dataclass(frozen=True)
class CommConfig:
    bucket_mb: float = 25.0
    """Gradients that DDP sends at once, in MB of 2^20 bytes: small ones leave earlier in the backward pass, large ones cost
    fewer messages."""
    hook: Literal["none", "fp16", "bf16"] = "none"
    """What gradients are rounded to on their way between ranks, for slow networks: half the bytes. none: not at all."""
    timeout_s: float = 1800.0
    """A collective of gloo or NCCL that takes so long fails, and the run with it. train.hang_timeout_s, which names the
    silent rank, is to come first."""

    def __post_init__(self) -> None:
        _require(0 < self.bucket_mb < math.inf, "comm.bucket_mb", self.bucket_mb, "a number above 0")
        _require(10 <= self.timeout_s < 1e6, "comm.timeout_s", self.timeout_s, "10 or more")


@dataclass(frozen=True)
class EvalConfig:
    every: int = 1
    """Epochs from one evaluation to the next; the last epoch is always evaluated."""
    batch_size: int = 500
    """Images of one forward pass on one rank in evaluation. Changes speed, memory and rounding only."""
    train_accuracy: Literal["running", "full"] = "running"
    """running: over the epoch's own training batches, at no cost. full: a pass in eval mode over the augmented training
    set after each epoch, as the article does."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "eval.every", self.every, "1 or more")
        _require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    every_epochs: int = 1
    """Epochs from one checkpoint to the next; the end of the run is always saved."""
    every_steps: int | None = None
    """Also every so many steps. null: never."""
    every_minutes: float | None = 10.0
    """Also where the last one is so old. null: never."""
    keep: int = 3
    """Checkpoints to keep: the newest ones, and `best` besides."""

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 1, "checkpoint.every_epochs", self.every_epochs, "1 or more")
        steps, minutes = self.every_steps, self.every_minutes
        _require(steps is None or steps >= 1, "checkpoint.every_steps", steps, "1 or more, or null")
        _require(
            minutes is None or 0 < minutes < math.inf, "checkpoint.every_minutes", minutes, "a number above 0, or null"
        )
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "1 or more")


@dataclass(frozen=True)
class TrackingConfig:
    name: str | None = None
    """package.module:Class of your own that takes the scalars too, besides metrics.jsonl and TensorBoard
    (docs/extending.md). null: none."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its arguments: tracking.args.KEY=VALUE."""
    pictures_every: int | None = 10
    """The evaluation of every so many epochs has a set of TensorBoard's pictures of test images, with curves of precision and
    recall, and the last one too. null: no pictures, of training images neither."""
    histograms_every: int | None = None
    """Steps from one set of histograms of weights and gradients in TensorBoard to the next. null: none."""
    graph: bool = False
    """Show the network's graph in TensorBoard."""
    projector: bool = False
    """At the run's end, show what the network makes of 1,000 test images in TensorBoard's projector."""
    hparams: list[str] = field(default_factory=list)
    """[KEY, ...]: settings that TensorBoard's HPARAMS tab shows first. A sweep names its own."""

    def __post_init__(self) -> None:
        for name in ("pictures_every", "histograms_every"):
            every = getattr(self, name)
            _require(every is None or every >= 1, f"tracking.{name}", every, "1 or more, or null")


@dataclass(frozen=True)
class Config:
    run_dir: str = "runs/cifar10"
    """All that a run writes. Default: runs/RECIPE, after the config file's name. On several nodes: a shared folder."""
    resume: str = "auto"
    """auto: go on from run_dir's newest checkpoint, or start anew if it has none. never: refuse a run_dir that has one.
    PATH: start from that checkpoint (or a run_dir's newest); once run_dir has one of its own, as auto."""
    seed: int = 0
    """Seed of all that is random: initial weights, order, augmentation, dropout."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a GPU a rank where there is one, else the CPU."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Of torch.distributed. auto: nccl on cuda, else gloo."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Of forward and backward; weights and updates stay fp32. auto: bf16 where every rank's hardware computes in it.
    tf32: fp32 whose products a GPU rounds to 10 bits. fp16: with a scaled loss, for GPUs without bf16."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        _require(bool(self.run_dir.strip()), "run_dir", repr(self.run_dir), "a folder's name")
        _require(bool(self.resume.strip()), "resume", repr(self.resume), "auto, never or a path")
        _require(bool(self.model.init.strip()), "model.init", repr(self.model.init), "random or a path")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        _require(bool(self.data.root.strip()), "data.root", repr(self.data.root), "a folder's name")
        if self.train.reproducible:
            if self.train.compile != "off":
                raise UserError(
                    f"train.compile={self.train.compile} with train.reproducible=true, whose bits kernels of its own would "
                    f"change: use one of them"
                )
            if self.comm.hook != "none":
                raise UserError(
                    f"comm.hook={self.comm.hook} with train.reproducible=true, which sums gradients by a hook of its own: "
                    f"use one of them"
                )
        if self.backend == "nccl" and self.device in ("cpu", "mps"):
            raise UserError(
                f"backend=nccl needs device=cuda, found device={self.device}: use backend=gloo, or leave it out"
            )


ELSEWHERE = (
    "run_dir",
    "resume",
    "device",
    "backend",
    "data.root",
    "data.cache",
    "data.residency",
    "comm.timeout_s",
    "train.profile_steps",
    "checkpoint.",
    "tracking.",
)
"""Keys, and sections, that do not change what a run computes."""

Tables = Mapping[str, Mapping[str, Callable[..., object]]]
"""Keys whose values are names from a table, such as `{"model.name": MODELS}`, or functions of the user's own."""


def load_config(argv: Sequence[str], tables: Tables, base: Mapping[str, Any] | None = None) -> Config:
    """The config that `[CONFIG.yaml] [key=value ...]` asks for: defaults < base < file < arguments.

    `base` is a checkpoint's config; a key that there no longer is counts for nothing.
    `--help` and `--print-config` print and exit. Raises `UserError` for an unknown key (with a suggestion), a wrong type,
    a value out of range, a name that is not in its table, or a file that cannot be read.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(tables))
        sys.exit(0)
    arguments = [arg for arg in argv if arg != "--print-config"]
    files = [arg for arg in arguments if "=" not in arg]
    for name in files[1:] + [name for name in files if name.startswith("-")]:
        raise UserError(f"cannot read the argument {name!r}: expected [CONFIG.yaml] [key=value ...], or --help")

    layers = []
    if base is not None:
        known = {name for name, *_ in fields()}
        layers.append(("the checkpoint's ", {key: value for key, value in flatten(base).items() if key in known}))
    if files:
        layers.append(("", {"run_dir": f"runs/{Path(files[0]).stem}"}))
        layers.append((f"{files[0]}: ", dict(_flatten(*read_yaml(files[0]), files[0]))))
    layers.append(("", dict(_read_argument(arg) for arg in arguments if "=" in arg)))

    merged: Any = OmegaConf.structured(Config)
    for source, values in layers:
        for key, value in values.items():
            _check_key(key, value, source)
            if value == "???":  # OmegaConf's mark for a value that is yet to come
                raise UserError(f"{source}{key}=??? has no value: set one, or leave the key out")
            try:
                merged = OmegaConf.merge(merged, _nest(key, value))
            except (OmegaConfBaseException, ValueError, TypeError) as error:
                _refuse_value(key, value, source, error)
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    assert isinstance(config, Config)
    for key in config.tracking.hparams:
        _check_key(key, "...", "tracking.hparams: ")
    for key, table in tables.items():
        if (name := get(config, key)) is not None:
            find(key, name, table)
    if "--print-config" in argv:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested dicts, which a checkpoint can hold."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The config as a YAML file that `load_config` takes."""
    return yaml.dump(to_dict(config), Dumper=_ValueDumper, sort_keys=False)


def get(config: Config, key: str) -> Any:
    """The value of a dotted key, such as `optim.lr`."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys; a section that takes any key, such as `model.args`, is one value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, Mapping) and prefix + name not in _free_sections()
        flat |= flatten(value, f"{prefix}{name}.") if is_section else {prefix + name: value}
    return flat


def essential(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config as nested dicts, by dotted keys: what changes what a run computes. A key that it lacks has its default."""
    whole = flatten(to_dict(Config())) | flatten(values)
    return {key: value for key, value in whole.items() if not key.startswith(ELSEWHERE)}


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key's last part, such as `lr` for `optim.lr`, where that tells it from the others; else the key."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: short if list(last.values()).count(short) == 1 else key for key, short in last.items()}


def _nest(key: str, value: object) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nest(rest, value) if rest else value}


@functools.cache
def fields(cls: type = Config, prefix: str = "") -> tuple[tuple[str, Any, object, str], ...]:
    """(dotted key, type, default, docstring) of every setting, in the order of declaration."""
    hints, docs = typing.get_type_hints(cls), _field_docs(cls)
    default = cls()
    found: list[tuple[str, Any, object, str]] = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found += fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            found.append((prefix + f.name, hints[f.name], getattr(default, f.name), docs[f.name]))
    return tuple(found)


@functools.cache
def _free_sections() -> frozenset[str]:
    """Sections that take any key, such as `model.args`."""
    return frozenset(name for name, kind, *_ in fields() if typing.get_origin(kind) is dict)


def help_text(tables: Tables) -> str:
    """What `--help` prints: every key with its type, default and docstring."""
    lines = ["usage: [torchrun ...] python -m ddp_cifar.COMMAND [CONFIG.yaml] [key=value ...]", ""]
    lines += [
        "  --help          this text",
        "  --print-config  the resolved config as YAML",
        "  --dry-run [--nodes N] [--nproc-per-node N]",
        "                  (train) look at the run before it is queued: data, batches, memory; needs no GPU",
        "",
        "keys and defaults:",
        "",
    ]
    for key, annotation, default, doc in fields():
        kind = f"one of {', '.join(tables[key])}" if tables.get(key) else _type_name(annotation)
        lines.append(f"  {key}={as_typed(default)}  ({kind})")
        lines += textwrap.wrap(" ".join(doc.split()), 112, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def as_typed(value: object) -> str:
    """As one would type it on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(annotation: Any) -> str:
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        return "KEY=VALUE"
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, options))
    if typing.get_origin(annotation) is types.UnionType:
        return f"{_type_name(options[0])} or null"
    return f"[{options[0].__name__}, ...]" if options else str(annotation.__name__)


def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, which Python itself throws away."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            docs[node.target.id] = ast.literal_eval(after.value)
    return docs


def _is_text(key: str) -> bool:
    """True for a key whose value is a string: taken as typed, since YAML 1.1 would read 10:15 as 615 and 010 as 8."""
    for name, annotation, _, _ in fields():
        if name == key:
            return annotation is str or typing.get_origin(annotation) is Literal
    return False


def _read_argument(argument: str) -> tuple[str, Any]:
    key, text = argument.split("=", 1)
    if _is_text(key):
        return key, text
    try:
        return key, yaml.load(text, Loader=_ValueLoader) if not _is_float(text) else float(text)
    except yaml.YAMLError as error:
        raise UserError(f"cannot read the value of {argument!r}: {_first_line(error)}") from error


def _is_float(text: str) -> bool:
    """True for 1e-3, which YAML 1.1 takes for a string."""
    try:
        float(text)
    except ValueError:
        return False
    return any(c in text for c in ".eE") or text.lower().lstrip("+-") in ("nan", "inf")


def read_yaml(path: str) -> tuple[Any, Any]:
    """A YAML file as nested dicts whose leaves are still text, to be read by the type of their key; and with them read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the config file {path}: {reason}") from error
    try:
        return yaml.load(text, Loader=_TextLoader), yaml.load(text, Loader=_ValueLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {_first_line(error)}") from error


class _TextLoader(yaml.BaseLoader):
    """YAML with every scalar as text, and a key that stands twice refused rather than overwritten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands twice", node.start_mark)
        return typing.cast(dict[Any, Any], super().construct_mapping(node, deep))


class _ValueLoader(yaml.SafeLoader):
    """YAML with values read by their looks, as 1.1 has it; but 1e-3 is a number, and 2026-11-24 is text."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Keys stay as they stand in the file: `<<` is refused."""


class _ValueDumper(yaml.SafeDumper):
    """Quotes what `_ValueLoader` would take for something else."""


_ValueLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _each in (_ValueLoader, _ValueDumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
    )


def _flatten(texts: Any, values: Any, path: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and typed values of a file that `read_yaml` has read. An empty file, or section, sets nothing."""
    if texts in (None, ""):
        return
    if not isinstance(texts, dict):
        where = f"{prefix[:-1]} in {path}" if prefix else path
        raise UserError(f"{where} holds no keys: expected lines of the form key: value")
    sections = {key.rpartition(".")[0] for key, *_ in fields()}
    for (name, text), value in zip(texts.items(), values.values(), strict=False):
        if prefix + name in _free_sections():
            if value is not None:
                yield prefix + name, value
        elif isinstance(text, dict) or prefix + name in sections:
            yield from _flatten(text, value, path, f"{prefix}{name}.")
        elif isinstance(text, str):
            yield _read_argument(f"{prefix}{name}={text}")
        else:
            yield prefix + name, text


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1})" if mark else str(problem)


def as_argument(key: str, text: str, value: object) -> str:
    """`key=value` for a command line, of a value that `read_yaml` has read: as it was typed, or, where the key's type is not
    known, so that it is read as the same again."""
    if _is_free(key):
        text = yaml.dump(value, Dumper=_ValueDumper, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return f"{key}={text}"


def setting_of(key: str) -> str:
    """The key itself, or the section that takes any key in which it is: `model.args` for `model.args.width`."""
    return next((name for name in _free_sections() if key.startswith(f"{name}.")), key)


def _is_free(key: str) -> bool:
    return setting_of(key) != key


def _check_key(key: str, value: object, source: str) -> None:
    keys = [name for name, *_ in fields()]
    if key in keys or _is_free(key):
        return
    inside = [name for name in keys if name.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{source}{key}={value}: {key} is a section; set one of its keys, such as {inside[0]}=...")
    by_last_part = [name for name in keys if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = by_last_part or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not near:
        last_parts = {name.rpartition(".")[2]: name for name in keys}
        near = [last_parts[part] for part in difflib.get_close_matches(key.rpartition(".")[2], last_parts, n=1)]
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all keys"
    raise UserError(f"{source}{key} is not a key of the config; {hint}")


def _refuse_value(key: str, value: object, source: str, error: Exception) -> NoReturn:
    if isinstance(error, UserError):
        raise UserError(f"{source}{error}") from error
    annotation = next(kind for name, kind, _, _ in fields() if name == key or key.startswith(f"{name}."))
    found = "null" if value is None else value
    raise UserError(f"{source}{key}={found} has the wrong type: expected {_type_name(annotation)}") from error
