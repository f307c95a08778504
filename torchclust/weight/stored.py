"""What a clustered weight stores beside floats: its configuration and its indices.

Everything of a module is a tensor in its state dict, and tools that average models average all of
them. Equal floats have themselves as average; equal integers do not, since
``0.9999 * 5 + 0.0001 * 5`` is a little less than 5 and becomes 4. So the configuration is written
from its Python value, and indices carry a seal, by which an average is noticed and undone.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.fitting.threads import must_be_traceable
from torchclust.weight.config import ClusterConfig, config_as_bytes, config_from_bytes
from torchclust.weight.evaluation_cache import fingerprint

_SEAL_BITS = 32


class Stored(nn.Module):
    """A module with a configuration, and maybe with indices, that survive averaging.

    The seal is a checksum of the indices, its bits as floats: those no average of equal ones
    changes, and whatever sends buffers to other processes sends it along. A deep copy, which is
    what averages are kept in, remembers its source and takes the indices from there.
    """

    config: ClusterConfig

    def __init__(self) -> None:
        super().__init__()
        self._known: tuple[int, int] | None = None
        self._sealed: Tensor | None = None
        self._source: Tensor | None = None

    def seal_(self) -> None:
        """Take the indices as they are now for what they ought to be."""
        indices = self._buffers.get("indices")
        if indices is not None:
            self.register_buffer("seal", _seal(indices), persistent=False)
        self._sealed, self._known = indices, None

    def mend_(self) -> None:
        """Undo what averaging did to the indices since the last call.

        Raises:
            RuntimeError: they changed, and they are not to be had from the model that was copied.
        """
        indices, seal = self._sealed, self._buffers.get("seal")
        own = indices is not None and self._buffers.get("indices") is indices  # not functional_call
        if not own or seal is None or indices is None or must_be_traceable(indices):
            return
        now = indices.data_ptr(), 0 if indices.is_inference() else indices._version
        if now == self._known or indices.is_meta:
            return
        if not _agree(indices, seal):
            if self._source is None or not _agree(self._source, seal):
                raise RuntimeError(
                    f"the indices of a weight of shape {tuple(indices.shape)} were changed behind "
                    f"its back: the usual cause is an average of buffers, which truncates "
                    f"integers. Average parameters only:  AveragedModel(model, use_buffers=False)"
                )
            indices.copy_(self._source)
            now = indices.data_ptr(), 0 if indices.is_inference() else indices._version
        self._known = now

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None, "_source": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Stored:
        twin = self.__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(  # type: ignore[no-untyped-call]
            copy.deepcopy(self.__getstate__(), memo)
        )
        twin._source = self._buffers.get("indices")
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> Stored:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._sealed, self._known = self._buffers.get("indices"), None
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.mend_()
        written = self.get_buffer("config_json")
        if not (written.is_meta or must_be_traceable(written)):
            written.copy_(config_as_bytes(self.config))
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state = rounded(state_dict, prefix)
        try:
            config_from_bytes(state.get(prefix + "config_json", self.get_buffer("config_json")))
        except ValueError as error:
            args[-1].append(str(error))  # torch lists these, and raises
            return
        super()._load_from_state_dict(state, prefix, *args)
        self.seal_()


def rounded(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The state with the integers under a prefix as integers, where an average made them floats."""
    return {
        key: value.round().to(torch.uint8)
        if key in (prefix + "indices", prefix + "config_json") and value.is_floating_point()
        else value
        for key, value in state.items()
    }


def _seal(indices: Tensor) -> Tensor:
    if indices.is_meta or must_be_traceable(indices):
        return torch.zeros(_SEAL_BITS, dtype=torch.float32, device=indices.device)
    checksum = zlib.crc32(fingerprint(indices.cpu()))
    bits = [float(checksum >> bit & 1) for bit in range(_SEAL_BITS)]
    return torch.tensor(bits, dtype=torch.float32, device=indices.device)


def _agree(indices: Tensor, seal: Tensor) -> bool:
    """Whether these are the sealed indices; the seal may have been cast or averaged."""
    return torch.equal(_seal(indices).cpu(), seal.detach().cpu().float().round())
