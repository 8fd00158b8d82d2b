"""Any classifier of torchvision, by its name there."""

import difflib
from typing import Any

from torch import nn

from ddp_cifar.errors import UserError


def build_torchvision(num_classes: int, image_size: int, /, *, name: str, **args: Any) -> nn.Module:
    """`torchvision.models.NAME(num_classes=..., **args)`: its last layer has `num_classes` outputs, its weights are random.

    Raises `UserError` for a name that torchvision has not, for arguments that it does not take, and for `weights`, which are the
    config key `model.init`'s.
    """
    import torchvision  # here, as it takes two seconds

    names = torchvision.models.list_models(torchvision.models)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        raise UserError(
            f"model.args.name={name} is no classifier of torchvision {torchvision.__version__}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(names)}")
        )
    if "weights" in args:
        raise UserError(
            "model.args.weights is not for here: save the weights' state dict to a file, and start from it with model.init"
        )
    if name in ("googlenet", "inception_v3"):
        args = {
            "aux_logits": False,
            "init_weights": True,
        } | args  # else they make several outputs in training, and warn
    if name.startswith("vit_"):
        args.setdefault("image_size", image_size)
    try:
        return torchvision.models.get_model(name, num_classes=num_classes, **args)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise UserError(f"model.args of torchvision's {name}: {error}") from error
