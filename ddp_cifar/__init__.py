"""Train a CIFAR-10 network, and models like it, on many GPUs and many nodes."""

import os

LAUNCHER = os.getppid()
"""The process that started this one, noted here, before torch is imported: that takes seconds, in which it may die."""
