"""Finds the handler of a method, and decides whether the call may begin at all.

In this order, before a byte of a message is read: the token (nothing is told to strangers, not even which methods
exist), the method, the drain. Health and reflection go on answering while the server drains. gRPC asks
``Router.service`` on the event loop, in the task that then runs the handler, so context variables set here reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from slipstream_server import errors
from slipstream_server.rpc.calls import MethodGuard
from slipstream_server.rpc.request_context import set_caller
from slipstream_server.rpc.tokens import TokenFile

UNKNOWN_METHOD = "_OTHER"
INFRASTRUCTURE = ("/grpc.health.", "/grpc.reflection.")


@dataclass(frozen=True, slots=True)
class Mounted:
    """What one ``add_XServicer_to_server`` registered."""

    service: str
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]


class _Registrar:
    """Stands in for the server in the generated ``add_XServicer_to_server`` and keeps what it is given."""

    def __init__(self) -> None:
        self.mounted: list[Mounted] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Not used: the same methods come once more, by name, to the next method."""

    def add_registered_method_handlers(
        self, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        self.mounted.append(Mounted(service, dict(handlers)))


def mounted_by(add: Callable[[Any, Any], None], servicer: object) -> Mounted:
    """What ``add`` (a generated ``add_XServicer_to_server``) registers for ``servicer``."""
    registrar = _Registrar()
    add(servicer, registrar)
    (mounted,) = registrar.mounted
    return mounted


def is_infrastructure(method: str) -> bool:
    """Health and reflection: they answer during a drain, and a drain does not wait for them."""
    return method.startswith(INFRASTRUCTURE)


class Router(grpc.GenericRpcHandler):
    """All methods of the server, each behind its guard."""

    def __init__(self, mounted: Sequence[Mounted], *, guard: MethodGuard, tokens: TokenFile | None) -> None:
        self._guard = guard
        self._tokens = tokens
        self._is_draining = False
        self._handlers = {
            method: guard.wrap(method, handler)
            for mount in mounted
            for method, handler in ((f"/{mount.service}/{name}", h) for name, h in mount.handlers.items())
        }

    def refuse_new_calls(self) -> None:
        """From now on new calls are answered UNAVAILABLE, reason DRAINING; health and reflection aside."""
        self._is_draining = True

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        method = handler_call_details.method
        known = self._handlers.get(method)
        label = method if known else UNKNOWN_METHOD
        if self._tokens is not None:
            try:
                set_caller(self._tokens.caller_of(handler_call_details.invocation_metadata or ()))
            except errors.Unauthenticated as refused:
                text = refused.message
                return self._guard.refusal(label, lambda: errors.Unauthenticated(text))
        if known is None:
            text = f"this server has no method {method[:200]}"
            return self._guard.refusal(label, lambda: errors.Unimplemented(text))
        if self._is_draining and not is_infrastructure(method):
            return self._guard.refusal(label, draining)
        return known


def draining() -> errors.Draining:
    """What a call is told that comes, or is still running, when the server shuts down."""
    return errors.Draining("the server is shutting down; try another replica, or again in a moment")
