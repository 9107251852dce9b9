"""Mixed traffic for the soak: what clients do, one call after another, and how every call has to end.

Each kind of call checks its own answer; ``Traffic`` counts how calls ended, and keeps the clients' side of the books.
A call that gets no end at all within ``STUCK_S`` is stuck.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc

from e2e.services import chat_pb2, generate_request, inference_pb2, message_request, read_deltas
from e2e.stranger import refusal_of
from faults.soak_books import HASTY, Seen
from slipstream.inference.v1 import tasks_pb2
from slipstream.type.v1 import chat_message_pb2, generation_pb2, usage_pb2

STUCK_S = 90.0
ADAPTERS = ("support", "legal", "poems")
PROMPTS = tuple(f"{word} " * length for length in (1, 7, 40, 120) for word in ("hello", "stone", "rivers and light"))
# The shared prompts above are read once and kept. These are of tokens of their own, and so are their answers.
LONG_PROMPT_TOKENS, LONG_ANSWER_TOKENS = (300, 700), (200, 500)
TOKEN_IDS = range(3, 250)
PRIORITIES = (generation_pb2.PRIORITY_LOW, generation_pb2.PRIORITY_NORMAL, generation_pb2.PRIORITY_HIGH)
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
    seen: Seen = field(default_factory=Seen)
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
        """One call of that kind, and how it ended."""
        try:
            async with asyncio.timeout(STUCK_S):
                end = await KINDS[kind][1](self, dice)
        except TimeoutError:
            end = "stuck"
            self.seen.unclear += 1
            self.problems.append(f"{kind}: no end within {STUCK_S:.0f} s")
        except grpc.aio.AioRpcError as error:
            refused = refusal_of(error)
            end = refused.reason or refused.code
            self.seen.unclear += 1
            if refused.code not in REFUSED_WELL or refused.retry_s is None:
                self.problems.append(f"{kind}: {refused}")
        except BadEndError as error:
            end = "wrong"
            self.problems.append(f"{kind}: {error}")
        self.ends[kind, end] += 1

    def check(self, is_right: object, what: object) -> None:
        if not is_right:
            raise BadEndError(str(what)[:500])

    async def generate(self, request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateResponse:
        """The whole answer, entered in the books."""
        answer: inference_pb2.GenerateResponse = await self.inference.Generate(request)
        self.answered(request.adapter, (each.finish_reason for each in answer.completions), answer.usage)
        return answer

    async def read(self, request: inference_pb2.GenerateRequest) -> inference_pb2.GenerationFinished:
        """A stream to its very end, entered in the books: one start, one end, and each of its sequences ended once."""
        events = [event async for event in self.inference.StreamGenerate(request)]
        kinds = [event.WhichOneof("event") for event in events]
        told = (kinds[:1], dict(Counter(kinds)), kinds[-1:])
        self.check(kinds[:1] == ["started"] and kinds[-1:] == ["finished"], told)
        self.check((kinds.count("started"), kinds.count("finished")) == (1, 1), told)
        ended = [event.delta for event in events if event.HasField("delta") and event.delta.finish_reason]
        expected = list(range(request.response.num_return_sequences or 1))
        self.check(sorted(delta.index for delta in ended) == expected, ended)
        finished = events[-1].finished
        reasons = {each.index: each.finish_reason for each in finished.completions}
        self.check({delta.index: delta.finish_reason for delta in ended} == reasons, events[-1])
        self.answered(request.adapter, (delta.finish_reason for delta in ended), finished.usage)
        return finished

    def answered(
        self, adapter: str, reasons: Iterable[usage_pb2.FinishReason.ValueType], usage: usage_pb2.Usage
    ) -> None:
        names = (usage_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower() for reason in reasons)
        self.seen.answered(adapter, names)
        self.tokens += usage.completion_tokens

    def compare(self, prompt: str, adapter: str, count: int, tokens: tuple[int, ...]) -> None:
        """The same greedy request has the same answer, whoever else is in the batch: counted, for near-ties."""
        first = self.answers.setdefault((prompt, adapter, count), tokens)
        self.repeated += 1
        self.changed += first != tokens


def _request(dice: random.Random, num_tokens: int, adapter: str = "") -> inference_pb2.GenerateRequest:
    """One of the prompts, with a priority by chance."""
    request = generate_request(dice.choice(PROMPTS), num_tokens)
    request.priority = dice.choice(PRIORITIES)
    request.adapter = adapter
    return request


async def _generate(traffic: Traffic, dice: random.Random) -> str:
    count = dice.choice((1, 16, 64))
    request = _request(dice, count)
    answer = await traffic.generate(request)
    traffic.check(answer.usage.completion_tokens == count, answer)
    traffic.compare(request.text, "", count, tuple(answer.completions[0].token_ids))
    return "finished"


async def _adapter(traffic: Traffic, dice: random.Random) -> str:
    name = dice.choice(ADAPTERS)
    request = _request(dice, 16, name)
    answer = await traffic.generate(request)
    traffic.check(answer.adapter_version == f"adapters/{name}/versions/v1", answer)
    traffic.compare(request.text, name, 16, tuple(answer.completions[0].token_ids))
    return "finished"


async def _stream(traffic: Traffic, dice: random.Random) -> str:
    request = _request(dice, dice.randint(1, 200))
    request.sampling.do_sample, request.sampling.temperature = True, 0.8
    request.sampling.seed = dice.getrandbits(40)
    request.response.num_return_sequences = dice.choice((1, 1, 3))
    await traffic.read(request)
    return "finished"


async def _long(traffic: Traffic, dice: random.Random) -> str:
    num_prompt, num_new = dice.randint(*LONG_PROMPT_TOKENS), dice.randint(*LONG_ANSWER_TOKENS)
    request = _request(dice, num_new)
    request.token_ids.ids.extend(dice.choices(TOKEN_IDS, k=num_prompt))
    usage = (await traffic.read(request)).usage
    traffic.check((usage.prompt_tokens, usage.completion_tokens) == (num_prompt, num_new), usage)
    return "finished"


async def _prompt_of_messages(traffic: Traffic, dice: random.Random) -> str:
    request = inference_pb2.GenerateRequest(priority=dice.choice(PRIORITIES))
    request.chat.messages.add(role=chat_message_pb2.ROLE_USER, content=dice.choice(PROMPTS))
    request.stopping.max_new_tokens = 24
    answer = await traffic.generate(request)
    traffic.check(1 <= answer.usage.completion_tokens <= 24, answer)
    return "finished"


async def _conversation(traffic: Traffic, dice: random.Random) -> str:
    parent = (await traffic.chat.CreateConversation(chat_pb2.CreateConversationRequest())).name
    for turn in range(2):
        reply = (await traffic.chat.SendMessage(message_request(parent, f"{turn} {dice.random()}", 12))).reply
        traffic.answered("", [reply.finish_reason], reply.usage)
    page = await traffic.chat.ListMessages(chat_pb2.ListMessagesRequest(parent=parent))
    traffic.check(len(page.messages) == 4, page)
    await traffic.chat.DeleteConversation(chat_pb2.DeleteConversationRequest(name=parent))
    return "finished"


async def _cancel(traffic: Traffic, dice: random.Random) -> str:
    request = _request(dice, 2000, dice.choice(("", *ADAPTERS)))
    call = traffic.inference.StreamGenerate(request)
    count = dice.choice((1, 1, 5, 30))
    try:
        traffic.check(await read_deltas(call, count) == count, "a stream of 2,000 tokens ended early")
    finally:
        call.cancel()
    traffic.seen.left[request.adapter] += 1
    return "cancelled"


async def _vanish(traffic: Traffic, dice: random.Random) -> str:
    traffic.seen.unclear += 1
    call = traffic.inference.StreamGenerate(_request(dice, 2000, HASTY))
    await asyncio.sleep(dice.uniform(0, 0.02))
    call.cancel()
    return "cancelled"


async def _deadline(traffic: Traffic, dice: random.Random) -> str:
    try:
        await traffic.inference.Generate(_request(dice, 2000, HASTY), timeout=dice.uniform(0.01, 0.4))
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        traffic.seen.unclear += 1
        return "deadline"
    raise BadEndError("2,000 tokens came before the deadline")


async def _constrained(traffic: Traffic, dice: random.Random) -> str:
    request = _request(dice, 120)
    request.stopping.ignore_eos = False
    request.sampling.do_sample, request.sampling.seed = True, dice.getrandbits(40)
    is_choice = dice.random() < 0.5
    if is_choice:
        request.constraint.choice.choices.extend(CHOICES)
    else:
        request.constraint.json_schema = json.dumps(SCHEMA)
    done = (await traffic.generate(request)).completions[0]
    if done.finish_reason != usage_pb2.FINISH_REASON_LENGTH:
        traffic.check(done.text in CHOICES if is_choice else _fits(done.text), repr(done.text))
    return "finished"


def _fits(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"name", "large"} and len(value["name"]) <= 8 and isinstance(value["large"], bool)


async def _beams(traffic: Traffic, dice: random.Random) -> str:
    request = _request(dice, 12)
    request.num_beams = dice.choice((2, 4))
    request.text = dice.choice(PROMPTS[:-3])  # room is kept for the whole of each beam
    answer = await traffic.generate(request)
    traffic.check(answer.usage.completion_tokens >= 12, answer)
    return "finished"


async def _task(traffic: Traffic, dice: random.Random) -> str:
    request = tasks_pb2.RunTaskRequest(model="judge", task="text-classification")
    number = dice.randint(1, 12)
    request.inputs.extend(tasks_pb2.TaskInput(text=dice.choice(PROMPTS)[:24]) for _ in range(number))
    answer = await traffic.inference.RunTask(request)
    traffic.seen.task_calls += 1
    traffic.seen.task_inputs += number
    traffic.check(len(answer.results) == number, answer)
    traffic.check(not any(result.HasField("error") for result in answer.results), answer)
    return "finished"


async def _bad(traffic: Traffic, dice: random.Random) -> str:
    request = _request(dice, 8)
    request.sampling.top_p = 7.0
    try:
        await traffic.inference.Generate(request)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            raise
        traffic.seen.refused += 1
        return "refused"
    raise BadEndError("top_p 7 was accepted")


Call = Callable[[Traffic, random.Random], Awaitable[str]]
KINDS: dict[str, tuple[float, Call]] = {
    "generate": (4, _generate),
    "stream": (4, _stream),
    "long": (6, _long),
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
