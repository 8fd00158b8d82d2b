"""Every key of the config, declared once: name, type, default, range, role, and a docstring with unit and effect.

The defaults are the CIFAR-10 recipe.
"""

# ruff: noqa: RUF009 (`setting` returns a `dataclasses.field`, as each class needs its own)

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, NamedTuple, TypeVar, cast

from ddp_cifar.errors import UserError

T = TypeVar("T")

Role = Literal["identity", "non_result", "machine", "path"]
"""A key may have several roles. A key without a role changes what a run computes, but a resume may change it.

identity: defines the run; a resume must not change it.
non_result: does not change what a run computes.
machine: describes the machine. A trained network uses this machine's value, not the checkpoint's.
path: may name a file or a folder. ~ at its start is the home folder, which the shell does not expand in data.root=~/images.
"""


class Range(NamedTuple):
    """The values that a key accepts. A number must be finite; a string must not be blank."""

    at_least: float = -inf
    above: float = -inf
    at_most: float = inf
    below: float = inf
    expected: str = ""
    """Replaces the numbers in an error message."""
    accepts: Callable[[Any], bool] | None = None
    """Replaces the numbers, for a key whose values have several types."""

    def holds(self, value: Any) -> bool:
        if self.accepts:
            return self.accepts(value)
        if isinstance(value, str):
            return bool(value.strip())
        return bool(self.at_least <= value <= self.at_most and self.above < value < self.below)

    def __str__(self) -> str:
        if self.expected:
            return self.expected
        if self.above > -inf:
            return f"a number above {self.above}" + (f" and below {self.below}" if self.below < inf else "")
        if self.below < inf:
            return f"{self.at_least} to below {self.below}"
        return f"{self.at_least} to {self.at_most}" if self.at_most < inf else f"{self.at_least} or more"


def setting(
    default: T,
    *,
    at_least: float = -inf,
    above: float = -inf,
    at_most: float = inf,
    below: float = inf,
    expected: str = "",
    accepts: Callable[[Any], bool] | None = None,
    role: Role | tuple[Role, ...] = (),
) -> T:
    """Return a dataclass field with a range and roles, which `fields` reads and OmegaConf ignores.

    A key with an optional type also accepts null.
    """
    metadata = {
        "range": Range(at_least, above, at_most, below, expected, accepts),
        "roles": (role,) if isinstance(role, str) else role,
    }
    if isinstance(default, dict | list):
        return cast(T, field(default_factory=default.copy, metadata=metadata))
    return field(default=default, metadata=metadata)


ImageShape = tuple[int, int, int]
"""Channels, height and width of an image."""

MAX_IMAGE_SIZE = 1024
PRESETS = ("cifar10", "imagenet")
"""Names of means and standard deviations."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < inf


def _is_image_size(value: Any) -> bool:
    sizes = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(isinstance(size, int) and 8 <= size <= MAX_IMAGE_SIZE for size in sizes)


def _is_statistic(value: Any, *, positive: bool) -> bool:
    """True for a value of data.mean or data.std."""
    if value is None or isinstance(value, str):
        return value in (None, "auto", *PRESETS)
    numbers = value if isinstance(value, list) and value else [value]
    return all(_is_number(number) and (number > 0 or not positive) for number in numbers)


def _is_names(value: Any) -> bool:
    if value is None:
        return True
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) and name.strip() for name in names)


SECRET_NAMES = r"^key$|(api|access|private)_?key|(^|_)token$|passw|pwd|secret|credential|authorization"


def _secret_in(values: Mapping[str, Any], prefix: str) -> str:
    """The first key that names a secret, or whose value is an address with a password; "" if there is none."""
    for name, value in values.items():
        key = f"{prefix}.{name}"
        if isinstance(value, Mapping):
            if found := _secret_in(value, key):
                return found
        elif re.search(SECRET_NAMES, str(name), re.IGNORECASE) or re.search(r"//[^/@\s]*@", str(value)):
            return key
    return ""


def _is_flip(value: Any) -> bool:
    return isinstance(value, bool) or value == "alternate"


def _is_class_weights(value: Any) -> bool:
    if isinstance(value, list):
        return any(value) and all(_is_number(weight) and weight >= 0 for weight in value)
    return value in (None, "balanced")


@dataclass(frozen=True)
class ShapesConfig:
    train_images: int = setting(5000, at_least=10, role="identity")
    """Number of training images to generate for data.name=shapes."""
    test_images: int = setting(1000, at_least=10, role="identity")
    """Number of test images to generate for data.name=shapes."""
    seed: int = setting(0, role="identity")
    """Seed of the generated images. Separate from `seed`, so that runs with different seeds train on the same images."""


@dataclass(frozen=True)
class DataConfig:
    name: str = setting("cifar10", role="identity")
    """Data set: cifar10 (downloaded once), imagefolder (data.root/train/CLASS/* and data.root/test/CLASS/*), shapes
    (generated at startup), or package.module:function for a function that returns a ddp_cifar.data.DataSet
    (docs/extending.md)."""
    args: dict[str, Any] = setting({}, role="identity")
    """Keyword arguments of a user-defined function: data.args.KEY=VALUE."""
    root: str = setting("data", expected="a folder's name", role=("non_result", "path"))
    """Folder with the images. cifar10 is downloaded into it. Every node must be able to read it."""
    image_size: Any = setting(
        32, expected=f"8 to {MAX_IMAGE_SIZE} pixels, or [HEIGHT, WIDTH]", accepts=_is_image_size, role="identity"
    )
    """Height and width, in pixels, of the decoded images of imagefolder; one number for squares. An image is resized to cover
    this size, then its center is cropped. Always 32 for cifar10 and shapes."""
    channels: int = setting(3, expected="1 or 3", accepts=(1, 3).__contains__, role="identity")
    """1: grayscale images. 3: color images (RGB). A user-defined data set chooses its own."""
    mean: Any = setting(
        None,
        expected=f"auto, {', '.join(PRESETS)}, a number, or one number per channel, or null",
        accepts=functools.partial(_is_statistic, positive=False),
        role="identity",
    )
    """Mean of the pixels (scaled to 0 to 1) per channel, which is subtracted. auto: that of the training images, including
    held-out ones. cifar10: as in the original script. imagenet: for pre-trained weights. null: cifar10 for color images of
    data.name=cifar10 and shapes, else auto. A checkpoint contains the values."""
    std: Any = setting(
        None,
        expected=f"auto, {', '.join(PRESETS)}, a number above 0, or one number per channel, or null",
        accepts=functools.partial(_is_statistic, positive=True),
        role="identity",
    )
    """Standard deviation of the pixels per channel, by which they are divided. Values as for `mean`."""
    oversample: bool = setting(False, role="identity")
    """Draw all classes equally often. An epoch has as many images as without: images of rare classes are repeated, and some
    images of frequent classes are skipped, others in each epoch."""
    cache: str = setting("auto", expected="auto or a folder's name", role=("non_result", "path"))
    """Folder where imagefolder stores the decoded images, which all ranks of a node share in memory. auto: .cache in
    data.root."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """What imagefolder does with files that cannot be decoded. refuse: list them and exit. skip: skip them with a
    warning."""
    val_images: int = setting(0, at_least=0, role="identity")
    """Number of training images to hold out for choosing the best checkpoint. Which images are held out does not
    depend on `seed`. 0: none, and no `best` checkpoint. With 1 or more, imagefolder needs no test folder."""
    residency: Literal["auto", "device", "host"] = setting("auto", role="non_result")
    """Where images are stored while a GPU trains. device: in GPU memory. host: in host memory, with batches prefetched to
    the GPU. auto: device if the images fit in half of the free GPU memory, else host."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)

    @property
    def image_shape(self) -> ImageShape:
        """(C, H, W) of the images, unless the data set is user-defined."""
        size = self.image_size
        height, width = size if isinstance(size, list) else (size, size)
        return self.channels, height, width


@dataclass(frozen=True)
class AugmentConfig:
    crop_padding: int | None = setting(None, at_least=0, at_most=MAX_IMAGE_SIZE, role="identity")
    """Pixels of black padding on each side of a training image, before a random crop to its size. 0: no crop. null: an
    eighth of the shorter side, which is 4 for 32 x 32 pixels, as in the original script."""
    flip: Any = setting(True, expected="true, false or alternate", accepts=_is_flip, role="identity")
    """Flip half of the training images horizontally. true: chosen at random in each epoch. alternate: chosen at random in the
    first epoch, then the other half, and so on: two epochs see both sides of each image. false: where mirror images differ, as
    for digits and text."""
    cutout: int = setting(0, at_least=0, at_most=MAX_IMAGE_SIZE, role="identity")
    """Side, in pixels, of a square at a random place in each training image that is replaced by the mean. 0: none."""
    name: str | None = setting(None, role="identity")
    """User-defined augmentation, package.module:function. It is called with a micro-batch of training images (B, C, H, W) on the
    device, after crop and flip, and returns images of the same shape. Its random numbers are the same on any number of
    ranks (docs/augmentation.md). null: none."""
    args: dict[str, Any] = setting({}, role="identity")
    """Keyword arguments of the user-defined augmentation: augment.args.KEY=VALUE."""
    dtype: Literal["uint8", "float32"] = setting("uint8", role="identity")
    """Type of the images that `name` receives. uint8: 0 to 255. float32: 0 to 1. It may return either type."""
    mixup: float = setting(0.0, at_least=0, role="identity")
    """Mix pairs of training images of a micro-batch, and their labels, by a share drawn from Beta(mixup, mixup). 0: off."""
    cutmix: float = setting(0.0, at_least=0, role="identity")
    """Paste a box from one training image of a micro-batch into another, and mix their labels by area, with a share drawn
    from Beta(cutmix, cutmix). With `mixup` too, each micro-batch uses one of both, chosen at random. 0: off."""

    @property
    def mixes(self) -> bool:
        """True if training has soft labels."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class ModelConfig:
    name: str = setting("cnn", role="identity")
    """Network: cnn (as in the original script: six convolutions, three linear layers, 5,852,170 parameters for ten classes),
    resnet18 or resnet9 (for small images), torchvision (any of its classifiers, chosen by model.args.name), or
    package.module:function for a function that returns a torch.nn.Module (docs/extending.md)."""
    args: dict[str, Any] = setting({}, role="identity")
    """Keyword arguments of the network: model.args.KEY=VALUE."""
    init: str = setting("random", expected="random or a path", role="path")
    """Initial weights: random, or the path of a checkpoint, a run_dir (its newest checkpoint) or a saved state dict. If the
    number of classes differs, the last layer is initialized randomly."""
    freeze: list[str] = setting([], role="identity")
    """[PATTERN, ...]: parameters that keep their initial values, by patterns of their names, such as conv_layer.* (* is any
    text). A BatchNorm layer whose weight and bias are both frozen runs in eval mode, so that its running statistics do not
    change either."""


@dataclass(frozen=True)
class StepClampConfig:
    enabled: bool = setting(True, role="identity")
    """Reset the step count of adam and adamw to `reset_to` when it reaches `limit`, as the original script does. Other
    optimizers ignore it."""
    after_epoch: int = setting(17, at_least=0, role="identity")
    """Number of epochs to complete before the clamp acts. The default, 17, matches `epoch > 16` in the original script: the
    clamp acts from the 18th epoch on."""
    limit: int = setting(1024, role="identity")
    """Step count at which the clamp acts."""
    reset_to: int = setting(1000, at_least=1, role="identity")
    """Step count after a reset. Near 1000, Adam's bias correction scales an update by sqrt(1 - 0.999^1000) = 0.795."""

    def __post_init__(self) -> None:
        if self.limit < self.reset_to:
            raise UserError(
                f"optim.step_clamp.limit={self.limit} is out of range: expected {self.reset_to} (reset_to) or more"
            )


@dataclass(frozen=True)
class GroupConfig:
    """A section of `optim.groups`."""

    match: str = setting("", expected="a pattern of parameter names, such as conv_layer.*")
    """Pattern that the names of the group's parameters match."""
    lr_factor: float = setting(1.0, above=0)
    """Factor on `optim.lr`."""
    weight_decay: float | None = setting(None, at_least=0)
    """Replaces `optim.weight_decay`. null: does not replace it."""

    def __post_init__(self) -> None:
        for each in fields(GroupConfig, "optim.groups."):
            each.check(getattr(self, each.key.rpartition(".")[2]))


@dataclass(frozen=True)
class OptimConfig:
    name: str = setting("adam", role="identity")
    """Optimizer: adam (as in the original script), adamw, sgd, muon (Muon for hidden matrices and convolutions, AdamW for the
    rest), or package.module:Class, such as torch.optim:RMSprop."""
    args: dict[str, Any] = setting({}, role="identity")
    """Additional keyword arguments of the optimizer: optim.args.KEY=VALUE."""
    lr: float = setting(1e-3, above=0, role="identity")
    """Peak learning rate, reached at the end of the warm-up. muon: AdamW's; Muon's updates are scaled to the size of AdamW's."""
    weight_decay: float = setting(0.0, at_least=0, role="identity")
    """adam and sgd: L2 penalty, added to the gradient. adamw and muon: decoupled weight decay; each update shrinks the weights
    by the factor 1 - lr x weight_decay."""
    decay_norm_bias: bool = setting(True, role="identity")
    """Apply `weight_decay` to biases and to the parameters of norm layers too. false: not to parameters with one dimension,
    except where a section of `groups` sets a weight decay."""
    groups: list[GroupConfig] = setting([], role="identity")
    """Parameter groups: sections such as {match: "conv_layer.*", lr_factor: 0.1, weight_decay: 0}. `match` is a pattern of
    parameter names (* is any text). `lr_factor` multiplies `lr`; `weight_decay` replaces the one above; both are optional. A
    parameter belongs to the first section that matches. The other parameters keep `lr` and `weight_decay`."""
    momentum: float = setting(0.9, at_least=0, below=1, role="identity")
    """Nesterov momentum of sgd (0: none) and of muon, for which 0.95 is usual. adam and adamw ignore it."""
    schedule: str = setting("cosine", role="identity")
    """Learning rate after the warm-up. constant: stays at `lr`. cosine: decays to 0 at the end of train.epochs along half a
    cosine. multistep: multiplied by `gamma` after each of the `milestones`. polynomial: `lr` x (1 - t)^`power`, where t goes
    from 0 to 1 at the end of train.epochs. package.module:function: `lr` times the function's result (docs/extending.md)."""
    milestones: list[int] = setting([], role="identity")
    """[EPOCH, ...]: numbers of completed epochs after which multistep multiplies the learning rate by `gamma`."""
    gamma: float = setting(0.1, above=0, below=1, role="identity")
    """Factor of multistep."""
    power: float = setting(1.0, above=0, role="identity")
    """Exponent of polynomial. 1: the learning rate decays linearly."""
    warmup_epochs: float = setting(1.0, at_least=0, role="identity")
    """Number of epochs over which the learning rate rises linearly from 0 to `lr`. May be a fraction."""
    implementation: Literal["auto", "default", "foreach", "fused", "capturable"] = "auto"
    """Which of PyTorch's implementations computes the optimizer update. auto: fused, the fastest. capturable needs a GPU. muon
    ignores it."""
    step_clamp: StepClampConfig = field(default_factory=StepClampConfig)

    def __post_init__(self) -> None:
        if (self.schedule == "multistep") != bool(self.milestones):
            raise UserError(
                f"optim.milestones={self.milestones} does not fit optim.schedule={self.schedule}: expected [EPOCH, ...] with "
                f"multistep, and [] with any other schedule"
            )
        if self.milestones and [0, *self.milestones] != sorted({0, *self.milestones}):
            raise UserError(
                f"optim.milestones={self.milestones} is out of range: expected numbers of epochs from 1 in increasing order"
            )


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = setting(30, at_least=1)
    """Number of passes over the training set. The learning-rate schedule spans all of them."""
    max_steps: int | None = setting(None, at_least=1)
    """Step at which to end the run. The learning-rate schedule still spans `epochs`, so that a larger value continues the
    run. null: no limit."""
    patience_epochs: int | None = setting(None, at_least=1)
    """Number of epochs without a better validation accuracy after which the run ends early. Checked after each evaluation.
    Needs data.val_images. null: the run does not end early."""
    global_batch_size: int = setting(512, at_least=1, role="identity")
    """Number of images per step (one optimizer update), over all ranks. Images per rank and gradient accumulation are derived
    from it and printed. The number of ranks cannot exceed it."""
    micro_batch_size: int | None = setting(64, at_least=1, role="identity")
    """Maximum number of images per forward pass on one rank. Each step is split into
    global_batch_size / micro_batch_size micro-batches (rounded up), whose sizes differ by at most one image. Up to one rank per
    micro-batch, gradients are the same on any number of ranks (up to rounding), including the effects of BatchNorm and
    dropout. null: one micro-batch per rank, as in plain DDP; results then depend on the number of ranks."""
    clip_norm: float | None = setting(None, above=0)
    """Maximum norm of the gradient. A larger gradient is scaled down to it. null: no clipping."""
    loss: str = setting("cross_entropy", role="identity")
    """Loss: cross_entropy, or package.module:function for a function of logits (B, classes) and labels (B,) that returns a loss
    per image (B,) (docs/extending.md). Its mean is minimized and, without `class_weights`, also reported by evaluations."""
    label_smoothing: float = setting(0.0, at_least=0, below=1, role="identity")
    """Fraction of each training label, from 0 to below 1, that is spread evenly over all classes. Only for cross_entropy."""
    class_weights: Any = setting(
        None, expected="balanced, one number per class, or null", accepts=_is_class_weights, role="identity"
    )
    """Factors of the training loss by class. balanced: images / (classes x images of the class). The sum of weighted losses
    is divided by global_batch_size, so that it does not depend on the number of ranks. null: all 1."""
    ema_decay: float | None = setting(None, above=0, below=1, role="identity")
    """Decay per step of an exponential moving average (EMA) of the weights. The average is evaluated in place of the weights
    and saved in checkpoints as `ema`. null: no average."""
    channels_last: bool = True
    """Store images and weights in channels-last memory format, in which convolutions run faster."""
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    """Mode of torch.compile for the network and the augmentation, on a GPU. reduce-overhead and max-autotune also replay
    kernels as CUDA graphs, which is faster if launching kernels takes longer than running them (small micro-batches). off: no
    compilation."""
    profile_steps: list[int] | None = setting(None, role="non_result")
    """[FIRST, LAST]: steps to profile. The traces in RUN_DIR/profile can be opened in TensorBoard and Perfetto; the longest
    kernels are printed. null: no profiling."""
    log_every: int = setting(20, at_least=1, role="non_result")
    """Number of steps between rows of training metrics in metrics.jsonl and TensorBoard."""
    deterministic: bool = False
    """Use only deterministic PyTorch kernels. On a GPU, a resumed run needs this to be bitwise identical to an uninterrupted
    one. Slower on a GPU; no effect on a CPU, where all kernels used are deterministic."""
    reproducible: bool = False
    """Make results bitwise identical on any number of ranks, up to the number of micro-batches per step. Sums over
    micro-batches use a fixed order, and kernels are deterministic as with `deterministic`."""
    threads: int | None = setting(None, at_least=1, role="machine")
    """CPU threads per rank. null: the value of OMP_NUM_THREADS, or 1 with `reproducible` on a CPU, because results depend on
    the number of threads."""
    max_hours: float | None = setting(None, above=0, role="non_result")
    """Hours after which the run saves a checkpoint and stops, counted from the start of its processes or their last
    restart by torchrun. null: no limit."""
    deadline: float | None = setting(None, above=0, expected="a unix time", role="non_result")
    """Unix time, in seconds, at which the run saves a checkpoint and stops, for example
    `$(date -d 'tomorrow 8:00' +%s)`. null: none."""
    agree_every: int = setting(5, at_least=1, role="non_result")
    """Number of steps (or evaluation batches) after which ranks exchange their requests to stop or save. A request
    takes effect after at most twice this number."""
    silent_timeout_s: float = setting(30.0, at_least=2, at_most=1500, role="non_result")
    """Seconds without a heartbeat of a rank, while the others wait for it, after which it counts as lost and the run fails."""
    hang_timeout_s: float = setting(300.0, at_least=2, at_most=1500, role="non_result")
    """Seconds without a completed step or evaluation batch on any rank after which the run fails. The error names the ranks
    that stopped responding."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if a gradient is not finite. stop: end the run with an error. skip: skip the update; this synchronizes with
    the device in every step."""
    fingerprint_every: int | None = setting(200, at_least=1, role="non_result")
    """Number of steps between fingerprints (hashes) of the weights. They are compared across ranks and written to
    metrics.jsonl, where ddp_cifar.compare reads them. Every epoch's end also has one. null: only at the end of an epoch."""
    verify_every: int | None = setting(1000, at_least=1, role="non_result")
    """Number of steps between checks of the devices: each rank computes a micro-batch of another rank again, and the bits must
    be the same (docs/verification.md). null: never."""
    on_corruption: Literal["stop", "exclude"] = setting("stop", role="non_result")
    """If a device computes wrong numbers: stop ends the job. exclude restarts the run without that node, where the launcher
    can (slurm/train.sh, or MIN_NODES). Both resume from the newest checkpoint before the last check that found nothing wrong."""
    straggler_factor: float | None = setting(2.0, above=1, role="non_result")
    """Warn about a rank whose local work (data, forward, update) took this many times as long as that of the other ranks in
    two consecutive intervals of `log_every` steps, and about an exchange between ranks that took this many times as long
    as before. A line says when it is over and what it cost. null: no warning."""

    def __post_init__(self) -> None:
        if self.label_smoothing and self.loss != "cross_entropy":
            raise UserError(
                f"train.label_smoothing={self.label_smoothing} needs train.loss=cross_entropy, found {self.loss}: smooth the "
                f"labels in that function"
            )
        steps = self.profile_steps
        if steps is not None and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise UserError(
                f"train.profile_steps={steps} is out of range: expected [FIRST, LAST] with 1 <= FIRST <= LAST, or null"
            )


@dataclass(frozen=True)
class CommConfig:
    bucket_mb: float = setting(25.0, above=0)
    """Size of DDP's gradient buckets, in units of 2^20 bytes. Small buckets start their all-reduce earlier in the backward
    pass; large ones need fewer messages."""
    hook: Literal["none", "fp16", "bf16"] = "none"
    """Gradient compression for slow networks. fp16 and bf16 round gradients for the all-reduce, which halves the bytes sent.
    none: no compression."""
    timeout_s: float = setting(1800.0, at_least=10, at_most=1_000_000, role="non_result")
    """Timeout of gloo and NCCL collectives, in seconds, after which the run fails. Keep it above train.hang_timeout_s,
    whose error names the ranks that stopped responding."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = setting(1, at_least=1)
    """Number of epochs between evaluations. The last epoch is always evaluated."""
    batch_size: int = setting(500, at_least=1)
    """Number of images per forward pass on one rank in an evaluation. Affects only speed, memory and rounding."""
    train_accuracy: Literal["running", "full"] = "running"
    """How the training accuracy is measured. running: on the training batches of the epoch, at no extra cost. full: by
    a pass in eval mode over the augmented training set after each epoch, as in the original script."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_epochs: int = setting(1, at_least=1, role="non_result")
    """Number of epochs between checkpoints. The end of the run always has one."""
    every_steps: int | None = setting(None, at_least=1, role="non_result")
    """Number of steps between additional checkpoints. null: none."""
    every_minutes: float | None = setting(10.0, above=0, role="non_result")
    """Minutes since the last checkpoint after which an additional one is saved. null: none."""
    keep: int = setting(3, at_least=1, role="non_result")
    """Number of checkpoints to keep: the newest ones. `best` is kept in addition."""
    on_failure: bool = setting(True, role="non_result")
    """Save the last completed step if a rank or a node is lost, from any rank that is left. On several GPUs, each step then
    waits for its sums."""


@dataclass(frozen=True)
class TrackingConfig:
    name: Any = setting(
        None,
        expected="mlflow, wandb, package.module:Class, or a list of these, or null",
        accepts=_is_names,
        role="non_result",
    )
    """Trackers that receive the metrics in addition to metrics.jsonl and TensorBoard: mlflow, wandb (Weights & Biases),
    package.module:Class (docs/extending.md), or a list such as [mlflow, wandb]. null: none."""
    args: dict[str, Any] = setting({}, role="non_result")
    """Keyword arguments of the tracker: tracking.args.KEY=VALUE; if `name` is a list, tracking.args.NAME.KEY=VALUE. Passwords
    and keys belong in the environment."""
    group: str | None = setting(None, expected="a name", role="non_result")
    """Group of the run: a group in W&B, a parent run in MLflow. A sweep sets it to its own name. null: none."""
    artifacts: bool = setting(False, role="non_result")
    """Send the best checkpoint to the tracker when the run has finished; without validation images, the last one."""
    pictures_every: int | None = setting(10, at_least=1, role="non_result")
    """Number of epochs between evaluations that write images and precision-recall curves of the test set to TensorBoard. The
    last epoch's also does. null: none, and no training images either."""
    histograms_every: int | None = setting(None, at_least=1, role="non_result")
    """Number of steps between histograms of weights and gradients in TensorBoard. null: none."""
    graph: bool = setting(False, role="non_result")
    """Write the network's graph to TensorBoard."""
    projector: bool = setting(False, role="non_result")
    """At the end of the run, write embeddings of 1,000 test images for TensorBoard's projector."""
    hparams: list[str] = setting([], role="non_result")
    """[KEY, ...]: config keys that TensorBoard's HPARAMS tab shows first. A sweep sets it to the keys that it varies."""

    def check_secrets(self) -> None:
        """Raise `UserError` if an argument looks like a secret. Not for the config of a checkpoint, which was written earlier."""
        if found := _secret_in(self.args, "tracking.args"):
            raise UserError(
                f"{found} has a secret, which would be written to config.yaml and to checkpoints: set it in the environment "
                f"instead, such as WANDB_API_KEY, MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_PASSWORD"
            )


@dataclass(frozen=True)
class Config:
    run_dir: str = setting("runs/cifar10", expected="a folder's name", role=("non_result", "path"))
    """Folder for everything that a run writes. With a config file NAME.yaml, the default is runs/NAME. Every node must be able
    to write to it."""
    resume: str = setting("auto", expected="auto, never or a path", role=("non_result", "path"))
    """auto: resume from the newest checkpoint in run_dir, or start from scratch if it has none. never: reject a run_dir that
    has a checkpoint. PATH: start from that checkpoint, or from the newest one of that
    run_dir; once this run's run_dir has a checkpoint, same as auto."""
    seed: int = setting(0, at_least=0, at_most=2**63 - 1, expected="0 to 2^63 - 1", role="identity")
    """Seed of everything random: initial weights, order of images, augmentation, dropout."""
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", role=("non_result", "machine"))
    """Device of each rank. auto: one GPU per rank if there are GPUs, else the CPU."""
    backend: Literal["auto", "gloo", "nccl"] = setting("auto", role=("non_result", "machine"))
    """Backend of torch.distributed. auto: nccl on cuda, else gloo. gloo also lets ranks share a GPU, to try several ranks on
    one."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Precision of the forward and backward passes; weights and updates stay fp32. auto: bf16 if every rank's hardware
    supports it, else fp32. tf32: fp32, with 10-bit mantissas in matrix products on a GPU. fp16: with loss scaling, for GPUs
    without bf16."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for each in fields():
            each.check(get(self, each.key))
        if self.train.patience_epochs is not None and not self.data.val_images:
            raise UserError(
                f"train.patience_epochs={self.train.patience_epochs} needs validation images, found data.val_images=0: set "
                f"data.val_images, or remove train.patience_epochs"
            )
        if self.train.reproducible:
            if self.train.compile != "off":
                raise UserError(
                    f"train.compile={self.train.compile} cannot be combined with train.reproducible=true, because compiled "
                    f"kernels change the results: unset one of them"
                )
            if self.comm.hook != "none":
                raise UserError(
                    f"comm.hook={self.comm.hook} cannot be combined with train.reproducible=true, which needs its own "
                    f"communication hook: unset one of them"
                )
        if self.backend == "nccl" and self.device in ("cpu", "mps"):
            raise UserError(
                f"backend=nccl needs device=cuda, found device={self.device}: use backend=gloo, or remove backend=nccl"
            )


class Setting(NamedTuple):
    """A key of the config."""

    key: str
    """Dotted, such as `optim.lr`."""
    type: Any
    default: Any
    range: Range
    roles: tuple[Role, ...]
    section: type
    """The dataclass that declares it, and the name of its field."""
    name: str

    @property
    def doc(self) -> str:
        """The text under the field. Only help needs it: reading all takes a fifth of a second."""
        return _field_docs(self.section)[self.name]

    @property
    def is_optional(self) -> bool:
        return type(None) in typing.get_args(self.type)

    @property
    def is_untyped(self) -> bool:
        """True if values may have several types, which YAML's rules determine."""
        return self.is_free or self.type is Any

    @property
    def is_text(self) -> bool:
        """True for a string that is kept as typed: YAML would read 10:15 as 615, and 010 as 8."""
        return self.type is str or typing.get_origin(self.type) is Literal

    @property
    def is_free(self) -> bool:
        """True for a section that accepts any key, such as `model.args`."""
        return typing.get_origin(self.type) is dict

    def check(self, value: object) -> None:
        """Raise `UserError` if `value` is not in the key's range."""
        if self.range == Range() or (value is None and self.is_optional) or self.range.holds(value):
            return
        shown = repr(value) if isinstance(value, str) else value
        or_null = ", or null" if self.is_optional else ""
        raise UserError(f"{self.key}={shown} is out of range: expected {self.range}{or_null}")


@functools.cache
def fields(cls: type = Config, prefix: str = "") -> tuple[Setting, ...]:
    """Every key of the config, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    found: list[Setting] = []
    for f in dataclasses.fields(cls):
        key, kind = f"{prefix}{f.name}", hints[f.name]
        if dataclasses.is_dataclass(kind):
            found += fields(cast(type, kind), f"{key}.")
        else:
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            range_, roles = f.metadata.get("range", Range()), f.metadata.get("roles", ())
            found.append(Setting(key, kind, default, range_, roles, cls, f.name))
    return tuple(found)


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, which Python itself discards."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            docs[node.target.id] = ast.literal_eval(after.value)
    return docs


@functools.cache
def keys_with_role(role: Role) -> frozenset[str]:
    """The keys that have this role."""
    return frozenset(each.key for each in fields() if role in each.roles)


@functools.cache
def find_setting(key: str) -> Setting | None:
    """The setting that `key` belongs to: `model.args` for `model.args.width`, because `model.args` accepts any key."""
    return next(
        (each for each in fields() if key == each.key or (each.is_free and key.startswith(f"{each.key}."))), None
    )


def setting_of(key: str) -> str:
    """The key itself, or the free section that contains it: `model.args` for `model.args.width`."""
    found = find_setting(key)
    return found.key if found else key


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested dicts, which a checkpoint can store."""
    return dataclasses.asdict(config)


def get(config: Config, key: str) -> Any:
    """The value of a dotted key, such as `optim.lr`."""
    return functools.reduce(getattr, key.split("."), config)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys; a section that accepts any key, such as `model.args`, is one value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, Mapping) and find_setting(prefix + name) is None
        flat |= flatten(value, f"{prefix}{name}.") if is_section else {prefix + name: value}
    return flat


def result_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that change what a run computes, dotted, from a config as nested dicts. A missing key has its default."""
    whole = flatten(to_dict(Config())) | flatten(values)
    return {key: value for key, value in whole.items() if key not in keys_with_role("non_result")}
