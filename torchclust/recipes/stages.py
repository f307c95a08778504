"""Run a recipe: train, prune, cluster, fine-tune, export, compile, report.

Each stage's result is a file under ``DIR/stages`` whose name holds a digest of everything that it
depends on (the recipe's sections so far, the checkpoint, the versions). So a stage that is done is
neither run again nor reused by mistake: an interrupted run goes on, and a sweep trains once.

The *control* is the unclustered model, trained as long as the clustered one, at the same rates and
from the same start. Every "baseline" in the report is the control's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchclust.activations.quantized import quantize_activations_
from torchclust.allocation.encoded_size import encoded_bytes
from torchclust.allocation.knapsack import Choice, Curves
from torchclust.distillation.distill import distill_
from torchclust.lightning.callback import WeightClustering
from torchclust.lightning.trees import Callback
from torchclust.model.clustering import named_clusterings
from torchclust.model.restore import restore_
from torchclust.recipes import choice
from torchclust.recipes.chip import codebooks_of, measure_of, sizes_in_file
from torchclust.recipes.classifier import Classifier, Distillation
from torchclust.recipes.kept import Result, Stages, digest_of_networks, origin
from torchclust.recipes.prepare import Prepared, cluster_network_
from torchclust.recipes.pruning import GradualPruning, SparseDropout
from torchclust.recipes.schema import ClusterSection
from torchclust.recipes.task import Task, as_batches
from torchclust.recipes.training import Phase, fit

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

AT_ONCE = 250  # samples whose activations set the first ranges
STEPS_PER_EPOCH = 150  # of `torchclust.distill_`, for each of its stages


@dataclass(frozen=True)
class Networks:
    """The models that a report compares, in eval mode, and how good they are.

    Attributes:
        task: whose modules they are.
        modules: ``trained``, before any compression; ``control``, never compressed, trained as long
            as ``compressed``: pruned, clustered, fine-tuned, its clusterings still in place, and
            not there when the recipe does neither.
        accuracy: the task's metric of ``float`` (trained), ``control``, ``pruned``,
            ``before_finetune`` (clustered, not trained since) and ``clustered`` (compressed); None
            for what there is not.
        chosen: numbers of clusters, where the recipe leaves them to be chosen, with the encoded
            bytes that they came to; else None.
    """

    task: Task
    modules: Mapping[str, LightningModule]
    accuracy: dict[str, float | None]
    chosen: choice.Chosen | None = None

    @functools.cached_property
    def digest(self) -> str:
        """What a file made of them depends on: every tensor of every module, read once."""
        return digest_of_networks(self.modules.values())

    @property
    def trained(self) -> nn.Module:
        """The network before any compression."""
        return self.task.network(self.modules["trained"])

    @property
    def control(self) -> nn.Module:
        """The network that was never compressed, trained as long as `compressed`."""
        return self.task.network(self.modules["control"])

    @property
    def compressed(self) -> nn.Module | None:
        """The pruned, clustered, fine-tuned network, if there is one."""
        module = self.modules.get("compressed")
        return None if module is None else self.task.network(module)


def train_networks(prepared: Prepared, stages: Stages) -> Networks:
    """Run the stages ``train``, ``control``, ``prune``, ``cluster`` and ``finetune``.

    Where the recipe leaves numbers of clusters to be chosen, ``sensitivity`` comes before
    ``cluster``, and these two and ``finetune`` may run several times, for a price as well.
    """
    recipe, training = prepared.recipe, Training(prepared, stages)
    task = prepared.task
    accuracy: dict[str, float | None] = dict.fromkeys(
        ("float", "control", "pruned", "before_finetune", "clustered")
    )
    trained, accuracy["float"] = training.train()
    if recipe.prune is None and recipe.cluster is None:
        modules = {"trained": trained, "control": trained}
        return Networks(task, modules, {**accuracy, "control": accuracy["float"]})
    control, accuracy["control"] = training.control(trained)
    compressed = trained
    if recipe.prune is not None:
        compressed, accuracy["pruned"] = training.prune(trained)
        accuracy["clustered"] = accuracy["pruned"]
    chosen = None
    if recipe.cluster is not None:
        start = compressed
        if recipe.cluster.chooses:
            chosen = training.choose(start, control)
            training = training.clustering_with(chosen.section)
        compressed, accuracy["before_finetune"] = training.cluster(start)
        accuracy["clustered"] = accuracy["before_finetune"]
        if recipe.finetune is not None and recipe.finetune.epochs:
            compressed, accuracy["clustered"] = training.finetune(compressed, control)
        if chosen is not None and recipe.cluster.budget is None:  # a budget counted them itself
            network, measure = task.network(compressed), measure_of(recipe)
            chosen = chosen.measured(encoded_bytes(network, measure, chosen.allocation))
    modules = {"trained": trained, "control": control, "compressed": compressed}
    return Networks(task, modules, accuracy, chosen)


class Training:
    """One method per stage: each returns the stage's module and how good it is."""

    def __init__(self, prepared: Prepared, stages: Stages) -> None:
        self.prepared, self.stages = prepared, stages
        self.recipe, self.task = prepared.recipe, prepared.task
        self.origin = origin(prepared)

    def train(self) -> tuple[LightningModule, float]:
        """Return the trained module, or the one that came trained."""
        section = self.recipe.train
        plan = [Phase(section.epochs if section else 0)]
        return self._stage("train", {}, lambda: self._fit(self.task.module, plan))

    def control(self, trained: LightningModule) -> tuple[LightningModule, float]:
        """Return the unclustered module, trained as long as the clustered one."""
        prune, finetune = self.recipe.prune, self.recipe.finetune
        plan = [Phase.of(prune)] if prune else []
        if finetune and finetune.labels:
            plan += [Phase.of(finetune)]
        return self._stage("control", {"plan": plan}, lambda: self._fit(trained, plan))

    def clustering_with(self, section: ClusterSection) -> Training:
        """Return the same training with another section ``cluster``."""
        recipe = self.recipe.model_copy(update={"cluster": section})
        return Training(replace(self.prepared, recipe=recipe), self.stages)

    def choose(self, start: LightningModule, control: LightningModule) -> choice.Chosen:
        """Return numbers of clusters, or the price of a bit, within the recipe's budget."""
        section, seed = self.recipe.cluster, self.recipe.seed
        assert section is not None

        def train(section: ClusterSection) -> nn.Module:
            self.stages.say(f"  {section.in_short}")
            training = self.clustering_with(section)
            module, _ = training.cluster(start)
            finetune = self.recipe.finetune
            if finetune is not None and finetune.epochs:
                module, _ = training.finetune(module, control)
            return self.task.network(module)

        if section.prices:
            samples = self.recipe.export.calibration_samples if self.recipe.export else 1
            inputs = self.task.inputs(start, samples, seed)
            return choice.choose_price(
                self.recipe, lambda section: sizes_in_file(self.recipe, train(section), inputs)
            )
        labelled: list[Any] = []
        if section.max_accuracy_drop is not None:
            labelled = self.task.training_batches(choice.LABELLED, seed)

        def lost(section: ClusterSection) -> float:
            clustered = self.clustering_with(section)._clustered(start, None)
            before, after = (self.task.score(m, batches=labelled) for m in (start, clustered))
            return self.task.metric.loss(before, after)

        network = self.task.network(start)
        return choice.choose(self.recipe, network, self._curves(start), lost, train)

    def _curves(self, start: LightningModule) -> Curves:
        """Return every tensor's choices, which do not depend on the budget."""
        section = self.recipe.cluster
        assert section is not None
        depends = self.recipe.sections("prune")
        depends["cluster"] = section.with_rules({}).model_dump(mode="json", exclude_none=True)
        depends["measure"] = [measure_of(self.recipe).__name__, *codebooks_of(self.recipe)]
        depends["labels"] = self.recipe.labels

        def compute() -> Result:
            count = choice.SAMPLES if self.recipe.labels else self.recipe.inputs
            inputs = self.task.inputs(start, count, self.recipe.seed)
            network, distance = self.task.network(start), self.task.distance
            curves = choice.curves_of(self.recipe, network, inputs, distance)
            return {"curves": {n: [list(astuple(c)) for c in cs] for n, cs in curves.items()}}

        found = self.stages.result("sensitivity", [self.origin, depends], compute)["curves"]
        return {name: [Choice(*values) for values in choices] for name, choices in found.items()}

    def cluster(self, start: LightningModule) -> tuple[LightningModule, float]:
        """Return the clustered module, before it is fine-tuned."""
        depends = self.recipe.sections("prune", "cluster")
        if self.recipe.inputs:
            depends["inputs"] = self.recipe.inputs
        return self._stage("cluster", depends, lambda: self._clustered(start, self._inputs(start)))

    def _clustered(
        self, start: LightningModule, inputs: tuple[Tensor, ...] | None
    ) -> LightningModule:
        module = copy.deepcopy(start)
        cluster_network_(self.recipe, self.task.network(module), as_batches(inputs))
        return module

    def finetune(
        self, clustered: LightningModule, teacher: LightningModule
    ) -> tuple[LightningModule, float]:
        """Return the clustered module, fine-tuned with labels or distilled without."""
        depends = self.recipe.sections("prune", "cluster", "finetune")
        labels = self.recipe.labels
        name, make = ("finetune", self._finetuned) if labels else ("distill", self._distilled)
        return self._stage(name, depends, lambda: make(clustered, teacher))

    def _finetuned(self, clustered: LightningModule, teacher: LightningModule) -> LightningModule:
        section = self.recipe.finetune
        assert section is not None
        # The network is clustered already: the callback lowers the rate, and clusters no more.
        as_it_is = {name: clustering.config for name, clustering in named_clusterings(clustered)}
        callback = WeightClustering(
            as_it_is,
            lr_scale=section.lr_scale,
            strip=False,
            quantize_activations=section.quantize_activations,
        )
        phase = Phase.of(section)._replace(lr_scale=1.0)
        pruned = self.recipe.prune
        sparse = [SparseDropout(pruned.sparsity, self.task.exports)] if pruned else []
        distillation = Distillation(self.task.network(teacher), section.distillation_weight)
        return self._fit(clustered, [phase], [callback, *sparse], distillation)

    def _distilled(self, clustered: LightningModule, teacher: LightningModule) -> LightningModule:
        section, inputs = self.recipe.finetune, self._inputs(clustered)
        assert section is not None
        assert inputs is not None
        module = copy.deepcopy(clustered)
        network = self.task.network(module)
        if section.quantize_activations:
            quantize_activations_(network, tuple(column[:AT_ONCE] for column in inputs))
        distill_(
            network,
            self.task.network(teacher),
            as_batches(inputs),
            steps=STEPS_PER_EPOCH * section.epochs,
            progress=self.stages.progress,
            seed=self.recipe.seed,
        )
        return module

    def _inputs(self, module: LightningModule) -> tuple[Tensor, ...] | None:
        """Return the samples that clustering sees, without their labels; None if it sees none."""
        count = self.recipe.inputs
        return self.task.inputs(module, count, self.recipe.seed) if count else None

    def prune(self, trained: LightningModule) -> tuple[LightningModule, float]:
        """Return the pruned module."""
        section = self.recipe.prune
        assert section is not None
        plan = [Phase.of(section)]

        def pruned() -> LightningModule:
            return self._fit(trained, plan, [GradualPruning(section.sparsity, self.task.exports)])

        return self._stage("prune", self.recipe.sections("prune"), pruned)

    def _fit(
        self,
        start: LightningModule,
        plan: list[Phase],
        callbacks: Sequence[Callback] = (),
        distillation: Distillation | None = None,
    ) -> LightningModule:
        """Train a copy of `start` in the phases of the plan."""
        module = copy.deepcopy(start)
        for phase in (phase for phase in plan if phase.epochs):
            if isinstance(module, Classifier):  # others have schedules of their own
                module.schedule, module.distillation = phase.schedule, distillation
            fit(
                module,
                self.task.make_data(),
                epochs=phase.epochs,
                seed=self.recipe.seed,
                callbacks=[*callbacks, *phase.callbacks()],
                options=self.task.options,
                progress=self.stages.progress,
            )
        return module

    def _stage(
        self, name: str, depends: dict[str, Any], make: Callable[[], LightningModule]
    ) -> tuple[LightningModule, float]:
        """Return a stage's module as its stored state gives it, also when it was just computed.

        So an interrupted and an uninterrupted run can not differ in what a module carries beside
        its state.
        """

        def compute() -> Result:
            module = make().eval()
            return {"state": module.state_dict(), "accuracy": self.task.score(module)}

        result = self.stages.result(name, [self.origin, depends], compute)
        module = restore_(copy.deepcopy(self.task.module), result["state"]).eval()
        return module, result["accuracy"]
