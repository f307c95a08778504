"""The recipe: a YAML file that says what `torchclust run` does, read into a frozen, checked value.

This module knows the file's shape and nothing of torch models, data or training;
`torchclust.recipes.run` acts on the value. A section that is absent (or null) is a stage that is
not run. Unknown keys are errors that name the nearest valid one, and so are values of the wrong
type: ``"6"`` is no epoch count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from torchclust.recipes.section import AnyPath, Section, known_keys
from torchclust.recipes.section import RecipeError as RecipeError
from torchclust.recipes.section import nearest as nearest
from torchclust.recipes.subject import DataSection as DataSection
from torchclust.recipes.subject import MetricSection
from torchclust.recipes.subject import ModelSection as ModelSection
from torchclust.recipes.subject import ModuleSection as ModuleSection
from torchclust.weight.config import (
    Assignment,
    ClusterConfig,
    CodebookDtype,
    Gradient,
    Granularity,
    Init,
)

UNLABELLED = 512  # samples that ``finetune.labels: false`` sees, unless `cluster.inputs` says
Schedule = Literal["constant", "cosine"]  # of the learning rate; cosine falls to 0


class TrainSection(Section):
    """Ordinary training, before compression; absent: the model comes trained.

    With Adam, or with a `module`'s own optimizers, which then have their own rates.
    """

    epochs: int = Field(ge=0, description="passes over the training set; 0 keeps random weights")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")


class PruneSection(Section):
    """Magnitude pruning, with a schedule that rises to `sparsity` over `epochs`."""

    sparsity: float = Field(gt=0, lt=1, description="share of each weight tensor set to zero")
    epochs: int = Field(1, ge=1, description="passes over the training set while pruning")


class ClusterSection(Section):
    """ClusterConfig's fields for every clusterable weight, then `rules` for some of them.

    With `budget` or `max_accuracy_drop` in the place of `n_clusters`, every tensor gets the number
    of its own that is best for the whole (`torchclust.recipes.choice`); those that `rules` give one
    keep it. With `n_clusters` a `budget` stands in the place of `rate`.
    """

    n_clusters: int = Field(16, description="most distinct values per codebook, 2 to 256")
    codebook_dtype: CodebookDtype = Field("float32", description="int8: the codes of the file")
    init: Init = Field("optimal", description="how a codebook is fitted")
    max_iter: int = Field(300, description="k-means steps after the seeds")
    granularity: Granularity = Field("tensor", description="what shares one codebook")
    group_size: int | None = Field(None, description="output channels per codebook, for group")
    assignment: Assignment = Field("fixed", description="nearest: weights train and move cluster")
    gradient: Gradient = Field("sum", description="how member gradients reach their centroid")
    preserve_sparsity: bool = Field(False, description="zeros stay exactly zero")
    rate: float = Field(0.0, ge=0, description="what a bit costs: fewer bytes for more error")
    rules: dict[str, Any] = Field(
        default_factory=dict,
        description="pattern of parameter names, or class name -> int, fields, or null",
    )
    budget: float | None = Field(
        None, gt=0, description="KiB for all encoded weights; chooses rate, or all n_clusters"
    )
    max_accuracy_drop: float | None = Field(
        None, gt=0, description="points; chooses the smallest n_clusters that keep within it"
    )
    inputs: int | None = Field(
        None, ge=0, description="training samples whose outputs clustering keeps; null: none"
    )

    @property
    def chooses(self) -> bool:
        """Whether numbers of clusters, or a price, are to be chosen."""
        return self.budget is not None or self.max_accuracy_drop is not None

    @property
    def prices(self) -> bool:
        """Whether the price of a bit is to be chosen."""
        return self.budget is not None and "n_clusters" in self.model_fields_set

    @property
    def in_short(self) -> str:
        """What was chosen, where something is to be chosen."""
        rules = [f"{name} {rule}" for name, rule in self.rules.items()]
        return ", ".join([f"rate {self.rate:.4g}"] * (self.rate > 0) + rules)

    def at(self, rate: float) -> ClusterSection:
        """Return the section at this price, with nothing left to choose."""
        return self.model_copy(update={"budget": None, "rate": rate})

    def with_rules(self, rules: Mapping[str, Any]) -> ClusterSection:
        """Return the section with these rules added and nothing left to choose."""
        fields = {"budget": None, "max_accuracy_drop": None, "rules": {**self.rules, **rules}}
        return self.model_copy(update=fields)

    @property
    def options(self) -> dict[str, Any]:
        """ClusterConfig's fields but for `n_clusters`, as `cluster_` takes them."""
        return {f.name: getattr(self, f.name) for f in _CONFIG_FIELDS if f.name != "n_clusters"}

    @property
    def all_rules(self) -> dict[str, Any]:
        """`n_clusters` for everything, then `rules`: the second argument of `cluster_`."""
        return {"*": self.n_clusters, **{p: self._inheriting(r) for p, r in self.rules.items()}}

    def _inheriting(self, rule: Any) -> Any:
        """Return a rule with the section's `n_clusters`, where it gives other fields only."""
        return {"n_clusters": self.n_clusters, **rule} if isinstance(rule, Mapping) else rule

    @model_serializer(mode="wrap")
    def _without_what_is_chosen(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        if self.chooses and not self.prices:
            fields.pop("n_clusters")
            if "codebook_dtype" not in self.model_fields_set:  # then it may be chosen, too
                fields.pop("codebook_dtype")
        return fields

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        """Let ``--set cluster.n_clusters=null`` make room for a budget."""
        if isinstance(value, Mapping) and value.get("n_clusters", 0) is None:
            return {key: given for key, given in value.items() if key != "n_clusters"}
        return value

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> ClusterSection:
        if self.budget is not None and self.max_accuracy_drop is not None:
            raise ValueError(
                f"give either budget ({self.budget:g}) or max_accuracy_drop "
                f"({self.max_accuracy_drop:g}), not both"
            )
        if self.prices and self.rate:
            raise ValueError(
                f"budget chooses the rate where n_clusters is given: leave rate ({self.rate:g}) "
                "out, or n_clusters (--set cluster.n_clusters=null) to choose that"
            )
        if self.max_accuracy_drop is not None and "n_clusters" in self.model_fields_set:
            raise ValueError(
                "max_accuracy_drop chooses n_clusters for every tensor: leave n_clusters "
                f"({self.n_clusters}) out (--set cluster.n_clusters=null), or give single "
                "tensors theirs under rules"
            )
        return self

    @model_validator(mode="after")
    def _valid_configs(self) -> ClusterSection:
        ClusterConfig(n_clusters=self.n_clusters, **self.options)
        for pattern, rule in self.rules.items():
            if rule is None:
                continue
            if isinstance(rule, bool) or not isinstance(rule, int | Mapping):
                raise ValueError(
                    f"rule {pattern!r} is a number of clusters, a mapping or null, got {rule!r}"
                )
            fields = rule if isinstance(rule, Mapping) else {"n_clusters": rule}
            known_keys(fields, [f.name for f in _CONFIG_FIELDS], f"rules.{pattern}.")
            try:
                ClusterConfig(**{"n_clusters": self.n_clusters, **self.options, **fields})
            except (TypeError, ValueError) as error:
                raise ValueError(f"rule {pattern!r}: {error}") from None
        return self


class FinetuneSection(Section):
    """Training of the clustered model, at a lower learning rate; the control trains as long.

    With ``labels: false`` only `cluster.inputs` unlabelled images are there, 512 by default: the
    model is clustered for the outputs that they give, and `torchclust.distill_` brings these back
    to the unclustered model's, 150 steps a block for each of `epochs`. The control is then the
    trained model itself.
    """

    epochs: int = Field(1, ge=0, description="passes over the training set")
    lr_scale: float = Field(0.1, gt=0, description="times train.lr (1e-3 where that is absent)")
    schedule: Schedule = Field(
        "constant", description="of the rate: constant, or cosine, down to 0 over the epochs"
    )
    quantize_activations: bool = Field(False, description="fake-quantize activations meanwhile")
    labels: bool = Field(True, description="false: a few images and the unclustered model")


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
        if self.finetune is not None and self.finetune.schedule != "constant":
            raise ValueError("finetune.schedule: the module's configure_optimizers has its own")
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
        needs_labels = self.cluster and self.cluster.max_accuracy_drop is not None
        if needs_labels and self.finetune and not self.finetune.labels:
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

    def to_dict(self) -> dict[str, Any]:
        """Every key that is set, defaults included, in JSON's types; `Recipe` of it is the same."""
        return self.model_dump(mode="json", exclude_none=True)


_CONFIG_FIELDS = dataclasses.fields(ClusterConfig)
