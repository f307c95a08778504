"""Second moments of a layer's inputs, and the output error that they define for its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchclust.data_aware.compensation import Target
from torchclust.data_aware.shrinkage import covariances, doubt_of, shrunk, sizes_of

_DAMPING = 0.01  # of the mean diagonal, added to it: pulls towards the float weight
_CONSTANT = 1e-6  # of an input's mean square: a variance that float32 products make of nothing
_ROUNDING = 1e-3  # of the uncentred diagonal: more than centring can lose in float32 products
_TOGETHER = 16  # samples whose moments are compared with those of others, at most
_UNFOLDED = 1 << 24  # elements of unfolded input at a time: 64 MB in float32

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class InputMoments:
    """Means over the inputs of a layer in the float model (``x``) and in the clustered one (``z``).

    An input is one column: what a weight row is multiplied with. All float64.

    Attributes:
        x, z: `(groups, d)` means.
        zz, xz: `(groups, d, d)` mean products, not centred.
        doubt: `(2, groups)` the expected squared error of `zz`, not centred and centred, as that
            of few samples.
    """

    x: Tensor
    z: Tensor
    zz: Tensor
    xz: Tensor
    doubt: Tensor

    @classmethod
    def of(cls, module: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> InputMoments:
        """Take them from pairs ``(x, z)`` of inputs of a Linear or convolution, in blocks."""
        sums: list[Tensor] = []
        sizes: list[Tensor] = []
        count = 0
        for pair in _in_parts(module, pairs):
            for x, z in zip(*(columns(module, side) for side in pair), strict=True):
                n = x.shape[2]
                parts = [x.sum(2), z.sum(2), z @ z.mT, x @ z.mT]
                sizes.append(sizes_of(parts[2] / n, parts[1] / n))
                sums = sums or [torch.zeros_like(part, dtype=torch.float64) for part in parts]
                for total, part in zip(sums, parts, strict=True):
                    total += part
                count += n
        x, z, zz, xz = (total.div_(count) for total in sums)
        return cls(x, z, zz, xz, doubt_of(sizes_of(zz, z), sizes))

    def spread(self, centred: bool) -> Tensor:
        """`(groups, d)`: how much each input varies, or its mean square if not `centred`."""
        power = self.zz.diagonal(dim1=1, dim2=2)
        if not centred:
            return power
        variance = power - self.z.square()
        return torch.where(variance > _CONSTANT * power, variance, 0)

    def by_column(self, columns: Tensor, row_weight: Tensor, weight: Tensor) -> Tensor:
        """Importance of every weight, in its shape, from ``(groups, d)`` and ``(rows,)``."""
        rows = columns.repeat_interleave(len(weight) // len(self.x), 0)
        return (rows * row_weight.to(rows)[:, None]).view(weight.shape)

    def targets(
        self, weight: Tensor, row_weight: Tensor, *, centred: bool, anchor: Tensor
    ) -> list[Target]:
        """The output error of `weight` as a function of what replaces it, one target per group.

        Args:
            weight: the float weight, output channels first.
            row_weight: `(rows,)`, how much each output channel counts.
            centred: whether something behind the layer takes the mean error away.
            anchor: the weight to stay near where inputs do not say otherwise.
        """
        groups = len(self.x)
        rows, near = self._rows(weight), self._rows(anchor)
        zz, xz = self.zz, self.xz
        if centred:
            zz, xz = covariances(zz, self.z, self.z), covariances(xz, self.x, self.z)
        size = self._sizes(centred)
        unit = size[:, None, None]  # float32 cannot hold the square of every activation
        hessian, kept, added = shrunk(zz / unit, self.doubt[int(centred)] / size.square())
        damping = _enough_damping(hessian)
        diagonal = damping * torch.eye(zz.shape[1], dtype=zz.dtype, device=zz.device)
        pull = rows @ (kept * xz / unit) + (damping + added) * near
        weights = (size / size.mean()).repeat_interleave(len(weight) // groups).float()
        return [
            Target(h.float(), p.mT.float().contiguous(), w)
            for h, p, w in zip(
                hessian + diagonal, pull, (row_weight * weights).chunk(groups), strict=True
            )
        ]

    def scale(self, *, centred: bool) -> float:
        """The squared output error, per unit of what the `targets` count, at a row weight of 1."""
        return float(self._sizes(centred).mean())

    def _sizes(self, centred: bool) -> Tensor:
        """`(groups,)` mean squares of the inputs."""
        power = self.zz.diagonal(dim1=1, dim2=2)
        varying = power - self.z.square() if centred else power
        size = varying.mean(1) + _ROUNDING * power.mean(1)
        return torch.where(size > 0, size, 1)  # inputs that are all zero tell nothing

    def shift(self, clustered: Tensor, weight: Tensor) -> Tensor:
        """`(rows,)` by how much the mean output has grown."""
        return self.output(clustered, self.z) - self.output(weight, self.x)

    def output(self, weight: Tensor, inputs: Tensor) -> Tensor:
        """`(rows,)` float64 output for `(groups, d)` inputs, without a bias."""
        rows = self._rows(weight)
        return (rows @ inputs[:, :, None]).reshape(-1)

    def gain(self, clustered: Tensor, weight: Tensor) -> Tensor:
        """`(rows,)` factors that bring the output nearest to the float layer's; 1 where unclear."""
        new, old = self._rows(clustered), self._rows(weight)
        mean = self.output(clustered, self.z)
        power = (new @ self.zz * new).sum(2).reshape(-1) - mean.square()
        along = (old @ self.xz * new).sum(2).reshape(-1) - mean * self.output(weight, self.x)
        clear = (along > 0.1 * power) & (power > 0)
        return torch.where(clear, along / torch.where(clear, power, 1), 1)

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.detach().double().reshape(len(self.x), -1, self.x.shape[1])


def _in_parts(
    module: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut batches into equal parts, at least two of each, so that there are some to compare."""
    for x, z in pairs:
        if len(x) > 1 and not is_single(module, x):
            parts = min(len(x), max(2, -(-len(x) // _TOGETHER)))
            yield from zip(x.tensor_split(parts), z.tensor_split(parts), strict=True)
        else:
            yield x, z


def is_single(module: nn.Module, inputs: Tensor) -> bool:
    """Whether a Linear or convolution is given one sample without a batch's dimension."""
    if isinstance(module, CONVOLUTIONS):
        return inputs.dim() == len(module.kernel_size) + 1
    return inputs.dim() == 1


def columns(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """`(groups, d, n)` float32 columns of a Linear's or convolution's input, some at a time.

    `n` counts samples and their positions, one sample after the other.
    """
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        for part in rows.split(max(1, _UNFOLDED // rows.shape[1])):
            yield part.T[None]
        return
    assert isinstance(module, CONVOLUTIONS)
    batched = inputs[None] if is_single(module, inputs) else inputs
    per_sample = module.weight[0].numel() * module.groups * batched[0, 0].numel()
    for part in batched.split(max(1, _UNFOLDED // per_sample)):
        yield _unfolded(module, part.float())


def _unfolded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Every patch that the kernel sees, as the columns of a matrix; any number of dimensions."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode)
    spatial = len(module.kernel_size)
    steps = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for dim, (kernel, stride, dilation) in enumerate(steps, start=2):
        window = padded.unfold(dim, (kernel - 1) * dilation + 1, stride)
        padded = window[..., ::dilation]
    order = (1, *range(2 + spatial, 2 + 2 * spatial), 0, *range(2, 2 + spatial))
    return padded.permute(order).reshape(module.groups, module.weight[0].numel(), -1)


def _enough_damping(moments: Tensor) -> float:
    """What makes them positive definite: inputs that hardly vary leave little but rounding."""
    damping, identity = _DAMPING, torch.eye(moments.shape[1]).to(moments)
    while bool(torch.linalg.cholesky_ex(moments + damping * identity).info.any()):
        damping *= 10
    return damping
