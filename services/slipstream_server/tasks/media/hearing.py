"""What the tasks on sounds and films add to their pipelines."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from slipstream_server.errors import InvalidField, PromptTooLong
from slipstream_server.tasks.items import (
    AudioInput,
    AudioResult,
    ClassificationResult,
    TextInput,
    TranscriptionChunk,
    TranscriptionResult,
    ZeroShotAudioInput,
)
from slipstream_server.tasks.media.pipelines import Alone, Parameters, Steps, alone, check_drawing, given
from slipstream_server.tasks.media.sounds import decode_sound
from slipstream_server.tasks.media.vision import candidates, label_scores, same_candidates, shape_candidates


def _rate_hz(pipeline: Any) -> int:
    return int(pipeline.feature_extractor.sampling_rate)


def _read_sound(pipeline: Any, item: AudioInput, parameters: Parameters) -> Any:
    return decode_sound(item, _rate_hz(pipeline), "audio")


def _scoring(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    return given(parameters, "top_k", "function_to_apply")


def _shape_labels(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> ClassificationResult:
    return label_scores(pipeline, found)


SOUND_CLASSIFICATION = Steps(read=_read_sound, arguments=_scoring, shape=_shape_labels)


def _read_zero_shot(pipeline: Any, item: ZeroShotAudioInput, parameters: Parameters) -> Any:
    return decode_sound(item.audio, _rate_hz(pipeline), "zero_shot_audio.audio")


ZERO_SHOT_SOUND = Steps(read=_read_zero_shot, arguments=candidates, company=same_candidates, shape=shape_candidates)


# automatic-speech-recognition

_TIMESTAMPS = {"none": None, "word": "word", "char": "char", "segment": True}
_PROMPT_TOKENS = 4
"""Start, language, task and whether there are times."""
_GENERATION = ("language", "task", "max_new_tokens", "num_beams")


def _read_speech(pipeline: Any, item: AudioInput, parameters: Parameters) -> Any:
    _check_speech(pipeline, parameters)
    samples_T = decode_sound(item, _rate_hz(pipeline), "audio")
    is_long = _is_whisper(pipeline) and len(samples_T) > pipeline.feature_extractor.n_samples
    if is_long and not parameters.get("chunk_length_s") and _timestamps(parameters) is None:
        raise InvalidField.of(
            "audio.data",
            f"longer than the {pipeline.feature_extractor.n_samples / _rate_hz(pipeline):.0f} s that this model hears "
            'at once: set chunk_length_s, or return_timestamps to "segment"',
        )
    return samples_T


def _is_whisper(pipeline: Any) -> bool:
    return bool(pipeline.type == "seq2seq_whisper")


def _timestamps(parameters: Parameters) -> Any:
    return _TIMESTAMPS[str(parameters.get("return_timestamps") or "none")]


def _check_speech(pipeline: Any, parameters: Parameters) -> None:
    """What this kind of model cannot do is said before it hears anything."""
    asked = str(parameters.get("return_timestamps") or "none")
    able = {"ctc": ("none", "char", "word"), "seq2seq_whisper": ("none", "word", "segment"), "seq2seq": ("none",)}
    if asked not in able.get(pipeline.type, ("none",)):
        allowed = ", ".join(able.get(pipeline.type, ("none",)))
        raise InvalidField.of("parameters.return_timestamps", f"{asked!r}; this model gives {allowed}")
    for name in _GENERATION:
        if parameters.get(name) is not None and pipeline.type == "ctc":
            raise InvalidField.of(f"parameters.{name}", "this model labels frames and writes no text of its own")
    _check_writing(pipeline, parameters)
    for name in ("language", "task"):
        if parameters.get(name) is not None and not _is_multilingual(pipeline):
            raise InvalidField.of(f"parameters.{name}", "this model knows one language and does not translate")
    if parameters.get("return_language") and not _is_whisper(pipeline):
        raise InvalidField.of("parameters.return_language", "this model does not say which language it heard")
    chunk_s, stride_s = parameters.get("chunk_length_s") or 0, parameters.get("stride_length_s") or 0
    if stride_s and 2 * stride_s >= chunk_s:
        raise InvalidField.of("parameters.stride_length_s", f"{stride_s}; less than half of chunk_length_s ({chunk_s})")


def _check_writing(pipeline: Any, parameters: Parameters) -> None:
    """Whisper refuses to be told more than it has positions for, once it runs."""
    positions = getattr(pipeline.model.config, "max_target_positions", None)
    asked = parameters.get("max_new_tokens")
    if asked and positions and asked + _PROMPT_TOKENS > positions:
        room = positions - _PROMPT_TOKENS
        raise InvalidField.of("parameters.max_new_tokens", f"{asked}; this model writes at most {room} at once")


def _is_multilingual(pipeline: Any) -> bool:
    return _is_whisper(pipeline) and bool(getattr(pipeline.model.generation_config, "is_multilingual", False))


def _speech_arguments(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    arguments = given(parameters, "chunk_length_s", "stride_length_s", *_GENERATION)
    arguments["ignore_warning"] = True
    if (timestamps := _timestamps(parameters)) is not None:
        arguments["return_timestamps"] = timestamps
    if parameters.get("return_language"):
        arguments["return_language"] = True
    return arguments


def _speech_company(item: Any, parameters: Parameters) -> Hashable:
    """Words' times and the language are read off the first row only; chunks carry a place of their own."""
    is_plain = _timestamps(parameters) in (None, "char") and not parameters.get("return_language")
    return None if is_plain and not parameters.get("chunk_length_s") else Alone()


def _shape_transcription(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> TranscriptionResult:
    chunks = found.get("chunks") or []
    language = next((chunk["language"] for chunk in chunks if chunk.get("language")), "")
    return TranscriptionResult(
        text=found["text"],
        chunks=[_chunk(chunk) for chunk in chunks] if _timestamps(parameters) is not None else [],
        language=_language_code(language),
    )


def _chunk(chunk: dict[str, Any]) -> TranscriptionChunk:
    start_s, end_s = chunk["timestamp"]
    return TranscriptionChunk(chunk["text"], float(start_s or 0.0), None if end_s is None else float(end_s))


def _language_code(name: str) -> str:
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return str(TO_LANGUAGE_CODE.get(name, name))


SPEECH = Steps(read=_read_speech, arguments=_speech_arguments, company=_speech_company, shape=_shape_transcription)


# text-to-audio

MAX_SPOKEN_CHARACTERS = 4096
"""Models that speak hold the whole sound, and attend to all of the text, at once."""


_SPEECH_GENERATION = ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens")


def _read_text(pipeline: Any, item: TextInput, parameters: Parameters) -> Any:
    check_drawing(pipeline, parameters)
    if not item.text.strip():
        raise InvalidField.of("text", "is empty")
    if len(item.text) > MAX_SPOKEN_CHARACTERS:
        raise PromptTooLong.of(
            "text", f"{len(item.text)} characters; at most {MAX_SPOKEN_CHARACTERS} are spoken at once"
        )
    for name in _SPEECH_GENERATION:
        if parameters.get(name) and not pipeline.model.can_generate():
            raise InvalidField.of(f"parameters.{name}", "this model makes the whole sound at once, not token by token")
    return item.text


def _speaking(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    generate = given(parameters, *_SPEECH_GENERATION)
    return {"generate_kwargs": generate if pipeline.model.can_generate() else {}}


def _shape_sound(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> AudioResult:
    samples = np.atleast_2d(np.asarray(found["audio"], dtype="<f4"))
    return AudioResult(
        data=np.ascontiguousarray(samples.T).tobytes(),
        encoding="pcm_f32le",
        sampling_rate_hz=int(found["sampling_rate"]),
        num_channels=samples.shape[0],
    )


SPEAKING = Steps(read=_read_text, arguments=_speaking, company=alone, shape=_shape_sound)
