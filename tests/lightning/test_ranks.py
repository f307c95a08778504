"""What one rank of several does, the others played: the quick half of test_distributed.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchclust import cluster_, is_clustered
from torchclust.lightning.distributed import keep_indices_local_, on_every_rank, on_rank_zero
from torchclust.lightning.transition import cluster_on_every_rank

OPTIONS: Any = {"codebook_dtype": "int8"}


class Other:
    """Rank 1: what it says, and what it was told by this one, rank 0."""

    def __init__(self) -> None:
        self.says: Any = None
        self.told: list[Any] = []

    def gather(self, outcomes: list[Any], mine: Any) -> None:
        self.told.append(mine)
        outcomes[:] = [mine, self.says]


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Other:
    played = Other()
    monkeypatch.setattr(dist, "all_gather_object", played.gather)
    return played


def fail() -> None:
    raise ValueError("no such layer")


def test_each_rank_raises_its_own_error(other: Other) -> None:
    with pytest.raises(ValueError, match="no such layer"):
        on_every_rank(fail, 2)
    assert other.told == [("ValueError", "no such layer")]
    with pytest.raises(ValueError, match="no such layer"):
        on_every_rank(fail, 1)  # alone, it tells nobody
    assert len(other.told) == 1


def test_a_rank_raises_what_another_one_raised(other: Other) -> None:
    other.says = ("ValueError", "no such layer")
    done: list[int] = []
    match = "rank 1 could not cluster its module: ValueError: no such layer"
    with pytest.raises(RuntimeError, match=match):
        on_every_rank(lambda: done.append(1), 2)
    assert done == [1]


def test_rank_zero_works_and_all_have_its_result() -> None:
    sent: list[Any] = []

    def broadcast(outcome: Any) -> Any:
        sent.append(outcome)
        return outcome

    assert on_rank_zero(lambda: 3, True, broadcast) == 3
    assert on_rank_zero(fail, False, lambda outcome: 3) == 3  # not called there
    assert sent == [3]
    with pytest.raises(ValueError, match="no such layer"):
        on_rank_zero(fail, True, broadcast)  # after it was sent
    assert isinstance(sent[1], ValueError)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))


@pytest.mark.parametrize("before", [None, {"0.weight": 4}])
def test_other_ranks_take_what_rank_zero_fitted(before: Any, other: Other) -> None:
    """Also where a part was clustered by hand, on each rank otherwise."""
    models = [network(), network()]
    for model in models if before else ():
        cluster_(model, before, **OPTIONS)
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(0.5)
    sent: list[Any] = []
    followed: list[int] = []
    for rank, model in enumerate(models):
        strategy = SimpleNamespace(broadcast=lambda state: sent.append(state) or sent[0])
        trainer: Any = SimpleNamespace(world_size=2, is_global_zero=rank == 0, strategy=strategy)
        rules: Any = {"0.weight": 4, "1.weight": 8}
        cluster_on_every_rank(trainer, model, rules, OPTIONS, lambda: followed.append(1))
    assert followed == [1, 1]
    assert other.told == [None, None]
    assert sent[1] is None  # rank 1 fits nothing
    assert all("parametrizations." in name for name in sent[0])
    assert is_clustered(models[1])
    first, second = (model.state_dict() for model in models)
    assert list(first) == list(second)
    for name in sent[0]:
        if not name.endswith(".original"):  # latent values follow when DDP is built
            assert torch.equal(first[name], second[name]), name


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_indices_are_not_sent(alone: None) -> None:
    model = network()
    model.append(nn.BatchNorm1d(4))
    ddp = DistributedDataParallel(cluster_(model, {"0.weight": 4, "1.weight": 4}))
    indices = {name for name, _ in model.named_buffers() if "parametrizations." in name}
    assert indices
    assert keep_indices_local_(ddp) is ddp
    assert ddp.parameters_to_ignore == indices
    assert [tuple(b.shape) for b in ddp.modules_buffers] == [(4,), (4,), ()]
    ddp(torch.randn(3, 16)).sum().backward()
    assert keep_indices_local_(model) is model  # not wrapped
