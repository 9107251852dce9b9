"""Mixed traffic for the soak: what clients do, one call after another, and how every call has to end.

Each kind of call checks its own answer; ``Traffic`` counts how calls ended. A call that gets no end at all within
``STUCK_S`` is stuck.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from e2e.services import chat_pb2, generate_request, inference_pb2, message_request, read_deltas
from e2e.stranger import refusal_of
from slipstream.inference.v1 import tasks_pb2
from slipstream.type.v1 import chat_message_pb2, usage_pb2

STUCK_S = 90.0
ADAPTERS = ("support", "legal", "poems")
PROMPTS = tuple(f"{word} " * length for length in (1, 7, 40, 120) for word in ("hello", "stone", "rivers and light"))
CHOICES = ("good", "bad", "so so")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "large": {"type": "boolean"}},
    "required": ["name", "large"],
    "additionalProperties": False,
}
REFUSED_WELL = {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}


class BadEndError(AssertionError):
    """A call that ended in a way that was not promised."""


@dataclass(slots=True)
class Traffic:
    """Stubs to call, and how calls ended: counts by (kind, end)."""

    inference: Any
    chat: Any
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    started: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    tokens: int = 0
    answers: dict[tuple[str, str, int], tuple[int, ...]] = field(default_factory=dict)
    repeated: int = 0
    changed: int = 0

    async def client(self, seed: int, kinds: list[str], until: Callable[[], bool]) -> None:
        """One client's life: calls of those kinds by chance, until it is over."""
        dice = random.Random(seed)
        weights = [KINDS[kind][0] for kind in kinds]
        while until():
            await self.one(dice.choices(kinds, weights)[0], dice)

    async def one(self, kind: str, dice: random.Random) -> None:
        """One call of that kind, counted once when it starts and once when it ends."""
        self.started[kind] += 1
        try:
            async with asyncio.timeout(STUCK_S):
                end = await KINDS[kind][1](self, dice)
        except TimeoutError:
            end = "stuck"
            self.problems.append(f"{kind}: no end within {STUCK_S:.0f} s")
        except grpc.aio.AioRpcError as error:
            refused = refusal_of(error)
            end = refused.reason or refused.code
            if refused.code not in REFUSED_WELL or refused.retry_s is None:
                self.problems.append(f"{kind}: {refused}")
        except BadEndError as error:
            end = "wrong"
            self.problems.append(f"{kind}: {error}")
        self.ends[kind, end] += 1

    def check(self, is_right: object, what: object) -> None:
        if not is_right:
            raise BadEndError(str(what)[:500])

    def took(self, usage: usage_pb2.Usage) -> None:
        self.tokens += usage.completion_tokens

    def compare(self, prompt: str, adapter: str, count: int, tokens: tuple[int, ...]) -> None:
        """The same greedy request has the same answer, whoever else is in the batch: counted, for near-ties."""
        first = self.answers.setdefault((prompt, adapter, count), tokens)
        self.repeated += 1
        self.changed += first != tokens


async def _generate(traffic: Traffic, dice: random.Random) -> str:
    prompt, count = dice.choice(PROMPTS), dice.choice((1, 16, 64))
    answer = await traffic.inference.Generate(generate_request(prompt, count))
    traffic.check(answer.usage.completion_tokens == count, answer)
    traffic.compare(prompt, "", count, tuple(answer.completions[0].token_ids))
    traffic.took(answer.usage)
    return "finished"


async def _adapter(traffic: Traffic, dice: random.Random) -> str:
    prompt, name = dice.choice(PROMPTS), dice.choice(ADAPTERS)
    request = generate_request(prompt, 16)
    request.adapter = name
    answer = await traffic.inference.Generate(request)
    traffic.check(answer.adapter_version == f"adapters/{name}/versions/v1", answer)
    traffic.compare(prompt, name, 16, tuple(answer.completions[0].token_ids))
    traffic.took(answer.usage)
    return "finished"


async def _stream(traffic: Traffic, dice: random.Random) -> str:
    request = generate_request(dice.choice(PROMPTS), dice.randint(1, 200))
    request.sampling.do_sample, request.sampling.temperature = True, 0.8
    request.sampling.seed = dice.getrandbits(40)
    request.response.num_return_sequences = dice.choice((1, 1, 3))
    events = [event async for event in traffic.inference.StreamGenerate(request)]
    kinds = [event.WhichOneof("event") for event in events]
    traffic.check(kinds[0] == "started" and kinds[-1] == "finished", kinds)
    traffic.check((kinds.count("started"), kinds.count("finished")) == (1, 1), kinds)
    ended = [event.delta.index for event in events if event.HasField("delta") and event.delta.finish_reason]
    traffic.check(sorted(ended) == list(range(request.response.num_return_sequences)), ended)
    traffic.took(events[-1].finished.usage)
    return "finished"


async def _prompt_of_messages(traffic: Traffic, dice: random.Random) -> str:
    request = inference_pb2.GenerateRequest()
    request.chat.messages.add(role=chat_message_pb2.ROLE_USER, content=dice.choice(PROMPTS))
    request.stopping.max_new_tokens = 24
    answer = await traffic.inference.Generate(request)
    traffic.check(1 <= answer.usage.completion_tokens <= 24, answer)
    traffic.took(answer.usage)
    return "finished"


async def _conversation(traffic: Traffic, dice: random.Random) -> str:
    parent = (await traffic.chat.CreateConversation(chat_pb2.CreateConversationRequest())).name
    for turn in range(2):
        await traffic.chat.SendMessage(message_request(parent, f"{turn} {dice.random()}", 12))
    page = await traffic.chat.ListMessages(chat_pb2.ListMessagesRequest(parent=parent))
    traffic.check(len(page.messages) == 4, page)
    await traffic.chat.DeleteConversation(chat_pb2.DeleteConversationRequest(name=parent))
    return "finished"


async def _cancel(traffic: Traffic, dice: random.Random) -> str:
    call = traffic.inference.StreamGenerate(generate_request(dice.choice(PROMPTS), 2000))
    try:
        await read_deltas(call, dice.choice((0, 1, 5, 30)) or 1)
    finally:
        call.cancel()
    return "cancelled"


async def _vanish(traffic: Traffic, dice: random.Random) -> str:
    call = traffic.inference.StreamGenerate(generate_request(dice.choice(PROMPTS), 2000))
    await asyncio.sleep(dice.uniform(0, 0.02))
    call.cancel()
    return "cancelled"


async def _deadline(traffic: Traffic, dice: random.Random) -> str:
    try:
        await traffic.inference.Generate(generate_request(dice.choice(PROMPTS), 4000), timeout=dice.uniform(0.01, 0.4))
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        return "deadline"
    raise BadEndError("4,000 tokens came before the deadline")


async def _constrained(traffic: Traffic, dice: random.Random) -> str:
    request = inference_pb2.GenerateRequest(text=dice.choice(PROMPTS))
    request.stopping.max_new_tokens = 120
    request.sampling.do_sample, request.sampling.seed = True, dice.getrandbits(40)
    is_choice = dice.random() < 0.5
    if is_choice:
        request.constraint.choice.choices.extend(CHOICES)
    else:
        request.constraint.json_schema = json.dumps(SCHEMA)
    answer = await traffic.inference.Generate(request)
    done = answer.completions[0]
    if done.finish_reason != usage_pb2.FINISH_REASON_LENGTH:
        traffic.check(done.text in CHOICES if is_choice else _fits(done.text), repr(done.text))
    traffic.took(answer.usage)
    return "finished"


def _fits(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"name", "large"} and len(value["name"]) <= 8 and isinstance(value["large"], bool)


async def _beams(traffic: Traffic, dice: random.Random) -> str:
    request = generate_request(dice.choice(PROMPTS), 12)
    request.num_beams = dice.choice((2, 4))
    answer = await traffic.inference.Generate(request)
    traffic.check(answer.usage.completion_tokens >= 12, answer)
    traffic.took(answer.usage)
    return "finished"


async def _task(traffic: Traffic, dice: random.Random) -> str:
    request = tasks_pb2.RunTaskRequest(model="judge", task="text-classification")
    number = dice.randint(1, 12)
    request.inputs.extend(tasks_pb2.TaskInput(text=dice.choice(PROMPTS)[:24]) for _ in range(number))
    answer = await traffic.inference.RunTask(request)
    traffic.check(len(answer.results) == number, answer)
    traffic.check(not any(result.HasField("error") for result in answer.results), answer)
    return "finished"


async def _bad(traffic: Traffic, dice: random.Random) -> str:
    request = generate_request(dice.choice(PROMPTS), 8)
    request.sampling.top_p = 7.0
    try:
        await traffic.inference.Generate(request)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            raise
        return "refused"
    raise BadEndError("top_p 7 was accepted")


Call = Callable[[Traffic, random.Random], Awaitable[str]]
KINDS: dict[str, tuple[float, Call]] = {
    "generate": (4, _generate),
    "stream": (4, _stream),
    "messages": (2, _prompt_of_messages),
    "conversation": (1, _conversation),
    "adapter": (3, _adapter),
    "cancel": (3, _cancel),
    "vanish": (2, _vanish),
    "deadline": (2, _deadline),
    "constrained": (2, _constrained),
    "beams": (1, _beams),
    "task": (2, _task),
    "bad": (1, _bad),
}
