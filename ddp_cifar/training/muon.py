"""Muon for hidden matrices and convolutions, and AdamW for all other parameters, in one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddp_cifar.config import OptimConfig
from ddp_cifar.training.optim import Kernels
from ddp_cifar.training.parameters import parameter_groups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration (Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
https://kellerjordan.github.io/posts/muon/)."""


class Muon(Optimizer):
    """Updates the parameter groups with `muon: True` by Muon, and the others by AdamW. Both use `lr` and `weight_decay` alike.

    Muon orthogonalizes the momentum of a weight matrix (Jordan et al., 2024). A convolution (out, in, height, width) is a
    matrix (out, in x height x width). The update is scaled by 0.2 sqrt(max(rows, columns)), to the root mean square of AdamW's
    updates, so that AdamW's learning rate and weight decay suit both (Liu et al., Muon is Scalable for LLM Training, 2025,
    section 2.2).
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float,
        newton_schulz_steps: int = 5,
        bf16: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """`momentum`, `newton_schulz_steps` and `bf16` are Muon's; `betas` and `eps` are AdamW's.

        `bf16`: whether the iteration runs in bf16, as published. All ranks must do the same.
        """
        common = {"lr": lr, "weight_decay": weight_decay, "muon": False}
        options = {"momentum": momentum, "newton_schulz_steps": newton_schulz_steps, "bf16": bf16}
        super().__init__(params, common | options | {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make an update. A closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            update = self._muon_update if group["muon"] else self._adamw_update
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, self.state[parameter], group)

    def _muon_update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        matrix = gradient.lerp(average, group["momentum"]).flatten(1)  # Nesterov momentum
        bf16 = group.get("bf16")
        bf16 = parameter.is_cuda if bf16 is None else bf16  # a group of an older checkpoint
        update = orthogonalize(matrix, group["newton_schulz_steps"], bf16=bf16).view(parameter.shape)
        parameter.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)

    def _adamw_update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, deviation, value=-group["lr"] / (1 - beta1 ** state["step"]))


def orthogonalize(matrix: Tensor, steps: int, *, bf16: bool) -> Tensor:
    """(rows, columns) -> a matrix of the same shape: about U V^T, where U S V^T is the singular value decomposition.

    The iteration (see `COEFFICIENTS`) moves the singular values to between 0.7 and 1.2. It runs in fp32, or in `bf16`.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if is_tall else matrix
    found = found / found.norm().clamp(min=1e-7)  # no singular value is above 1
    found = found.to(torch.bfloat16 if bf16 else torch.float32)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return (found.T if is_tall else found).to(matrix.dtype).contiguous()


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the matrices and convolutions between the first and the last one, in the order of `model.parameters()`.

    The input and output layers are left to AdamW, as Jordan et al. recommend. A tensor of one row, such as a position
    embedding (1, tokens, width), is not a matrix.
    """
    matrices = [each for each in model.parameters() if each.ndim > 1 and min(each.flatten(1).shape) > 1]
    return matrices[1:-1]


def muon(model: nn.Module, config: OptimConfig, kernels: Kernels) -> Optimizer:
    """Return the optimizer over the groups of `config`, each split into the parameters of Muon and of AdamW.

    Muon's iteration runs in bf16 on a GPU, and in a run in bf16, unless `optim.args.bf16` says otherwise.
    """
    hidden = {id(parameter) for parameter in hidden_matrices(model)}
    groups = [
        {**group, "params": parameters, "muon": is_hidden}
        for group in parameter_groups(model, config)
        for is_hidden in (True, False)
        if (parameters := [each for each in group["params"] if (id(each) in hidden) == is_hidden])
    ]
    bf16 = kernels.precision == "bf16" or next(model.parameters()).is_cuda
    args = {"bf16": bf16, **config.args}
    return Muon(groups, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **args)
