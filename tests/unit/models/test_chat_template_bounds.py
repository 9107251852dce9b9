"""Templates that try to hang or to fill the memory are stopped, quickly."""

from __future__ import annotations

import time

import pytest

from slipstream_server.errors import InvalidField
from slipstream_server.models.chat_template import ChatTemplate
from slipstream_server.models.template_sandbox import RenderLimits

GROW = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = OPERATION %}{% endfor %}"
HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested_silent_loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested_loops_over_texts": "{% set s = 'a' * 3000 %}{% for a in s %}{% for b in s %}{% for c in s %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "macro_doubling": "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "macro_for_ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loop_for_ever": "{% for i in range(1) recursive %}{{ loop(range(2)) }}{% endfor %}",
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat_list": "{% set x = [0] * 10**9 %}",
    "join_doubling": GROW.replace("OPERATION", "n.x ~ n.x"),
    "plus_doubling": GROW.replace("OPERATION", "n.x + n.x"),
    "format_doubling": GROW.replace("OPERATION", "'%s%s' % (n.x, n.x)"),
    "replace_doubling": GROW.replace("OPERATION", "n.x.replace('a', 'aa')"),
    "filter_doubling": GROW.replace("OPERATION", "[n.x, n.x] | join"),
    "power": "{{ 10 ** 10 ** 8 }}",
    "power_tower": "{% set n = namespace(x=10**6) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "percent_format": "{{ '%1000000000d' % 1 }}",
    "filter_format": "{{ '%1000000000d' | format(1) }}",
    "method_format": "{{ '{:1000000000d}'.format(1) }}",
    "output": "{% set s = 'a' * 100000 %}{% for i in range(90000) %}{{ s }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_as_the_callers_error(name: str) -> None:
    template = ChatTemplate({"default": HOSTILE[name]}, RenderLimits(steps=100_000, seconds=1.0))
    started_s = time.monotonic()
    with pytest.raises(InvalidField, match="chat"):
        template.render([{"role": "user", "content": "x"}], special_tokens={}, parameters={})
    assert time.monotonic() - started_s < 5.0


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{% include 'x' %}",
    ],
)
def test_templates_stay_in_their_sandbox(source: str) -> None:
    template = ChatTemplate({"default": source})
    with pytest.raises(InvalidField, match=r"chat\.messages"):
        template.render([{"role": "user", "content": "x"}], special_tokens={}, parameters={})


def test_the_time_bound_holds_without_the_step_bound() -> None:
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate({"default": source}, RenderLimits(steps=10**12, seconds=0.2))
    with pytest.raises(InvalidField, match=r"0\.2 seconds"):
        template.render([{"role": "user", "content": "x"}], special_tokens={}, parameters={})


def test_a_rendering_does_not_use_up_the_next_ones_bounds() -> None:
    source = "{% for i in range(900) %}{% endfor %}ok"
    template = ChatTemplate({"default": source}, RenderLimits(steps=1000))
    for _ in range(3):
        assert template.render([{"role": "user", "content": "x"}], special_tokens={}, parameters={}) == "ok"
