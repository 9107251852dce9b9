"""What every side's program does around its engine: options in, JSON lines on stdin and stdout, requests at their time.

Standard library alone, because it runs in every peer's environment. First line out: ``{"ready": facts}``. Then for each
``{"requests": [...]}`` in, one ``{"answers": [...], "streams": ...}`` or ``{"error": ...}`` out. The end of stdin ends
the program. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from tests.bench.engine.requests import Answer, Request, pack, request_from

_PR_SET_PDEATHSIG = 1


class Side(Protocol):
    """An engine that is loaded. ``streams``: tokens come one by one, not all at the end."""

    streams: bool

    def facts(self) -> dict[str, Any]:
        """Versions and settings, for the report."""

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests, each from its arrival on; times since the call."""


def options() -> argparse.Namespace:
    """The options that all sides have."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-folder", required=True)
    parser.add_argument("--dtype", required=True, choices=("float32", "bfloat16"))
    parser.add_argument("--concurrency", type=int, required=True, help="most requests that run at once")
    parser.add_argument("--max-tokens", type=int, required=True, help="prompt and answer of the longest request")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batching", default="continuous", help="Slipstream's engine")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of Slipstream's")
    return parser.parse_args()


def serve(make: Callable[[argparse.Namespace], Side]) -> None:
    """Load the side and obey until stdin ends."""
    _die_with_parent()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    side = make(options())
    print(json.dumps({"ready": side.facts()}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(_obey(side, json.loads(line))), file=out, flush=True)


def _obey(side: Side, command: dict[str, Any]) -> dict[str, Any]:
    try:
        answers = side.run([request_from(values) for values in command["requests"]])
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"answers": [pack(answer) for answer in answers], "streams": side.streams}


class Clock:
    """Seconds since the run began."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self.start_s

    def sleep_until(self, time_s: float) -> None:
        time.sleep(max(0.0, time_s - self.now_s()))


def run_in_steps(
    requests: Sequence[Request],
    submit: Callable[[int, Request], None],
    step: Callable[[], Iterable[tuple[int, Sequence[int]]]],
) -> list[Answer]:
    """Drive an engine that is stepped: requests go in once they have arrived, new tokens come out by request."""
    answers = [Answer() for _ in requests]
    upcoming = deque(sorted(range(len(requests)), key=lambda index: requests[index].arrival_s))
    num_open = 0
    clock = Clock()
    while upcoming or num_open:
        while upcoming and requests[upcoming[0]].arrival_s <= clock.now_s():
            submit(upcoming[0], requests[upcoming.popleft()])
            num_open += 1
        if not num_open:
            clock.sleep_until(requests[upcoming[0]].arrival_s)
            continue
        for index, token_ids in step():
            answers[index].add(token_ids, clock.now_s())
            num_open -= len(answers[index].token_ids) == requests[index].max_new_tokens
    return answers


def _die_with_parent() -> None:
    """A side that stands still cannot see its stdin end: the kernel ends it with the bench."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
