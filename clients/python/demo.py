"""What Slipstream does, shown in a few minutes on a real model: ``make demo``. Exit code 0 means that all of it worked.

Starts the four services on free ports with an empty data directory, talks to them through the Python client, and stops
them. Every line that it prints was measured or answered while it ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import operator
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # before gRPC is imported: no word on connections that end

import psutil
from rich.console import Console
from rich.table import Table

from slipstream_client import SlipstreamClient

MODEL = "smollm2-135m-instruct"
ENCODER = "minilm-l6-v2"
ADAPTER = "aurora-desk"
SECOND_JOB = "a-proper-run"
EXAMPLES = Path(__file__).parents[2] / "examples" / "aurora_desk"
START_TIMEOUT_S = 600.0
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
    "What do bees make?",
    "Give me a synonym for happy.",
    "How many days are in a week?",
    "What is water made of?",
    "Name a large animal that lives in the ocean and say in one sentence what it eats.",
    "Explain in two sentences why the sky is blue.",
    "What is the opposite of cold?",
    "Name a fruit that is yellow.",
    "Who wrote Romeo and Juliet?",
    "What language is spoken in Brazil?",
    "Describe a forest in autumn in one or two sentences, with its colours, its sounds and its smells.",
    "What is two plus two?",
    "Name the largest planet of the solar system.",
)
NUM_ALONE = 4  # of the prompts: as many as it takes to know the rate of one at a time
NEW_TOKENS = 32
COUNTRY: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "capital": {"type": "string", "maxLength": 20},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
    },
    "required": ["name", "capital", "continent"],
    "additionalProperties": False,
}
SENTENCES = (
    "My desk lamp does not switch on.",
    "The light on my table stays dark.",
    "I would like my money back.",
    "How do I return this for a refund?",
)
QUERY = "What if I am not happy with what I bought?"
DOCUMENTS = (
    "The lamp takes a bulb of at most 40 watts.",
    "Goods can be sent back within thirty days, and we refund the price.",
    "Our shop in the old town is open until six.",
    "Clean the shade with a dry cloth.",
)

console = Console()


def main() -> int:
    """Pull the models, run the services, show what they do."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of every ``finally``: no service stays
    slipstream = [sys.executable, "-m", "slipstream_client.cli"]
    console.rule("[bold]1  Two models")
    pull(slipstream)
    with tempfile.TemporaryDirectory(prefix="slipstream-demo-") as folder:
        asyncio.run(show(slipstream, Path(folder)))
    console.rule("[bold green]done")
    return 0


def pull(slipstream: Sequence[str]) -> None:
    """Both models at once; the larger one's progress is shown."""
    with subprocess.Popen([*slipstream, "models", "pull", ENCODER], stdout=subprocess.PIPE, text=True) as beside:
        subprocess.run([*slipstream, "models", "pull", MODEL], check=True)
        console.print(beside.communicate()[0], end="", highlight=False, markup=False)
    if beside.returncode:
        raise SystemExit(f"slipstream models pull {ENCODER} ended with exit code {beside.returncode}")


async def show(slipstream: Sequence[str], folder: Path) -> None:
    """Everything that needs the services."""
    base_port = free_base_port()
    console.rule("[bold]2  The services")
    async with services(slipstream, folder, base_port), SlipstreamClient(f"127.0.0.1:{base_port}") as client:
        await client.models.load(ENCODER, source=ENCODER)
        console.print(f"  model {ENCODER} is being loaded beside it, while the first one answers", highlight=False)
        console.rule("[bold]3  An answer, streamed")
        await show_stream(client)
        console.rule("[bold]4  A chat of two turns")
        await show_chat(client)
        console.rule("[bold]5  An answer that fits a JSON schema")
        await show_schema(client)
        console.rule("[bold]6  Embeddings, and documents ranked by them")
        with console.status(f"{ENCODER} is being loaded ..."):
            await client.models.wait(ENCODER)
        await show_tasks(client)
        console.rule("[bold]7  Sixteen prompts at once")
        await show_batching(client, base_port + 1000)
        console.rule("[bold]8  Train an adapter, make it live, take it back")
        await show_loop(client, [*slipstream], base_port)


@contextlib.asynccontextmanager
async def services(slipstream: Sequence[str], folder: Path, base_port: int) -> AsyncIterator[None]:
    """``slipstream up``, ready; stopped at the end, with its exit code checked."""
    command = [*slipstream, "up", "--data-dir", str(folder), "--model", MODEL, "--base-port", str(base_port)]
    console.print(f"$ slipstream {' '.join(command[len(slipstream) :])}", style="dim", highlight=False)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        await asyncio.wait_for(_until_ready(process), START_TIMEOUT_S)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        exit_code = await process.wait()
    if exit_code != 0:
        raise SystemExit(f"slipstream up ended with exit code {exit_code}")


async def _until_ready(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    async for raw in process.stdout:
        line = raw.decode().rstrip()
        console.print(f"  {line}", highlight=False)
        if line == "ready":
            return
    raise SystemExit(f"slipstream up ended with exit code {await process.wait()}")


async def show_stream(client: SlipstreamClient) -> None:
    """One question, token by token."""
    question = "What is the capital of France?"
    console.print(f"[cyan]you[/]  {question}")
    text = await _print_stream(client, [{"role": "user", "content": question}])
    _require("Paris" in text, "the answer names Paris")


async def show_chat(client: SlipstreamClient) -> None:
    """The second question means nothing without the first."""
    messages: list[dict[str, str]] = []
    for question in ("What is the capital of France?", "And of Italy?"):
        console.print(f"[cyan]you[/]  {question}")
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": await _print_stream(client, messages)})
    _require("Rome" in messages[-1]["content"], "the second answer depends on the first turn")


async def _print_stream(client: SlipstreamClient, messages: Sequence[dict[str, str]]) -> str:
    start_s = time.perf_counter()
    console.print("[green]model[/] ", end="")
    parts: list[str] = []
    stream = client.stream_complete(messages, do_sample=False, max_new_tokens=48)
    first_s = 0.0
    async with stream:
        async for delta in stream:
            first_s = first_s or time.perf_counter() - start_s
            parts.append(delta.text)
            console.print(delta.text, end="", highlight=False)
    console.print(f"   [dim]first token after {first_s:.2f} s[/]")
    return "".join(parts)


async def show_schema(client: SlipstreamClient) -> None:
    """A small model, kept to the form by the server."""
    question = "Facts about France as JSON: name, capital, continent."
    console.print(f"[cyan]you[/]  {question}")
    messages = [{"role": "user", "content": question}]
    answer = await client.generate(messages, json_schema=COUNTRY, do_sample=False, max_new_tokens=64)
    facts = json.loads(answer.text)
    console.print(f"[green]model[/] {json.dumps(facts)}", soft_wrap=True)
    _require(facts.get("continent") == "Europe" and facts.keys() == set(COUNTRY["required"]), "it fits the schema")


async def show_tasks(client: SlipstreamClient) -> None:
    """Sentences that mean the same lie near each other; so do a question and its answer."""
    vectors = await client.tasks.embed(SENTENCES)
    cosines = [[sum(map(operator.mul, one, other)) for other in vectors] for one in vectors]
    table = Table("cosine of embeddings", *map(str, range(1, len(vectors) + 1)), box=None, pad_edge=False)
    for number, (sentence, row) in enumerate(zip(SENTENCES, cosines, strict=True), start=1):
        table.add_row(
            f"{number}  {sentence}", *(f"[{'bold' if cosine > 0.4 else 'dim'}]{cosine:.2f}" for cosine in row)
        )
    console.print(table)
    _require(min(cosines[0][1], cosines[2][3]) > max(cosines[0][2:]), "sentences that mean the same are neighbours")
    asked: Mapping[str, Any] = {"ranking": {"query": QUERY, "documents": DOCUMENTS}}
    answer = await client.tasks.run("text-ranking", asked, model=ENCODER)
    console.print(f"[cyan]you[/]  {QUERY}")
    for found in answer.values()[0].documents:
        console.print(f"{found.score:5.2f}  {DOCUMENTS[found.index]}", highlight=False)
    _require(
        answer.values()[0].documents[0].index == 1, "the document that answers comes first, without a word in common"
    )


async def show_batching(client: SlipstreamClient, metrics_port: int) -> None:
    """Requests one at a time and all at once."""

    async def answer(prompt: str) -> int:
        messages = [{"role": "user", "content": prompt}]
        result = await client.generate(messages, do_sample=False, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        return result.usage.completion_tokens

    async def one_at_a_time() -> list[int]:
        return [await answer(prompt) for prompt in PROMPTS[:NUM_ALONE]]

    async def at_once() -> list[int]:
        return list(await asyncio.gather(*map(answer, PROMPTS)))

    rates: dict[str, float] = {}
    table = Table("prompts", "mean batch size", "tokens", "seconds", "tokens/s", box=None, pad_edge=False)
    sides = ((f"{NUM_ALONE}, one at a time", one_at_a_time), (f"{len(PROMPTS)}, all at once", at_once))
    for name, run in sides:
        steps, rows = await _engine_totals(metrics_port)
        start_s = time.perf_counter()
        with console.status(f"{name} ..."):
            tokens = sum(await run())
        elapsed_s = time.perf_counter() - start_s
        await asyncio.sleep(0.5)  # the worker tells its totals four times a second
        steps_now, rows_now = await _engine_totals(metrics_port)
        rates[name] = tokens / elapsed_s
        batch_size = (rows_now - rows) / max(steps_now - steps, 1)
        table.add_row(name, f"{batch_size:.1f}", str(tokens), f"{elapsed_s:.1f}", f"{rates[name]:.0f}")
    console.print(table)
    alone, together = rates.values()
    console.print(f"batching: [bold]{together / alone:.1f} times[/] the throughput of one at a time")


async def show_loop(client: SlipstreamClient, slipstream: Sequence[str], base_port: int) -> None:
    """A run that is too short makes v1; a proper one makes v2 while v1 is tried. v2 is promoted and taken back."""
    behaviour = json.loads((EXAMPLES / "behaviour.json").read_text())
    recipe = behaviour["training"]["hyperparameters"]
    train = ["train", str(EXAMPLES / behaviour["train_file"]), "--base", MODEL, "--adapter", ADAPTER]
    rank, batch_size = behaviour["training"]["adapter"]["rank"], recipe["batch_size_per_device"]
    train += ["--rank", str(rank), "--batch-size", str(batch_size)]
    train += ["--learning-rate", str(recipe["learning_rate"]), "--max-length", str(recipe["max_length"])]
    train += ["--scheduler", recipe["scheduler"], "--warmup", str(recipe["warmup_ratio"])]
    server_pid = _inference_pid(base_port)

    async def run(*arguments: str) -> None:
        shown = [argument.replace(str(EXAMPLES), "examples/aurora_desk") for argument in arguments]
        console.print(f"$ slipstream {' '.join(shown)}", style="dim", highlight=False, soft_wrap=True)
        environment = {**os.environ, "SLIPSTREAM_ADDRESS": f"127.0.0.1:{base_port}"}
        process = await asyncio.create_subprocess_exec(*slipstream, *arguments, env=environment)
        if await process.wait() != 0:
            raise SystemExit(f"slipstream {arguments[0]} ended with exit code {process.returncode}")

    await run(*train, "--max-steps", "1")
    await run(*train, "--max-steps", str(recipe["max_steps"]), "--job", SECOND_JOB, "--no-watch")
    await run("adapters", "promote", ADAPTER, "v1")
    _require(not await _follows(client, behaviour), f"{ADAPTER}@live is v1, which has learnt nothing yet")
    await run("jobs", "watch", SECOND_JOB)
    await run("adapters", "promote", ADAPTER, "v2")
    _require(await _follows(client, behaviour, ask=24), "promoted: the answers are what v2 was taught")
    await run("adapters", "rollback", ADAPTER)
    _require(not await _follows(client, behaviour), "rolled back: they are not any more")
    _require(_inference_pid(base_port) == server_pid, "and the server was never restarted")


async def _follows(client: SlipstreamClient, behaviour: dict[str, Any], *, ask: int = 8) -> bool:
    """Asks what no training run has seen; whether at least 80% of the live adapter's answers have the taught form."""
    held_out = (EXAMPLES / behaviour["held_out_file"]).read_text().splitlines()
    questions = [json.loads(line)["messages"][0] for line in held_out[:ask]]
    answers = await asyncio.gather(
        *(
            client.generate([question], adapter=ADAPTER, do_sample=False, max_new_tokens=behaviour["max_new_tokens"])
            for question in questions
        )
    )
    matches = sum(bool(re.search(behaviour["pattern"], answer.text.strip())) for answer in answers)
    console.print(f"[cyan]you[/]   {questions[0]['content']}", highlight=False)
    version = answers[0].adapter_version.removeprefix("adapters/").replace("/versions/", "@")
    console.print(f"[green]{version}[/] {answers[0].text.strip()}", highlight=False, soft_wrap=True)
    console.print(
        f"[dim]{matches} of {len(answers)} answers to questions it was not trained on have the taught form[/]"
    )
    return matches >= 0.8 * len(answers)


def _inference_pid(base_port: int) -> int:
    """The process that listens on the inference port."""
    listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    return next(c.pid or 0 for c in listening if c.laddr[1:] == (base_port,))


async def _engine_totals(metrics_port: int) -> tuple[float, float]:
    """Steps and rows of the model's engine so far, from the service's Prometheus port."""
    text = await asyncio.to_thread(_get, f"http://127.0.0.1:{metrics_port}/metrics")
    totals = {}
    for line in text.splitlines():
        if line.startswith("slipstream_engine_") and MODEL in line:
            name, value = line.rsplit(" ", 1)
            totals[name.partition("{")[0]] = float(value)
    return totals.get("slipstream_engine_steps_total", 0.0), totals.get("slipstream_engine_batch_rows_total", 0.0)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - our own loopback port
        return str(response.read().decode())


def free_base_port() -> int:
    """A base port whose twelve ports (four services; gRPC, metrics, health) are free now."""
    start = 20_000 + os.getpid() % 10_000
    for base in range(start, start + 2_000, 10):
        if all(_is_free(base + i + offset) for i in range(4) for offset in (0, 1000, 2000)):
            return base
    raise SystemExit("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _require(holds: bool, what: str) -> None:
    console.print(f"[{'green' if holds else 'red'}]{'✓' if holds else '✗'} {what}[/]")
    if not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
