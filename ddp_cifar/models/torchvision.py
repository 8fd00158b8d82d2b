"""Any classifier of torchvision, by its name, with random or pre-trained weights."""

from typing import Any

import torch
from torch import Tensor, nn

from ddp_cifar.errors import UserError, did_you_mean, first_line


def build_torchvision(
    num_classes: int,
    image_size: int | tuple[int, int],
    /,
    *,
    name: str,
    num_channels: int = 3,
    weights: str | None = None,
    **args: Any,
) -> nn.Module:
    """Return `torchvision.models.NAME(num_classes=..., **args)` with random weights.

    `weights` is used at the start of a run only, by `pretrained_weights`. Raises `UserError` for an unknown name, and for
    arguments that it does not accept.
    """
    import torchvision  # imported here because it takes two seconds

    _check_name(name)
    if name in ("googlenet", "inception_v3"):
        # by default they have auxiliary outputs in training, and warn about their initialization
        args = {"aux_logits": False, "init_weights": True} | args
    if name.startswith("vit_"):
        args.setdefault("image_size", image_size)
    try:
        model: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, **args)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.args of torchvision's {name}: {error}") from error
    if num_channels != 3:
        _set_channels(model, num_channels)
    return model


def _check_name(name: str) -> None:
    """Raise `UserError` if torchvision has no such classifier."""
    import torchvision

    names = torchvision.models.list_models(torchvision.models)
    if name not in names:
        hint = did_you_mean(name, names, most=3) or f"it has {', '.join(names)}"
        raise UserError(f"model.args.name={name} is not a classifier of torchvision {torchvision.__version__}; {hint}")


def _set_channels(model: nn.Module, num_channels: int) -> None:
    """Replace the first convolution by one with this number of input channels."""
    path, first = next((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    parent, _, name = path.rpartition(".")
    settings = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    arguments: dict[str, Any] = {setting: getattr(first, setting) for setting in settings}
    setattr(model.get_submodule(parent), name, nn.Conv2d(num_channels, bias=first.bias is not None, **arguments))


def pretrained_weights(name: str, weights: str, num_channels: int = 3) -> dict[str, Tensor]:
    """Return torchvision's pre-trained weights for the network `name`, downloaded once into torch's cache.

    For grayscale images, the first convolution's weights are summed over the colors. Raises `UserError` for unknown names, and
    if the weights cannot be downloaded.
    """
    from torchvision.models import get_model_weights

    _check_name(name)
    known = get_model_weights(name)
    weights = weights.rpartition(".")[2]  # also accepts ResNet18_Weights.DEFAULT
    if weights not in known.__members__:
        hint = did_you_mean(weights, known.__members__) or f"it has {', '.join(known.__members__)}"
        raise UserError(f"model.args.weights={weights} are not weights of torchvision's {name}; {hint}")
    url = known[weights].url
    try:
        state: dict[str, Tensor] = known[weights].get_state_dict(progress=False, check_hash=True, map_location="cpu")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.args.weights={weights} cannot be downloaded ({first_line(error)}): download {url} on a machine with internet "
            f"access, and copy it to {torch.hub.get_dir()}/checkpoints/"
        ) from error
    # of the auxiliary outputs, which are not used
    state = {key: value for key, value in state.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}
    first = next(key for key, value in state.items() if value.ndim == 4)
    if num_channels == 1:
        state[first] = state[first].sum(1, keepdim=True)
    return state
