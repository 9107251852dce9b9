"""The tasks that write text, before a model runs: prompts, languages, lengths and beams as version 4.57 had them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from slipstream_server.errors import InvalidField, PromptTooLong, SlipstreamError, UnsupportedField
from slipstream_server.models.facts import facts_of_config
from slipstream_server.models.task_classes import kind_of, tasks_of, writes_text
from slipstream_server.models.tokenizer import TextTokenizer
from slipstream_server.tasks.generation_models import LanguageStyle, WritingModel
from slipstream_server.tasks.generation_prompts import PromptShape, WrittenPrompt, clean_up, shape_of, write_prompt
from slipstream_server.tasks.generation_settings import GenerationSettings, settings_of
from slipstream_server.tasks.parameters import check_parameters
from slipstream_server.tasks.registry import find_task
from unit.models.tokenizer_folders import save_folder

T5 = WritingModel(
    is_encoder_decoder=True,
    prefix="all: ",
    task_params={
        "summarization": {"prefix": "summarize: ", "num_beams": 2, "max_length": 30, "min_length": 5, "prefix2": 1},
        "translation_en_to_de": {"prefix": "to German: "},
        "translation_en_to_fr": {"prefix": "to French: ", "early_stopping": "never", "num_beams": True},
    },
)
BART = WritingModel(is_encoder_decoder=True, max_length=20)
GPT2 = WritingModel(is_encoder_decoder=False)
WORDS = ("<s>", "</s>", "<unk>", "en_XX", "de_DE", "__en__", "a", "b", "c", "to", "German:")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:6]])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=None, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return TextTokenizer.load(save_folder(tmp_path_factory.mktemp("words"), backend))


def shaped(task: str, model: WritingModel, **parameters: Any) -> PromptShape:
    named = find_task(task)
    return shape_of(named, check_parameters(named.spec, parameters), model)


def settled(task: str, model: WritingModel, **parameters: Any) -> GenerationSettings:
    named = find_task(task)
    checked = check_parameters(named.spec, parameters)
    return settings_of(named, checked, shape_of(named, checked, model).own, model)


def test_the_prefix_is_that_of_the_task() -> None:
    assert shaped("summarization", T5).prefix == "summarize: "
    assert shaped("text2text-generation", T5).prefix == "all: "
    assert shaped("translation", T5).prefix == "to German: "  # version 4 takes the first
    assert shaped("translation_en_to_fr", T5).prefix == "to French: "
    assert shaped("translation", T5, src_lang="en", tgt_lang="fr").prefix == "to French: "
    assert shaped("translation", T5, prefix="mine: ").prefix == "mine: "
    with pytest.raises(UnsupportedField, match="en_to_de, en_to_fr"):
        shaped("translation_en_to_es", T5)


def test_lengths_as_version_4_counted_them() -> None:
    assert settled("summarization", T5).max_new_tokens == 256  # beats the task's own max_length
    assert settled("summarization", BART).max_new_tokens == 19  # the generation_config's own counts
    assert settled("summarization", T5, max_new_tokens=7).max_new_tokens == 7
    assert settled("summarization", T5, max_length=7).max_new_tokens == 6
    assert settled("text-generation", GPT2, max_length=7).max_length == 7
    with pytest.raises(InvalidField, match="max_length"):
        settled("summarization", T5, max_length=7, max_new_tokens=7)
    assert settled("summarization", T5).min_new_tokens == 4
    assert settled("summarization", T5, max_new_tokens=2).min_new_tokens == 2
    assert settled("summarization", T5, min_length=9).min_new_tokens == 8
    assert settled("summarization", T5, max_new_tokens=2, min_new_tokens=5).min_new_tokens == 5  # refused further on


def test_beams_are_four_where_nobody_says_otherwise() -> None:
    assert settled("summarization", T5).beams["num_beams"] == 2
    assert settled("translation", T5).beams["num_beams"] == 4
    assert settled("translation_en_to_fr", T5).beams == {
        "num_beams": 4, "length_penalty": None, "early_stopping": None,
    }  # fmt: skip
    assert settled("summarization", T5, num_beams=1).beams["num_beams"] == 1
    assert settled("summarization", T5, do_sample=True).beams["num_beams"] == 1
    assert settled("text-generation", GPT2).beams["num_beams"] is None
    with pytest.raises(SlipstreamError, match="return_text"):
        settled("summarization", T5, return_text=False)


def test_special_tokens_stand_where_the_language_style_wants_them(tokenizer: TextTokenizer) -> None:
    def prompt(style: LanguageStyle, source: str, target: str) -> WrittenPrompt:
        shape = PromptShape(languages=style, source=source, target=target)
        return write_prompt("a b", shape, tokenizer, 100)

    assert prompt(LanguageStyle.PREFIX, "en_XX", "de_DE") == WrittenPrompt(
        token_ids=(3, 6, 7, 1), forced_first_token_id=4
    )
    assert prompt(LanguageStyle.SUFFIX, "de_DE", "en_XX") == WrittenPrompt(
        token_ids=(6, 7, 1, 4), forced_first_token_id=3
    )
    assert prompt(LanguageStyle.UNDERSCORED, "en", "en") == WrittenPrompt(
        token_ids=(5, 6, 7, 1), forced_first_token_id=5
    )
    with pytest.raises(InvalidField, match=r"parameters\.tgt_lang.*'xx'"):
        prompt(LanguageStyle.PREFIX, "en_XX", "xx")
    with pytest.raises(InvalidField, match=r"parameters\.src_lang"):
        prompt(LanguageStyle.PREFIX, "a", "de_DE")  # a word, but no language
    assert tokenizer.encode("a b") == [0, 6, 7, 1]  # unchanged


def test_truncation_keeps_the_special_tokens(tokenizer: TextTokenizer) -> None:
    shape = PromptShape(prefix="to German: ", truncation=True)
    assert write_prompt("a b c a b c", shape, tokenizer, 6).token_ids == (0, 9, 10, 6, 7, 1)
    with pytest.raises(PromptTooLong, match="10 tokens; the context holds 6"):
        write_prompt("a b c a b c", PromptShape(prefix="to German: "), tokenizer, 6)


def test_many_languages_need_a_target() -> None:
    mbart = WritingModel(is_encoder_decoder=True, languages=LanguageStyle.SUFFIX, source_language="en_XX")
    assert shaped("translation", mbart, tgt_lang="de_DE").source == "en_XX"
    with pytest.raises(InvalidField, match="tgt_lang"):
        shaped("translation", mbart)
    assert shaped("summarization", mbart).languages is LanguageStyle.NONE


def test_spaces_before_punctuation() -> None:
    assert clean_up("It 's fine , is n't it ?") == "It's fine, isn't it?"


def test_models_are_read_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"prefix": "p: ", "task_specific_params": {"summarization": {}, "x": 1}}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NllbTokenizer", "model_max_length": 1e30}')
    config = {"model_type": "m2m_100", "is_encoder_decoder": True, "architectures": ["M2M100ForConditionalGeneration"]}
    model = WritingModel.read(tmp_path, facts_of_config(config, {"max_length": 20}))
    assert model == WritingModel(
        is_encoder_decoder=True, prefix="p: ", task_params={"summarization": {}}, languages=LanguageStyle.PREFIX
    )


@pytest.mark.parametrize(
    ("architecture", "model_type", "tasks", "kind"),
    [
        ("T5ForConditionalGeneration", "t5", "summarization text2text-generation translation", "encoder_decoder"),
        ("MarianMTModel", "marian", "summarization text2text-generation translation", "encoder_decoder"),
        ("GPT2LMHeadModel", "gpt2", "text-generation", "decoder"),
        ("BertModel", "bert", "feature-extraction sentence-similarity text-ranking", "encoder"),
        ("BertForMaskedLM", "bert", "fill-mask", "encoder"),
        ("WhisperForConditionalGeneration", "whisper", "automatic-speech-recognition", "audio"),
        ("LlavaForConditionalGeneration", "llava", "image-text-to-text", "multimodal"),
        ("CLIPModel", "clip", "zero-shot-image-classification", "multimodal"),
        ("ViTForImageClassification", "vit", "image-classification", "vision"),
        ("TapasForQuestionAnswering", "tapas", "table-question-answering", "encoder"),
        ("Wav2Vec2ForCTC", "wav2vec2", "automatic-speech-recognition", "audio"),
        ("SomethingOfMyOwn", "own", "", "encoder"),
    ],
)
def test_classes_tell_tasks(architecture: str, model_type: str, tasks: str, kind: str) -> None:
    config = {"architectures": [architecture], "model_type": model_type}
    facts = facts_of_config({**config, "is_encoder_decoder": kind == "encoder_decoder"})
    assert tasks_of(facts) == tuple(tasks.split())
    assert kind_of(facts) == kind
    assert writes_text(facts) == (architecture in ("T5ForConditionalGeneration", "MarianMTModel", "GPT2LMHeadModel"))
