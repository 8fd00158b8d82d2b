"""Loss functions and class weights."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers import config_of, focal_loss, make_trainer, random_dataset
from torch import Tensor

from ddp_cifar.config import TrainConfig
from ddp_cifar.distributed.world import World
from ddp_cifar.errors import UserError
from ddp_cifar.training.loss import TrainingLoss, class_weights

LOGITS, LABELS = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 1])


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def needs_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)


def test_balanced_weights_are_inverse_to_the_number_of_images() -> None:
    weights = class_weights("balanced", LABELS, 4)
    assert weights is not None
    assert weights[:3].tolist() == pytest.approx([5 / 4, 5 / 12, 5 / 4])
    assert class_weights(None, LABELS, 4) is None
    with pytest.raises(UserError, match=r"train\.class_weights has 2 numbers, but the data set has 3 classes"):
        class_weights([1, 2], LABELS, 3)


def test_each_loss_is_multiplied_by_the_weight_of_its_class() -> None:
    weights = torch.tensor([1.0, 0.5, 3.0])
    found = TrainingLoss(TrainConfig(), weights)(LOGITS, LABELS)
    assert torch.allclose(found, F.cross_entropy(LOGITS, LABELS, weight=weights, reduction="none"))
    soft = torch.tensor([[0.2, 0.0, 0.8]])
    found = TrainingLoss(TrainConfig(), weights)(LOGITS[:1], soft)
    assert torch.allclose(found, F.cross_entropy(LOGITS[:1], soft, reduction="none") * (0.2 * 1 + 0.8 * 3))


def test_a_user_defined_loss_is_trained_and_evaluated(alone: World) -> None:
    config = config_of(
        "model.name=tiny",
        "train.global_batch_size=8",
        "train.epochs=1",
        "train.loss=helpers:focal_loss",
        "precision=fp32",
    )
    dataset = random_dataset(16)
    trainer = make_trainer(alone, config, dataset)
    assert trainer.train_step.loss.function is focal_loss
    trainer.fit()
    loader = trainer.evaluator.held_out["test"]
    images, labels, _ = loader.gather(torch.arange(8))
    with torch.no_grad():
        expected = focal_loss(trainer.model.eval()(images), labels).mean().item()
    assert trainer.progress.results["test/loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train.loss=test_loss:mean_loss"], ["returned shape () for 2 images", "reduction='none'"]),
        (
            ["train.loss=test_loss:needs_labels", "augment.mixup=1"],
            ["train.loss=test_loss:needs_labels fails", "mixup"],
        ),
        (
            ["train.loss=helpers:focal_loss", "train.label_smoothing=0.1"],
            ["train.label_smoothing=0.1", "cross_entropy"],
        ),
        (["train.loss=focal"], ["train.loss=focal is unknown", "cross_entropy"]),
        (["train.class_weights=[1,2]"], ["has 2 numbers, but the data set has 10 classes"]),
        (
            ["train.class_weights=[1,-2]"],
            ["train.class_weights=[1, -2] is out of range: expected balanced, one number"],
        ),
    ],
)
def test_a_loss_that_cannot_be_used_is_rejected_before_training(
    arguments: Sequence[str], parts: Sequence[str], alone: World
) -> None:
    with pytest.raises(UserError) as caught:
        make_trainer(alone, config_of("model.name=tiny", *arguments), random_dataset(16))
    assert all(part in str(caught.value) for part in parts), caught.value
