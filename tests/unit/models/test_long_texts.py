"""A text of 1 MiB is tokenized as transformers does it, and nobody else waits for it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from slipstream_server.models.tokenizer import TextTokenizer, encoding_of
from slipstream_server.tasks.text.tokens import TextEncoder
from unit.models.tokenizer_folders import byte_level, save_folder

LONG = ("The old captain saw a stórm over the harbour; 日本 was far. " * 20_000)[: 1024 * 1024]
LEAST_TURNS = 20
"""Of a thread that asks for one every millisecond, while another tokenizes for a good part of a second. One that is
kept out has two at most: before and after."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("long"), byte_level())


def turns_beside(work: Callable[[], object]) -> int:
    """How often this thread had its turn while another did ``work``."""
    is_done, turns = threading.Event(), 0

    def run() -> None:
        try:
            work()
        finally:
            is_done.set()

    thread = threading.Thread(target=run)
    thread.start()
    while not is_done.wait(0.001):
        turns += 1
    thread.join()
    return turns


def test_others_go_on_while_a_long_text_is_tokenized(folder: Path) -> None:
    tokenizer = TextTokenizer.load(folder)
    encoder = TextEncoder(AutoTokenizer.from_pretrained(folder), context_tokens=None)
    assert turns_beside(lambda: tokenizer.encode(LONG)) > LEAST_TURNS
    assert turns_beside(lambda: tokenizer.encode_spans(LONG)) > LEAST_TURNS
    assert turns_beside(lambda: encoder.encode(LONG, field="text")) > LEAST_TURNS
    assert turns_beside(lambda: encoder.windows(LONG, "who?", max_tokens=64, stride=8, stride_field="")) > LEAST_TURNS


def test_long_texts_and_words_give_what_short_ones_do(folder: Path) -> None:
    """The reference is the library's own call for one text, which keeps everybody out."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (LONG[:2000], LONG[:5000], LONG[:5000].split()):
        found = encoding_of(backend, text, add_special_tokens=True)
        expected = backend.encode(text, is_pretokenized=not isinstance(text, str), add_special_tokens=True)
        assert (found.ids, found.offsets, found.word_ids) == (expected.ids, expected.offsets, expected.word_ids)


def test_many_tokens_are_read_back_as_few_are(folder: Path) -> None:
    tokenizer = TextTokenizer.load(folder)
    ids = tokenizer.encode(LONG[:20_000], add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == LONG[:20_000]
    assert tokenizer.decode([*ids, 1], skip_special_tokens=True) == LONG[:20_000]
