"""The front's copy of the registry: what names mean, what is told of names that mean nothing, and gaps."""

from __future__ import annotations

import pytest

from slipstream_server.errors import (
    AdapterNotFound,
    AdapterVersionNotFound,
    AliasMissing,
    AliasNotFound,
    DependencyUnavailable,
    InvalidField,
)
from slipstream_server.inference.registry_copy import (
    AdapterGone,
    AdapterKnown,
    AliasGone,
    AliasMoved,
    DefaultAdapter,
    RegistryCopy,
    RegistryGap,
    ServableVersion,
    VersionGone,
)
from slipstream_server.resource_names import AdapterAliasName, AdapterName, AdapterVersionName

LIVE = AdapterAliasName("support", "live")
V1, V2 = AdapterVersionName("support", "v1"), AdapterVersionName("support", "v2")


def servable(name: AdapterVersionName) -> ServableVersion:
    return ServableVersion(name=name, digest=name.version[1:] * 64, files=())


@pytest.fixture
def copy() -> RegistryCopy:
    filled = RegistryCopy()
    filled.replace(7, [servable(V1), servable(V2), AliasMoved(LIVE, V1)])
    return filled


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("support", V1),
        ("support@live", V1),
        ("support@v2", V2),
        ("adapters/support", V1),
        ("adapters/support/versions/v2", V2),
        ("adapters/support/aliases/live", V1),
    ],
)
def test_every_spelling_finds_its_version(copy: RegistryCopy, reference: str, expected: AdapterVersionName) -> None:
    assert copy.find(reference).name == expected


@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ("sales", AdapterNotFound),
        ("sales@v1", AdapterNotFound),
        ("support@v3", AdapterVersionNotFound),
        ("support@candidate", AliasNotFound),
        ("../support", InvalidField),
        ("support@", InvalidField),
        ("Support", InvalidField),
        ("support@v0", InvalidField),
    ],
)
def test_names_that_mean_nothing(copy: RegistryCopy, reference: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        copy.find(reference)


def test_a_bare_name_without_live_is_told_apart_from_a_missing_alias(copy: RegistryCopy) -> None:
    copy.apply([(8, AliasGone(LIVE))])
    for bare in ("support", "adapters/support"):
        with pytest.raises(AliasMissing):
            copy.find(bare)
    for named in ("support@live", "adapters/support/aliases/live"):
        with pytest.raises(AliasNotFound):
            copy.find(named)


def test_nothing_is_known_before_the_first_snapshot() -> None:
    empty = RegistryCopy()
    with pytest.raises(DependencyUnavailable, match="registry"):
        empty.find("support")
    assert empty.default_of("tiny") == ""
    with pytest.raises(RegistryGap):
        empty.apply([(1, servable(V1))])


def test_events_are_taken_once_and_in_order(copy: RegistryCopy) -> None:
    copy.apply([(6, AliasMoved(LIVE, V2)), (7, AliasMoved(LIVE, V2))])
    assert copy.find("support").name == V1, "what the snapshot held already is not taken again"
    with pytest.raises(RegistryGap):
        copy.apply([(8, AliasMoved(LIVE, V2)), (10, AliasMoved(LIVE, V1))])
    assert (copy.find("support").name, copy.sequence) == (V2, 8)


def test_deletions(copy: RegistryCopy) -> None:
    copy.apply([(8, VersionGone(V2)), (9, AdapterKnown(AdapterName("empty")))])
    with pytest.raises(AdapterVersionNotFound):
        copy.find("support@v2")
    with pytest.raises(AdapterVersionNotFound):
        copy.find("empty@v1")
    copy.apply([(10, AdapterGone(AdapterName("support")))])
    for reference in ("support", "support@live", "support@v1"):
        with pytest.raises(AdapterNotFound):
            copy.find(reference)


def test_a_models_default_counts_while_it_is_enabled(copy: RegistryCopy) -> None:
    copy.apply([(8, DefaultAdapter(model="tiny", adapter="support@live", enabled=True))])
    assert (copy.default_of("tiny"), copy.default_of("other")) == ("support@live", "")
    copy.apply([(9, DefaultAdapter(model="tiny", adapter="support@live", enabled=False))])
    assert copy.default_of("tiny") == ""


def test_a_snapshot_replaces_everything(copy: RegistryCopy) -> None:
    copy.replace(3, [servable(V2)])
    assert copy.sequence == 3
    with pytest.raises(AdapterVersionNotFound):
        copy.find("support@v1")
    with pytest.raises(AliasMissing):
        copy.find("support")
