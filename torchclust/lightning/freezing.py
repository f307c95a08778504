"""Keeping parts of a model constant while the rest trains, and giving them back."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from torchclust.model.slots import parameters_matching


class Freezer:
    """What some patterns name, and what of it is frozen at present.

    A pattern is one of `torchclust.cluster_`'s rules: a glob over parameter names or a module class
    name. It reaches running statistics by their names too (``stem.*`` reaches
    ``stem.bn.running_mean``), and a norm layer whose statistics are frozen normalises with them, as
    in evaluation: otherwise a frozen layer's output would still change from batch to batch.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)
        self._parameters: list[nn.Parameter] = []
        self._norms: list[nn.Module] = []

    def freeze_parameters_(self, model: nn.Module) -> None:
        """Stop the training of the parameters named; before the optimizers are built.

        Raises:
            ValueError: a pattern reaches nothing.
        """
        for pattern in self.patterns:
            found = parameters_matching(model, pattern)
            if not found and not list(_norms_matching(model, pattern)):
                raise ValueError(
                    f"freeze pattern {pattern!r} matches no parameter and no module class "
                    f"(a pattern is a glob over parameter names, such as 'stem.*', or a class name)"
                )
            for parameter in found:
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._parameters.append(parameter)
                    parameter.grad = None  # an optimizer would still apply it

    def freeze_norms_(self, model: nn.Module) -> None:
        """Keep the running statistics named; once training mode is set."""
        for pattern in self.patterns:
            for norm in _norms_matching(model, pattern):
                if norm.training:
                    self._norms.append(norm.eval())

    def release(self) -> None:
        """Let everything train again that trained before."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for norm in self._norms:
            norm.train()
        self._parameters, self._norms = [], []


def _norms_matching(model: nn.Module, pattern: str) -> Iterator[nn.Module]:
    for path, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            statistics = f"{path}.running_mean".lstrip(".")
            classes = [cls.__name__ for cls in type(module).__mro__]
            if pattern in classes or fnmatch.fnmatchcase(statistics, pattern):
                yield module
