"""Tiny models of every kind that sees or hears, with seeded random weights, and inputs for them.

Each maker gives the model and fills a folder with its configuration and processors, as a prepared checkpoint has them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = (
    "a the cat dog photo sound of this is what color red blue total invoice number 42 7 on page bark meow answer yes no"
)
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "bird"}, "label2id": {"cat": 0, "dog": 1, "bird": 2}}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


def png(seed: int, width: int = 40, height: int = 32) -> bytes:
    file = io.BytesIO()
    picture(seed, width, height).save(file, format="PNG")
    return file.getvalue()


def tone(seed: int, seconds: float = 0.5, rate_hz: int = 16000) -> np.ndarray:
    t = np.arange(int(seconds * rate_hz)) / rate_hz
    noise = np.random.default_rng(seed).normal(0, 0.05, len(t))
    return (0.4 * np.sin(2 * np.pi * (220 + 110 * seed) * t) + noise).astype(np.float32)


def wav(samples_T: np.ndarray, rate_hz: int = 16000, container: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples_T, rate_hz, format=container, subtype="FLOAT" if container == "WAV" else None)
    return file.getvalue()


def film(num_frames: int = 12, size: int = 32) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            for packet in stream.encode(av.VideoFrame.from_image(picture(index, size, size))):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return file.getvalue()


def tokenizer(**special: Any) -> Any:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        **special,
    )


NUM_WORDS = 5 + len(WORDS.split())


def _made(folder: Path, model_class: Any, config: Any, *processors_: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # the usual start is so small that every answer is alike
            torch.nn.init.normal_(parameter, 0.0, 0.2 if "embed" not in name else 0.5)
    config.save_pretrained(folder)
    for each in processors_:
        each.save_pretrained(folder)
    return model


def _square(name: str, size: int = 32, **more: Any) -> Any:
    return getattr(hf, name)(size={"height": size, "width": size}, **more)


def vit(folder: Path) -> Any:
    config = hf.ViTConfig(**SMALL, image_size=32, patch_size=8, **LABELS)
    return _made(folder, hf.ViTForImageClassification, config, _square("ViTImageProcessorPil"))


def vit_features(folder: Path) -> Any:
    config = hf.ViTConfig(**SMALL, image_size=32, patch_size=8)
    return _made(folder, hf.ViTModel, config, _square("ViTImageProcessorPil"))


def clip(folder: Path) -> Any:
    text = {**SMALL, "vocab_size": NUM_WORDS, "max_position_embeddings": 64, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    image_processor = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _made(folder, hf.CLIPModel, config, image_processor, tokenizer())


def yolos(folder: Path) -> Any:
    config = hf.YolosConfig(**SMALL, image_size=[32, 32], patch_size=8, num_detection_tokens=6, **LABELS)
    processor = hf.YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    return _made(folder, hf.YolosForObjectDetection, config, processor)


def owlvit(folder: Path) -> Any:
    text = {**SMALL, "vocab_size": NUM_WORDS, "max_position_embeddings": 16, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    config = hf.OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)
    processor = _square("OwlViTImageProcessorPil", crop_size={"height": 32, "width": 32})
    return _made(folder, hf.OwlViTForObjectDetection, config, processor, tokenizer())


def segformer(folder: Path) -> Any:
    config = hf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        **LABELS,
    )
    return _made(folder, hf.SegformerForSemanticSegmentation, config, _square("SegformerImageProcessorPil"))


def maskformer(folder: Path) -> Any:
    backbone = hf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    decoder = hf.DetrConfig(
        d_model=16, num_queries=5, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    config = hf.MaskFormerConfig(
        backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, **LABELS
    )
    processor = _square("MaskFormerImageProcessorPil", size_divisor=0)
    model = _made(folder, hf.MaskFormerForInstanceSegmentation, config, processor)
    with torch.no_grad():
        model.class_predictor.bias[-1] = -9  # else every query sees nothing
    return model


def glpn(folder: Path) -> Any:
    config = hf.GLPNConfig(
        depths=[1, 1, 1, 1], sr_ratios=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
        mlp_ratios=[2, 2, 2, 2], decoder_hidden_size=8,
    )  # fmt: skip
    return _made(folder, hf.GLPNForDepthEstimation, config, hf.GLPNImageProcessorPil())


def dpt(folder: Path) -> Any:
    config = hf.DPTConfig(
        **{**SMALL, "num_hidden_layers": 4}, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    return _made(folder, hf.DPTForDepthEstimation, config, _square("DPTImageProcessorPil"))


def lightglue(folder: Path) -> Any:
    superpoint = hf.SuperPointConfig(
        encoder_hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16, descriptor_decoder_dim=16, max_keypoints=24,
        keypoint_threshold=0.0, border_removal_distance=1,
    )  # fmt: skip
    config = hf.LightGlueConfig(
        keypoint_detector_config=superpoint, descriptor_dim=16, num_hidden_layers=2, num_attention_heads=2,
        filter_threshold=0.0,
    )  # fmt: skip
    processor = hf.LightGlueImageProcessorPil(size={"height": 48, "width": 64})
    return _made(folder, hf.LightGlueForKeypointMatching, config, processor)


def swin2sr(folder: Path) -> Any:
    config = hf.Swin2SRConfig(image_size=16, embed_dim=12, depths=[1], num_heads=[2], window_size=4, upscale=2)
    return _made(folder, hf.Swin2SRForImageSuperResolution, config, hf.Swin2SRImageProcessorPil(pad_size=8))


def vilt(folder: Path) -> Any:
    config = hf.ViltConfig(
        **SMALL, image_size=32, patch_size=8, vocab_size=NUM_WORDS, max_position_embeddings=40, max_image_length=-1,
        **LABELS,
    )  # fmt: skip
    processor = hf.ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=8)
    return _made(folder, hf.ViltForQuestionAnswering, config, processor, tokenizer())


def _blip_config() -> Any:
    text = {
        **SMALL, "vocab_size": NUM_WORDS, "max_position_embeddings": 64, "encoder_hidden_size": 16, "bos_token_id": 2,
        "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    return hf.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)


def blip_questions(folder: Path) -> Any:
    return _made(folder, hf.BlipForQuestionAnswering, _blip_config(), _square("BlipImageProcessorPil"), tokenizer())


def blip_captions(folder: Path) -> Any:
    model = _made(
        folder, hf.BlipForConditionalGeneration, _blip_config(), _square("BlipImageProcessorPil"), tokenizer()
    )
    hf.BlipProcessor(hf.BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer()).save_pretrained(folder)
    return model


def vit_gpt2(folder: Path) -> Any:
    encoder = hf.ViTConfig(**SMALL, image_size=32, patch_size=8)
    decoder = hf.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=NUM_WORDS, n_positions=64, bos_token_id=2, eos_token_id=3,
        pad_token_id=0, add_cross_attention=True, is_decoder=True,
    )  # fmt: skip
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    model = _made(
        folder, hf.VisionEncoderDecoderModel, config, _square("ViTImageProcessorPil"), tokenizer(eos_token="[SEP]")
    )
    model.generation_config = hf.GenerationConfig(decoder_start_token_id=2, pad_token_id=0, eos_token_id=3)
    return model


def layoutlm(folder: Path) -> Any:
    config = hf.LayoutLMConfig(
        **SMALL, vocab_size=NUM_WORDS, max_position_embeddings=64, max_2d_position_embeddings=1024
    )
    return _made(folder, hf.LayoutLMForQuestionAnswering, config, tokenizer())


def _spelled(folder: Path, tokenizer_class: Any, **more: Any) -> Any:
    """A byte-level tokenizer whose words are whole tokens where they follow a space, else letters."""
    vocab = {name: index for index, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    merges: list[tuple[str, str]] = []
    for letter in ["Ġ", *map(chr, range(97, 123)), *map(chr, range(48, 58)), "?"]:
        vocab[letter] = len(vocab)
    for word in ("total", "invoice", "page", "red"):
        for end in range(2, len(word) + 2):
            spelled = ("Ġ" + word)[:end]
            if spelled not in vocab:
                merges.append((spelled[:-1], spelled[-1]))
                vocab[spelled] = len(vocab)
    return tokenizer_class(vocab=vocab, merges=merges, model_max_length=64, **more)


def layoutlmv3(folder: Path) -> Any:
    names = _spelled(folder, hf.LayoutLMv3Tokenizer)
    config = hf.LayoutLMv3Config(
        **{**SMALL, "hidden_size": 24}, vocab_size=len(names), max_position_embeddings=66, input_size=32, patch_size=8,
        coordinate_size=4, shape_size=4, pad_token_id=1, bos_token_id=0, eos_token_id=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_rel_pos=16, rel_pos_bins=8, max_rel_2d_pos=16, rel_2d_pos_bins=8,
    )  # fmt: skip
    # As published checkpoints have it: told to start an OCR program.
    return _made(folder, hf.LayoutLMv3ForQuestionAnswering, config, _square("LayoutLMv3ImageProcessorPil"), names)


def donut(folder: Path) -> Any:
    marks = ["<s_docvqa>", "<s_question>", "</s_question>", "<s_answer>", "</s_answer>"]
    names = tokenizer(eos_token="[SEP]")
    names.add_tokens(marks, special_tokens=True)
    encoder = hf.DonutSwinConfig(
        image_size=[32, 32], patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    )
    decoder = hf.MBartConfig(
        d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=24, vocab_size=len(names),
        max_position_embeddings=64, is_decoder=True, add_cross_attention=True, is_encoder_decoder=False,
        bos_token_id=2, eos_token_id=3, pad_token_id=0, decoder_layerdrop=0.0, scale_embedding=True,
    )  # fmt: skip
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    processor = hf.DonutImageProcessorPil(size={"height": 32, "width": 32})
    model = _made(folder, hf.VisionEncoderDecoderModel, config, processor, names)
    torch.manual_seed(9)  # weights with which some answers end
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.4 if "embed" not in name else 0.5)
    model.generation_config = hf.GenerationConfig(decoder_start_token_id=2, pad_token_id=0, eos_token_id=3)
    return model


def llava(folder: Path) -> Any:
    names = tokenizer(eos_token="[SEP]", extra_special_tokens={"image_token": "<image>"})
    names.add_tokens(["<image>"], special_tokens=True)
    image_id = names.convert_tokens_to_ids("<image>")
    text = hf.LlamaConfig(
        **SMALL, num_key_value_heads=2, vocab_size=len(names), max_position_embeddings=128, bos_token_id=2,
        eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id, vision_feature_layer=-1)
    template = (
        "{% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}"
        "{% endfor %}{% endfor %}answer"
    )
    image_processor = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = hf.LlavaProcessor(
        image_processor, names, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return _made(folder, hf.LlavaForConditionalGeneration, config, processor)


def qwen2_audio(folder: Path) -> Any:
    marks = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    names = tokenizer(eos_token="[SEP]")
    names.add_tokens(marks, special_tokens=True)
    sound = hf.Qwen2AudioEncoderConfig(
        num_mel_bins=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, d_model=16
    )
    text = hf.Qwen2Config(
        **SMALL, num_key_value_heads=2, vocab_size=len(names), max_position_embeddings=256, bos_token_id=2,
        eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    audio_id = names.convert_tokens_to_ids(marks[0])
    config = hf.Qwen2AudioConfig(audio_config=sound, text_config=text, audio_token_index=audio_id)
    template = (
        "{% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|> {% else %}{{ c.text }} {% endif %}"
        "{% endfor %}{% endfor %}answer"
    )
    processor = hf.Qwen2AudioProcessor(hf.WhisperFeatureExtractor(feature_size=16), names, chat_template=template)
    model = _made(folder, hf.Qwen2AudioForConditionalGeneration, config, processor)
    with torch.no_grad():
        model.get_output_embeddings().weight[5:NUM_WORDS] *= 4  # else only marks are written
    return model


def wav2vec2_labels(folder: Path) -> Any:
    config = hf.Wav2Vec2Config(**_WAV2VEC2, **LABELS)
    return _made(folder, hf.Wav2Vec2ForSequenceClassification, config, hf.Wav2Vec2FeatureExtractor())


_WAV2VEC2: dict[str, Any] = {
    **SMALL, "conv_dim": (8, 8, 8), "conv_stride": (5, 4, 4), "conv_kernel": (10, 4, 4), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
}  # fmt: skip


def wav2vec2_ctc(folder: Path) -> Any:
    names = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghij"]
    (folder / "vocab.json").write_text("{" + ", ".join(f'"{n}": {i}' for i, n in enumerate(names)) + "}")
    ctc_tokenizer = hf.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    config = hf.Wav2Vec2Config(**_WAV2VEC2, vocab_size=len(names), pad_token_id=0)
    return _made(folder, hf.Wav2Vec2ForCTC, config, hf.Wav2Vec2FeatureExtractor(), ctc_tokenizer)


def whisper(folder: Path) -> Any:
    letters = sorted({chr(code) for code in range(97, 123)} | {"Ġ"})
    vocab = {letter: index for index, letter in enumerate(letters)}
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    stamps = [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
    names = hf.WhisperTokenizer(vocab=vocab, merges=[])
    names.add_special_tokens({"additional_special_tokens": special[1:]})
    names.add_tokens(stamps)
    ids = {name: names.convert_tokens_to_ids(name) for name in special}
    config = hf.WhisperConfig(
        vocab_size=len(names), num_mel_bins=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=64,
        decoder_start_token_id=ids["<|startoftranscript|>"], pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|endoftext|>"],
    )  # fmt: skip
    model = _made(
        folder, hf.WhisperForConditionalGeneration, config, hf.WhisperFeatureExtractor(feature_size=16), names
    )
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[: len(letters)] *= 2  # else times and marks crowd out the letters
        model.model.decoder.embed_positions.weight *= 8  # else one letter follows itself
    model.generation_config = hf.GenerationConfig(
        is_multilingual=True, lang_to_id={"<|en|>": ids["<|en|>"], "<|de|>": ids["<|de|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"], decoder_start_token_id=config.decoder_start_token_id,
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, max_length=40,
        max_initial_timestamp_index=50, prev_sot_token_id=ids["<|startofprev|>"], alignment_heads=[[0, 0]], num_beams=1,
        begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
    return model


def clap(folder: Path) -> Any:
    audio = {
        "patch_size": 4, "spec_size": 64, "depths": [1, 1], "num_attention_heads": [2, 2],
        "patch_embeds_hidden_size": 8, "hidden_size": 16, "num_mel_bins": 16, "window_size": 4, "enable_fusion": False,
        "projection_dim": 16,
        "patch_stride": [4, 4], "num_classes": 3, "intermediate_size": 16,
    }  # fmt: skip
    text = {**SMALL, "vocab_size": NUM_WORDS, "max_position_embeddings": 64, "pad_token_id": 0, "projection_dim": 16}
    config = hf.ClapConfig(audio_config=audio, text_config=text, projection_dim=16)
    extractor = hf.ClapFeatureExtractor(
        feature_size=16, sampling_rate=16000, hop_length=160, max_length_s=2, fft_window_size=512,
        truncation="rand_trunc", padding="repeatpad", frequency_max=8000,
    )  # fmt: skip
    return _made(folder, hf.ClapModel, config, extractor, tokenizer())


def vits(folder: Path) -> Any:
    vocab = {letter: index for index, letter in enumerate("_ abcdefghijklmnopqrstuvwxyz")}
    import json

    (folder / "vocab.json").write_text(json.dumps({**vocab, "<unk>": len(vocab)}))
    names = hf.VitsTokenizer(
        str(folder / "vocab.json"), language="eng", phonemize=False, is_uroman=False, normalize=True, pad_token="_"
    )
    config = hf.VitsConfig(
        vocab_size=len(vocab) + 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, flow_size=16,
        spectrogram_bins=9, prior_encoder_num_flows=2, upsample_initial_channel=16, upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
        duration_predictor_num_flows=2, depth_separable_num_layers=1, posterior_encoder_num_wavenet_layers=1,
        prior_encoder_num_wavenet_layers=1, duration_predictor_filter_channels=16,
        use_stochastic_duration_prediction=False,
    )  # fmt: skip
    return _made(folder, hf.VitsModel, config, names)


def videomae(folder: Path) -> Any:
    config = hf.VideoMAEConfig(
        **SMALL, image_size=32, patch_size=8, num_frames=4, tubelet_size=2, decoder_num_hidden_layers=1, **LABELS
    )
    processor = hf.VideoMAEImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _made(folder, hf.VideoMAEForVideoClassification, config, processor)


def llama(folder: Path) -> Any:
    names = tokenizer(eos_token="[SEP]")
    names.add_tokens(["Yes", "No", *"ABCDEFGH"])
    names.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}answer"
    config = hf.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=len(names) + 8, max_position_embeddings=512)
    return _made(folder, hf.LlamaForCausalLM, config, names)


def bart(folder: Path) -> Any:
    names = tokenizer(eos_token="[SEP]", bos_token="[CLS]")
    config = hf.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=len(names), max_position_embeddings=64, bos_token_id=2,
        eos_token_id=3, pad_token_id=0, decoder_start_token_id=3, forced_eos_token_id=None,
    )  # fmt: skip
    return _made(folder, hf.BartForConditionalGeneration, config, names)


def musicgen(folder: Path) -> Any:
    names = tokenizer(eos_token="[SEP]")
    text = hf.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=len(names), pad_token_id=0, eos_token_id=3
    )
    sound = hf.EncodecConfig(
        num_filters=4, hidden_size=8, codebook_size=32, codebook_dim=8, upsampling_ratios=[8, 8], num_lstm_layers=1,
        target_bandwidths=[2.5, 5.0], sampling_rate=16000, norm_type="weight_norm", num_residual_layers=1,
    )  # fmt: skip
    decoder = hf.MusicgenDecoderConfig(
        vocab_size=32, max_position_embeddings=64, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24,
        hidden_size=16, num_codebooks=2, pad_token_id=32, bos_token_id=32, audio_channels=1,
    )  # fmt: skip
    config = hf.MusicgenConfig(text_encoder=text, audio_encoder=sound, decoder=decoder)
    model = _made(folder, hf.MusicgenForConditionalGeneration, config, names)
    with torch.no_grad():
        for head in model.decoder.lm_heads:
            head.weight *= 0.1  # else draws are all alike
        for layer in model.audio_encoder.quantizer.layers:
            layer.codebook.embed.normal_()  # else every code sounds alike
    model.generation_config = hf.GenerationConfig(
        decoder_start_token_id=32, pad_token_id=32, bos_token_id=32, max_length=20, guidance_scale=None
    )
    return model


Maker = Callable[[Path], Any]


_SAM_VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 24, "image_size": 32,
    "patch_size": 8, "output_channels": 16, "window_size": 2, "num_pos_feats": 8,
}  # fmt: skip
_SAM_DECODER: dict[str, Any] = {
    "hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
}  # fmt: skip
_SAM_PROMPTS = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}


def _sam_processor() -> Any:
    name = "SamImageProcessor" if hf.utils.is_torchvision_available() else "SamImageProcessorPil"
    return getattr(hf, name)(
        size={"longest_edge": 32}, mask_size={"longest_edge": 16}, pad_size={"height": 32, "width": 32},
        mask_pad_size={"height": 16, "width": 16},
    )  # fmt: skip


def _pointed(model: Any, factor: float) -> Any:
    """With masks that depend on the point asked about."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("mask_decoder" in name or "prompt" in name) and "iou" not in name:
                parameter *= factor
    return model


def sam(folder: Path) -> Any:
    config = hf.SamConfig(
        vision_config=hf.SamVisionConfig(**_SAM_VISION, global_attn_indexes=[1]),
        prompt_encoder_config=hf.SamPromptEncoderConfig(**_SAM_PROMPTS),
        mask_decoder_config=hf.SamMaskDecoderConfig(**_SAM_DECODER),
    )
    return _pointed(_made(folder, hf.SamModel, config, _sam_processor()), 4)


def sam_hq(folder: Path) -> Any:
    config = hf.SamHQConfig(
        # Its second mask head reads the output of the first layer that attends to all of the picture.
        vision_config=hf.SamHQVisionConfig(**_SAM_VISION, global_attn_indexes=[0, 1]),
        prompt_encoder_config=hf.SamHQPromptEncoderConfig(**_SAM_PROMPTS),
        mask_decoder_config=hf.SamHQMaskDecoderConfig(**_SAM_DECODER, vit_dim=16),
    )
    return _pointed(_made(folder, hf.SamHQModel, config, _sam_processor()), 2)
