"""What a model would take if it were loaded, from its configuration alone, and how else it could be held.

Counts as ``footprint`` does, which decides whether a load is let in, and tells the parts. Free of torch, but for
families that only a subprocess can count. Event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from slipstream_server.errors import InvalidField
from slipstream_server.inference.footprint import cached_tokens, dtype_of, footprint, memory_of
from slipstream_server.inference.load_choice import STORED_QUANTIZATIONS, LoadChoice
from slipstream_server.inference.plans import ServingDefaults, held_quantization, plan_of
from slipstream_server.inference.served_model import ModelPlan
from slipstream_server.models.configurations import FoundConfiguration
from slipstream_server.models.counting import count_parameters_anywhere
from slipstream_server.models.devices import CPU
from slipstream_server.models.estimate import DTYPE_BYTES
from slipstream_server.models.facts import Family, ModelFacts, facts_of_config, read_facts
from slipstream_server.models.sources import PreparedModel

LeftBytes = Callable[[str], int | None]
"""What is left of a device for another model; None where nobody knows."""

_MAX_COUNTS = 2
_NOWHERE = Path("not-fetched")
_HELD_OTHERWISE = (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8"), ("bfloat16", "nf4"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """The same model held otherwise."""

    choice: LoadChoice
    total_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAdvice:
    """Bytes by what they hold; ``total_bytes`` is their sum. ``choice`` has every option filled in."""

    weights_bytes: int
    kv_cache_bytes: int
    kv_cache_bytes_per_token: int
    adapter_bytes: int
    overhead_bytes: int
    available_bytes: int
    device: str
    choice: LoadChoice
    num_parameters: int
    download_bytes: int
    alternatives: tuple[Alternative, ...] = ()

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.adapter_bytes + self.overhead_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.available_bytes


class MemoryAdviser:
    """Advises for one machine: its devices, what is left of them, and the operator's own choices."""

    def __init__(self, defaults: ServingDefaults, capacity: Mapping[str, int], left_bytes: LeftBytes) -> None:
        batching = "auto" if defaults.batching == "null" else defaults.batching
        self._defaults = replace(defaults, batching=batching)
        self._capacity = capacity
        self._left_bytes = left_bytes
        self._counts = asyncio.Semaphore(_MAX_COUNTS)

    async def advise(self, found: FoundConfiguration, choice: LoadChoice) -> MemoryAdvice:
        """The estimate and its alternatives. Raises InvalidField, UnsupportedField or ModelLoadFailed."""
        choice.check()
        facts = await self.facts(found)
        advice = self.estimate(found.name, facts, choice)
        alternatives = self._alternatives(found.name, facts, choice, advice)
        download_bytes = 0 if found.is_local else _download_bytes(found, facts)
        return replace(advice, alternatives=alternatives, download_bytes=download_bytes)

    async def facts(self, found: FoundConfiguration) -> ModelFacts:
        """What the model will be: from its stored weights where they are here, else counted from its configuration."""
        if found.is_local and found.folder is not None:
            return await asyncio.to_thread(read_facts, found.folder)
        config = {"dtype": found.entry.dtype, **found.config} if found.entry is not None else found.config
        facts = facts_of_config(config)
        if facts.is_quantized:
            raise InvalidField.of("source", "is quantized in advance; its memory is known only once it is fetched")
        async with self._counts:
            counted = await count_parameters_anywhere(config)
        return replace(facts, num_parameters=counted.total)

    def estimate(self, name: str, facts: ModelFacts, choice: LoadChoice) -> MemoryAdvice:
        """The estimate for one way to hold the model."""
        plan = self._plan(name, facts, choice)
        load = plan.worker.load
        # A device that is not here can be asked about all the same; nothing is available on it.
        elsewhere = {load.device if ":" in load.device else f"{load.device}:0": 0}
        held = footprint(plan, self._capacity) or footprint(plan, elsewhere)
        device = next(iter(held))
        parts = memory_of(plan)
        kv_bytes = parts.kv_bytes_per_token * cached_tokens(plan)
        available = self._left_bytes(device) if device in self._capacity else 0
        return MemoryAdvice(
            weights_bytes=parts.weight_bytes,
            kv_cache_bytes=kv_bytes,
            kv_cache_bytes_per_token=parts.kv_bytes_per_token,
            adapter_bytes=_adapter_bytes(plan, choice),
            overhead_bytes=sum(held.values()) - parts.weight_bytes - kv_bytes,
            available_bytes=max(0, available) if available is not None else self._capacity.get(device, 0),
            device=device,
            choice=_filled_in(plan, choice, device),
            num_parameters=facts.num_parameters,
            download_bytes=0,
        )

    def _plan(self, name: str, facts: ModelFacts, choice: LoadChoice) -> ModelPlan:
        prepared = PreparedModel(name=name, folder=_NOWHERE, source=name, revision="")
        return plan_of(name, name, prepared, facts, choice, self._defaults)

    def _alternatives(
        self, name: str, facts: ModelFacts, choice: LoadChoice, advice: MemoryAdvice
    ) -> tuple[Alternative, ...]:
        """Every other usual way to hold it, smallest last; none for weights that are stored quantized."""
        if facts.is_quantized or choice.quantization in STORED_QUANTIZATIONS:
            return ()
        found = []
        for data_type, quantization in _HELD_OTHERWISE:
            other = _held_as(choice, data_type, quantization)
            if _same_way(other, advice.choice):
                continue
            held = self.estimate(name, facts, other)
            found.append(Alternative(choice=other, total_bytes=held.total_bytes, fits=held.fits))
        return tuple(sorted(found, key=lambda alternative: -alternative.total_bytes))


def _held_as(choice: LoadChoice, data_type: str, quantization: str) -> LoadChoice:
    """The same options with the weights held otherwise."""
    return msgspec.structs.replace(choice, data_type=data_type, quantization=quantization, double_quantization=False)


def _same_way(left: LoadChoice, right: LoadChoice) -> bool:
    names = ("data_type", "quantization", "double_quantization")
    return all(getattr(left, name) == getattr(right, name) for name in names)


def _adapter_bytes(plan: ModelPlan, choice: LoadChoice) -> int:
    """Slots over every linear layer, where slots are asked for: they are made when the first adapter comes."""
    if choice.adapter_slot_count is None and choice.max_adapter_rank is None:
        return 0
    worker, facts = plan.worker, plan.facts
    hidden, heads, dim = facts.hidden_size or 0, facts.num_heads or 0, facts.head_dim or 0
    kv_width = (facts.num_kv_heads or 0) * dim
    attention = 2 * (hidden + heads * dim) + 2 * (hidden + kv_width)
    feed_forward = (3 if facts.family is Family.DECODER else 2) * (hidden + (facts.intermediate_size or 0))
    num_elements = worker.adapter_slots * worker.max_adapter_rank * (facts.num_layers or 0) * (attention + feed_forward)
    return num_elements * DTYPE_BYTES[dtype_of(plan)]


def _filled_in(plan: ModelPlan, choice: LoadChoice, device: str) -> LoadChoice:
    worker, facts = plan.worker, plan.facts
    return LoadChoice(
        data_type=dtype_of(plan),
        quantization=held_quantization(plan),
        double_quantization=worker.load.double_quantization,
        device=choice.device or device,
        attention_implementation=choice.attention_implementation,
        batching=worker.engine if facts.is_generative else "",
        context_tokens=plan.max_context_tokens or facts.context_tokens,
        max_running_sequences=worker.max_batch_size,
        memory_fraction=choice.memory_fraction,
        adapter_slot_count=worker.adapter_slots,
        max_adapter_rank=worker.max_adapter_rank,
        tensor_parallel_count=1,
        prefix_caching=choice.prefix_caching,
    )


def _download_bytes(found: FoundConfiguration, facts: ModelFacts) -> int:
    if found.entry is not None:
        return found.entry.size_bytes
    return facts.num_parameters * DTYPE_BYTES[facts.dtype]


def default_device(capacity: Mapping[str, int]) -> str:
    """Where a model is put whose load names no device."""
    return next((name for name in capacity if name != CPU), CPU)
