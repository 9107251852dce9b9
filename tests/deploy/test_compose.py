"""The compose files: valid, safe by a linter's rules, and made of settings that the services accept."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.deploy.test_images import RUNS, variables
from tests.deploy.toolchain import TOOLS

from slipstream_server.config import Settings, load_settings

pytestmark = pytest.mark.deploy

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FILES = ("compose.yaml", "compose.gpu.yaml")
# Parsed by an implementation of the compose specification; a key or type it does not know is an error.
VALIDATE = """
import sys, compose_spec
compose_spec.PyOptions(apply_merge=True).from_yaml(open(sys.argv[1]).read()).validate_volumes()
"""


def parsed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return found


SERVICES = parsed("compose.yaml")["services"]


def validate(file: Path) -> subprocess.CompletedProcess[str]:
    command = [str(TOOLS / "python"), "-c", VALIDATE, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def image_of(service: str) -> str:
    file: str = SERVICES[service]["build"]["dockerfile"]
    return Path(file).name.removesuffix(".Dockerfile")


def settings(service: str) -> Settings:
    """Of the image's variables and the file's own, with the model that a person would name."""
    own = {key: re.sub(r"\$\{.*\}", "example/model", value) for key, value in SERVICES[service]["environment"].items()}
    return load_settings(environment=variables(image_of(service)) | own)


@pytest.mark.parametrize("name", FILES)
def test_files_are_valid(name: str) -> None:
    ended = validate(DEPLOY / name)
    assert ended.returncode == 0, ended.stderr


def test_an_unknown_key_is_found(tmp_path: Path) -> None:
    broken = tmp_path / "compose.yaml"
    broken.write_text((DEPLOY / "compose.yaml").read_text().replace("restart:", "restrat:"))
    assert "restrat" in validate(broken).stderr


def test_the_linter_finds_nothing_grave() -> None:
    command = [str(TOOLS / "compose-lint"), "check", str(DEPLOY / "compose.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stdout


def test_all_four_run_in_images_made_for_them() -> None:
    assert set(SERVICES) == {"inference", "chat", "training", "adapters"}
    for service, definition in SERVICES.items():
        assert service in RUNS[image_of(service)]
        assert definition["image"].partition(":")[0] == f"slipstream-{image_of(service)}"
        # The image's own command, or said here.
        assert definition.get("command", [RUNS[image_of(service)][0]]) == [service]


@pytest.mark.parametrize("service", SERVICES)
def test_settings_are_accepted_and_only_this_machine_reaches_the_ports(service: str) -> None:
    listen = settings(service).listen(service)  # type: ignore[arg-type]
    expected = [f"127.0.0.1:{port}:{port}" for port in (listen.port, listen.metrics_port)]
    assert SERVICES[service]["ports"] == expected
    health = SERVICES[service]["environment"].get("HEALTH_PORT", variables(image_of(service))["HEALTH_PORT"])
    assert int(health) == listen.health_port
    grace = SERVICES[service]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > listen.drain_grace_s


def test_services_find_each_other_by_name() -> None:
    def address(service: str) -> str:
        return f"{service}:{settings(service).port_of(service)}"  # type: ignore[arg-type]

    assert settings("chat").chat.inference_address == address("inference")
    assert settings("inference").inference.adapters_address == address("adapters")
    assert settings("training").training.adapters_address == address("adapters")


def test_every_volume_is_declared_and_used() -> None:
    used = {volume.partition(":")[0] for definition in SERVICES.values() for volume in definition["volumes"]}
    assert used == set(parsed("compose.yaml")["volumes"])
    for definition in SERVICES.values():
        assert definition["read_only"] is True
        assert "/tmp" in definition["tmpfs"]


def test_gpus_are_laid_over_the_services_that_use_them() -> None:
    over = parsed("compose.gpu.yaml")["services"]
    assert set(over) == {"inference", "training"} <= set(SERVICES)
    for service, definition in over.items():
        (device,) = definition["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        names = definition.get("environment", {})
        values = {key: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for key, value in names.items()}
        load_settings(environment=values)
        assert service == "training" or float(values["SLIPSTREAM_INFERENCE_MEMORY_FRACTION"]) < 0.9
