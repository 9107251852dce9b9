"""A tiny seeded chat model, data for it, and the runner to train it: in this process, or as one of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from slipstream_server.training.events import AnyEvent
from slipstream_server.training.job_folder import JobFolder
from slipstream_server.training.recipe import Hyperparameters, LoraSettings, TrainingRecipe, encode_recipe
from slipstream_server.training.spool import read_spool

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers over bytes, whose padding token is its end of turn."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    words = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def conversation(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


MakeJob = Callable[..., JobFolder]


@pytest.fixture
def make_job(tiny_model: Path, tmp_path: Path) -> MakeJob:
    """``make_job(name, **hyperparameters)``: a job's folder with its recipe, on 40 short rows of unequal lengths."""
    train = tmp_path / "train.jsonl"
    rows = [conversation(f"say {number}", "yes " * (1 + number % 5)) for number in range(40)]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str = "job", **hyperparameters: object) -> JobFolder:
        chosen = {
            "max_steps": 12,
            "learning_rate": 1e-2,
            "batch_size_per_device": 4,
            "max_length": 64,
            "logging_interval_steps": 3,
            "checkpoint_interval_steps": 4,
            "seed": 11,
        }
        recipe = TrainingRecipe(
            base_model_folder=str(tiny_model),
            base_model_name="acme/tiny",
            train_file=str(train),
            held_out_fraction=0.2,
            adapter=LoraSettings(dropout=0.1),
            hyperparameters=msgspec.convert({**chosen, **hyperparameters}, Hyperparameters),
            device="cpu",
            cpu_threads=1,
        )
        folder = JobFolder(tmp_path / name)
        folder.path.mkdir()
        folder.recipe.write_bytes(encode_recipe(recipe))
        return folder

    return make


def arguments(folder: JobFolder, attempt: int) -> list[str]:
    return ["--recipe", str(folder.recipe), "--attempt", str(attempt), "--folder", str(folder.path)]


def events(folder: JobFolder, attempt: int = 1) -> list[AnyEvent]:
    return list(read_spool(folder.events(attempt), 0).events)


RunHere = Callable[..., int]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunHere]:
    """``run_here(folder, attempt)``: the runner in this process; environment and signal handlers are put back."""
    from slipstream_server.training import run

    monkeypatch.setattr(run, "configure_logging", lambda: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield lambda folder, attempt=1: run.main(arguments(folder, attempt))
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def start_runner(folder: JobFolder, attempt: int, *launcher: str) -> subprocess.Popen[bytes]:
    """The runner in a session of its own, as the supervisor starts it."""
    command = [sys.executable, *launcher, "-m", "slipstream_server.training.run", *arguments(folder, attempt)]
    log = (folder.path / f"runner-{attempt}.log").open("wb")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
