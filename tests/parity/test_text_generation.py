"""text-generation, through the front and a real worker, says what Transformers' pipeline says on the same weights; and
each of its parameters changes what is said.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.parity.encoder_models import byte_level

from slipstream_server.errors import SlipstreamError
from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.task_calls import TaskCall
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.facts import read_facts
from slipstream_server.tasks.items import GeneratedTextResult, ItemError, TextInput
from slipstream_server.tasks.registry import TASKS

PROMPTS = (" the old captain", " who lived near the harbour?", " London")
AS_THE_PIPELINE: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 12},
    {"max_new_tokens": 8, "return_full_text": False},
    {"max_new_tokens": 8, "prefix": " a storm and"},
    {"max_new_tokens": 8, "add_special_tokens": False},
    {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2},
    {"max_new_tokens": 8, "num_beams": 3, "length_penalty": -2.0, "early_stopping": True},
    {"max_new_tokens": 12, "repetition_penalty": 1.7},
    {"max_new_tokens": 12, "no_repeat_ngram_size": 2},
)
_GREEDY = {"max_new_tokens": 12}
_DRAWN = {**_GREEDY, "do_sample": True, "seed": 1}
_BEAMS = {**_GREEDY, "num_beams": 4, "num_return_sequences": 4}
# Start, and what is changed of it: one at a time.
CHANGES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    (
        _GREEDY,
        {
            "max_new_tokens": 5, "min_new_tokens": 11, "min_length": 14, "repetition_penalty": 3.0, "num_beams": 3,
            "no_repeat_ngram_size": 1, "do_sample": True, "prefix": " a storm", "add_special_tokens": False,
            "return_full_text": False, "return_tensors": True, "return_token_ids": True, "return_text": False,
        },
    ),
    ({}, {"max_length": 9}),
    (_DRAWN, {"seed": 2, "temperature": 0.01, "top_k": 1, "top_p": 0.01, "min_p": 1.0, "typical_p": 0.01}),
    (_DRAWN, {"num_return_sequences": 2}),
    (_BEAMS, {"length_penalty": -3.0}),
)  # fmt: skip
# By texts made for them, below; spaces and the end of a beam search beside their own rooms' tests.
_SHOWN_OTHERWISE = ("stop_sequence", "truncation", "clean_up_tokenization_spaces", "early_stopping")


def write_decoder(folder: Path) -> Path:
    import torch
    import transformers

    backend = byte_level()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=backend.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=2,
        pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2, 194]  # one that some texts come to
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            dice = np.random.default_rng(zlib.crc32(name.encode()))
            middle = 1.0 if "norm" in name else 0.0
            parameter.copy_(torch.from_numpy(dice.normal(middle, 0.25, tuple(parameter.shape)).astype(np.float32)))
    model.save_pretrained(folder)
    return folder


async def said(front: InferenceFront, parameters: Mapping[str, Any], texts: tuple[str, ...] = PROMPTS) -> list[Any]:
    """For each text what came back: texts with their ids, or the reason why there is nothing."""
    call = TaskCall(task="text-generation", model="tiny", parameters=parameters)
    found: dict[int, Any] = {}
    try:
        with closing(await front.open_task(call)) as run:
            run.add([TextInput(text) for text in texts])
            for _ in texts:
                index, outcome = await run.next_result()
                found[index] = outcome
    except SlipstreamError as error:
        return [error.reason] * len(texts)
    return [plain(found[index]) for index in range(len(texts))]


def plain(outcome: Any) -> Any:
    if isinstance(outcome, GeneratedTextResult):
        return [(each.text, list(each.token_ids)) for each in outcome.texts]
    assert isinstance(outcome, ItemError | SlipstreamError), outcome
    return outcome.reason


def expected(folder: Path) -> list[list[list[str]]]:
    import transformers

    pipeline = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    return [
        [[each["generated_text"] for each in pipeline(text, do_sample=False, **parameters)] for text in PROMPTS]
        for parameters in AS_THE_PIPELINE
    ]


async def unchanged_parameters(front: InferenceFront) -> set[str]:
    found = set()
    for base, changes in CHANGES:
        before = await said(front, base)
        answers = await asyncio.gather(*(said(front, {**base, name: value}) for name, value in changes.items()))
        found |= {name for name, answer in zip(changes, answers, strict=True) if answer == before}
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_texts_go_on_as_in_the_pipeline(
    tmp_path: Path, assert_eventually: Callable[..., Awaitable[None]]
) -> None:
    folder = write_decoder(tmp_path)
    front = InferenceFront(FrontConfig())
    await front.start()
    try:
        worker = WorkerConfig(model_folder=folder, threads=1)
        front.add_model(ModelPlan(name="tiny", folder=folder, facts=read_facts(folder), worker=worker))
        await assert_eventually(lambda: front.status("tiny").state == "ready", timeout_s=120)
        answers = await asyncio.gather(*(said(front, parameters) for parameters in AS_THE_PIPELINE))
        unchanged = await unchanged_parameters(front)
        continued = {**_GREEDY, "return_full_text": False}
        [[(whole, _)]] = await said(front, continued, PROMPTS[:1])
        [[(stopped, _)]] = await said(front, {**continued, "stop_sequence": whole[-1]}, PROMPTS[:1])
        too_long = await said(front, _GREEDY, (" the" * 80,))
        cut = await said(front, {**_GREEDY, "truncation": True}, (" the" * 80,))
    finally:
        await front.close()
    for parameters, mine, theirs in zip(AS_THE_PIPELINE, answers, expected(folder), strict=True):
        assert [[text for text, _ in each] for each in mine] == theirs, parameters
    assert unchanged == set()
    assert stopped == whole[: whole.index(whole[-1])]
    assert too_long == ["PROMPT_TOO_LONG"]
    assert isinstance(cut[0], list), cut


def test_no_parameter_is_left_out() -> None:
    shown = {name for _, changes in CHANGES for name in changes} | set(_SHOWN_OTHERWISE)
    assert shown == {parameter.name for parameter in TASKS["text-generation"].parameters}
