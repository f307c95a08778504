"""The recipe: a YAML file that says what `torchclust run` does, read into a frozen, checked value.

This module knows the file's shape and nothing of torch models, data or training;
`torchclust.recipes.run` acts on the value. A section that is absent (or null) is a stage that is
not run. Unknown keys are errors that name the nearest valid one, and so are values of the wrong
type: ``"6"`` is no epoch count.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from torchclust.recipes.cluster_section import ClusterSection as ClusterSection
from torchclust.recipes.section import AnyPath, Section
from torchclust.recipes.section import RecipeError as RecipeError
from torchclust.recipes.section import nearest as nearest
from torchclust.recipes.subject import DataSection as DataSection
from torchclust.recipes.subject import MetricSection
from torchclust.recipes.subject import ModelSection as ModelSection
from torchclust.recipes.subject import ModuleSection as ModuleSection

UNLABELLED = 512  # samples that ``finetune.labels: false`` sees, unless `cluster.inputs` says
Schedule = Literal["constant", "cosine"]  # of the learning rate; cosine falls to 0
RateSchedule = Annotated[
    Schedule, Field(description="of the rate: constant, or cosine, down to 0 over the epochs")
]
Scale = Annotated[float, Field(gt=0, description="times train.lr (1e-3 where that is absent)")]
FreezeNorms = Annotated[bool, Field(description="BatchNorms keep the statistics they came with")]


class TrainSection(Section):
    """Ordinary training, before compression; absent: the model comes trained.

    With Adam, or with a `module`'s own optimizers, which then have their own rates.
    """

    epochs: int = Field(ge=0, description="passes over the training set; 0 keeps random weights")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")


class PruneSection(Section):
    """Magnitude pruning, ever more of it over `epochs`; the control trains as long and alike.

    Dropout falls along, by the root of the share of weights that are left (Han et al., 2015).
    """

    sparsity: float = Field(gt=0, lt=1, description="share of all weights set to zero")
    epochs: int = Field(1, ge=1, description="passes over the training set while pruning")
    lr_scale: Scale = 1.0
    schedule: RateSchedule = "constant"
    freeze_batch_norm: FreezeNorms = False


class FinetuneSection(Section):
    """Training of the clustered model, at a lower learning rate; the control trains as long.

    With ``labels: false`` only `cluster.inputs` unlabelled images are there, 512 by default: the
    model is clustered for the outputs that they give, and `torchclust.distill_` brings these back
    to the unclustered model's, 150 steps a block for each of `epochs`. The control is then the
    trained model itself.

    With a ``distillation_weight`` the clustered classifier learns what the control makes of an
    image, beside its label (Hinton et al., 2015; at a temperature of 2). The control does not.
    """

    epochs: int = Field(1, ge=0, description="passes over the training set")
    lr_scale: Scale = 0.1
    schedule: RateSchedule = "constant"
    freeze_batch_norm: FreezeNorms = False
    quantize_activations: bool = Field(False, description="fake-quantize activations meanwhile")
    labels: bool = Field(True, description="false: a few images and the unclustered model")
    distillation_weight: float = Field(
        0.0, ge=0, le=1, description="of the control's outputs in the loss; labels have the rest"
    )


class ExportSection(Section):
    """int8 TFLite files, clustered and not, and float ones."""

    calibration_samples: int = Field(200, ge=1, description="training images that set the ranges")


class VelaSection(Section):
    """What the Vela compiler makes of both int8 files; None: its default for the accelerator."""

    accelerator: str = Field("ethos-u55-128", description="ethos-u55-32 ... ethos-u85-2048")
    system_config: str | None = Field(None, description="clocks and memories")
    memory_mode: str | None = Field(None, description="where weights and activations live")
    config: AnyPath | None = Field(None, description="a chip vendor's vela.ini that has both")


class TflmSection(Section):
    """Lookup tables for tflite-micro, on chips without an NPU: tflm.tflite beside int8.tflite."""

    max_arena: int | None = Field(None, ge=1, description="most bytes of working memory")


class PackSection(Section):
    """model.packed with biases and norms rounded; absent: it has every value to the bit.

    The report has the metric of the network in it. The other files are not rounded.
    """

    mantissa_bits: int | None = Field(
        None, ge=2, le=24, description="significant bits; left out: as few as int8's error hides"
    )


class ExecuTorchSection(Section):
    """ExecuTorch programs (.pte) for Ethos-U, clustered and not; in an environment of its own."""

    target: str = Field("ethos-u55-128", description="ethos-u55-32 ... ethos-u85-2048")
    system_config: str | None = Field(None, description="clocks and memories, as vela's")
    memory_mode: str | None = Field(None, description="where weights and activations live")

    @property
    def options(self) -> dict[str, Any]:
        """What `to_pte` takes besides model, inputs and calibration."""
        return self.model_dump(exclude_none=True)


class Recipe(Section):
    """All sections of a recipe, in the order in which they run."""

    name: str = Field(pattern=r"^[\w.-]+$", description="also the folder's: runs/NAME")
    seed: int = Field(0, ge=0, description="of weights, order of images, and clustering")
    folder: str | None = Field(None, description="where targets are; default: the recipe's own")
    data: DataSection
    model: ModelSection | None = None
    module: ModuleSection | None = None
    metric: MetricSection | None = None
    score: str | None = Field(None, description="module.function(module, loader) -> number")
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="arguments of Lightning's Trainer"
    )
    train: TrainSection | None = None
    prune: PruneSection | None = None
    cluster: ClusterSection | None = None
    finetune: FinetuneSection | None = None
    export: ExportSection | None = None
    vela: VelaSection | None = None
    tflm: TflmSection | None = None
    executorch: ExecuTorchSection | None = None
    pack: PackSection | None = None

    @field_validator("folder")
    @classmethod
    def _from_anywhere(cls, folder: str) -> str:
        return os.path.abspath(folder)

    @field_validator("data", "model", "metric", mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _subject_is_whole(self) -> Recipe:
        if (self.model is None) == (self.module is None):
            raise ValueError("give either model (a classifier) or module (a LightningModule)")
        if self.module is None:
            for key in ("metric", "score"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} goes with module: a model is judged by its accuracy")
            if self.data.name is None:
                raise ValueError(
                    "data.target goes with module: a model classifies one of the named data sets"
                )
            return self
        if self.metric is None and self.score is None:
            raise ValueError(
                "nothing says how good the module is: add metric: {name: test_acc, mode: max} "
                "(what its test_step logs), or score: mymodule.function"
            )
        if self.train is not None and "lr" in self.train.model_fields_set:
            raise ValueError("train.lr: the module's own optimizers have their rates; leave it out")
        for name, section in (("prune", self.prune), ("finetune", self.finetune)):
            if section is not None and section.schedule != "constant":
                raise ValueError(f"{name}.schedule: the module's configure_optimizers has its own")
        if self.finetune is not None and self.finetune.distillation_weight:
            raise ValueError(
                "finetune.distillation_weight: the module's training_step has a loss of its own; "
                "let that hold the teacher"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit_together(self) -> Recipe:
        named = self.model is not None and self.model.name is not None
        if self.train is None and self.subject.checkpoint is None and named:
            raise ValueError(
                "nothing trains the model: add train: {epochs: 6}, or model.checkpoint "
                "(train: {epochs: 0} keeps random weights)"
            )
        for section, needed in (("finetune", "cluster"), ("vela", "export"), ("tflm", "export")):
            if getattr(self, section) is not None and getattr(self, needed) is None:
                raise ValueError(f"{section} needs the section {needed}, which is absent")
        if not self.inputs and not self.labels:
            raise ValueError(
                "cluster.inputs: 0 leaves nothing to see where finetune.labels is false: give a "
                f"number of samples, or leave it out ({UNLABELLED})"
            )
        if not self.labels and self.finetune and self.finetune.distillation_weight:
            raise ValueError(
                "finetune.distillation_weight goes with labels: without them all of the loss is "
                "the unclustered model's outputs already"
            )
        if self.pack and not (self.cluster or self.prune):
            raise ValueError("pack needs the section cluster or prune: a packed file holds either")
        needs_labels = self.cluster and self.cluster.max_accuracy_drop is not None
        if needs_labels and not self.labels:
            raise ValueError(
                "cluster.max_accuracy_drop needs labels: give cluster.budget instead, or leave "
                "finetune.labels: false out"
            )
        if self.prune and self.cluster and not self.cluster.preserve_sparsity:
            raise ValueError(
                "prune needs cluster.preserve_sparsity: true, or clustering undoes its zeros"
            )
        return self

    @property
    def subject(self) -> ModelSection | ModuleSection:
        """What is trained: the section `model` or `module`."""
        subject = self.model if self.module is None else self.module
        assert subject is not None
        return subject

    @property
    def labels(self) -> bool:
        """Whether there are labels once the model is trained."""
        return self.finetune is None or self.finetune.labels

    @property
    def inputs(self) -> int:
        """How many samples clustering sees; 0: weights alone."""
        given = self.cluster.inputs if self.cluster else None
        return (0 if self.labels else UNLABELLED) if given is None else given

    @property
    def lr(self) -> float:
        """The learning rate that `finetune.lr_scale` scales."""
        return self.train.lr if self.train else 1e-3

    def sections(self, *names: str) -> dict[str, Any]:
        """What `to_dict` has of these sections; None for one that is absent."""
        dumped = self.to_dict()
        return {name: dumped.get(name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Every key that is set, defaults included, in JSON's types; `Recipe` of it is the same.

        Without those defaults that are not the recipe's to give: a module has its own rates, and a
        target its own batch size.
        """
        theirs: dict[str, set[str]] = {}
        if self.module is not None:
            theirs["train"] = {"lr"}
        if self.data.target is not None:
            theirs["data"] = {"batch_size"} - self.data.model_fields_set
        dumped = self.model_dump(mode="json", exclude_none=True, exclude=theirs)
        nulls = {key: None for key, value in self.subject.arguments.items() if value is None}
        dumped["model" if self.module is None else "module"] |= nulls  # arguments that were given
        return dumped
