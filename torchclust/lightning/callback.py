"""`WeightClustering`: clusters a LightningModule while its Trainer fits it.

In: a Trainer and its module. Out: the same module, clustered, trained, and plain again.
The callback decides *when*; the work is in `torchclust.model`, `optimizers`, `freezing`, `monitor`.
The moments follow from how Lightning starts a run: ``setup`` comes before the optimizers are built,
so a model clustered there hands its codebooks to ``configure_optimizers`` by itself;
``on_fit_start`` comes after they are built but before a checkpoint overwrites their state, so rates
are lowered once however often a run is resumed; ``on_train_start`` is the one hook that comes after
the checkpoint wherever the run goes on; ``on_fit_end`` comes after the last checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack

from torchclust.activations.quantized import FirstCalls, kept_quantized, quantized_modules
from torchclust.lightning.averaging import mend_copies_, strip_copies_
from torchclust.lightning.distributed import keep_indices_local_
from torchclust.lightning.freezing import Freezer
from torchclust.lightning.monitor import announcement, assignments, measure, write_histograms
from torchclust.lightning.optimizers import of_plain_model_
from torchclust.lightning.options import DEFAULT, Options, check_names, leaving_out
from torchclust.lightning.preconditions import (
    builds_late,
    check_arguments,
    check_decay,
    check_hyperparameters,
    check_rules,
    check_trainer,
    warn_if_never_clustered,
)
from torchclust.lightning.price import charge
from torchclust.lightning.rng import random_state, set_random_state
from torchclust.lightning.structure import match_structure, remaining
from torchclust.lightning.transition import Rates, cluster_on_every_rank, in_mid_training
from torchclust.lightning.trees import Callback, is_overridden, rank_zero_info
from torchclust.model.cluster import strip_
from torchclust.model.clustering import is_clustered
from torchclust.weight.config import ClusterConfig

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_RANDOM_STATE = "torchclust_random_state"


class WeightClustering(Callback):
    """Cluster the module, fine-tune it with a lowered learning rate, strip it at the end.

    Works with one device and with ``strategy="ddp"``, where the codebooks are fitted on rank 0 and
    only they are all-reduced (with ``assignment="nearest"`` the weights as well). What is clustered
    already stays as it is, what is not gets clustered, and a rule that says otherwise of what is
    raises. Several of these callbacks may share a module; the first one lowers the rates.

    *Checkpoints.* A run resumed with ``ckpt_path=`` goes on bit for bit: structure, optimizers,
    schedules and (with one process) the random generators. In the middle of an epoch that needs a
    train loader with ``state_dict`` and ``load_state_dict``, such as torchdata's
    StatefulDataLoader: of any other, Lightning starts again with its first batch; checkpoints of
    whole epochs need a loader whose order depends on the epoch or on the global generators only.
    Checkpoints hold the clustered model. For ``MyModule.load_from_checkpoint``, and for
    ``trainer.test(ckpt_path=...)`` without this callback, give the module one line::

        def on_load_checkpoint(self, checkpoint): torchclust.restore_(self, checkpoint)

    *Early stopping* on accuracy lost against the unclustered model is Lightning's own: stop as soon
    as less than half a point is missing, and give up where more than five points are::

        EarlyStopping("val_acc", mode="max", stopping_threshold=acc - 0.005,
                      divergence_threshold=acc - 0.05)

    Args:
        rules: what to cluster into how many clusters, as for `torchclust.cluster_`.
        lr_scale: factor on every optimizer's learning rates while clustered, schedules included:
            codebooks start near their optimum, and a tenth of the training rate is what
            fine-tuning usually takes.
        start_epoch: the epoch at whose start the model is clustered; before it training is plain.
            From then on new optimizers train the codebooks, with the old state of all else. At 0
            the model is clustered before the optimizers are built. A `ModelCheckpoint` that
            monitors a value may find its best epoch before this one.
        strip: make the weights plain parameters when fitting has ended. Without it the model stays
            clustered, for example for another fit.
        log_histograms: log histograms of the clustered weights to TensorBoard, once an epoch.
            Distinct values, quantization error and the share of weights that moved to another
            cluster are logged in any case (`torchclust.lightning.monitor.measure`), through the
            module.
        freeze: patterns (as in ``rules``; one, or several) of what stays constant from clustering
            on and is not clustered: parameters, and running statistics of norm layers. The usual
            advice is to freeze the first layers while later ones are clustered.
        save_stripped: where to write, when fitting has ended, a checkpoint of the stripped model
            that ``load_from_checkpoint`` reads without torchclust. It holds the last weights; for
            the best ones strip ``restore_(MyModule(), torch.load(best_model_path))``.
        quantize_activations: round activations to int8 where the exported graph will, from the
            second clustered step on (`torchclust.activations`): quantization-aware training that
            keeps the clusters. What ``training_step`` calls is quantized, and stays so after
            ``strip``, for `torchclust.export.to_tflite` to read the ranges; `torchclust.strip_`
            ends it.
        **options: `torchclust.ClusterConfig` fields, and ``importance``, ``seed`` and ``strict`` of
            `cluster_`.

    Raises:
        TypeError, ValueError: an argument out of range, when constructed; what `cluster_` raises,
            a strategy that shards parameters, or nothing to cluster, when fitting starts.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(max_epochs=1, callbacks=[WeightClustering(16, freeze="stem.*")])
    """

    def __init__(
        self,
        rules: int | ClusterConfig | Mapping[str, Any] = DEFAULT,
        *,
        lr_scale: float = 0.1,
        start_epoch: int = 0,
        strip: bool = True,
        log_histograms: bool = False,
        freeze: str | Sequence[str] = (),
        save_stripped: str | None = None,
        quantize_activations: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_names(WeightClustering, options)
        check_arguments(lr_scale, start_epoch, strip=strip, save_stripped=save_stripped)
        self.rules = rules
        self.lr_scale = lr_scale
        self.start_epoch = start_epoch
        self.strip = strip
        self.log_histograms = log_histograms
        self.freeze = (freeze,) if isinstance(freeze, str) else tuple(freeze)
        self.save_stripped = save_stripped
        self.quantize_activations = quantize_activations
        self.options = options
        self._freezer = Freezer(())
        self._rates = Rates(lr_scale)
        self._done = False
        self._hook: RemovableHandle | None = None
        self._first_calls: FirstCalls | None = None
        self._assigned: dict[str, Tensor] = {}
        self._random_state: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Cluster before the optimizers exist, and get ready to load a clustered checkpoint."""
        self._release()
        fitting = stage == "fit"
        if fitting:
            check_trainer(trainer, pl_module, self)
        self._freezer = Freezer(self.freeze if fitting else ())
        asked = (leaving_out(self.rules, self.freeze), self.options) if fitting else None
        self._hook = pl_module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            functools.partial(match_structure, self._freezer, asked)
        )
        if is_clustered(pl_module):
            self._freezer.freeze_parameters_(pl_module)
        if not fitting or (builds_late(pl_module) and not is_clustered(pl_module)):
            return
        check_hyperparameters(trainer, pl_module)
        check_rules(self, pl_module)  # not only after epochs of training
        if self.start_epoch == 0:
            self._cluster(trainer, pl_module)
        if is_clustered(pl_module):
            self._rates.watch_finder(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the learning rates of the optimizers just built."""
        if is_clustered(pl_module):
            self._adjust(trainer, pl_module, lowered=not self._leads(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where a checkpoint was taken, even at the very end of an epoch.

        After a checkpoint of an epoch's last step Lightning does not call ``on_train_epoch_start``
        for the next one, so clustering may be due here.
        """
        if self._random_state is not None:
            set_random_state(self._random_state)
        self._cluster_if_due(trainer, pl_module)
        if is_clustered(pl_module):
            self._begin(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cluster at ``start_epoch``."""
        if self._cluster_if_due(trainer, pl_module):
            self._begin(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the first clustered step: what it calls, on its data, is what is quantized."""
        due = self.quantize_activations and is_clustered(pl_module)
        if due and not any(quantized_modules(pl_module)):
            self._first_calls = FirstCalls(pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Charge the weights for their bits: less and less cheaply over the first half."""
        if self._leads(trainer):
            charge(trainer, pl_module, optimizer, self.start_epoch)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Watch no longer."""
        self._stop_watching()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the clusterings amount to."""
        if trainer.barebones:  # where to log is to be warned
            return
        if not self._leads(trainer):
            return
        before, self._assigned = self._assigned, assignments(pl_module)
        metrics = measure(pl_module, before, self._assigned)
        pl_module.log_dict(metrics, batch_size=1, sync_dist=True)
        if self.log_histograms and trainer.is_global_zero:
            write_histograms(trainer.loggers, pl_module, trainer.global_step)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before an averaging callback exchanges its copy and the module."""
        mend_copies_(trainer.callbacks)  # type: ignore[attr-defined]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before an averaging callback copies the average into the module."""
        mend_copies_(trainer.callbacks)  # type: ignore[attr-defined]
        warn_if_never_clustered(trainer, pl_module, self.start_epoch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Strip, after the last checkpoint was written; learned activation ranges stay."""
        with kept_quantized(pl_module):
            if self.strip and is_clustered(pl_module):
                strip_(pl_module)
                strip_copies_(trainer.callbacks)  # type: ignore[attr-defined]
                of_plain_model_(trainer.optimizers, pl_module)
                self._rates.restore(trainer)
            if self.save_stripped and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                trainer.save_checkpoint(self.save_stripped, weights_only=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook and nothing frozen behind; Lightning does not tear down in this case."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook and nothing frozen behind."""
        self._release()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the random generators' state: dropout must go on where it was."""
        within_epoch = trainer.validating or not trainer.is_last_batch
        checkpoint[_RANDOM_STATE] = {**random_state(), "within_epoch": within_epoch}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Set the random generators; again when training starts, if that is within an epoch.

        An epoch's iterator, made in between, draws from them: to be repeated for a new epoch, to be
        undone for one that had its iterator already. Of several processes only the first's is kept.
        """
        state = checkpoint.get(_RANDOM_STATE)
        if trainer.training and trainer.world_size == 1 and state is not None:
            set_random_state(state)
            self._random_state = state if state["within_epoch"] else None

    def _cluster(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cluster on rank 0 and everywhere alike, then freeze."""
        rules = leaving_out(self.rules, self.freeze)
        then = functools.partial(self._freezer.freeze_parameters_, pl_module)
        cluster_on_every_rank(trainer, pl_module, rules, self.options, then)

    def _cluster_if_due(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Cluster now if it is time and anything is left to be clustered."""
        if trainer.current_epoch < self.start_epoch or self._done:
            return False
        self._done, lowered = True, is_clustered(pl_module)
        rules = leaving_out(self.rules, self.freeze)
        if lowered and not remaining(pl_module, rules, self.options):
            return False
        check_rules(self, pl_module)
        cluster = functools.partial(self._cluster, trainer, pl_module)
        in_mid_training(trainer, pl_module, cluster)
        self._adjust(trainer, pl_module, lowered=lowered)
        return True

    def _adjust(self, trainer: Trainer, pl_module: LightningModule, *, lowered: bool) -> None:
        if not lowered:
            check_decay(trainer.optimizers, pl_module)
            self._rates.lower(trainer)
        if trainer.strategy.model is not None:
            keep_indices_local_(trainer.strategy.model)

    def _leads(self, trainer: Trainer) -> bool:
        """Whether this is the first of several callbacks that cluster one module."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next(c for c in callbacks if isinstance(c, WeightClustering)) is self

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What starts with clustered training, in this process."""
        self._freezer.freeze_norms_(pl_module)
        self._assigned = assignments(pl_module)
        loads = is_overridden("on_load_checkpoint", pl_module)
        rank_zero_info(announcement(pl_module, hint=not loads))

    def _release(self) -> None:
        self._freezer.release()
        self._assigned, self._random_state, self._done = {}, None, False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._first_calls is not None:
            self._first_calls.stop()
            self._first_calls = None
