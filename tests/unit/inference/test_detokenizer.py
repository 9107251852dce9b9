"""Text comes as it can, never half a character, and adds up to the tokenizer's own decoding."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream_server.inference.detokenizer import DetokenizerFactory
from slipstream_server.models.tokenizer import TextTokenizer
from unit.models.tokenizer_folders import KINDS, save_folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: TextTokenizer.load(save_folder(root / kind, make())) for kind, make in KINDS.items()}


def deltas(tokenizer: TextTokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = DetokenizerFactory(tokenizer).new(skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(min_size=1, max_size=60), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_encoded_text_streams_to_its_own_decoding(
    tokenizers: dict[str, TextTokenizer], kind: str, text: str, skip: bool
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert "".join(deltas(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "wordpiece"])
@given(numbers=st.lists(st.integers(0, 2**16), max_size=40), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_ids_stream_to_their_own_decoding(
    tokenizers: dict[str, TextTokenizer], kind: str, numbers: list[int], skip: bool
) -> None:
    tokenizer = tokenizers[kind]
    ids = [number % tokenizer.vocab_size for number in numbers]
    assert "".join(deltas(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_first_byte_that_is_a_space_is_stripped_as_the_tokenizer_does(tokenizers: dict[str, TextTokenizer]) -> None:
    tokenizer = tokenizers["byte_fallback"]
    space = token_of_byte(tokenizer, 0x20)
    assert deltas(tokenizer, [space, space]) == ["", " ", ""]
    assert tokenizer.decode([space, space], skip_special_tokens=True) == " "


@given(numbers=st.lists(st.integers(0, 2**16), max_size=40), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_bytes_for_missing_pieces_stream_to_their_own_decoding_unless_broken(
    tokenizers: dict[str, TextTokenizer], numbers: list[int], skip: bool
) -> None:
    tokenizer = tokenizers["byte_fallback"]
    ids = [number % tokenizer.vocab_size for number in numbers]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    streamed = "".join(deltas(tokenizer, ids, skip=skip))
    if "\ufffd" not in whole:
        assert streamed == whole
    else:  # the library breaks good characters beside broken bytes; what is not of bytes must be the same
        assert [c for c in streamed if c.isascii()] != [] or not [c for c in whole if c.isascii()]
        assert "\ufffd" in streamed


def token_of_byte(tokenizer: TextTokenizer, byte: int) -> int:
    """The id of a single byte's token, found by decoding or by its spelling."""
    spelled = tokenizer.backend.token_to_id(f"<0x{byte:02X}>")
    if spelled is not None:
        return int(spelled)
    table = {**{b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}}
    others = [b for b in range(256) if b not in table]
    table |= {b: chr(256 + place) for place, b in enumerate(others)}
    found = tokenizer.backend.token_to_id(table[byte])
    assert found is not None
    return int(found)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_in_pieces_appears_with_its_last_byte(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    ids = [token_of_byte(tokenizers[kind], byte) for byte in "🙂é".encode()]
    assert deltas(tokenizers[kind], ids) == ["", "", "", "🙂", "", "é", ""]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_that_never_completes_is_replaced_at_the_end(
    tokenizers: dict[str, TextTokenizer], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    ids = [token_of_byte(tokenizer, byte) for byte in "🙂".encode()[:3]]
    assert deltas(tokenizer, ids) == ["", "", "", "\ufffd"]
    broken = [*ids, *tokenizer.encode("h", add_special_tokens=False)[-1:]]
    assert "".join(deltas(tokenizer, broken)).replace(" ", "") == "\ufffdh"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_show_only_when_asked_for(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("hello world</s>", add_special_tokens=False)
    assert "</s>" not in "".join(deltas(tokenizer, ids))
    assert "".join(deltas(tokenizer, ids, skip=False)).endswith("</s>")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_tokenizer_give_nothing(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    assert "".join(deltas(tokenizers[kind], [10**6, 10**6 + 1])) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_spelled_as_in_the_middle_of_a_text(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    spell = DetokenizerFactory(tokenizer).spell
    ids = tokenizer.encode("the world hello", add_special_tokens=False)
    assert "".join(map(spell, ids)).strip() == tokenizer.decode(ids).strip()
