"""Models that no worker has: unloaded, being made, announced, being fetched or prepared, or failed. Event loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from slipstream_server.errors import SlipstreamError
from slipstream_server.inference.supervisor import ModelState, ModelStatus, not_ready

RETRY_AFTER_S = 5.0


class ExpectedModels:
    """Statuses by name, until the model arrives."""

    def __init__(self) -> None:
        self._statuses: dict[str, ModelStatus] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._statuses

    def __iter__(self) -> Iterator[ModelStatus]:
        return iter(self._statuses.values())

    def __getitem__(self, name: str) -> ModelStatus:
        return self._statuses[name]

    def announce(self, name: str) -> None:
        """The model will come; until then callers are told to wait."""
        self._statuses[name] = ModelStatus(model=name, stage="preparing")

    def report(self, name: str, stage: str, progress: float) -> None:
        """How far an announced or created model is, 0 to 1; of one that is awaited no more nothing is kept."""
        status = self._statuses.get(name)
        if status is not None and status.state in (ModelState.LOADING, ModelState.CREATING):
            self._statuses[name] = replace(status, stage=stage, progress=progress)

    def fail(self, name: str, error: SlipstreamError) -> None:
        """It will not come; callers get the reason."""
        self._statuses[name] = ModelStatus(model=name, state=ModelState.FAILED, error=error)

    def rest(self, name: str, state: ModelState, note: str = "") -> None:
        """It is UNLOADED or CREATING; ``note`` says in words what there is to add."""
        self._statuses[name] = ModelStatus(model=name, state=state, stage=note)

    def arrived(self, name: str) -> None:
        """It is here, or gone for good."""
        self._statuses.pop(name, None)

    def why_not(self, name: str) -> SlipstreamError:
        """What a caller who asks for it is told."""
        return not_ready(self._statuses[name], RETRY_AFTER_S)
