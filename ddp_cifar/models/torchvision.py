"""Any classifier of torchvision, by its name."""

from typing import Any

from torch import nn

from ddp_cifar.errors import UserError, did_you_mean


def build_torchvision(num_classes: int, image_size: int, /, *, name: str, **args: Any) -> nn.Module:
    """Return `torchvision.models.NAME(num_classes=..., **args)` with random weights.

    Raises `UserError` for an unknown name, for arguments that it does not accept, and for `weights`, for which the config has
    `model.init`.
    """
    import torchvision  # imported here because it takes two seconds

    names = torchvision.models.list_models(torchvision.models)
    if name not in names:
        hint = did_you_mean(name, names, most=3) or f"it has {', '.join(names)}"
        raise UserError(f"model.args.name={name} is not a classifier of torchvision {torchvision.__version__}; {hint}")
    if "weights" in args:
        raise UserError(
            "model.args.weights is not supported: save the weights as a state dict and load it with model.init=PATH"
        )
    if name in ("googlenet", "inception_v3"):
        # by default they have auxiliary outputs in training, and warn about their initialization
        args = {"aux_logits": False, "init_weights": True} | args
    if name.startswith("vit_"):
        args.setdefault("image_size", image_size)
    try:
        return torchvision.models.get_model(name, num_classes=num_classes, **args)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise UserError(f"model.args of torchvision's {name}: {error}") from error
