"""Which task, which Transformers class, which kind of architecture: one table, read both ways. Torch-free, pure data.

A model's class is known by the ending of its name ("BertForTokenClassification"); where an ending means several things
("WhisperForConditionalGeneration", "CLIPModel") the model type decides, and stands first in the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from slipstream_server.models.facts import Family, ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Models with one of ``endings`` (of one of ``model_types``, where some are named) can do ``tasks``.

    ``auto_class`` loads them. ``kind`` is the contract's architecture family, where the configuration alone would say
    less.
    """

    auto_class: str
    endings: tuple[str, ...]
    tasks: tuple[str, ...]
    model_types: frozenset[str] = frozenset()
    kind: str = ""

    def fits(self, architecture: str, model_type: str) -> bool:
        return architecture.endswith(self.endings) and (not self.model_types or model_type in self.model_types)


SUMMARIZATION, TRANSLATION = "summarization", "translation"
TEXT_GENERATION, TEXT2TEXT_GENERATION = "text-generation", "text2text-generation"
_SEQ2SEQ_TASKS = (SUMMARIZATION, TEXT2TEXT_GENERATION, TRANSLATION)
# Sentence embeddings come from any encoder; what compares them needs no head of its own.
_EMBEDDING_TASKS = ("feature-extraction", "sentence-similarity", "text-ranking")

_SPEECH_WRITERS = frozenset({"whisper", "speech_to_text", "speecht5", "moonshine", "seamless_m4t", "seamless_m4t_v2"})
_SPEAKERS = frozenset(
    {"bark", "vits", "speecht5", "musicgen", "musicgen_melody", "fastspeech2_conformer", "csm", "dia"}
)
_PICTURE_READERS = frozenset(
    {
        "aya_vision", "blip", "blip-2", "emu3", "gemma3", "git", "glm4v", "got_ocr2", "idefics", "idefics2", "idefics3",
        "instructblip", "internvl", "janus", "kosmos-2", "llava", "llava_next", "llava_onevision", "mistral3", "mllama",
        "paligemma", "pix2struct", "pixtral", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm", "vision-encoder-decoder",
        "vipllava",
    }
)  # fmt: skip
_PICTURE_COMPARERS = frozenset(
    {"align", "altclip", "blip", "chinese_clip", "clip", "clipseg", "metaclip_2", "siglip", "siglip2"}
)
_PICTURE_MODELS = frozenset(
    {
        "beit", "bit", "convnext", "convnextv2", "cvt", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers",
        "dinov3_vit", "efficientnet", "hiera", "ijepa", "levit", "mobilenet_v1", "mobilenet_v2", "mobilevit",
        "poolformer", "pvt", "regnet", "resnet", "segformer", "swin", "swinv2", "vit", "vit_mae", "vit_msn",
    }
)  # fmt: skip
_SOUND_MODELS = frozenset(
    {
        "audio-spectrogram-transformer", "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat",
        "wav2vec2", "wav2vec2-bert", "wav2vec2-conformer", "wavlm", "whisper",
    }
)  # fmt: skip

HEADS: tuple[Head, ...] = (
    # Told by the model type first.
    Head(
        auto_class="AutoModelForSpeechSeq2Seq",
        endings=("ForConditionalGeneration", "ForSpeechToText", "ForSpeechSeq2Seq"),
        model_types=_SPEECH_WRITERS,
        tasks=("automatic-speech-recognition",),
        kind="audio",
    ),
    Head(
        auto_class="AutoModelForTextToWaveform",
        endings=("Model", "ForTextToSpeech", "ForConditionalGeneration", "WithHifiGan"),
        model_types=_SPEAKERS,
        tasks=("text-to-audio",),
        kind="audio",
    ),
    Head(
        auto_class="AutoModelForImageTextToText",
        endings=("ForConditionalGeneration", "ForVision2Seq", "VisionEncoderDecoderModel", "ForCausalLM"),
        model_types=_PICTURE_READERS,
        tasks=("image-text-to-text",),
        kind="multimodal",
    ),
    Head(
        auto_class="AutoModelForMultimodalLM",
        endings=("ForConditionalGeneration",),
        model_types=frozenset({"gemma3n", "qwen2_audio", "qwen2_5_omni"}),
        tasks=("any-to-any",),
        kind="multimodal",
    ),
    Head(
        auto_class="AutoModelForZeroShotImageClassification",
        endings=("Model",),
        model_types=_PICTURE_COMPARERS,
        tasks=("zero-shot-image-classification",),
        kind="multimodal",
    ),
    Head(
        auto_class="AutoModel",
        endings=("Model",),
        model_types=frozenset({"clap"}),
        tasks=("zero-shot-audio-classification",),
        kind="multimodal",
    ),
    Head(
        auto_class="AutoModelForMaskGeneration",
        endings=("Model",),
        model_types=frozenset({"sam", "sam_hq", "sam2"}),
        tasks=("mask-generation",),
        kind="vision",
    ),
    Head(
        auto_class="AutoModelForTableQuestionAnswering",
        endings=("ForQuestionAnswering",),
        model_types=frozenset({"tapas"}),
        tasks=("table-question-answering",),
    ),
    Head(
        auto_class="AutoModelForVisualQuestionAnswering",
        endings=("ForQuestionAnswering",),
        model_types=frozenset({"vilt", "blip"}),
        tasks=("visual-question-answering",),
        kind="multimodal",
    ),
    Head(
        auto_class="AutoModelForDocumentQuestionAnswering",
        endings=("ForQuestionAnswering",),
        model_types=frozenset({"layoutlm", "layoutlmv2", "layoutlmv3"}),
        tasks=("document-question-answering",),
        kind="multimodal",
    ),
    Head(
        auto_class="AutoModelForZeroShotObjectDetection",
        endings=("ForObjectDetection",),
        model_types=frozenset({"owlvit", "owlv2", "grounding-dino", "mm-grounding-dino", "omdet-turbo"}),
        tasks=("zero-shot-object-detection",),
        kind="multimodal",
    ),
    Head(
        auto_class="AutoModelForAudioClassification",
        endings=("ForSequenceClassification", "ForAudioClassification"),
        model_types=_SOUND_MODELS,
        tasks=("audio-classification",),
        kind="audio",
    ),
    # Told by the ending alone.
    Head(
        auto_class="AutoModelForSequenceClassification",
        endings=("ForSequenceClassification",),
        tasks=("text-classification", "text-ranking"),
    ),
    Head(
        auto_class="AutoModelForTokenClassification",
        endings=("ForTokenClassification",),
        tasks=("token-classification",),
    ),
    Head(auto_class="AutoModelForQuestionAnswering", endings=("ForQuestionAnswering",), tasks=("question-answering",)),
    Head(
        auto_class="AutoModelForMaskedLM",
        endings=("ForMaskedLM", "ForPreTraining"),
        tasks=("fill-mask",),
    ),
    Head(
        auto_class="AutoModelForImageClassification",
        endings=("ForImageClassification", "ForImageClassificationWithTeacher"),
        tasks=("image-classification",),
        kind="vision",
    ),
    Head(
        auto_class="AutoModelForObjectDetection",
        endings=("ForObjectDetection",),
        tasks=("object-detection",),
        kind="vision",
    ),
    Head(
        auto_class="AutoModelForUniversalSegmentation",
        endings=("ForUniversalSegmentation", "ForInstanceSegmentation", "ForSegmentation"),
        tasks=("image-segmentation",),
        kind="vision",
    ),
    Head(
        auto_class="AutoModelForSemanticSegmentation",
        endings=("ForSemanticSegmentation",),
        tasks=("image-segmentation",),
        kind="vision",
    ),
    Head(auto_class="AutoModelForDecision", endings=("ForDecision",), tasks=("decision",)),
    Head(
        auto_class="AutoModelForDepthEstimation",
        endings=("ForDepthEstimation",),
        tasks=("depth-estimation",),
        kind="vision",
    ),
    Head(
        auto_class="AutoModelForImageToImage",
        endings=("ForImageSuperResolution",),
        tasks=("image-to-image",),
        kind="vision",
    ),
    Head(
        auto_class="AutoModelForKeypointMatching",
        endings=("ForKeypointMatching",),
        tasks=("keypoint-matching",),
        kind="vision",
    ),
    Head(
        auto_class="AutoModelForVideoClassification",
        endings=("ForVideoClassification",),
        tasks=("video-classification",),
        kind="vision",
    ),
    Head(
        auto_class="AutoModelForAudioClassification",
        endings=("ForAudioClassification",),
        tasks=("audio-classification",),
        kind="audio",
    ),
    Head(auto_class="AutoModelForCTC", endings=("ForCTC",), tasks=("automatic-speech-recognition",), kind="audio"),
    Head(
        auto_class="AutoModelForSeq2SeqLM",
        endings=("ForConditionalGeneration", "MTModel", "ForSeq2SeqLM"),
        tasks=_SEQ2SEQ_TASKS,
    ),
    Head(auto_class="AutoModelForCausalLM", endings=("ForCausalLM", "LMHeadModel"), tasks=(TEXT_GENERATION,)),
    Head(
        auto_class="AutoModel",
        endings=("Model",),
        model_types=_PICTURE_MODELS,
        tasks=("image-feature-extraction",),
        kind="vision",
    ),
    Head(auto_class="AutoModel", endings=("Model",), tasks=_EMBEDDING_TASKS),
)

# What models of another class's own can be loaded for, where a load names the task.
_OTHER_USES: tuple[Head, ...] = (
    Head(
        auto_class="AutoModelForImageTextToText",
        endings=("VisionEncoderDecoderModel",),
        model_types=frozenset({"vision-encoder-decoder"}),
        tasks=("document-question-answering",),
        kind="multimodal",
    ),
    Head(
        auto_class="AutoModelForSeq2SeqLM",
        endings=("ForConditionalGeneration",),
        model_types=frozenset({"bart", "mbart", "mt5", "t5"}),
        tasks=("table-question-answering",),
    ),
)


def head_of(facts: ModelFacts) -> Head | None:
    """The head of a model, by the first of its architectures that the table knows."""
    for architecture in facts.architectures:
        for head in HEADS:
            if head.fits(architecture, facts.model_type):
                return head
    return None


def head_for(facts: ModelFacts, task: str) -> Head | None:
    """The head of a model that does ``task``; None where only a class of another kind does."""
    for head in (*HEADS, *_OTHER_USES):
        if task in head.tasks and any(head.fits(each, facts.model_type) for each in facts.architectures):
            return head
    return None


def tasks_of(facts: ModelFacts) -> tuple[str, ...]:
    """The ids of the tasks that a model can do, in their order."""
    head = head_of(facts)
    if head is None:
        return ()
    tasks = set(head.tasks)
    if "text-classification" in tasks and tells_entailment(facts):
        tasks.add("zero-shot-classification")
    return tuple(sorted(tasks))


def tasks_when_loaded_for(task: str) -> tuple[str, ...]:
    """What a model can do that was loaded for a task its own class is not for: all that the same head does."""
    heads = [head for head in HEADS if task in head.tasks]
    return tuple(sorted(heads[-1].tasks)) if heads else (task,)


def writes_text(facts: ModelFacts) -> bool:
    """Whether the generation path runs the model: text in, text out, nothing to look at or listen to."""
    head = head_of(facts)
    return head is not None and head.auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def kind_of(facts: ModelFacts) -> str:
    """The architecture family: encoder, decoder, encoder_decoder, vision, audio or multimodal."""
    head = head_of(facts)
    return head.kind if head is not None and head.kind else Family(facts.family).value


def tells_entailment(facts: ModelFacts) -> bool:
    """Whether the labels are those of an entailment model, which zero-shot classification asks."""
    return any(label.lower().startswith("entail") for label in facts.labels)
