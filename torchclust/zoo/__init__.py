"""The networks and data sets that recipes name, and their parts for one's own scripts."""

from torchclust.zoo.data import DATASETS, fashion_mnist, image_folder, mnist5k, speech_synthetic
from torchclust.zoo.dataset import Data, DataError, ImageArrays, loader, samples
from torchclust.zoo.mlperf_tiny import mlperf_ad, mlperf_ic, mlperf_kws, mlperf_sww, mlperf_vww
from torchclust.zoo.networks import (
    MODELS,
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
    "DATASETS",
    "MODELS",
    "Data",
    "DataError",
    "ImageArrays",
    "arm_mlp",
    "ds_cnn_l",
    "fashion_mnist",
    "image_folder",
    "lenet_5",
    "lenet_300_100",
    "loader",
    "mlperf_ad",
    "mlperf_ic",
    "mlperf_kws",
    "mlperf_sww",
    "mlperf_vww",
    "mnist5k",
    "mnist_convnet",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet8",
    "samples",
    "seed_cnn",
    "speech_synthetic",
]
