"""Load weights into a model by name."""

from collections.abc import Mapping

from torch import Tensor, nn

from ddp_cifar.errors import UserError


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str, *, new_head: bool = False) -> list[str]:
    """Load a state dict. If its names do not match as they are, wrappers' prefixes (`module.`, `_orig_mod.`) are ignored.

    With `new_head`, a last layer with another number of classes keeps the model's weights; their names are returned.
    Raises `UserError` if a name or a shape does not fit the model.
    """
    current = model.state_dict()
    weights = match_names(weights, current)
    kept = _other_head(weights, current) if new_head else []
    weights |= {name: current[name] for name in kept}
    for name in [*current, *weights]:
        if name not in weights or name not in current:
            problem = "it has no" if name not in weights else "the model has no"
            raise UserError(f"{source} does not fit the model: {problem} {name}; check model.name")
        if weights[name].shape != current[name].shape:
            raise UserError(
                f"{source} does not fit the model: {name} has shape {tuple(weights[name].shape)}, "
                f"expected {tuple(current[name].shape)}; check model.name, data.image_size and the number of classes"
            )
    model.load_state_dict(weights)
    return kept


WRAPPERS = {"module", "_orig_mod"}
"""Parts of names that DataParallel, DistributedDataParallel, AveragedModel and torch.compile add."""


def match_names(weights: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` under the names of `current`. Wrappers' prefixes are ignored only if the names differ."""
    if weights.keys() == current.keys():
        return dict(weights)
    names = {_unwrapped(name): name for name in current}
    renamed = {names.get(_unwrapped(name), name): tensor for name, tensor in weights.items()}
    if len(names) < len(current) or len(renamed) < len(weights):
        return dict(weights)  # two names differ only in a prefix
    if renamed.keys() - current.keys() == {"n_averaged"}:  # AveragedModel's count of updates
        del renamed["n_averaged"]
    return renamed


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _other_head(weights: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the last layer's weights that differ only in the number of outputs."""
    layer = list(current)[-1].rpartition(".")[0] + "."
    names = [name for name in current if name.startswith(layer) and name in weights]
    if all(weights[name].shape[1:] == current[name].shape[1:] for name in names):
        return [name for name in names if weights[name].shape != current[name].shape]
    return []
