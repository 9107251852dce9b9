"""How a client asks for a model to be held and served: the contract's ModelLoadOptions without protobuf.

What is unset is the service's choice. A value that no model could have is refused here; what depends on the model or
the machine is judged where those are known (``plans``). Pure; any thread.
"""

from __future__ import annotations

import msgspec

from slipstream_server.errors import InvalidField, UnsupportedField
from slipstream_server.models.load_options import LoadOptions

DATA_TYPES = ("float32", "bfloat16", "float16")
STORED_QUANTIZATIONS = ("gptq", "awq")
QUANTIZATIONS = ("none", "int8", "nf4", "fp4", *STORED_QUANTIZATIONS)
BALANCED = "balanced"

_RANGES: dict[str, tuple[float, float]] = {
    "context_tokens": (1, 2**53),
    "max_running_sequences": (1, 1024),
    "adapter_slot_count": (0, 256),
    "max_adapter_rank": (1, 1024),
    "tensor_parallel_count": (1, 1024),
}


class LoadChoice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Empty or None: not chosen. Raises InvalidField or UnsupportedField from ``check``."""

    data_type: str = ""
    quantization: str = ""
    double_quantization: bool = False
    device: str = ""
    attention_implementation: str = ""
    batching: str = ""
    context_tokens: int | None = None
    max_running_sequences: int | None = None
    memory_fraction: float | None = None
    adapter_slot_count: int | None = None
    max_adapter_rank: int | None = None
    tensor_parallel_count: int | None = None
    prefix_caching: bool | None = None
    batch_invariant: bool = False

    def check(self) -> None:
        """Refuse what no model could have, and what this build cannot do."""
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InvalidField.of(f"options.{name}", f"{value} is not from {least} to {most}")
        fraction = self.memory_fraction
        if fraction is not None and not 0 < fraction <= 1:
            raise InvalidField.of("options.memory_fraction", f"{fraction} is not above 0 and at most 1")
        if self.double_quantization and self.quantization not in ("nf4", "fp4"):
            raise InvalidField.of("options.double_quantization", "is for QUANTIZATION_NF4 and QUANTIZATION_FP4 only")
        if self.data_type and self.data_type not in DATA_TYPES:
            raise UnsupportedField.of(
                "options.data_type", f"{self.data_type} cannot be asked for; allowed: {', '.join(DATA_TYPES)}"
            )
        if (self.tensor_parallel_count or 1) > 1:
            raise UnsupportedField.of("options.tensor_parallel_count", "more than 1 is not built yet")
        if self.batch_invariant:
            raise UnsupportedField.of("options.batch_invariant", "no batcher of this build promises it")
        self._check_words()

    def _check_words(self) -> None:
        """The texts that go to the loader: its own rules, with this message's field names."""
        try:
            LoadOptions(device="auto" if self.device in ("", BALANCED) else self.device)
        except InvalidField as error:
            raise InvalidField.of("options.device", error.violations[0].description + f", {BALANCED}") from None
        try:
            LoadOptions(attn_implementation=self.attention_implementation or "auto")
        except InvalidField as error:
            raise InvalidField.of("options.attention_implementation", error.violations[0].description) from None

    def encoded(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def decoded(cls, text: str) -> LoadChoice:
        return msgspec.json.decode(text, type=cls)
