"""How a request points at a version, and which row that is. The rows are read in the session that is given."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.adapters.adapters import find_adapter
from slipstream_server.adapters.tables import AliasRow, VersionRow
from slipstream_server.errors import AdapterVersionNotFound, AliasMissing, AliasNotFound, InvalidField
from slipstream_server.resource_names import (
    LIVE,
    AdapterAliasName,
    AdapterName,
    AdapterVersionName,
    parse_adapter_reference,
)

_BARE_VERSION = re.compile(r"v[1-9][0-9]{0,8}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A version by its number or through an alias; the other is None. ``is_bare``: only the adapter was named."""

    adapter: str
    alias: str | None = None
    number: int | None = None
    is_bare: bool = False

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        """``text`` in full or in a short form. Raises InvalidField."""
        name = parse_adapter_reference(text, field)
        if isinstance(name, AdapterVersionName):
            return cls(adapter=name.adapter, number=number_of(name))
        is_bare = name.alias == LIVE and text in (name.adapter, str(AdapterName(name.adapter)))
        return cls(adapter=name.adapter, alias=name.alias, is_bare=is_bare)

    @classmethod
    def within(cls, adapter: str, text: str, field: str) -> Self:
        """As ``parse``, but of the given adapter, and "v3" will do. Raises InvalidField."""
        if _BARE_VERSION.fullmatch(text[:16]):
            return cls(adapter=adapter, number=int(text[1:]))
        reference = cls.parse(text, field)
        if reference.adapter != adapter:
            raise InvalidField.of(field, f"is of the adapter {reference.adapter!r}; one of {adapter!r} is needed")
        return reference


def number_of(name: AdapterVersionName) -> int:
    return int(name.version[1:])


def parse_adapter_id(text: str, field: str) -> str:
    """The id in "adapters/{adapter}" or a bare id. Raises InvalidField."""
    return AdapterName.parse(text if "/" in text else f"adapters/{text}", field).adapter


def parse_alias(text: str, field: str) -> AdapterAliasName:
    """An alias by its full name or as "support@live". Raises InvalidField for anything else, also a bare adapter."""
    name = parse_adapter_reference(text, field)
    if isinstance(name, AdapterVersionName) or Reference.parse(text, field).is_bare:
        raise InvalidField.of(
            field, f"{text[:80]!a} names no alias: adapters/{{adapter}}/aliases/{{alias}} or adapter@alias"
        )
    return name


def parse_version(text: str, field: str) -> AdapterVersionName:
    """A version by its full name or as "support@v3". Raises InvalidField for anything else."""
    name = parse_adapter_reference(text, field)
    if isinstance(name, AdapterAliasName):
        raise InvalidField.of(
            field, f"{text[:80]!a} names no version: adapters/{{adapter}}/versions/{{version}} or adapter@v3"
        )
    return name


async def find_version(session: AsyncSession, adapter: str, number: int) -> VersionRow:
    """Raises AdapterNotFound, AdapterVersionNotFound."""
    await find_adapter(session, adapter)
    row = await session.get(VersionRow, (adapter, number))
    if row is None:
        raise AdapterVersionNotFound(f"adapter {adapter!r} has no version v{number}")
    return row


async def find_alias(session: AsyncSession, adapter: str, alias: str) -> AliasRow:
    """Raises AdapterNotFound, AliasNotFound."""
    await find_adapter(session, adapter)
    row = await session.get(AliasRow, (adapter, alias))
    if row is None or row.number is None:
        raise AliasNotFound(f"adapter {adapter!r} has no alias {alias!r}")
    return row


async def resolve(session: AsyncSession, reference: Reference) -> VersionRow:
    """The version that ``reference`` means now.

    Raises AdapterNotFound, AdapterVersionNotFound, AliasNotFound, and AliasMissing for a bare name without ``live``.
    """
    number = reference.number
    if reference.alias is not None:
        try:
            number = (await find_alias(session, reference.adapter, reference.alias)).number
        except AliasNotFound:
            if not reference.is_bare:
                raise
            raise AliasMissing(
                f"{reference.adapter!r} means {reference.adapter}@{LIVE}, and there is no such alias; name a version or"
                " set the alias"
            ) from None
    assert number is not None
    return await find_version(session, reference.adapter, number)
