"""A module changes inside a run: clustered on every rank alike, its optimizers built anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchclust.lightning.distributed import on_every_rank, on_rank_zero
from torchclust.lightning.optimizers import carry_over, rates_of, scale_rates
from torchclust.lightning.options import BESIDE_RULES, Options
from torchclust.lightning.structure import remaining
from torchclust.lightning.trees import of_all, rank_zero_info
from torchclust.model.cluster import cluster_
from torchclust.model.clustering import is_clustered, named_clusterings
from torchclust.model.restore import restore_structure_
from torchclust.model.rules import Rules

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.callbacks import LearningRateFinder

_DDP = of_all("strategies.DDPStrategy")
_FINDERS = of_all("callbacks.LearningRateFinder")


def cluster_on_every_rank(
    trainer: Trainer,
    module: nn.Module,
    rules: Rules,
    options: Options,
    then: Callable[[], None],
) -> None:
    """Cluster what is not clustered yet, on rank 0; then everywhere the same.

    Args:
        trainer: whose processes these are.
        module: plain, or clustered in part.
        rules: of what is to be clustered.
        options: of `torchclust.cluster_`.
        then: what follows on every rank.
    """

    def fit() -> dict[str, Tensor]:
        if not is_clustered(module):
            cluster_(module, rules, **options)
        elif left := remaining(module, rules, options):
            beside: Any = {k: v for k, v in options.items() if k in BESIDE_RULES}
            cluster_(module, left, **beside)
        if trainer.world_size == 1:
            return {}
        state = module.state_dict()
        return {k: v.cpu() for k, v in state.items() if "parametrizations." in k}

    def follow() -> None:
        if not trainer.is_global_zero:
            restore_structure_(module, state)
        then()

    state = on_rank_zero(fit, trainer.is_global_zero, trainer.strategy.broadcast)
    on_every_rank(follow, trainer.world_size)


def in_mid_training(
    trainer: Trainer, pl_module: LightningModule, cluster: Callable[[], None]
) -> None:
    """Cluster, and rebuild what holds on to the parameters as they were."""
    known = list(pl_module.parameters())  # held, so that no new one takes an old one's id
    before = {name for name, _ in named_clusterings(pl_module)}
    cluster()
    optimizers, schedulers = trainer.optimizers, trainer.lr_scheduler_configs
    if isinstance(trainer.strategy, _DDP):
        trainer.strategy.model = pl_module
        trainer.strategy.configure_ddp()
    trainer.strategy.setup_optimizers(trainer)
    new = {id(c.centroids) for name, c in named_clusterings(pl_module) if name not in before}
    fresh = new | {id(p) for p in pl_module.parameters()} - {id(p) for p in known}
    carry_over(optimizers, trainer.optimizers, fresh)
    for was, now in zip(schedulers, trainer.lr_scheduler_configs, strict=True):
        now.scheduler.load_state_dict(was.scheduler.state_dict())


class Rates:
    """Learning rates as they are while clustered: lowered once, and whole again afterwards."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._lowered = False
        self._finder: LearningRateFinder | None = None

    def watch_finder(self, trainer: Trainer) -> None:
        """Remember who looks for a rate while the module is clustered: it is found for that."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, _FINDERS):
                self._finder = callback

    def lower(self, trainer: Trainer) -> None:
        """Multiply by the factor, unless the rate was found on the clustered module."""
        found = self._finder and self._finder.optimal_lr and self._finder.optimal_lr.suggestion()
        self._lowered = not (found and rates_of(trainer.optimizers) == {found})
        if self._lowered:
            self._scale(trainer, self.factor)
        else:
            rank_zero_info(f"The rate {found} was found while clustered: lr_scale is not applied")

    def restore(self, trainer: Trainer) -> None:
        """Undo it, for a checkpoint of the stripped module."""
        if self._lowered:
            self._scale(trainer, 1 / self.factor)
        self._lowered = False

    @staticmethod
    def _scale(trainer: Trainer, factor: float) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scale_rates(trainer.optimizers, schedulers, factor)
