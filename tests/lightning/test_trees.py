"""`lightning` and `pytorch_lightning`: the callback belongs to both, and both give the same."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from torchclust.lightning import WeightClustering, trees

BOTH = [name for name in trees.TREES if importlib.util.find_spec(name.partition(".")[0])]
each = pytest.mark.parametrize("tree", list(map(importlib.import_module, BOTH)), ids=BOTH)

pytestmark = [
    # Lightning 2.6.6 uses a name that torch 2.13 deprecated, 2026-11.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    # Lightning's advice on loaders; worker processes would only slow these tests.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def module_of(tree: ModuleType) -> Any:
    class Net(tree.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.1), nn.Linear(32, 4))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)

    return Net()


def fitted(tree: ModuleType, **options: Any) -> nn.Module:
    tree.seed_everything(5, verbose=False)
    module, inputs = module_of(tree), torch.randn(32, 16)
    trainer = tree.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[WeightClustering(4, **options)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(inputs, 8))
    return module


def test_both_are_tested() -> None:
    """A development install has both; what follows would else compare one with itself."""
    assert [tree.__name__ for tree in trees.installed()] == BOTH == list(trees.TREES)


@each
def test_the_callback_belongs_to_every_tree(tree: ModuleType) -> None:
    assert isinstance(WeightClustering(), tree.Callback)


@each
def test_lightning_cli_of_every_tree_takes_it(tree: ModuleType, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    # Lightning 2.6.6 calls what jsonargparse 4.49 deprecates, 2026-11.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    callback = {"class_path": "torchclust.lightning.WeightClustering", "init_args": {"rules": 4}}
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    cli = importlib.import_module(f"{tree.__name__}.cli").LightningCLI(
        type(module_of(tree)),
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        args={"trainer": {**quiet, "callbacks": [callback]}},
    )
    found = [c for c in cli.trainer.callbacks if isinstance(c, WeightClustering)]
    assert [c.rules for c in found] == [4]


@pytest.mark.parametrize("options", [{}, {"assignment": "nearest", "start_epoch": 1}], ids=str)
def test_the_same_module_ends_at_the_same_bits(options: dict[str, Any]) -> None:
    one, other = (fitted(importlib.import_module(name), **options).state_dict() for name in BOTH)
    assert len(one["net.0.weight"].unique()) <= 4
    assert all(torch.equal(one[name], other[name]) for name in one)


@each
def test_the_module_says_whose_it_is(tree: ModuleType) -> None:
    assert trees.tree_of(module_of(tree)) is tree
    assert trees.tree_of(tree.LightningDataModule) is tree
    assert trees.tree_of(nn.Linear(1, 1)) is None


@each
def test_what_it_refuses_it_refuses_in_both(tree: ModuleType) -> None:
    averaging = tree.callbacks.StochasticWeightAveraging(swa_lrs=1e-2)
    trainer = tree.Trainer(max_epochs=2, accelerator="cpu", logger=False, barebones=False,
                           enable_progress_bar=False, enable_checkpointing=False,
                           callbacks=[averaging, WeightClustering(4)])  # fmt: skip
    with pytest.raises(ValueError, match="averages a copy of the module"):
        trainer.fit(module_of(tree), DataLoader(torch.randn(8, 16), 8))


def test_without_either_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    trees.installed.cache_clear()
    monkeypatch.setattr(trees, "find_spec", lambda name: None)
    try:
        with pytest.raises(ImportError, match='needs PyTorch Lightning:  pip install "torchclust'):
            trees.installed()
    finally:
        trees.installed.cache_clear()


@pytest.mark.parametrize("name", BOTH)
def test_one_alone_is_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(tree for tree in BOTH if tree != name)
    code = (
        "import sys\n"
        f"sys.modules[{other.partition('.')[0]!r}] = None\n"
        "import importlib.util as u\n"
        "found = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {other.partition('.')[0]!r} else found(n, *a)\n"
        "from torchclust.lightning import WeightClustering, trees\n"
        f"assert [t.__name__ for t in trees.installed()] == [{name!r}]\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_of_that_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("some_folder") is not None
    monkeypatch.setattr(trees, "TREES", ("pytorch_lightning", "some_folder.pytorch"))
    trees.installed.cache_clear()
    try:
        assert [tree.__name__ for tree in trees.installed()] == ["pytorch_lightning"]
    finally:
        trees.installed.cache_clear()
