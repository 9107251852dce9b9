"""A task call that the generation path answers: each input is a request of its own, batched with all others.

Event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from slipstream_server.errors import InvalidRequest, SlipstreamError
from slipstream_server.inference.calls import (
    BeamChoice,
    DeltaEvent,
    FinishedEvent,
    GenerateCall,
    ResponseChoice,
    SamplingChoice,
    StoppingChoice,
    TokenPrompt,
)
from slipstream_server.inference.metrics import ModelMetrics
from slipstream_server.inference.streams import GenerationStream
from slipstream_server.inference.task_runs import TaskOutcome, TaskRun
from slipstream_server.logs import unforeseen
from slipstream_server.tasks.generation_prompts import PromptShape, WrittenPrompt, clean_up
from slipstream_server.tasks.generation_settings import GenerationSettings
from slipstream_server.tasks.items import GeneratedText, GeneratedTextResult, TaskInput, TaskResult, TextInput
from slipstream_server.tasks.specs import TaskSpec

MAX_OPEN_GENERATIONS = 64
"""Inputs of one call that are queued or running on the generation path at once."""

OpenGeneration = Callable[[GenerateCall], Awaitable[GenerationStream]]
WritePrompt = Callable[[str, PromptShape], Awaitable[WrittenPrompt]]


class WriterRun(TaskRun):
    """A run whose inputs the generation path answers, each as a request of its own, batched with all others."""

    def __init__(
        self,
        spec: TaskSpec,
        *,
        model: str,
        adapter: str,
        adapter_version: str,
        parameters: Mapping[str, Any],
        shape: PromptShape,
        settings: GenerationSettings,
        context_tokens: int,
        write_prompt: WritePrompt,
        open_generation: OpenGeneration,
        deadline_monotonic_s: float | None,
        metrics: ModelMetrics,
        on_leave: Callable[[TaskRun], None],
    ) -> None:
        super().__init__(spec, model=model, adapter_version=adapter_version, metrics=metrics, on_leave=on_leave)
        self._adapter = adapter
        self._parameters = parameters
        self._shape = shape if "encoder_decoder" in spec.families else _with_room(shape, settings, context_tokens)
        self._settings = settings
        self._context_tokens = context_tokens
        self._write_prompt = write_prompt
        self._open = open_generation
        self._deadline_monotonic_s = deadline_monotonic_s
        self._turns = asyncio.Semaphore(MAX_OPEN_GENERATIONS)
        self._writing: set[asyncio.Task[None]] = set()

    def _submit(self, items: list[tuple[int, TaskInput]]) -> None:
        for index, item in items:
            assert isinstance(item, TextInput)
            task = asyncio.create_task(self._write(index, item.text), name=f"{self.spec.id}-{index}")
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    def _withdraw(self) -> None:
        for task in self._writing:
            task.cancel()

    async def _write(self, index: int, text: str) -> None:
        try:
            async with self._turns:
                outcome: TaskOutcome = await self._written(text)
        except SlipstreamError as error:
            outcome = error
        except Exception as error:
            outcome = unforeseen(error, f"writing the answer to an input of {self.spec.id}")
        self._answer(index, outcome)

    async def _written(self, text: str) -> TaskResult:
        prompt = await self._write_prompt(text, self._shape)
        parts: dict[int, list[DeltaEvent]] = {}
        async with await self._open(self._call(prompt)) as stream:
            async for event in stream:
                match event:
                    case DeltaEvent():
                        parts.setdefault(event.index, []).append(event)
                    case FinishedEvent():
                        self.prompt_tokens += event.prompt_tokens
                        self.completion_tokens += event.completion_tokens
        before = text if self._parameters.get("return_full_text") else ""
        return GeneratedTextResult([self._text(before, parts[index]) for index in sorted(parts)])

    def _text(self, before: str, deltas: list[DeltaEvent]) -> GeneratedText:
        text = "".join(delta.text for delta in deltas)
        if self._parameters["clean_up_tokenization_spaces"]:
            text = clean_up(text)
        wants_ids = self._parameters["return_token_ids"] or self._parameters["return_tensors"]
        return GeneratedText(
            text=before + text,
            finish_reason=deltas[-1].finish_reason or "length",  # type: ignore[arg-type]  # one of the contract's
            token_ids=[token for delta in deltas for token in delta.token_ids] if wants_ids else [],
        )

    def _call(self, prompt: WrittenPrompt) -> GenerateCall:
        settings = self._settings
        return GenerateCall(
            model=self.model,
            prompt=TokenPrompt(token_ids=prompt.token_ids),
            adapter=self._adapter,
            sampling=SamplingChoice(**settings.sampling),
            stopping=StoppingChoice(
                max_new_tokens=self._max_new_tokens(len(prompt.token_ids)),
                min_new_tokens=settings.min_new_tokens,
                stop=settings.stop,
            ),
            response=ResponseChoice(num_return_sequences=settings.num_return_sequences),
            beams=BeamChoice(**settings.beams),
            deadline_monotonic_s=self._deadline_monotonic_s,
            forced_first_token_id=prompt.forced_first_token_id,
        )

    def _max_new_tokens(self, prompt_tokens: int) -> int | None:
        """What was asked for; what nobody asked for gives way to the context."""
        settings, used = self._settings, 0 if "encoder_decoder" in self.spec.families else prompt_tokens
        wanted = settings.max_new_tokens
        if settings.max_length is not None:
            wanted = settings.max_length - prompt_tokens
            if wanted < 1 and settings.has_default_length:
                return None
            if wanted < 1:
                text = f"{settings.max_length} is used up by a prompt of {prompt_tokens} tokens"
                raise InvalidRequest.of("parameters.max_length", text)
        if wanted is None or not settings.has_default_length:
            return wanted
        return max(1, min(wanted, self._context_tokens - used))


def _with_room(shape: PromptShape, settings: GenerationSettings, context_tokens: int) -> PromptShape:
    """The shape with prompts that are cut so far that the answer fits behind them, into the same context."""
    asked = settings.max_new_tokens
    room = context_tokens - (1 if asked is None or settings.has_default_length else asked)
    return replace(shape, max_input_tokens=max(1, min(room, shape.max_input_tokens or room)))
