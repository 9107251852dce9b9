"""How many parameters a configuration stands for, by arithmetic: no weights, no torch.

Every family here is counted tensor by tensor as its transformers class builds it, heads, biases and norms included.
A configuration of another family, or one that leaves out what its family needs, is None: whoever asks counts it on
torch's meta device instead (``counting``). Pure functions; any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

_MAX_COUNT = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters, shared ones once. ``linear``: in weights of linear layers, which quantization compresses; ``other``:
    tables, norms, biases, convolutions, stacked experts and the output head, which it leaves alone.
    """

    linear: int
    other: int

    @property
    def total(self) -> int:
        return self.linear + self.other


class Unsaid(Exception):
    """The configuration leaves out, or twists, what the arithmetic needs."""


class Shape:
    """Typed access to a configuration that is not to be trusted."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        architectures = config.get("architectures")
        self.architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""

    def size(self, *keys: str, default: int | None = None) -> int:
        """The first of ``keys`` that is set, a count; raises Unsaid where none is and there is no default."""
        for key in keys:
            value = self.config.get(key)
            if value is not None:
                if type(value) is not int or not 0 <= value <= _MAX_COUNT:
                    raise Unsaid(key)
                return value
        if default is None:
            raise Unsaid(keys[0])
        return default

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise Unsaid(key)
        return value

    def ends_with(self, *endings: str) -> bool:
        return self.architecture.endswith(endings)

    @property
    def num_labels(self) -> int:
        names = self.config.get("id2label")
        return len(names) if isinstance(names, dict) else self.size("num_labels", default=2)


class Tally:
    """Adds up what a model is built of."""

    def __init__(self) -> None:
        self.linear_weights = 0
        self.others = 0

    def linear(self, inputs: int, outputs: int, *, bias: bool = False, times: int = 1) -> None:
        """A linear layer."""
        self.linear_weights += times * inputs * outputs
        self.others += times * outputs * bias

    def other(self, *sizes: int, times: int = 1) -> None:
        """Tables, norms and whatever else is not a linear layer."""
        self.others += times * sum(sizes)

    def add(self, layer: Tally, times: int = 1) -> None:
        self.linear_weights += times * layer.linear_weights
        self.others += times * layer.others

    @property
    def count(self) -> ParameterCount:
        return ParameterCount(linear=self.linear_weights, other=self.others)


Counting: TypeAlias = Callable[[Shape], Tally]


def count_parameters_of(config: Mapping[str, Any]) -> ParameterCount | None:
    """The parameters of the class that ``config`` names first in ``architectures``; None where that is not known
    here.
    """
    counting = _families().get(str(config.get("model_type")))
    if counting is None:
        return None
    try:
        return counting(Shape(config)).count
    except Unsaid:
        return None


def _families() -> Mapping[str, Counting]:
    from slipstream_server.models.decoder_parameters import DECODERS
    from slipstream_server.models.encoder_parameters import ENCODERS
    from slipstream_server.models.seq2seq_parameters import SEQUENCE_TO_SEQUENCE

    return {**DECODERS, **ENCODERS, **SEQUENCE_TO_SEQUENCE}
