"""Run a recipe: train, prune, cluster, fine-tune, export, compile, report.

Each stage's result is a file under ``DIR/stages`` whose name holds a digest of everything that it
depends on (the recipe's sections so far, the checkpoint, the versions). So a stage that is done is
neither run again nor reused by mistake: an interrupted run goes on where it was, and a sweep
trains once.

The *control* is the unclustered model, trained as long as the clustered one, at the same rates and
from the same start. Every "baseline" in the report is the control's.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from torchclust.activations.quantized import quantize_activations_
from torchclust.allocation.encoded_size import encoded_bytes
from torchclust.allocation.knapsack import Choice, Curves
from torchclust.distillation.distill import distill_
from torchclust.lightning.callback import WeightClustering
from torchclust.model.restore import restore_
from torchclust.recipes import choice
from torchclust.recipes.kept import Result, Stages, origin
from torchclust.recipes.prepare import Prepared, clustered_copy
from torchclust.recipes.schema import ClusterSection, Schedule
from torchclust.recipes.training import GradualPruning, accuracy, fit
from torchclust.zoo.dataset import Batch, loader, samples

EVALUATION_BATCH = 250
UNLABELLED = 512  # training images that ``finetune.labels: false`` sees
STEPS_PER_EPOCH = 150  # of `torchclust.distill_`, for each of its stages


@dataclass(frozen=True)
class Networks:
    """The models that a report compares, in eval mode, and their accuracies in percent.

    Attributes:
        trained: before any compression.
        control: never compressed, trained as long as `compressed`.
        compressed: pruned, clustered, fine-tuned, its clusterings still in place; None when the
            recipe does neither.
        chosen: numbers of clusters, where the recipe leaves them to be chosen, with the encoded
            bytes that they came to; else None.
        accuracy: of ``float`` (trained), ``control``, ``pruned``, ``before_finetune`` (clustered,
            not trained since) and ``clustered`` (`compressed`); None for what there is not.
    """

    trained: nn.Module
    control: nn.Module
    compressed: nn.Module | None
    accuracy: dict[str, float | None]
    chosen: choice.Chosen | None = None


def train_networks(prepared: Prepared, stages: Stages) -> Networks:
    """Run the stages ``train``, ``control``, ``prune``, ``cluster`` and ``finetune``.

    Where the recipe leaves numbers of clusters to be chosen, ``sensitivity`` comes before
    ``cluster``, and these two and ``finetune`` may run several times.
    """
    recipe, training = prepared.recipe, Training(prepared, stages)
    accuracy: dict[str, float | None] = dict.fromkeys(
        ("float", "control", "pruned", "before_finetune", "clustered")
    )
    trained, accuracy["float"] = training.train()
    if recipe.prune is None and recipe.cluster is None:
        return Networks(trained, trained, None, {**accuracy, "control": accuracy["float"]})
    control, accuracy["control"] = training.control(trained)
    compressed = trained
    if recipe.prune is not None:
        compressed, accuracy["pruned"] = training.prune(trained)
        accuracy["clustered"] = accuracy["pruned"]
    chosen = None
    if recipe.cluster is not None:
        start = compressed
        if recipe.cluster.chooses:
            chosen = training.choose(start, trained)
            training = training.clustering_with(chosen.section)
        compressed, accuracy["before_finetune"] = training.cluster(start)
        accuracy["clustered"] = accuracy["before_finetune"]
        if recipe.finetune is not None and recipe.finetune.epochs:
            compressed, accuracy["clustered"] = training.finetune(compressed, trained)
    if chosen is not None:
        chosen = chosen.measured(
            encoded_bytes(compressed, choice.measure_of(recipe), chosen.allocation)
        )
    return Networks(trained, control, compressed, accuracy, chosen)


class Phase(NamedTuple):
    """One call of `fit`, as the arguments of that name."""

    epochs: int
    lr: float
    schedule: Schedule = "constant"


class Training:
    """One method per stage: each returns the stage's model and its accuracy."""

    def __init__(self, prepared: Prepared, stages: Stages) -> None:
        self.prepared, self.stages = prepared, stages
        self.recipe, self.data, self.start = prepared.recipe, prepared.data, prepared.model
        self.origin = origin(prepared)

    def train(self) -> tuple[nn.Module, float]:
        """Return the trained model, or the one that came trained."""
        section = self.recipe.train
        epochs = section.epochs if section else 0
        plan = [Phase(epochs, self.recipe.lr)]
        return self._stage("train", {}, lambda: self._fit(self.start, plan))

    def control(self, trained: nn.Module) -> tuple[nn.Module, float]:
        """Return the unclustered model, trained as long as the clustered one."""
        prune, finetune = self.recipe.prune, self.recipe.finetune
        plan = [Phase(prune.epochs, self.recipe.lr)] if prune else []
        if finetune and finetune.labels:
            lr = self.recipe.lr * finetune.lr_scale
            plan += [Phase(finetune.epochs, lr, finetune.schedule)]
        return self._stage("control", {"plan": plan}, lambda: self._fit(trained, plan))

    def clustering_with(self, section: ClusterSection) -> Training:
        """Return the same training with another section ``cluster``."""
        recipe = self.recipe.model_copy(update={"cluster": section})
        return Training(replace(self.prepared, recipe=recipe), self.stages)

    def choose(self, start: nn.Module, trained: nn.Module) -> choice.Chosen:
        """Return a number of clusters for each tensor, within the recipe's budget."""
        finetune = self.recipe.finetune

        def train(section: ClusterSection) -> nn.Module:
            training = self.clustering_with(section)
            numbers = ", ".join(f"{name} {rule}" for name, rule in section.rules.items())
            self.stages.say(f"  {numbers}")
            model, _ = training.cluster(start)
            if finetune is not None and finetune.epochs:
                model, _ = training.finetune(model, trained)
            return model

        labelled: list[Batch] = []
        if self.recipe.cluster and self.recipe.cluster.max_accuracy_drop is not None:
            batches = loader(self.data.train, EVALUATION_BATCH, seed=self.recipe.seed)
            labelled += itertools.islice(batches, choice.LABELLED // EVALUATION_BATCH)
        return choice.choose(self.recipe, start, self._curves(start), labelled, train)

    def _curves(self, start: nn.Module) -> Curves:
        """Return every tensor's choices, which do not depend on the budget."""
        section = self.recipe.cluster
        assert section is not None
        depends = self._sections("prune")
        depends["cluster"] = section.with_rules({}).model_dump(mode="json", exclude_none=True)
        depends["measure"] = choice.measure_of(self.recipe).__name__
        depends["labels"] = self.recipe.finetune is None or self.recipe.finetune.labels

        def compute() -> Result:
            images = self._unlabelled()
            if images is None:
                images = samples(self.data.train, choice.IMAGES, seed=self.recipe.seed)
            curves = choice.curves_of(self.recipe, start, images)
            return {"curves": {n: [list(astuple(c)) for c in cs] for n, cs in curves.items()}}

        found = self.stages.result("sensitivity", [self.origin, depends], compute)["curves"]
        return {name: [Choice(*values) for values in choices] for name, choices in found.items()}

    def cluster(self, start: nn.Module) -> tuple[nn.Module, float]:
        """Return the clustered model, before it is fine-tuned."""
        images = self._unlabelled()
        depends = self._sections("prune", "cluster")
        if images is not None:
            depends["inputs"] = len(images)
        return self._stage("cluster", depends, lambda: clustered_copy(self.recipe, start, images))

    def finetune(self, clustered: nn.Module, teacher: nn.Module) -> tuple[nn.Module, float]:
        """Return the clustered model, fine-tuned with labels or distilled without."""
        images = self._unlabelled()
        depends = self._sections("prune", "cluster", "finetune")
        if images is None:
            return self._stage("finetune", depends, lambda: self._finetuned(clustered))
        return self._stage("distill", depends, lambda: self._distilled(clustered, teacher, images))

    def _finetuned(self, clustered: nn.Module) -> nn.Module:
        section = self.recipe.finetune
        assert section is not None
        # The model is clustered already, by its own parameter names: the callback lowers the rate.
        callback = WeightClustering(
            lr_scale=section.lr_scale,
            strip=False,
            quantize_activations=section.quantize_activations,
        )
        phase = Phase(section.epochs, self.recipe.lr, section.schedule)
        return self._fit(clustered, [phase], [callback])

    def _distilled(self, clustered: nn.Module, teacher: nn.Module, images: Tensor) -> nn.Module:
        section = self.recipe.finetune
        assert section is not None
        model = copy.deepcopy(clustered)
        if section.quantize_activations:
            quantize_activations_(model, images[:EVALUATION_BATCH])
        return distill_(
            model,
            teacher,
            images,
            steps=STEPS_PER_EPOCH * section.epochs,
            progress=self.stages.progress,
            seed=self.recipe.seed,
        )

    def _unlabelled(self) -> Tensor | None:
        """Return the images of a recipe that does without labels, (512, C, H, W), else None."""
        section = self.recipe.finetune
        if section is None or section.labels:
            return None
        return samples(self.data.train, UNLABELLED, seed=self.recipe.seed)

    def prune(self, trained: nn.Module) -> tuple[nn.Module, float]:
        """Return the pruned model."""
        section = self.recipe.prune
        assert section is not None
        plan = [Phase(section.epochs, self.recipe.lr)]

        def pruned() -> nn.Module:
            return self._fit(trained, plan, [GradualPruning(section.sparsity)])

        return self._stage("prune", self._sections("prune"), pruned)

    def _fit(
        self,
        start: nn.Module,
        plan: list[Phase],
        callbacks: Sequence[Callback] = (),
    ) -> nn.Module:
        """Train a copy of `start` in the phases of the plan."""
        model = copy.deepcopy(start)
        for phase in plan:
            if phase.epochs:
                batch_size, seed = self.recipe.data.batch_size, self.recipe.seed
                fit(
                    model,
                    loader(self.data.train, batch_size, seed=seed),
                    **phase._asdict(),
                    seed=seed,
                    callbacks=callbacks,
                    progress=self.stages.progress,
                )
        return model

    def _sections(self, *names: str) -> dict[str, Any]:
        dumped = self.recipe.to_dict()
        return {name: dumped.get(name) for name in names}

    def _stage(
        self, name: str, depends: dict[str, Any], make: Callable[[], nn.Module]
    ) -> tuple[nn.Module, float]:
        """Return a stage's model as its stored state gives it, also when it was just computed.

        So an interrupted and an uninterrupted run can not differ in what a model carries beside
        its state.
        """

        def compute() -> Result:
            model = make().eval()
            percent = accuracy(model, loader(self.data.test, EVALUATION_BATCH))
            return {"state": model.state_dict(), "accuracy": percent}

        result = self.stages.result(name, [self.origin, depends], compute)
        model = restore_(copy.deepcopy(self.start), result["state"]).eval()
        return model, result["accuracy"]
