"""What surrounds every method of every service: one guard per method, made once at start.

Around the servicer's own code the guard
    reads       bytes that do not parse, or are too many, become typed errors instead of gRPC's bare ones;
    remembers   request id, deadline and the running call, so that a drain can wait for it or end it;
    hears out   what a streaming client has already sent before it is refused;
    translates  whatever is raised, by ``rpc/status.py``; cancellation is re-raised;
    measures    duration and the true status code, calls that were cancelled or ran out of time included.

Servicer methods are coroutines or async generators. What the generated base class leaves unimplemented is a plain
function, and is answered by METHOD_NOT_IMPLEMENTED. The response's first message is preceded by ``x-request-id``; a
call that fails before one ends in trailers only, so that gRPC's own retries still apply, and carries the id there.
Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from slipstream_server import errors
from slipstream_server.logs import request_id
from slipstream_server.rpc.request_context import deadline_monotonic_s, set_deadline
from slipstream_server.rpc.status import DETAILS_KEY, as_slipstream_error, code_of, status_of
from slipstream_server.rpc.telemetry import RpcMetrics

REQUEST_ID_KEY = "x-request-id"
_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# How long a call that fails goes on reading what its client streams.
_HEAR_OUT_S = 1.0
_CODES_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}

# By whether the requests stream, and whether the responses do.
_MAKERS: Mapping[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True, eq=False)
class RunningCall:
    """One call in progress. ``cut_by`` is the error it ends with when the server ends it."""

    method: str
    task: asyncio.Task[Any]
    started_s: float
    deadline_s: float | None
    cut_by: errors.SlipstreamError | None = None
    answered: bool = False


class RunningCalls:
    """All calls in progress on this server."""

    def __init__(self) -> None:
        self._calls: set[RunningCall] = set()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: RunningCall) -> None:
        self._calls.add(call)

    def remove(self, call: RunningCall) -> None:
        self._calls.discard(call)
        self._changed.set()

    def cut(self, error: errors.SlipstreamError, *, which: Callable[[str], bool]) -> int:
        """End the calls whose method ``which`` accepts with ``error``; returns how many there were."""
        chosen = [call for call in self._calls if which(call.method) and call.cut_by is None]
        for call in chosen:
            call.cut_by = error
            call.task.cancel()
        return len(chosen)

    async def wait_until_none(self, *, which: Callable[[str], bool]) -> None:
        """Return when no call of such a method runs; cancel it to stop waiting."""
        while any(which(call.method) for call in self._calls):
            self._changed.clear()
            await self._changed.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """Bounds of every call. ``max_message_bytes`` counts one decompressed request message."""

    max_message_bytes: int = 16 * 1024 * 1024
    write_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Takes the place of a request message that could not be accepted."""

    error: errors.SlipstreamError


class MethodGuard:
    """Wraps the handlers of methods; one instance per server."""

    def __init__(self, *, calls: RunningCalls, metrics: RpcMetrics, limits: CallLimits) -> None:
        self._calls = calls
        self._metrics = metrics
        self._limits = limits

    def wrap(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler to serve ``method`` (``/package.Service/Method``) with."""
        behaviour = _behaviour_of(handler)
        if not _is_async(behaviour):
            _require_generated(method, behaviour)
            name = method.rpartition("/")[2]
            text = f"{name} is part of the contract, but not built yet"
            return self.refusal(method, lambda: errors.Unimplemented(text))
        requests_stream, responses_stream = bool(handler.request_streaming), bool(handler.response_streaming)
        around = self._streaming if responses_stream else self._single
        respond = around(method, behaviour, requests_stream=requests_stream)
        make = _MAKERS[requests_stream, responses_stream]
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(respond, self._reader_of(handler), handler.response_serializer)
        return wrapped

    def refusal(self, method: str, make_error: Callable[[], errors.SlipstreamError]) -> grpc.RpcMethodHandler[Any, Any]:
        """A handler that answers an error to a call of any kind, without reading its messages."""

        async def fail(_call: RunningCall) -> NoReturn:
            # A new one each time: an instance that is raised again and again collects tracebacks.
            raise make_error()

        async def refuse(_requests: object, context: Context) -> None:
            await self._run(method, context, fail)

        refused: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)
        return refused

    def _reader_of(self, handler: grpc.RpcMethodHandler[Any, Any]) -> Callable[[bytes], Any]:
        parse: Callable[[bytes], Any] = handler.request_deserializer or bytes
        limit = self._limits.max_message_bytes

        def read(data: bytes) -> Any:
            if len(data) > limit:
                sizes = {"message_bytes": str(len(data)), "max_message_bytes": str(limit)}
                text = f"the message has {len(data)} bytes; at most {limit} are allowed"
                return Unreadable(errors.MessageTooLarge(text, metadata=sizes))
            try:
                return parse(data)
            except Exception:  # whatever the parser raises, these bytes are no message of the method's type
                return Unreadable(_malformed())

        return read

    def _single(
        self, method: str, behaviour: Callable[..., Awaitable[Any]], *, requests_stream: bool
    ) -> Callable[..., Any]:
        async def respond(request: Any, context: Context) -> Any:
            async def body(call: RunningCall) -> Any:
                async with _hearing_out(request, requests_stream):
                    response = await behaviour(_checked(request, requests_stream), context)
                await _begin_answer(call, context)
                return response

            return await self._run(method, context, body)

        return respond

    def _streaming(self, method: str, behaviour: Callable[..., Any], *, requests_stream: bool) -> Callable[..., Any]:
        write_timeout_s = self._limits.write_timeout_s
        yields = inspect.isasyncgenfunction(behaviour)

        async def respond(request: Any, context: Context) -> None:
            async def body(call: RunningCall) -> None:
                responses = behaviour(_checked(request, requests_stream), context)
                async with _hearing_out(request, requests_stream):
                    if yields:
                        await _write_all(call, responses, context, write_timeout_s)
                    else:  # a coroutine that writes to the context itself
                        await responses

            await self._run(method, context, body)

        return respond

    async def _run(self, method: str, context: Context, body: Callable[[RunningCall], Awaitable[Any]]) -> Any:
        """Run ``body`` as one call; it ends in a response, a status, or cancellation, which is raised again."""
        call = _begin(method, context)
        self._calls.add(call)
        self._metrics.started(method)
        code = grpc.StatusCode.UNKNOWN
        try:
            response, error = await _attempt(call, body)
            if error is not None:
                await _fail(call, context, error, self._limits.write_timeout_s)
            code = _code_set_by(context)
            return response
        except grpc.aio.AbortError:  # by _fail, or a library's servicer answered by itself
            code = _code_set_by(context)
            raise
        except asyncio.CancelledError:
            code = _code_when_cancelled(call)
            raise
        finally:
            self._calls.remove(call)
            self._metrics.finished(method, code, time.monotonic() - call.started_s)


def _malformed() -> errors.MalformedRequest:
    """An empty field path stands for the message as a whole."""
    text = "the request's bytes are no message of the expected type"
    return errors.MalformedRequest(text, violations=[errors.FieldViolation("", text)])


def _begin(method: str, context: Context) -> RunningCall:
    task = asyncio.current_task()
    assert task is not None
    given = next((value for key, value in context.invocation_metadata() or () if key == REQUEST_ID_KEY), "")
    request_id.set(given if isinstance(given, str) and _VALID_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
    deadline = deadline_monotonic_s(context)
    set_deadline(deadline)
    return RunningCall(method, task, time.monotonic(), deadline)


async def _attempt(
    call: RunningCall, body: Callable[[RunningCall], Awaitable[Any]]
) -> tuple[Any, errors.SlipstreamError | None]:
    try:
        return await body(call), None
    except asyncio.CancelledError:
        if call.cut_by is None:
            raise
        call.task.uncancel()
        return None, call.cut_by
    except (grpc.aio.AbortError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as exception:  # extension modules panic with BaseException
        if isinstance(exception, TimeoutError) and _is_over(call):
            return None, errors.DeadlineExceeded("the deadline passed before the answer was ready")
        return None, as_slipstream_error(exception)


async def _write_all(
    call: RunningCall, responses: AsyncGenerator[Any, None], context: Context, write_timeout_s: float
) -> None:
    """Write what the servicer yields; its generator is closed whatever happens, so that it frees what it holds."""
    async with aclosing(responses):
        async for response in responses:
            await _begin_answer(call, context)
            try:
                async with asyncio.timeout(write_timeout_s):
                    await context.write(response)
            except TimeoutError:
                raise errors.SlowReader(
                    f"the stream was not read for {write_timeout_s:g} s, and has been ended"
                ) from None


async def _begin_answer(call: RunningCall, context: Context) -> None:
    if not call.answered:
        call.answered = True
        await context.send_initial_metadata(((REQUEST_ID_KEY, request_id.get()),))


async def _fail(call: RunningCall, context: Context, error: errors.SlipstreamError, write_timeout_s: float) -> NoReturn:
    """Send the status. gRPC keeps it for a reader who does not take even that; the call itself ends all the same."""
    status = status_of(error)
    trailers = ((DETAILS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, request_id.get()))
    try:
        async with asyncio.timeout(write_timeout_s):
            await context.abort(code_of(error), status.message, trailers)
    except TimeoutError:
        call.cut_by = error
        raise asyncio.CancelledError from None
    raise AssertionError("abort returned")


def _checked(request: Any, requests_stream: bool) -> Any:
    if requests_stream:
        return _readable(request)
    if isinstance(request, Unreadable):
        raise request.error
    return request


@asynccontextmanager
async def _hearing_out(requests: Any, requests_stream: bool) -> AsyncIterator[None]:
    """Read on for a moment after an error, while the client sends.

    A client whose write fails because the call has ended takes that for the error (grpc.aio: INTERNAL), and never sees
    the one that it was given. Small uploads end within the time; large ones are cut off as before.
    """
    try:
        yield
    except Exception:
        if requests_stream:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEAR_OUT_S):
                    async for _ in requests:
                        pass
        raise


async def _readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, Unreadable):
            raise request.error
        yield request


def _is_over(call: RunningCall) -> bool:
    """Whether the call ran out of time. The client is first to know: gRPC rounds timeouts up, by 1% at most."""
    if call.deadline_s is None:
        return False
    slack_s = 0.02 + 0.01 * (call.deadline_s - call.started_s)
    return call.deadline_s - slack_s <= time.monotonic()


def _code_when_cancelled(call: RunningCall) -> grpc.StatusCode:
    if call.cut_by is not None:
        return code_of(call.cut_by)
    return grpc.StatusCode.DEADLINE_EXCEEDED if _is_over(call) else grpc.StatusCode.CANCELLED


def _code_set_by(context: Context) -> grpc.StatusCode:
    code: object = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return _CODES_BY_NUMBER.get(code if isinstance(code, int) else 0, grpc.StatusCode.UNKNOWN)


def _behaviour_of(handler: grpc.RpcMethodHandler[Any, Any]) -> Callable[..., Any]:
    behaviours = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    return next(behaviour for behaviour in behaviours if behaviour is not None)


def _is_async(behaviour: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)


def _require_generated(method: str, behaviour: Callable[..., Any]) -> None:
    """A plain function is the generated default; one of our own would block the loop, and is a mistake."""
    if not str(getattr(behaviour, "__module__", "")).endswith("_pb2_grpc"):
        raise TypeError(f"{method}: a servicer's methods are coroutines or async generators")
