"""Drives an engine by hand, and builds the tiny models that it serves: seeded, float64, from a configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from slipstream_server.inference.engine.adapters import AdapterSlots
from slipstream_server.inference.engine.padded import PaddedEngine
from slipstream_server.inference.engine.scheduler import BatchLimits
from slipstream_server.inference.generation import (
    Admitted,
    Beams,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    Sampling,
    Stopping,
    Tokens,
    TopLogprobs,
)

VOCAB = 211
EOS = 2
_ids = count(1)

_ENDS = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": EOS}
_ROTARY = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, **_ENDS,
}  # fmt: skip


@cache
def tiny_model(name: str) -> Any:
    """A seeded float64 model; the weights are spread so that its choices are far from ties."""
    torch.manual_seed(7)
    builders: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**_ROTARY, initializer_range=0.2)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_ROTARY, initializer_range=0.2)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **_ROTARY, head_dim=12, sliding_window=8, tie_word_embeddings=False, initializer_range=0.2,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB, n_positions=256, n_embd=48, n_layer=2, n_head=4, initializer_range=0.2, **_ENDS
            )
        ),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, eos_token_id=EOS,
                pad_token_id=0, decoder_start_token_id=0, initializer_factor=10.0,
            )
        ),
        "bart": lambda: BartForConditionalGeneration(
            BartConfig(
                vocab_size=VOCAB, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128,
                init_std=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=EOS, decoder_start_token_id=EOS,
                forced_bos_token_id=None, forced_eos_token_id=EOS,
            )
        ),
    }  # fmt: skip
    return builders[name]().to(torch.float64).eval()


def prompts(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts of the given lengths, free of special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist()) for length in lengths]


def request(
    prompt: Sequence[int],
    max_new_tokens: int = 12,
    *,
    sampling: Sampling | None = None,
    stopping: Stopping | None = None,
    beams: Beams | None = None,
    **others: Any,
) -> GenerationRequest:
    """A request with an id of its own; by default greedy and without end tokens."""
    return GenerationRequest(
        id=next(_ids),
        prompt_token_ids=tuple(prompt),
        sampling=sampling or Sampling(),
        stopping=stopping or Stopping(max_new_tokens=max_new_tokens),
        beams=beams or Beams(),
        **others,
    )


@dataclass
class Answer:
    """What came for one request."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TopLogprobs]] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    prompt_logprobs: list[TopLogprobs] = field(default_factory=list)
    admissions: int = 0
    terminals: list[Finished | Failed] = field(default_factory=list)

    def take(self, event: Event) -> None:
        assert not self.terminals, f"{event} after the terminal event"
        match event:
            case Admitted():
                self.admissions += 1
            case PromptLogprobs(positions=positions):
                self.prompt_logprobs = positions
            case Tokens(index=index, token_ids=token_ids, logprobs=logprobs, finish_reason=reason):
                assert index not in self.finish_reasons, f"{event} after the sequence's end"
                self.tokens.setdefault(index, []).extend(token_ids)
                self.logprobs.setdefault(index, []).extend(logprobs or [])
                if reason is not None:
                    self.finish_reasons[index] = reason
            case Finished() | Failed():
                self.terminals.append(event)

    @property
    def failure(self) -> Failed | None:
        return next((event for event in self.terminals if isinstance(event, Failed)), None)


class Bench:
    """An engine and everything it has said. ``now`` is its clock, which stands still unless moved."""

    def __init__(self, model: Any, *, slots: AdapterSlots | None = None, **limits: Any) -> None:
        self.now = time.monotonic()
        self.steps = 0
        self.answers: dict[int, Answer] = {}
        self.on_poll: Callable[[], None] = lambda: None
        self.engine = PaddedEngine(
            model,
            BatchLimits(**{"max_queue_delay_ms": 0, **limits}),
            slots=slots,
            poll=lambda: self.on_poll(),
            clock=lambda: self.now,
        )

    def submit(self, *requests: GenerationRequest) -> None:
        for each in requests:
            self.answers[each.id] = Answer()
            self.engine.submit(each)

    def step(self) -> list[Event]:
        events = self.engine.step()
        self.engine.check_integrity()
        self.steps += 1
        for event in events:
            if isinstance(event, Admitted | PromptLogprobs | Tokens | Finished | Failed):
                self.answers[event.id].take(event)
        return events

    def run(self, *requests: GenerationRequest, most_steps: int = 500) -> list[Answer]:
        """Submit and step until the engine has nothing left; the answers of ``requests``."""
        self.submit(*requests)
        while self.engine.wait_s() == 0.0:
            self.step()
            assert self.steps < most_steps, "the engine does not come to an end"
        assert self.engine.wait_s() is None
        return [self.answers[each.id] for each in requests]


def generate_alone(model: Any, prompt: Sequence[int], **settings: Any) -> list[int]:
    """What plain ``generate`` answers to this prompt in a call of its own."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **{"do_sample": False, "eos_token_id": None, **settings}
        )
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    return [int(token) for token in found[0, start:]]
