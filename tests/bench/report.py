"""How a benchmark runs its sides and says what it found: interleaved pairs, one JSON object a line.

``ratio`` is always ours over theirs and larger is better. Figures are only comparable within one line: the sides of a
line ran alternately, in one process tree, on one machine.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
PRODUCT = ("services", "clients", "protos", "pyproject.toml")
RESULTS_FOLDER = Path(__file__).parent / "results"
PACKAGES = ("slipstream", "torch", "transformers", "grpcio", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was compared: one line of results. ``ours`` and ``theirs`` are rates (larger is better), pair by pair."""

    bench: str
    workload: str
    side: str
    versus: str
    ours: Sequence[float]
    theirs: Sequence[float]
    unit: str
    seed: int
    device: str
    dtype: str
    extra: dict[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        """The JSON object of this comparison."""
        ratios = [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        return {
            "bench": self.bench,
            "workload": self.workload,
            "side": self.side,
            "versus": self.versus,
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            "runs": len(ratios),
            "ours_median": round(statistics.median(self.ours), 3),
            "theirs_median": round(statistics.median(self.theirs), 3),
            "unit": self.unit,
            "seed": self.seed,
            "device": self.device,
            "dtype": self.dtype,
            **surroundings(),
            **self.extra,
        }


def surroundings() -> dict[str, Any]:
    """What a line says of the machine and of what was measured on it."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "commit": COMMIT,
        "versions": versions(),
    }


def commit_of(checkout: Path) -> str:
    """The commit that is checked out, with "+" where files of the product differ from it; "unknown" without git."""
    if not (checkout / ".git").exists():  # git would look for one in the folders above
        return "unknown"
    git = ("git", "-C", str(checkout))
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *PRODUCT], capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.returncode else "")


# When the bench began: others may commit while it runs.
COMMIT = commit_of(CHECKOUT)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def emit(line: dict[str, Any], *, save: bool) -> None:
    """Prints the line; with ``save`` it is also kept."""
    print(json.dumps(line), flush=True)
    if save:
        keep(line)


def keep(line: dict[str, Any]) -> None:
    """Adds the line to results/<bench>-<date>-<machine class>.jsonl."""
    name = f"{line['bench']}-{datetime.date.today().isoformat()}-{machine_class(line['device'])}.jsonl"
    RESULTS_FOLDER.mkdir(exist_ok=True)
    with (RESULTS_FOLDER / name).open("a") as results:
        results.write(json.dumps(line) + "\n")


def machine_class(device: str) -> str:
    """``cpu2`` for two cores without an accelerator, else the device's name."""
    return (
        f"cpu{len(os.sched_getaffinity(0))}" if device == "cpu" else device.replace(":", "").replace(" ", "-").lower()
    )


async def interleaved(
    ours: Callable[[], Awaitable[float]], theirs: Callable[[], Awaitable[float]], *, pairs: int
) -> tuple[list[float], list[float]]:
    """Runs both sides alternately after one warm-up each; the rates each side returned, pair by pair."""
    await ours()
    await theirs()
    rates: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        order = ((0, ours), (1, theirs)) if pair % 2 == 0 else ((1, theirs), (0, ours))
        for side, run in order:
            rates[side].append(await run())
        print(f"pair {pair + 1}/{pairs}: {rates[0][-1]:.1f} against {rates[1][-1]:.1f}", file=sys.stderr, flush=True)
    return rates
