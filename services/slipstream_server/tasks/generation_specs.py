"""The tasks that write text: what each takes, gives and can be told. Torch-free data.

Defaults are those of the pipelines of Transformers 4.57: four beams and 256 new tokens for summarization, translation
and text2text-generation, where neither the caller nor the model's own task_specific_params says otherwise.
"""

from __future__ import annotations

from slipstream_server.tasks.items import GeneratedTextResult, TextInput
from slipstream_server.tasks.specs import Parameter, ParameterType, TaskSpec

DEFAULT_MAX_NEW_TOKENS = 256
DEFAULT_NUM_BEAMS = 4
_MAX_TOKENS = 1 << 20

_LENGTHS = (
    Parameter(
        name="max_new_tokens",
        description=(
            "Most tokens to write. Default: what max_length or the model's own task parameters say, or "
            f"{DEFAULT_MAX_NEW_TOKENS}."
        ),
        type=ParameterType.INT,
        min_value=1,
        max_value=_MAX_TOKENS,
    ),
    Parameter(
        name="min_new_tokens",
        description="Fewest tokens to write before the text may end. Default: what min_length or the model says.",
        type=ParameterType.INT,
        min_value=0,
        max_value=_MAX_TOKENS,
    ),
    Parameter(
        name="max_length",
        description=(
            "Version 4's way to say max_new_tokens: it counts the prompt of a decoder-only model too, and the start "
            "token of an encoder-decoder. Not together with max_new_tokens."
        ),
        type=ParameterType.INT,
        min_value=2,
        max_value=_MAX_TOKENS,
    ),
    Parameter(
        name="min_length",
        description="Version 4's way to say min_new_tokens, counted as max_length is.",
        type=ParameterType.INT,
        min_value=0,
        max_value=_MAX_TOKENS,
    ),
)


def _number(name: str, description: str, low: float, high: float) -> Parameter:
    return Parameter(
        name=name, description=description, type=ParameterType.FLOAT, min_value=low, max_value=high, default=None
    )


def _count(name: str, description: str, low: int, high: int, default: int | None = None) -> Parameter:
    return Parameter(
        name=name, description=description, type=ParameterType.INT, min_value=low, max_value=high, default=default
    )


def _flag(name: str, description: str, *, default: bool | None = None) -> Parameter:
    return Parameter(name=name, description=description, type=ParameterType.BOOL, default=default)


_SAMPLING = (
    _flag("do_sample", "Whether to draw tokens at random. Default: what the model's generation_config says, or not."),
    _number("temperature", "Above 1 flattens the distribution, below 1 sharpens it; needs do_sample.", 0.0, 100.0),
    _count("top_k", "Draw from the k likeliest tokens; 0: from all. Needs do_sample.", 0, 2**31 - 1),
    _number("top_p", "Draw from the likeliest tokens of this much probability. Needs do_sample.", 0.0, 1.0),
    _number("min_p", "Leave out tokens less likely than this part of the likeliest. Needs do_sample.", 0.0, 1.0),
    _number("typical_p", "Draw from the most typical tokens of this much probability. Needs do_sample.", 0.0, 1.0),
    _number("repetition_penalty", "Above 1 makes tokens that have been used less likely.", 0.0, 10.0),
    _count("no_repeat_ngram_size", "No sequence of so many tokens is written twice; 0: off.", 0, 1024),
    _count("seed", "Makes draws repeatable. Default: a new one for each input.", 0, 2**53),
    _count("num_return_sequences", "Texts for each input, best first.", 1, 16, 1),
)
_BEAMS = (
    _number("length_penalty", "Above 0 favours longer texts; for beam search.", -10.0, 10.0),
    _flag("early_stopping", "End beam search once num_beams candidates are complete."),
)
_TEXT = (
    _flag(
        "clean_up_tokenization_spaces",
        "Remove spaces before punctuation and contractions, as tokenizers of older models leave them.",
        default=False,
    ),
    _flag("return_token_ids", "Whether the result carries the ids behind each text.", default=False),
    _flag("return_tensors", "Version 4's way to say return_token_ids.", default=False),
    _flag("return_text", "Version 4's switch; the text always comes, so that false is refused.", default=True),
    Parameter(
        name="stop_sequence",
        description="Text before which the answer ends; the whole of it counts, not its first token alone.",
        type=ParameterType.STRING,
    ),
    _flag(
        "truncation",
        "Whether a text longer than the model reads is cut at its end. Off: an error (PROMPT_TOO_LONG).",
        default=False,
    ),
)


def _num_beams(description: str) -> Parameter:
    return _count("num_beams", description, 1, 16)


_SEQ2SEQ_BEAMS = _num_beams(
    f"Beams of the search. Default: what the model's own task parameters say, or {DEFAULT_NUM_BEAMS}; 1 with do_sample."
)
_PREFIX = Parameter(
    name="prefix",
    description="What stands before each input. Default: what the model's own task parameters say.",
    type=ParameterType.STRING,
)


def _by_name(*parameters: Parameter) -> tuple[Parameter, ...]:
    return tuple(sorted(parameters, key=lambda parameter: parameter.name))


_SEQ2SEQ = (*_LENGTHS, *_SAMPLING, _SEQ2SEQ_BEAMS, *_BEAMS, *_TEXT, _PREFIX)


def _seq2seq(task: str, description: str, *more: Parameter) -> TaskSpec:
    return TaskSpec(
        id=task,
        description=description,
        input_kinds=(TextInput.KIND,),
        result_kinds=(GeneratedTextResult.KIND,),
        parameters=_by_name(*_SEQ2SEQ, *more),
        auto_classes=("AutoModelForSeq2SeqLM",),
        families=("encoder_decoder",),
        runs_by="generate",
        adapters_supported=True,
        removed_in_transformers="5.0",
    )


SUMMARIZATION = _seq2seq("summarization", "Says in few words what a text says.")
TEXT2TEXT_GENERATION = _seq2seq(
    "text2text-generation", "Answers a text by another, as the encoder-decoder model was trained to."
)
TRANSLATION = _seq2seq(
    "translation",
    "Says a text in another language; translation_en_to_fr names both languages in the task.",
    Parameter(
        name="src_lang",
        description=(
            "Language of the input, as the model spells it: en_XX (mBART), eng_Latn (NLLB), en (M2M100, T5). Default: "
            "that of the task's name, or the tokenizer's own."
        ),
        type=ParameterType.STRING,
    ),
    Parameter(
        name="tgt_lang",
        description="Language of the answer, spelled likewise. Required by mBART, NLLB and M2M100.",
        type=ParameterType.STRING,
    ),
)
TEXT_GENERATION = TaskSpec(
    id="text-generation",
    description="Goes on with a text.",
    input_kinds=(TextInput.KIND,),
    result_kinds=(GeneratedTextResult.KIND,),
    parameters=_by_name(
        *_LENGTHS,
        *_SAMPLING,
        _num_beams("Beams of the search; 1: none. Default: what the model's generation_config says, or 1."),
        *_BEAMS,
        *_TEXT,
        Parameter(name="prefix", description="What stands before each input.", type=ParameterType.STRING),
        _flag("return_full_text", "Whether the text begins with the input.", default=True),
        _flag("add_special_tokens", "Whether the tokenizer adds its special tokens to the input.", default=True),
    ),
    auto_classes=("AutoModelForCausalLM",),
    families=("decoder",),
    runs_by="generate",
    adapters_supported=True,
)

GENERATION_TASKS: tuple[TaskSpec, ...] = (SUMMARIZATION, TEXT2TEXT_GENERATION, TEXT_GENERATION, TRANSLATION)
