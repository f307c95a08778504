"""The networks and data sets that recipes name, and their parts for one's own scripts."""

from torchclust.zoo.networks import (
    MODELS,
    Residual,
    arm_mlp,
    ds_cnn_l,
    lenet_5,
    lenet_300_100,
    mnist_convnet,
    mobilenet_v1,
    mobilenet_v2,
    resnet8,
    seed_cnn,
)

__all__ = [
    "MODELS",
    "Residual",
    "arm_mlp",
    "ds_cnn_l",
    "lenet_5",
    "lenet_300_100",
    "mnist_convnet",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet8",
    "seed_cnn",
]
