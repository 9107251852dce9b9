"""Where constrained requests wait until their grammar is compiled; the others never enter.

Engine thread, which is never blocked: compilations run on threads of their own and are looked at when the engine
steps. A grammar that cannot be compiled, or not in time, fails the requests that have it and no other. Nothing can stop
a compilation that has begun: while every thread is held by one that is late, all who would wait for a thread are
refused, so that nobody waits for what may never come. Torch-free.

    enter -> (compiling) -> take_ready -> the scheduler -> guides -> rows
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from slipstream_server.errors import (
    DeadlineExceeded,
    InvalidField,
    QueueFull,
    SlipstreamError,
    UnsupportedField,
)
from slipstream_server.inference.engine.constraints import Grammars, Guide, content_key
from slipstream_server.inference.engine.cores import go_anywhere
from slipstream_server.inference.engine.scheduler import has_expired
from slipstream_server.inference.generation import Constraint, GenerationRequest
from slipstream_server.logs import unforeseen

COMPILE_LIMIT_S = 10.0
_LOOK_EVERY_S = 0.005
_NUM_THREADS = 2


@dataclass(slots=True, eq=False)
class _Compilation:
    """One grammar on its way; ``since_s`` is when a thread began."""

    since_s: float | None = None
    outcome: Future[Any] = field(init=False)


class Anteroom:
    """The waiting requests of one engine. Without ``grammars`` every constrained request is refused."""

    def __init__(
        self,
        grammars: Grammars | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        compile_limit_s: float = COMPILE_LIMIT_S,
    ) -> None:
        self._grammars = grammars
        self._clock = clock
        self._limit_s = compile_limit_s
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "grammars", initializer=go_anywhere)
        self._compilations: dict[str, _Compilation] = {}
        self._waiting: dict[int, tuple[GenerationRequest, _Compilation]] = {}
        self._failed: list[tuple[int, SlipstreamError]] = []
        self._prototypes: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._waiting

    def enter(self, request: GenerationRequest) -> bool:
        """Whether the request stays here for now; False: it may go straight on."""
        if request.constraint is None:
            return False
        if self._grammars is None:
            self._failed.append((request.id, UnsupportedField.of("constraint", "this model's worker enforces none")))
            return True
        found = self._grammars.cached(request.constraint)
        if found is not None:
            return not self._settle(request, found)
        compilation = self._compilation(request.constraint)
        if compilation is None:
            self._refuse(request)
        else:
            self._waiting[request.id] = (request, compilation)
        return True

    def take_ready(self) -> list[GenerationRequest]:
        """Requests whose grammar is there, in the order they came; they are here no more."""
        ready = []
        is_stuck = self._is_stuck()
        for request, compilation in list(self._waiting.values()):
            if compilation.outcome.done():
                del self._waiting[request.id]
                if self._settle(request, compilation.outcome.result()):
                    ready.append(request)
            elif self._is_late(compilation):
                del self._waiting[request.id]
                text = f"takes longer than {self._limit_s:g} s to compile; make it smaller"
                self._failed.append((request.id, InvalidField.of("constraint", text)))
            elif is_stuck:
                del self._waiting[request.id]
                self._refuse(request)
        self._drop_unwanted()
        return ready

    def take_failed(self, now_s: float) -> list[tuple[int, SlipstreamError]]:
        """Requests that end here, each with its error: grammars refused, deadlines passed."""
        for request, _ in list(self._waiting.values()):
            if has_expired(request, now_s):
                del self._waiting[request.id]
                late = DeadlineExceeded("the deadline passed before the request could run")
                self._failed.append((request.id, late))
        failed, self._failed = self._failed, []
        return failed

    def guides(self, request: GenerationRequest, skips: int = 0) -> list[Guide | None]:
        """A fresh guide for each sequence of a request that has passed through here; None without constraint."""
        if request.constraint is None or self._grammars is None:
            return [None] * request.num_return_sequences
        prototype = self._prototypes.pop(request.id)
        return [self._grammars.guide(prototype, request, skips) for _ in range(request.num_return_sequences)]

    def forget(self, request_id: int) -> bool:
        """The request is not wanted any more, here or in the scheduler; whether it waited here."""
        self._prototypes.pop(request_id, None)
        return self._waiting.pop(request_id, None) is not None

    def wait_s(self) -> float | None:
        """How long until somebody should look again; None while nobody is here."""
        if self._failed:
            return 0.0
        return _LOOK_EVERY_S if self._waiting else None

    def _settle(self, request: GenerationRequest, found: Any) -> bool:
        """Keep the request's prototype, or its failure; whether it may go on."""
        if isinstance(found, SlipstreamError):
            self._failed.append((request.id, found))
            return False
        self._prototypes[request.id] = found
        return True

    def _refuse(self, request: GenerationRequest) -> None:
        text = f"constraint: all {_NUM_THREADS} threads that compile constraints are held by others; try again later"
        self._failed.append((request.id, QueueFull(text)))

    def _is_late(self, compilation: _Compilation) -> bool:
        return compilation.since_s is not None and self._clock() - compilation.since_s > self._limit_s

    def _is_stuck(self) -> bool:
        """Whether every thread is held by a compilation that is late."""
        late = [one for one in self._compilations.values() if not one.outcome.done() and self._is_late(one)]
        return len(late) >= _NUM_THREADS

    def _drop_unwanted(self) -> None:
        """Forget compilations that are done, and those that nobody waits for and no thread has begun."""
        wanted = {compilation for _, compilation in self._waiting.values()}
        self._compilations = {
            key: one
            for key, one in self._compilations.items()
            if not one.outcome.done() and (one in wanted or not one.outcome.cancel())
        }

    def _compilation(self, constraint: Constraint) -> _Compilation | None:
        """The constraint's compilation, begun or in line for a thread; None where there is no thread to wait for."""
        key = content_key(constraint)
        if key not in self._compilations:
            if self._is_stuck():
                return None
            compilation = self._compilations[key] = _Compilation()
            compilation.outcome = self._threads.submit(self._compile, compilation, constraint)
        return self._compilations[key]

    def _compile(self, compilation: _Compilation, constraint: Constraint) -> Any:
        """A compiling thread's work: the prototype or the error; never raises."""
        assert self._grammars is not None
        compilation.since_s = self._clock()
        try:
            return self._grammars.compile(constraint)
        except SlipstreamError as error:
            return error
        except BaseException as error:  # llguidance panics with a BaseException
            return unforeseen(error, "compiling a constraint")
