"""Runs of the model over the rows of a padded batch: what differs between decoder-only and encoder-decoder models,
and nothing else.

A pass owns the keys and values of its rows. Prefill left-pads (the encoder's input: right-pads) and masks the
padding; rows of one request share the prefill of their prompt. Engine thread only, under inference_mode. Shapes: R
rows, T columns, V vocabulary; P distinct prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache

from slipstream_server.errors import UnsupportedField
from slipstream_server.inference.engine.adapters import AdapterSlots
from slipstream_server.inference.engine.cache import new_cache, select_rows, trim_columns
from slipstream_server.inference.engine.core import Row, RowGuide, TokenArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What the engine must know of a model to run it."""

    model: Any
    device: torch.device
    vocab_size: int
    pad_token_id: int
    decoder_start_token_id: int | None
    context_tokens: int | None
    is_encoder_decoder: bool
    takes_position_ids: bool
    takes_logits_to_keep: bool

    @classmethod
    def of(cls, model: Any) -> Traits:
        """The traits of a transformers model with a language-model head."""
        config, generation = model.config, model.generation_config
        text_config = config.get_text_config(decoder=True)
        # Adapters that a checkpoint brings along hide the arguments, and pass them on.
        own = model.get_base_model() if hasattr(model, "get_base_model") else model
        arguments = inspect.signature(own.forward).parameters
        return cls(
            model=model,
            device=model.get_input_embeddings().weight.device,
            vocab_size=_vocab_size(model, text_config),
            pad_token_id=_pad_token_id(generation, text_config),
            decoder_start_token_id=_decoder_start(generation, config) if config.is_encoder_decoder else None,
            context_tokens=getattr(text_config, "max_position_embeddings", None),
            is_encoder_decoder=config.is_encoder_decoder,
            takes_position_ids="position_ids" in arguments,
            takes_logits_to_keep="logits_to_keep" in arguments,
        )

    def new_row(self, request: Any, index: int, guide: RowGuide | None = None) -> Row:
        """A fresh row: its context is the prompt, or the decoder's start token."""
        if request.constraint is not None and guide is None:
            raise UnsupportedField.of("constraint", "this engine cannot enforce it")
        context = (self.decoder_start_token_id,) if self.is_encoder_decoder else request.prompt_token_ids
        return Row(request, index, np.array(context, dtype=np.int64), guide)


class Pass(Protocol):
    """One batch's run through the model."""

    def prefill(self) -> torch.Tensor:
        """Run all rows' contexts; the logits ``[R, V]`` after their last tokens."""

    def decode(self) -> torch.Tensor:
        """Run every row's newest token; the logits ``[R, V]`` after it."""

    def keep(self, order: Sequence[int]) -> None:
        """Go on with the rows ``order`` names, in that order."""


def new_pass(traits: Traits, rows: list[Row], slots: AdapterSlots) -> Pass:
    """A pass for the rows, not yet run."""
    kind = EncoderDecoderPass if traits.is_encoder_decoder else DecoderOnlyPass
    return kind(traits, rows, slots)


class DecoderOnlyPass:
    """Left-padded prompts, then one column per step."""

    def __init__(self, traits: Traits, rows: list[Row], slots: AdapterSlots) -> None:
        self._traits = traits
        self._rows = rows
        self._slots = slots
        self._cache = new_cache(traits.model.config, _most_left(rows))
        self._mask_RT: torch.Tensor | None = None

    def prefill(self) -> torch.Tensor:
        sources, expansion = _distinct(self._rows)
        tokens_PT, mask_PT = padded([row.tokens for row in sources], self._traits.pad_token_id, left=True)
        has_padding = not bool(mask_PT.all())
        positions_PT = (mask_PT.cumsum(dim=1) - 1).clamp(min=0)
        logits_PV = self._forward(sources, tokens_PT, mask_PT if has_padding else None, positions_PT)
        if len(sources) < len(self._rows):
            select_rows(self._cache, expansion)
            logits_PV, mask_PT = logits_PV[expansion], mask_PT[expansion]
        self._mask_RT = mask_PT if has_padding else None
        return logits_PV

    def decode(self) -> torch.Tensor:
        if self._mask_RT is not None:
            self._mask_RT = torch.nn.functional.pad(self._mask_RT, (0, 1), value=1)
        positions_R1 = torch.tensor([[len(row.tokens) - 1] for row in self._rows])
        return self._forward(self._rows, _newest(self._rows), self._mask_RT, positions_R1)

    def keep(self, order: Sequence[int]) -> None:
        self._rows = [self._rows[index] for index in order]
        select_rows(self._cache, order)
        if self._mask_RT is not None:
            self._mask_RT = self._mask_RT[list(order)]
            self._trim()

    def _trim(self) -> None:
        """Forget columns that are padding in every row that is left."""
        if self._mask_RT is None or not self._traits.takes_position_ids:
            return
        columns = int(self._mask_RT.argmax(dim=1).min())
        if columns and trim_columns(self._cache, columns):
            self._mask_RT = self._mask_RT[:, columns:]
        if bool(self._mask_RT.all()):
            self._mask_RT = None

    def _forward(
        self, rows: list[Row], tokens_RT: torch.Tensor, mask_RT: torch.Tensor | None, positions_RT: torch.Tensor
    ) -> torch.Tensor:
        device = self._traits.device
        extra: dict[str, Any] = {}
        if self._traits.takes_position_ids:
            extra["position_ids"] = positions_RT.to(device)
        if self._traits.takes_logits_to_keep:
            extra["logits_to_keep"] = 1
        with self._slots.applied(rows):
            output = self._traits.model(
                input_ids=tokens_RT.to(device),
                attention_mask=None if mask_RT is None else mask_RT.to(device),
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
                **extra,
            )
        return _last_logits(output, device)


class EncoderDecoderPass:
    """The encoder once over right-padded prompts, then the decoder from its start token, one column per step."""

    def __init__(self, traits: Traits, rows: list[Row], slots: AdapterSlots) -> None:
        self._traits = traits
        self._rows = rows
        self._slots = slots
        config = traits.model.config
        crossed = DynamicCache(config=config.get_text_config(decoder=True))
        self._cache = EncoderDecoderCache(new_cache(config, _most_left(rows)), crossed)
        self._encoded: Any = None
        self._mask_RT: torch.Tensor | None = None

    def prefill(self) -> torch.Tensor:
        sources, expansion = _distinct_prompts(self._rows)
        prompts = [np.array(row.request.prompt_token_ids, dtype=np.int64) for row in sources]
        tokens_PT, mask_PT = padded(prompts, self._traits.pad_token_id, left=False)
        device = self._traits.device
        encoder = self._traits.model.get_encoder()
        with self._slots.applied(sources):
            self._encoded = encoder(input_ids=tokens_PT.to(device), attention_mask=mask_PT.to(device), return_dict=True)
        self._mask_RT = mask_PT.to(device)
        self._select_encoded(expansion)
        # Rows of one batch have as many tokens each, so that the decoder's side needs no padding.
        return self._forward(torch.from_numpy(np.stack([row.tokens for row in self._rows])))

    def decode(self) -> torch.Tensor:
        return self._forward(_newest(self._rows))

    def keep(self, order: Sequence[int]) -> None:
        self._rows = [self._rows[index] for index in order]
        select_rows(self._cache, order)
        self._select_encoded(order)

    def _select_encoded(self, order: Sequence[int]) -> None:
        assert self._mask_RT is not None
        index = torch.tensor(order, device=self._mask_RT.device)
        self._encoded.last_hidden_state = self._encoded.last_hidden_state.index_select(0, index)
        self._mask_RT = self._mask_RT.index_select(0, index)

    def _forward(self, tokens_RT: torch.Tensor) -> torch.Tensor:
        with self._slots.applied(self._rows):
            output = self._traits.model(
                encoder_outputs=self._encoded,
                attention_mask=self._mask_RT,
                decoder_input_ids=tokens_RT.to(self._traits.device),
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
            )
        return _last_logits(output, self._traits.device)


def prompt_logits(traits: Traits, row: Row, slots: AdapterSlots, chunk_tokens: int) -> Iterator[torch.Tensor]:
    """Yield the logits ``[t, V]`` of all positions of the row's prompt but the last, a chunk at a time.

    A run of its own, so that rows that do not ask for them do not pay.
    """
    tokens = row.tokens[:-1]
    cache = new_cache(traits.model.config, len(tokens))
    for start in range(0, len(tokens), chunk_tokens):
        chunk_T = torch.from_numpy(tokens[start : start + chunk_tokens].copy()).to(traits.device)
        with slots.applied([row]):
            output = traits.model(input_ids=chunk_T[None], past_key_values=cache, use_cache=True, return_dict=True)
        yield output.logits[0].to(traits.device)


def padded(sequences: Sequence[TokenArray], pad_token_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences as a rectangle of token ids, and its mask (1 where there is a token)."""
    width = max(len(tokens) for tokens in sequences)
    tokens_PT = np.full((len(sequences), width), pad_token_id, dtype=np.int64)
    mask_PT = np.zeros((len(sequences), width), dtype=np.int64)
    for index, tokens in enumerate(sequences):
        span = slice(width - len(tokens), None) if left else slice(len(tokens))
        tokens_PT[index, span] = tokens
        mask_PT[index, span] = 1
    return torch.from_numpy(tokens_PT), torch.from_numpy(mask_PT)


def _distinct(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """One row for each context, and for each row which of them is its own: fresh rows of a request share one."""
    sources: list[Row] = []
    place: dict[tuple[int, int], int] = {}
    expansion = []
    for row in rows:
        key = (row.request.id, row.index if row.num_generated else -1)
        if key not in place:
            place[key] = len(sources)
            sources.append(row)
        expansion.append(place[key])
    return sources, expansion


def _distinct_prompts(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """As ``_distinct``, for encoders: rows of a request share its prompt whatever they have generated."""
    first: dict[int, Row] = {}
    for row in rows:
        first.setdefault(row.request.id, row)
    place = {request_id: index for index, request_id in enumerate(first)}
    return list(first.values()), [place[row.request.id] for row in rows]


def _newest(rows: Sequence[Row]) -> torch.Tensor:
    return torch.tensor([[int(row.tokens[-1])] for row in rows])


def _most_left(rows: Sequence[Row]) -> int:
    return max(row.request.stopping.max_new_tokens - row.num_generated for row in rows)


def _last_logits(output: Any, device: torch.device) -> torch.Tensor:
    """The last column's logits as ``generate`` looks at them: a float32 tensor of their own, where the inputs are."""
    logits: torch.Tensor = output.logits[:, -1, :]
    return logits.to(device=device, dtype=torch.float32, copy=True)


def _vocab_size(model: Any, text_config: Any) -> int:
    head = model.get_output_embeddings()
    return int(head.weight.shape[0] if head is not None else text_config.vocab_size)


def _pad_token_id(generation: Any, text_config: Any) -> int:
    """The padding token, else the first end token, else 0: the mask hides it, whichever it is."""
    for source in (generation, text_config):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            if isinstance(value, list | tuple):
                value = value[0] if value else None
            if value is not None and value >= 0:
                return int(value)
    return 0


def _decoder_start(generation: Any, config: Any) -> int:
    for source in (generation, config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            value = getattr(source, name, None)
            if value is not None:
                return int(value[0] if isinstance(value, list) else value)
    raise ValueError("the model names no decoder_start_token_id")
