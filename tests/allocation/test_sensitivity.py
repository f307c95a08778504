"""What a choice of clusters spoils, where outputs are masked or not numbers."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from torchclust import ClusterConfig, fisher_information
from torchclust.allocation.encoded_size import entropy_bytes
from torchclust.allocation.sensitivity import class_divergence, sensitivity_curves
from torchclust.data_aware.divergence import divergence
from torchclust.distillation.tasks import output_distance, relative_distance


class Masked(nn.Module):
    """Five classes of which one cannot come up."""

    def __init__(self, value: float = -torch.inf) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.value = nn.Linear(8, 32), nn.Linear(32, 5), value

    def forward(self, x: Tensor) -> Tensor:
        off = torch.tensor([False, False, True, False, False])
        return self.b(self.a(x).relu()).masked_fill(off, self.value)


def curves(model: nn.Module, distance: Any) -> dict[str, list[float]]:
    configs = {name: [ClusterConfig(k) for k in (2, 8, 32)] for name in ("a.weight", "b.weight")}
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    found = sensitivity_curves(model, configs, x, entropy_bytes, distance=distance)
    return {name: [choice.loss for choice in choices] for name, choices in found.items()}


@pytest.mark.parametrize("distance", [class_divergence, relative_distance, output_distance])
def test_fewer_clusters_spoil_more_of_masked_outputs_too(distance: Any) -> None:
    for losses in curves(Masked(), distance).values():
        assert losses[0] > 3 * losses[1] > 9 * losses[2] > 0


def test_a_masked_class_counts_as_one_that_is_not_there() -> None:
    masked = curves(Masked(), class_divergence)
    never = curves(Masked(-1e4), class_divergence)
    for name, losses in masked.items():
        assert losses == pytest.approx(never[name], rel=1e-4)


def test_classes_beside_a_masked_one_are_learned_from() -> None:
    """The divergence is that of the other classes, and its gradient is finite."""
    kept, mask = [0, 1, 3, 4], torch.tensor([False, False, True, False, False])
    wanted = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    masked = [outputs.masked_fill(mask, -torch.inf) for outputs in (logits, wanted)]
    found = divergence(*masked)
    expected = nn.functional.kl_div(
        logits[:, kept].log_softmax(1),
        wanted[:, kept].log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    assert torch.allclose(found, expected)
    gradients = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    assert torch.allclose(*gradients, atol=1e-7)
    masked = [outputs.detach().masked_fill(mask, -torch.inf) for outputs in (logits, wanted)]
    more = output_distance(*masked) - relative_distance(*masked)
    assert more.item() == pytest.approx(expected.item(), rel=1e-4)


def test_outputs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not numbers, with 'a\.weight' clustered or before"):
        curves(Masked(torch.nan), class_divergence)


def test_fisher_information_of_a_model_of_several_inputs() -> None:
    """A DataLoader's batches have lists where its items have tuples."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.layer(x + z)

    torch.manual_seed(0)
    model, data = Two(), TensorDataset(torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) % 3)
    pairs = [((x, z), y) for x, z, y in data]
    loss = nn.functional.cross_entropy
    found = fisher_information(model, DataLoader(pairs, 4), loss)
    x, z, y = data.tensors
    expected = fisher_information(model, [((x[:4], z[:4]), y[:4]), ((x[4:], z[4:]), y[4:])], loss)
    assert torch.equal(found["layer.weight"], expected["layer.weight"])


@pytest.mark.parametrize("computed", [prune.l1_unstructured, nn.utils.weight_norm])
def test_fisher_information_of_what_a_hook_computes(computed: Any) -> None:
    """The hook makes another tensor in every forward pass; that one is differentiated."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    options = {"amount": 0.5} if computed is prune.l1_unstructured else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        computed(layers[0], "weight", **options)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    layers(torch.randn(1, 6))
    for name in ("weight", "bias"):
        for index in (0, 2):
            getattr(plain[index], name).data.copy_(getattr(layers[index], name))
    batches = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(3)]
    loss = nn.functional.cross_entropy
    found, expected = (fisher_information(m, batches, loss) for m in (layers, plain))
    assert found["0.weight"].any()
    torch.testing.assert_close(found["0.weight"], expected["0.weight"])


def test_fisher_information_in_inference_mode_and_of_a_recurrent_layer() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(6, 4, num_layers=2, dropout=0.5).eval()
    batches = [(torch.randn(5, 2, 6), torch.randn(5, 2, 4))]

    def loss(output: Any, target: Tensor) -> Tensor:
        assert layer.training  # in eval mode cuDNN would not differentiate it
        return (output[0] - target).square().mean()

    first = fisher_information(layer, batches, loss)
    with torch.inference_mode():
        second = fisher_information(layer, batches, loss)
    assert first["weight_ih_l0"].any()
    assert all(torch.equal(first[name], second[name]) for name in first)  # no dropout
    assert not layer.training
    assert layer.dropout == 0.5


def test_a_loss_that_depends_on_no_weight_is_refused() -> None:
    batches = [(torch.randn(5, 6), torch.zeros(5, dtype=torch.long))]
    with pytest.raises(ValueError, match="the loss does not depend on any weight"):
        fisher_information(nn.Linear(6, 3), batches, lambda y, t: y.detach().sum())
