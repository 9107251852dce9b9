"""A live inference and chat service for clients in other languages: processes of their own on free ports.

The engine is the one that does nothing: whatever is asked, it answers with token 1 until the limit. In the model folder
made here that token is `` ha``, and every byte of a prompt is one token, so that expected answers and counts are plain
arithmetic.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WORD = " ha"
CONTEXT_TOKENS = 50_000_000
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningService:
    address: str
    metrics_port: int
    health_port: int
    process: subprocess.Popen[str]

    def calls(self, method: str, code: str) -> float:
        """How many calls of ``method`` have ended with ``code``, by the service's own metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as response:
            text = response.read().decode()
        labels = f'rpc_method="{method}",rpc_response_status_code="{code}"'
        found = re.search(rf"^rpc_server_call_duration_seconds_count{{{labels}}} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


def prompt_tokens(*turns: tuple[str, str]) -> int:
    """What a conversation of (role, content) costs as a prompt: bytes, with the template written out once more."""
    return len("".join(f"{role}: {content}\n" for role, content in turns) + "assistant: ")


def save_model(folder: Path) -> Path:
    """A model whose weights are one number: the null engine reads none, but a folder without any is refused."""
    folder.mkdir()
    vocabulary = ["<end>", "Ġha", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "max_position_embeddings": CONTEXT_TOKENS,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": numpy.zeros(1, numpy.float32)}, folder / "model.safetensors")
    return folder


@contextlib.contextmanager
def running_service(
    service: str,
    folder: Path,
    *flags: str,
    program: Sequence[str] = (sys.executable, "-m", "slipstream_server.cli"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[RunningService]:
    """``service`` with its data and log in ``folder``, once it is SERVING; stopped by SIGTERM at the end."""
    folder.mkdir(parents=True)
    command = [*program, service, "--base-port", "0", "--data-dir", str(folder), *flags]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        yield _wait_serving(process, folder / "log.txt")
    finally:
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(STOP_TIMEOUT_S)
    assert exit_code == 0, f"{service} ended with {exit_code} after SIGTERM"


def _wait_serving(process: subprocess.Popen[str], log: Path) -> RunningService:
    assert process.stdout is not None
    deadline = time.monotonic() + START_TIMEOUT_S
    while select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
        line = process.stdout.readline()
        if found := re.match(r"\w+ SERVING (\S+) metrics=(\d+) health=(\d+)", line):
            ports = {"metrics_port": int(found[2]), "health_port": int(found[3])}
            return RunningService(address=found[1], process=process, **ports)
        if not line:
            break
    raise AssertionError(f"not SERVING: {log.read_text()[-4000:]}")
