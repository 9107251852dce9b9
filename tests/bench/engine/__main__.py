"""The engine against its peers, side by side on the same cores.

    python -m tests.bench.engine [--sides grpc,engine,vllm,generate,transformers_cb] [--workloads closed,...]
                                 [--concurrency 16,64] [--dtype float32] [--runs 5] [--slow-runs 2] [--json] [--save]

closed              48 requests at once: prompts of 16 to 128 tokens, outputs of 8 to 96, greedy, no end token
poisson             the same mixture arriving at random, at 50, 80 and 95% of what vLLM (else the first peer) can do
shared_prefix       32 requests that share their first 512 tokens
long_beside_short   12 short prompts that generate, 4 of 1,024 to 1,536 tokens that come in meanwhile

grpc is the real service through its client, engine the same engine without anything around it. Each side is a program
of its own that stays loaded; all but the service stand still while another runs. A ratio is ours over theirs, larger is
better (latencies count as 1/s). A side that generates another number of tokens than was asked for ends the bench.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.bench.engine import workloads
from tests.bench.engine.figures import WrongAnswers, figures
from tests.bench.engine.plan import WORKLOADS, closed_plan, plans
from tests.bench.engine.rounds import comparisons, run_rounds
from tests.bench.engine.side import KINDS, RunningSide, SideFailed, SideOptions, running
from tests.bench.engine.table import print_table
from tests.bench.report import keep
from tokenizers import Tokenizer

from slipstream_server.models.sources import resolve

MAX_TOKENS = 2048


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _end)
    lines: list[dict[str, Any]] = []
    try:
        for concurrency in arguments.concurrency:
            for line in bench(arguments, concurrency):
                lines.append(line)
                if arguments.json:
                    print(json.dumps(line), flush=True)
                if arguments.save:
                    keep(line)
    except (SideFailed, WrongAnswers) as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    if not arguments.json:
        print_table(lines)
    disagreeing = [line for line in lines if not line["answers_agree"]]
    for line in disagreeing:
        print(f"{line['workload']} against {line['versus']}: {line['same_answers']:.0%} same answers", file=sys.stderr)
    return 1 if disagreeing else 0


def bench(arguments: argparse.Namespace, concurrency: int) -> Iterator[dict[str, Any]]:
    """Every line at one concurrency; the sides are loaded for it and ended after it."""
    folder = resolve(arguments.model).folder
    corpus = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(workloads.corpus_text()).ids
    options = SideOptions(
        model_folder=folder,
        dtype=arguments.dtype,
        concurrency=concurrency,
        max_tokens=MAX_TOKENS,
        threads=len(os.sched_getaffinity(0)),
        batching=arguments.batching,
        settings=tuple(arguments.set),
    )
    facts = {
        "dtype": arguments.dtype, "concurrency": concurrency, "batching": arguments.batching,
        "model": arguments.model, "threads": options.threads,
    }  # fmt: skip
    with contextlib.ExitStack() as exits:
        sides = _start(arguments.sides, options, corpus, exits)
        capacity = _capacity(sides, corpus, arguments) if "poisson" in arguments.workloads else 0.0
        for plan in plans(arguments.workloads, corpus, arguments.requests, capacity):
            rounds = run_rounds(plan, sides, arguments.runs, arguments.slow_runs)
            offered = {"peer_requests_per_s": round(capacity, 3)} if plan.name.startswith("poisson") else {}
            yield from comparisons(plan, rounds, sides, facts | offered, device="cpu")


def _start(
    names: Sequence[str], options: SideOptions, corpus: Sequence[int], exits: contextlib.ExitStack
) -> list[RunningSide]:
    """The sides, one after the other, each warmed up."""
    logs = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-bench-")))
    warm_up = workloads.warm_up(corpus, options.concurrency).requests
    sides = []
    for name in names:
        start_s = time.perf_counter()
        side = exits.enter_context(running(name, options, logs / f"{name}.log"))
        answers, _ = side.run(warm_up)
        figures(warm_up, answers, streams=False)
        print(f"  {name}: loaded and warm after {time.perf_counter() - start_s:.0f} s", file=sys.stderr, flush=True)
        sides.append(side)
    return sides


def _capacity(sides: Sequence[RunningSide], corpus: Sequence[int], arguments: argparse.Namespace) -> float:
    """Requests a second of the peer that offered rates are fractions of: its best on the closed workload."""
    peers = [side for side in sides if not side.kind.is_ours and not side.kind.static]
    peer = next((side for side in peers if side.name == "vllm"), peers[0])
    rates = []
    for number in range(2):
        requests = closed_plan(corpus, arguments.requests).make(100_000 + number).requests
        answers, streams = peer.run(requests)
        rates.append(figures(requests, answers, streams=streams).requests_per_s)
    print(f"  {peer.name} can do {max(rates):.2f} requests/s", file=sys.stderr, flush=True)
    return max(rates)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sides", type=_names(KINDS), default=["grpc", "vllm", "generate", "transformers_cb"])
    parser.add_argument("--workloads", type=_names(WORKLOADS), default=["closed"])
    parser.add_argument("--concurrency", type=_numbers, default=[16], help="most requests at a time, one or several")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batching", default="continuous", help="Slipstream's engine")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="inference.KEY of Slipstream")
    parser.add_argument("--requests", type=_positive, default=48, help="of the closed and the Poisson workloads")
    parser.add_argument("--runs", type=_positive, default=5)
    parser.add_argument("--slow-runs", type=_positive, default=2, help="rounds with generate and transformers_cb")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--save", action="store_true", help="keep the lines in tests/bench/results")
    arguments = parser.parse_args()
    ours = [name for name in arguments.sides if KINDS[name].is_ours]
    if not ours or len(ours) == len(arguments.sides):
        parser.error("--sides: name at least one of grpc, engine and at least one peer")
    if "poisson" in arguments.workloads and all(KINDS[name].static or KINDS[name].is_ours for name in arguments.sides):
        parser.error("--workloads poisson: needs a peer that takes requests as they arrive")
    return arguments


def _names(allowed: Sequence[str] | dict[str, Any]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: allowed are {', '.join(allowed)}")
        return names

    return parse


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of at least 1 is needed")
    return int(text)


def _end(_number: int, _frame: object) -> NoReturn:
    """SIGTERM leaves by way of every ``finally``, so that no side stays."""
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
