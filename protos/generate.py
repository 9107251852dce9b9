#!/usr/bin/env python3
"""Regenerates the committed Python stubs beside the .proto files, and checks that they are what the protos say.

    python protos/generate.py           write the stubs and stubs.lock
    python protos/generate.py --check   regenerate into a temporary folder; exit 1 naming every file that differs
    python protos/generate.py --lint    buf lint over the tree, with the buf-bin of the Python that runs this

The toolchain is pinned and lives in an environment of its own (.env-protoc in the repository's root, not committed):
stubs made by it run on protobuf 6.33.5 and newer whatever else is installed beside them. stubs.lock holds a digest of
everything that goes in and comes out, so that a test can tell stale stubs without the toolchain. This file needs only
the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
TOOL_ENV = PROTOS.parent / ".env-protoc"
LOCK = PROTOS / "stubs.lock"
INCLUDE = PROTOS / ".include"
TOOLCHAIN = (
    "grpcio-tools==1.81.0",
    "protobuf==6.33.6",
    "mypy-protobuf==5.1.0",
    "googleapis-common-protos==1.76.0",
)
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")
# Files of google/ that the protos import and that neither protoc nor buf bring along.
INCLUDED_PROTOS = ("google/rpc/status.proto",)


def proto_files() -> list[str]:
    """Every .proto of the tree as a sorted list of paths below protos/, in import spelling."""
    return sorted(path.relative_to(PROTOS).as_posix() for path in (PROTOS / "slipstream").rglob("*.proto"))


def stub_files(root: Path) -> list[str]:
    """Every generated file below ``root``/slipstream, as sorted paths relative to ``root``."""
    found = {path for pattern in STUB_PATTERNS for path in (root / "slipstream").rglob(pattern)}
    return sorted(path.relative_to(root).as_posix() for path in found)


def digest(root: Path, names: list[str]) -> str:
    """SHA-256 over names and contents of files below ``root``."""
    total = hashlib.sha256()
    for name in names:
        content = hashlib.sha256((root / name).read_bytes()).hexdigest()
        total.update(f"{content}  {name}\n".encode())
    return total.hexdigest()


def lock_text() -> str:
    """What stubs.lock must hold for the tree as it stands."""
    state = {
        "toolchain": list(TOOLCHAIN),
        "protos_sha256": digest(PROTOS, proto_files()),
        "stubs_sha256": digest(PROTOS, stub_files(PROTOS)),
    }
    return json.dumps(state, indent=2) + "\n"


def ensure_toolchain() -> None:
    """Builds the tool environment unless it already holds exactly the pinned packages."""
    stamp = TOOL_ENV / "toolchain.json"
    if stamp.exists() and json.loads(stamp.read_text()) == list(TOOLCHAIN):
        return
    venv.create(TOOL_ENV, clear=True, with_pip=True)
    install = [str(tool("python")), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLCHAIN]
    subprocess.run(install, check=True)
    stamp.write_text(json.dumps(list(TOOLCHAIN)))


def tool(name: str) -> Path:
    """Path of a program of the tool environment."""
    return TOOL_ENV / ("Scripts" if sys.platform == "win32" else "bin") / name


def site_packages() -> Path:
    """Where the tool environment keeps its packages; google/rpc/*.proto lies below."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    output = subprocess.run([str(tool("python")), "-c", code], check=True, capture_output=True, text=True).stdout
    return Path(output.strip())


def generate(target: Path) -> None:
    """Writes all stubs below ``target``, which must exist; RPC stubs only for protos with a service."""
    ensure_toolchain()
    protos = proto_files()
    services = [name for name in protos if name.endswith("_service.proto")]
    protoc(protos, f"--python_out={target}", f"--mypy_out=quiet:{target}")
    protoc(services, f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}")


def protoc(protos: list[str], *outputs: str) -> None:
    """Runs the pinned compiler over ``protos``; its diagnostics go to standard error."""
    include = [f"--proto_path={PROTOS}", f"--proto_path={site_packages()}"]
    plugins = [f"--plugin=protoc-gen-{name}={tool(f'protoc-gen-{name}')}" for name in ("mypy", "mypy_grpc")]
    command = [str(tool("python")), "-m", "grpc_tools.protoc", *include, *plugins, *outputs, *protos]
    subprocess.run(command, check=True)


def write() -> int:
    """Replaces the stubs in place and records their digest."""
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        names = stub_files(Path(fresh))
        for stale in set(stub_files(PROTOS)) - set(names):
            (PROTOS / stale).unlink()
        for name in names:
            shutil.copyfile(Path(fresh) / name, PROTOS / name)
    LOCK.write_text(lock_text())
    print(f"{len(names)} stubs from {len(proto_files())} protos")
    return 0


def check() -> int:
    """Names every stub that is not what the protos give; 1 if there is any."""
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        problems = differences(Path(fresh))
    if LOCK.read_text() != lock_text():
        problems.append("stale: stubs.lock")
    print("\n".join(problems) if problems else "stubs are up to date")
    return 1 if problems else 0


def differences(fresh: Path) -> list[str]:
    """One line for each stub of the tree that is missing, stray or other than the one below ``fresh``."""
    wanted, present = set(stub_files(fresh)), set(stub_files(PROTOS))
    problems = [f"missing: {name}" for name in sorted(wanted - present)]
    problems += [f"stray: {name}" for name in sorted(present - wanted)]
    stale = (name for name in sorted(wanted & present) if (fresh / name).read_bytes() != (PROTOS / name).read_bytes())
    return problems + [f"stale: {name}" for name in stale]


def lint() -> int:
    """Runs buf lint over the tree; its findings go to standard output."""
    for name in INCLUDED_PROTOS:
        (INCLUDE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(sysconfig.get_path("purelib")) / name, INCLUDE / name)
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    return subprocess.run([str(buf), "lint"], cwd=PROTOS, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate, check or lint the stubs of the Slipstream contract.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="exit 1 and name the files that are not up to date")
    mode.add_argument("--lint", action="store_true", help="run buf lint")
    arguments = parser.parse_args()
    if arguments.lint:
        return lint()
    return check() if arguments.check else write()


if __name__ == "__main__":
    raise SystemExit(main())
