"""vLLM's CPU build, offline: its engine stepped in this process, without a server around it. Runs in its own
environment.

Both cores are its own (by default it binds one), 2 GiB are for its cache; everything else is its default.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

_CORES = sorted(os.sched_getaffinity(0))
os.environ.update(
    {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, _CORES)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
# In this process: a process more would only take time from the two cores.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from tests.bench.engine.requests import Answer, Request  # noqa: E402 (vLLM reads its variables when it is imported)
from tests.bench.engine.sides.loop import run_in_steps, serve  # noqa: E402


class VllmSide:
    """An LLM object whose engine is stepped by hand, as ``LLM.generate`` does."""

    streams = True

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch
        import vllm  # type: ignore[import-not-found]  # lives in an environment of its own

        self._vllm = vllm
        self._facts = {"vllm": vllm.__version__, "torch": torch.__version__}
        self._engine = vllm.LLM(
            arguments.model_folder,
            dtype=arguments.dtype,
            enforce_eager=True,
            max_model_len=arguments.max_tokens,
            max_num_seqs=arguments.concurrency,
            disable_log_stats=True,
        ).llm_engine
        self._facts["threads"] = torch.get_num_threads()
        self._ids = itertools.count()

    def facts(self) -> dict[str, Any]:
        return self._facts

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        indices: dict[str, int] = {}
        cached: dict[int, int | None] = {}

        def submit(index: int, request: Request) -> None:
            number = str(next(self._ids))
            indices[number] = index
            prompt = self._vllm.TokensPrompt(prompt_token_ids=list(request.prompt))
            self._engine.add_request(number, prompt, self._sampling(request.max_new_tokens))

        def step() -> Iterator[tuple[int, Sequence[int]]]:
            for output in self._engine.step():
                index = indices[output.request_id]
                cached[index] = output.num_cached_tokens
                yield index, output.outputs[0].token_ids

        answers = run_in_steps(requests, submit, step)
        for index, answer in enumerate(answers):
            answer.cached_prompt_tokens = cached.get(index)
        return answers

    def _sampling(self, max_tokens: int) -> Any:
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

        return self._vllm.SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )


if __name__ == "__main__":
    serve(VllmSide)
