"""From a task and a loaded model to the runner that does it. Lives in workers; imports what a task needs, no more."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slipstream_server.errors import InvalidField, MissingDependency, UnsupportedField
from slipstream_server.models.missing import missing_package
from slipstream_server.tasks.media_specs import MEDIA_SPECS
from slipstream_server.tasks.runner import Runner
from slipstream_server.tasks.specs import TaskSpec, missing_packages

_SPECS: Mapping[str, TaskSpec] = {spec.id: spec for spec in MEDIA_SPECS}


def media_runner(task_id: str, model: Any, processor_folder: Path, device: Any) -> Runner:
    """The runner of a task on ``model``, which is loaded, in eval mode and on ``device``; its processors are read from
    ``processor_folder``. Raises InvalidField, MissingDependency, UnsupportedField or ModelLoadFailed.
    """
    if task_id not in _MAKERS:
        raise InvalidField.of("task", f"{task_id!r} is not one of {', '.join(sorted(_MAKERS))}")
    if missing := missing_packages(_SPECS[task_id]):
        raise MissingDependency(f"{task_id} needs packages that are not installed: {', '.join(missing)}")
    try:
        return _MAKERS[task_id](task_id, model, processor_folder, device)
    except ImportError as error:
        package = missing_package(error) or "unknown"
        raise MissingDependency(f"{task_id} needs a package that is not installed: {package}") from error


def _pipeline(
    pipeline_class: Any, task_id: str, model: Any, folder: Path, device: Any, *, without: tuple[str, ...] = ()
) -> Any:
    from slipstream_server.tasks.media.processors import load_processors

    processors = load_processors(pipeline_class, folder, without=without)
    placement = {} if getattr(model, "hf_device_map", None) is not None else {"device": device}
    return pipeline_class(model=model, task=task_id, **placement, **processors)


Maker = Callable[[str, Any, Path, Any], Runner]


def _of_transformers(class_name: str, room: str, steps: str, *, without: tuple[str, ...] = ()) -> Maker:
    """A pipeline of Transformers' own and the steps named ``steps`` of ``room``."""

    def make(task_id: str, model: Any, folder: Path, device: Any) -> Runner:
        import transformers

        pipeline_class = getattr(transformers, class_name, None)
        if pipeline_class is None:
            raise MissingDependency(f"{task_id} needs a newer release of transformers than {transformers.__version__}")
        return _runner(_pipeline(pipeline_class, task_id, model, folder, device, without=without), room, steps)

    return make


def _of_ours(class_room: str, class_name: str, room: str, steps: str) -> Maker:
    """A pipeline of this room and the steps named ``steps`` of ``room``."""

    def make(task_id: str, model: Any, folder: Path, device: Any) -> Runner:
        pipeline_class = getattr(importlib.import_module(f"{__package__}.{class_room}"), class_name)
        return _runner(_pipeline(pipeline_class, task_id, model, folder, device), room, steps)

    return make


def _runner(pipeline: Any, room: str, steps: str) -> Runner:
    from slipstream_server.tasks.media.pipelines import PipelineRunner

    return PipelineRunner(pipeline, getattr(importlib.import_module(f"{__package__}.{room}"), steps))


def _masks(task_id: str, model: Any, folder: Path, device: Any) -> Runner:
    from slipstream_server.tasks.media.masks import LoneMaskPipeline, MaskRunner

    return MaskRunner(_pipeline(LoneMaskPipeline, task_id, model, folder, device))


def _documents(task_id: str, model: Any, folder: Path, device: Any) -> Runner:
    from slipstream_server.tasks.media.pages import READERS, PageQuestionPipeline, processors_left_out

    kind = model.config.model_type
    if kind not in READERS or (kind == "vision-encoder-decoder" and model.config.encoder.model_type != "donut-swin"):
        raise UnsupportedField.of("task", f"{task_id} with {kind}; LayoutLM, LayoutLMv3 and Donut models can do it")
    pipeline = _pipeline(PageQuestionPipeline, task_id, model, folder, device, without=processors_left_out(kind))
    if hasattr(pipeline.image_processor, "apply_ocr"):
        pipeline.image_processor.apply_ocr = False  # the caller reads the page
    return _runner(pipeline, "pages", "DOCUMENT_QUESTIONS")


def _conversations(task_id: str, model: Any, folder: Path, device: Any) -> Runner:
    """By chat template where the processor has one, else picture to caption."""
    from slipstream_server.tasks.media.conversing import ConversationPipeline
    from slipstream_server.tasks.media.processors import load_processors
    from slipstream_server.tasks.media.rebuilt import CaptionPipeline

    if model.config.model_type not in ("blip", "git", "vision-encoder-decoder"):
        processors = load_processors(ConversationPipeline, folder)
        if getattr(processors["processor"], "chat_template", None) is not None:
            return _runner(
                _pipeline(ConversationPipeline, task_id, model, folder, device), "conversing", "CONVERSATION"
            )
        raise UnsupportedField.of("task", f"{task_id} on a {model.config.model_type} model without a chat template")
    return _runner(_pipeline(CaptionPipeline, task_id, model, folder, device), "conversing", "CAPTION")


def _speaking(task_id: str, model: Any, folder: Path, device: Any) -> Runner:
    from transformers import TextToAudioPipeline

    if model.config.model_type in ("speecht5", "fastspeech2_conformer"):
        raise UnsupportedField.of("task", f"{task_id} with {model.config.model_type}, which needs a vocoder beside it")
    return _runner(_pipeline(TextToAudioPipeline, task_id, model, folder, device), "hearing", "SPEAKING")


def _deciding(task_id: str, model: Any, folder: Path, device: Any) -> Runner:
    import transformers

    if not hasattr(transformers, "DecisionPipeline"):
        raise MissingDependency(f"{task_id} needs a newer release of transformers than {transformers.__version__}")
    from transformers.decision import DecisionConfig

    from slipstream_server.tasks.media.processors import load_processors

    config = DecisionConfig.from_pretrained(str(folder), local_files_only=True)
    if config.adapter:
        raise UnsupportedField.of("task", f"{task_id} with an adapter named by the model's decision settings")
    processors = load_processors(transformers.DecisionPipeline, folder)
    pipeline = transformers.DecisionPipeline(
        model=model, task=task_id, device=device, decision_config=config, **processors
    )
    return _runner(pipeline, "deciding", "DECISION")


_MAKERS: Mapping[str, Maker] = {
    "image-classification": _of_transformers("ImageClassificationPipeline", "vision", "CLASSIFICATION"),
    "zero-shot-image-classification": _of_transformers("ZeroShotImageClassificationPipeline", "vision", "ZERO_SHOT"),
    "image-feature-extraction": _of_transformers("ImageFeatureExtractionPipeline", "vision", "FEATURES"),
    "object-detection": _of_transformers("ObjectDetectionPipeline", "vision", "DETECTION", without=("tokenizer",)),
    "zero-shot-object-detection": _of_ours("rebuilt", "OneImageDetectionPipeline", "vision", "ZERO_SHOT_DETECTION"),
    "image-segmentation": _of_transformers("ImageSegmentationPipeline", "vision", "SEGMENTATION"),
    "depth-estimation": _of_transformers("DepthEstimationPipeline", "vision", "DEPTH"),
    "mask-generation": _masks,
    "keypoint-matching": _of_ours("rebuilt", "PixelKeypointPipeline", "vision", "KEYPOINTS"),
    "image-text-to-text": _conversations,
    "any-to-any": _conversations,
    "visual-question-answering": _of_ours(
        "rebuilt", "VisualQuestionAnsweringPipeline", "questions", "VISUAL_QUESTIONS"
    ),
    "document-question-answering": _documents,
    "image-to-image": _of_ours("rebuilt", "ImageToImagePipeline", "questions", "IMAGE_TO_IMAGE"),
    "audio-classification": _of_transformers("AudioClassificationPipeline", "hearing", "SOUND_CLASSIFICATION"),
    "zero-shot-audio-classification": _of_transformers(
        "ZeroShotAudioClassificationPipeline", "hearing", "ZERO_SHOT_SOUND"
    ),
    "automatic-speech-recognition": _of_transformers("AutomaticSpeechRecognitionPipeline", "hearing", "SPEECH"),
    "text-to-audio": _speaking,
    "video-classification": _of_ours("watching", "FilmClassificationPipeline", "watching", "FILM_CLASSIFICATION"),
    "decision": _deciding,
}
