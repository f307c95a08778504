"""What a recipe's chip makes of a tensor: its bytes there, and which codebooks are worth trying."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from torchclust.allocation.encoded_size import (
    Measure,
    encoded_bytes,
    entropy_bytes,
    int8_codes,
    vela_bytes,
)
from torchclust.allocation.sensitivity import candidates
from torchclust.export.lookup_tables import MOST_BITS, OVERHEAD, encode
from torchclust.export.tflite import to_tflite
from torchclust.export.vela import vela
from torchclust.model.clustering import Clustering
from torchclust.model.slots import decisions
from torchclust.recipes.schema import Recipe
from torchclust.weight.config import ClusterConfig, CodebookDtype

_FULL = tuple(1 << bits for bits in range(1, MOST_BITS))  # what indices of 1 to 6 bits tell apart


def table_bytes(weight: Tensor, clustering: Clustering | None) -> int:
    """Return the bytes of a lookup table for tflite-micro, or of the int8 tensor if that is less.

    Its indices are of a fixed width, so that 3, 4, 8 and 16 codes are what pays off, and how often
    each is used does not matter.
    """
    codes = int8_codes(weight, clustering).to(torch.int8).cpu().numpy()
    channel = 0 if clustering is None else clustering.channel_dim
    found = encode(codes, channel, codes.shape[channel])
    return weight.numel() if found is None else min(weight.numel(), found.n_bytes + OVERHEAD)


def measure_of(recipe: Recipe) -> Measure:
    """Return what counts a recipe's bytes: the chip's decoder that it writes for, else entropy.

    Vela's encoder comes before tflite-micro's tables where a recipe writes for both.
    """
    if recipe.vela is not None:
        return vela_bytes
    return table_bytes if recipe.tflm is not None else entropy_bytes


def sizes_in_file(recipe: Recipe, network: nn.Module, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Return the bytes of a network's weight tensors, which add up to what the file really takes.

    Where the recipe compiles, the compiler says what that is, all that it adds to the tensors and
    cuts out of them included; its figure is shared out by what its encoder makes of each tensor.
    """
    names = [name for name, value, _ in decisions(network) if value.dim() > 1]
    sizes = encoded_bytes(network, measure_of(recipe), names)
    if recipe.vela is None:
        return sizes
    with tempfile.TemporaryDirectory() as folder:
        path, options = Path(folder) / "int8.tflite", recipe.vela.model_dump(exclude_none=True)
        to_tflite(network, tuple(column[:1] for column in inputs), path, calibration=[inputs])
        whole = vela(path, output_dir=folder, **options).encoded_weight_bytes
    factor = whole / max(1, sum(sizes.values()))
    return {name: round(size * factor) for name, size in sizes.items()}


def codebooks_of(recipe: Recipe) -> tuple[CodebookDtype, ...]:
    """Return the kinds of codebook among which a recipe's budget chooses.

    In a lookup table both cost the same: a float codebook fills all 4, 8 or 16 places, an int8 one
    leaves one empty and has a scale for each channel. So both are tried for each tensor, unless
    the recipe names one. Vela's bytes differ, and there the section's default stands.
    """
    section = recipe.cluster
    assert section is not None
    named = [section.model_fields_set, *(r for r in section.rules.values() if isinstance(r, dict))]
    if measure_of(recipe) is not table_bytes or any("codebook_dtype" in keys for keys in named):
        return (section.codebook_dtype,)
    return get_args(CodebookDtype)


def ways(recipe: Recipe, config: ClusterConfig, n_elements: int) -> list[ClusterConfig]:
    """Return the ways to cluster a tensor, whose number of clusters is free, that are tried."""
    if measure_of(recipe) is not table_bytes:
        return candidates(config, n_elements)
    kinds = codebooks_of(recipe)
    if len(kinds) == 1 or config.granularity != "tensor":  # which int8 codebooks do not have
        kinds = (config.codebook_dtype,)
    tried = [dataclasses.replace(config, codebook_dtype=kind) for kind in kinds]
    return [way for c in tried for way in candidates(c, n_elements) if way.n_clusters in _FULL]
