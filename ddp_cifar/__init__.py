"""Train a CIFAR-10 network, and models like it, on many GPUs and many nodes."""
