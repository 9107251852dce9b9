"""Layouts of keys and values: one decoding step's attention of one layer from blocks, against what else there is.

    python -m tests.bench.kv_layout [--shapes smollm2,8b] [--rows 1,16,48] [--contexts 128,1024,mixed]
                                    [--dtypes float32,bfloat16] [--device cpu] [--runs 7] [--json] [--save]

blocks          blocks read where they are (CpuMemory; with CUDA GpuMemory and Triton's kernels): ours
dense           a slot for each row, as wide as the longest row, and scaled_dot_product_attention (enable_gqa)
dense_grouped   the same; query heads of one key head go as queries of one head: the best that slots can do
concatenated    torch.cat at every token, as transformers' DynamicCache does, then as dense
gathered        blocks copied into a rectangle, then as dense

A step writes the new token of each row and attends. It goes through as many layers with memory of their own as take
128 MiB on every side, so that caches are as cold as in a model, whose weights pass between two layers' attention.
``mixed``: lengths of 16 to 1,024 tokens, evenly spread; what padding holds for nobody shows there. All sides are in one
process, in turns, bound to cores as a worker is. Before anything is timed the first and the last layer of every side
are compared with plain attention in float64. A ratio is blocks over the other side, larger is better; ``spread`` is
that of the turns. Turns that others have more than 5% of the cores in are tried anew some times; ``others_share`` says
what others had in those that count. ``--device cuda`` has not been run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slipstream_server.inference.worker_process import UNLESS_SET

os.environ.update({**UNLESS_SET, **os.environ})  # as the service does for its workers; before torch is imported

import torch
from rich.console import Console
from rich.table import Table
from tests.bench.kv_sides import OURS, SIDES, Case, Shape, Side, Step, WrongAttention, checked
from tests.bench.others import QUIET, Moment, wait_for_quiet
from tests.bench.report import Comparison, keep

from slipstream_server.inference.engine.cores import bind_team

SEED = 20263
COLD_BYTES = 128 * 2**20
SHAPES = {
    "smollm2": Shape(num_query_heads=9, num_heads=3, size=64),
    "8b": Shape(num_query_heads=32, num_heads=8, size=128),
}
# As many turns at most as so many times those that count, each after so long a wait for quiet.
MOST_TURNS = 2
WAIT_S = 0.5
MIXED = "mixed"
MIXED_TOKENS = (16, 1024)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> int:
    arguments = _arguments()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured", file=sys.stderr)
        return 0
    lines: list[dict[str, Any]] = []
    # A thread of its own computes, as in a worker: it is bound to a core, and this one says how many there are.
    with ThreadPoolExecutor(1, initializer=bind_team if device.type == "cpu" else None) as computing:
        for workload, case in cases(arguments, device):
            try:
                found = computing.submit(measured, case, workload, arguments.runs).result()
            except WrongAttention as wrong:
                print(f"failed: {wrong}", file=sys.stderr)
                return 1
            for line in (comparison.line() for comparison in found):
                lines.append(line)
                if arguments.json:
                    print(json.dumps(line), flush=True)
                if arguments.save:
                    keep(line)
    if not arguments.json:
        print_table(lines)
    return 0


def cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Case]]:
    """Every case with its name."""
    every = itertools.product(arguments.dtypes, arguments.shapes, arguments.rows, arguments.contexts)
    for dtype, name, num_rows, context in every:
        # One row alone is never padded.
        if num_rows > 1 or context != MIXED:
            yield f"{name}_{num_rows}_rows_{context}", case_of(name, num_rows, context, DTYPES[dtype], device)


def case_of(shape_name: str, num_rows: int, context: str, dtype: torch.dtype, device: torch.device) -> Case:
    """``context``: how many tokens each row has, or ``mixed``."""
    numbers = random.Random(SEED)
    lengths = tuple(numbers.randint(*MIXED_TOKENS) if context == MIXED else int(context) for _ in range(num_rows))
    shape = SHAPES[shape_name]
    layer_bytes = 2 * sum(lengths) * shape.num_heads * shape.size * dtype.itemsize
    return Case(
        shape=shape,
        lengths=lengths,
        dtype=dtype,
        device=device,
        num_layers=-(-COLD_BYTES // layer_bytes),
        seed=SEED,
    )


@torch.inference_mode()
def measured(case: Case, workload: str, num_runs: int) -> list[Comparison]:
    """Ours against each other side."""
    step = Step.of(case)
    sides = {name: new_side(case) for name, new_side in SIDES.items()}
    for layer in range(case.num_layers):
        past = case.past(layer)
        for side in sides.values():
            side.fill(layer, past)
    errors = {name: checked(f"{workload}, {name}", side, case, step) for name, side in sides.items()}
    times_s, shares = in_turns(sides, case, step, num_runs)
    medians_ms = {name: 1000 * statistics.median(times) for name, times in times_s.items()}
    print(
        f"  {workload}, {case.dtype}: {medians_ms[OURS]:.3f} ms a layer from blocks;"
        f" others had {statistics.median(shares):.0%} of the cores",
        file=sys.stderr,
        flush=True,
    )
    token_bytes = case.bytes_of(sum(case.lengths))
    return [
        Comparison(
            bench="kv_layout",
            workload=workload,
            side=OURS,
            versus=name,
            ours=[1 / time_s for time_s in times_s[OURS]],
            theirs=[1 / time_s for time_s in times_s[name]],
            unit="layers/s",
            seed=SEED,
            device="cpu" if case.device.type == "cpu" else torch.cuda.get_device_name(case.device),
            dtype=str(case.dtype).removeprefix("torch."),
            extra={
                "ours_ms": round(medians_ms[OURS], 4),
                "theirs_ms": round(medians_ms[name], 4),
                "ours_gb_per_s": round(token_bytes / medians_ms[OURS] / 1e6, 2),
                "token_bytes": token_bytes,
                "ours_held_bytes": sides[OURS].held_bytes,
                "theirs_held_bytes": sides[name].held_bytes,
                "ours_error": errors[OURS],
                "theirs_error": errors[name],
                "num_layers": case.num_layers,
                "others_share": round(statistics.median(shares), 3),
                "threads": torch.get_num_threads(),
            },
        )
        for name in sides
        if name != OURS
    ]


def in_turns(
    sides: Mapping[str, Side], case: Case, step: Step, num_runs: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds a layer of every side, and the share of the cores that others had, turn by turn; sides take turns to
    begin. The first turn does not count; of the others those count that were disturbed least.
    """
    names = list(sides)
    turns: list[tuple[float, dict[str, float]]] = []
    for turn in range(-1, MOST_TURNS * num_runs):
        if turn >= 0:
            wait_for_quiet(WAIT_S)
        start = Moment.now()
        first = turn % len(names)
        times_s = {name: _one_step_s(sides[name], case, step) for name in [*names[first:], *names[:first]]}
        if turn >= 0:
            turns.append((start.share_of_others(), {name: times_s[name] / case.num_layers for name in names}))
        if sum(share < QUIET for share, _ in turns) == num_runs:
            break
    quietest = sorted(turns, key=lambda each: each[0])[:num_runs]
    return {name: [times_s[name] for _, times_s in quietest] for name in names}, [share for share, _ in quietest]


def _one_step_s(side: Side, case: Case, step: Step) -> float:
    _wait_for(case.device)
    start_s = time.perf_counter()
    side.begin()
    for layer in range(case.num_layers):
        side.attend(layer, step)
    _wait_for(case.device)
    return time.perf_counter() - start_s


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """A row for each case; ratios above 1 are in favour of blocks."""
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in lines:
        cases.setdefault((line["dtype"], line["workload"]), {})[line["versus"]] = line
    others = [name for name in SIDES if name != OURS]
    table = Table(title="attention of one layer, one decoding step: times as fast as each other layout (spread)")
    table.add_column("dtype")
    table.add_column("workload")
    for name in ("blocks ms", "GB/s", *others, "held MiB: tokens", "blocks", "padded"):
        table.add_column(name, justify="right")
    for (dtype, workload), found in cases.items():
        first = next(iter(found.values()))
        held = (first["token_bytes"], first["ours_held_bytes"], found["dense"]["theirs_held_bytes"])
        table.add_row(
            dtype, workload, f"{first['ours_ms']:.3f}", f"{first['ours_gb_per_s']:.1f}",
            *(_ratio(found[name]) for name in others), *(f"{size / 2**20:.1f}" for size in held),
        )  # fmt: skip
    console = Console()
    (console if console.is_terminal else Console(width=190)).print(table)


def _ratio(line: dict[str, Any]) -> str:
    return f"{line['ratio_median']:.2f} ({line['ratio_min']:.2f}-{line['ratio_max']:.2f})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=_names, default=list(SHAPES))
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16, 48])
    parser.add_argument("--contexts", type=_names, default=["128", "1024", MIXED])
    parser.add_argument("--dtypes", type=_names, default=list(DTYPES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=int, default=7, help="turns that count")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--save", action="store_true", help="keep the lines in tests/bench/results")
    arguments = parser.parse_args()
    for option, allowed in (("shapes", SHAPES), ("dtypes", DTYPES)):
        if unknown := sorted(set(getattr(arguments, option)) - set(allowed)):
            parser.error(f"--{option} {', '.join(unknown)}: allowed are {', '.join(allowed)}")
    if any(context != MIXED and not (context.isdigit() and int(context)) for context in arguments.contexts):
        parser.error(f"--contexts {','.join(arguments.contexts)}: allowed are numbers of at least 1 and {MIXED}")
    if min(arguments.rows) < 1 or arguments.runs < 1:
        parser.error("--rows and --runs: at least 1")
    return arguments


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
