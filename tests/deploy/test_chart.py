"""The chart, rendered by helm for each of its examples: valid objects, and promises that no schema knows."""

from __future__ import annotations

import math
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.deploy.toolchain import HELM, TOOLS

from slipstream.adapters.v1 import adapter_service_pb2
from slipstream.chat.v1 import chat_service_pb2
from slipstream.inference.v1 import model_service_pb2
from slipstream_server.config import Settings, load_settings

pytestmark = pytest.mark.deploy

CHART = Path(__file__).resolve().parents[2] / "deploy" / "chart"
EXAMPLES = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))
SERVICES = ("inference", "chat", "training", "adapters")
# Every service of a health-only port that a probe may name.
PROBED = {
    str(module.DESCRIPTOR.services_by_name[name].full_name)
    for module, name in (
        (model_service_pb2, "ModelService"),
        (chat_service_pb2, "ChatService"),
        (adapter_service_pb2, "AdapterService"),
    )
}
EXTRA_KINDS = {"ServiceMonitor"}  # of the Prometheus operator; Kubernetes itself has no schema for it

Manifest = Mapping[str, Any]


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, check=False, timeout=60)


def template(*arguments: str) -> subprocess.CompletedProcess[str]:
    return helm("template", "slipstream", str(CHART), "--namespace", "models", *arguments)


@cache
def rendered(example: str) -> str:
    ended = template("--values", str(CHART / "ci" / f"{example}.yaml"))
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def manifests(example: str, kind: str) -> dict[str, Manifest]:
    """By component."""
    found = [each for each in yaml.safe_load_all(rendered(example)) if each and each["kind"] == kind]
    by_component = {each["metadata"]["labels"]["app.kubernetes.io/component"]: each for each in found}
    assert len(by_component) == len(found) or kind == "PersistentVolumeClaim"
    return by_component


def pod(deployment: Manifest) -> Manifest:
    spec: Manifest = deployment["spec"]["template"]["spec"]
    return spec


def container(deployment: Manifest) -> Manifest:
    (only,) = pod(deployment)["containers"]
    found: Manifest = only
    return found


def ports(owner: Manifest, key: str) -> dict[str, int]:
    return {port["name"]: port[key] for port in owner["ports"]}


def settings(example: str, service: str, tmp_path: Path) -> Settings:
    """What the service makes of the file and the variables that its pod gets."""
    file = tmp_path / f"{service}.toml"
    file.write_text(manifests(example, "ConfigMap")[service]["data"]["slipstream.toml"])
    variables = container(manifests(example, "Deployment")[service])["env"]
    environment = {each["name"]: each.get("value", "postgresql://user:secret@host/name") for each in variables}
    return load_settings(file=file, environment=environment)


def deployments() -> Iterator[tuple[str, str, Manifest]]:
    """(example, service, Deployment) of every example."""
    for example in EXAMPLES:
        for service, deployment in manifests(example, "Deployment").items():
            yield example, service, deployment


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_object_is_valid_to_kubernetes_and_lint_finds_nothing(example: str, tmp_path: Path) -> None:
    objects = tmp_path / "objects.yaml"
    objects.write_text(rendered(example))
    command = [str(TOOLS / "kubernetes-validate"), "--strict", str(objects)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = (ended.stdout + ended.stderr).splitlines()
    unchecked = [line for line in lines if line.startswith("WARN")]
    assert all(any(f"kind {kind} " in line for kind in EXTRA_KINDS) for line in unchecked), unchecked
    documents = [each for each in yaml.safe_load_all(rendered(example)) if each]
    assert len(lines) == len(documents), "an object was neither checked nor named as unknown"
    lint = helm("lint", "--strict", str(CHART), "--values", str(CHART / "ci" / f"{example}.yaml"))
    assert lint.returncode == 0, lint.stdout


def test_an_object_that_kubernetes_does_not_know_is_found(tmp_path: Path) -> None:
    objects = tmp_path / "objects.yaml"
    objects.write_text(rendered("cpu").replace("terminationGracePeriodSeconds", "terminationGraceSeconds"))
    command = [str(TOOLS / "kubernetes-validate"), "--strict", str(objects)]
    assert subprocess.run(command, capture_output=True, check=False, timeout=120).returncode != 0


def test_examples_hold_each_service_and_each_way_of_running_it() -> None:
    seen = list(deployments())
    assert {service for _, service, _ in seen} == set(SERVICES)
    assert {deployment["spec"]["strategy"]["type"] for _, _, deployment in seen} == {"Recreate", "RollingUpdate"}
    assert manifests("protected", "ServiceMonitor").keys() == set(SERVICES)
    assert manifests("gpu", "PodDisruptionBudget").keys() == {"inference"}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_service_accepts_its_settings_and_they_fit_its_pod(example: str, tmp_path: Path) -> None:
    """Read by the program's own reader, which refuses every key and value that it does not know."""
    for service, deployment in manifests(example, "Deployment").items():
        found = settings(example, service, tmp_path)
        listen = found.listen(service)  # type: ignore[arg-type]
        expected = {"grpc": listen.port, "metrics": listen.metrics_port, "health": listen.health_port}
        assert ports(container(deployment), "containerPort") == expected
        assert ports(manifests(example, "Service")[service]["spec"], "port") == expected
        assert pod(deployment)["terminationGracePeriodSeconds"] >= math.ceil(found.common.drain_grace_s) + 5
        mounts = {mount["mountPath"] for mount in container(deployment)["volumeMounts"]}
        own = {
            "chat": found.chat.inference_tls_ca,
            "inference": found.inference.adapters_tls_ca,
            "training": found.training.adapters_tls_ca,
        }
        files = (listen.tls_cert, listen.tls_key, listen.token_file, own.get(service))
        assert {str(file.parent) for file in files if file is not None} <= mounts
        assert str(found.common.data_dir) in mounts
        assert {volume["name"] for volume in pod(deployment)["volumes"]} == {
            mount["name"] for mount in container(deployment)["volumeMounts"]
        }


def test_addresses_are_those_of_the_other_services(tmp_path: Path) -> None:
    def address(service: str) -> str:
        found = manifests("protected", "Service")[service]
        return f"{found['metadata']['name']}:{ports(found['spec'], 'port')['grpc']}"

    assert (
        settings("protected", "chat", tmp_path).chat.inference_address == address("inference") == "slip-inference:6000"
    )
    assert settings("protected", "inference", tmp_path).inference.adapters_address == address("adapters")
    training = settings("protected", "training", tmp_path).training
    assert training.adapters_address == address("adapters")
    elsewhere = settings("chat-only", "chat", tmp_path).chat.inference_address
    assert elsewhere == "inference.example.com:50051"


def test_values_become_settings_of_the_right_type(tmp_path: Path) -> None:
    found = settings("gpu", "inference", tmp_path)
    assert found.inference.models == ("chat=/models/chat",)
    assert (found.inference.memory_fraction, found.inference.max_batch_size) == (0.85, 64)
    assert (found.common.log_level, found.common.drain_grace_s) == ("DEBUG", 120.5)
    assert found.common.max_message_bytes == 32 * 1024 * 1024
    adapters = settings("postgres", "adapters", tmp_path).adapters
    assert adapters.artifacts_url == "s3://bucket/adapters"
    assert adapters.database_url == "postgresql://user:secret@host/name"


@pytest.mark.parametrize(
    "text", ['quote " and \\ backslash', "tab\tand\nline", "<html> & 'single'", "ünï 🙂", "{{ braces }}", "# hash = 1"]
)
def test_any_text_survives_the_way_into_the_file(text: str) -> None:
    values = yaml.safe_dump({"insecureListen": True, "inference": {"models": [text]}})
    ended = subprocess.run(
        [HELM, "template", "x", str(CHART), "--values", "-"],
        input=values,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    maps = [each for each in yaml.safe_load_all(ended.stdout) if each and each["kind"] == "ConfigMap"]
    files = [tomllib.loads(each["data"]["slipstream.toml"]) for each in maps]
    assert [file["inference"]["models"] for file in files if "inference" in file] == [[text]]


def test_probes_ask_the_health_only_port() -> None:
    for _, service, deployment in deployments():
        health = ports(container(deployment), "containerPort")["health"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container(deployment)[probe]["grpc"]
            assert asked["port"] == health
            assert asked.get("service", "") in {"", *PROBED}
        # The whole of inference is not serving while a worker restarts: that must not kill the pod.
        alive = container(deployment)["livenessProbe"]["grpc"].get("service")
        assert alive == ("slipstream.inference.v1.ModelService" if service == "inference" else None)


def test_two_pods_never_share_sqlite() -> None:
    for example, service, deployment in deployments():
        names = {each["name"] for each in container(deployment)["env"]}
        on_postgres = f"SLIPSTREAM_{service.upper()}_DATABASE_URL" in names
        if service == "inference":
            continue  # it has no database
        if not on_postgres or service in ("training", "adapters"):
            assert deployment["spec"]["strategy"] == {"type": "Recreate"}, (example, service)
            assert deployment["spec"]["replicas"] == 1
    assert manifests("postgres", "Deployment")["chat"]["spec"]["replicas"] == 3


def test_what_must_survive_lies_on_claims_that_survive_too() -> None:
    text = rendered("cpu")
    claims = [each for each in yaml.safe_load_all(text) if each and each["kind"] == "PersistentVolumeClaim"]
    kept = {each["metadata"]["name"] for each in claims if "annotations" in each["metadata"]}
    assert kept == {f"slipstream-{service}-data" for service in ("chat", "training", "adapters")}
    by_name = {each["metadata"]["name"] for each in claims}
    assert by_name - kept == {"slipstream-inference-cache", "slipstream-training-cache"}
    for service, deployment in manifests("cpu", "Deployment").items():
        volumes = {volume["name"]: volume for volume in pod(deployment)["volumes"]}
        claim = volumes["data"].get("persistentVolumeClaim", {}).get("claimName")
        assert claim == (None if service == "inference" else f"slipstream-{service}-data")
    # Nothing of adapters is on a disk of its own where there are a database and a bucket; jobs always are.
    assert "slipstream-adapters-data" not in rendered("postgres")
    assert "slipstream-training-data" in rendered("postgres")


def test_pods_can_do_nothing_but_their_work() -> None:
    for _, _, deployment in deployments():
        assert pod(deployment)["securityContext"]["runAsNonRoot"] is True
        assert pod(deployment)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod(deployment)["automountServiceAccountToken"] is False
        assert pod(deployment)["enableServiceLinks"] is False
        assert container(deployment)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_gpus_and_places_are_as_asked_for() -> None:
    found = manifests("gpu", "Deployment")
    assert container(found["inference"])["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": 2}
    assert container(found["training"])["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod(found["inference"])["nodeSelector"] == {"accelerator": "h200"}
    assert pod(found["inference"])["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert pod(found["inference"])["runtimeClassName"] == "nvidia"
    assert "nvidia.com/gpu" not in str(found["chat"])
    assert container(found["inference"])["image"] == "registry.example.com/team/slipstream-inference:1.2.3"


def test_no_secret_is_written_into_an_object() -> None:
    for example, service, deployment in deployments():
        for each in container(deployment)["env"]:
            if each["name"].endswith(("_URL", "HF_TOKEN")):
                assert set(each) == {"name", "valueFrom"}, (example, service)
    assert not [each for example in EXAMPLES for each in manifests(example, "Secret")]


def test_a_pod_is_replaced_when_its_own_settings_change_and_only_then() -> None:
    def checksums(*more: str) -> dict[str, str]:
        ended = template("--values", str(CHART / "ci" / "cpu.yaml"), *more)
        found = [each for each in yaml.safe_load_all(ended.stdout) if each and each["kind"] == "Deployment"]
        annotations = [each["spec"]["template"]["metadata"]["annotations"] for each in found]
        return {
            each["metadata"]["name"]: note["checksum/settings"] for each, note in zip(found, annotations, strict=True)
        }

    before, after = checksums(), checksums("--set", "inference.settings.dtype=float32")
    assert {name for name in before if before[name] != after[name]} == {"slipstream-inference"}


PROTECTED = ("tokens.existingSecret=t", "tls.existingSecret=c", "inference.models={m}")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (
            ("inference.models={m}",),
            "the services listen beyond loopback: set tokens.existingSecret and tls.existingSecret",
        ),
        (("inference.models={m}", "tokens.existingSecret=t"), "the services listen beyond loopback"),
        (("inference.models={m}", "tls.existingSecret=t"), "the services listen beyond loopback"),
        (("insecureListen=true",), "inference.models: name at least one model"),
        ((*PROTECTED, "chat.replicas=2"), "chat.replicas: more than 1 needs PostgreSQL"),
        ((*PROTECTED, "inference.enabled=false"), "chat.settings.inference_address: needed"),
        ((*PROTECTED, "serviceMonitor.enabled=true"), "serviceMonitor.tokenSecret.name"),
    ],
)
def test_what_cannot_work_is_refused_in_words(values: Sequence[str], complaint: str) -> None:
    ended = template(*(word for value in values for word in ("--set", value)))
    assert ended.returncode != 0
    assert complaint in ended.stderr


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("replicas=2", "replicas"),
        ("inference.replica=2", "replica"),
        ("training.replicas=2", "replicas"),
        ("adapters.gpu.count=1", "gpu"),
        ("inference.gpu.count=-1", "count"),
        ("chat.replicas=0", "replicas"),
        ("host=127.0.0.1", "host"),
        ("extraTerminationSeconds=0", "extraTerminationSeconds"),
        ("settings.host=127.0.0.1", "/settings/host"),
        ("settings.insecure_listen=true", "/settings/insecure_listen"),
        ("chat.settings.database_url=sqlite://", "/chat/settings/database_url"),
        ("inference.settings.port=1", "/inference/settings/port"),
        ("inference.settings.Dtype=float32", "Dtype"),
        ("adapters.artifacts.url=file:///data", "url"),
        ("chat.data.size=lots", "size"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
    ],
)
def test_the_schema_refuses_unknown_and_impossible_values(value: str, named: str) -> None:
    ended = template("--values", str(CHART / "ci" / "cpu.yaml"), "--set", value)
    assert ended.returncode != 0
    assert "values don't meet the specifications of the schema" in ended.stderr
    assert named in ended.stderr


def test_every_value_of_the_chart_is_in_its_schema() -> None:
    """And the schema allows none that values.yaml does not explain."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    assert set(schema["properties"]) - {"global"} == set(values)
    shared = set(schema["$defs"]["anyService"]["properties"])
    for service in SERVICES:
        assert set(values[service]) == shared | set(schema["properties"][service]["properties"]), service


def test_notes_name_the_addresses_and_warn_of_open_doors() -> None:
    def notes(example: str) -> str:
        values = ("--values", str(CHART / "ci" / f"{example}.yaml"))
        ended = helm("install", "slipstream", str(CHART), *values, "--dry-run=client", "--output", "json")
        assert ended.returncode == 0, ended.stderr
        found: str = yaml.safe_load(ended.stdout)["info"]["notes"]
        return found

    assert "slip-adapters:6003" in notes("protected")
    assert "Anybody who reaches" not in notes("protected")
    assert "Anybody who reaches" in notes("cpu")
