"""Constrained answers in the padded engine: every one matches by a second source, and a bad grammar fails alone."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.conftest import Eventually
from tests.unit.engine.driving import Answer, Bench, request, tiny_model
from tokenizers import Tokenizer

from slipstream_server.errors import InvalidRequest
from slipstream_server.inference.constraint_rules import check_constraint
from slipstream_server.inference.engine.anteroom import Anteroom
from slipstream_server.inference.engine.constraints import Grammars
from slipstream_server.inference.engine.padded import PaddedEngine
from slipstream_server.inference.engine.scheduler import BatchLimits
from slipstream_server.inference.generation import Constraint, GenerationRequest, Sampling, Stopping
from unit.models.tokenizer_folders import KINDS, byte_level, save_folder

EOS = 1
VOCAB = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tokenizer"), byte_level())


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    return Grammars(folder, VOCAB)


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.float64).eval()


def bench(model: Any, grammars: Grammars | None) -> Bench:
    made = Bench(model)
    made.engine = PaddedEngine(model, BatchLimits(max_queue_delay_ms=0), grammars=grammars, clock=lambda: made.now)
    return made


def run(made: Bench, *requests: GenerationRequest) -> list[Answer]:
    made.submit(*requests)
    while made.engine.wait_s() is not None:
        made.step()
    return [made.answers[each.id] for each in requests]


def asked(kind: Any, text: str = "", *, seed: int = 0, ends: tuple[int, ...] = (EOS,), **others: Any) -> Any:
    choices = others.pop("choices", ())
    sampling = others.pop("sampling", Sampling(do_sample=True, seed=seed))
    stopping = others.pop("stopping", Stopping(max_new_tokens=300, eos_token_ids=ends))
    constraint = Constraint(kind=kind, text=text, choices=choices)
    return request((5, 6, 7), sampling=sampling, stopping=stopping, constraint=constraint, **others)


def text_of(folder: Path, tokens: list[int]) -> str:
    return str(Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens, skip_special_tokens=True))


PATTERNS = [r"[a-c]{3,9}", r"(a+)+$", r"^[0-9]{2,4}/[xy]\n?$", r"(cat|dog)s?", r"a/b", r"[a-z]{1,5}@[a-zé]{1,3}\.org"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_answer_matches_its_pattern(model: Any, grammars: Grammars, folder: Path, pattern: str) -> None:
    answers = run(bench(model, grammars), *[asked("regex", pattern, seed=seed) for seed in range(6)])
    for answer in answers:
        assert answer.failure is None
        text = text_of(folder, answer.tokens[0])
        if answer.finish_reasons[0] == "eos_token":
            assert re.fullmatch(pattern, text), text
            assert answer.tokens[0][-1] == EOS


SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"],
     "additionalProperties": False},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "string", "pattern": "^[a-z]{2,5}$"},
    {"$defs": {"n": {"type": "object", "properties": {"v": {"type": "null"}, "next": {"$ref": "#/$defs/n"}},
                     "required": ["v"], "additionalProperties": False}}, "$ref": "#/$defs/n"},
    {"type": "integer", "minimum": 3, "maximum": 77},
    {"const": {"k": [1, "two"]}},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_answer_validates_against_its_schema(
    model: Any, grammars: Grammars, folder: Path, schema: dict[str, Any]
) -> None:
    answers = run(bench(model, grammars), *[asked("json_schema", json.dumps(schema), seed=seed) for seed in range(6)])
    ended = [answer for answer in answers if answer.finish_reasons[0] == "eos_token"]
    assert ended
    for answer in ended:
        jsonschema.validate(json.loads(text_of(folder, answer.tokens[0])), schema)


def test_choices_and_sequences_each_have_their_own_place(model: Any, grammars: Grammars, folder: Path) -> None:
    choices = ("yes", "no", 'perhaps not / \\ "quoted"', "日本")
    (answer,) = run(bench(model, grammars), asked("choice", choices=choices, num_return_sequences=8))
    assert {text_of(folder, tokens) for tokens in answer.tokens.values()} <= set(choices)
    assert len({tuple(tokens) for tokens in answer.tokens.values()}) > 1
    assert set(answer.finish_reasons.values()) == {"eos_token"}


def test_a_grammar(model: Any, grammars: Grammars, folder: Path) -> None:
    (answer,) = run(bench(model, grammars), asked("grammar", 'start: "(" start ")" | "x"\n'))
    assert re.fullmatch(r"(\(*)x(\)*)", text_of(folder, answer.tokens[0]))


def test_no_bias_or_minimum_escapes_the_grammar(model: Any, grammars: Grammars, folder: Path) -> None:
    sampling = Sampling(logit_bias={EOS: 100.0, 9: 100.0})
    stopping = Stopping(max_new_tokens=40, min_new_tokens=30, eos_token_ids=(EOS,))
    biased = asked("choice", choices=("abc",), sampling=sampling, stopping=stopping)
    (answer,) = run(bench(model, grammars), biased)
    assert text_of(folder, answer.tokens[0]) == "abc"
    assert answer.finish_reasons == {0: "eos_token"}


def test_without_an_end_token_a_complete_answer_ends_itself(model: Any, grammars: Grammars, folder: Path) -> None:
    (answer,) = run(bench(model, grammars), asked("choice", choices=("abc",), ends=()))
    assert text_of(folder, answer.tokens[0]) == "abc"
    assert answer.finish_reasons == {0: "eos_token"}
    assert EOS not in answer.tokens[0]


def test_bad_grammars_fail_alone(model: Any, grammars: Grammars) -> None:
    bad = [
        asked("regex", r"(a)\1"), asked("regex", "(abc"), asked("regex", r"[^\s\S]"), asked("grammar", "start: b"),
        asked("json_schema", '{"uniqueItems": true}'), asked("json_schema", '{"$ref": "#"}'),
    ]  # fmt: skip
    plain, good = request((5, 6), 4), asked("regex", "a{3}")
    *failed, first, second = run(bench(model, grammars), *bad, plain, good)
    assert [a.failure and a.failure.reason for a in failed[:4]] == ["UNSUPPORTED_FIELD", *["INVALID_FIELD"] * 3]
    assert all(a.failure and a.failure.message.startswith("constraint.") for a in failed)
    assert len(first.tokens[0]) == 4
    assert second.failure is None


def test_unguided_rows_answer_as_they_do_alone(model: Any, grammars: Grammars) -> None:
    (alone,) = run(bench(model, grammars), request((9, 8, 7), 20))
    together, _ = run(bench(model, grammars), request((9, 8, 7), 20), asked("regex", "[a-z]{20}"))
    assert together.tokens == alone.tokens


def test_a_failed_batch_keeps_the_places_of_its_rows(model: Any, grammars: Grammars) -> None:
    requests = [asked("regex", "[a-c]{9}x", seed=seed) for seed in range(2)]
    expected = [answer.tokens for answer in run(bench(model, grammars), *requests)]
    made = bench(model, grammars)
    again = [asked("regex", "[a-c]{9}x", seed=seed) for seed in range(2)]
    calls = []

    def fail_once(module: Any, args: Any) -> None:
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("injected")

    handle = model.register_forward_pre_hook(fail_once)
    try:
        answers = run(made, *again)
    finally:
        handle.remove()
    assert [answer.tokens for answer in answers] == expected


def test_cancel_and_deadline_work_in_the_anteroom(grammars: Grammars) -> None:
    now = 0.0
    room = Anteroom(grammars, clock=lambda: now)
    late, gone = asked("regex", "late", deadline_monotonic_s=5.0), asked("regex", "gone")
    assert room.enter(late)
    assert room.enter(gone)
    assert not room.enter(request((5,)))
    assert room.forget(gone.id)
    ((request_id, error),) = room.take_failed(6.0)
    assert (request_id, error.reason) == (late.id, "DEADLINE_EXCEEDED")
    assert room.take_ready() == []
    assert room.wait_s() is None


class SlowGrammars(Grammars):
    """Compiles "slow..." only once it is let go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, VOCAB)
        self.begun: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.may_go_on = threading.Event()

    def compile(self, constraint: Constraint) -> Any:
        self.begun.put(constraint.text)
        if constraint.text.startswith("slow"):
            assert self.may_go_on.wait(60)
        return super().compile(constraint)


async def test_compilations_that_do_not_end_hold_up_nobody_for_ever(
    folder: Path, assert_eventually: Eventually
) -> None:
    now = 0.0
    grammars = SlowGrammars(folder)
    room = Anteroom(grammars, clock=lambda: now, compile_limit_s=10.0)
    slow, behind, gone = (
        [asked("regex", f"slow{i}") for i in range(2)],
        asked("regex", "behind"),
        asked("regex", "gone"),
    )
    try:
        for each in (*slow, behind, gone):
            assert room.enter(each)
        assert {grammars.begun.get(timeout=60) for _ in slow} == {"slow0", "slow1"}
        assert room.take_ready() == []
        assert room.take_failed(now) == []
        room.forget(gone.id)

        now = 10.5
        assert room.take_ready() == []
        after, again = asked("regex", "after"), asked("regex", "slow0")
        assert room.enter(after)
        assert room.enter(again)
        assert room.take_ready() == []
        failed = {request_id: error.reason for request_id, error in room.take_failed(now)}
        assert failed == {
            slow[0].id: "INVALID_FIELD", slow[1].id: "INVALID_FIELD", behind.id: "QUEUE_FULL",
            after.id: "QUEUE_FULL", again.id: "INVALID_FIELD",
        }  # fmt: skip
        assert len(room) == 0
    finally:
        grammars.may_go_on.set()

    def is_free_again() -> bool:
        room.take_ready()
        return room.enter(asked("regex", "slow0")) is False

    await assert_eventually(is_free_again)
    late = asked("regex", "free")
    assert room.enter(late)
    await assert_eventually(lambda: [each.id for each in room.take_ready()] == [late.id])
    # What nobody waited for any more was never begun.
    assert grammars.begun.get(timeout=60) == "free"
    assert grammars.begun.empty()


def test_without_grammars_a_constraint_is_refused_by_name() -> None:
    (answer,) = run(bench(tiny_model("llama"), None), asked("regex", "a", stopping=Stopping(max_new_tokens=9)))
    assert answer.failure is not None
    assert answer.failure.reason == "UNSUPPORTED_FIELD"


def linked(number: int, reference: str) -> dict[str, Any]:
    """Definitions that each have a pattern and refer to the next one."""
    defs = {f"a{i}": {"pattern": f"a{i}", "$ref": reference.format(i + 1)} for i in range(number)}
    return {"$defs": {**defs, f"a{number}": {"type": "string"}}, "$ref": reference.format(0)}


@pytest.mark.parametrize(
    ("kind", "text", "choices"),
    [
        ("regex", "(a{1000}){1000}", ()), ("regex", "", ()), ("regex", "a" * 5000, ()), ("regex", "(?x)a", ()),
        ("json_schema", json.dumps({"enum": list(range(100_000))}), ()),
        ("json_schema", json.dumps({"enum": list(range(5000))}), ()),
        ("json_schema", '{"title": "' + "x" * 1_000_000 + '"}', ()),
        ("json_schema", '{"items":' * 1000 + "{}" + "}" * 1000, ()), ("json_schema", "[" * 60_000, ()),
        ("json_schema", "{", ()), ("json_schema", "[1]", ()), ("json_schema", '{"x-guidance": {}}', ()),
        ("json_schema", '{"multipleOf": 999983}', ()), ("json_schema", '{"pattern": "(a{999}){999}"}', ()),
        ("json_schema", json.dumps({"allOf": [{"multipleOf": step} for step in (97, 0.89, 83)]}), ()),
        ("json_schema", json.dumps({"allOf": [{"pattern": f"a{i}"} for i in range(24)]}), ()),
        ("json_schema", json.dumps({"allOf": [{"properties": {"k": {"pattern": f"a{i}"}}} for i in range(24)]}), ()),
        ("json_schema", json.dumps(linked(24, "#/$defs/a{}")), ()),
        ("json_schema", json.dumps({"allOf": [{"$ref": "b"}], **linked(24, "a{}")}), ()),
        ("grammar", "start: T\nT: " + " & ".join(f"/.*a{i}.*/" for i in range(24)), ()),
        ("choice", "", ()), ("choice", "", ("a", "")), ("choice", "", ("a",) * 2000), ("choice", "", ("a" * 2000,)),
        ("grammar", "start: <|im_end|>", ()), ("grammar", 'start: "a"\n%llguidance {}', ()), ("grammar", "", ()),
    ],
)  # fmt: skip
def test_what_is_too_much_is_refused_before_it_is_compiled(kind: Any, text: str, choices: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"^constraint\."):
        check_constraint(Constraint(kind=kind, text=text, choices=choices))


MANY = 10**9


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": MANY}, {"type": "string", "minLength": MANY, "maxLength": MANY},
        {"type": "array", "items": {"type": "boolean"}, "minItems": MANY},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": MANY}, {"type": "array", "maxItems": MANY},
        {"type": "string", "minLength": MANY, "pattern": "^[a-z]+(ab|cd)*$"}, {"type": "string", "maxLength": 10**12},
        {"type": "object", "properties": {f"k{i}": {"type": "string", "pattern": f"^.*a{i}"} for i in range(60)}},
        {"type": "string", "allOf": [{"pattern": f"^.*a{i}.*b"} for i in range(12)]},
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)  # fmt: skip
def test_bounds_however_large_are_taken_or_refused_at_once(
    model: Any, grammars: Grammars, folder: Path, schema: dict[str, Any]
) -> None:
    constrained = asked("json_schema", json.dumps(schema), stopping=Stopping(max_new_tokens=30, eos_token_ids=(EOS,)))
    started_s = time.process_time()
    (answer,) = run(bench(model, grammars), constrained)
    assert time.process_time() - started_s < 10
    if answer.failure is not None:
        assert (answer.failure.reason, answer.failure.message[:11]) == ("INVALID_FIELD", "constraint.")
    elif answer.finish_reasons[0] == "eos_token":
        jsonschema.validate(json.loads(text_of(folder, answer.tokens[0])), schema)


@pytest.mark.parametrize(("kind", "encodes"), [("byte_fallback", False), ("metaspace", True)])
def test_other_tokenizers_and_encoder_decoders(model: Any, kind: str, encodes: bool, tmp_path: Path) -> None:
    runs = tiny_model("bart") if encodes else model
    end = runs.generation_config.eos_token_id
    folder = save_folder(tmp_path / kind, KINDS[kind]())
    made = bench(runs, Grammars(folder, runs.config.vocab_size))
    stopping = Stopping(max_new_tokens=60, eos_token_ids=(end,))
    (answer,) = run(made, asked("regex", "(he|lo){2,5}", stopping=stopping))
    assert answer.failure is None
    assert re.fullmatch("(he|lo){2,5}", text_of(folder, answer.tokens[0]))


def test_a_prepared_model_reads_nothing_when_the_first_constraint_comes(tmp_path: Path) -> None:
    """Reading the vocabulary beside a running engine keeps the GIL from its steps."""
    folder = save_folder(tmp_path / "tokenizer", byte_level())
    prepared, unprepared = Grammars(folder, VOCAB), Grammars(folder, VOCAB)
    prepared.prepare()
    for file in folder.iterdir():
        file.unlink()
    constraint = Constraint(kind="choice", choices=("yes", "no"))
    assert prepared.guide(prepared.compile(constraint), asked("choice", choices=("yes",))).num_words
    with pytest.raises(Exception, match="tokenizer"):
        unprepared.compile(constraint)


def test_a_model_whose_vocabulary_cannot_be_read_is_served_without_constraints(tmp_path: Path) -> None:
    grammars = Grammars(tmp_path, VOCAB)
    grammars.prepare()
    with pytest.raises(Exception, match="tokenizer"):
        grammars.compile(Constraint(kind="choice", choices=("yes", "no")))
