"""Makes new models from configurations: checks what is asked, then initialises and saves them one after the other.

    root/<model>/                 a made model: a prepared folder with its provenance; complete or absent
    root/.making-<model>-*/       being made; what a crash left of one is removed at the next start

Weights are made in a subprocess; this room imports no torch. Event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from slipstream_server.errors import (
    InternalError,
    InvalidField,
    OutOfMemory,
    QueueFull,
    ResourceExists,
    SlipstreamError,
    UnsupportedField,
)
from slipstream_server.inference.model_records import ModelRecords, NewModel, StoredModel
from slipstream_server.models.architectures import ENDINGS
from slipstream_server.models.cache import require_free_bytes, storage_errors
from slipstream_server.models.config_checks import MAX_PARAMETERS, check_values, check_vocabulary, vocabulary_of
from slipstream_server.models.configurations import PROCESSOR_FILES, Configurations, tokenizer_files
from slipstream_server.models.counting import count_parameters_anywhere
from slipstream_server.models.estimate import DTYPE_BYTES
from slipstream_server.models.folder import FAST_TOKENIZER, PROVENANCE
from slipstream_server.models.tool_process import run_tool
from slipstream_server.storage.columns import DEFAULT_OWNER
from slipstream_server.storage.request_records import RequestKey

logger = logging.getLogger(__name__)

_EXAMINE_TIMEOUT_S = 120.0
_CREATE_TIMEOUT_S = 4 * 3600.0
_MAX_WAITING = 64
_MAX_CHECKS = 2
_MAX_SEED = 2**63 - 1
# What Python and torch take, and what saving takes beside the weights.
_PROCESS_BYTES = 500 * 1024**2
_MAKING = ".making-"
# How far a model is when a stage begins.
_STAGES = {"initialising": 0.2, "saving": 0.6}


@dataclass(frozen=True, slots=True, kw_only=True)
class CreationRequest:
    """What CreateModel asks for; ``config`` and ``config_source`` exclude each other. ``seed`` None: a random one."""

    model: str
    config_source: str = ""
    config: Mapping[str, Any] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_source: str = ""
    auto_class: str = ""
    data_type: str = "float32"
    seed: int | None = None
    owner: str = DEFAULT_OWNER


@dataclass(frozen=True, slots=True, kw_only=True)
class CreationPlan:
    """A request found good: the whole configuration, the class, and what the weights will take."""

    request: CreationRequest
    config: Mapping[str, Any]
    architecture: str
    auto_class: str
    tokenizer: Path | None
    processor: Path | None
    base_model: str
    num_parameters: int
    weight_bytes: int
    seed: int


class ModelCreation:
    """Plans and makes. ``report`` gets a model, what is being done with it, and how far that is, 0 to 1."""

    def __init__(
        self,
        model_records: ModelRecords,
        configurations: Configurations,
        root: Path,
        report: Callable[[str, str, float], None] = lambda model, stage, fraction: None,
    ) -> None:
        self._model_records = model_records
        self._configurations = configurations
        self._root = root
        self._report = report
        self._waiting: asyncio.Queue[CreationPlan] = asyncio.Queue(_MAX_WAITING)
        self._pending: set[str] = set()
        self._beginning = asyncio.Lock()
        self._checks = asyncio.Semaphore(_MAX_CHECKS)

    async def plan(self, request: CreationRequest) -> CreationPlan:
        """Check a request against its architecture, its tokenizer and this machine. Nothing is changed.

        Raises InvalidField, UnsafeWeights, ResourceExists, ModelNotFound, OutOfMemory, StorageFull,
        DependencyUnavailable.
        """
        _check_request(request)
        if request.model in self._model_records.by_name:
            raise ResourceExists(f"model_id: a model {request.model!r} exists; choose another id")
        base_model, config, source_folder = await self._base(request)
        async with self._checks:
            examined = await _examined(request, config)
            whole: dict[str, Any] = examined["config"]
            tokenizer = await self._tokenizer(request, whole, source_folder)
            counted = await count_parameters_anywhere(whole)
        if counted.total > MAX_PARAMETERS:
            raise InvalidField.of("config_overrides", f"{counted.total} parameters are more than {MAX_PARAMETERS}")
        plan = CreationPlan(
            request=request,
            config=whole,
            architecture=examined["architecture"],
            auto_class=examined["auto_class"],
            tokenizer=tokenizer,
            processor=source_folder,
            base_model=base_model,
            num_parameters=counted.total,
            weight_bytes=counted.total * DTYPE_BYTES[request.data_type],
            seed=secrets.randbelow(_MAX_SEED) if request.seed is None else request.seed,
        )
        await asyncio.to_thread(self._require_room, plan)
        return plan

    async def begin(self, plan: CreationPlan, key: RequestKey | None = None) -> StoredModel:
        """Register the model and make it in the background. Raises ResourceExists, RequestIdReused, QueueFull."""
        name = plan.request.model
        async with self._beginning:  # so that there is still a place once the model is registered
            if self._waiting.full():
                raise QueueFull(f"{_MAX_WAITING} models wait to be made already", retry_after_s=30.0)
            record = await self._model_records.add(self._new_model(plan), key=key)
            self._pending.add(name)
            self._waiting.put_nowait(plan)
        self._report(name, "waiting", 0.0)
        return record

    def _new_model(self, plan: CreationPlan) -> NewModel:
        return NewModel(
            id=plan.request.model,
            source=f"made from {plan.base_model or plan.config['model_type']}",
            locator=str(self._root / plan.request.model),
            by_operator=True,
            creating=True,
            owns_folder=True,
            base_model=plan.base_model,
            owner=plan.request.owner,
        )

    async def run(self) -> None:
        """Make what waits, until cancelled; what an earlier process did not finish is failed first."""
        await self._recover()
        while True:
            plan = await self._waiting.get()
            await self._make(plan)

    async def _recover(self) -> None:
        await asyncio.to_thread(_remove_leftovers, self._root)
        for name, record in list(self._model_records.by_name.items()):
            if not record.creating or name in self._pending:
                continue
            if (self._root / name / PROVENANCE).is_file():
                await self._model_records.change(name, creating=False, folder=str(self._root / name))
            else:
                await self._failed(name, InternalError("the service ended while it made this model; make it again"))

    async def _make(self, plan: CreationPlan) -> None:
        name = plan.request.model
        try:
            folder = await self._made(plan)
            await self._model_records.change(name, creating=False, folder=str(folder))
            logger.info("model %s was made: %s parameters", name, plan.num_parameters)
        except SlipstreamError as error:
            await self._failed(name, error)
        except Exception:
            logger.exception("model %s could not be made", name)
            await self._failed(name, InternalError("the model could not be made; the log tells why"))
        finally:
            self._pending.discard(name)

    async def _failed(self, name: str, error: SlipstreamError) -> None:
        """Keep why. Making goes on where the database cannot be written: the next start fails the model anew."""
        logger.warning("model %s could not be made: %s", name, error.message)
        try:
            await self._model_records.change(
                name, counts=False, creating=False, error_reason=error.reason, error_message=error.message
            )
        except SlipstreamError as failure:
            logger.warning("model %s: what became of it could not be stored: %s", name, failure.message)

    async def _made(self, plan: CreationPlan) -> Path:
        """The folder, complete and in its place."""
        name = plan.request.model
        with storage_errors():
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{_MAKING}{name}-", dir=self._root))
        try:
            answer = await run_tool(
                "make",
                {
                    "verb": "create",
                    "config": plan.config,
                    "architecture": plan.architecture,
                    "dtype": plan.request.data_type,
                    "seed": plan.seed,
                    "target": str(partial),
                    "files": await asyncio.to_thread(_files_beside, plan),
                },
                timeout_s=_CREATE_TIMEOUT_S,
                report=lambda progress: self._report(name, progress.stage, _STAGES.get(progress.stage, 0.0)),
            )
            return await asyncio.to_thread(_put_in_place, partial, self._root / name, _provenance(plan, answer))
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True))

    async def _base(self, request: CreationRequest) -> tuple[str, dict[str, Any], Path | None]:
        """Name, configuration and folder of what the model is made from."""
        if request.config is not None:
            return "", dict(request.config), None
        found = await asyncio.to_thread(self._configurations.find, request.config_source, "config_source")
        config = _without_code(found.config)
        return found.name, config, found.folder

    async def _tokenizer(self, request: CreationRequest, config: Mapping[str, Any], own: Path | None) -> Path | None:
        if vocabulary_of(config) is None:
            if request.tokenizer_source:
                raise UnsupportedField.of("tokenizer_source", f"{config['model_type']} reads no text")
            return None
        spec = request.tokenizer_source
        if not spec and own is not None and tokenizer_files(own):
            folder = own
        elif not spec and request.config is not None:
            raise InvalidField.of("tokenizer_source", "is required with `config` for a model that reads text")
        else:
            place = "tokenizer_source" if spec else "config_source"
            folder = await asyncio.to_thread(
                self._configurations.tokenizer_folder, spec or request.config_source, place
            )
        num_tokens = await asyncio.to_thread(_num_tokens, folder)
        check_vocabulary(config, num_tokens, "config" if request.config is not None else "config_overrides")
        return folder

    def _require_room(self, plan: CreationPlan) -> None:
        """Memory for the float32 weights and their cast copy; disk for the stored ones."""
        is_cast = plan.request.data_type != "float32"
        needed = plan.num_parameters * 4 + (plan.weight_bytes if is_cast else 0) + _PROCESS_BYTES
        available = int(psutil.virtual_memory().available)
        if needed > available:
            raise OutOfMemory(
                f"making {plan.num_parameters} parameters needs {needed} bytes of memory, {available} are free",
                metadata={"needed_bytes": str(needed), "left_bytes": str(available)},
            )
        require_free_bytes(self._root, plan.weight_bytes)


async def _examined(request: CreationRequest, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the overrides laid over it, as its class has it, and the class to build."""
    asked = {
        "config": config,
        "overrides": request.overrides,
        "is_whole": request.config is not None,
        "auto_class": request.auto_class,
    }
    return await run_tool("examine", asked, timeout_s=_EXAMINE_TIMEOUT_S)


def _check_request(request: CreationRequest) -> None:
    if request.auto_class and request.auto_class not in ENDINGS:
        raise InvalidField.of("auto_class", f"{request.auto_class[:60]!a} is not one of {', '.join(ENDINGS)}")
    if request.seed is not None and not 0 <= request.seed <= _MAX_SEED:
        raise InvalidField.of("seed", f"{request.seed} is not from 0 to {_MAX_SEED}")
    if request.data_type not in DTYPE_BYTES:
        raise InvalidField.of("data_type", f"{request.data_type} is not one of {', '.join(DTYPE_BYTES)}")
    check_values(request.overrides, "config_overrides")
    if request.config is not None:
        check_values(request.config, "config")
    elif not request.config_source:
        raise InvalidField.of("configuration", "config_source or config is required")


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration may say where its author's code is; the class is transformers' own all the same."""
    return {key: value for key, value in config.items() if key not in ("auto_map", "custom_pipelines")}


def _num_tokens(folder: Path) -> int:
    """Tokens of the tokenizer, added ones included; 0 where only Python can read it."""
    if not (folder / FAST_TOKENIZER).is_file():
        return 0
    from tokenizers import Tokenizer

    try:
        return int(Tokenizer.from_file(str(folder / FAST_TOKENIZER)).get_vocab_size(with_added_tokens=True))
    except Exception as error:  # whatever the tokenizers library finds wrong
        raise InvalidField.of("tokenizer_source", "the tokenizer cannot be read") from error


def _files_beside(plan: CreationPlan) -> list[str]:
    """The files of the tokenizer, and those that prepare pictures and sound, which belong to the configuration."""
    found: list[Path] = []
    if plan.processor is not None:
        found += [plan.processor / name for name in PROCESSOR_FILES if (plan.processor / name).is_file()]
    if plan.tokenizer is not None:
        found += [plan.tokenizer / name for name in tokenizer_files(plan.tokenizer)]
    return [str(path) for path in found]


def _provenance(plan: CreationPlan, answer: Mapping[str, Any]) -> dict[str, Any]:
    request = plan.request
    return {
        "made_from": plan.base_model or "config",
        "config_overrides": dict(request.overrides),
        "tokenizer": request.tokenizer_source or plan.base_model,
        "architecture": plan.architecture,
        "auto_class": plan.auto_class,
        "seed": plan.seed,
        "data_type": request.data_type,
        "parameters": answer["parameters"],
        "owner": request.owner,
        "transformers": answer["transformers"],
        "torch": answer["torch"],
    }


def _put_in_place(partial: Path, folder: Path, provenance: Mapping[str, Any]) -> Path:
    with storage_errors():
        (partial / PROVENANCE).write_text(json.dumps(provenance, indent=2, sort_keys=True), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # of a model of this name that was forgotten
        partial.rename(folder)
    return folder


def _remove_leftovers(root: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for leftover in root.glob(f"{_MAKING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
