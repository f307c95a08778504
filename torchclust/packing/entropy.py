"""Entropy coding of a packed tensor's symbols: a frequency table, and constriction's ANS coder.

Symbols are 0..k-1 in order of falling frequency. That order makes the table cheap: a symbol's
frequency is `_STEPS` steps to the octave below its predecessor's, the drops written in unary, so
the table costs ``k`` bits and ``_STEPS`` for each octave between the most and the least frequent
symbol. Rounding to an eighth of an octave costs about 0.0005 bits a symbol.

Everything from table to frequencies is integer arithmetic, so a file means the same on every
machine and for ever; ``docs/packed-format.md`` gives the decoder in twenty lines.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Symbols = npt.NDArray[np.int32]
Integers = npt.NDArray[np.int64]

MAX_SYMBOLS = 1 << 16
TOTAL = 1 << 24
_STEPS = 8
_MAX_DROP = 24 * _STEPS - 1
_MANTISSAS = np.array(
    [16777216, 15384775, 14107901, 12937002, 11863283, 10878679, 9975792, 9147842], np.int64
)
"""2^24 / 2^(j/8), rounded."""

_PROBE = np.array([0, 2, 1, 0, 0, 1, 2, 2, 0, 1, 0, 0, 2, 1, 1, 0] * 4, np.int32)
_PROBE_FREQUENCIES = np.array([9000001, 7000002, 777213])
_PROBE_WORDS = [3782538636, 3609843465, 158078276, 3897407931, 24925]


def entropy(counts: Integers) -> float:
    """Bits per symbol of an empirical distribution; 0.0 for none."""
    share = counts[counts > 0] / max(1, int(counts.sum()))
    return float(-(share * np.log2(share)).sum()) + 0.0  # -0.0 for a single symbol


def quantize(counts: Integers) -> Integers:
    """How many steps each symbol's frequency lies below the first one's.

    Args:
        counts: ``(k,)``, falling, each at least 1.

    Returns:
        ``(k,)`` rising from 0 to at most 191.
    """
    drops: Integers = np.rint(_STEPS * np.log2(counts[0] / counts)).astype(np.int64)
    return drops.clip(max=_MAX_DROP)


def weights(drops: Integers) -> Integers:
    """What frequencies are proportional to."""
    found: Integers = _MANTISSAS[drops % _STEPS] >> (drops // _STEPS)
    return found


def frequencies(drops: Integers) -> Integers:
    """Frequencies out of 2^24, each at least 1 and exactly 2^24 together."""
    relative = weights(drops)
    found: Integers = 1 + relative * (TOTAL - len(drops)) // relative.sum()
    found[0] += TOTAL - found.sum()
    return found


def write_drops(drops: Integers) -> bytes:
    """Unary: for every symbol but the first a 0 for each step down, then a 1; low bits first."""
    ones = drops[1:] + np.arange(len(drops) - 1)
    bits = np.zeros(ones[-1] + 1 if len(ones) else 0, np.uint8)
    bits[ones] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def read_drops(encoded: bytes, n_symbols: int) -> tuple[Integers, int]:
    """The reverse of `write_drops`, from the beginning of some bytes; and how many it took.

    Raises:
        ValueError: if the bits begin with no table of ``n_symbols``.
    """
    longest = (n_symbols + _MAX_DROP) // 8 + 1
    bits = np.unpackbits(np.frombuffer(encoded[:longest], np.uint8), bitorder="little")
    ones = np.flatnonzero(bits)[: n_symbols - 1]
    length = int(ones[-1]) // 8 + 1 if len(ones) else 0
    if len(ones) != n_symbols - 1 or (length and bits[ones[-1] + 1 : 8 * length].any()):
        raise ValueError(f"its frequency table is not one of {n_symbols} symbols")
    drops = np.concatenate([[0], ones - np.arange(len(ones))]).astype(np.int64)
    if drops[-1] > _MAX_DROP:
        raise ValueError(f"its frequency table falls by {drops[-1]} steps, at most {_MAX_DROP}")
    return drops, length


def model_of(found: Integers) -> Any:
    """What the coder takes for these frequencies; None of one symbol, which it need not code."""
    return _model(found) if len(found) > 1 else None


def encode(parts: Iterable[tuple[Symbols, Any]]) -> npt.NDArray[np.uint32]:
    """Code symbols with their `model_of`, **the last part first** (the coder is a stack).

    Returns:
        The coder's 32-bit words: none where there is but one symbol, or one message of it.
    """
    coder = constriction().stream.stack.AnsCoder()
    for symbols, model in parts:
        if model is not None:
            coder.encode_reverse(symbols, model)
    words: npt.NDArray[np.uint32] = coder.get_compressed()
    return words


class Decoder:
    """Takes symbols out of a coded message, the first one first.

    Raises:
        ValueError: if no message ends in these words.
    """

    def __init__(self, words: npt.NDArray[np.uint32]) -> None:
        self._coder = constriction().stream.stack.AnsCoder(words)

    def take(self, n: int, model: Any) -> Symbols:
        """The next ``n`` symbols of this `model_of`; any words decode to some: see `finish`."""
        if model is None:
            return np.zeros(n, np.int32)
        symbols: Symbols = self._coder.decode(model, n)
        return symbols

    def finish(self) -> None:
        """Check that the message ends here.

        Raises:
            ValueError: if it does not.
        """
        if not self._coder.is_empty():
            raise ValueError("its coded indices do not end with its last weight")


@functools.cache
def constriction() -> Any:
    """The entropy coder's module, checked once to code as the format says.

    Raises:
        ImportError: naming the install command.
    """
    try:
        module = importlib.import_module("constriction")
    except ImportError as error:
        raise ImportError(
            'packed files are entropy-coded with constriction:  pip install "torchclust[recipes]"'
        ) from error
    coder = module.stream.stack.AnsCoder()
    coder.encode_reverse(_PROBE, _model(_PROBE_FREQUENCIES, module))
    if coder.get_compressed().tolist() != _PROBE_WORDS:
        raise ImportError(
            "this release of constriction codes differently from what packed files hold:  "
            "pip install 'constriction>=0.5,<0.6'"
        )
    return module


def _model(found: Integers, module: Any = None) -> Any:
    """The categorical model with exactly these frequencies.

    constriction takes floating weights, gives every symbol 1 and shares out the rest by them.
    Weights that are whole and make up that rest are therefore kept as they are.
    """
    weights = (found - 1).astype(np.float64)
    return (module or constriction()).stream.model.Categorical(weights, perfect=False)
