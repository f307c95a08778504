"""What `Clustering` says of a tensor, whatever training has done to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchclust import cluster_, named_clusterings, strip_


@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
@pytest.mark.parametrize("change", ["none", "merged", "swapped", "all equal"])
def test_codes_of_indices_are_the_weight(change: str, assignment: str) -> None:
    torch.manual_seed(0)
    model = cluster_(nn.Linear(32, 32), 16, codebook_dtype="int8", assignment=assignment)
    ((_, clustering),) = named_clusterings(model)
    trained = clustering.centroids.data
    if change == "merged":
        trained[1] = trained[0]
    elif change == "swapped":
        trained[:2] = trained[:2].flip(0).clone()
    elif change == "all equal":
        trained[:] = trained[0]
    codes, indices, scale = clustering.codes, clustering.indices, clustering.scale
    assert codes is not None
    assert scale is not None
    assert torch.equal(codes, codes.unique())
    assert indices.dtype == torch.uint8
    rebuilt = scale[:, None] * codes[indices.long()]
    assert torch.equal(rebuilt, model.weight)


@pytest.mark.parametrize("codebook_dtype", ["float32", "int8"])
@pytest.mark.parametrize("assignment", ["fixed", "nearest"])
def test_a_diverged_training_is_called_that(assignment: str, codebook_dtype: str) -> None:
    model = cluster_(nn.Linear(64, 64), 16, codebook_dtype=codebook_dtype, assignment=assignment)
    model.parametrizations.weight.original.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="'weight' holds NaN or infinity: the training diverged"):
        strip_(model)
    assert strip_(model, validate=False).weight.isnan().any()
