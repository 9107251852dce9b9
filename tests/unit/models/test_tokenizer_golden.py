"""Our tokenizing and chat rendering against AutoTokenizer and apply_chat_template, which alone may import torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from slipstream_server.errors import InvalidField, ModelLoadFailed
from slipstream_server.inference.calls import ChatMessage
from slipstream_server.inference.prompts import template_message
from slipstream_server.models.chat_template import ChatTemplate
from slipstream_server.models.tokenizer import TextTokenizer
from unit.models.tokenizer_folders import KINDS, byte_level, save_folder, with_bos

TEXTS = [
    "hello world",
    " leading and trailing ",
    "two  spaces\n\nand\tlines\r\n",
    "naïve café 日本語 Привет مرحبا e\u0301",
    "emoji 🙂👩‍👩‍👧🇫🇷",
    "special <s> inside </s> text<|im_end|> here <extra_1>",
    "<s></s>",
    "x" * 3000,
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "héllo 🙂 </s>"}],
    [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "b "},
        {"role": "user", "content": "<b>&'\""},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <&>", "parameters": {"type": "object"}}}]

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bos": {"add_bos_token": True},
    "bos_and_eos": {"add_bos_token": True, "add_eos_token": True},
    "neither": {"add_bos_token": False, "add_eos_token": False},
    "split": {"split_special_tokens": True},
    "extra": {"extra_special_tokens": ["<extra_1>"], "pad_token": "<pad>"},
    "as_object": {
        "eos_token": {"content": "</s>", "lstrip": True, "rstrip": False, "normalized": False, "__type": "AddedToken"}
    },
}


def real_folder() -> Path | None:
    """A real instruction model, where the environment names one."""
    name = os.environ.get("SLIPSTREAM_TEST_CHAT_MODEL")
    return Path(name) if name and Path(name).is_dir() else None


@pytest.fixture(params=[*(f"{kind}-plain" for kind in KINDS), *(f"byte_level-{name}" for name in CONFIGS), "real"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "real":
        found = real_folder()
        if found is None:
            pytest.skip("SLIPSTREAM_TEST_CHAT_MODEL names no folder")
        return found
    kind, config = request.param.split("-")
    tokenizer = KINDS[kind]()
    return save_folder(tmp_path / "model", with_bos(tokenizer) if config == "plain" else tokenizer, **CONFIGS[config])


def test_ids_and_text_equal_auto_tokenizer(folder: Path) -> None:
    ours, theirs = TextTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_spans_equal_auto_tokenizers_offsets(folder: Path) -> None:
    ours, theirs = TextTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:6]:
        expected = theirs(text, return_offsets_mapping=True)["offset_mapping"]
        assert [(span.start, span.end) for span in ours.encode_spans(text)] == [tuple(pair) for pair in expected]


def test_chats_equal_apply_chat_template(folder: Path) -> None:
    ours, theirs = TextTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate.load(folder)
    assert template is not None
    for chat in CHATS:
        rendered = template.render(chat, special_tokens=ours.special_tokens, parameters={})
        assert rendered == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ours.encode(rendered, add_special_tokens=False) == ids


def test_tools_and_parameters_reach_the_template(folder: Path) -> None:
    ours, theirs = TextTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate.load(folder)
    assert template is not None
    rendered = template.render(CHATS[0], tools=TOOLS, special_tokens=ours.special_tokens, parameters={"x": 1})
    assert rendered == theirs.apply_chat_template(
        CHATS[0], tools=TOOLS, tokenize=False, add_generation_prompt=True, x=1
    )


@pytest.mark.parametrize("final", ["The answer is", "trailing space ", ""])
def test_a_continued_message_equals_apply_chat_template(folder: Path, final: str) -> None:
    ours, theirs = TextTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate.load(folder)
    assert template is not None
    chat = [*CHATS[0], {"role": "assistant", "content": final}]
    rendered = template.render(chat, special_tokens=ours.special_tokens, parameters={}, continue_final_message=True)
    assert rendered == theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)


TEMPLATES = {
    "loops": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
    "{% if loop.first %}{% continue %}{% endif %}x{% break %}{% endfor %}",
    "concat": "{% set ns = namespace(s='') %}"
    "{% for m in messages %}{% set ns.s = ns.s ~ m.content ~ 1 ~ none %}{% endfor %}{{ ns.s }}",
    "macro": "{% macro f(m) -%} [{{ m.role | upper }}] {%- endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "filters": "{{ messages | map(attribute='content') | join('|') | trim | indent(2) }}"
    "{{ 'a' * 3 }}{{ '%s-%d' % ('x', 3) }}",
    "blocks": "  {% if true %}\n    a\n  {% endif %}\n{%- if messages | length > 1 %} b{% endif %}\n",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=True) }}{{ {'a': '<é>'} | tojson }}",
    "undefined": "{{ nothing }}{{ nothing is defined }}{% for m in nothing %}x{% endfor %}{{ ''.__class__ }}",
    "recursive": "{% for m in [[1, [2]], [3]] recursive %}{{ m if m is not iterable else loop(m) }}{% endfor %}",
    "specials": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}",
    "call": "{% macro box() %}<{{ caller() }}>{% endmacro %}{% call box() %}{{ messages[0].content }}{% endcall %}",
    "dict": "{% set d = dict(a=1) %}{{ d.a }}{{ 'x'.ljust(4) }}.{{ 'abc'.split('b')[1] }}{{ '{:>5}'.format('z') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_any_template_renders_as_in_transformers(name: str, tmp_path: Path) -> None:
    folder = save_folder(tmp_path, byte_level(), template=TEMPLATES[name])
    ours, theirs = TextTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate.load(folder)
    assert template is not None
    for chat in CHATS:
        rendered = template.render(chat, special_tokens=ours.special_tokens, parameters={})
        assert rendered == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_the_tool_template_is_taken_with_tools(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, byte_level(), template=None)
    (folder / "chat_template.jinja").write_text("plain")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with {{ tools | length }}")
    template, theirs = ChatTemplate.load(folder), AutoTokenizer.from_pretrained(folder)
    assert template is not None
    for tools in ((), tuple(TOOLS)):
        rendered = template.render(CHATS[0], tools=tools, special_tokens={}, parameters={})
        assert rendered == theirs.apply_chat_template(CHATS[0], tools=list(tools) or None, tokenize=False)


def test_a_template_that_refuses_is_the_callers_error(tmp_path: Path) -> None:
    template = ChatTemplate.load(save_folder(tmp_path, byte_level()))
    assert template is not None
    with pytest.raises(InvalidField, match=r"chat\.messages: .*system must come first"):
        template.render([CHATS[0][0], {"role": "system", "content": "x"}], special_tokens={}, parameters={})


def test_a_message_shows_only_what_is_set() -> None:
    assert template_message(ChatMessage(role="user", content="x")) == {"role": "user", "content": "x"}
    called = template_message(ChatMessage(role="assistant", content="", tool_calls=({"id": "1"},), name="n"))
    assert called == {"role": "assistant", "content": "", "name": "n", "tool_calls": [{"id": "1"}]}


def test_a_folder_without_a_usable_tokenizer_says_why(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"no tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelLoadFailed, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelLoadFailed, match="chat template"):
        ChatTemplate.load(tmp_path)
