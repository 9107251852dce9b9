"""Puts together what makes, exports and advises on models, beside what loads them. Event loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from slipstream_server.inference.creation import ModelCreation
from slipstream_server.inference.exports import Exports
from slipstream_server.inference.front import AdapterResolver, InferenceFront
from slipstream_server.inference.memory_advice import MemoryAdviser
from slipstream_server.inference.model_records import ModelRecords
from slipstream_server.inference.plans import ServingDefaults
from slipstream_server.inference.room import DeviceRoom
from slipstream_server.models.configurations import Configurations
from slipstream_server.models.sources import SourceOptions
from slipstream_server.rpc.inference.model_advice import AdviceRooms
from slipstream_server.rpc.inference.model_making import MakingRooms


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolders:
    """Where models may come from and go: ``roots`` are the operator's, ``own_root`` has what the service makes, and
    ``exports`` what it writes anew for as long as it is read.
    """

    options: SourceOptions
    roots: tuple[Path, ...]
    own_root: Path
    exports: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRooms:
    """What ``ModelServicer`` needs beside the loads."""

    making: MakingRooms
    advice: AdviceRooms

    async def run(self) -> None:
        """Make the models that wait to be made; goes on as long as the service does."""
        await self.making.creation.run()


def model_rooms(
    front: InferenceFront,
    model_records: ModelRecords,
    room: DeviceRoom,
    places: ModelFolders,
    defaults: ServingDefaults,
    resolve_adapter: AdapterResolver | None = None,
) -> ModelRooms:
    """The rooms of one service. Removes what exports of an earlier process left: blocking, at start only."""

    def known_folder(name: str) -> Path | None:
        record = model_records.by_name.get(name)
        return None if record is None or record.creating else record.known_folder

    options = replace(places.options, allowed_roots=places.roots)
    configurations = Configurations(options, known_folder)
    exports = Exports(places.exports)
    exports.tidy()
    creation = ModelCreation(model_records, configurations, places.own_root, front.report)
    left_bytes = room.budget.left_bytes
    return ModelRooms(
        making=MakingRooms(
            model_records=model_records, creation=creation, exports=exports, resolve_adapter=resolve_adapter
        ),
        advice=AdviceRooms(
            configurations=configurations,
            adviser=MemoryAdviser(defaults, room.capacity, left_bytes),
            options=options,
            capacity=room.capacity,
            left_bytes=left_bytes,
        ),
    )
