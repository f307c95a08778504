"""Time TFMOT's clustered training step beside the plain one, in an environment of its own.

    python -m venv /tmp/tfmot
    /tmp/tfmot/bin/pip install -r benchmarks/peers/tfmot-requirements.txt
    /tmp/tfmot/bin/python benchmarks/peers/tfmot_step.py [ROUNDS]

The networks and batches of benchmarks/step.py: Adam, batches of 250, 16 clusters. Each round runs
ten plain steps and ten clustered ones; printed are medians of a step and their ratio.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras

STEPS = 10


def cnn() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Dropout(0.25),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Dropout(0.25),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dense(10),
        ]
    )


def mlp() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Flatten(),
            layers.Dense(4096, activation="relu"),
            layers.Dense(4096, activation="relu"),
            layers.Dense(10),
        ]
    )


def compiled(model: keras.Model) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss)
    return model


def clustered(model: keras.Model) -> keras.Model:
    initialization = tfmot.clustering.keras.CentroidInitialization.LINEAR
    return tfmot.clustering.keras.cluster_weights(
        model, number_of_clusters=16, cluster_centroids_init=initialization
    )


def compare(name: str, make: Callable[[], keras.Model], rounds: int) -> None:
    models = {"plain": compiled(make()), "TFMOT": compiled(clustered(make()))}
    x = np.random.default_rng(0).normal(size=(250, 28, 28, 1)).astype(np.float32)
    y = np.zeros(250, np.int64)
    times: dict[str, list[float]] = {label: [] for label in models}
    for round_ in range(rounds + 1):
        for label, one in models.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                one.train_on_batch(x, y)
            if round_:
                times[label].append((time.perf_counter() - start) / STEPS)
    base = median(times["plain"])
    for label, found in times.items():
        print(f"{name} {label:6} {1e3 * median(found):9.1f} ms {median(found) / base:.2f}x")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"tensorflow {tf.__version__}, tfmot {tfmot.__version__}")
    compare("cnn", cnn, rounds)
    compare("mlp", mlp, rounds)


if __name__ == "__main__":
    main()
