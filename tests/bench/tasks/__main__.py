"""Embeddings and classification, many callers at once, against what one would write without a server.

    python -m tests.bench.tasks [--pairs 5] [--texts 384] [--callers 64] [--versus pipeline,pipeline_batched,mosec]
                                [--works embed,classify] [--device cpu] [--save]

Texts of 4 to 160 words, many short and some long; MiniLM in float32, for classification with a seeded head of two
labels. Every side is loaded beforehand and uses the same cores; the rate is texts a second.

slipstream          64 callers over gRPC, each with one text in a call and the next after the answer, default settings
pipeline            ``pipeline()`` called with one text after the other
pipeline_batched    ``pipeline(texts, batch_size=...)``: all texts known beforehand, the best size out of a trial
mosec               the same 64 callers over HTTP, batches of up to 32 within 10 ms (make bench-peers)

In each round every side works on the same texts, in an order that turns around. The values of all sides must agree with
those of ``pipeline``: cosines of at least 0.9999, scores within 0.001; else the bench fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tests.bench.report import Comparison, emit
from tests.bench.tasks.mosec_side import mosec
from tests.bench.tasks.pipeline_side import PipelineSide, best_batch_size, pipelines
from tests.bench.tasks.side import EMBED, WORKS, Done, Side, SideFailed, Values
from tests.bench.tasks.slipstream_side import slipstream
from tests.bench.tasks.texts import SEED, texts_of

from slipstream_server.models.sources import resolve

OURS, REFERENCE = "slipstream", "pipeline"
PEERS = ("pipeline", "pipeline_batched", "mosec")
MIN_COSINE, MAX_SCORE_DIFFERENCE = 0.9999, 1e-3


class WrongValues(Exception):
    """A side does not say what the reference says."""


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _end)
    try:
        asyncio.run(bench(arguments))
    except (SideFailed, WrongValues) as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    return 0


async def bench(arguments: argparse.Namespace) -> None:
    """Every line."""
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as folder:
        encoder = (await asyncio.to_thread(resolve, arguments.model)).folder
        classifier = Path(folder) / "classifier"
        await asyncio.to_thread(write_classifier, encoder, classifier)
        async with all_sides(arguments, encoder, classifier) as sides:
            facts = sides[OURS].facts()
            for work in arguments.works:
                rounds = await run_rounds(sides, work, arguments)
                for versus in arguments.versus:
                    emit(line_of(work, versus, rounds, sides, facts, arguments), save=arguments.save)


def write_classifier(encoder: Path, folder: Path) -> None:
    """The encoder with a head of two labels: its weights are seeded, and as good as any for measuring speed."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, local_files_only=True)
    torch.nn.init.normal_(model.classifier.weight)  # scores that tell the texts apart
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder, local_files_only=True).save_pretrained(folder)


@contextlib.asynccontextmanager
async def all_sides(arguments: argparse.Namespace, encoder: Path, classifier: Path) -> AsyncIterator[dict[str, Side]]:
    """Every side, loaded and warm, by name."""
    calls: dict[str, Any] = {"num_callers": arguments.callers, "device": arguments.device}
    async with contextlib.AsyncExitStack() as exits:
        program = await exits.enter_async_context(pipelines(encoder, classifier, arguments.device))
        sides: dict[str, Side] = {REFERENCE: PipelineSide(program, {})}
        sides[OURS] = await exits.enter_async_context(slipstream(encoder, classifier, **calls, settings=arguments.set))
        if "mosec" in arguments.versus:
            sides["mosec"] = await exits.enter_async_context(mosec(encoder, classifier, **calls))
        warm_up = texts_of(arguments.texts // 2, offset=1_000)
        for work in arguments.works:
            for side in sides.values():
                await side.run(work, warm_up)
        if "pipeline_batched" in arguments.versus:
            sizes = {work: await best_batch_size(program, work, warm_up) for work in arguments.works}
            sides["pipeline_batched"] = PipelineSide(program, sizes)
        yield sides


async def run_rounds(sides: Mapping[str, Side], work: str, arguments: argparse.Namespace) -> list[dict[str, Done]]:
    """What every side did in each round."""
    rounds = []
    for number in range(arguments.pairs):
        texts = texts_of(arguments.texts, offset=number)
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        done = {name: await sides[name].run(work, texts) for name in order}
        for name in order:
            check(work, name, done[name].values, done[REFERENCE].values)
        said = ", ".join(f"{name} {len(texts) / done[name].seconds:.0f}" for name in sides)
        print(f"{work} {number + 1}/{arguments.pairs}: texts/s: {said}", file=sys.stderr, flush=True)
        rounds.append(done)
    return rounds


def check(work: str, name: str, values: Values, expected: Values) -> float:
    """The lowest cosine, or the largest difference of scores; raises WrongValues where it is too much."""
    ours, theirs = np.asarray(values), np.asarray(expected)
    if ours.shape != theirs.shape:
        raise WrongValues(f"{name} gave {ours.shape} values in place of {theirs.shape}")
    if work == EMBED:
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        agreement = float(((ours * theirs).sum(axis=1) / lengths).min())
        is_wrong = not agreement >= MIN_COSINE
    else:
        agreement = float(np.abs(ours - theirs).max())
        is_wrong = not agreement <= MAX_SCORE_DIFFERENCE
    if is_wrong:
        raise WrongValues(f"{name} and {REFERENCE} do not agree on {work}: {agreement}")
    return agreement


def line_of(
    work: str,
    versus: str,
    rounds: Sequence[Mapping[str, Done]],
    sides: Mapping[str, Side],
    facts: Mapping[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The comparison with one other side, over all rounds."""
    agreements = [check(work, OURS, done[OURS].values, done[versus].values) for done in rounds]
    worst = min(agreements) if work == EMBED else max(agreements)
    return Comparison(
        bench="tasks",
        workload=f"{work}_{arguments.callers}_callers",
        side=OURS,
        versus=versus,
        ours=[arguments.texts / done[OURS].seconds for done in rounds],
        theirs=[arguments.texts / done[versus].seconds for done in rounds],
        unit="texts/s",
        seed=SEED,
        device=str(facts["device"]),
        dtype=str(facts["dtype"]),
        extra={
            "model": arguments.model,
            "texts": arguments.texts,
            "min_cosine" if work == EMBED else "max_score_difference": round(worst, 7),
            "theirs_facts": sides[versus].facts(),
            "numpy": metadata.version("numpy"),
        },
    ).line()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm-l6-v2", help="an encoder")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--texts", type=int, default=384, help="texts in a round")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--versus", type=_some_of(PEERS), default=list(PEERS))
    parser.add_argument("--works", type=_some_of(WORKS), default=list(WORKS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="inference.KEY of Slipstream")
    parser.add_argument("--save", action="store_true", help="keep the lines in tests/bench/results")
    return parser.parse_args()


def _some_of(allowed: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: allowed are {', '.join(allowed)}")
        return names

    return parse


def _end(_number: int, _frame: object) -> NoReturn:
    """SIGTERM leaves by way of every ``finally``, so that no side stays."""
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
