"""ModelService: what is loaded, unloaded, deleted and refused, and what is left of it after a restart."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from tests.rpc.models_kit import MODEL, folder, model_service

from slipstream.inference.v1 import model_service_pb2 as pb2


async def test_a_folder_of_the_root_is_loaded_by_its_name(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        answered = await service.load("tiny")
        assert answered.state in (MODEL.STATE_LOADING, MODEL.STATE_DOWNLOADING)
        model = await service.reached("tiny")
        assert (model.name, model.source, model.architecture) == ("models/tiny", "tiny", "LlamaForCausalLM")
        print(model)
