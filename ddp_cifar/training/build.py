"""Builds a Trainer from a config, for this rank."""

import os
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddp_cifar.command import counted, span
from ddp_cifar.config import Config, ModelConfig, TrainConfig, as_typed
from ddp_cifar.data.batch_plan import BatchPlan, advice, check_batch_size, larger_micro_batches, plan_batches
from ddp_cifar.data.dataset import DataSet, choose_data_device
from ddp_cifar.data.loader import EvalLoader, TrainLoader
from ddp_cifar.data.normalization import normalization_for
from ddp_cifar.data.sampler import StepSampler
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.log import log
from ddp_cifar.models import build_model, fails_on_one_image
from ddp_cifar.models.torchvision import pretrained_weights
from ddp_cifar.models.weights import load_weights
from ddp_cifar.run.checkpoint_store import Checkpoints, NullCheckpoints
from ddp_cifar.run.environment import device_name
from ddp_cifar.run.resume import load_init
from ddp_cifar.seeding import derive_seed
from ddp_cifar.training.evaluation import Evaluator
from ddp_cifar.training.loss import TrainingLoss, class_weights, loss_function
from ddp_cifar.training.optim import build_optimizer
from ddp_cifar.training.parameters import describe_groups, freeze
from ddp_cifar.training.precision import pick_precision
from ddp_cifar.training.progress import Progress
from ddp_cifar.training.step import TrainStep
from ddp_cifar.training.trainer import Trainer
from ddp_cifar.training.trial import try_training
from ddp_cifar.training.warmup import warm_up

COMPILED_ON = {"cuda"}  # on a CPU the compiled kernels are slower than oneDNN's, and they need a C++ compiler


def set_up_kernels(train: TrainConfig, world: World) -> None:
    """Set the number of CPU threads, and whether torch uses only deterministic kernels and raises if there is none."""
    on_cpu = world.device.type == "cpu"
    threads = train.threads or (1 if train.reproducible and on_cpu else None)
    if threads is not None:
        torch.set_num_threads(threads)
    deterministic = train.deterministic or train.reproducible
    if deterministic:
        # required for determinism, before cuBLAS's first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # for models that compile parts of themselves
        torch.backends.cudnn.benchmark = False
    # use_deterministic_algorithms would import torch's compiler
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a slow debugging aid
    if train.reproducible:
        count = check_batch_size(train, world.world_size)
        fixed = f"{_threads()} per rank" if on_cpu else "no cuDNN autotuning"
        log.info(
            f"reproducible: bitwise identical on {counted(span(1, count), 'rank')}; uses tree sums over the micro-batches of "
            f"a step, deterministic kernels, {fixed}"
        )


def _threads() -> str:
    number = torch.get_num_threads()
    return f"{number} CPU thread{'s' * (number > 1)}"


def source_of_weights(config: ModelConfig) -> str:
    """Return the name of the initial weights: a path, `torchvision's IMAGENET1K_V1`, or random."""
    if config.init == "random" and config.name == "torchvision" and {"name", "weights"} <= config.args.keys():
        return f"torchvision's {config.args['weights']}"
    return config.init


def initial_weights(config: Config) -> Mapping[str, Tensor] | None:
    """Return the weights that a new run starts from, None if they are random. Raises `UserError` if they cannot be read."""
    source = source_of_weights(config.model)
    if source == "random":
        return None
    if source == config.model.init:
        return load_init(source)
    args = config.model.args
    return pretrained_weights(args["name"], args["weights"], config.data.channels)


def build_trainer(
    config: Config,
    world: World,
    dataset: DataSet,
    checkpoints: Checkpoints | None = None,
    init: Mapping[str, Tensor] | None = None,
) -> Trainer:
    """Build the trainer of this rank, and log what was derived from the config and the world.

    Rank 0 saves to `checkpoints`, if given. The model starts from the weights `init`, if given. Raises `UserError`
    if a component cannot be built.
    """
    if config.train.compile != "off" and world.device.type not in COMPILED_ON:
        raise UserError(
            f"train.compile={config.train.compile} needs a GPU, found device {world.device.type}; use train.compile=off"
        )
    plan = plan_batches(config.train, world.world_size, len(dataset.train))
    device, channels_last = world.device, config.train.channels_last
    sampler = StepSampler(plan, world.rank, config.seed, dataset.train.labels if config.data.oversample else None)
    num_classes, image_shape = len(dataset.classes), dataset.train.image_shape
    normalization = normalization_for(config.data, dataset)
    weights = class_weights(config.train.class_weights, dataset.train.labels, num_classes)

    torch.manual_seed(derive_seed("init", config.seed))
    model = build_model(config.model, num_classes, image_shape, device)
    frozen = freeze(model, config.model.freeze)
    check_micro_batches(config, plan, model, dataset)
    if init is not None:
        source = source_of_weights(config.model)
        new = load_weights(model, init, source, new_head=True)
        log.info(
            f"weights from {source}" + (f", except for {', '.join(new)} (different number of classes)" if new else "")
        )
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    precision = pick_precision(config.precision, world)
    try_training(model, config, num_classes, image_shape, precision)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    threads = f", {_threads()} per rank" if device.type == "cpu" else ""
    data = dataset.describe()
    dataset = dataset.to(choose_data_device((dataset.train, dataset.val, dataset.test), device, config.data.residency))
    log.info(f"{config.data.name}: {data}, normalized with {normalization}")
    log.info(
        f"{config.model.name}: {parameters:,} parameters, {precision}, device {device.type}, backend {world.backend}{threads}"
    )
    if frozen:
        log.info(frozen)
    for line in (str(plan), *advice(config.train, plan, on_gpus=device.type == "cuda")):
        log.info(line)

    train_loader = TrainLoader(
        dataset.train,
        normalization,
        channels_last,
        device,
        sampler=sampler,
        config=config.augment,
        num_classes=num_classes,
        seed=config.seed,
    )
    val, test = (
        EvalLoader(split, normalization, channels_last, device) if split else None
        for split in (dataset.val, dataset.test)
    )
    optimizer = build_optimizer(model, config.optim, precision)
    if len(optimizer.param_groups) > 1:
        log.info(f"parameter groups: {describe_groups(optimizer.param_groups)}")
    step = TrainStep(
        config,
        world,
        plan,
        model,
        optimizer,
        loss=TrainingLoss(config.train, weights if weights is None else weights.to(device)),
        precision=precision,
        image_shape=image_shape,
    )
    warm_up(step, train_loader, val, test)
    evaluator = Evaluator(
        world,
        config.eval,
        step.eval_model,
        loss_function(config.train),
        precision,
        num_classes,
        train=train_loader,
        val=val,
        test=test,
        evaluating=step.evaluating,
        compiled=config.train.compile != "off",
    )
    return Trainer(
        config,
        world,
        progress=Progress(data=data, conditions=conditions_of(plan, precision, world.device)),
        train_step=step,
        train_loader=train_loader,
        evaluator=evaluator,
        checkpoints=checkpoints if checkpoints and world.is_main else NullCheckpoints(checkpoints),
        dataset=dataset,
        show_progress=world.is_main and sys.stderr.isatty(),
    )


def conditions_of(plan: BatchPlan, precision: str, device: torch.device) -> dict[str, str]:
    """Return the conditions that affect results and are not in the config. A resume warns if one has changed."""
    conditions = {
        "precision": precision,
        "micro-batches per step": str(plan.num_micro_batches),
        "torch": str(torch.__version__),
        "device": device_name(device),
    }
    return conditions | ({"CPU threads per rank": str(torch.get_num_threads())} if device.type == "cpu" else {})


def check_micro_batches(config: Config, plan: BatchPlan, model: nn.Module, dataset: DataSet) -> None:
    """Raise `UserError` if an epoch has a micro-batch of one image and the model cannot train on one image."""
    if plan.micro_batch_sizes()[-1] > 1:
        return
    if not (reason := fails_on_one_image(model, len(dataset.classes), dataset.train.image_shape)):
        return
    train, setting = config.train, larger_micro_batches(config.train, plan)
    raise UserError(
        f"model.name={config.model.name} cannot train on one image ({reason}), and an epoch has a micro-batch of one image: "
        f"{plan.num_images} training images, train.global_batch_size={train.global_batch_size}, train.micro_batch_size="
        f"{as_typed(train.micro_batch_size)}, {counted(plan.world_size, 'rank')}; "
        + (f"use {setting}" if setting else "use fewer ranks, more images, or a model without BatchNorm")
    )
