"""Evaluation counts each image once, on any number of ranks."""

import pytest
import torch
from helpers import (
    config_of,
    evaluate,
    make_trainer,
    random_dataset,
    random_split,
)
from ranks import RankPool
from torch import nn

from ddp_cifar.data.dataset import DataSet
from ddp_cifar.distributed.world import World
from ddp_cifar.training.evaluation import forward_pass


def test_each_pass_of_a_compiled_model_starts_a_step_of_its_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []
    monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: starts.append(1))
    device, images = torch.device("cpu"), torch.zeros(2, 3)
    for compiled, expected in ((False, 0), (True, 2)):
        forward = forward_pass(nn.Linear(3, 2), "fp32", device, compiled=compiled)
        forward(images), forward(images)
        assert len(starts) == expected


def evaluate_1003(world: World) -> tuple[float, float, int]:
    config = config_of(
        "precision=fp32", "train.global_batch_size=12", "train.micro_batch_size=1", "eval.batch_size=100"
    )
    dataset = DataSet(random_split(24), random_split(1003, seed=2), tuple("abcdefghij"))
    trainer = make_trainer(world, config, dataset)
    totals = evaluate(trainer)
    return totals.mean_loss, totals.correct, totals.images


def test_evaluation_counts_every_image_once_on_any_number_of_ranks(ranks: RankPool) -> None:
    results = [result for n in (1, 2, 3, 4) for result in ranks.run(evaluate_1003, n)]
    loss, correct, _ = results[0]
    assert 0 < correct < 1003
    for result in results:
        assert result == (pytest.approx(loss, abs=1e-6), correct, 1003)


def test_more_ranks_than_images_can_evaluate(ranks: RankPool) -> None:
    assert set(ranks.run(evaluate_two_images, 4)) == {2}


def evaluate_two_images(world: World) -> int:
    config = config_of("train.global_batch_size=12", "train.micro_batch_size=null")
    trainer = make_trainer(world, config, random_dataset(24, test=2))
    return evaluate(trainer).images


def test_full_training_accuracy_is_over_augmented_images_in_eval_mode(alone: World) -> None:
    config = config_of(
        "train.global_batch_size=8", "train.micro_batch_size=8", "train.epochs=1", "eval.train_accuracy=full"
    )
    trainer = make_trainer(alone, config, random_dataset(24))
    trainer.fit()
    augmentations = trainer.train_loader.augmentations(0, purpose="augment for the training accuracy")
    totals = trainer.evaluator.evaluate(trainer.train_loader, augmentations=augmentations)
    assert totals.images == 24
    plain = trainer.evaluator.evaluate(trainer.train_loader)
    assert totals.loss != plain.loss, "the images were not augmented"
