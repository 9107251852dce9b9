"""The Dockerfiles: linted, held against the services' settings; what control installs is tried without Docker."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.clients.services import RunningService, running_service
from tests.deploy.toolchain import TOOLS

from slipstream_server.config import ConfigError, load_settings

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
IMAGES = ("control", "inference", "training")
RUNS = {"control": ("chat", "adapters"), "inference": ("inference",), "training": ("training",)}
HEALTHCHECK = DOCKER / "healthcheck.py"
INSTALL_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    text: str


def stages(image: str) -> list[list[Instruction]]:
    """The instructions of each stage, the FROM first; what stands before the first FROM is left out."""
    lines = (DOCKER / f"{image}.Dockerfile").read_text().splitlines()
    joined = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    found: list[list[Instruction]] = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, text = line.partition(" ")
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append(Instruction(name, text.strip()))
    return found


def last(image: str, name: str) -> str:
    return [each.text for each in stages(image)[-1] if each.name == name][-1]


def variables(image: str) -> dict[str, str]:
    words = [word for each in stages(image)[-1] if each.name == "ENV" for word in shlex.split(each.text)]
    return dict(word.split("=", 1) for word in words)


def copied_from_the_repository(image: str) -> Iterator[tuple[str, str]]:
    """(source, destination) of every file and folder that the build needs."""
    for each in (each for stage in stages(image) for each in stage if each.name == "COPY"):
        *sources, destination = each.text.split()
        if not each.text.startswith("--from"):
            yield from ((source, destination) for source in sources)


@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_finds_nothing(image: str) -> None:
    command = [str(TOOLS / "hadolint"), str(DOCKER / f"{image}.Dockerfile")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_the_image_runs_its_service_and_stops_by_sigterm_as_nobody_special(image: str) -> None:
    assert len(stages(image)) >= 2
    assert json.loads(last(image, "ENTRYPOINT")) == ["slipstream", "serve"]
    assert json.loads(last(image, "CMD")) == [RUNS[image][0]]
    assert last(image, "STOPSIGNAL") == "SIGTERM"
    assert last(image, "USER") == "10001:10001"
    names = [each.name for each in stages(image)[-1]]
    assert not {"RUN", "COPY", "ADD"} & set(names[names.index("USER") :])
    assert "ADD" not in {each.name for stage in stages(image) for each in stage}
    secret = re.compile("TOKEN|KEY|PASSWORD|SECRET")
    declared = [each.text for stage in stages(image) for each in stage if each.name in ("ENV", "ARG")]
    assert not [text for text in declared if secret.search(text)]


@pytest.mark.parametrize("image", IMAGES)
def test_variables_are_settings_and_ports_are_the_services_own(image: str) -> None:
    environment = variables(image)
    with pytest.raises(ConfigError, match="can be reached from other machines"):
        load_settings(environment=environment)
    found = load_settings(environment=environment | {"SLIPSTREAM_INSECURE_LISTEN": "true"})
    listen = [found.listen(service) for service in RUNS[image]]  # type: ignore[arg-type]
    expected = [port for each in listen for port in (each.port, each.metrics_port, each.health_port)]
    assert list(map(int, last(image, "EXPOSE").split())) == expected
    assert int(environment["HEALTH_PORT"]) == listen[0].health_port
    volumes = last(image, "VOLUME").split()
    assert str(found.common.data_dir) in volumes
    caches = [Path(environment[name]) for name in ("HF_HOME", "SLIPSTREAM_HOME") if name in environment]
    assert len(caches) == (0 if image == "control" else 2)
    assert all(str(cache.parent) in volumes for cache in caches)


@pytest.mark.parametrize("image", IMAGES)
def test_everything_that_is_copied_is_there_and_not_ignored(image: str) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line.removeprefix("!") for line in lines if line.startswith("!")]
    for source, _ in copied_from_the_repository(image):
        assert (ROOT / source).exists(), source
        assert source in allowed
    # Stubs, client and server, and nothing that a build leaves behind.
    assert {"protos/slipstream", "clients/python", "services"} <= {
        each for each, _ in copied_from_the_repository(image)
    }
    assert lines[1] == "*"
    assert "**/__pycache__" in lines


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The bin folder of an environment that holds what the build stage of control installs, from what it copies."""
    folder = tmp_path_factory.mktemp("control")
    source = folder / "source"
    for origin, destination in copied_from_the_repository("control"):
        if destination.startswith("/"):
            continue  # of the last stage
        target = source / (Path(origin).name if destination == "./" else destination)
        if (ROOT / origin).is_dir():
            shutil.copytree(ROOT / origin, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / origin, target)
    extras = next(each.text for stage in stages("control") for each in stage if each.text.startswith("EXTRAS="))
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=120)
    python = folder / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile"]
    wanted = f".[{extras.removeprefix('EXTRAS=')}]"
    subprocess.run([*install, wanted], cwd=source, check=True, timeout=INSTALL_TIMEOUT_S)
    shutil.rmtree(source)
    yield python.parent
    shutil.rmtree(folder)


def healthcheck(control: Path, service: RunningService) -> int:
    environment = clean() | {"HEALTH_PORT": str(service.health_port)}
    command = [control / "python", HEALTHCHECK]
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=30).returncode


def clean() -> dict[str, str]:
    """The environment without what would show this checkout, or settings, to the installed program."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("SLIPSTREAM_", "PYTHON"))}


def image_environment(control: Path, tmp_path: Path) -> Mapping[str, str]:
    own = variables("control") | {"HOME": str(tmp_path), "SLIPSTREAM_HOST": "127.0.0.1"}
    return clean() | own | {"PATH": f"{control}:{os.environ['PATH']}"}


@pytest.mark.timeout(INSTALL_TIMEOUT_S)
@pytest.mark.parametrize("service", RUNS["control"])
def test_control_serves_without_torch(service: str, control: Path, tmp_path: Path) -> None:
    listing = subprocess.run([control / "python", "-m", "pip", "list"], capture_output=True, text=True, check=True)
    assert "slipstream " in listing.stdout
    assert not re.search(r"^(torch|transformers|nvidia\S*) ", listing.stdout, re.MULTILINE)
    environment = image_environment(control, tmp_path)
    program = (str(control / "slipstream"), "serve")
    with running_service(service, tmp_path / service, program=program, environment=environment) as running:
        assert healthcheck(control, running) == 0
    assert healthcheck(control, running) == 1
    assert (tmp_path / service / service / f"{service}.db").exists()
    assert [path.name for path in tmp_path.iterdir()] == [service], "something was written beside the data"
