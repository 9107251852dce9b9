"""The tasks on text that do not write text: what each takes, gives and can be told. Torch-free data.

Defaults are those of Transformers' pipelines, except that nothing is cut silently: a text that the model cannot read
whole is an error unless ``truncation`` is on.
"""

from __future__ import annotations

from slipstream_server.tasks.items import (
    ClassificationResult,
    EmbeddingResult,
    FillMaskResult,
    QuestionAnsweringInput,
    QuestionAnsweringResult,
    RankingInput,
    RankingResult,
    SimilarityInput,
    SimilarityResult,
    TableQuestionInput,
    TextInput,
    TextPairInput,
    TokenClassificationResult,
    WordsInput,
    ZeroShotInput,
)
from slipstream_server.tasks.specs import Parameter, ParameterType, TaskSpec

_ANY_TRANSFORMER = ("encoder", "decoder", "encoder_decoder")
_MAX_COUNT = 100_000
_MAX_WINDOW_TOKENS = 2048
"""Every start is weighed against every end: 16 MiB for a window of this length."""


def _top_k(default: int | None, what: str) -> Parameter:
    return Parameter(
        name="top_k",
        description=f"How many {what} to return, best first; more than there are gives all.",
        type=ParameterType.INT,
        default=default,
        min_value=1,
        max_value=_MAX_COUNT,
    )


def _truncation(what: str, *, default: bool = False) -> Parameter:
    return Parameter(
        name="truncation",
        description=f"Whether {what} longer than the model reads is cut at its end. Off: an error (PROMPT_TOO_LONG).",
        type=ParameterType.BOOL,
        default=default,
    )


def _pooling(default: str) -> Parameter:
    return Parameter(
        name="pooling",
        description=(
            "How the tokens' vectors become one: none (a vector for each token), cls (the first), mean, max or "
            f"last_token. Default: what the model's sentence-transformers configuration says, or {default}."
        ),
        type=ParameterType.STRING,
        allowed_values=("none", "cls", "mean", "max", "last_token") if default == "none" else _POOLINGS,
    )


_POOLINGS = ("cls", "mean", "max", "last_token")

TEXT_CLASSIFICATION = TaskSpec(
    id="text-classification",
    aliases=("sentiment-analysis",),
    description="Sorts a text, or a pair of texts, under the labels that the model was trained on.",
    input_kinds=(TextInput.KIND, TextPairInput.KIND),
    result_kinds=(ClassificationResult.KIND,),
    parameters=(
        Parameter(
            name="function_to_apply",
            description=(
                "What turns logits into scores. Default: nothing for a regression model, sigmoid for a single label or "
                "several that may hold at once, else softmax."
            ),
            type=ParameterType.STRING,
            allowed_values=("sigmoid", "softmax", "none"),
        ),
        _top_k(1, "labels"),
        _truncation("a text"),
    ),
    auto_classes=("AutoModelForSequenceClassification",),
    families=_ANY_TRANSFORMER,
)

ZERO_SHOT_CLASSIFICATION = TaskSpec(
    id="zero-shot-classification",
    description="Sorts a text under labels made up by the caller, by asking an entailment model about each.",
    input_kinds=(ZeroShotInput.KIND,),
    result_kinds=(ClassificationResult.KIND,),
    parameters=(
        Parameter(
            name="multi_label",
            description=(
                "Whether each label is judged by itself, entailment against contradiction. Off: the scores of all "
                "labels add up to 1."
            ),
            type=ParameterType.BOOL,
            default=False,
        ),
        _truncation("a text (never a hypothesis)", default=True),
    ),
    auto_classes=("AutoModelForSequenceClassification",),
    families=_ANY_TRANSFORMER,
)

TOKEN_CLASSIFICATION = TaskSpec(
    id="token-classification",
    aliases=("ner",),
    description="Labels the tokens of a text, or groups of them: names, parts of speech.",
    input_kinds=(TextInput.KIND, WordsInput.KIND),
    result_kinds=(TokenClassificationResult.KIND,),
    parameters=(
        Parameter(
            name="aggregation_strategy",
            description=(
                "How tokens become entities: none (each token by itself), simple (neighbours of one label), and, so "
                "that no word is torn, first, average or max (which of a word's tokens decides)."
            ),
            type=ParameterType.STRING,
            default="none",
            allowed_values=("none", "simple", "first", "average", "max"),
        ),
        Parameter(
            name="ignore_labels",
            description="Labels to leave out of the result.",
            type=ParameterType.STRING_LIST,
            default=["O"],
        ),
        Parameter(
            name="stride",
            description=(
                "Tokens that neighbouring windows share: a text longer than the model reads is read in windows. Needs "
                "an aggregation_strategy. Default: no windows."
            ),
            type=ParameterType.INT,
            min_value=0,
            max_value=_MAX_COUNT,
        ),
        _truncation("a text"),
    ),
    auto_classes=("AutoModelForTokenClassification",),
    families=_ANY_TRANSFORMER,
)

QUESTION_ANSWERING = TaskSpec(
    id="question-answering",
    description="Answers a question by a stretch cut out of a text.",
    input_kinds=(QuestionAnsweringInput.KIND,),
    result_kinds=(QuestionAnsweringResult.KIND,),
    parameters=(
        Parameter(
            name="align_to_words",
            description="Whether an answer is widened to whole words. Turn it off for languages without spaces.",
            type=ParameterType.BOOL,
            default=True,
        ),
        Parameter(
            name="doc_stride",
            description=(
                "Tokens that neighbouring windows of a long text share. Default: 128, at most half of max_seq_len."
            ),
            type=ParameterType.INT,
            min_value=0,
            max_value=_MAX_COUNT,
        ),
        Parameter(
            name="handle_impossible_answer",
            description='Whether "no answer" (an empty text) competes with the answers.',
            type=ParameterType.BOOL,
            default=False,
        ),
        Parameter(
            name="max_answer_len",
            description="Longest answer, in tokens.",
            type=ParameterType.INT,
            default=15,
            min_value=1,
            max_value=_MAX_COUNT,
        ),
        Parameter(
            name="max_question_len",
            description="Longest question, in tokens; a longer one is cut. Default: questions are not cut.",
            type=ParameterType.INT,
            min_value=1,
            max_value=_MAX_COUNT,
        ),
        Parameter(
            name="max_seq_len",
            description=(
                "Tokens of question, window and special tokens together. Default: 384, or what the model reads at most."
            ),
            type=ParameterType.INT,
            min_value=1,
            max_value=_MAX_WINDOW_TOKENS,
        ),
        _top_k(1, "answers"),
    ),
    auto_classes=("AutoModelForQuestionAnswering",),
    families=_ANY_TRANSFORMER,
    removed_in_transformers="5.3",
)

TABLE_QUESTION_ANSWERING = TaskSpec(
    id="table-question-answering",
    description="Answers a question about a table: by cells of it and what to do with them, or in words.",
    input_kinds=(TableQuestionInput.KIND,),
    result_kinds=(QuestionAnsweringResult.KIND,),
    parameters=(
        Parameter(
            name="max_new_tokens",
            description=(
                "Longest answer of models that write it, in tokens. Default: 256, or what the model has room for. "
                "Refused by models that point at cells."
            ),
            type=ParameterType.INT,
            min_value=1,
            max_value=4096,
        ),
        Parameter(
            name="truncation",
            description=(
                "Whether a table longer than the model reads loses its last rows. Off: an error (PROMPT_TOO_LONG)."
            ),
            type=ParameterType.BOOL,
            default=False,
        ),
    ),
    auto_classes=("AutoModelForTableQuestionAnswering", "AutoModelForSeq2SeqLM"),
    families=("encoder", "encoder_decoder"),
    packages=("pandas",),
)

FILL_MASK = TaskSpec(
    id="fill-mask",
    description="Fills the masks of a text with the likeliest tokens, each mask by itself.",
    input_kinds=(TextInput.KIND,),
    result_kinds=(FillMaskResult.KIND,),
    parameters=(
        Parameter(
            name="targets",
            description=(
                "The only tokens to choose from; of a word that is no token its first token counts. Default: the "
                "whole vocabulary."
            ),
            type=ParameterType.STRING_LIST,
        ),
        _top_k(5, "tokens for each mask"),
        _truncation("a text"),
    ),
    auto_classes=("AutoModelForMaskedLM",),
    families=_ANY_TRANSFORMER,
)

FEATURE_EXTRACTION = TaskSpec(
    id="feature-extraction",
    description="Turns a text into vectors: one for each token, or one for all of it (an embedding).",
    input_kinds=(TextInput.KIND,),
    result_kinds=(EmbeddingResult.KIND,),
    parameters=(
        Parameter(
            name="normalize",
            description=(
                "Whether vectors are scaled to length 1. Default: what the model's sentence-transformers configuration "
                "says where its pooling is used, or off."
            ),
            type=ParameterType.BOOL,
        ),
        _pooling("none"),
        _truncation("a text"),
    ),
    auto_classes=("AutoModel",),
    families=_ANY_TRANSFORMER,
)

TEXT_RANKING = TaskSpec(
    id="text-ranking",
    aliases=("ranking", "rerank"),
    description="Puts documents in the order in which they answer a query.",
    input_kinds=(RankingInput.KIND,),
    result_kinds=(RankingResult.KIND,),
    parameters=(
        Parameter(
            name="function_to_apply",
            description=(
                "What turns a cross-encoder's logit into a score. Models that embed query and document give their "
                "cosine, which is not changed."
            ),
            type=ParameterType.STRING,
            default="sigmoid",
            allowed_values=("sigmoid", "none"),
        ),
        Parameter(
            name="return_documents",
            description="Whether the result repeats the documents.",
            type=ParameterType.BOOL,
            default=False,
        ),
        _top_k(None, "documents"),
        _truncation("a document"),
    ),
    auto_classes=("AutoModelForSequenceClassification", "AutoModel"),
    families=_ANY_TRANSFORMER,
)

SENTENCE_SIMILARITY = TaskSpec(
    id="sentence-similarity",
    description="Compares a sentence with others: the cosine of their embeddings.",
    input_kinds=(SimilarityInput.KIND,),
    result_kinds=(SimilarityResult.KIND,),
    parameters=(_pooling("mean"), _truncation("a sentence")),
    auto_classes=("AutoModel",),
    families=_ANY_TRANSFORMER,
)

TEXT_TASKS: tuple[TaskSpec, ...] = (
    FEATURE_EXTRACTION,
    FILL_MASK,
    QUESTION_ANSWERING,
    SENTENCE_SIMILARITY,
    TABLE_QUESTION_ANSWERING,
    TEXT_CLASSIFICATION,
    TEXT_RANKING,
    TOKEN_CLASSIFICATION,
    ZERO_SHOT_CLASSIFICATION,
)
