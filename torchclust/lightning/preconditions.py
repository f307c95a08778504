"""What must hold before a fit with `WeightClustering` starts: said before training, not after it.

Everything here looks and raises or warns; nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torchclust.activations.quantized import quantized_modules
from torchclust.lightning.monitor import writers
from torchclust.lightning.options import Options, leaving_out, of_rules
from torchclust.lightning.structure import check_contradictions
from torchclust.lightning.trees import is_overridden, of_all, rank_zero_warn
from torchclust.model.clustering import is_clustered, named_clusterings
from torchclust.model.rules import Rules
from torchclust.model.slots import planned

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer


_ALONE_OR_DDP = of_all("strategies.SingleDeviceStrategy") + of_all("strategies.DDPStrategy")
_SPAWNING = of_all("strategies.launchers._MultiProcessingLauncher")
_COPIERS = {"WeightAveraging", "StochasticWeightAveraging"}  # of the module, in their own setup


class Asked(Protocol):
    """What was asked of the callback, by its own names."""

    rules: Rules
    freeze: tuple[str, ...]
    options: Options
    start_epoch: int
    strip: bool
    quantize_activations: bool
    log_histograms: bool


def check_arguments(
    lr_scale: float, start_epoch: int, *, strip: bool, save_stripped: str | None
) -> None:
    """Refuse arguments out of range."""
    if not 0 < lr_scale < float("inf"):
        raise ValueError(f"lr_scale must be positive, got {lr_scale!r}")
    if isinstance(start_epoch, bool) or not isinstance(start_epoch, int):
        raise TypeError(f"start_epoch must be an int, got {start_epoch!r}")
    if start_epoch < 0:
        raise ValueError(f"start_epoch must be at least 0, got {start_epoch}")
    if save_stripped is not None and not strip:
        raise ValueError(f"save_stripped={save_stripped!r} needs strip=True, got strip=False")


def check_trainer(trainer: Trainer, pl_module: LightningModule, callback: Asked) -> None:
    """Refuse a Trainer under which clustering would fail, or be lost, only after epochs."""
    strategy, last = trainer.strategy, trainer.max_epochs
    if not isinstance(strategy, _ALONE_OR_DDP):
        raise ValueError(
            f"WeightClustering works on one device and with strategy='ddp', got "
            f"{type(strategy).__name__}, which shards or splits the parameters it clusters"
        )
    if isinstance(strategy.launcher, _SPAWNING) and _ends_otherwise(pl_module, callback):
        raise ValueError(
            "a strategy that spawns or forks its processes (ddp_spawn, ddp_notebook) brings back "
            "only tensors that the module had before, so a module that is clustered or quantized "
            "only afterwards, or only before, would come back untrained: use strategy='ddp', or "
            "strip=True with a plain module, strip=False with a clustered one, and no "
            "quantize_activations"
        )
    _check_callbacks(trainer.callbacks, callback)  # type: ignore[attr-defined]
    if callback.log_histograms and not writers(trainer.loggers):
        rank_zero_warn("log_histograms=True needs a TensorBoardLogger: no logger here takes them")
    if last is not None and 0 <= last <= callback.start_epoch:
        rank_zero_warn(
            f"WeightClustering never clusters: start_epoch={callback.start_epoch}, but the "
            f"trainer stops after max_epochs={last}"
        )


def warn_if_never_clustered(trainer: Trainer, pl_module: LightningModule, start_epoch: int) -> None:
    """Say so where steps, a time limit or another callback ended the run before `start_epoch`."""
    by_epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= start_epoch
    if start_epoch and not by_epochs and not is_clustered(pl_module):
        rank_zero_warn(
            f"WeightClustering never clustered: start_epoch={start_epoch}, but the run ended in "
            f"epoch {trainer.current_epoch}"
        )


def _ends_otherwise(pl_module: LightningModule, callback: Asked) -> bool:
    """Whether the module has other tensors after the fit than before it."""
    quantizes = callback.quantize_activations and not any(quantized_modules(pl_module))
    return quantizes or is_clustered(pl_module) == callback.strip


def _check_callbacks(callbacks: Sequence[Callback], callback: Asked) -> None:
    for other in callbacks:
        classes = {cls.__name__ for cls in type(other).__mro__}
        late = callback.start_epoch > 0 or callbacks.index(other) < callbacks.index(callback)
        if _COPIERS & classes and late:
            raise ValueError(
                f"{(_COPIERS & classes).pop()} averages a copy of the module that it makes when "
                f"fitting starts, so that must be clustered by then: list WeightClustering before "
                f"it, with start_epoch=0 (got {callback.start_epoch})"
            )
        if "ModelPruning" in classes:
            raise ValueError(
                "ModelPruning and WeightClustering both take the place of the weights: prune in a "
                "fit of its own, then cluster with WeightClustering(..., preserve_sparsity=True)"
            )


def check_hyperparameters(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse a network among the hyperparameters: checkpoints would have to pickle its lookups."""
    parts = {id(module) for module in pl_module.modules()}
    for name, value in pl_module.hparams.items():
        if isinstance(value, nn.Module) and id(value) in parts and trainer.checkpoint_callbacks:
            raise ValueError(
                f"save_hyperparameters() holds the network {name!r}, and a checkpoint cannot "
                f"pickle a clustered one. Leave it out:  self.save_hyperparameters(ignore="
                f"[{name!r}])"
            )


def check_rules(callback: Asked, pl_module: LightningModule) -> None:
    """Refuse rules that cannot apply, cluster nothing, or contradict what is clustered."""
    rules = leaving_out(callback.rules, callback.freeze)
    if is_clustered(pl_module):
        check_contradictions(pl_module, rules, callback.options)
        return
    if not planned(pl_module, rules, **of_rules(callback.options)):
        raise ValueError(
            f"WeightClustering({callback.rules!r}, freeze={list(callback.freeze)!r}) finds nothing "
            f"to cluster; print(torchclust.summary(module)) says why, tensor by tensor"
        )


def check_decay(optimizers: Iterable[Optimizer], pl_module: LightningModule) -> None:
    """Warn where clustering has moved weights into a group without weight decay."""
    decay = {
        id(parameter): group.get("weight_decay", 0.0)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    codebooks = {name: id(c.centroids) for name, c in named_clusterings(pl_module)}
    of_codebooks = {decay[key] for key in codebooks.values() if key in decay}
    if of_codebooks == {0.0} and any(decay.values()):
        rank_zero_warn(
            f"weight_decay is 0 for {next(iter(codebooks))!r} and every other clustered tensor, "
            f"and not for others. If groups go by a name's ending or by dimensions: a clustered "
            f"weight is called '....parametrizations.weight.original' and has one dimension. Group "
            f"by module, e.g. biases and norms without decay and all else with it"
        )


def builds_late(pl_module: LightningModule) -> bool:
    """Whether layers or weights may come after the callbacks' ``setup``."""
    own_hooks = any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model"))
    return own_hooks or any(map(is_lazy, pl_module.parameters()))
