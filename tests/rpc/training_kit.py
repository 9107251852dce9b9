"""A training service over real gRPC whose jobs are run by ``fake_runner``, and the calls its tests make."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from slipstream.training.v1 import dataset_service_pb2 as dataset_pb2
from slipstream.training.v1 import dataset_service_pb2_grpc as dataset_grpc
from slipstream.training.v1 import training_service_pb2 as pb2
from slipstream.training.v1 import training_service_pb2_grpc as training_grpc
from slipstream.type.v1 import artifact_pb2
from slipstream_server.config import ListenConfig
from slipstream_server.errors import DependencyUnavailable, SlipstreamError
from slipstream_server.rpc.server import RpcServer
from slipstream_server.rpc.service_runner import run_service
from slipstream_server.rpc.training.app import Workshop, build, opened_store
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import migrate
from slipstream_server.training.base_models import BaseModels
from slipstream_server.training.process_tree import MARK, LaunchOrder
from slipstream_server.training.publishing import AdapterUpload, PublishedVersion
from slipstream_server.training.resources import AliasOutcome
from slipstream_server.training.specification import Publication
from slipstream_server.training.tables import SCHEMA

FAKE_RUNNER = Path(__file__).with_name("fake_runner.py")
GIB = 1024**3
INVALID = ("INVALID_ARGUMENT", "INVALID_FIELD")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
State = pb2.TrainingJob
WHOLE_WAY = ["VALIDATING", "QUEUED", "STARTING", "RUNNING", "EVALUATING", "SUCCEEDED"]
ENDED = (State.STATE_SUCCEEDED, State.STATE_FAILED, State.STATE_CANCELLED)


def save_tiny_model(folder: Path) -> Path:
    """A Llama-shaped folder over bytes, made without torch: nobody runs it."""
    folder.mkdir(parents=True)
    words = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:2])
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **specials})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(words), "hidden_size": 8,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    layer = "model.layers.0."
    shapes = {"model.embed_tokens": (len(words), 8)}
    shapes |= {f"{layer}self_attn.{name}_proj": (8, 8) for name in "qkvo"}
    shapes |= {f"{layer}mlp.gate_proj": (16, 8), f"{layer}mlp.up_proj": (16, 8), f"{layer}mlp.down_proj": (8, 16)}
    tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


class FakeRegistry:
    """Registers versions in memory; ``failures`` are raised by the next uploads, ``refusal`` by the alias."""

    def __init__(self) -> None:
        self.uploads: list[AdapterUpload] = []
        self.versions: dict[str, PublishedVersion] = {}
        self.aliases: list[tuple[str, str]] = []
        self.bases: dict[str, str] = {}
        self.is_away = False
        self.failures: list[SlipstreamError] = []
        self.refusal: SlipstreamError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def base_of(self, adapter: str) -> str:
        if self.is_away:
            raise DependencyUnavailable("the registry does not answer")
        return self.bases.get(adapter, "")

    async def upload(self, upload: AdapterUpload) -> PublishedVersion:
        self.uploads.append(upload)
        if self.failures:
            raise self.failures.pop(0)
        name = f"adapters/{upload.adapter}/versions/v{len(self.versions) + 1}"
        version = self.versions.setdefault(upload.request_id, PublishedVersion(name, "sha256:" + "0" * 64))
        await self.gate.wait()
        return version

    async def set_alias(self, publication: Publication, version: str, request_id: str) -> AliasOutcome:
        if self.refusal is not None:
            raise self.refusal
        self.aliases.append((publication.alias, version))
        name = f"adapters/{publication.adapter}/aliases/{publication.alias}"
        return AliasOutcome(alias=name, moved=True, generation=1)


@dataclass(slots=True, kw_only=True)
class Bench:
    """A folder in which services come and go; what must outlive them."""

    folder: Path
    model: Path
    control: Path
    registry: FakeRegistry = field(default_factory=FakeRegistry)
    capacity_bytes: Mapping[str, int] = field(default_factory=lambda: {"cpu": 64 * GIB})
    max_running_jobs: int = 4

    def say(self, name: str, what: object) -> None:
        """Tell the fake runners something; an empty text takes it back."""
        temporary = self.control / f".{name}"
        temporary.write_text(str(what))
        temporary.replace(self.control / name)

    def command(self, order: LaunchOrder) -> list[str]:
        return [
            *(sys.executable, str(FAKE_RUNNER), "--control", str(self.control), "--recipe", str(order.recipe)),
            *("--attempt", str(order.attempt), "--folder", str(order.folder)),
        ]

    def runners(self) -> list[psutil.Process]:
        """Every living process that belongs to a job of this bench."""
        return [process for process in psutil.process_iter() if _is_of(process)]


def new_bench(folder: Path, **options: Any) -> Bench:
    """A bench with a tiny model, and an adapter for the fake runners to hand over."""
    bench = Bench(folder=folder, model=save_tiny_model(folder / "model"), control=folder / "control", **options)
    (bench.control / "adapter").mkdir(parents=True)
    (bench.control / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    return bench


def _is_of(process: psutil.Process) -> bool:
    """Whether it lives, and has a mark and this test's own sign in its environment."""
    try:
        environment = process.environ()
        is_alive = process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False
    return is_alive and MARK in environment and environment.get("TRAINING_BENCH") == os.environ["TRAINING_BENCH"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingClient:
    """Stubs and shorthands."""

    jobs: Any
    datasets: Any
    serving: asyncio.Task[int] | None = None

    async def upload(self, dataset: str, *rows: object, **header: Any) -> dataset_pb2.Dataset:
        return await self.upload_files(dataset, {"train.jsonl": jsonl(rows or talk())}, **header)

    async def upload_files(
        self, dataset: str, files: Mapping[str, bytes], *, splits: Mapping[str, str] | None = None, **header: Any
    ) -> dataset_pb2.Dataset:
        return await self.datasets.UploadDataset(iter(upload_messages(dataset, files, splits=splits, **header)))

    async def create(self, job: str = "", **spec: Any) -> pb2.TrainingJob:
        request_id = spec.pop("request_id", "")
        validate_only = spec.pop("validate_only", False)
        message = pb2.CreateTrainingJobRequest(
            training_job_id=job, spec=job_spec(**spec), request_id=request_id, validate_only=validate_only
        )
        return await self.jobs.CreateTrainingJob(message)

    async def get(self, job: str) -> pb2.TrainingJob:
        return await self.jobs.GetTrainingJob(pb2.GetTrainingJobRequest(name=job))

    async def cancel(self, job: str, grace_s: int = 10) -> pb2.TrainingJob:
        request = pb2.CancelTrainingJobRequest(name=job)
        request.grace.seconds = grace_s
        return await self.jobs.CancelTrainingJob(request)

    async def events(self, job: str, after: int = 0, timeout_s: float = 60) -> list[pb2.TrainingJobEvent]:
        """All events until the job has ended."""
        found: list[pb2.TrainingJobEvent] = []
        request = pb2.WatchTrainingJobRequest(name=job, after_sequence=after)
        async for response in self.jobs.WatchTrainingJob(request, timeout=timeout_s):
            found += response.events
        return found

    async def until(self, job: str, *states: int, timeout_s: float = 30) -> pb2.TrainingJob:
        """The job as soon as it is in one of ``states``."""
        async with asyncio.timeout(timeout_s):
            while (found := await self.get(job)).state not in states:
                await asyncio.sleep(0.02)
        return found

    async def wait_for_end(self, job: str) -> pb2.TrainingJob:
        return await self.until(job, *ENDED, timeout_s=120)

    async def until_step(self, job: str, step: int, timeout_s: float = 30) -> pb2.TrainingJob:
        async with asyncio.timeout(timeout_s):
            while (found := await self.get(job)).progress.step < step:
                await asyncio.sleep(0.02)
        return found


@asynccontextmanager
async def training_service(bench: Bench, *, token_file: Path | None = None) -> AsyncIterator[TrainingClient]:
    """The service over what lies in ``bench``; at the end it is stopped as SIGTERM would, and jobs go on."""
    database = Database(DatabaseConfig.sqlite(bench.folder / "training.db"))
    try:
        await migrate(database, SCHEMA)
        async with opened_store(None, bench.folder) as store:
            workshop = Workshop(
                database=database,
                store=store,
                registry=bench.registry,
                models=BaseModels({"tiny": str(bench.model)}, (bench.folder,)),
                folder=bench.folder,
                shared=bench.folder,
                capacity_bytes=bench.capacity_bytes,
                max_running_jobs=bench.max_running_jobs,
                kept=timedelta(days=30),
                command=bench.command,
            )
            async with _served(workshop, ListenConfig(drain_grace_s=1.0, token_file=token_file)) as client:
                yield client
    finally:
        await database.close()


@asynccontextmanager
async def _served(workshop: Workshop, listen: ListenConfig) -> AsyncIterator[TrainingClient]:
    started: asyncio.Future[RpcServer] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    running = run_service(build(workshop), listen, on_serving=started.set_result, stop=stop)
    serving = asyncio.create_task(running)
    await asyncio.wait({started, serving}, return_when=asyncio.FIRST_COMPLETED)
    try:
        server = started.result()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield client_of(channel, serving)
    finally:
        stop.set()
        await serving


def client_of(channel: grpc.aio.Channel, serving: asyncio.Task[int] | None = None) -> TrainingClient:
    return TrainingClient(
        jobs=training_grpc.TrainingServiceStub(channel),
        datasets=dataset_grpc.DatasetServiceStub(channel),
        serving=serving,
    )


def talk(count: int = 10) -> list[dict[str, Any]]:
    return [chat(f"say {number}", "yes " * (1 + number % 5)) for number in range(count)]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def jsonl(rows: Iterable[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def upload_messages(
    dataset: str,
    files: Mapping[str, bytes],
    *,
    splits: Mapping[str, str] | None = None,
    sha256: str | None = None,
    chunk_bytes: int = 1 << 20,
    **header: Any,
) -> Sequence[dataset_pb2.UploadDatasetRequest]:
    announced = [
        dataset_pb2.DatasetFile(
            file=artifact_pb2.ArtifactFile(
                path=path, size_bytes=len(data), sha256=sha256 or hashlib.sha256(data).hexdigest()
            ),
            split=(splits or {}).get(path, ""),
        )
        for path, data in files.items()
    ]
    head = dataset_pb2.UploadDatasetHeader(dataset_id=dataset, files=announced, **header)
    chunks = [
        artifact_pb2.ArtifactChunk(file_index=index, offset_bytes=offset, data=data[offset : offset + chunk_bytes])
        for index, data in enumerate(files.values())
        for offset in range(0, len(data), chunk_bytes)
    ]
    return [
        dataset_pb2.UploadDatasetRequest(header=head),
        *(dataset_pb2.UploadDatasetRequest(chunk=chunk) for chunk in chunks),
    ]


def job_spec(
    *,
    dataset: str = "talk",
    base_model: str = "tiny",
    max_steps: int = 10,
    checkpoint_interval: int = 4,
    publish: str = "",
    alias: str = "",
    retries: int = 2,
    **fields: Any,
) -> pb2.TrainingJobSpec:
    spec = pb2.TrainingJobSpec(base_model=base_model, dataset=pb2.DatasetSelection(dataset=dataset), **fields)
    if spec.WhichOneof("method") is None:
        spec.lora.SetInParent()
    spec.hyperparameters.max_steps = max_steps
    spec.checkpoints.interval_steps = checkpoint_interval
    spec.retry_policy.max_retries = retries
    spec.retry_policy.initial_backoff.nanos = 1_000_000
    spec.publish.adapter, spec.publish.alias = publish, alias
    return spec


def states(events: Iterable[pb2.TrainingJobEvent]) -> list[str]:
    """The states that the events lead through."""
    changed = [event.state_changed.state for event in events if event.HasField("state_changed")]
    return [pb2.TrainingJob.State.Name(state).removeprefix("STATE_") for state in changed]
