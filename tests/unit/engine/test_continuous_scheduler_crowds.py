"""Arrivals, cancels and steps in any order: the continuous scheduler's blocks always agree, and everybody ends."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.engine.scheduler_driving import Driver, sequence

from slipstream_server.inference.engine.continuous_scheduler import StepLimits
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.engine.sequences import Sequence


def most_steps_for(sequences: list[Sequence]) -> int:
    """One after the other, a block of a prompt or one token at a time, and that again after every preemption."""
    each = [len(one.row.request.prompt_token_ids) + one.row.request.stopping.max_new_tokens for one in sequences]
    return 10 + sum(each) * (1 + len(each))


class Crowd(RuleBasedStateMachine):
    """Arrivals, cancels and steps in any order, in a pool that one long sequence can fill."""

    driver: Driver
    now_s: float
    alive: list[Sequence]

    @initialize(
        num_blocks=st.integers(2, 8), max_running=st.integers(1, 5), max_step_tokens=st.integers(1, 130),
        prefix_caching=st.booleans(),
    )  # fmt: skip
    def begin(self, num_blocks: int, max_running: int, max_step_tokens: int, prefix_caching: bool) -> None:
        limits = StepLimits(max_running=max_running, max_step_tokens=max_step_tokens)
        self.driver = Driver(num_blocks, limits, prefix_caching=prefix_caching)
        self.now_s = 0.0
        self.alive = []

    @rule(
        size=st.floats(0, 1), new=st.integers(1, 70), stem=st.integers(0, 1), own=st.integers(0, 40),
        priority=st.integers(0, 2), adapter=st.sampled_from([None, None, "a", "b"]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
    )  # fmt: skip
    def arrive(
        self, size: float, new: int, stem: int, own: int, priority: int, adapter: str | None,
        prompt_logprobs: int | None,
    ) -> None:  # fmt: skip
        """Prompts share one of two stems, and go their own way at the end."""
        most = self.driver.pool.num_blocks * BLOCK_TOKENS
        new = min(new, most - 1)
        length = 1 + round(size * (most - new - 1))
        prompt = [(stem + 1) * (n % 7) % 5 for n in range(length)]
        prompt[max(0, length - own) :] = [own % 5] * min(own, length)
        one = sequence(
            prompt, new, at_s=self.now_s, adapter=adapter, priority=priority, prompt_logprobs=prompt_logprobs
        )
        self.driver.scheduler.add(one)
        self.alive.append(one)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.alive))
        one.row.dropped = True
        self.driver.scheduler.remove(one)

    @rule(seconds=st.sampled_from([0.1, 4.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(num_drafts=st.sampled_from([0, 0, 3, 40]), steps=st.integers(1, 6))
    def step(self, num_drafts: int, steps: int) -> None:
        for _ in range(steps):
            self.driver.step(num_drafts)

    @invariant()
    def blocks_agree(self) -> None:
        if hasattr(self, "driver"):
            self.alive = [one for one in self.alive if one.row.is_live]
            self.driver.scheduler.check_integrity()

    def teardown(self) -> None:
        """Everybody comes to an end, and nothing is held then."""
        if not hasattr(self, "driver"):
            return
        self.driver.drain(most_steps_for(self.alive))
        assert self.driver.pool.num_held == 0
        assert not any(one.row.is_live for one in self.alive if not one.row.dropped)


TestCrowd = Crowd.TestCase


TestCrowd.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
