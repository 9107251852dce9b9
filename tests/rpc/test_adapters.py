"""AdapterService over gRPC: adapters, versions, aliases, gates and models' defaults."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from tests.rpc.adapters_kit import AdapterClient, adapter_service, failure, names, refused
from tests.unit.adapters.lora_files import BASE, lora_files, peft_config

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream_server.adapters.housekeeping import Housekeeping


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[AdapterClient]:
    async with adapter_service(tmp_path) as client:
        yield client


async def create(client: AdapterClient, adapter_id: str, **fields: object) -> pb2.Adapter:
    return await client.stub.CreateAdapter(pb2.CreateAdapterRequest(adapter_id=adapter_id, **fields))


# Adapters


async def test_an_adapter_is_made_read_changed_and_deleted(client: AdapterClient) -> None:
    made = await create(client, "support", adapter=pb2.Adapter(display_name="Support", labels={"team": "help"}))
    assert (made.name, made.display_name, made.version_count, made.latest_version) == (
        "adapters/support",
        "Support",
        0,
        "",
    )
    assert await client.stub.GetAdapter(pb2.GetAdapterRequest(name="support")) == made
    changed = await client.stub.UpdateAdapter(
        pb2.UpdateAdapterRequest(adapter=pb2.Adapter(name=made.name, description="answers", etag=made.etag))
    )
    assert (changed.display_name, changed.description, dict(changed.labels)) == ("Support", "answers", {"team": "help"})
    stale = pb2.UpdateAdapterRequest(adapter=pb2.Adapter(name=made.name, description="late", etag=made.etag))
    assert await refused(client.stub.UpdateAdapter(stale)) == ("ABORTED", "STALE_ETAG")
    base = pb2.UpdateAdapterRequest(adapter=made, update_mask={"paths": ["base_model"]})
    assert await refused(client.stub.UpdateAdapter(base)) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    await client.stub.DeleteAdapter(pb2.DeleteAdapterRequest(name="adapters/support"))
    assert await refused(client.stub.GetAdapter(pb2.GetAdapterRequest(name="support"))) == (
        "NOT_FOUND",
        "ADAPTER_NOT_FOUND",
    )


async def test_an_id_is_given_once_and_a_repeated_request_makes_nothing(client: AdapterClient) -> None:
    first = await create(client, "support", request_id="r1")
    assert await create(client, "support", request_id="r1") == first
    assert await refused(create(client, "other", request_id="r1")) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert await refused(create(client, "support")) == ("ALREADY_EXISTS", "ALREADY_EXISTS")
    assert await refused(create(client, "support", validate_only=True)) == ("ALREADY_EXISTS", "ALREADY_EXISTS")
    await create(client, "other", validate_only=True)
    assert await refused(client.stub.GetAdapter(pb2.GetAdapterRequest(name="other"))) == (
        "NOT_FOUND",
        "ADAPTER_NOT_FOUND",
    )


async def test_adapters_are_listed_in_pages_and_by_base(client: AdapterClient) -> None:
    for adapter_id in ("b", "a", "c", "d", "e"):
        base = "models/small" if adapter_id in "ae" else ""
        await create(client, adapter_id, adapter=pb2.Adapter(base_model=base))
    found: list[str] = []
    token = ""
    while True:
        page = await client.stub.ListAdapters(pb2.ListAdaptersRequest(page_size=2, page_token=token))
        assert len(page.adapters) <= 2
        found += names(page.adapters)
        if not (token := page.next_page_token):
            break
    assert found == [f"adapters/{adapter_id}" for adapter_id in "abcde"]
    of_base = await client.stub.ListAdapters(pb2.ListAdaptersRequest(base_model="models/small"))
    assert names(of_base.adapters) == ["adapters/a", "adapters/e"]
    bad = pb2.ListAdaptersRequest(page_token="x")
    assert await refused(client.stub.ListAdapters(bad)) == ("INVALID_ARGUMENT", "INVALID_FIELD")


@pytest.mark.parametrize("bad", ["../x", "/etc/passwd", "a\0b", "..%2f", "a" * 4096, "аdmin", "", "A", "a/b"])
async def test_bad_names_are_refused_at_every_door(client: AdapterClient, bad: str) -> None:
    invalid = ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert await refused(create(client, bad)) == invalid
    assert await refused(client.stub.GetAdapter(pb2.GetAdapterRequest(name=bad))) == invalid
    assert await refused(client.stub.GetAdapterVersion(pb2.GetAdapterVersionRequest(name=bad))) == invalid
    assert await refused(client.upload(bad)) == invalid
    assert await refused(client.set_alias(f"support@{bad}", "v1")) == invalid
    assert await refused(client.download(name=bad)) == invalid


# Versions


async def test_versions_count_up_and_say_what_they_are(client: AdapterClient) -> None:
    first = await client.upload("support", metrics={"eval_loss": 0.5}, base_model_revision="abc")
    second = await client.upload("support", lora_files(seed=1))
    assert (first.name, second.name) == ("adapters/support/versions/v1", "adapters/support/versions/v2")
    assert first.state == pb2.AdapterVersion.STATE_REGISTERED
    assert (first.lora.rank, first.lora.alpha, list(first.lora.target_modules)) == (4, 8.0, ["down_proj", "q_proj"])
    assert (first.base_model, first.base_model_revision, first.task_type) == (BASE, "abc", "CAUSAL_LM")
    # Two layers, each 4 x (16 + 16) and 4 x (24 + 16).
    assert "576 parameters in float32" in first.state_message
    assert dict(first.metrics) == {"eval_loss": 0.5}
    assert first.provenance.uploaded_by == "anonymous"
    assert first.digest.startswith("sha256:")
    assert first.digest != second.digest
    adapter = await client.stub.GetAdapter(pb2.GetAdapterRequest(name="support"))
    assert (adapter.base_model, adapter.version_count, adapter.latest_version) == (BASE, 2, second.name)
    listed = await client.stub.ListAdapterVersions(pb2.ListAdapterVersionsRequest(parent="support"))
    assert list(listed.adapter_versions) == [second, first]


async def test_the_same_bytes_again_are_the_version_there_is(client: AdapterClient) -> None:
    first = await client.upload("support")
    assert await client.upload("support", chunk_bytes=77) == first
    elsewhere = await client.upload("other")
    assert elsewhere.name == "adapters/other/versions/v1"
    assert elsewhere.digest == first.digest


async def test_the_digest_does_not_depend_on_how_the_configuration_is_spelled(client: AdapterClient) -> None:
    sorted_targets = peft_config(target_modules=["down_proj", "q_proj"], peft_version="0.15.0", inference_mode=False)
    first = await client.upload("support")
    assert (await client.upload("support", lora_files(config=sorted_targets))).name == first.name


async def test_provenance_of_a_training_job_is_kept(client: AdapterClient) -> None:
    provenance = pb2.Provenance(
        training_job="trainingJobs/j1",
        dataset="datasets/d1",
        dataset_digest="sha256:00",
        step=120,
        package_versions={"peft": "0.21.2"},
    )
    version = await client.upload("support", provenance=provenance, base_model="models/tiny")
    assert version.provenance == provenance
    assert version.base_model == "models/tiny"
    bad = pb2.Provenance(training_job="../j1")
    assert await refused(client.upload("support", provenance=bad)) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    not_finite = client.upload("support", metrics={"eval_loss": float("nan")})
    assert await refused(not_finite) == ("INVALID_ARGUMENT", "INVALID_FIELD")


async def test_references_in_every_form_find_the_version(client: AdapterClient) -> None:
    version = await client.upload("support")
    assert await refused(client.download(name="support")) == ("FAILED_PRECONDITION", "ALIAS_MISSING")
    assert await refused(client.download(name="support@live")) == ("NOT_FOUND", "ALIAS_NOT_FOUND")
    assert await refused(client.download(name="support@v2")) == ("NOT_FOUND", "ADAPTER_VERSION_NOT_FOUND")
    assert await refused(client.download(name="absent@v1")) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    await client.set_alias("support@live", "v1")
    for name in (
        "support",
        "support@live",
        "support@v1",
        version.name,
        "adapters/support",
        "adapters/support/aliases/live",
    ):
        found = await client.stub.GetAdapterVersion(pb2.GetAdapterVersionRequest(name=name))
        assert (found.name, found.aliases) == (version.name, ["live"])


async def test_a_version_in_use_cannot_be_retired_and_a_retired_one_is_collected(client: AdapterClient) -> None:
    kept = await client.upload("support")
    gone = await client.upload("support", lora_files(seed=1))
    await client.set_alias("support@live", "v2")
    retire = pb2.DeleteAdapterVersionRequest(name=gone.name)
    assert await refused(client.stub.DeleteAdapterVersion(retire)) == ("FAILED_PRECONDITION", "WRONG_STATE")
    await client.set_alias("support@live", "v1")
    await client.stub.SetActiveAdapter(pb2.SetActiveAdapterRequest(model="tiny", adapter="support@v2"))
    assert await refused(client.stub.DeleteAdapterVersion(retire)) == ("FAILED_PRECONDITION", "WRONG_STATE")
    await client.stub.SetActiveAdapter(pb2.SetActiveAdapterRequest(model="tiny", adapter="support"))
    by_alias = pb2.DeleteAdapterVersionRequest(name="support@live")
    assert await refused(client.stub.DeleteAdapterVersion(by_alias)) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    await client.stub.DeleteAdapterVersion(retire)
    found = await client.stub.GetAdapterVersion(pb2.GetAdapterVersionRequest(name=gone.name))
    assert found.state == pb2.AdapterVersion.STATE_RETIRED
    assert found.provenance == gone.provenance
    assert await refused(client.download(name=gone.name)) == ("FAILED_PRECONDITION", "WRONG_STATE")
    assert await refused(client.set_alias("support@next", "v2")) == ("FAILED_PRECONDITION", "WRONG_STATE")
    listed = await client.stub.ListAdapterVersions(pb2.ListAdapterVersionsRequest(parent="support"))
    assert names(listed.adapter_versions) == [kept.name]
    await Housekeeping(client.database, client.store).round(grace=timedelta(0))
    assert await client.store.digests() == (kept.digest.removeprefix("sha256:"),)
    assert (await client.download(name="support"))[0].digest == kept.digest


async def test_deleting_an_adapter_with_versions_takes_force_and_numbers_go_on(client: AdapterClient) -> None:
    await client.upload("support")
    generation = (await client.set_alias("support@live", "v1")).alias.generation
    await client.stub.SetActiveAdapter(pb2.SetActiveAdapterRequest(model="tiny", adapter="support@live"))
    plain = pb2.DeleteAdapterRequest(name="support")
    assert await refused(client.stub.DeleteAdapter(plain)) == ("FAILED_PRECONDITION", "WRONG_STATE")
    await client.stub.DeleteAdapter(pb2.DeleteAdapterRequest(name="support", force=True))
    assert await refused(client.download(name="support")) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    enable = client.stub.EnableAdapters(pb2.EnableAdaptersRequest(model="tiny"))
    assert await refused(enable) == ("FAILED_PRECONDITION", "WRONG_STATE")
    again = await client.upload("support")
    assert again.name == "adapters/support/versions/v2"
    assert await refused(client.download(name="support@v1")) == ("NOT_FOUND", "ADAPTER_VERSION_NOT_FOUND")
    alias = (await client.set_alias("support@live", "v2", expected_generation=0)).alias
    assert alias.generation > generation + 1
    assert not alias.history


# Aliases


async def test_an_alias_moves_by_compare_and_set_and_back(client: AdapterClient) -> None:
    for seed in range(3):
        await client.upload("support", lora_files(seed))
    made = (await client.set_alias("support@live", "v1", expected_generation=0, comment="first")).alias
    assert (made.name, made.version, made.generation) == (
        "adapters/support/aliases/live",
        "adapters/support/versions/v1",
        1,
    )
    code, reason, _, metadata = await failure(client.set_alias("support@live", "v2", expected_generation=0))
    assert (code.name, reason, metadata["generation"]) == ("ABORTED", "STALE_GENERATION", "1")
    await client.set_alias("support@live", "support@v2", expected_generation=1)
    moved = (await client.set_alias("support@live", "adapters/support/versions/v3")).alias
    assert [(change.version[-2:], change.generation, change.comment) for change in moved.history] == [
        ("v2", 2, ""),
        ("v1", 1, "first"),
    ]
    back = await client.stub.RollBackAdapterAlias(pb2.RollBackAdapterAliasRequest(name="support@live"))
    assert (back.alias.version, back.alias.generation) == ("adapters/support/versions/v2", 4)
    to_first = pb2.RollBackAdapterAliasRequest(name="support@live", target_generation=1)
    assert (await client.stub.RollBackAdapterAlias(to_first)).alias.version == "adapters/support/versions/v1"
    unknown = pb2.RollBackAdapterAliasRequest(name="support@live", target_generation=99)
    assert await refused(client.stub.RollBackAdapterAlias(unknown)) == ("FAILED_PRECONDITION", "WRONG_STATE")


async def test_rolling_back_skips_positions_on_the_same_version(client: AdapterClient) -> None:
    await client.upload("support")
    await client.upload("support", lora_files(seed=1))
    await client.set_alias("support@live", "v1")
    alone = client.stub.RollBackAdapterAlias(pb2.RollBackAdapterAliasRequest(name="support@live"))
    assert await refused(alone) == ("FAILED_PRECONDITION", "WRONG_STATE")
    await client.set_alias("support@live", "v2")
    await client.set_alias("support@live", "v2")
    back = await client.stub.RollBackAdapterAlias(pb2.RollBackAdapterAliasRequest(name="support@live"))
    assert back.alias.version == "adapters/support/versions/v1"
    await client.stub.DeleteAdapterVersion(pb2.DeleteAdapterVersionRequest(name="support@v2"))
    retired = client.stub.RollBackAdapterAlias(pb2.RollBackAdapterAliasRequest(name="support@live"))
    assert await refused(retired) == ("FAILED_PRECONDITION", "WRONG_STATE")


async def test_a_repeated_move_answers_as_the_first_did(client: AdapterClient) -> None:
    await client.upload("support")
    await client.upload("support", lora_files(seed=1))
    first = await client.set_alias("support@live", "v1", request_id="r1")
    await client.set_alias("support@live", "v2")
    assert await client.set_alias("support@live", "v1", request_id="r1") == first
    now = await client.stub.GetAdapterAlias(pb2.GetAdapterAliasRequest(name="support@live"))
    assert now.version == "adapters/support/versions/v2"
    assert await refused(client.set_alias("support@live", "v2", request_id="r1")) == (
        "ALREADY_EXISTS",
        "REQUEST_ID_REUSED",
    )


async def test_aliases_are_listed_and_deleted(client: AdapterClient) -> None:
    await client.upload("support")
    for alias in ("live", "candidate", "next"):
        await client.set_alias(f"support@{alias}", "v1")
    listed = await client.stub.ListAdapterAliases(pb2.ListAdapterAliasesRequest(parent="support"))
    assert [name.rpartition("/")[2] for name in names(listed.adapter_aliases)] == ["candidate", "live", "next"]
    stale = pb2.DeleteAdapterAliasRequest(name="support@next", expected_generation=7)
    assert await refused(client.stub.DeleteAdapterAlias(stale)) == ("ABORTED", "STALE_GENERATION")
    await client.stub.DeleteAdapterAlias(pb2.DeleteAdapterAliasRequest(name="support@next", expected_generation=1))
    get = client.stub.GetAdapterAlias(pb2.GetAdapterAliasRequest(name="support@next"))
    assert await refused(get) == ("NOT_FOUND", "ALIAS_NOT_FOUND")
    assert await refused(client.set_alias("support@next", "v1", expected_generation=1)) == (
        "ABORTED",
        "STALE_GENERATION",
    )
    assert (await client.set_alias("support@next", "v1", expected_generation=0)).alias.generation == 3
    assert await refused(client.set_alias("support@v7", "v1")) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert await refused(client.set_alias("support@live", "other@v1")) == ("INVALID_ARGUMENT", "INVALID_FIELD")


async def test_the_history_keeps_the_last_twenty_positions(client: AdapterClient) -> None:
    await client.upload("support")
    await client.upload("support", lora_files(seed=1))
    for turn in range(25):
        alias = (await client.set_alias("support@live", f"v{1 + turn % 2}")).alias
    assert [change.generation for change in alias.history] == list(range(24, 4, -1))


async def test_a_gate_lets_only_better_versions_pass(client: AdapterClient) -> None:
    for seed, loss in enumerate((0.5, 0.6, 0.4, None)):
        await client.upload("support", lora_files(seed), metrics={} if loss is None else {"eval_loss": loss})
    condition = pb2.MetricCondition(metric="eval_loss", lower_is_better=True, max_regression=0.05, threshold=0.55)
    gate = pb2.AliasGate(conditions=[condition])
    made = await client.set_alias("support@live", "v1", gate=gate)
    assert made.alias.gate == gate
    code, reason, _, metadata = await failure(client.set_alias("support@live", "v2"))
    assert (code.name, reason) == ("FAILED_PRECONDITION", "GATE_CLOSED")
    assert (metadata["condition"], metadata["value"], metadata["threshold"]) == ("threshold", "0.6", "0.55")
    assert (await client.set_alias("support@live", "v3")).alias.gate == gate
    code, reason, _, metadata = await failure(client.set_alias("support@live", "v1"))
    assert (metadata["condition"], metadata["value"], metadata["current"]) == ("max_regression", "0.5", "0.4")
    assert await refused(client.set_alias("support@live", "v4")) == ("FAILED_PRECONDITION", "GATE_CLOSED")
    await client.set_alias("support@live", "v2", override_gate=True)
    moved = (await client.set_alias("support@live", "v3")).alias
    assert [change.gate_overridden for change in moved.history] == [True, False, False]
    back = await client.stub.RollBackAdapterAlias(pb2.RollBackAdapterAliasRequest(name="support@live"))
    assert back.alias.version.endswith("/v2")
    verified = pb2.AliasGate(verified_only=True)
    assert await refused(client.set_alias("support@live", "v3", gate=verified)) == (
        "FAILED_PRECONDITION",
        "GATE_CLOSED",
    )
    checked = client.set_alias("support@live", "v4", validate_only=True)
    assert await refused(checked) == ("FAILED_PRECONDITION", "GATE_CLOSED")
    opened = await client.set_alias("support@live", "v4", gate=pb2.AliasGate())
    assert not opened.alias.HasField("gate")


async def test_checking_a_move_changes_nothing(client: AdapterClient) -> None:
    await client.upload("support")
    assert not (await client.set_alias("support@live", "v1", validate_only=True)).HasField("alias")
    await client.set_alias("support@live", "v1")
    checked = await client.set_alias("support@live", "v1", expected_generation=1, validate_only=True)
    assert checked.alias.generation == 1
    await client.stub.DeleteAdapterAlias(pb2.DeleteAdapterAliasRequest(name="support@live"))
    assert not (await client.set_alias("support@live", "v1", validate_only=True)).HasField("alias")


# A model's default


async def test_an_adapter_of_another_model_is_no_models_default(client: AdapterClient) -> None:
    await client.upload("support", base_model="models/other")
    request = pb2.SetActiveAdapterRequest(model="tiny", adapter="support@v1")
    assert await refused(client.stub.SetActiveAdapter(request)) == ("FAILED_PRECONDITION", "INCOMPATIBLE_ADAPTER")
    request.model = "models/other"
    assert (await client.stub.SetActiveAdapter(request)).active_adapter.enabled


async def test_a_models_default_is_set_disabled_and_enabled(client: AdapterClient) -> None:
    await client.upload("support")
    await client.set_alias("support@live", "v1")
    enable = pb2.EnableAdaptersRequest(model="models/tiny")
    assert await refused(client.stub.EnableAdapters(enable)) == ("FAILED_PRECONDITION", "WRONG_STATE")
    missing = pb2.SetActiveAdapterRequest(model="tiny", adapter="absent")
    assert await refused(client.stub.SetActiveAdapter(missing)) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    request = pb2.SetActiveAdapterRequest(model="tiny", adapter="support@live", expected_generation=0)
    active = (await client.stub.SetActiveAdapter(request)).active_adapter
    assert (active.model, active.adapter, active.enabled, active.generation) == ("models/tiny", "support@live", True, 1)
    assert await refused(client.stub.SetActiveAdapter(request)) == ("ABORTED", "STALE_GENERATION")
    disabled = (await client.stub.DisableAdapters(pb2.DisableAdaptersRequest(model="tiny"))).active_adapter
    assert (disabled.adapter, disabled.enabled, disabled.generation) == ("support@live", False, 2)
    assert (await client.stub.DisableAdapters(pb2.DisableAdaptersRequest(model="tiny"))).active_adapter == disabled
    enabled = (await client.stub.EnableAdapters(enable)).active_adapter
    assert (enabled.adapter, enabled.enabled, enabled.generation) == ("support@live", True, 3)
    assert (await client.stub.EnableAdapters(enable)).active_adapter == enabled
    none = (await client.stub.SetActiveAdapter(pb2.SetActiveAdapterRequest(model="tiny"))).active_adapter
    assert (none.adapter, none.enabled, none.generation) == ("", False, 4)


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    async with adapter_service(tmp_path) as client:
        version = await client.upload("support")
        await client.set_alias("support@live", "v1")
    async with adapter_service(tmp_path) as client:
        found, files = await client.download(name="support")
        assert (found.digest, found.aliases) == (version.digest, ["live"])
        assert files["adapter_model.safetensors"] == lora_files()["adapter_model.safetensors"]


async def test_methods_that_are_not_built_say_so(client: AdapterClient) -> None:
    assert (await refused(client.stub.MergeAdapters(pb2.MergeAdaptersRequest())))[
        0
    ] == grpc.StatusCode.UNIMPLEMENTED.name
