"""The tasks on pictures, sounds, films and documents: what each takes, gives and can be told. Torch-free data.

Defaults are those of Transformers' pipelines. ``packages`` are distributions as pip knows them.
"""

from __future__ import annotations

from typing import Any

from slipstream_server.tasks.items import (
    AudioInput,
    AudioResult,
    ClassificationResult,
    DecisionInput,
    DecisionResult,
    DepthResult,
    DocumentQuestionInput,
    EmbeddingResult,
    GeneratedTextResult,
    ImageInput,
    ImagePairInput,
    ImageResult,
    KeypointMatchingResult,
    MaskGenerationResult,
    MultimodalInput,
    ObjectDetectionResult,
    QuestionAnsweringResult,
    SegmentationResult,
    TextInput,
    TranscriptionResult,
    VideoInput,
    VisualQuestionInput,
    ZeroShotAudioInput,
    ZeroShotImageInput,
)
from slipstream_server.tasks.specs import Parameter, ParameterType, TaskSpec

_VISION = ("vision",)
_AUDIO = ("audio",)
_MULTIMODAL = ("multimodal",)
_PICTURES = ("pillow",)
_SOUNDS = ("soundfile", "soxr")
_FILMS = ("av", "pillow")
_MAX_COUNT = 100_000


def _int(name: str, description: str, least: int, most: int, default: int | None = None) -> Parameter:
    return Parameter(
        name=name, description=description, type=ParameterType.INT, min_value=least, max_value=most, default=default
    )


def _float(name: str, description: str, least: float, most: float, default: float | None = None) -> Parameter:
    return Parameter(
        name=name, description=description, type=ParameterType.FLOAT, min_value=least, max_value=most, default=default
    )


def _choice(name: str, description: str, allowed: tuple[str, ...], default: str | None = None) -> Parameter:
    return Parameter(
        name=name, description=description, type=ParameterType.STRING, allowed_values=allowed, default=default
    )


def _bool(name: str, description: str, *, default: bool) -> Parameter:
    return Parameter(name=name, description=description, type=ParameterType.BOOL, default=default)


def _top_k(default: int | None, what: str) -> Parameter:
    return _int(
        "top_k", f"How many {what} to return, best first; more than there are gives all.", 1, _MAX_COUNT, default
    )


_FUNCTION = _choice(
    "function_to_apply",
    "What turns logits into scores. Default: nothing for a regression model, sigmoid where several labels may hold at "
    "once, else softmax.",
    ("sigmoid", "softmax", "none"),
)
_SCORING = (_FUNCTION, _top_k(5, "labels"))


def _threshold(default: float, what: str) -> Parameter:
    return _float("threshold", f"{what} with a lower score are left out.", 0.0, 1.0, default)


_SEED = _int("seed", "Start of the random numbers. Default: another one for every request.", 0, 2**53 - 1)
_MAX_NEW_TOKENS = _int(
    "max_new_tokens", "Tokens to write at most. Default: the model's own setting, else 256.", 1, 8192
)
_DRAWING = (
    _bool("do_sample", "Whether tokens are drawn at random. Off: the most probable ones.", default=False),
    _SEED,
    _float("temperature", "How even the draw is; needs do_sample. Default: the model's own.", 0.01, 100.0),
    _int("top_k", "Draw from this many best tokens; needs do_sample. Default: the model's own.", 1, _MAX_COUNT),
    _float(
        "top_p",
        "Draw from the best tokens that make up this probability; needs do_sample. Default: the model's own.",
        0.0001,
        1.0,
    ),
)
_WRITING = (
    _MAX_NEW_TOKENS,
    _int("num_beams", "Beams of the search. Default: the model's own, else 1.", 1, 16),
    _int("num_return_sequences", "Texts to return; at most num_beams unless do_sample is on. Default: 1.", 1, 16),
    _bool("return_token_ids", "Whether token ids are returned beside the text.", default=False),
    *_DRAWING,
)


def _task(parameters: tuple[Parameter, ...] = (), **fields: Any) -> TaskSpec:
    """A task whose parameters stand in the order of their names."""
    return TaskSpec(parameters=tuple(sorted(parameters, key=lambda each: each.name)), **fields)


IMAGE_CLASSIFICATION = _task(
    id="image-classification",
    description="Sorts a picture under the labels that the model was trained on.",
    input_kinds=(ImageInput.KIND,),
    result_kinds=(ClassificationResult.KIND,),
    parameters=_SCORING,
    auto_classes=("AutoModelForImageClassification",),
    families=_VISION,
    packages=_PICTURES,
)

ZERO_SHOT_IMAGE_CLASSIFICATION = _task(
    id="zero-shot-image-classification",
    description="Sorts a picture under labels made up by the caller.",
    input_kinds=(ZeroShotImageInput.KIND,),
    result_kinds=(ClassificationResult.KIND,),
    auto_classes=("AutoModelForZeroShotImageClassification",),
    families=_MULTIMODAL,
    packages=_PICTURES,
)

IMAGE_FEATURE_EXTRACTION = _task(
    id="image-feature-extraction",
    description="Turns a picture into vectors: one for each patch, or one for the whole.",
    input_kinds=(ImageInput.KIND,),
    result_kinds=(EmbeddingResult.KIND,),
    parameters=(
        _bool("pool", "Whether the model's pooled vector is returned instead of one for each patch.", default=False),
    ),
    auto_classes=("AutoModel",),
    families=_VISION,
    packages=_PICTURES,
)

OBJECT_DETECTION = _task(
    id="object-detection",
    description="Finds the things in a picture that the model was trained on, with boxes around them.",
    input_kinds=(ImageInput.KIND,),
    result_kinds=(ObjectDetectionResult.KIND,),
    parameters=(_threshold(0.5, "Things"),),
    auto_classes=("AutoModelForObjectDetection",),
    families=_VISION,
    packages=_PICTURES,
)

ZERO_SHOT_OBJECT_DETECTION = _task(
    id="zero-shot-object-detection",
    description="Finds things named by the caller in a picture, with boxes around them.",
    input_kinds=(ZeroShotImageInput.KIND,),
    result_kinds=(ObjectDetectionResult.KIND,),
    parameters=(_threshold(0.1, "Things"), _top_k(None, "things")),
    auto_classes=("AutoModelForZeroShotObjectDetection",),
    families=_MULTIMODAL,
    packages=_PICTURES,
)

IMAGE_SEGMENTATION = _task(
    id="image-segmentation",
    description="Divides a picture into labelled areas. Large pictures are refused where the model has many labels.",
    input_kinds=(ImageInput.KIND,),
    result_kinds=(SegmentationResult.KIND,),
    parameters=(
        _choice(
            "subtask",
            "What an area is. Default: the first of panoptic, instance and semantic that the model can do.",
            ("panoptic", "instance", "semantic"),
        ),
        _threshold(0.9, "Areas"),
        _float("mask_threshold", "From which value on a pixel belongs to a panoptic area.", 0.0, 1.0, 0.5),
        _float(
            "overlap_mask_area_threshold",
            "Share of a panoptic area that must be left once other areas took theirs, else it is dropped.",
            0.0,
            1.0,
            0.5,
        ),
    ),
    auto_classes=(
        "AutoModelForImageSegmentation",
        "AutoModelForSemanticSegmentation",
        "AutoModelForUniversalSegmentation",
        "AutoModelForInstanceSegmentation",
    ),
    families=_VISION,
    packages=_PICTURES,
)

DEPTH_ESTIMATION = _task(
    id="depth-estimation",
    description="Tells how far away every pixel of a picture is.",
    input_kinds=(ImageInput.KIND,),
    result_kinds=(DepthResult.KIND,),
    parameters=(
        _bool(
            "return_tensor",
            "Whether the distances themselves are returned beside the picture of them; pictures of at most 3,000,000 "
            "pixels.",
            default=True,
        ),
    ),
    auto_classes=("AutoModelForDepthEstimation",),
    families=_VISION,
    packages=_PICTURES,
)

MASK_GENERATION = _task(
    id="mask-generation",
    description=(
        "Finds all areas of a picture by itself, without labels. Pictures of at most 16,000,000 pixels. Models of SAM "
        "and SAM-HQ; those of SAM 2 need torchvision on the server."
    ),
    input_kinds=(ImageInput.KIND,),
    result_kinds=(MaskGenerationResult.KIND,),
    parameters=(
        _int(
            "points_per_batch", "Points asked about at once, fewer on large pictures. No effect on masks.", 1, 1024, 64
        ),
        _int("points_per_crop", "Points on each side of the grid.", 1, 64, 32),
        _int("crops_n_layers", "Layers of crops to look at too, of 4, 16, ... crops.", 0, 2, 0),
        _float("crop_overlap_ratio", "Share of the picture's side by which crops overlap.", 0.0, 0.9, 512 / 1500),
        _float("pred_iou_thresh", "Masks that the model rates lower are left out.", 0.0, 1.0, 0.88),
        _float("stability_score_thresh", "Masks that change more with the cutoff are left out.", 0.0, 1.0, 0.95),
        _float("stability_score_offset", "How far the cutoff is moved to see how masks change.", 0.0, 10.0, 1.0),
        _float("mask_threshold", "From which logit on a pixel belongs to a mask.", -20.0, 20.0, 0.0),
        _float("crops_nms_thresh", "Overlap of boxes above which the worse of two masks is left out.", 0.0, 1.0, 0.7),
    ),
    auto_classes=("AutoModelForMaskGeneration",),
    families=_VISION,
    packages=_PICTURES,
)

KEYPOINT_MATCHING = _task(
    id="keypoint-matching",
    description="Finds points of two pictures that show the same thing.",
    input_kinds=(ImagePairInput.KIND,),
    result_kinds=(KeypointMatchingResult.KIND,),
    parameters=(_threshold(0.0, "Matches"),),
    auto_classes=("AutoModelForKeypointMatching",),
    families=_VISION,
    packages=_PICTURES,
)

IMAGE_TEXT_TO_TEXT = _task(
    id="image-text-to-text",
    aliases=("image-to-text",),
    description="Writes about pictures: captions, and answers of models that converse.",
    input_kinds=(ImageInput.KIND, MultimodalInput.KIND),
    result_kinds=(GeneratedTextResult.KIND,),
    parameters=_WRITING,
    auto_classes=("AutoModelForImageTextToText",),
    families=_MULTIMODAL,
    packages=_PICTURES,
)

ANY_TO_ANY = _task(
    id="any-to-any",
    description="Writes about text, pictures, sounds and films in one message, as far as the model reads them.",
    input_kinds=(MultimodalInput.KIND,),
    result_kinds=(GeneratedTextResult.KIND,),
    parameters=(
        *_WRITING,
        _int("num_frames", "Frames to read of each film, from its beginning; torchvision has to be there.", 1, 64, 8),
    ),
    auto_classes=("AutoModelForMultimodalLM", "AutoModelForImageTextToText"),
    families=_MULTIMODAL,
    packages=("av", "pillow", "soundfile", "soxr"),
)

VISUAL_QUESTION_ANSWERING = _task(
    id="visual-question-answering",
    aliases=("vqa",),
    description="Answers a question about a picture, from a list the model was trained on or in its own words.",
    input_kinds=(VisualQuestionInput.KIND,),
    result_kinds=(QuestionAnsweringResult.KIND,),
    parameters=(
        _top_k(5, "answers of models that choose from a list"),
        _MAX_NEW_TOKENS,
        _int("num_beams", "Beams of models that write their answer. Default: the model's own, else 1.", 1, 16),
    ),
    auto_classes=("AutoModelForVisualQuestionAnswering",),
    families=_MULTIMODAL,
    packages=_PICTURES,
    removed_in_transformers="5.0",
)

DOCUMENT_QUESTION_ANSWERING = _task(
    id="document-question-answering",
    description=(
        "Answers a question about a page. LayoutLM needs the words on it with their boxes, LayoutLMv3 the picture "
        "beside them, Donut the picture alone; there is no OCR here that would read words off a picture."
    ),
    input_kinds=(DocumentQuestionInput.KIND,),
    result_kinds=(QuestionAnsweringResult.KIND,),
    parameters=(
        _top_k(1, "answers"),
        _int("doc_stride", "Tokens that neighbouring windows share. Default: half a window, at most 256.", 1, 4096),
        _int("max_seq_len", "Tokens of a window; no more than the model reads, which is the default.", 16, 8192),
        _int("max_answer_len", "Tokens of an answer at most; no effect on models that write it.", 1, 1024, 15),
        _bool("handle_impossible_answer", "Whether no answer is an answer.", default=False),
    ),
    auto_classes=("AutoModelForDocumentQuestionAnswering", "AutoModelForImageTextToText"),
    families=_MULTIMODAL,
    packages=_PICTURES,
)

IMAGE_TO_IMAGE = _task(
    id="image-to-image",
    description="Makes a picture larger or cleaner. Pictures of at most 2,000,000 pixels.",
    input_kinds=(ImageInput.KIND,),
    result_kinds=(ImageResult.KIND,),
    auto_classes=("AutoModelForImageToImage",),
    families=_VISION,
    packages=_PICTURES,
    removed_in_transformers="5.0",
)

AUDIO_CLASSIFICATION = _task(
    id="audio-classification",
    description="Sorts a sound of at most 30 minutes under the labels that the model was trained on.",
    input_kinds=(AudioInput.KIND,),
    result_kinds=(ClassificationResult.KIND,),
    parameters=_SCORING,
    auto_classes=("AutoModelForAudioClassification",),
    families=_AUDIO,
    packages=_SOUNDS,
)

ZERO_SHOT_AUDIO_CLASSIFICATION = _task(
    id="zero-shot-audio-classification",
    description="Sorts a sound of at most 30 minutes under labels made up by the caller.",
    input_kinds=(ZeroShotAudioInput.KIND,),
    result_kinds=(ClassificationResult.KIND,),
    auto_classes=("AutoModel",),
    families=_MULTIMODAL,
    packages=_SOUNDS,
)

AUTOMATIC_SPEECH_RECOGNITION = _task(
    id="automatic-speech-recognition",
    description="Writes down what is said in a sound of at most 30 minutes.",
    input_kinds=(AudioInput.KIND,),
    result_kinds=(TranscriptionResult.KIND,),
    parameters=(
        _choice(
            "return_timestamps",
            "Which pieces come with times: none, char and word (CTC models), word and segment (Whisper).",
            ("none", "char", "word", "segment"),
            "none",
        ),
        _bool("return_language", "Whether the language that was heard is returned (Whisper).", default=False),
        _float("chunk_length_s", "Seconds of the chunks that a long sound is cut into. Default: not cut.", 1.0, 60.0),
        _float("stride_length_s", "Seconds of overlap on each side of a chunk. Default: a sixth.", 0.0, 29.0),
        Parameter(
            name="language",
            description="Language spoken, as a code or its English name (multilingual Whisper). Default: heard.",
            type=ParameterType.STRING,
        ),
        _choice("task", "Whether to translate into English (multilingual Whisper).", ("transcribe", "translate")),
        _MAX_NEW_TOKENS,
        _int("num_beams", "Beams of models that write text. Default: the model's own, else 5.", 1, 16),
    ),
    auto_classes=("AutoModelForCTC", "AutoModelForSpeechSeq2Seq"),
    families=_AUDIO,
    packages=_SOUNDS,
)

TEXT_TO_AUDIO = _task(
    id="text-to-audio",
    aliases=("text-to-speech",),
    description="Speaks a text of at most 4096 characters, or makes the sound that it describes.",
    input_kinds=(TextInput.KIND,),
    result_kinds=(AudioResult.KIND,),
    parameters=(_MAX_NEW_TOKENS, *_DRAWING),
    auto_classes=("AutoModelForTextToWaveform",),
    families=_AUDIO,
)

VIDEO_CLASSIFICATION = _task(
    id="video-classification",
    description="Sorts a film (MP4, WebM, Matroska, AVI) under the labels that the model was trained on.",
    input_kinds=(VideoInput.KIND,),
    result_kinds=(ClassificationResult.KIND,),
    parameters=(
        *_SCORING,
        _int("num_frames", "Frames to read. Default: as many as the model was trained on.", 1, 128),
        _int("frame_sampling_rate", "Read every so many-th frame.", 1, 64, 1),
    ),
    auto_classes=("AutoModelForVideoClassification",),
    families=_VISION,
    packages=_FILMS,
)

DECISION = _task(
    id="decision",
    description="Answers typed questions about a state of affairs with a probability for every option.",
    input_kinds=(DecisionInput.KIND,),
    result_kinds=(DecisionResult.KIND,),
    auto_classes=("AutoModelForDecision", "AutoModelForImageTextToText", "AutoModelForCausalLM"),
    families=("decoder", "multimodal"),
    packages=_PICTURES,
)

MEDIA_SPECS: tuple[TaskSpec, ...] = (
    ANY_TO_ANY,
    AUDIO_CLASSIFICATION,
    AUTOMATIC_SPEECH_RECOGNITION,
    DECISION,
    DEPTH_ESTIMATION,
    DOCUMENT_QUESTION_ANSWERING,
    IMAGE_CLASSIFICATION,
    IMAGE_FEATURE_EXTRACTION,
    IMAGE_SEGMENTATION,
    IMAGE_TEXT_TO_TEXT,
    IMAGE_TO_IMAGE,
    KEYPOINT_MATCHING,
    MASK_GENERATION,
    OBJECT_DETECTION,
    TEXT_TO_AUDIO,
    VIDEO_CLASSIFICATION,
    VISUAL_QUESTION_ANSWERING,
    ZERO_SHOT_AUDIO_CLASSIFICATION,
    ZERO_SHOT_IMAGE_CLASSIFICATION,
    ZERO_SHOT_OBJECT_DETECTION,
)
"""Every task of this file, in the order of their ids."""
