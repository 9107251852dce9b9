"""ModelService: what is loaded, unloaded, deleted and refused, and what is left of it after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from tests.rpc.models_kit import (
    MODEL,
    ModelService,
    edit_config,
    error_info,
    error_metadata,
    folder,
    model_service,
    retry_after_s,
)

from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.inference.v1 import model_service_pb2 as pb2
from slipstream.type.v1 import generation_pb2, precision_pb2
from slipstream_server.inference.calls import GenerateCall, StoppingChoice, TextPrompt
from slipstream_server.inference.library import NewModel

Eventually = Callable[..., Awaitable[None]]
BUSY_RETRY_S = 5.0
GPTQ = precision_pb2.QUANTIZATION_GPTQ
OPTIONS = pb2.ModelLoadOptions(max_running_sequences=3, context_tokens=64, adapter_slot_count=2)


def generate(service: ModelService, model: str, num_tokens: int = 3) -> Awaitable[inference_pb2.GenerateResponse]:
    stopping = generation_pb2.StoppingOptions(max_new_tokens=num_tokens)
    return service.inference.Generate(inference_pb2.GenerateRequest(model=model, text="hello", stopping=stopping))


def held_open(service: ModelService, model: str) -> Awaitable[object]:
    """A request whose answer nobody has read: it keeps its model busy."""
    call = GenerateCall(prompt=TextPrompt(text="hello"), model=model, stopping=StoppingChoice(max_new_tokens=2))
    return service.front.open(call)


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


async def test_files_that_the_service_made_go_with_their_model_and_no_others(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        made, foreign = folder(tmp_path / "own", "made"), folder(tmp_path, "foreign")
        for name, place in (("made", made), ("liar", foreign)):
            await service.loads.library.add(
                NewModel(id=name, source="made", locator=str(place), folder=str(place), owns_folder=True)
            )
            await service.stub.DeleteModel(pb2.DeleteModelRequest(name=name))
        assert not made.exists()
        assert (foreign / "config.json").is_file()


async def test_the_least_recently_used_idle_model_gives_way(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        for name in ("first", "second", "third"):
            folder(service.root, name)
        await service.loaded("first")
        await service.loaded("second")
        await generate(service, "first")
        await service.loaded("third")
        assert await service.states() == {"first": "READY", "second": "UNLOADED", "third": "READY"}
        assert (await service.get("second")).state_message == "unloaded to make room for third"


async def test_pinned_and_busy_models_stay_and_the_refusal_has_the_numbers(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        for name in ("pinned", "busy", "third"):
            folder(service.root, name)
        await service.loaded("pinned", pinned=True)
        await service.loaded("busy")
        stream = await held_open(service, "busy")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load("third")
        assert error_info(refused.value) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
        assert error_metadata(refused.value) | {"needed_bytes": "40", "left_bytes": "20", "budget_bytes": "100"} == (
            error_metadata(refused.value)
        )
        assert retry_after_s(refused.value) == BUSY_RETRY_S
        assert "third" not in await service.states()
        stream.close()
        await service.loaded("third")
        assert await service.states() == {"busy": "UNLOADED", "pinned": "READY", "third": "READY"}


async def test_two_loads_at_once_do_not_both_take_the_last_room(tmp_path: Path) -> None:
    async with model_service(tmp_path, sizes={"pinned": 50}) as service:
        for name in ("pinned", "left", "right"):
            folder(service.root, name)
        await service.loaded("pinned", pinned=True)
        results = await asyncio.gather(
            *(service.load(name, pinned=True) for name in ("left", "right")), return_exceptions=True
        )
        ended = [
            await service.reached(name, MODEL.STATE_READY, MODEL.STATE_FAILED)
            for name, result in zip(("left", "right"), results, strict=True)
            if not isinstance(result, BaseException)
        ]
        ready = [model for model in ended if model.state == MODEL.STATE_READY]
        assert len(ready) == 1
        assert service.loads.room.budget.held_bytes("cpu") == 90
        for model in ended:
            if model.state == MODEL.STATE_FAILED:
                assert "left" in model.error.message


async def test_a_model_larger_than_all_there_is_is_refused_and_never_asked_again(tmp_path: Path) -> None:
    async with model_service(tmp_path, sizes={"huge": 101}) as service:
        folder(service.root, "huge")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load("huge")
        assert error_info(refused.value) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
        assert (retry_after_s(refused.value) or 0) < BUSY_RETRY_S
        assert await service.states() == {}


async def test_streams_on_one_model_do_not_notice_that_two_others_load(tmp_path: Path) -> None:
    async with model_service(tmp_path, sizes=dict.fromkeys(("first", "second", "third"), 10)) as service:
        for name in ("first", "second", "third"):
            folder(service.root, name)
        await service.loaded("first")
        stopping = generation_pb2.StoppingOptions(max_new_tokens=20)
        request = inference_pb2.GenerateRequest(model="first", text="hello", stopping=stopping)
        is_loading = True

        async def stream() -> int:
            num_answers = 0
            while is_loading or not num_answers:
                events = [event async for event in service.inference.StreamGenerate(request)]
                assert events[-1].finished.usage.completion_tokens == 20
                num_answers += 1
            return num_answers

        streaming = [asyncio.create_task(stream()) for _ in range(16)]
        await asyncio.gather(service.loaded("second"), service.loaded("third"))
        is_loading = False
        assert min(await asyncio.gather(*streaming)) >= 1
        assert set((await service.states()).values()) == {"READY"}


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


@pytest.mark.parametrize(
    ("name", "source", "code", "reason"),
    [
        ("../x", "", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("", "", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("a\0b", "", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x" * 4096, "", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "../outside", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "a/../../outside", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "..%2foutside", "NOT_FOUND", "MODEL_NOT_FOUND"),
        ("x", "~/outside", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "a\0b", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "ｔｉｎｙ", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "file:///etc", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "http://169.254.169.254/", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "y" * 4096, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "/etc", "PERMISSION_DENIED", "PERMISSION_DENIED"),
        ("x", "OUTSIDE", "PERMISSION_DENIED", "PERMISSION_DENIED"),
        ("x", "link", "NOT_FOUND", "MODEL_NOT_FOUND"),
        ("x", "nothing", "NOT_FOUND", "MODEL_NOT_FOUND"),
        ("x", "pickled", "FAILED_PRECONDITION", "UNSAFE_WEIGHTS"),
        ("x", "empty", "FAILED_PRECONDITION", "CORRUPT_ARTIFACT"),
    ],
)
async def test_bad_names_and_places_are_refused_at_once(
    tmp_path: Path, name: str, source: str, code: str, reason: str
) -> None:
    async with model_service(tmp_path) as service:
        outside = folder(tmp_path, "outside")
        (service.root / "link").symlink_to(outside)
        (service.root / "empty").mkdir()
        pickled = folder(service.root, "pickled")
        (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load(name, source=str(outside) if source == "OUTSIDE" else source)
        assert error_info(refused.value) == (code, reason)
        assert str(tmp_path) not in refused.value.details()
        assert await service.states() == {}


async def test_a_configuration_that_wants_code_of_its_own_ends_in_failure(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        made = folder(service.root, "coded")
        edit_config(made, model_type="own", auto_map={"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Model"})
        (made / "code.py").write_text(f"open({str(tmp_path / 'opened')!r}, 'w')")
        await service.load("coded")
        failed = await service.reached("coded", MODEL.STATE_FAILED)
        assert failed.error.details[0].value.find(b"UNSAFE_WEIGHTS") > 0
        assert not (tmp_path / "opened").exists()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(service, "coded")
        assert error_info(refused.value) == ("FAILED_PRECONDITION", "UNSAFE_WEIGHTS")


@pytest.mark.parametrize(
    ("options", "code", "reason", "field"),
    [
        ({"context_tokens": 0}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.context_tokens"),
        ({"context_tokens": 2**62}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.context_tokens"),
        ({"context_tokens": 32_769}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.context_tokens"),
        ({"max_running_sequences": -1}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.max_running_sequences"),
        ({"memory_fraction": float("nan")}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.memory_fraction"),
        ({"memory_fraction": 1.5}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.memory_fraction"),
        ({"device": "mars"}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.device"),
        ({"device": "cuda:7"}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.device"),
        ({"attention_implementation": "a/b"}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.attention_implementation"),
        ({"data_type": 77}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.data_type"),
        ({"data_type": precision_pb2.DATA_TYPE_FLOAT64}, "INVALID_ARGUMENT", "UNSUPPORTED_FIELD", "options.data_type"),
        ({"quantization": GPTQ}, "INVALID_ARGUMENT", "UNSUPPORTED_FIELD", "options.quantization"),
        ({"double_quantization": True}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.double_quantization"),
        ({"tensor_parallel_count": 2}, "INVALID_ARGUMENT", "UNSUPPORTED_FIELD", "options.tensor_parallel_count"),
        ({"prefix_caching": True}, "INVALID_ARGUMENT", "UNSUPPORTED_FIELD", "options.prefix_caching"),
        ({"batch_invariant": True}, "INVALID_ARGUMENT", "UNSUPPORTED_FIELD", "options.batch_invariant"),
        ({"adapter_slot_count": 257}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.adapter_slot_count"),
        ({"max_adapter_rank": 0}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.max_adapter_rank"),
    ],
)  # fmt: skip
async def test_an_option_is_honoured_or_refused_by_its_name(
    tmp_path: Path, options: dict[str, object], code: str, reason: str, field: str
) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load("tiny", options=pb2.ModelLoadOptions(**options))
        assert error_info(refused.value) == (code, reason)
        assert field in refused.value.details()
        assert await service.states() == {}


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
