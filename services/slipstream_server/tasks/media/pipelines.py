"""One of Transformers' pipelines, taken apart so that the engine can batch: preprocess, forward, postprocess.

    input --read--> the pipeline's own input --preprocess--> tensors      prepare, on a helper thread
    tensors of equal shapes --forward--> outputs, one row per input       run, on the engine's thread
    outputs --postprocess--> plain Python --shape--> the typed result     finish, on a helper thread

What a task adds stands in its ``Steps``: three or four small functions. Pieces share a forward pass only where all
their tensors have the same shape and all else that the forward pass depends on is equal, so that nothing is padded and
a batch changes nothing but rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pipelines.base import ChunkPipeline
from transformers.pipelines.pt_utils import PipelineIterator

from slipstream_server.errors import InvalidField, PromptTooLong
from slipstream_server.tasks.items import TaskInput, TaskResult
from slipstream_server.tasks.runner import Piece

Parameters = Mapping[str, Any]

PIXELS_PER_TOKEN = 16 * 16
SAMPLES_PER_TOKEN = 320
DEFAULT_NEW_TOKENS = 256


class Alone:
    """A group with one member: a piece that shares its forward pass with no other."""


def alone(item: Any, parameters: Parameters) -> Alone:
    """The ``Steps.company`` of a task whose inputs are never batched."""
    return Alone()


def given(parameters: Parameters, *names: str) -> dict[str, Any]:
    """Those of ``names`` that have a value."""
    return {name: parameters[name] for name in names if parameters.get(name) is not None}


def _no_arguments(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    return {}


def _any_company(item: Any, parameters: Parameters) -> Hashable:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What one task adds to its pipeline.

    ``read`` makes the pipeline's own input of ours; ``arguments`` are the keyword arguments that a plain call of the
    pipeline would get; ``shape`` makes our result of what it returns. ``company`` is what pieces must agree on, beside
    the shapes of their tensors, to share a forward pass. ``num_started``, of models that write, is how many tokens
    stand before the first one written.
    """

    read: Callable[[Any, Any, Parameters], Any]
    shape: Callable[[Any, Any, Parameters, Any], TaskResult]
    arguments: Callable[[Any, Any, Parameters], dict[str, Any]] = _no_arguments
    company: Callable[[Any, Parameters], Hashable] = _any_company
    num_started: Callable[[Any, Any], int] | None = None


@dataclass(frozen=True, slots=True)
class _Payload:
    inputs: Any
    forward: dict[str, Any]
    seed: int | None


class PipelineRunner:
    """The ``Runner`` of a task that a pipeline does. The lock is there because fast tokenizers are not safe to share
    between threads; without one nobody waits while another's large picture is made smaller.
    """

    def __init__(self, pipeline: Any, steps: Steps) -> None:
        self._pipeline = pipeline
        self._steps = steps
        has_tokenizer = pipeline.tokenizer is not None or pipeline.processor is not None
        self._lock: AbstractContextManager[Any] = threading.Lock() if has_tokenizer else nullcontext()

    def prepare(self, item: TaskInput, parameters: Parameters) -> Sequence[Piece]:
        own_input = self._steps.read(self._pipeline, item, parameters)
        try:
            with self._lock:
                preprocess, forward, _ = self._parameters(item, parameters)
                made = self._pipeline.preprocess(own_input, **preprocess)
                inputs = list(made) if isinstance(made, Iterator) else [made]
        except ValueError as error:
            raise InvalidField.of("inputs", f"the model's processor refuses it: {_first_line(error)}") from error
        for each in inputs:
            _check_texts(self._pipeline.model.config, each)
        if (num_started := self._steps.num_started) is not None:
            forward |= _bounded_length(
                self._pipeline.model, forward, max(num_started(self._pipeline, each) for each in inputs)
            )
        company = self._steps.company(item, parameters)
        return [self._piece(_Payload(each, forward, parameters.get("seed")), company) for each in inputs]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        forward = pieces[0].payload.forward
        if len(pieces) == 1:
            with _seeded(pieces[0].payload.seed):
                return [full_precision(self._pipeline.forward(_copy(pieces[0].payload.inputs), **forward))]
        batch = _collate([piece.payload.inputs for piece in pieces])
        rows = PipelineIterator([batch], self._pipeline.forward, forward, loader_batch_size=len(pieces))
        return [full_precision(row) for row in rows]

    def finish(self, item: TaskInput, parameters: Parameters, raw: Sequence[Any]) -> TaskResult:
        is_chunked = isinstance(self._pipeline, ChunkPipeline)
        with self._lock:
            _, _, postprocess = self._parameters(item, parameters)
            outputs = self._pipeline.postprocess(list(raw) if is_chunked else raw[0], **postprocess)
        return self._steps.shape(self._pipeline, item, parameters, outputs)

    def _parameters(self, item: TaskInput, parameters: Parameters) -> tuple[dict[str, Any], ...]:
        """What a call of the pipeline hands to its three steps: its own defaults, overlaid with the caller's."""
        pipeline = self._pipeline
        defaults = (pipeline._preprocess_params, pipeline._forward_params, pipeline._postprocess_params)
        asked = pipeline._sanitize_parameters(**self._steps.arguments(pipeline, item, parameters))
        return tuple({**default, **mine} for default, mine in zip(defaults, asked, strict=True))

    def _piece(self, payload: _Payload, company: Hashable) -> Piece:
        shapes = _shapes(payload.inputs)
        group = Alone() if isinstance(company, Alone) else (shapes, _frozen(payload.forward), company)
        return Piece(size=_size(shapes), payload=payload, group=group)


def _check_texts(config: Any, inputs: Any) -> None:
    """Pipelines do not cut texts; one that is longer than the model's positions would fail a whole batch."""
    limit = _positions(config)
    texts = [inputs, *(each for each in inputs.get("text_inputs") or () if hasattr(each, "get"))]
    for ids in (text.get("input_ids") for text in texts):
        if limit and isinstance(ids, torch.Tensor) and ids.shape[-1] > limit:
            raise PromptTooLong.of("inputs", f"a text has {ids.shape[-1]} tokens; the model reads {limit}")


def _positions(config: Any, *, decoder: bool | None = None) -> int | None:
    """How many tokens a model has places for; None where it does not say, or reads several kinds of text (MusicGen)."""
    try:
        positions = getattr(config.get_text_config(decoder=decoder), "max_position_embeddings", None)
    except ValueError:
        return None
    return int(positions) if positions else None


def _bounded_length(model: Any, forward: Mapping[str, Any], num_started: int) -> dict[str, int]:
    """Nothing, or a ``max_new_tokens`` that ends a text where the model's positions end: writing on is a failure of the
    device. Raises InvalidField where the caller asks for more.
    """
    positions = _positions(model.config, decoder=True)
    if not model.can_generate() or not positions:
        return {}
    room, asked = positions - num_started, forward.get("max_new_tokens")
    if room < 1:
        raise PromptTooLong.of("inputs", f"{num_started} tokens; this model reads and writes {positions} in all")
    if asked is not None and asked > room:
        raise InvalidField.of("parameters.max_new_tokens", f"{asked}; here this model has room for {room}")
    own = model.generation_config
    length = asked or own.max_new_tokens or (own.max_length or DEFAULT_NEW_TOKENS + num_started) - num_started
    return {"max_new_tokens": room} if length > room else {}


def check_drawing(pipeline: Any, parameters: Parameters) -> None:
    """Raise InvalidField for what would be without effect, or a failure of the forward pass."""
    if parameters.get("do_sample"):
        return
    for name in ("temperature", "top_k", "top_p"):
        if parameters.get(name) is not None:
            raise InvalidField.of(f"parameters.{name}", "has no effect while drawing is off; set do_sample to true")
    own = getattr(pipeline.model, "generation_config", None)
    num_beams = int(parameters.get("num_beams") or getattr(own, "num_beams", None) or 1)
    if (asked := int(parameters.get("num_return_sequences") or 1)) > num_beams:
        raise InvalidField.of("parameters.num_return_sequences", f"{asked} of {num_beams} beams; or set do_sample")


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draws that depend on ``seed`` alone. Models draw from the process's generators, which only this thread uses."""
    if seed is not None:
        torch.manual_seed(seed)
    yield


def _first_line(error: BaseException) -> str:
    """Without a path of this machine, which Transformers' messages do not hold where the input is not a path."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _copy(inputs: Any) -> Any:
    """Forward passes take things out of their inputs; a piece may run twice."""
    return inputs.copy() if hasattr(inputs, "copy") else inputs


def _collate(inputs: Sequence[Any]) -> dict[str, Any]:
    """Tensors of equal shapes one after the other; of everything else a list."""
    return {
        key: torch.cat([each[key] for each in inputs])
        if isinstance(value, torch.Tensor)
        else [each[key] for each in inputs]
        for key, value in inputs[0].items()
    }


def _shapes(inputs: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((key, tuple(value.shape)) for key, value in inputs.items() if isinstance(value, torch.Tensor))


def _size(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> int:
    """What a row costs, in about as many tokens: words as they are, pictures by patches, sounds by frames."""
    sizes = dict(shapes)
    if (pixels := sizes.get("pixel_values")) is not None:
        frames = pixels[1] if len(pixels) == 5 else 1
        return max(1, frames * pixels[-1] * pixels[-2] // PIXELS_PER_TOKEN)
    if (samples := sizes.get("input_values")) is not None and len(samples) == 2:
        return max(1, samples[1] // SAMPLES_PER_TOKEN)
    if (features := sizes.get("input_features")) is not None:
        return max(1, features[-1] // 2)
    return max([1, *(shape[1] for _, shape in shapes if len(shape) > 1)])


def _frozen(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((key, _frozen(value[key])) for key in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(_frozen(each) for each in value)
    return value if isinstance(value, Hashable) else id(value)


def full_precision(outputs: Any) -> Any:
    """Half-precision results as float32, which NumPy has and bfloat16 is not."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
    if isinstance(outputs, MutableMapping):
        for key in list(outputs):
            outputs[key] = full_precision(outputs[key])
    return outputs
