"""Cluster MLPerf Tiny's image classifier or keyword spotter with TFMOT, beside our recipes.

    python3.11 -m venv /tmp/tfmot
    /tmp/tfmot/bin/pip install -r benchmarks/peers/tfmot-requirements.txt
    /tmp/tfmot/bin/python benchmarks/peers/tfmot_mlperf_tiny.py --data cifar-10-batches-bin \
      --checkpoint resnet8_bn.safetensors --torchclust .venv/bin/torchclust --output tfmot_ic \
      >> benchmarks/results/tfmot_mlperf_tiny.jsonl
    ... --network kws --data speech_commands --checkpoint mlperf_tiny_kws_bn.safetensors --epochs 0

The recipe's network, weights, data, epochs, batch, optimizer and schedule; the recipe's bfloat16 is
float32 here. Each run prints a line of JSON when it is done and leaves its int8 file in `--output`.
With `--epochs 0` clustering sees no data, as recipes do it that have no labels.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
from numpy.typing import NDArray
from safetensors.numpy import load_file

keras = tf.keras  # which is what TFMOT 0.8 tests layers against, at this version of TensorFlow
K = 16
BATCH = 100
CALIBRATION = 500
WIDTHS = (16, 32, 64)
RUNS = ("control", "linear", "kmeans++", "cqat")


class Part(NamedTuple):
    """Inputs (N, H, W, C), and labels: images of 0 to 255, or MFCCs."""

    inputs: NDArray[Any]
    labels: NDArray[np.int64]


def cifar10(root: Path) -> tuple[Part, Part]:
    """Read CIFAR-10's binary batches: records of a label and 3,072 bytes, red first."""

    def part(*names: str) -> Part:
        records = np.concatenate([np.fromfile(root / name, np.uint8) for name in names])
        records = records.reshape(-1, 3073)
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return Part(np.ascontiguousarray(images), records[:, 0].astype(np.int64))

    return part(*(f"data_batch_{number}.bin" for number in range(1, 6))), part("test_batch.bin")


def speech_commands(root: Path) -> tuple[Part, Part]:
    """Read the clips of `mfcc.npz`: its part "a" to train with, "b" to test on."""
    arrays = np.load(root / "mfcc.npz")
    chosen = [arrays["split"] == name for name in ("a", "b")]
    train, test = (Part(arrays["mfcc"][part][..., None], arrays["label"][part]) for part in chosen)
    return train, test


def _conv(x: Any, name: str, width: int, size: int | tuple[int, int], stride: int = 1) -> Any:
    return keras.layers.Conv2D(width, size, stride, padding="same", name=f"{name}.conv")(x)


def _norm(x: Any, name: str) -> Any:
    return keras.layers.BatchNormalization(epsilon=1e-3, momentum=0.99, name=f"{name}.bn")(x)


def keyword_spotting() -> Any:
    """Build `torchclust.zoo.mlperf_kws`, whose names the layers carry."""
    mfcc = keras.Input((49, 10, 1))
    x = keras.layers.ReLU()(_norm(_conv(mfcc, "stem", 64, (10, 4), 2), "stem"))
    for number in range(4):
        deep, wide = f"dw.{number}", f"pw.{number}"
        x = keras.layers.DepthwiseConv2D(3, padding="same", name=f"{deep}.conv")(x)
        x = keras.layers.ReLU()(_norm(x, deep))
        x = keras.layers.ReLU()(_norm(_conv(x, wide, 64, 1), wide))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(mfcc, keras.layers.Dense(12, name="fc")(x))


def image_classification() -> Any:
    """Build `torchclust.zoo.mlperf_ic`, whose names the layers carry; it takes 0 to 255."""
    pixels = keras.Input((32, 32, 3))
    x = keras.layers.ReLU()(_norm(_conv(pixels, "stem", WIDTHS[0], 3), "stem"))
    for block, width in enumerate(WIDTHS):
        stride = 2 if block else 1
        first, second = f"conv1.{block}", f"conv2.{block}"
        y = keras.layers.ReLU()(_norm(_conv(x, first, width, 3, stride), first))
        y = _norm(_conv(y, second, width, 3), second)
        if block:
            x = _conv(x, f"short.{block - 1}", width, 1, stride)
        x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    x = keras.layers.Flatten()(keras.layers.AveragePooling2D(8)(x))
    return keras.Model(pixels, keras.layers.Dense(10, name="fc")(x))


class Network(NamedTuple):
    """A network of MLPerf Tiny, and where what it sees is read."""

    build: Callable[[], Any]
    parts: Callable[[Path], tuple[Part, Part]]


NETWORKS = {
    "ic": Network(image_classification, cifar10),
    "kws": Network(keyword_spotting, speech_commands),
}


def trained(model: Any, checkpoint: Path) -> Any:
    """Return the network with a PyTorch checkpoint's weights, their axes as Keras has them."""
    state = load_file(checkpoint)
    for layer in model.layers:
        kinds = ("weight", "bias", "running_mean", "running_var")
        found = [state[key] for kind in kinds if (key := f"{layer.name}.{kind}") in state]
        if found:
            axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[found[0].ndim]
            if isinstance(layer, keras.layers.DepthwiseConv2D):
                axes = (2, 3, 0, 1)
            found[0] = found[0].transpose(axes)
            layer.set_weights(found)
    return model


def compiled(model: Any, steps: int, lr: float) -> Any:
    """Give the model the recipe's loss and optimizer: Adam, its rate a cosine down to 0."""
    rate = keras.optimizers.schedules.CosineDecay(lr, max(steps, 1))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate, epsilon=1e-8), loss, metrics=["accuracy"])
    return model


def fit(model: Any, part: Part, epochs: int, lr: float, seed: int) -> Any:
    """Train in place, in an order that `seed` fixes."""
    compiled(model, epochs * len(part.labels) // BATCH, lr)
    batches = tf.data.Dataset.from_tensor_slices(tuple(part))
    batches = batches.shuffle(len(part.labels), seed).batch(BATCH).map(_as_float)
    told = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: print(f"  epoch {epoch + 1}: {logs}", file=sys.stderr)
    )
    model.fit(batches, epochs=epochs, verbose=0, callbacks=[told])
    return model


def _as_float(inputs: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.cast(inputs, tf.float32), labels


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


def int8_file(model: Any, inputs: NDArray[Any]) -> bytes:
    """Convert to a .tflite file of int8 alone, input and output too; `inputs` set the ranges."""

    def representative() -> Iterator[list[NDArray[np.float32]]]:
        yield from ([one[None].astype(np.float32)] for one in inputs)

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    return bytes(converter.convert())


def float_accuracy(model: Any, part: Part) -> float:
    """Return the percentage of inputs that the Keras model gets right."""
    logits = model.predict(part.inputs.astype(np.float32), batch_size=500, verbose=0)
    return round(100 * float((logits.argmax(1) == part.labels).mean()), 3)


def int8_accuracy(file: Path, part: Part) -> float:
    """Return the percentage of inputs that the int8 file gets right."""
    reference = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = tf.lite.Interpreter(str(file), experimental_op_resolver_type=reference)
    (entry,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()
    scale, zero = entry["quantization"]
    right = 0
    for start in range(0, len(part.labels), 100):
        inputs = part.inputs[start : start + 100].astype(np.float32)
        interpreter.resize_tensor_input(entry["index"], inputs.shape)
        interpreter.allocate_tensors()
        codes = np.clip(np.round(inputs / scale) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(entry["index"], codes)
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
        return fit(start, train, options.epochs, options.lr, options.seed)
    if run == "cqat":
        model = fit(cluster_preserving(start), train, options.cqat_epochs, options.lr, options.seed)
        return tfmot.experimental.combine.strip_clustering_cqat(model)
    model = fit(clustered(start, run), train, options.epochs, options.lr, options.seed)
    return tfmot.clustering.keras.strip_clustering(model)


def result(run: str, train: Part, test: Part, options: argparse.Namespace) -> dict[str, Any]:
    """Train, convert and measure one run."""

    def weights(run: str) -> Path:
        return options.output / f"{run}.weights.h5"

    keras.backend.clear_session()
    keras.utils.set_random_seed(options.seed)
    start = trained(NETWORKS[options.network].build(), options.checkpoint)
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
    file.write_bytes(int8_file(model, train.inputs[chosen]))
    accuracy["int8"] = int8_accuracy(file, test)
    return {
        "network": options.network,
        "run": run,
        "seed": options.seed,
        "n_clusters": None if run == "control" else K,
        "epochs": options.epochs + (options.cqat_epochs if run == "cqat" else 0),
        "lr": options.lr,
        "batch_size": BATCH,
        "inputs": {"train": len(train.labels), "test": len(test.labels)},
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
    parser.add_argument("--network", choices=NETWORKS, default="ic")
    parser.add_argument("--data", type=Path, required=True, help="its recipe's data.root")
    parser.add_argument("--checkpoint", type=Path, required=True, help="its weights")
    parser.add_argument("--torchclust", type=Path, required=True, help="the command")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--cqat-epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3, help="where the cosine begins")
    parser.add_argument("--limit", type=int, help="inputs of each part, to try it out")
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    parts = NETWORKS[options.network].parts(options.data)
    train, test = (Part(*(column[: options.limit] for column in part)) for part in parts)
    for run in options.runs:
        print(json.dumps(result(run, train, test, options)), flush=True)


if __name__ == "__main__":
    main()
