"""Gradients that are not finite: the decision to skip the update or to stop, and the first layer that is not finite."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ddp_cifar.config import TrainConfig
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import first_line
from ddp_cifar.log import log
from ddp_cifar.training.progress import Failed


class NormCheck:
    """Decides from the norm of a step's gradient, which is equal on all ranks, whether the weights are updated."""

    def __init__(self, config: TrainConfig, world: World, *, enabled: bool, waits: bool) -> None:
        """`waits`: the step waits for the device anyway.

        If it does not, a norm that is not finite is found later (`TrainMetrics`), unless `train.on_nonfinite` is skip.
        """
        self.mode = mode = config.on_nonfinite
        self.world = world
        self.reads = enabled and (mode == "skip" or waits or world.device.type != "cuda")
        self._names_layer = True

    def allows_update(
        self, norm: Tensor, step: int, replay: Callable[[], Iterable[str]], gradients: Iterable[Tensor]
    ) -> bool:
        """Return False if the update of step `step` must be skipped. Every rank must call it.

        `norm` is that of `gradients`. `replay` runs this rank's micro-batches again and yields which layer of each is not
        finite. Raises `Failed` if the run has to stop.
        """
        if not self.reads or torch.isfinite(norm):
            return True
        problem = f"the gradient of step {step} is not finite ({norm:g})"
        if self._names_layer:
            self._names_layer = False  # only once, as it takes the time of a step
            found = self.world.gather_objects(_first_problem(replay))
            problem += f": {next(filter(None, found), '') or self._without_layer(gradients)}"
        if self.mode == "stop":
            raise Failed(problem)
        log.warning(f"{problem}; skipping the update (train.on_nonfinite=skip)")
        return False

    def _without_layer(self, gradients: Iterable[Tensor]) -> str:
        """Say why no layer is to blame."""
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            return "its values are finite, but too large for their norm"
        return (
            "a second pass over the same images is finite; comm.hook, train.compile or a faulty device may be the cause"
        )


def _first_problem(replay: Callable[[], Iterable[str]]) -> str:
    """The first problem that `replay` finds. An exception, such as for lack of memory, must not keep the other ranks waiting."""
    try:
        return next(filter(None, replay()), "")
    except Exception as error:
        return f"the second pass over the same images failed ({type(error).__name__}: {first_line(error)})"


def first_nonfinite(
    model: nn.Module,
    images: Tensor,
    loss: Callable[[Tensor], Tensor],
    scale: float,
    precision: AbstractContextManager[object],
) -> str:
    """Name the first layer of a forward and backward pass over (B, C, H, W) images that is not finite; "" if all are.

    `loss` returns the (B,) losses of (B, classes) float32 logits. The backward pass is that of their sum times `scale`. Layers
    run in `precision`. No gradient is kept; buffers change as in training.
    """
    found = _Layers(model)
    if problem := _count(images):
        return f"{problem} of the images are not finite"
    with found.watching(), precision:
        # not `model(images)`, which a compiled model runs without the hooks of its layers
        logits = model.forward(images)
        found.after_forward(model, (images,), logits)
    losses = loss(logits.float())
    if found.text:
        return found.text
    if problem := _count(losses):
        return f"the loss of {problem} images is not finite, although their logits are"
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(losses.sum() * scale, list(trained.values()), allow_unused=True)
    if found.text:
        return found.text
    for (name, _), gradient in zip(trained.items(), gradients, strict=True):
        if gradient is not None and (problem := _count(gradient)):
            return f"in the backward pass, {problem} of the gradient of {name} are not finite"
    return ""


class _Layers:
    """Looks at the outputs of layers in the forward pass, and at the gradients of these outputs in the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.text = ""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at all layers in the body, and later at their gradients."""
        handles = [
            module.register_forward_hook(self.after_forward) for module in self.names if module is not self.model
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def after_forward(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if self.text or not isinstance(output, Tensor):
            return
        name = self._name(module)
        if problem := _count(output):
            if any(_count(parameter) for parameter in module.parameters(recurse=False)):
                self.text = f"the weights of {name} are not finite"
            elif any(_count(tensor) for tensor in inputs if isinstance(tensor, Tensor)):
                self.text = f"the input of {name} is not finite, but the outputs of all layers before it are"
            else:
                self.text = f"{problem} of the output of {name} are not finite, although its input is"
        elif output.grad_fn is not None:
            output.grad_fn.register_hook(lambda results, received: self._after_backward(name, results, received))

    def _after_backward(self, name: str, results: Sequence[Tensor | None], received: Sequence[Tensor | None]) -> None:
        """Look at the gradients that a layer's last operation has `received`, and at those that it passes on (`results`)."""
        if self.text:
            return
        if any(_count(gradient) for gradient in received if gradient is not None):
            self.text = (
                f"in the backward pass, the gradient that reaches {name} is not finite, but no layer after it is named"
            )
        elif problems := [_count(gradient) for gradient in results if gradient is not None and _count(gradient)]:
            self.text = f"in the backward pass, {problems[0]} of a gradient from {name} are not finite"

    def _name(self, module: nn.Module) -> str:
        kind = type(module).__name__
        return f"layer {self.names[module]} ({kind})" if self.names[module] else f"the model ({kind})"


def _count(tensor: Tensor) -> str:
    """`3 of 512 values`: the values that are not finite; "" if all are, and for integers."""
    bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
    return f"{bad:,} of {tensor.numel():,} values" if bad else ""
