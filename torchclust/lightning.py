"""`WeightClustering`: clusters a LightningModule while its Trainer fits it.

The callback decides *when*; everything else is in `torchclust.model`. The moments follow from how
Lightning starts a run: ``setup`` comes before the optimizers are built, so a model clustered there
hands its codebooks to ``configure_optimizers`` by itself; ``on_fit_start`` comes after they are
built but before a checkpoint overwrites their state, so learning rates are lowered once however
often a run is resumed; ``on_fit_end`` comes after the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities.types import LRSchedulerConfig
except ImportError as error:
    raise ImportError(
        "torchclust.lightning needs PyTorch Lightning:  pip install torchclust[lightning]"
    ) from error
import torch
from torch.optim import Optimizer

from torchclust.config import Rules
from torchclust.model import cluster_, is_clustered, restore_structure_, strip_
from torchclust.report import summary

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


class WeightClustering(Callback):
    """Cluster the module, fine-tune it with a lowered learning rate, strip it at the end.

    Args:
        rules: what to cluster into how many clusters, as for `torchclust.cluster_`.
        lr_scale: factor on every optimizer's learning rate while clustered: codebooks start near
            their optimum, and a tenth of the training rate is what fine-tuning usually takes.
        start_epoch: the epoch at whose start the model is clustered; before it training is plain.
            At 0 the model is clustered before the optimizers are built.
        strip: make the weights plain parameters when fitting has ended. Without it the model stays
            clustered, for example for another fit.
        log_histograms: log histograms of the clustered weights to TensorBoard, once an epoch.
        **options: `torchclust.ClusterConfig` fields, and ``seed`` and ``strict`` of `cluster_`.

    Raises:
        ValueError: ``lr_scale`` not positive or ``start_epoch`` negative, when constructed; what
            `cluster_` raises, when fitting starts.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(max_epochs=1, callbacks=[WeightClustering(16, init="optimal")])
    """

    def __init__(
        self,
        rules: Rules = 16,
        *,
        lr_scale: float = 0.1,
        start_epoch: int = 0,
        strip: bool = True,
        log_histograms: bool = False,
        **options: Any,
    ) -> None:
        if not lr_scale > 0:
            raise ValueError(f"lr_scale must be positive, got {lr_scale!r}")
        if start_epoch < 0:
            raise ValueError(f"start_epoch must be at least 0, got {start_epoch!r}")
        self.rules = rules
        self.lr_scale = lr_scale
        self.start_epoch = start_epoch
        self.strip = strip
        self.log_histograms = log_histograms
        self.options = options

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Cluster before the optimizers exist, or get ready to load a clustered checkpoint."""
        if stage == "fit" and self.start_epoch == 0 and not is_clustered(pl_module):
            cluster_(pl_module, self.rules, **self.options)
        self._hook = pl_module._register_load_state_dict_pre_hook(_match_structure, True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the learning rates of the optimizers just built."""
        if is_clustered(pl_module):
            _scale_rates(trainer, self.lr_scale)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cluster at ``start_epoch``, keeping the optimizer state of what is not clustered."""
        if trainer.current_epoch < self.start_epoch or is_clustered(pl_module):
            return
        before = {id(p): p.shape for p in pl_module.parameters()}
        cluster_(pl_module, self.rules, **self.options)
        kept = {id(p) for p in pl_module.parameters() if before.get(id(p)) == p.shape}
        _rebuild_optimizers(trainer, kept)
        _scale_rates(trainer, self.lr_scale)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the clusterings amount to."""
        rows = [row for row in summary(pl_module).rows if row.n_clusters is not None]
        for row in rows:
            pl_module.log(f"clusters/{row.name}", float(row.distinct))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Strip, after the last checkpoint was written."""
        if self.strip:
            strip_(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._hook.remove()


def _match_structure(
    module: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Make the module clustered where the incoming state is, before its tensors are looked up."""
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    restore_structure_(module, own)


def _scale_rates(trainer: Trainer, factor: float) -> None:
    """Lower each group's own rate, and the bases from which schedulers derive theirs."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for key in _RATES:
                if key in group:
                    group[key] = group[key] * factor
    for config in trainer.lr_scheduler_configs:
        bases = getattr(config.scheduler, "base_lrs", None)
        if bases is not None:
            config.scheduler.base_lrs = [base * factor for base in bases]


def _rebuild_optimizers(trainer: Trainer, kept: set[int]) -> None:
    """Build the optimizers anew over the codebooks, with the old state of the ``kept`` tensors."""
    old, old_schedulers = trainer.optimizers, trainer.lr_scheduler_configs
    trainer.strategy.setup_optimizers(trainer)
    for before, after in zip(old, trainer.optimizers, strict=True):
        _carry_over(before, after, kept)
    for was, now in zip(old_schedulers, trainer.lr_scheduler_configs, strict=True):
        _carry_over_schedule(was, now)


def _carry_over(before: Optimizer, after: Optimizer, kept: set[int]) -> None:
    for old_group, new_group in zip(before.param_groups, after.param_groups, strict=True):
        new_group.update({k: v for k, v in old_group.items() if k != "params"})
    for parameter, state in before.state.items():
        if id(parameter) in kept:
            after.state[parameter] = state


def _carry_over_schedule(was: LRSchedulerConfig, now: LRSchedulerConfig) -> None:
    now.scheduler.load_state_dict(was.scheduler.state_dict())
