"""Cluster MLPerf Tiny's image classifier with TFMOT, beside recipes/mlperf_tiny/ic.yaml.

    python3.11 -m venv /tmp/tfmot
    /tmp/tfmot/bin/pip install -r benchmarks/peers/tfmot-requirements.txt
    /tmp/tfmot/bin/python benchmarks/peers/tfmot_mlperf_tiny.py --data cifar-10-batches-bin \
      --checkpoint resnet8_bn.safetensors --torchclust .venv/bin/torchclust --output tfmot_ic \
      >> benchmarks/results/tfmot_mlperf_tiny.jsonl

The recipe's network, weights, data, epochs, batch, optimizer and schedule; the recipe's bfloat16 is
float32 here. Each run prints a line of JSON when it is done and leaves its int8 file in `--output`.
CQAT continues from the k-means++ clusters, as in TFMOT's guide: it trains `--cqat-epochs` more.
Vela runs in torchclust's own environment, by its command, so that its options are the recipe's.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
from numpy.typing import NDArray
from safetensors.numpy import load_file

keras = tf.keras  # which is what TFMOT 0.8 tests layers against, at this version of TensorFlow
K = 16
BATCH, LR = 100, 1e-3  # the recipe's: lr_scale 1.0 of the default rate
CALIBRATION = 500
WIDTHS = (16, 32, 64)
RUNS = ("control", "linear", "kmeans++", "cqat")


class Part(NamedTuple):
    """Images (N, 32, 32, 3) of 0 to 255, and labels."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def cifar10(files: list[Path]) -> Part:
    """Read CIFAR-10's binary batches: records of a label and 3,072 bytes, red first."""
    records = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, 3073) for file in files])
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Part(np.ascontiguousarray(images), records[:, 0].astype(np.int64))


def network() -> Any:
    """Build `torchclust.zoo.mlperf_ic`, whose names the layers carry; it takes 0 to 255."""

    def conv(x: Any, name: str, width: int, size: int, stride: int = 1) -> Any:
        layer = keras.layers.Conv2D(width, size, stride, padding="same", name=f"{name}.conv")
        return layer(x)

    def norm(x: Any, name: str) -> Any:
        return keras.layers.BatchNormalization(epsilon=1e-3, momentum=0.99, name=f"{name}.bn")(x)

    pixels = keras.Input((32, 32, 3))
    x = keras.layers.ReLU()(norm(conv(pixels, "stem", WIDTHS[0], 3), "stem"))
    for block, width in enumerate(WIDTHS):
        stride = 2 if block else 1
        first, second = f"conv1.{block}", f"conv2.{block}"
        y = keras.layers.ReLU()(norm(conv(x, first, width, 3, stride), first))
        y = norm(conv(y, second, width, 3), second)
        if block:
            x = conv(x, f"short.{block - 1}", width, 1, stride)
        x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    x = keras.layers.Flatten()(keras.layers.AveragePooling2D(8)(x))
    return keras.Model(pixels, keras.layers.Dense(10, name="fc")(x))


def trained(checkpoint: Path) -> Any:
    """Return the network with a PyTorch checkpoint's weights, their axes as Keras has them."""
    state, model = load_file(checkpoint), network()
    for layer in model.layers:
        kinds = ("weight", "bias", "running_mean", "running_var")
        found = [state[key] for kind in kinds if (key := f"{layer.name}.{kind}") in state]
        if found:
            axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[found[0].ndim]
            found[0] = found[0].transpose(axes)
            layer.set_weights(found)
    return model


def compiled(model: Any, steps: int) -> Any:
    """Give the model the recipe's loss and optimizer: Adam, its rate a cosine down to 0."""
    rate = keras.optimizers.schedules.CosineDecay(LR, max(steps, 1))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate, epsilon=1e-8), loss, metrics=["accuracy"])
    return model


def fit(model: Any, part: Part, epochs: int, seed: int) -> Any:
    """Train in place, in an order that `seed` fixes."""
    compiled(model, epochs * len(part.labels) // BATCH)
    batches = tf.data.Dataset.from_tensor_slices(tuple(part))
    batches = batches.shuffle(len(part.labels), seed).batch(BATCH).map(_as_float)
    told = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: print(f"  epoch {epoch + 1}: {logs}", file=sys.stderr)
    )
    model.fit(batches, epochs=epochs, verbose=0, callbacks=[told])
    return model


def _as_float(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.cast(images, tf.float32), labels


def clustered(model: Any, init: str) -> Any:
    """Wrap every layer that has weights to cluster."""
    inits = tfmot.clustering.keras.CentroidInitialization
    chosen = {"linear": inits.LINEAR, "kmeans++": inits.KMEANS_PLUS_PLUS}[init]
    return tfmot.clustering.keras.cluster_weights(
        model, number_of_clusters=K, cluster_centroids_init=chosen
    )


def cluster_preserving(model: Any) -> Any:
    """Wrap a clustered and stripped model for quantization-aware training that keeps clusters."""
    annotated = tfmot.quantization.keras.quantize_annotate_model(model)
    scheme = tfmot.experimental.combine.Default8BitClusterPreserveQuantizeScheme()
    return tfmot.quantization.keras.quantize_apply(annotated, scheme)


def int8_file(model: Any, images: NDArray[np.uint8]) -> bytes:
    """Convert to a .tflite file of int8 alone, input and output too; `images` set the ranges."""

    def representative() -> Iterator[list[NDArray[np.float32]]]:
        yield from ([image[None].astype(np.float32)] for image in images)

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    return bytes(converter.convert())


def float_accuracy(model: Any, part: Part) -> float:
    """Return the percentage of images that the Keras model gets right."""
    logits = model.predict(part.images.astype(np.float32), batch_size=500, verbose=0)
    return round(100 * float((logits.argmax(1) == part.labels).mean()), 3)


def int8_accuracy(file: Path, part: Part) -> float:
    """Return the percentage of images that the int8 file gets right."""
    reference = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = tf.lite.Interpreter(str(file), experimental_op_resolver_type=reference)
    (pixels,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()
    scale, zero = pixels["quantization"]
    right = 0
    for start in range(0, len(part.labels), 100):
        images = part.images[start : start + 100].astype(np.float32)
        interpreter.resize_tensor_input(pixels["index"], images.shape)
        interpreter.allocate_tensors()
        codes = np.clip(np.round(images / scale) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(pixels["index"], codes)
        interpreter.invoke()
        found = interpreter.get_tensor(logits["index"]).argmax(1)
        right += int((found == part.labels[start : start + 100]).sum())
    return round(100 * right / len(part.labels), 3)


def zipped_size(file: Path) -> int:
    """Return the bytes of a zip archive that holds this file alone, deflated."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, file.name)
    return len(buffer.getvalue())


def measured(file: Path, torchclust: Path) -> dict[str, Any]:
    """Return the file's sizes, Vela's figures for an ethos-u55-128, and its int8 weights' codes."""

    def answer(*arguments: str | Path) -> dict[str, Any]:
        command = [str(torchclust), *map(str, arguments), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        answered: dict[str, Any] = json.loads(done.stdout)
        return answered

    vela = answer("vela", file, "--output", file.parent / "vela")
    figures = ("encoded_weight_bytes", "original_weight_bytes", "flash_bytes", "cpu_ops")
    return {
        "bytes": {"int8_tflite": file.stat().st_size, "int8_tflite_zip": zipped_size(file)},
        "vela": {key: vela[key] for key in ("accelerator", "vela_version", *figures)},
        "tensors": [
            {key: row[key] for key in ("name", "shape", "codes", "scales", "entropy_bits")}
            for row in answer("report", file)["tensors"]
        ],
    }


def made(run: str, start: Any, train: Part, options: argparse.Namespace) -> Any:
    """Return a run's model, fine-tuned and stripped of all that training alone needs."""
    if run == "control":
        return fit(start, train, options.epochs, options.seed)
    if run == "cqat":
        model = fit(cluster_preserving(start), train, options.cqat_epochs, options.seed)
        return tfmot.experimental.combine.strip_clustering_cqat(model)
    model = fit(clustered(start, run), train, options.epochs, options.seed)
    return tfmot.clustering.keras.strip_clustering(model)


def result(run: str, train: Part, test: Part, options: argparse.Namespace) -> dict[str, Any]:
    """Train, convert and measure one run."""

    def weights(run: str) -> Path:
        return options.output / f"{run}.weights.h5"

    keras.backend.clear_session()
    keras.utils.set_random_seed(options.seed)
    start = trained(options.checkpoint)
    if run == "cqat":
        start.load_weights(weights("kmeans++"))
    accuracy = {"start": float_accuracy(start, test)}
    print(f"{run}: starts at {accuracy['start']} %", file=sys.stderr)
    begin = time.perf_counter()
    model = made(run, start, train, options)
    seconds = {"train": round(time.perf_counter() - begin, 1)}
    model.save_weights(weights(run))
    accuracy["float"] = float_accuracy(model, test)
    chosen = np.random.default_rng(options.seed).permutation(len(train.labels))[:CALIBRATION]
    file = options.output / f"{run}.tflite"
    file.write_bytes(int8_file(model, train.images[chosen]))
    accuracy["int8"] = int8_accuracy(file, test)
    return {
        "run": run,
        "seed": options.seed,
        "n_clusters": None if run == "control" else K,
        "epochs": options.epochs + (options.cqat_epochs if run == "cqat" else 0),
        "lr": LR,
        "batch_size": BATCH,
        "images": {"train": len(train.labels), "test": len(test.labels)},
        "accuracy": accuracy,
        **measured(file, options.torchclust),
        "seconds": seconds,
        "versions": {
            "python": sys.version.split()[0],
            "tensorflow": tf.__version__,
            "tensorflow-model-optimization": tfmot.__version__,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's binary batches")
    parser.add_argument("--checkpoint", type=Path, required=True, help="resnet8_bn.safetensors")
    parser.add_argument("--torchclust", type=Path, required=True, help="the command")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--cqat-epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, help="of each part, to try it out; default all")
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    files = [options.data / f"data_batch_{number}.bin" for number in range(1, 6)]
    train, test = cifar10(files), cifar10([options.data / "test_batch.bin"])
    train, test = (Part(*(column[: options.images] for column in part)) for part in (train, test))
    for run in options.runs:
        print(json.dumps(result(run, train, test, options)), flush=True)


if __name__ == "__main__":
    main()
