"""Fetches a model's safe files from a Hugging Face hub, or from its local cache.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to every Hugging Face tool. A hub that does not
answer in 5 s is reported as DependencyUnavailable, after the local cache was asked. Only the files of a safetensors
model are ever downloaded. Blocking; any thread.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from slipstream_server.errors import (
    CorruptArtifact,
    DependencyUnavailable,
    InvalidField,
    ModelNotFound,
    PermissionDenied,
    SlipstreamError,
    UnsafeWeights,
)
from slipstream_server.models.cache import require_free_bytes, storage_errors
from slipstream_server.models.folder import SLOW_TOKENIZER_FILES
from slipstream_server.models.progress import ProgressCallback, PullProgress, PullStage

logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,127}", re.ASCII)
_MAX_FILES = 10_000
_OTHER_FORMATS = ("onnx/", "openvino/", "original/", "gguf/")
_WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?|adapter_model)\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubAccess:
    """Which hub, as whom, and where its files are kept; None means what huggingface_hub itself reads from the
    environment.
    """

    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    cache_folder: Path | None = None
    is_offline: bool = False
    timeout_s: float = 5.0

    @classmethod
    def from_environment(cls) -> HubAccess:
        environment = os.environ
        return cls(
            endpoint=environment.get("HF_ENDPOINT") or None,
            is_offline=environment.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSnapshot:
    """A downloaded repository at one commit."""

    folder: Path
    revision: str


def parse_hub_id(spec: str) -> tuple[str, str] | None:
    """``org/name`` or ``org/name@revision`` as repository and revision; None where ``spec`` is neither."""
    repository, _, revision = spec.partition("@")
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        return None
    if "@" not in spec:
        return repository, "main"
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise InvalidField.of("source", f"{revision[:100]!r} is no revision (a branch, a tag or a commit)")
    return repository, revision


def fetch_snapshot(
    repository: str, revision: str, access: HubAccess, progress: ProgressCallback, *, tokenizer_only: bool = False
) -> HubSnapshot:
    """The safe files of a repository: from the hub where it answers, else from the local cache.

    Raises ModelNotFound, PermissionDenied, UnsafeWeights, StorageFull, or DependencyUnavailable where neither has them.
    """
    if access.is_offline:
        return _from_local_cache(repository, revision, access, "HF_HUB_OFFLINE is set")
    try:
        info = _ask_hub(repository, revision, access)
    except DependencyUnavailable as error:
        logger.info("hub not reachable for %s: %s", repository, error.message)
        return _from_local_cache(repository, revision, access, error.message)
    sizes = _wanted_sizes(info.siblings or (), tokenizer_only)
    total_bytes = sum(sizes.values())
    require_free_bytes(_cache_folder(access), total_bytes)
    progress(PullProgress(stage=PullStage.DOWNLOADING, source=repository, total_bytes=total_bytes))
    folder = _download(repository, revision, sizes, access)
    progress(
        PullProgress(stage=PullStage.DOWNLOADING, source=repository, done_bytes=total_bytes, total_bytes=total_bytes)
    )
    return HubSnapshot(folder=folder, revision=folder.name)


def _ask_hub(repository: str, revision: str, access: HubAccess) -> Any:
    api = HfApi(endpoint=access.endpoint, token=access.token)

    def ask() -> Any:
        return api.model_info(repository, revision=revision, timeout=access.timeout_s, files_metadata=True)

    with _hub_errors(repository, revision):
        return _within(access.timeout_s, ask)


def _within(timeout_s: float, call: Callable[[], Any]) -> Any:
    """Run ``call`` with an overall deadline: name resolution has none of its own. A call that hangs is left to a daemon
    thread.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="hub-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise DependencyUnavailable(f"hub: no answer in {timeout_s:g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _download(repository: str, revision: str, names: Iterable[str], access: HubAccess) -> Path:
    with _hub_errors(repository, revision), storage_errors():
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=_cache_folder(access),
                allow_patterns=[glob.escape(name) for name in names],
                token=access.token,
                endpoint=access.endpoint,
                etag_timeout=access.timeout_s,
            )
        )


def _from_local_cache(repository: str, revision: str, access: HubAccess, why: str) -> HubSnapshot:
    for name in ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"):
        path = try_to_load_from_cache(repository, name, cache_dir=_cache_folder(access), revision=revision)
        if isinstance(path, str):
            folder = Path(path).parent
            return HubSnapshot(folder=folder, revision=folder.name)
    raise DependencyUnavailable(f"{why}, and the local cache does not hold {repository}")


def _cache_folder(access: HubAccess) -> Path:
    return access.cache_folder or Path(constants.HF_HUB_CACHE)


def _wanted_sizes(siblings: Iterable[Any], tokenizer_only: bool) -> dict[str, int]:
    """Names and sizes of the files to download; refuses a repository that has weights, and none of them safe."""
    files = {sibling.rfilename: int(sibling.size or 0) for sibling in siblings}
    if len(files) > _MAX_FILES:
        raise CorruptArtifact(f"a repository of {len(files)} files; at most {_MAX_FILES} are read")
    wanted = {name: size for name, size in files.items() if _is_wanted(name, tokenizer_only)}
    if tokenizer_only or any(_WEIGHTS.fullmatch(name) for name in wanted):
        return wanted
    pickles = sorted(name for name in files if name.endswith(_PICKLES))
    if pickles:
        raise UnsafeWeights(f"{pickles[0]}: pickled weights are never opened, and the repository has no safetensors")
    raise CorruptArtifact("the repository has no model.safetensors, no shards of one, and no adapter_model.safetensors")


def _is_wanted(name: str, tokenizer_only: bool) -> bool:
    if name.startswith(_OTHER_FORMATS) or ".." in name:
        return False
    if name.endswith(".safetensors"):
        return not tokenizer_only and _WEIGHTS.fullmatch(name) is not None
    return name.endswith((".json", ".jinja", ".txt")) or name in SLOW_TOKENIZER_FILES


@contextmanager
def _hub_errors(repository: str, revision: str) -> Iterator[None]:
    """The hub's own exceptions as Slipstream's; whatever else goes wrong on the way counts as no answer."""
    try:
        yield
    except SlipstreamError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _translate(error, repository, revision) from error


def _translate(error: Exception, repository: str, revision: str) -> SlipstreamError:
    if isinstance(error, GatedRepoError):
        return PermissionDenied(f"hub {repository}: gated; accept its terms there and set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(f"hub {repository}: no such repository, or a private one and no HF_TOKEN for it")
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(f"hub {repository}: no revision {revision!r}")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return DependencyUnavailable(f"hub {repository}: the hub answered with status {error.response.status_code}")
    return DependencyUnavailable(f"hub {repository}: the hub does not answer ({type(error).__name__})")
