"""Tiny seeded models, each built once a session by transformers itself, and copies of them to damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = ["[PAD]", "<s>", "</s>", "[UNK]", *(f"word{number}" for number in range(296))]
TEMPLATE = "{% for message in messages %}<s> {{ message['content'] }} </s> {% endfor %}"


def _save_tokenizer(folder: Path, template: str | None = None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def _configs() -> dict[str, tuple[str, Any]]:
    import transformers as t

    return {
        "llama": (
            "LlamaForCausalLM",
            t.LlamaConfig(
                vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
            ),
        ),
        "gpt2": (
            "GPT2LMHeadModel",
            t.GPT2Config(
                vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
            ),
        ),
        "t5": (
            "T5ForConditionalGeneration",
            t.T5Config(
                vocab_size=300, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_decoder_layers=3, num_heads=4,
                decoder_start_token_id=0,
                pad_token_id=0, eos_token_id=2,
            ),
        ),
        "bert": (
            "BertForSequenceClassification",
            t.BertConfig(
                vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, id2label={0: "negative", 1: "neutral", 2: "positive"},
            ),
        ),
    }  # fmt: skip


@pytest.fixture(scope="session")
def built_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def build(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            import torch
            import transformers

            class_name, config = _configs()[kind]
            torch.manual_seed(20261122)
            model = getattr(transformers, class_name)(config).eval()
            model.save_pretrained(folder)
            _save_tokenizer(folder, TEMPLATE if kind == "llama" else None)
        return folder

    return build


@pytest.fixture
def model_copy(built_models: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A private copy of a tiny model: ``model_copy("llama")``; a second one of the same kind gets its own folder."""

    def copy(kind: str) -> Path:
        target = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(built_models(kind), target)
        return target

    return copy


@pytest.fixture(scope="session")
def adapter(built_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the tiny Llama whose B matrices are not zero, so that it changes every answer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(built_models("llama"))
    torch.manual_seed(7)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


@pytest.fixture(name="edit_json")
def edit_json_fixture() -> Callable[..., None]:
    return edit_json
