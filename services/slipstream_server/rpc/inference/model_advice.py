"""EstimateModelMemory and RecommendModels: what a model would take, and which to take. Event loop; no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import grpc

from slipstream.inference.v1 import model_service_pb2 as pb2
from slipstream_server.errors import CorruptArtifact, InvalidField
from slipstream_server.inference.load_choice import LoadChoice
from slipstream_server.inference.memory_advice import MemoryAdvice, MemoryAdviser, default_device
from slipstream_server.inference.recommendation import Need, Recommendation, recommend
from slipstream_server.models.cache import ModelCache
from slipstream_server.models.catalogue import CatalogueEntry
from slipstream_server.models.configurations import Configurations
from slipstream_server.models.facts import ModelFacts, facts_of_config
from slipstream_server.models.sources import SourceOptions
from slipstream_server.rpc.inference.model_convert import catalogue_entry_message, load_choice, load_options_message
from slipstream_server.tasks.registry import find_task

Context = grpc.aio.ServicerContext[Any, Any]

_MAX_RESULTS, _USUAL_RESULTS = 50, 5
_MAX_NAMES = 100
_MAX_BYTES = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviceRooms:
    """What the advice is made from. ``left_bytes``: what is left of a device for another model."""

    configurations: Configurations
    adviser: MemoryAdviser
    options: SourceOptions
    capacity: Mapping[str, int]
    left_bytes: Callable[[str], int | None]


class ModelAdvice:
    """The methods that advise; a part of ``ModelServicer``, which gives it ``_advice``."""

    _advice: AdviceRooms

    async def EstimateModelMemory(
        self, request: pb2.EstimateModelMemoryRequest, context: Context
    ) -> pb2.EstimateModelMemoryResponse:
        if not request.source:
            raise InvalidField.of("source", "is required: a model, a catalogue entry or a hub id")
        choice = load_choice(request.options)
        choice.check()
        rooms = self._advice
        found = await asyncio.to_thread(
            rooms.configurations.find, request.source, "source", request.revision, shape_only=True
        )
        advice = await rooms.adviser.advise(found, choice)
        if advice.total_bytes > _MAX_BYTES:
            raise CorruptArtifact(f"config.json: {request.source[:100]!r} describes a model of more than 2^63 bytes")
        return _estimate_message(advice)

    async def RecommendModels(
        self, request: pb2.RecommendModelsRequest, context: Context
    ) -> pb2.RecommendModelsResponse:
        rooms = self._advice
        need = self._need(request)
        count = _page_size(request.page_size)
        cache = ModelCache(rooms.options.cache_root)
        found = await asyncio.to_thread(
            recommend,
            rooms.options.catalogue.entries.values(),
            need,
            self._estimate_entry,
            lambda entry: cache.recall(entry.name) is not None,
        )
        return pb2.RecommendModelsResponse(recommendations=[_recommendation_message(one) for one in found[:count]])

    def _need(self, request: pb2.RecommendModelsRequest) -> Need:
        rooms = self._advice
        for name in ("memory_bytes", "min_context_tokens"):
            if getattr(request, name) < 0:
                raise InvalidField.of(name, f"{getattr(request, name)} is negative")
        task = find_task(request.task)
        device = default_device(rooms.capacity)
        left = rooms.left_bytes(device)
        free = max(0, left) if left is not None else rooms.capacity.get(device, 0)
        return Need(
            task=task.spec.id,
            memory_bytes=request.memory_bytes or free,
            device=device,
            licences=frozenset(_names(request.licences, "licences")),
            languages=frozenset((*_names(request.languages, "languages"), *(task.languages or ()))),
            min_context_tokens=request.min_context_tokens,
            local_only=request.local_only,
        )

    def _estimate_entry(self, entry: CatalogueEntry, choice: LoadChoice) -> MemoryAdvice:
        return self._advice.adviser.estimate(entry.name, _entry_facts(entry), choice)


def _entry_facts(entry: CatalogueEntry) -> ModelFacts:
    """What the catalogue tells of a model: its shape where it has the configuration, its size in any case."""
    facts = facts_of_config({"dtype": entry.dtype, **entry.config})
    return replace(facts, num_parameters=entry.num_parameters)


def _names(names: Any, field_name: str) -> list[str]:
    if len(names) > _MAX_NAMES or any(not 0 < len(name) <= _MAX_NAMES for name in names):
        raise InvalidField.of(field_name, f"at most {_MAX_NAMES} names of 1 to {_MAX_NAMES} characters are taken")
    return list(names)


def _page_size(asked: int) -> int:
    if not 0 <= asked <= _MAX_RESULTS:
        raise InvalidField.of("page_size", f"{asked} is not from 1 to {_MAX_RESULTS}, or 0 for {_USUAL_RESULTS}")
    return asked or _USUAL_RESULTS


def _estimate_message(advice: MemoryAdvice) -> pb2.EstimateModelMemoryResponse:
    response = pb2.EstimateModelMemoryResponse(
        weights_bytes=advice.weights_bytes,
        kv_cache_bytes=advice.kv_cache_bytes,
        kv_cache_bytes_per_token=advice.kv_cache_bytes_per_token,
        adapter_bytes=advice.adapter_bytes,
        overhead_bytes=advice.overhead_bytes,
        total_bytes=advice.total_bytes,
        available_bytes=advice.available_bytes,
        fits=advice.fits,
        device=advice.device,
        options=load_options_message(advice.choice),
        parameter_count=advice.num_parameters,
        download_bytes=advice.download_bytes,
    )
    for other in advice.alternatives:
        options = load_options_message(other.choice)
        response.alternatives.add(
            data_type=options.data_type,
            quantization=options.quantization,
            total_bytes=other.total_bytes,
            fits=other.fits,
        )
    return response


def _recommendation_message(found: Recommendation) -> pb2.ModelRecommendation:
    return pb2.ModelRecommendation(
        entry=catalogue_entry_message(found.entry, is_local=found.is_local),
        options=load_options_message(found.choice),
        total_bytes=found.total_bytes,
        reasons=found.reasons,
    )
