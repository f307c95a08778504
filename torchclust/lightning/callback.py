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
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack

from torchclust.activations.quantized import FirstCalls, kept_quantized, quantized_modules
from torchclust.lightning.distributed import keep_indices_local_, on_rank_zero
from torchclust.lightning.freezing import Freezer
from torchclust.lightning.monitor import announcement, assignments, histograms, measure
from torchclust.lightning.optimizers import carry_over, scale_rates
from torchclust.lightning.price import share_of_price
from torchclust.lightning.rng import random_state, set_random_state
from torchclust.lightning.trees import (
    Callback,
    is_overridden,
    of_all,
    rank_zero_info,
    rank_zero_warn,
)
from torchclust.model.charge import charge_, is_priced
from torchclust.model.cluster import cluster_, strip_
from torchclust.model.clustering import is_clustered, named_clusterings
from torchclust.model.restore import restore_structure_
from torchclust.model.rules import Rules
from torchclust.model.slots import planned
from torchclust.weight.config import (
    Assignment,
    ClusterConfig,
    CodebookDtype,
    Gradient,
    Granularity,
    Init,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_SINGLE = of_all("strategies.SingleDeviceStrategy")
_DDP = of_all("strategies.DDPStrategy")
_RANDOM_STATE = "torchclust_random_state"
_BESIDE_RULES = ("importance", "inputs", "seed")
_COPIERS = {"WeightAveraging", "StochasticWeightAveraging"}  # of the module, in their own setup


class Options(TypedDict, total=False):
    """What `torchclust.cluster_` takes beside the rules; typed, so that LightningCLI parses it."""

    codebook_dtype: CodebookDtype
    init: Init
    max_iter: int
    granularity: Granularity
    group_size: int | None
    assignment: Assignment
    gradient: Gradient
    preserve_sparsity: bool
    rate: float
    importance: Mapping[str, Tensor] | None
    inputs: Iterable[Any] | None
    strict: bool
    seed: int


class WeightClustering(Callback):
    """Cluster the module, fine-tune it with a lowered learning rate, strip it at the end.

    Works with one device and with ``strategy="ddp"``, where the codebooks are fitted on rank 0 and
    only they are all-reduced (with ``assignment="nearest"`` the weights as well). A module that is
    clustered already stays as it is.

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
        rules: int | ClusterConfig | Mapping[str, Any] = 16,
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
        if not 0 < lr_scale < float("inf"):
            raise ValueError(f"lr_scale must be positive, got {lr_scale!r}")
        if isinstance(start_epoch, bool) or not isinstance(start_epoch, int):
            raise TypeError(f"start_epoch must be an int, got {start_epoch!r}")
        if start_epoch < 0:
            raise ValueError(f"start_epoch must be at least 0, got {start_epoch}")
        if save_stripped is not None and not strip:
            raise ValueError(f"save_stripped={save_stripped!r} needs strip=True, got strip=False")
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
        self._hook: RemovableHandle | None = None
        self._first_calls: FirstCalls | None = None
        self._assigned: dict[str, Tensor] = {}
        self._random_state: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Cluster before the optimizers exist, and get ready to load a clustered checkpoint."""
        self._release()
        if stage == "fit":
            self._check(trainer)
        self._freezer = Freezer(self.freeze if stage == "fit" else ())
        self._hook = pl_module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            functools.partial(_match_structure, self._freezer)
        )
        if is_clustered(pl_module):
            self._freezer.freeze_parameters_(pl_module)
        elif stage == "fit" and not _builds_late(pl_module):
            if self.start_epoch == 0:
                self._cluster(trainer, pl_module)
            else:
                self._check_rules(pl_module)  # not only after epochs of training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the learning rates of the optimizers just built."""
        if is_clustered(pl_module):
            self._adjust(trainer)

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
        if is_priced(pl_module):
            share = share_of_price(trainer, self.start_epoch)
            held = [p for group in optimizer.param_groups for p in group["params"]]
            charge_(pl_module, share, parameters=held)

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
        before, self._assigned = self._assigned, assignments(pl_module)
        metrics = measure(pl_module, before, self._assigned)
        pl_module.log_dict(metrics, batch_size=1, sync_dist=True)
        if self.log_histograms and trainer.is_global_zero:
            for name, weight in histograms(pl_module).items():
                for writer in _writers(trainer):
                    writer.add_histogram(name, weight, trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Strip, after the last checkpoint was written; learned activation ranges stay."""
        dry_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        with kept_quantized(pl_module):
            if self.strip:
                strip_(pl_module)
            if self.save_stripped is not None and not dry_run:
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

    def _check(self, trainer: Trainer) -> None:
        strategy, last = trainer.strategy, trainer.max_epochs
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not isinstance(strategy, _SINGLE + _DDP):
            raise ValueError(
                f"WeightClustering works on one device and with strategy='ddp', got "
                f"{type(strategy).__name__}, which shards or splits the parameters it clusters"
            )
        for callback in callbacks:
            copies = _COPIERS & {cls.__name__ for cls in type(callback).__mro__}
            late = self.start_epoch > 0 or callbacks.index(callback) < callbacks.index(self)
            if copies and late:
                raise ValueError(
                    f"{copies.pop()} averages a copy of the module that it makes when fitting "
                    f"starts, so that must be clustered by then: list WeightClustering before it, "
                    f"with start_epoch=0 (got {self.start_epoch})"
                )
        if last is not None and 0 <= last <= self.start_epoch:
            rank_zero_warn(
                f"WeightClustering never clusters: start_epoch={self.start_epoch}, but the "
                f"trainer stops after max_epochs={last}"
            )

    def _check_rules(self, pl_module: LightningModule) -> None:
        of_rules: dict[str, Any] = {k: v for k, v in self.options.items() if k not in _BESIDE_RULES}
        if not planned(pl_module, _leaving_out(self.rules, self.freeze), **of_rules):
            raise ValueError(
                f"WeightClustering({self.rules!r}, freeze={list(self.freeze)!r}) finds nothing to "
                f"cluster; print(torchclust.summary(module)) says why, tensor by tensor"
            )

    def _cluster(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cluster on rank 0 and everywhere alike, then freeze."""

        def fit() -> dict[str, Tensor]:
            self._check_rules(pl_module)
            cluster_(pl_module, _leaving_out(self.rules, self.freeze), **self.options)
            if trainer.world_size == 1:
                return {}
            state = pl_module.state_dict()
            return {k: v.cpu() for k, v in state.items() if "parametrizations." in k}

        state = on_rank_zero(fit, trainer.is_global_zero, trainer.strategy.broadcast)
        if not trainer.is_global_zero:
            restore_structure_(pl_module, state)
        self._freezer.freeze_parameters_(pl_module)

    def _cluster_if_due(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Cluster now if it is time, and rebuild what holds on to the parameters as they were."""
        if trainer.current_epoch < self.start_epoch or is_clustered(pl_module):
            return False
        known = list(pl_module.parameters())  # held, so that no new one takes an old one's id
        self._cluster(trainer, pl_module)
        optimizers, schedulers = trainer.optimizers, trainer.lr_scheduler_configs
        if isinstance(trainer.strategy, _DDP):
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()
        trainer.strategy.setup_optimizers(trainer)
        codebooks = {id(c.centroids) for _, c in named_clusterings(pl_module)}
        fresh = codebooks | {id(p) for p in pl_module.parameters()} - {id(p) for p in known}
        carry_over(optimizers, trainer.optimizers, fresh)
        for was, now in zip(schedulers, trainer.lr_scheduler_configs, strict=True):
            now.scheduler.load_state_dict(was.scheduler.state_dict())
        self._adjust(trainer)
        return True

    def _adjust(self, trainer: Trainer) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scale_rates(trainer.optimizers, schedulers, self.lr_scale)
        if trainer.strategy.model is not None:
            keep_indices_local_(trainer.strategy.model)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What starts with clustered training, in this process."""
        self._freezer.freeze_norms_(pl_module)
        self._assigned = assignments(pl_module)
        loads = is_overridden("on_load_checkpoint", pl_module)
        rank_zero_info(announcement(pl_module, hint=not loads))
        if self.log_histograms and not _writers(trainer) and trainer.is_global_zero:
            rank_zero_warn(
                "log_histograms=True needs a TensorBoardLogger: no logger here takes them"
            )

    def _release(self) -> None:
        self._freezer.release()
        self._assigned, self._random_state = {}, None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._first_calls is not None:
            self._first_calls.stop()
            self._first_calls = None


def _leaving_out(rules: Rules, patterns: Sequence[str]) -> Rules:
    """The rules with the patterns as last ones, which leave what they match alone."""
    if not patterns:
        return rules
    given = rules if isinstance(rules, Mapping) else {"*": rules}
    return {p: rule for p, rule in given.items() if p not in patterns} | dict.fromkeys(patterns)


def _builds_late(pl_module: LightningModule) -> bool:
    """Whether layers or weights may come after the callbacks' ``setup``."""
    own_hooks = any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model"))
    return own_hooks or any(map(is_lazy, pl_module.parameters()))


def _match_structure(
    freezer: Freezer, module: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Make the module clustered where the incoming state is, before its tensors are looked up."""
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    restore_structure_(module, own)
    if is_clustered(module):  # optimizers built hereafter see the same as when it was saved
        freezer.freeze_parameters_(module)


def _writers(trainer: Trainer) -> list[Any]:
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [writer for writer in experiments if hasattr(writer, "add_histogram")]
