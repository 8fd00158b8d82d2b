"""How before_layout.pt was made: a checkpoint of a run that was stopped in the middle of its second epoch of three.

Commit da3b2c2, before the modules were put into packages, wrote it on a CPU:

    PYTHONPATH=tests/checkpoints python -m ddp_cifar.train run_dir=/tmp/run ARGUMENTS train.max_steps=6

It has all that a checkpoint can have: averaged weights (`ema`), the loss scale of fp16 (`scaler`), Adam's moments with a step
count that was clamped, a best validation accuracy, and sums over the images before and after the last row of metrics.jsonl.
"""

from torch import nn

ARGUMENTS = """
    device=cpu precision=fp16 model.name=before_layout:small_network
    data.name=shapes data.shapes.train_images=80 data.shapes.test_images=20 data.val_images=16
    train.global_batch_size=16 train.micro_batch_size=8 train.epochs=3 train.ema_decay=0.9 train.log_every=5 train.threads=1
    optim.step_clamp.after_epoch=1 optim.step_clamp.limit=5 optim.step_clamp.reset_to=3
""".split()


def small_network(num_classes: int, image_size: int) -> nn.Module:
    """A network with BatchNorm and dropout, small enough for its checkpoint to be kept here."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout2d(0.05),
        nn.AvgPool2d(image_size // 4),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * 4 * 4, num_classes),
    )
