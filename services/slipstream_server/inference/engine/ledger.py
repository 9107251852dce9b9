"""The requests an engine has taken on, and the one terminal event that each of them gets.

Every engine of generations keeps one: it knows who runs, passes chosen tokens on, and ends requests. A request that
is cancelled is forgotten without an event; every other one ends by exactly one of Finished and Failed. Engine thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slipstream_server.errors import OutOfMemory, SlipstreamError
from slipstream_server.inference.engine.choosing import Choices
from slipstream_server.inference.engine.core import Generation, Row
from slipstream_server.inference.engine.faults import is_fatal, is_out_of_memory
from slipstream_server.inference.engine.outbox import Outbox
from slipstream_server.inference.generation import Finished, Tokens, TopLogprobs
from slipstream_server.logs import unforeseen


class Ledger:
    """The generations under way, by request id."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._generations: dict[int, Generation] = {}

    def __len__(self) -> int:
        return len(self._generations)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._generations

    def __iter__(self) -> Iterator[Generation]:
        return iter(list(self._generations.values()))

    def enter(self, generation: Generation) -> None:
        """The generation is under way from now on."""
        self._generations[generation.request.id] = generation

    def cancel(self, request_id: int) -> None:
        """Forget a request; its rows are not wanted any more."""
        if (generation := self._generations.pop(request_id, None)) is not None:
            generation.drop()

    def end_sequence(self, request_id: int, index: int) -> None:
        """End one sequence; the request is finished with its last."""
        generation = self._generations.get(request_id)
        if generation is not None and 0 <= index < len(generation.rows):
            generation.rows[index].dropped = True
            self.finish_if_over(generation)

    def take(self, rows: Sequence[Row], choices: Choices) -> None:
        """Give every live row the token that was chosen for it, or end its request where there is none."""
        for index, row in enumerate(rows):
            if not row.is_live:
                continue
            if (error := choices.error_of(index)) is not None:
                self.fail(row.request.id, error)
            else:
                logprobs = choices.logprobs.get(index)
                self.append(row, [choices.token_ids[index]], None if logprobs is None else [logprobs])

    def append(self, row: Row, token_ids: Sequence[int], logprobs: list[TopLogprobs] | None = None) -> int:
        """Add tokens to the row, up to the one that ends it; how many they are."""
        taken = []
        for token_id in token_ids:
            row.append(token_id)
            taken.append(token_id)
            if row.finish_reason is not None:
                break
        self._outbox.totals.generation_tokens += len(taken)
        self._outbox.put(Tokens(row.request.id, row.index, taken, logprobs, row.finish_reason))
        if row.finish_reason is not None:
            self.finish_if_over(self._generations[row.request.id])
        return len(taken)

    def answer(self, generation: Generation, answers: Sequence[Sequence[int]]) -> None:
        """Give every row that is still wanted its whole answer."""
        for row, token_ids in zip(generation.rows, answers, strict=True):
            if row.is_live:
                self.append(row, token_ids)

    def fail(self, request_id: int, error: SlipstreamError) -> None:
        """End a request that is under way with its one terminal event."""
        if (generation := self._generations.pop(request_id, None)) is not None:
            generation.drop()
            self._outbox.fail(request_id, error)

    def finish_if_over(self, generation: Generation) -> None:
        """Say that the request is finished, where no row of it is live."""
        if generation.is_over and self._generations.pop(generation.request.id, None) is not None:
            self._outbox.put(Finished(generation.request.id))


def named(error: Exception, doing: str) -> SlipstreamError:
    """The error as the client may see it; what it does not name goes to the log. Raises one that ends the worker."""
    if isinstance(error, SlipstreamError):
        return error
    if is_fatal(error):
        raise error
    if is_out_of_memory(error):
        return OutOfMemory("the device has not enough memory for this request")
    return unforeseen(error, doing)
