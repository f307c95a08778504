"""The packed model of a run: to the bit, or with biases and norms at the precision that it needs.

What it needs is judged by the outputs, without labels: an int8 file of the same network errs by
some 1e-4 of what its outputs vary by (40 dB), and rounding that changes them by less than that is
lost in it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from torchclust.activations.quantized import remove_quantized_activations_
from torchclust.data_aware.batches import tensors_in
from torchclust.distillation.tasks import relative_distance
from torchclust.packing.mantissas import round_mantissas_
from torchclust.packing.pack import save_packed
from torchclust.packing.size import PackedSize
from torchclust.recipes.kept import Result, Stages, origin
from torchclust.recipes.prepare import Prepared
from torchclust.recipes.section import RecipeError
from torchclust.recipes.stages import Networks

PACKED_FILE = "model.packed"
LOST = 1e-4  # of what the outputs vary by
_SAMPLES = 200
_CANDIDATES = range(2, 24)  # bits; float32 itself has 24


def write_packed(prepared: Prepared, networks: Networks, output: Path, stages: Stages) -> Result:
    """Write `PACKED_FILE`: its bytes, and where the recipe rounds, the bits and the metric of it.

    Nothing is written, and the result is empty, where the recipe neither prunes nor clusters.
    """
    compressed, section = networks.compressed, prepared.recipe.pack
    if compressed is None:
        return {}
    if section is None:
        return _sizes(save_packed(compressed, output / PACKED_FILE))

    def compute() -> Result:
        task, recipe = prepared.task, prepared.recipe
        bits, module = section.mantissa_bits, copy.deepcopy(networks.modules["compressed"])
        network = remove_quantized_activations_(task.network(module))  # as in the file
        if bits is None:
            inputs = task.inputs(networks.modules["trained"], _SAMPLES, recipe.seed)
            bits = mantissa_bits_for(network, inputs)
        found = _sizes(save_packed(round_mantissas_(network, bits), output / PACKED_FILE))
        score = task.score(module)
        return {**found, "files": [PACKED_FILE], "mantissa_bits": bits, "accuracy": score}

    depends = [origin(prepared), networks.digest, prepared.recipe.sections("pack")]
    return stages.result("pack", depends, compute, folder=output)


@torch.no_grad()
def mantissa_bits_for(network: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Return the fewest bits for which rounding is lost in what an int8 file errs by; 24 at most.

    Args:
        network: in eval mode, float.
        inputs: one tensor for each of its arguments, samples along the first dimension.

    Raises:
        RecipeError: no output has fractions.
    """
    wanted = network(*inputs)
    if not tensors_in(wanted):
        raise RecipeError(
            "pack: the network gives whole numbers, which do not tell what rounding does to it: "
            "say how many bits to keep, pack: {mantissa_bits: 8}"
        )
    for bits in _CANDIDATES:
        rounded = round_mantissas_(copy.deepcopy(network), bits)
        if float(relative_distance(rounded(*inputs), wanted)) <= LOST:
            return bits
    return _CANDIDATES.stop


def _sizes(size: PackedSize) -> Result:
    return {"bytes": size.bytes, "entropy_bound": size.entropy_bound}
