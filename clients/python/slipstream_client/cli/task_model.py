"""A model for a task that no loaded model can do: the service's own proposals are loaded, the first that comes.

What is on the service's machine already goes first. Where a hub does not answer, the next one is tried; the last
failure is the answer. Everything said meanwhile goes to stderr.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from slipstream_client.cli import terminal
from slipstream_client.cli.model_loading import followed
from slipstream_client.client import SlipstreamClient
from slipstream_client.errors import NotFoundError, SlipstreamClientError

Result = TypeVar("Result")

_COMING = frozenset({"downloading", "loading", "restarting", "ready"})
# Why a model that was proposed may not come, while another one may.
_TRY_THE_NEXT = frozenset({"DEPENDENCY_UNAVAILABLE", "MISSING_DEPENDENCY", "OUT_OF_MEMORY", "PERMISSION_DENIED"})


async def with_model(
    client: SlipstreamClient, work: Callable[[str], Awaitable[Result]], *, quiet: bool = False
) -> Result:
    """What ``work`` gives for a model's name (empty: the service's choice), after loading one where none is loaded."""
    try:
        return await work("")
    except NotFoundError as error:
        proposed = [name for name in error.metadata.get("proposed_models", "").split(",") if name]
        if not proposed:
            raise
        task = error.metadata["task"]
    terminal.note(f"no model that is loaded can do {task}")
    return await work(await _loaded(client, task, proposed, quiet=quiet))


async def _loaded(client: SlipstreamClient, task: str, proposed: list[str], *, quiet: bool) -> str:
    """The name of the first of the proposed models that can be loaded."""
    names = await _nearest_first(client, task, proposed)
    for place, name in enumerate(names, start=1):
        terminal.note(f"loading {name} (`slipstream models unload {name}` takes it out again)")
        try:
            await client.models.load(name)
            await followed(client, name, as_json=quiet)
        except SlipstreamClientError as error:
            if place == len(names) or error.reason not in _TRY_THE_NEXT:
                raise
            terminal.warn(error.message.partition("; ")[0])  # what follows proposes what comes next
        else:
            break
    return name


async def _nearest_first(client: SlipstreamClient, task: str, proposed: list[str]) -> list[str]:
    """What is being loaded already, then what lies on the service's machine, then what has to be fetched."""
    coming = {model.id for model in await client.models.list(task=task) if model.state in _COMING}
    local = await client.models.recommend(task, local_only=True, max_results=50)
    here = {found.entry.id for found in local if found.entry is not None}
    return sorted(proposed, key=lambda name: (name not in coming, name not in here))
