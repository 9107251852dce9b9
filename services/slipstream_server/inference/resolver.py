"""From an adapter as a request names it to an immutable version whose files lie here: what the front asks per request.

    name or model's default -> version (registry copy) -> verified files (store) -> fits this model? -> pin

What the copy does not know may be too new for it: the registry itself is asked before a request is told that there is
no such thing, so that whoever has just published a version can use it. The name is looked up once. What it pointed at
then is what the request runs with, whatever happens to alias, version or registry meanwhile. Event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from slipstream_server.errors import AliasMissing, NotFound, Unavailable
from slipstream_server.inference.adapter_store import AdapterStore
from slipstream_server.inference.generation import AdapterPin
from slipstream_server.inference.registry_copy import RegistryCopy, ServableVersion

FitCheck = Callable[[str, ServableVersion, Path], Awaitable[None]]
"""Returns if the version, whose files lie in the folder, fits the model of that name; raises IncompatibleAdapter."""

LookUp = Callable[[str], Awaitable[ServableVersion]]
"""The registry's own answer to a reference; raises what RegistryCopy.find does, WrongState, Unavailable."""


class AdapterResolver:
    """Resolves for one front."""

    def __init__(self, copy: RegistryCopy, store: AdapterStore, *, look_up: LookUp, check_fit: FitCheck) -> None:
        self._copy = copy
        self._store = store
        self._look_up = look_up
        self._check_fit = check_fit

    async def __call__(self, model: str, adapter: str) -> AdapterPin | None:
        """The pin for a request that names ``adapter`` (empty: the model's default); None for the base.

        Raises what RegistryCopy.find, AdapterStore.folder_of and the fit check do.
        """
        reference = adapter or self._copy.default_of(model)
        if not reference:
            return None
        version = await self._version(reference)
        folder = await self._store.folder_of(version)
        await self._check_fit(model, version, folder)
        return AdapterPin(version=str(version.name), digest=version.digest, folder=str(folder))

    async def _version(self, reference: str) -> ServableVersion:
        try:
            return self._copy.find(reference)
        except (NotFound, AliasMissing) as unknown:
            try:
                return await self._look_up(reference)
            except Unavailable:
                raise unknown from None
