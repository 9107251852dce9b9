"""ModelService: what is loaded, unloaded, deleted and refused, and what is left of it after a restart."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from tests.rpc.models_kit import (
    MODEL,
    ModelService,
    edit_config,
    error_info,
    folder,
    generate,
    held_open,
    model_service,
)

from slipstream.inference.v1 import model_service_pb2 as pb2
from slipstream_server.inference.model_records import NewModel
from slipstream_server.inference.plans import ServingDefaults

Eventually = Callable[..., Awaitable[None]]
OPTIONS = pb2.ModelLoadOptions(max_running_sequences=3, context_tokens=64, adapter_slot_count=2)


async def test_a_folder_of_the_root_is_loaded_by_its_name_and_told_in_full(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        made = folder(service.root, "tiny")
        (made / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
        answered = await service.load("tiny", options=OPTIONS, pinned=True)
        assert answered.state in (MODEL.STATE_LOADING, MODEL.STATE_DOWNLOADING)
        assert answered.HasField("progress")
        model = await service.reached("tiny")
        assert (model.name, model.source, model.architecture) == ("models/tiny", "tiny", "LlamaForCausalLM")
        # 2 * 400 * 64 of tables, 2 layers of 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64, and the last norm's 64.
        assert model.parameter_count == 2 * 400 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
        assert (model.vocabulary_size, model.context_tokens, model.licence) == (400, 64, "Apache-2.0")
        assert model.disk_bytes == sum(path.stat().st_size for path in made.iterdir())
        assert model.load_options == OPTIONS
        assert model.pinned
        assert model.adapter_slot_count == 2
        assert list(model.tasks) == ["text-generation"]
        assert model.HasField("load_time")
        assert model.create_time.seconds <= model.load_time.seconds
        assert [status.state for status in model.replica_statuses] == [MODEL.STATE_READY]
        assert (await generate(service, "tiny")).model == "models/tiny"


async def test_what_is_loaded_alike_stays_and_what_is_loaded_otherwise_is_refused(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        before = await service.loaded("tiny", options=OPTIONS)
        assert (await service.load("tiny", options=OPTIONS)).etag == before.etag
        assert (await service.load("tiny")).state == MODEL.STATE_READY
        pinned = await service.load("tiny", pinned=True)
        assert pinned.pinned
        assert pinned.etag != before.etag
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load("tiny", options=pb2.ModelLoadOptions())
        assert error_info(refused.value) == ("FAILED_PRECONDITION", "WRONG_STATE")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load("tiny", source="other")
        assert error_info(refused.value) == ("ALREADY_EXISTS", "ALREADY_EXISTS")


async def test_a_known_model_that_is_not_loaded_is_not_ready_and_an_unknown_one_not_found(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        await service.loaded("tiny")
        unloading = await service.unload("tiny")
        assert unloading.state in (MODEL.STATE_UNLOADING, MODEL.STATE_UNLOADED)
        unloaded = await service.reached("tiny", MODEL.STATE_UNLOADED)
        assert unloaded.architecture == "LlamaForCausalLM"
        assert unloaded.memory_bytes == 0
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(service, "tiny")
        assert error_info(refused.value) == ("UNAVAILABLE", "MODEL_NOT_READY")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(service, "nobody")
        assert error_info(refused.value) == ("NOT_FOUND", "MODEL_NOT_FOUND")
        await service.loaded("tiny")
        assert (await generate(service, "tiny")).usage.completion_tokens == 3


async def test_a_busy_model_gets_its_grace_and_new_requests_are_refused_meanwhile(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        await service.loaded("tiny")
        model = service.front._models["tiny"]
        model.dispatcher.queue.put(ticket := await _stuck(service))
        await service.unload("tiny")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(service, "tiny")
        assert error_info(refused.value) == ("UNAVAILABLE", "MODEL_NOT_READY")
        assert (await service.get("tiny")).state == MODEL.STATE_UNLOADING
        model.dispatcher.withdraw(ticket)
        await service.reached("tiny", MODEL.STATE_UNLOADED)


async def test_a_load_that_comes_during_the_grace_is_carried_out_and_one_taken_back_is_not(
    tmp_path: Path, assert_eventually: Eventually
) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        await service.loaded("tiny")
        for is_taken_back in (False, True):
            queue = service.front._models["tiny"].dispatcher
            queue.queue.put(ticket := await _stuck(service))
            await service.unload("tiny")
            assert (await service.load("tiny")).state == MODEL.STATE_UNLOADING
            if is_taken_back:
                await service.unload("tiny")
            queue.withdraw(ticket)
            await service.reached("tiny", MODEL.STATE_UNLOADED if is_taken_back else MODEL.STATE_READY)
        await assert_eventually(lambda: not service.loads._work)
        assert await service.states() == {"tiny": "UNLOADED"}


async def _stuck(service: ModelService) -> object:
    """A request that waits in the queue for ever: one that was answered, as if it had not been sent yet."""
    stream = await held_open(service, "tiny")
    async for _ in stream:
        pass
    return stream.ticket


async def test_pinned_models_are_unloaded_by_force_only_and_a_stale_etag_is_aborted(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        model = await service.loaded("tiny", pinned=True)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.unload("tiny")
        assert error_info(refused.value) == ("FAILED_PRECONDITION", "WRONG_STATE")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.unload("tiny", force=True, etag="77")
        assert error_info(refused.value) == ("ABORTED", "STALE_ETAG")
        await service.unload("tiny", force=True, etag=model.etag)
        assert not (await service.reached("tiny", MODEL.STATE_UNLOADED)).pinned


async def test_only_what_is_unloaded_is_deleted_and_a_users_folder_stays(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        made = folder(service.root, "tiny")
        await service.loaded("tiny")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.stub.DeleteModel(pb2.DeleteModelRequest(name="tiny"))
        assert error_info(refused.value) == ("FAILED_PRECONDITION", "WRONG_STATE")
        await service.unload("tiny")
        unloaded = await service.reached("tiny", MODEL.STATE_UNLOADED)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.stub.DeleteModel(pb2.DeleteModelRequest(name="tiny", etag="stale"))
        assert error_info(refused.value) == ("ABORTED", "STALE_ETAG")
        await service.stub.DeleteModel(pb2.DeleteModelRequest(name="models/tiny", etag=unloaded.etag))
        assert await service.states() == {}
        assert (made / "model.safetensors").is_file()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.get("tiny")
        assert error_info(refused.value) == ("NOT_FOUND", "MODEL_NOT_FOUND")


async def test_of_a_deleted_model_nothing_is_measured_or_remembered(
    tmp_path: Path, assert_eventually: Eventually
) -> None:
    def measured(service: ModelService) -> set[str]:
        labels = [sample.labels for family in service.registry.collect() for sample in family.samples]
        return {each.get("model") or each.get("gen_ai_request_model") or "" for each in labels} - {""}

    async with model_service(tmp_path) as service:
        for name in ("kept", "gone"):
            folder(service.root, name)
            await service.loaded(name)
            await generate(service, name)
        await service.unload("gone")
        await service.reached("gone", MODEL.STATE_UNLOADED)
        assert measured(service) == {"kept", "gone"}
        await service.stub.DeleteModel(pb2.DeleteModelRequest(name="gone"))
        assert measured(service) == {"kept"}
        await assert_eventually(lambda: set(service.loads.states._changes) == {"kept"})


async def test_files_that_the_service_made_go_with_their_model_and_no_others(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        made, foreign = folder(tmp_path / "own", "made"), folder(tmp_path, "foreign")
        for name, place in (("made", made), ("liar", foreign)):
            await service.loads.model_records.add(
                NewModel(id=name, source="made", locator=str(place), folder=str(place), owns_folder=True)
            )
            await service.stub.DeleteModel(pb2.DeleteModelRequest(name=name))
        assert not made.exists()
        assert (foreign / "config.json").is_file()


async def test_what_was_loaded_is_loaded_again_after_a_restart(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        for name in ("kept", "left"):
            folder(service.root, name)
        etag = (await service.loaded("kept", options=OPTIONS)).etag
        await service.loaded("left")
        await service.unload("left")
        await service.reached("left", MODEL.STATE_UNLOADED)
    async with model_service(tmp_path) as service:
        kept = await service.reached("kept")
        assert (kept.etag, kept.load_options) == (etag, OPTIONS)
        left = await service.reached("left", MODEL.STATE_UNLOADED)
        assert left.HasField("load_time")
        assert (await generate(service, "kept")).model == "models/kept"


async def test_a_failure_is_remembered_and_tried_again_where_the_model_is_wanted(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        made = folder(service.root, "tiny")
        await service.loaded("tiny")
    (made / "model.safetensors").rename(made / "elsewhere")
    async with model_service(tmp_path) as service:
        failed = await service.reached("tiny", MODEL.STATE_FAILED)
        assert failed.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    (made / "elsewhere").rename(made / "model.safetensors")
    async with model_service(tmp_path) as service:
        assert not (await service.reached("tiny")).HasField("error")


async def test_flags_are_desired_state_and_pinned_until_they_are_gone(tmp_path: Path) -> None:
    outside = folder(tmp_path, "outside")
    async with model_service(tmp_path, at_start={"flagged": str(outside)}, sizes={"flagged": 500}) as service:
        model = await service.reached("flagged")
        assert model.pinned
        assert model.source == "outside"
        await service.unload("flagged", force=True)
        await service.reached("flagged", MODEL.STATE_UNLOADED)
    async with model_service(tmp_path, at_start={"flagged": str(outside)}) as service:
        await service.reached("flagged")
    async with model_service(tmp_path) as service:
        assert await service.states() == {"flagged": "UNLOADED"}


async def test_a_repeated_request_is_answered_as_before_and_another_with_its_id_refused(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        await service.load("tiny", request_id="once")
        await service.reached("tiny")
        await service.unload("tiny")
        await service.reached("tiny", MODEL.STATE_UNLOADED)
        assert (await service.load("tiny", request_id="once")).state == MODEL.STATE_UNLOADED
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load("tiny", request_id="once", pinned=True)
        assert error_info(refused.value) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


async def test_validating_changes_nothing_and_tells_the_size(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        would_be = await service.load("tiny", options=OPTIONS, validate_only=True)
        assert (would_be.memory_bytes, would_be.load_options, would_be.state) == (40, OPTIONS, MODEL.STATE_UNLOADED)
        assert await service.states() == {}


async def test_weights_that_lie_elsewhere_are_refused_before_anything_is_registered(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        elsewhere = folder(tmp_path, "elsewhere")
        linked = folder(service.root, "linked")
        (linked / "model.safetensors").unlink()
        (linked / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
        for validate_only in (True, False):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await service.load("linked", validate_only=validate_only)
            assert error_info(refused.value)[0] == "PERMISSION_DENIED"
        assert await service.states() == {}


@pytest.mark.slow
async def test_weights_that_do_not_fit_are_refused_by_validating_and_by_loading(tmp_path: Path) -> None:
    """With an engine that would load them: validating builds the model on no device."""
    async with model_service(tmp_path, defaults=ServingDefaults(threads=1)) as service:
        edit_config(folder(service.root, "other-shape"), intermediate_size=100)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load("other-shape", validate_only=True)
        assert error_info(refused.value) == ("FAILED_PRECONDITION", "MODEL_LOAD_FAILED")
        assert "has another shape" in str(refused.value.details())
        await service.load("other-shape")
        failed = await service.reached("other-shape", MODEL.STATE_FAILED)
        assert failed.error.message == refused.value.details()


async def test_a_watch_tells_everything_then_changes_then_deletions(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        await service.loaded("tiny")
        call = service.stub.WatchModels(pb2.WatchModelsRequest(), timeout=30)
        events = aiter(call)
        assert (await anext(events)).model.name == "models/tiny"
        assert (await anext(events)).snapshot_end.model_count == 1
        await service.unload("tiny")
        seen = []
        while not seen or seen[-1] != MODEL.STATE_UNLOADED:
            seen.append((await anext(events)).model.state)
        assert set(seen) <= {MODEL.STATE_READY, MODEL.STATE_UNLOADING, MODEL.STATE_UNLOADED}
        await service.stub.DeleteModel(pb2.DeleteModelRequest(name="tiny"))
        event = await anext(events)
        while event.WhichOneof("event") == "model":
            event = await anext(events)
        assert event.deleted_model == "models/tiny"
        call.cancel()


async def test_lists_come_in_pages_by_state(tmp_path: Path) -> None:
    async with model_service(tmp_path, sizes=dict.fromkeys("abc", 10)) as service:
        for name in "abc":
            folder(service.root, name)
            await service.loaded(name)
        await service.unload("b")
        await service.reached("b", MODEL.STATE_UNLOADED)
        page = await service.stub.ListModels(pb2.ListModelsRequest(page_size=1, states=[MODEL.STATE_READY]))
        assert [model.name for model in page.models] == ["models/a"]
        rest = await service.stub.ListModels(
            pb2.ListModelsRequest(page_size=1, states=[MODEL.STATE_READY], page_token=page.next_page_token)
        )
        assert [model.name for model in rest.models] == ["models/c"]
        assert not rest.next_page_token
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.stub.ListModels(pb2.ListModelsRequest(page_token=page.next_page_token))
        assert error_info(refused.value) == ("INVALID_ARGUMENT", "INVALID_FIELD")


async def test_lists_by_what_is_no_task_or_state_are_refused_with_what_is_allowed(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        await service.loaded("tiny")
        by_alias = await service.stub.ListModels(pb2.ListModelsRequest(task="text-generation"))
        assert [model.name for model in by_alias.models] == ["models/tiny"]
        assert not (await service.stub.ListModels(pb2.ListModelsRequest(task="sentiment-analysis"))).models
        for fields, words in (
            ({"task": "text-generatoin"}, "did you mean 'text-generation'?"),
            ({"task": "xx"}, "ListTasks names the tasks"),
            ({"states": [MODEL.STATE_READY, 99]}, "states[1]: 99 is no state; allowed: STATE_UNLOADED, "),
            ({"states": [0]}, "states[0]: 0 is no state"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await service.stub.ListModels(pb2.ListModelsRequest(**fields))
            assert error_info(refused.value) == ("INVALID_ARGUMENT", "INVALID_FIELD")
            assert words in str(refused.value.details())


async def test_who_deletes_a_model_that_is_being_unloaded_is_told_to_wait(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        await service.loaded("tiny")
        model = service.front._models["tiny"]
        model.dispatcher.queue.put(ticket := await _stuck(service))
        await service.unload("tiny")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.stub.DeleteModel(pb2.DeleteModelRequest(name="tiny"))
        assert error_info(refused.value) == ("FAILED_PRECONDITION", "WRONG_STATE")
        assert refused.value.details() == "model tiny is being unloaded; delete it once it is UNLOADED"
        model.dispatcher.withdraw(ticket)
