"""The options of ``models load`` that say how a model is held; unset means the service's own choice."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, cast

import typer

from slipstream_client.model_options import ModelLoadOptions

MEMORY, SERVING = "In memory", "Serving"


def _option(panel: str, help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFlags:
    """Everything that ModelLoadOptions has, under the contract's names."""

    data_type: Annotated[str | None, _option(MEMORY, "float32, bfloat16 or float16.", "--dtype")] = None
    quantization: Annotated[str | None, _option(MEMORY, "none, int8, nf4 or fp4.")] = None
    double_quantization: Annotated[
        bool | None, _option(MEMORY, "Compress the scales of 4-bit weights too.", "--double-quantization")
    ] = None
    device: Annotated[str | None, _option(MEMORY, "auto, cpu, cuda, cuda:1, or balanced over all.")] = None
    memory_fraction: Annotated[float | None, _option(MEMORY, "Share of the device that it may take.")] = None
    attention_implementation: Annotated[
        str | None, _option(SERVING, "sdpa, eager or flash_attention_2.", "--attention")
    ] = None
    batching: Annotated[str | None, _option(SERVING, "padded or continuous.")] = None
    context_tokens: Annotated[int | None, _option(SERVING, "Longest prompt and answer together.")] = None
    max_running_sequences: Annotated[int | None, _option(SERVING, "Sequences that run at once.")] = None
    adapter_slot_count: Annotated[
        int | None, _option(SERVING, "Adapters that can share a batch; 0: none.", "--adapter-slots")
    ] = None
    max_adapter_rank: Annotated[int | None, _option(SERVING, "Largest rank of an adapter.")] = None
    tensor_parallel_count: Annotated[
        int | None, _option(SERVING, "Accelerators that share the model.", "--tensor-parallel")
    ] = None
    prefix_caching: Annotated[
        bool | None, _option(SERVING, "Keep prefixes of prompts.", "--prefix-caching/--no-prefix-caching")
    ] = None
    batch_invariant: Annotated[bool | None, _option(SERVING, "The same bits in any batch.", "--batch-invariant")] = None

    def options(self) -> ModelLoadOptions:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return cast(ModelLoadOptions, {name: value for name, value in given.items() if value is not None})
