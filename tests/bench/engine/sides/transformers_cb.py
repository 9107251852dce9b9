"""Transformers' own continuous batching, sdpa attention, its manager kept from run to run.

Its cache is given the 2 GiB that the others get (left alone it would take most of the machine's memory), and the
largest batch of tokens that its attention mask allows within reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tests.bench.engine.requests import Answer, Request
from tests.bench.engine.sides.loop import Clock, serve

CACHE_BYTES = 2 * 1024**3
BATCH_TOKENS = 512
PAGE_TOKENS = 256


class ContinuousBatchingSide:
    """A ContinuousBatchingManager that runs in a thread of its own."""

    streams = True

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.set_num_threads(arguments.threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model_folder,
            dtype=getattr(torch, arguments.dtype),
            attn_implementation="sdpa",
            local_files_only=True,
        ).eval()
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
        self._settings = {
            "num_blocks": CACHE_BYTES // (token_bytes * PAGE_TOKENS),
            "max_batch_tokens": BATCH_TOKENS,
            "max_requests_per_batch": arguments.concurrency,
        }
        self._manager = model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=transformers.ContinuousBatchingConfig(page_size=PAGE_TOKENS, **self._settings),
        )
        self._manager.start()

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "transformers": transformers.__version__, **self._settings}

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        clock = Clock()
        numbers: dict[str, int] = {}
        for index in sorted(range(len(requests)), key=lambda index: requests[index].arrival_s):
            clock.sleep_until(requests[index].arrival_s)
            numbers[self._add(requests[index])] = index
        answers = [Answer() for _ in requests]
        for _ in requests:
            output = next_result(self._manager)
            answers[numbers[output.request_id]] = Answer(
                token_ids=list(output.generated_tokens),
                token_times_s=[time_s - clock.start_s for time_s in output.timestamps],
            )
        return answers

    def close(self) -> None:
        """End the manager's thread."""
        self._manager.stop(block=True, timeout=10)

    def _add(self, request: Request) -> str:
        number = self._manager.add_request(
            list(request.prompt), max_new_tokens=request.max_new_tokens, record_timestamps=True, eos_token_id=-1
        )
        if number is None:
            raise RuntimeError("the manager takes no more requests")
        return str(number)


def next_result(manager: Any) -> Any:
    """What the manager has finished next; RuntimeError where a request failed, or its thread has ended."""
    while (output := manager.get_result(timeout=1.0)) is None:
        if not manager.is_running():
            raise RuntimeError("the manager's thread has ended")
    if output.error is not None:
        raise RuntimeError(output.error)
    return output


def main() -> None:
    made: list[ContinuousBatchingSide] = []

    def make(arguments: argparse.Namespace) -> ContinuousBatchingSide:
        made.append(ContinuousBatchingSide(arguments))
        return made[0]

    try:
        serve(make)
    finally:
        for side in made:
            side.close()


if __name__ == "__main__":
    main()
