"""From what was asked for a model to how its worker runs it. Every option is honoured here or refused by its name.

Free of torch; any thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slipstream_server.errors import CorruptArtifact, InvalidField, UnsupportedField
from slipstream_server.inference.engine.scheduler import BatchLimits
from slipstream_server.inference.engines import CONTINUOUS, TASKS, engine_for, kind
from slipstream_server.inference.load_choice import BALANCED, QUANTIZATIONS, STORED_QUANTIZATIONS, LoadChoice
from slipstream_server.inference.served_model import ModelPlan
from slipstream_server.inference.task_calls import served_tasks
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.facts import ModelFacts
from slipstream_server.models.load_options import FourBitKind, LoadOptions, Quantization, parse_load_options
from slipstream_server.models.sources import PreparedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingDefaults:
    """The operator's choices, where a load says nothing.

    ``max_batch_size`` and ``max_batch_tokens`` None: as the engine has them; KV memory on a GPU is then what
    ``memory_fraction`` leaves.
    """

    device: str = "auto"
    device_map: str | None = None
    dtype: str = "auto"
    quantization: str = "none"
    attention: str = "auto"
    batching: str = "auto"
    max_batch_size: int | None = None
    max_batch_tokens: int | None = None
    max_step_tokens: int | None = None
    max_draft_tokens: int = 0
    prefix_caching: bool = True
    max_queue_delay_ms: float = 5.0
    threads: int = 0
    adapter_slots: int = 8
    max_adapter_rank: int = 64
    memory_fraction: float = 0.9
    log_level: str = "INFO"
    log_format: Literal["auto", "json", "text"] = "auto"


# Sequences of a continuous batch cost what they are long: more of them fit than rows of one rectangle.
_CONTINUOUS_BATCH = BatchLimits(max_batch_size=64, max_batch_tokens=32_768)


def plan_of(
    name: str, source: str, prepared: PreparedModel, facts: ModelFacts, choice: LoadChoice, defaults: ServingDefaults
) -> ModelPlan:
    """How ``name`` is to be served. Raises InvalidField or UnsupportedField, naming the option."""
    choice.check()
    _check_against(facts, choice)
    engine = engine_for(facts, choice.batching, defaults.batching)
    if choice.prefix_caching and str(engine) != CONTINUOUS:
        raise UnsupportedField.of("options.prefix_caching", f"the {engine} batcher keeps no prefixes")
    load = _load_options(prepared, choice, defaults)
    tasks = served_tasks(facts, load) if engine == TASKS else ()
    if engine == TASKS and not tasks and not facts.architectures:
        raise CorruptArtifact("config.json: architectures is missing: nothing tells what the model is for")
    if engine == TASKS and not tasks:
        raise UnsupportedField.of("name", f"a {kind(facts)} can do no task that this build knows")
    usual = _CONTINUOUS_BATCH if engine == CONTINUOUS else BatchLimits()
    worker = WorkerConfig(
        model_folder=prepared.folder,
        load=load,
        engine=engine,
        tasks=tasks,
        max_batch_size=choice.max_running_sequences or defaults.max_batch_size or usual.max_batch_size,
        max_batch_tokens=defaults.max_batch_tokens or usual.max_batch_tokens,
        kv_memory_fraction=0.0 if defaults.max_batch_tokens else choice.memory_fraction or defaults.memory_fraction,
        max_step_tokens=defaults.max_step_tokens or 0,
        max_draft_tokens=defaults.max_draft_tokens,
        prefix_caching=defaults.prefix_caching if choice.prefix_caching is None else choice.prefix_caching,
        max_queue_delay_ms=defaults.max_queue_delay_ms,
        threads=defaults.threads,
        adapter_slots=_or(choice.adapter_slot_count, defaults.adapter_slots),
        max_adapter_rank=_or(choice.max_adapter_rank, defaults.max_adapter_rank),
        log_level=defaults.log_level,
        log_format=defaults.log_format,
    )
    return ModelPlan(
        name=name,
        folder=prepared.folder,
        facts=facts,
        worker=worker,
        max_context_tokens=choice.context_tokens,
        source=source,
        revision=prepared.revision,
    )


def _check_against(facts: ModelFacts, choice: LoadChoice) -> None:
    longest = facts.context_tokens
    if choice.context_tokens is not None and longest is not None and choice.context_tokens > longest:
        raise InvalidField.of(
            "options.context_tokens", f"{choice.context_tokens} is more than the model's own {longest}"
        )
    if choice.quantization in STORED_QUANTIZATIONS and facts.quantization_method != choice.quantization:
        stored = facts.quantization_method or "not quantized"
        raise UnsupportedField.of(
            "options.quantization", f"{choice.quantization} is for checkpoints quantized that way; this one is {stored}"
        )
    if choice.quantization not in ("", "none", *STORED_QUANTIZATIONS) and facts.is_quantized:
        raise UnsupportedField.of(
            "options.quantization", f"the checkpoint is quantized already ({facts.quantization_method})"
        )


def _load_options(prepared: PreparedModel, choice: LoadChoice, defaults: ServingDefaults) -> LoadOptions:
    quantization = choice.quantization or defaults.quantization
    is_placed = bool(choice.device)
    return parse_load_options(
        {
            "device": "auto" if choice.device == BALANCED else choice.device or defaults.device,
            "device_map": (BALANCED if choice.device == BALANCED else None) if is_placed else defaults.device_map,
            "dtype": choice.data_type or defaults.dtype,
            "quantization": "none" if quantization in STORED_QUANTIZATIONS else quantization,
            "double_quantization": choice.double_quantization,
            "attn_implementation": choice.attention_implementation or defaults.attention,
        },
        adapter_folder=prepared.adapter_folder,
    )


def held_quantization(plan: ModelPlan) -> str:
    """How the weights are compressed in memory, as the contract has it; empty for a kind that it has no word for."""
    load = plan.worker.load
    if load.quantization is Quantization.EIGHT_BIT:
        return "int8"
    if load.quantization is Quantization.FOUR_BIT:
        return "nf4" if load.four_bit_kind is FourBitKind.NF4 else "fp4"
    stored = plan.facts.quantization_method or "none"
    return stored if stored in QUANTIZATIONS else ""


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
