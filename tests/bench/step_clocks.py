"""Clocks around what a decoding step on a CPU calls, and what they come to.

They stand there only while ``clocks`` is entered, two readings each: some 300 pairs a step. Products are told apart by
their inputs and outputs, all else by name.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from slipstream_server.inference.engine import cpu_attention, fused_kernels
from slipstream_server.inference.engine.choosing import Chooser, Chosen
from slipstream_server.inference.engine.packed_pass import PackedModel

FUSED = ("write", "norm", "add_norm", "rotate_and_write", "rotate", "silu_times")


@dataclass(slots=True)
class Clock:
    """How long something took in one step, and how often it was called."""

    seconds: float = 0.0
    calls: int = 0


@dataclass(slots=True)
class TimedStep:
    """What the clocks showed in one step: products by inputs and outputs, all else by name."""

    total_s: float = 0.0
    products: defaultdict[tuple[int, int], Clock] = field(default_factory=lambda: defaultdict(Clock))
    calls: defaultdict[str, Clock] = field(default_factory=lambda: defaultdict(Clock))


@contextlib.contextmanager
def clocks(found: TimedStep) -> Iterator[None]:
    """Within it, what a step calls is timed into ``found``."""
    products = torch.ops.mkldnn
    places: list[tuple[Any, str, str]] = [
        (cpu_attention, "attend", "attention"),
        (cpu_attention, "write", "write"),
        *((fused_kernels, name, name) for name in FUSED if name != "write"),
        (Chooser, "prepare", "choosing"),
        (Chooser, "choose", "choosing"),
        (Chosen, "read", "choosing"),
        (PackedModel, "run", "forward"),
    ]
    with contextlib.ExitStack() as exits:
        for owner, name, clock in places:
            exits.enter_context(_replaced(owner, name, _around(getattr(owner, name), found.calls[clock])))
        linear = products._linear_pointwise
        exits.enter_context(_replaced(products, "_linear_pointwise", _around_products(linear, found.products)))
        yield


def _around(function: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start_s = time.perf_counter()
        result = function(*args, **kwargs)
        clock.seconds += time.perf_counter() - start_s
        clock.calls += 1
        return result

    return timed


def _around_products(
    function: Callable[..., torch.Tensor], clocks_: defaultdict[tuple[int, int], Clock]
) -> Callable[..., torch.Tensor]:
    def timed(inputs: torch.Tensor, *args: Any) -> torch.Tensor:
        start_s = time.perf_counter()
        result = function(inputs, *args)
        end_s = time.perf_counter()
        clock = clocks_[inputs.shape[-1], result.shape[-1]]
        clock.seconds += end_s - start_s
        clock.calls += 1
        return result

    return timed


@contextlib.contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def parts_of(timed: Sequence[TimedStep]) -> dict[str, dict[str, float]]:
    """Milliseconds, share and calls of every part; the shares are of the steps with clocks, and add up to 1."""
    calls = {name: [each.calls[name] for each in timed] for name in timed[0].calls}
    linear = [_sum(each.products.values()) for each in timed]
    fused = [_sum(each.calls[name] for name in FUSED) for each in timed]
    within = zip(calls["forward"], linear, calls["attention"], fused, strict=True)
    outside = zip(timed, calls["forward"], calls["choosing"], strict=True)
    rows = {
        "linear layers": linear,
        "attention": calls["attention"],
        "fused kernels": fused,
        "choosing": calls["choosing"],
        "rest of forward": [Clock(whole.seconds - sum(p.seconds for p in parts)) for whole, *parts in within],
        "rest of step": [Clock(step.total_s - run.seconds - choosing.seconds) for step, run, choosing in outside],
    }
    total_s = sum(each.total_s for each in timed)
    return {
        name: {
            "ms": median_ms([clock.seconds for clock in clocks_]),
            "share": round(sum(clock.seconds for clock in clocks_) / total_s, 3),
            "calls": clocks_[0].calls,
        }
        for name, clocks_ in rows.items()
    }


def fused_of(timed: Sequence[TimedStep]) -> dict[str, dict[str, float]]:
    """Milliseconds and calls of each fused kernel that is called."""
    return {
        name: {"ms": median_ms([each.calls[name].seconds for each in timed]), "calls": timed[0].calls[name].calls}
        for name in FUSED
        if timed[0].calls[name].calls
    }


def products_of(timed: Sequence[TimedStep], num_rows: int, item_bytes: int) -> list[dict[str, Any]]:
    """The linear layers by their inputs and outputs."""
    found = []
    for inputs, outputs in timed[0].products:
        clocks_ = [each.products[inputs, outputs] for each in timed]
        seconds = statistics.median(clock.seconds for clock in clocks_)
        items = clocks_[0].calls * inputs * outputs
        found.append(
            {
                "inputs": inputs,
                "outputs": outputs,
                "calls": clocks_[0].calls,
                "ms": round(1000 * seconds, 3),
                "gb_per_s": round(items * item_bytes / seconds / 1e9, 2),
                "gflop_per_s": round(2 * num_rows * items / seconds / 1e9, 1),
            }
        )
    return found


def _sum(clocks_: Iterable[Clock]) -> Clock:
    every = list(clocks_)
    return Clock(sum(clock.seconds for clock in every), sum(clock.calls for clock in every))


def median_ms(seconds: Sequence[float]) -> float:
    """The median in milliseconds."""
    return round(1000 * statistics.median(seconds), 3)
