"""Muon: equal to torch's for matrices, and AdamW for the rest; exact on several ranks and after a resume."""

import copy

import pytest
import torch
from helpers import config_of, make_trainer, random_dataset
from ranks import RankPool
from torch import Tensor, nn

from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.models import build_model
from ddp_cifar.run.checkpoint_file import digest
from ddp_cifar.training.muon import hidden_matrices, orthogonalize
from ddp_cifar.training.optim import build_optimizer


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (16, 16)])
def test_the_singular_values_of_an_orthogonalized_matrix_are_near_one(
    shape: tuple[int, int], device: str, bf16: bool
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonalize(matrix, steps=5, bf16=bf16) @ right.T
    off_diagonal = found - found.diagonal().diag()
    assert off_diagonal.abs().max() < (0.1 if bf16 else 1e-3), "the singular vectors do not change"
    assert 0.6 < found.diagonal().min() <= found.diagonal().max() < 1.3
    assert not orthogonalize(torch.zeros(shape, device=device), steps=5, bf16=bf16).any()


def updated(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The parameters after three updates with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    return dict(model.named_parameters())


def test_hidden_layers_are_updated_like_torchs_muon_and_the_rest_like_torchs_adamw() -> None:
    """torch's Muon accepts matrices only, and computes in bf16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 6), nn.Linear(6, 12), nn.Linear(12, 3))
    twin = copy.deepcopy(model)
    before = copy.deepcopy(dict(model.named_parameters()))
    options = {"lr": 0.01, "weight_decay": 0.1}
    found = updated(
        model, [build_optimizer(model, config_of("optim.name=muon", "optim.lr=0.01", "optim.weight_decay=0.1").optim)]
    )
    hidden = {"1.weight", "2.weight"}
    matrices, others = ([p for n, p in twin.named_parameters() if (n in hidden) == want] for want in (True, False))
    expected = updated(
        twin,
        [
            torch.optim.Muon(matrices, momentum=0.9, adjust_lr_fn="match_rms_adamw", **options),
            torch.optim.AdamW(others, **options),
        ],
    )
    for name in found:
        change = (expected[name] - before[name]).norm()
        assert (found[name] - expected[name]).norm() < (0.02 if name in hidden else 1e-5) * change, name


def test_a_convolution_is_updated_as_a_matrix_in_any_memory_format() -> None:
    def change(memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 2, 3)]
        model = nn.Sequential(*layers).to(memory_format=memory_format)
        before = layers[1].weight.detach().clone()
        updated(model, [build_optimizer(model, config_of("optim.name=muon", "optim.lr=0.5").optim)])
        return before, layers[1].weight - before

    (_, contiguous), (_, channels_last) = change(torch.contiguous_format), change(torch.channels_last)
    assert torch.equal(contiguous, channels_last)
    # three updates of size 0.2 lr
    assert 0.05 < contiguous.square().mean().sqrt() < 3 * 0.2 * 0.5 * 1.2


class WithTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, 4, 8))
        self.embed, self.hidden, self.head = nn.Conv2d(3, 8, 2), nn.Linear(8, 8), nn.Linear(8, 2)


def hidden_names(model: nn.Module) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in hidden_matrices(model)]


def test_the_first_and_the_last_layer_are_not_hidden() -> None:
    convolutions = [f"conv_layer.{number}.weight" for number in (3, 6, 9, 13, 16)]
    assert hidden_names(build_model(config_of().model, 10, (3, 32, 32))) == [
        *convolutions,
        "fc_layer.1.weight",
        "fc_layer.3.weight",
    ]
    resnet = hidden_names(build_model(config_of("model.name=resnet9").model, 10, (3, 32, 32)))
    assert (resnet[0], resnet[-1], len(resnet)) == ("blocks.0.0.weight", "blocks.7.convolutions.1.0.weight", 7)
    assert hidden_names(WithTokens()) == ["hidden.weight"]


def test_groups_are_split_into_muon_and_adamw() -> None:
    model = build_model(config_of().model, 10, (3, 32, 32))
    config = config_of("optim.name=muon", "optim.lr=0.5", "optim.groups=[{match: fc_layer.*, lr_factor: 0.1}]").optim
    groups = build_optimizer(model, config).param_groups
    assert [(len(group["params"]), group["muon"], group["lr"]) for group in groups] == [
        (5, True, 0.5),
        (13, False, 0.5),
        (2, True, 0.05),
        (4, False, 0.05),
    ]


@pytest.mark.parametrize(
    ("precision", "argument", "expected"),
    [
        ("fp32", "", False),
        ("bf16", "", True),
        ("bf16", "optim.args.bf16=false", False),
        ("fp32", "optim.args.bf16=true", True),
    ],
)
def test_the_iteration_runs_in_the_precision_of_the_run(precision: str, argument: str, expected: bool) -> None:
    config = config_of("optim.name=muon", *filter(None, [argument])).optim
    groups = build_optimizer(build_model(config_of().model, 10, (3, 32, 32)), config, precision).param_groups
    assert [group["bf16"] for group in groups] == [expected, expected]


def test_unknown_arguments_give_one_line() -> None:
    with pytest.raises(UserError, match=r"optim.name=muon does not accept optim.args={'beta': 1} \(.*'beta'.*\)$"):
        build_optimizer(
            build_model(config_of().model, 10, (3, 32, 32)), config_of("optim.name=muon", "optim.args.beta=1").optim
        )


def whole_and_resumed(world: World) -> tuple[str, str]:
    """The digests of an uninterrupted run and of one that stops and resumes, both reproducible and with a frozen layer."""
    sizes = ("model.name=tiny", "train.global_batch_size=16", "train.micro_batch_size=4", "train.epochs=2")
    more = (
        "train.reproducible=true",
        "optim.name=muon",
        "optim.lr=0.01",
        "model.freeze=[0.bias]",
        "train.ema_decay=0.9",
    )
    dataset = random_dataset(40, image_size=16)
    whole, first, second = (
        make_trainer(world, config_of(*sizes, *more, *limit), dataset) for limit in ((), ("train.max_steps=4",), ())
    )
    whole.fit()
    first.fit()
    second.load_state_dict(copy.deepcopy(first.state_dict()), "the first half")
    second.fit()
    parts = ("model", "optimizer", "progress", "ema")
    one, other = ({name: trainer.state_dict()[name] for name in parts} for trainer in (whole, second))
    return digest(one), digest(other)


def test_muon_is_bitwise_identical_on_1_and_2_ranks_and_after_a_resume(ranks: RankPool) -> None:
    ((whole, resumed),) = ranks.run(whole_and_resumed, 1)
    assert whole == resumed
    assert ranks.run(whole_and_resumed, 2) == [(whole, whole)] * 2
