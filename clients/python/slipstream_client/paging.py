"""Lists that come in pages, as one list."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, Unpack

import grpc

from slipstream_client.connection import Connection
from slipstream_client.options import CallOptions

Item = TypeVar("Item")
PAGE_SIZE = 200


async def all_pages(
    connection: Connection,
    service: str,
    method: grpc.aio.UnaryUnaryMultiCallable[Any, Any],
    request: Any,
    read: Callable[[Any], Iterable[Item]],
    *,
    limit: int | None = None,
    **call: Unpack[CallOptions],
) -> list[Item]:
    """What ``read`` takes out of every page of ``method``; at most ``limit`` of them. ``request`` is used up."""
    found: list[Item] = []
    request.page_size = min(PAGE_SIZE, limit or PAGE_SIZE)
    while True:
        page = await connection.unary(service, method, request, **call)
        found += read(page)
        if not page.next_page_token or (limit is not None and len(found) >= limit):
            return found[:limit]
        request.page_token = page.next_page_token
