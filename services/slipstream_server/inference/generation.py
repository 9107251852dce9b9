"""What front and worker say to each other: commands, events and their frames.

A frame is a 4-byte big-endian length and that many bytes of msgpack: one tagged struct, or for worker to front a list
of them (all events of one engine step travel together, where they fit). Nothing here imports torch, grpc or protobuf,
and nothing is pickled. The front fills in every default before a request gets here: the worker never guesses.

Ids are chosen by the front and unique for a worker's life. A request has ``num_return_sequences`` sequences with
indices 0, 1, ...
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from slipstream_server.tasks.items import TaskRequest, TaskResult

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""Longer frames are refused by both sides: the peer is broken."""

FinishReason = Literal["eos_token", "stop_token", "stop_string", "length"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are drawn. Neutral values switch a step off; a draw depends on (seed, index, position) alone."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    seed: int = 0
    logit_bias: dict[int, float] = {}


class Stopping(msgspec.Struct, frozen=True, kw_only=True):
    """When a sequence ends. ``eos_token_ids`` is empty under ignore_eos; both lists are banned until min_new_tokens."""

    max_new_tokens: int
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


class Beams(msgspec.Struct, frozen=True, kw_only=True):
    """Beam search; ``num_beams`` 1 means none."""

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What every answer must match. ``choices`` for kind "choice", ``text`` for the others."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str = ""
    choices: tuple[str, ...] = ()


class AdapterPin(msgspec.Struct, frozen=True, kw_only=True):
    """An immutable adapter version: its digest, and the folder of verified files the worker may read."""

    version: str
    digest: str
    folder: str


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request, complete. Its times are those of CLOCK_MONOTONIC, which processes of one machine share.

    ``logprobs`` and ``prompt_logprobs``: number of alternatives wanted, 0 for the chosen token alone, None for none.
    For an encoder-decoder model ``prompt_token_ids`` is the encoder's input, and ``forced_first_token_id`` what its
    answer begins with, in place of the generation_config's forced_bos_token_id.
    """

    id: int
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    beams: Beams = Beams()
    num_return_sequences: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 1
    deadline_monotonic_s: float | None = None
    arrival_monotonic_s: float | None = None
    adapter: AdapterPin | None = None
    constraint: Constraint | None = None
    forced_first_token_id: int | None = None


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Front to worker: run this request."""

    request: GenerationRequest


class SubmitTask(msgspec.Struct, frozen=True, tag="submit_task"):
    """Front to worker: run this task; for workers whose engine is "tasks"."""

    request: TaskRequest


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Front to worker: the request is not wanted any more. No event follows; unknown ids are ignored."""

    id: int


class EndSequence(msgspec.Struct, frozen=True, tag="end_sequence"):
    """Front to worker: one sequence has met a stop string. It ends within a step; the others run on."""

    id: int
    index: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Front to worker: finish nothing more, exit 0."""


Command = Submit | SubmitTask | Cancel | EndSequence | Shutdown


class TopLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs at one position: the chosen token's (NaN for a prompt's first token) and the best ones, best first."""

    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Worker to front: how far the load is, 0 to 1, and what is being done."""

    fraction: float
    stage: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker to front: the model answers. ``settings`` are further facts for people, such as threads.

    ``kv_capacity_tokens``: the most tokens that prompts and answers may have together; 0 for no such bound.
    """

    device: str
    dtype: str
    attention: str
    batching: str
    memory_bytes: int
    settings: dict[str, str] = {}
    kv_capacity_tokens: int = 0


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """Worker to front: the model cannot be loaded; the worker exits. ``reason`` and ``field`` as in Failed."""

    reason: str
    message: str
    field: str = ""


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """The request has joined a batch: from here on its worker's death is its own."""

    id: int
    cached_prompt_tokens: int = 0


class PromptLogprobs(msgspec.Struct, frozen=True, tag="prompt_logprobs"):
    """Logprobs of the prompt's positions, as many as it has tokens."""

    id: int
    positions: list[TopLogprobs]


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """New tokens of one sequence. The token that ended it (eos, stop token) is the last one, with ``finish_reason``."""

    id: int
    index: int
    token_ids: list[int]
    logprobs: list[TopLogprobs] | None = None
    finish_reason: FinishReason | None = None


class TaskResults(msgspec.Struct, frozen=True, tag="task_results"):
    """Results of some inputs of a task request, each with its input's index; Finished follows the last."""

    id: int
    indices: list[int]
    results: list[TaskResult]
    num_tokens: int = 0


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """Every sequence of the request has ended, or every input has its result. Terminal."""

    id: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The request failed alone. ``reason`` is an ErrorReason name, ``field`` the one at fault, if one is. Terminal."""

    id: int
    reason: str
    message: str
    field: str = ""
    metadata: dict[str, str] = {}


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """What the engine is doing, sent when it changes, at most every 250 ms. Totals count from the worker's start.

    ``prefix_queries_total`` and ``prefix_hits_total`` count prompt tokens, looked up and found. ``kv_capacity_tokens``
    0: the engine has no fixed capacity. ``adapters`` are the versions at hand on the device.
    """

    num_running: int
    num_waiting: int
    kv_tokens: int
    steps_total: int
    prompt_tokens_total: int
    generation_tokens_total: int
    batch_rows_total: int
    kv_capacity_tokens: int = 0
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0
    preemptions_total: int = 0
    draft_tokens_total: int = 0
    accepted_draft_tokens_total: int = 0
    adapters: tuple[str, ...] = ()


Event = Loading | Ready | LoadFailed | Admitted | PromptLogprobs | Tokens | TaskResults | Finished | Failed | Stats


def frame(payload: bytes) -> bytes:
    """``payload`` with its length before it."""
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {len(payload)} bytes; at most {MAX_FRAME_BYTES}")
    return len(payload).to_bytes(4, "big") + payload


_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events_decoder = msgspec.msgpack.Decoder(list[Event])


def encode_command(command: Command) -> bytes:
    """A command as a frame."""
    return frame(_encoder.encode(command))


def decode_command(payload: bytes) -> Command:
    """A frame's payload as a command; msgspec.DecodeError where it is none."""
    return _command_decoder.decode(payload)


def encode_events(events: list[Event]) -> bytes:
    """Events as a frame."""
    return frame(_encoder.encode(events))


def event_frames(events: list[Event]) -> Iterator[bytes]:
    """One step's events as frames, in their order, as a rule one. ValueError where an event is too long for any."""
    payload = _encoder.encode(events)
    parts = _halves(events) if len(payload) > MAX_FRAME_BYTES else []
    for part in parts:
        yield from event_frames(part)
    if not parts:
        yield frame(payload)


def _halves(events: list[Event]) -> list[list[Event]]:
    """The same in two parts; none where they cannot be parted."""
    if len(events) > 1:
        middle = len(events) // 2
        return [events[:middle], events[middle:]]
    (event,) = events
    if isinstance(event, TaskResults) and len(event.results) > 1:
        middle = len(event.results) // 2
        first = TaskResults(event.id, event.indices[:middle], event.results[:middle], event.num_tokens)
        return [[first], [TaskResults(event.id, event.indices[middle:], event.results[middle:])]]
    return []


def decode_events(payload: bytes) -> list[Event]:
    """A frame's payload as events; msgspec.DecodeError where it is none."""
    return _events_decoder.decode(payload)
