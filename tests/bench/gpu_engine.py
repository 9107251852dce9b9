"""The continuous engine on a GPU: its decoding step against the memory-bandwidth floor, its throughput against peers.

    python -m tests.bench.gpu_engine [--models smollm2,8b] [--rows 1,2,4,8,16,32,64] [--context 512] [--runs 5] [--save]

step        one step of so many decoding rows, scheduling and choosing included, against the time in which the device
            copies as many bytes as the step must read: weights, keys and values. Copy bandwidth is measured in the
            same run (2 x bytes copied per second, a buffer of ten times the cache).
throughput  48 requests at once (prompts of 16 to 128 tokens, outputs of 8 to 96, greedy, no end token) against static
            left-padded ``generate`` in batches of 16, and against Transformers' continuous batching. A peer that fails
            is left out, and its line says why; where our side fails, so does the command.

smollm2 is SmolLM2-135M-Instruct in bfloat16, 8b a Llama of 8B's shape with random weights. All sides are in one
process, each with weights of its own, in turns. Without CUDA nothing runs, unless by ``--device cpu --tiny``: a check
of this program, not a measurement. ``ratio`` is ours over theirs, larger is better.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from tests.bench.gpu_sides import MAX_ROWS, STEP_TOKENS, Job, Ours, StaticGenerate, TransformersBatching
from tests.bench.report import Comparison, emit, surroundings
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from slipstream_server.models.sources import resolve

SEED = 20
STEPS_PER_RUN = 32
WARM_UP_STEPS = 4
_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
}  # fmt: skip
_TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


def main() -> int:
    arguments = _arguments()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return 0
    transformers.logging.set_verbosity_error()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    bytes_per_s = copy_bandwidth(device, 64 * 2**20 if arguments.tiny else None)
    print(f"{name}: copies {bytes_per_s / 1e9:.0f} GB/s", file=sys.stderr)
    for model_name in ["tiny"] if arguments.tiny else arguments.models:
        model = _load(model_name, device)
        facts = {"model": model_name, "seed": SEED, "device": name, "dtype": str(model.dtype).removeprefix("torch.")}
        try:
            for line in itertools.chain(
                step_lines(model, arguments, bytes_per_s, facts), throughput_lines(model, arguments, facts)
            ):
                emit(line, save=arguments.save)
        except Exception:
            traceback.print_exc()
            print(f"{model_name}: our own side has failed, nothing more is measured", file=sys.stderr)
            return 1
        del model
    return 0


def step_lines(
    model: Any, arguments: argparse.Namespace, bytes_per_s: float, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One line for each number of rows."""
    most_rows = max(arguments.rows)
    longest = arguments.context + _num_new(arguments, most_rows)
    ours = Ours(_copy_of(model), max_rows=most_rows, num_tokens=most_rows * (longest + 32))
    for num_rows in arguments.rows:
        num_new = _num_new(arguments, num_rows)
        steps_s = _decoding_steps(ours, model, num_rows, arguments.context, num_new)
        # Halfway through the measured steps, so long are the contexts.
        kv_bytes = num_rows * (arguments.context + num_new // 2) * token_bytes(model)
        floor_s = (weight_bytes(model) + kv_bytes) / bytes_per_s
        runs = [steps_s[i : i + STEPS_PER_RUN] for i in range(0, len(steps_s), STEPS_PER_RUN)]
        yield _line(
            facts,
            workload=f"step_{num_rows}_rows",
            versus="floor",
            ours=[1 / statistics.median(run) for run in runs],
            theirs=[1 / floor_s] * len(runs),
            unit="steps/s",
            context_tokens=arguments.context,
            copy_gb_per_s=round(bytes_per_s / 1e9, 1),
            floor_ms=round(1000 * floor_s, 4),
            recorded=ours.is_recorded,
        )


def throughput_lines(model: Any, arguments: argparse.Namespace, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One line for each peer; that of a peer that fails says why instead of how fast. Ours raises."""
    jobs = closed_jobs(model.config.vocab_size, num_jobs=8 if arguments.tiny else 48)
    for versus, make in (("generate", StaticGenerate), ("transformers_cb", TransformersBatching)):
        if versus not in arguments.without:
            try:
                yield _throughput(model, versus, make, jobs, arguments.runs, facts)
            except PeerError as error:
                print(f"{facts['model']}: {versus} is left out: {error}", file=sys.stderr)
                yield {
                    "bench": "engine", "workload": "closed", "side": "continuous", "versus": versus,
                    "left_out": str(error), **facts, **surroundings(),
                }  # fmt: skip


class PeerError(Exception):
    """The peer has failed, not our side."""


@contextlib.contextmanager
def _as_the_peers() -> Iterator[None]:
    """Whatever is raised within is the peer's failure."""
    try:
        yield
    except Exception as error:
        raise PeerError(f"{type(error).__name__}: {error}"[:500]) from error


def _throughput(
    model: Any,
    versus: str,
    make: Callable[[Any], StaticGenerate | TransformersBatching],
    jobs: Sequence[Job],
    runs: int,
    facts: dict[str, Any],
) -> dict[str, Any]:
    num_tokens = sum(len(job.prompt) + job.max_new_tokens + 64 for job in jobs)
    ours = Ours(_copy_of(model), max_rows=MAX_ROWS, num_tokens=num_tokens)
    twin = _copy_of(model)
    with _as_the_peers():
        peer = make(twin)

    def run_peer() -> int:
        with _as_the_peers():
            return peer.run(jobs)

    try:
        pairs = _interleaved(lambda: ours.run(jobs), run_peer, runs)
    finally:
        if isinstance(peer, TransformersBatching):
            peer.close()
    return _line(
        facts, workload="closed", versus=versus, ours=pairs[0], theirs=pairs[1], unit="tokens/s",
        num_requests=len(jobs), recorded=ours.is_recorded,
    )  # fmt: skip


def closed_jobs(vocab_size: int, num_jobs: int) -> list[Job]:
    """The closed workload, of random tokens."""
    numbers = random.Random(SEED)
    return [
        Job(tuple(numbers.randrange(3, vocab_size) for _ in range(numbers.randint(16, 128))), numbers.randint(8, 96))
        for _ in range(num_jobs)
    ]


def copy_bandwidth(device: torch.device, num_bytes: int | None = None) -> float:
    """Bytes read and written per second by copies of a buffer of ten times the device's cache."""
    if num_bytes is None:
        num_bytes = 10 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best_s = min(_timed(lambda: target.copy_(source), device) for _ in range(20))
    return 2 * num_bytes / best_s


def weight_bytes(model: Any) -> int:
    """What every step reads: all parameters, but of a token table that no output layer shares only a few rows."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    table = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    is_shared = output is not None and output.weight is table
    return int(total if is_shared else total - table.nbytes)


def token_bytes(model: Any) -> int:
    """Keys and values of one token in all layers."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize)


def _num_new(arguments: argparse.Namespace, num_rows: int) -> int:
    """Tokens of each row: some come while the last rows' prompts are still computed."""
    num_prompt_steps = num_rows * arguments.context // STEP_TOKENS + num_rows
    return int(arguments.runs * STEPS_PER_RUN + WARM_UP_STEPS + num_prompt_steps + 2)


def _decoding_steps(ours: Ours, model: Any, num_rows: int, context: int, num_new: int) -> list[float]:
    """Seconds of every step in which all rows decoded, the first few left out."""
    numbers = random.Random(SEED)
    for _ in range(num_rows):
        prompt = tuple(numbers.randrange(3, model.config.vocab_size) for _ in range(context))
        ours.submit(Job(prompt, num_new))
    steps_s = []
    num_ended = 0
    while num_ended < num_rows:
        start_s = time.perf_counter()
        num_tokens, ended = ours.step()
        if num_tokens == num_rows and not ended:
            steps_s.append(time.perf_counter() - start_s)
        num_ended += ended
    usable = steps_s[WARM_UP_STEPS:]
    return usable[: len(usable) // STEPS_PER_RUN * STEPS_PER_RUN]


def _interleaved(ours: Callable[[], int], theirs: Callable[[], int], runs: int) -> tuple[list[float], list[float]]:
    """Tokens per second of both sides in turns, after one warm-up each."""
    ours(), theirs()
    rates: tuple[list[float], list[float]] = ([], [])
    for run in range(runs):
        for side in (0, 1) if run % 2 == 0 else (1, 0):
            start_s = time.perf_counter()
            num_tokens = (ours, theirs)[side]()
            rates[side].append(num_tokens / (time.perf_counter() - start_s))
    return rates


def _line(
    facts: dict[str, Any],
    *,
    workload: str,
    versus: str,
    ours: list[float],
    theirs: list[float],
    unit: str,
    **extra: Any,
) -> dict[str, Any]:
    return Comparison(
        bench="engine",
        workload=workload,
        side="continuous",
        versus=versus,
        ours=ours,
        theirs=theirs,
        unit=unit,
        seed=facts["seed"],
        device=facts["device"],
        dtype=facts["dtype"],
        extra={"model": facts["model"], **extra},
    ).line()


def _load(name: str, device: torch.device) -> Any:
    torch.manual_seed(SEED)
    if name == "smollm2":
        folder = resolve("smollm2-135m-instruct").folder
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
        return _ready(model.to(device))
    dtype = torch.float32 if name == "tiny" else torch.bfloat16
    config = LlamaConfig(**(_TINY if name == "tiny" else _8B), dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return _ready(LlamaForCausalLM(config))
    finally:
        torch.set_default_dtype(before)


def _ready(model: Any) -> Any:
    """Without an end token every row runs on."""
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def _copy_of(model: Any) -> Any:
    """Each side changes how its model attends; the one that is copied attends as it was loaded."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("sdpa")
    return twin


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["smollm2", "8b"])
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")],
                        default=[1, 2, 4, 8, 16, 32, 64])  # fmt: skip
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of each row of a step")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--without", type=lambda text: text.split(","), default=[], help="peers to leave out")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: checks this program")
    parser.add_argument("--save", action="store_true", help="keep the lines in tests/bench/results")
    arguments = parser.parse_args()
    unknown = set(arguments.models) - {"smollm2", "8b"}
    if unknown:
        parser.error(f"--models {', '.join(sorted(unknown))}: allowed are smollm2, 8b")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
