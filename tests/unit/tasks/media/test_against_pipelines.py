"""Every task in batches, against Transformers' own pipeline called plainly on the same model, one input at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from slipstream_server.errors import InvalidField, ModelLoadFailed, PromptTooLong, UnsupportedField
from slipstream_server.tasks import items
from slipstream_server.tasks.media.runners import media_runner
from slipstream_server.tasks.registry import TASKS
from unit.tasks.media import tiny_media as tiny
from unit.tasks.media.side_by_side import LABELS, PICTURES, batched, pictures, pixels, plain


def assert_labels(result: Any, expected: list[dict[str, Any]]) -> None:
    assert [each.label for each in result.labels] == [each["label"] for each in expected]
    assert [each.score for each in result.labels] == pytest.approx([e["score"] for e in expected], abs=1e-4)


@pytest.mark.parametrize("parameters", [{"top_k": 2}, {"top_k": 50, "function_to_apply": "sigmoid"}])
def test_image_classification(made: Any, parameters: dict[str, Any]) -> None:
    model, folder = made(tiny.vit)
    runner = media_runner("image-classification", model, folder, torch.device("cpu"))
    results, largest = batched(runner, pictures(), parameters)
    assert largest == 3  # resized to one size
    pipe = plain("image-classification", model, folder, "image_processor")
    for size, result in zip(PICTURES, results, strict=True):
        assert_labels(result, pipe(tiny.picture(*size), **parameters))
        assert all(model.config.id2label[each.label_id] == each.label for each in result.labels)


def test_zero_shot_image_classification(made: Any) -> None:
    model, folder = made(tiny.clip)
    runner = media_runner("zero-shot-image-classification", model, folder, torch.device("cpu"))
    inputs = [items.ZeroShotImageInput(image=tiny.png(*size), candidate_labels=LABELS) for size in PICTURES]
    other = items.ZeroShotImageInput(
        image=tiny.png(1), candidate_labels=("dog", "a {cat}"), hypothesis_template="the {x} {} of {}"
    )
    results, largest = batched(runner, [*inputs, other], {})
    assert largest == 3  # the fourth has other labels
    pipe = plain("zero-shot-image-classification", model, folder, "image_processor", "tokenizer")
    for size, result in zip(PICTURES, results, strict=False):
        assert_labels(result, pipe(tiny.picture(*size), candidate_labels=list(LABELS)))
        assert [LABELS[each.label_id] for each in result.labels] == [each.label for each in result.labels]
    alone = pipe(tiny.picture(1), candidate_labels=["dog", "a {cat}"], hypothesis_template="the {{x}} {} of {{}}")
    assert_labels(results[3], alone)


@pytest.mark.parametrize("pool", [False, True])
def test_image_feature_extraction(made: Any, pool: bool) -> None:
    model, folder = made(tiny.vit_features)
    runner = media_runner("image-feature-extraction", model, folder, torch.device("cpu"))
    results, _ = batched(runner, pictures(), {"pool": pool})
    pipe = plain("image-feature-extraction", model, folder, "image_processor")
    for size, result in zip(PICTURES, results, strict=True):
        expected = np.asarray(pipe(tiny.picture(*size), pool=pool))[0]
        found = np.frombuffer(result.vector.values, "<f4").reshape(result.vector.shape)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-4


def assert_objects(result: Any, expected: list[dict[str, Any]]) -> None:
    expected = sorted(expected, key=lambda each: -each["score"])
    assert [each.label for each in result.objects] == [each["label"] for each in expected]
    assert [each.score for each in result.objects] == pytest.approx([e["score"] for e in expected], abs=1e-4)
    for found, each in zip(result.objects, expected, strict=True):
        box = each["box"]
        edges = (found.box.x_min, found.box.y_min, found.box.x_max, found.box.y_max)
        assert edges == (box["xmin"], box["ymin"], box["xmax"], box["ymax"])


def test_object_detection(made: Any) -> None:
    model, folder = made(tiny.yolos)
    runner = media_runner("object-detection", model, folder, torch.device("cpu"))
    results, largest = batched(runner, pictures(), {"threshold": 0.2})
    assert largest == 3
    pipe = plain("object-detection", model, folder, "image_processor")
    assert any(result.objects for result in results)
    for size, result in zip(PICTURES, results, strict=True):
        assert_objects(result, pipe(tiny.picture(*size), threshold=0.2))


def test_zero_shot_object_detection(made: Any) -> None:
    model, folder = made(tiny.owlvit)
    runner = media_runner("zero-shot-object-detection", model, folder, torch.device("cpu"))
    inputs = [items.ZeroShotImageInput(image=tiny.png(*size), candidate_labels=LABELS) for size in PICTURES]
    results, largest = batched(runner, inputs, {"threshold": 0.001, "top_k": 5})
    assert largest == 6  # three pictures, two labels of one token
    pipe = plain("zero-shot-object-detection", model, folder, "image_processor", "tokenizer")
    assert all(result.objects for result in results)
    for size, result in zip(PICTURES, results, strict=True):
        assert_objects(result, pipe(tiny.picture(*size), candidate_labels=list(LABELS), threshold=0.001, top_k=5))


@pytest.mark.parametrize(
    ("maker", "parameters"),
    [
        (tiny.segformer, {"subtask": "semantic"}),
        (tiny.maskformer, {"threshold": 0.0, "mask_threshold": 0.4, "overlap_mask_area_threshold": 0.0}),
        (tiny.maskformer, {"subtask": "panoptic", "threshold": 0.3, "mask_threshold": 0.3}),
        (tiny.maskformer, {"subtask": "instance", "threshold": 0.0}),
        (tiny.maskformer, {"subtask": "semantic"}),
    ],
)
def test_image_segmentation(made: Any, maker: tiny.Maker, parameters: dict[str, Any]) -> None:
    model, folder = made(maker)
    runner = media_runner("image-segmentation", model, folder, torch.device("cpu"))
    results, largest = batched(runner, pictures(), parameters)
    assert largest == 3
    pipe = plain("image-segmentation", model, folder, "image_processor")
    assert any(result.segments for result in results)
    for size, result in zip(PICTURES, results, strict=True):
        expected = pipe(tiny.picture(*size), **parameters)
        assert [each.label for each in result.segments] == [each["label"] for each in expected]
        for found, each in zip(result.segments, expected, strict=True):
            assert found.score == (None if each["score"] is None else pytest.approx(each["score"], abs=1e-4))
            assert (pixels(found.mask) != np.asarray(each["mask"])).mean() < 0.01


@pytest.mark.parametrize("maker", [tiny.dpt, tiny.glpn])
def test_depth_estimation(made: Any, maker: tiny.Maker) -> None:
    model, folder = made(maker)
    runner = media_runner("depth-estimation", model, folder, torch.device("cpu"))
    results, _ = batched(runner, pictures(), {})
    pipe = plain("depth-estimation", model, folder, "image_processor")
    for size, result in zip(PICTURES, results, strict=True):
        expected = pipe(tiny.picture(*size))
        depth = np.frombuffer(result.predicted_depth.values, "<f4").reshape(result.predicted_depth.shape)
        assert depth.shape == tuple(expected["predicted_depth"].shape) == (size[2], size[1])
        assert np.abs(depth - expected["predicted_depth"].numpy()).max() < 1e-4
        assert np.abs(pixels(result.depth).astype(int) - np.asarray(expected["depth"]).astype(int)).max() <= 1
    assert batched(runner, pictures()[:1], {"return_tensor": False})[0][0].predicted_depth is None


def test_keypoint_matching(made: Any) -> None:
    model, folder = made(tiny.lightglue)
    runner = media_runner("keypoint-matching", model, folder, torch.device("cpu"))
    pairs = [items.ImagePairInput(first=tiny.png(1, 80, 64), second=tiny.png(seed, 80, 64)) for seed in (1, 2)]
    results, largest = batched(runner, pairs, {"threshold": 0.0})
    assert largest == 1
    pipe = plain("keypoint-matching", model, folder, "image_processor")
    assert results[0].matches
    for seed, result in zip((1, 2), results, strict=True):
        expected = pipe([tiny.picture(1, 80, 64), tiny.picture(seed, 80, 64)], threshold=0.0)
        assert [each.score for each in result.matches] == pytest.approx([e["score"] for e in expected], abs=1e-4)
        # Transformers' pipeline takes width for height; ours are pixels.
        for found, each in zip(result.matches, expected, strict=True):
            for point, place in ((found.first, "keypoint_image_0"), (found.second, "keypoint_image_1")):
                assert point == pytest.approx((each[place]["x"] * 80 / 64, each[place]["y"] * 64 / 80), abs=2)
                assert 0 <= point[0] <= 80
                assert 0 <= point[1] <= 64


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_image_text_to_text_with_a_chat_template(made: Any, task: str) -> None:
    model, folder = made(tiny.llava)
    runner = media_runner(task, model, folder, torch.device("cpu"))
    parts = (items.ImageInput(data=tiny.png(1)), items.TextInput(text="what color is this cat"))
    [result], _ = batched(runner, [items.MultimodalInput(parts=parts)], {"max_new_tokens": 6, "return_token_ids": True})
    pipe = plain("image-text-to-text", model, folder, "processor")
    content = [{"type": "image", "image": tiny.picture(1)}, {"type": "text", "text": "what color is this cat"}]
    [expected] = pipe(text=[{"role": "user", "content": content}], max_new_tokens=6, return_full_text=False)
    assert result.texts[0].text.strip() == expected["generated_text"].strip()
    assert result.texts[0].text
    assert result.texts[0].finish_reason == ("eos_token" if 3 in result.texts[0].token_ids else "length")


def test_a_message_with_a_sound(made: Any) -> None:
    model, folder = made(tiny.qwen2_audio)
    runner = media_runner("any-to-any", model, folder, torch.device("cpu"))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    question = "what sound is this"
    texts = []
    for seed in (1, 2):
        parts = (items.AudioInput(data=tiny.wav(tiny.tone(seed))), items.TextInput(text=question))
        parameters = {"max_new_tokens": 6, "return_token_ids": True}
        [result], _ = batched(runner, [items.MultimodalInput(parts=parts)], parameters)
        prompt = f"<|audio_bos|><|AUDIO|><|audio_eos|> {question} answer"
        inputs = processor(text=prompt, audio=tiny.tone(seed), sampling_rate=16000, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        assert result.texts[0].token_ids == written.tolist()
        texts.append(processor.decode(written, skip_special_tokens=True))
        assert result.texts[0].text == texts[-1]
    assert any(texts)


def test_what_a_conversation_cannot_hold(made: Any) -> None:
    model, folder = made(tiny.llava)
    runner = media_runner("any-to-any", model, folder, torch.device("cpu"))
    sound = items.MultimodalInput(parts=(items.AudioInput(data=tiny.wav(tiny.tone(1))),))
    with pytest.raises(UnsupportedField, match=r"multimodal.parts\[0\].audio"):
        runner.prepare(sound, {})
    with pytest.raises(InvalidField):
        runner.prepare(items.MultimodalInput(parts=()), {})
    with pytest.raises(PromptTooLong):
        runner.prepare(items.MultimodalInput(parts=(items.TextInput(text="cat " * 200),)), {})


@pytest.mark.parametrize(
    ("maker", "parameters", "field"),
    [
        (tiny.wav2vec2_ctc, {"return_timestamps": "segment"}, "return_timestamps"),
        (tiny.wav2vec2_ctc, {"language": "de"}, "language"),
        (tiny.wav2vec2_ctc, {"return_language": True}, "return_language"),
        (tiny.whisper, {"return_timestamps": "char"}, "return_timestamps"),
        (tiny.whisper, {"chunk_length_s": 4.0, "stride_length_s": 2.0}, "stride_length_s"),
    ],
)
def test_speech_parameters_a_model_cannot_honour(
    made: Any, maker: tiny.Maker, parameters: dict[str, Any], field: str
) -> None:
    model, folder = made(maker)
    runner = media_runner("automatic-speech-recognition", model, folder, torch.device("cpu"))
    with pytest.raises(InvalidField) as caught:
        runner.prepare(items.AudioInput(data=tiny.wav(tiny.tone(1))), parameters)
    assert caught.value.violations[0].field == f"parameters.{field}"


def test_texts_that_are_too_long(made: Any) -> None:
    cpu = torch.device("cpu")
    compare = media_runner("zero-shot-image-classification", *made(tiny.clip), cpu)
    with pytest.raises(PromptTooLong):
        compare.prepare(items.ZeroShotImageInput(image=tiny.png(1), candidate_labels=("cat", "dog " * 70)), {})
    detect = media_runner("zero-shot-object-detection", *made(tiny.owlvit), cpu)
    with pytest.raises(PromptTooLong):
        detect.prepare(items.ZeroShotImageInput(image=tiny.png(1), candidate_labels=("cat", "dog " * 20)), {})
    speak = media_runner("text-to-audio", *made(tiny.vits), cpu)
    with pytest.raises(PromptTooLong):
        speak.prepare(items.TextInput(text="a" * 5000), {})


def test_what_is_not_offered(made: Any) -> None:
    model, folder = made(tiny.vit)
    with pytest.raises(InvalidField):
        media_runner("text-classification", model, folder, torch.device("cpu"))
    with pytest.raises(ModelLoadFailed):  # the folder has no tokenizer
        media_runner("zero-shot-image-classification", made(tiny.yolos)[0], made(tiny.yolos)[1], torch.device("cpu"))


def sounds(seconds: Sequence[float] = (0.5, 0.5, 0.4)) -> list[np.ndarray]:
    return [tiny.tone(seed, each) for seed, each in enumerate(seconds, start=1)]


def test_audio_classification(made: Any) -> None:
    model, folder = made(tiny.wav2vec2_labels)
    runner = media_runner("audio-classification", model, folder, torch.device("cpu"))
    results, largest = batched(runner, [items.AudioInput(data=tiny.wav(s)) for s in sounds()], {"top_k": 3})
    assert largest == 2
    pipe = plain("audio-classification", model, folder, "feature_extractor")
    for sound, result in zip(sounds(), results, strict=True):
        assert_labels(result, pipe(sound, top_k=3))


def test_zero_shot_audio_classification(made: Any) -> None:
    model, folder = made(tiny.clap)
    runner = media_runner("zero-shot-audio-classification", model, folder, torch.device("cpu"))
    inputs = [
        items.ZeroShotAudioInput(audio=items.AudioInput(data=tiny.wav(s)), candidate_labels=LABELS) for s in sounds()
    ]
    results, largest = batched(runner, inputs, {})
    assert largest == 3
    pipe = plain("zero-shot-audio-classification", model, folder, "feature_extractor", "tokenizer")
    for sound, result in zip(sounds(), results, strict=True):
        assert_labels(result, pipe(sound, candidate_labels=list(LABELS)))


def assert_transcription(result: Any, expected: dict[str, Any], *, chunks: bool) -> None:
    assert result.text == expected["text"]
    wanted = expected.get("chunks", []) if chunks else []
    assert [(c.text, c.start_s, c.end_s) for c in result.chunks] == [
        (c["text"], pytest.approx(c["timestamp"][0]), pytest.approx(c["timestamp"][1])) for c in wanted
    ]


@pytest.mark.parametrize(
    "parameters",
    [
        {"return_timestamps": "none"},
        {"return_timestamps": "word"},
        {"return_timestamps": "char"},
        {"chunk_length_s": 1.0, "stride_length_s": 0.1},
    ],
)
def test_speech_recognition_by_frames(made: Any, parameters: dict[str, Any]) -> None:
    model, folder = made(tiny.wav2vec2_ctc)
    runner = media_runner("automatic-speech-recognition", model, folder, torch.device("cpu"))
    heard = sounds((2.5, 2.5, 0.6))
    results, _ = batched(runner, [items.AudioInput(data=tiny.wav(s)) for s in heard], parameters)
    pipe = plain("automatic-speech-recognition", model, folder, "feature_extractor", "tokenizer")
    asked = {name: value for name, value in parameters.items() if value != "none"}
    for sound, result in zip(heard, results, strict=True):
        assert result.text
        assert_transcription(result, pipe(sound.copy(), **asked), chunks="return_timestamps" in asked)


@pytest.mark.parametrize(
    "parameters",
    [
        {"return_timestamps": "none", "max_new_tokens": 8},
        {"return_timestamps": "segment", "max_new_tokens": 8, "language": "de", "task": "translate"},
        {"return_timestamps": "none", "max_new_tokens": 8, "num_beams": 2},
        {"return_timestamps": "word", "max_new_tokens": 8},
        {"return_timestamps": "none", "max_new_tokens": 8, "return_language": True},
    ],
)
def test_speech_recognition_by_writing(made: Any, parameters: dict[str, Any]) -> None:
    model, folder = made(tiny.whisper)
    runner = media_runner("automatic-speech-recognition", model, folder, torch.device("cpu"))
    results, largest = batched(runner, [items.AudioInput(data=tiny.wav(s)) for s in sounds()], parameters)
    assert largest == (3 if parameters["return_timestamps"] == "none" and "return_language" not in parameters else 1)
    pipe = plain("automatic-speech-recognition", model, folder, "feature_extractor", "tokenizer")
    stamps = {"none": None, "segment": True, "word": "word"}[parameters["return_timestamps"]]
    asked = {**parameters, "return_timestamps": stamps}
    if stamps is None:
        del asked["return_timestamps"]
    for sound, result in zip(sounds(), results, strict=True):
        expected = pipe(sound.copy(), **asked)
        assert result.text
        assert_transcription(result, expected, chunks=stamps is not None)
        if "return_language" in parameters:
            assert {result.language} == {TO_LANGUAGE_CODE.get(c["language"], c["language"]) for c in expected["chunks"]}


def test_text_to_audio(made: Any) -> None:
    model, folder = made(tiny.vits)
    runner = media_runner("text-to-audio", model, folder, torch.device("cpu"))
    [result, again], _ = batched(runner, [items.TextInput(text="hello there")] * 2, {"seed": 7})
    pipe = plain("text-to-audio", model, folder, "tokenizer")
    torch.manual_seed(7)
    expected = pipe("hello there")
    found = np.frombuffer(result.data, "<f4")
    assert result.sampling_rate_hz == expected["sampling_rate"]
    assert np.abs(found - expected["audio"]).max() < 1e-4
    assert again == result


@pytest.mark.parametrize("parameters", [{"max_new_tokens": 8}, {"max_new_tokens": 8, "do_sample": True, "top_k": 5}])
def test_text_to_audio_by_tokens(made: Any, parameters: dict[str, Any]) -> None:
    model, folder = made(tiny.musicgen)
    runner = media_runner("text-to-audio", model, folder, torch.device("cpu"))
    [result], _ = batched(runner, [items.TextInput(text="a dog bark")], {**parameters, "seed": 7})
    pipe = plain("text-to-audio", model, folder, "tokenizer")
    torch.manual_seed(7)
    expected = pipe("a dog bark", generate_kwargs=parameters)
    assert (result.sampling_rate_hz, result.num_channels) == (expected["sampling_rate"], 1)
    assert np.abs(np.frombuffer(result.data, "<f4") - expected["audio"].ravel()).max() < 1e-4


def test_a_model_that_speaks_at_once_has_no_tokens_to_draw(made: Any) -> None:
    runner = media_runner("text-to-audio", *made(tiny.vits), torch.device("cpu"))
    for parameters in ({"max_new_tokens": 8}, {"do_sample": True}):
        with pytest.raises(InvalidField, match=f"parameters.{next(iter(parameters))}"):
            runner.prepare(items.TextInput(text="hello"), parameters)


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"max_new_tokens": 1000}, "max_new_tokens"),
    ],
)
def test_what_writing_cannot_honour(made: Any, task: str, parameters: dict[str, Any], field: str) -> None:
    runner = media_runner(task, *made(tiny.llava), torch.device("cpu"))
    message = items.MultimodalInput(parts=(items.TextInput(text="what color"),))
    with pytest.raises(InvalidField, match=f"parameters.{field}"):
        runner.prepare(message, parameters)


@pytest.mark.parametrize(
    ("task", "maker"),
    [
        ("image-text-to-text", tiny.vit_gpt2),
        ("image-text-to-text", tiny.llava),
        ("visual-question-answering", tiny.blip_questions),
    ],
)
def test_texts_end_where_the_models_positions_do(made: Any, task: str, maker: tiny.Maker) -> None:
    """Their decoders have fewer places than the 256 tokens that are the default."""
    runner = media_runner(task, *made(maker), torch.device("cpu"))
    given: Any = items.ImageInput(data=tiny.png(1))
    if task == "visual-question-answering":
        given = items.VisualQuestionInput(image=given.data, question="what is this")
    [result], _ = batched(runner, [given], {})
    assert result is not None


def test_video_classification(made: Any, tmp_path: Path) -> None:
    model, folder = made(tiny.videomae)
    runner = media_runner("video-classification", model, folder, torch.device("cpu"))
    [result], _ = batched(runner, [items.VideoInput(data=tiny.film())], {"frame_sampling_rate": 2, "top_k": 3})
    (tmp_path / "film.mp4").write_bytes(tiny.film())
    pipe = plain("video-classification", model, folder, "image_processor")
    assert_labels(result, pipe(str(tmp_path / "film.mp4"), frame_sampling_rate=2, top_k=3))


def test_decision(made: Any) -> None:
    model, folder = made(tiny.llama)
    runner = media_runner("decision", model, folder, torch.device("cpu"))
    questions = (
        items.DecisionQuestion(name="is cat", instructions="is this a cat", type="noul"),
        items.DecisionQuestion(
            name="color", instructions="what color", type="choice",
            options=(items.DecisionOption("red", "the red cat"), items.DecisionOption("blue")),
        ),
        items.DecisionQuestion(
            name="number", instructions="what number", type="score",
            options=tuple(items.DecisionOption("", name) for name in ("7", "42", "total")),
        ),
    )  # fmt: skip
    [result], _ = batched(runner, [items.DecisionInput(state="a photo of the cat", questions=questions)], {})
    expected = plain("decision", model, folder, "tokenizer")(
        {
            "state": "a photo of the cat",
            "questions": {
                "is cat": {"type": "noul", "instructions": "is this a cat"},
                "color": {
                    "type": "choice",
                    "instructions": "what color",
                    "criteria": {"red": "the red cat", "blue": None},
                },
                "number": {"type": "score", "instructions": "what number", "criteria": ["7", "42", "total"]},
            },
        }
    )
    yes, color, number = result.answers
    assert yes.score == pytest.approx(expected["is cat"]["noul"], abs=1e-4)
    assert sum(each.score for each in yes.options) == pytest.approx(1.0)
    assert (color.choice, color.score) == (expected["color"]["choice"], None)
    assert {o.label: o.score for o in color.options} == pytest.approx(expected["color"]["probabilities"], abs=1e-4)
    assert number.score == pytest.approx(expected["number"]["score"], abs=1e-4)
    assert number.confidence == pytest.approx(expected["number"]["confidence"], abs=1e-4)
    assert [each.label for each in number.options] == ["0", "1", "2"]


def test_each_model_loads_by_an_auto_class_of_its_task(made: Any) -> None:
    for task, maker in (
        ("image-classification", tiny.vit),
        ("image-segmentation", tiny.maskformer),
        ("automatic-speech-recognition", tiny.wav2vec2_ctc),
        ("automatic-speech-recognition", tiny.whisper),
        ("visual-question-answering", tiny.vilt),
        ("image-to-image", tiny.swin2sr),
        ("text-to-audio", tiny.vits),
        ("image-text-to-text", tiny.vit_gpt2),
        ("decision", tiny.llama),
    ):
        model, _ = made(maker)
        auto_classes = (getattr(transformers, name) for name in TASKS[task].auto_classes)
        auto_class = next(each for each in auto_classes if type(model.config) in each._model_mapping)
        assert auto_class._model_mapping[type(model.config)] is type(model)
