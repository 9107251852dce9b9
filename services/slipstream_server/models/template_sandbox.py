"""Where chat templates run: Jinja's immutable sandbox, under bounds.

A template is a program that came with a model. Bounded are loop turns and calls, time, the length of any text it builds
and of its output. Every loop and macro body gets a tick compiled into it; that, not the output, is what stops a loop
that prints nothing. Filters, tags and globals are those that transformers gives its templates.

Each rendering has a budget of its own, by thread.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

_WIDE_FORMAT = re.compile(r"\d{6}|\*")
_MAX_FILTER_NUMBER = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What one rendering may use."""

    steps: int = 500_000
    seconds: float = 2.0
    output_chars: int = 4 * 1024 * 1024


class TemplateLimitExceeded(Exception):
    """The template ran over one of its bounds."""


class TemplateRefused(jinja2.TemplateError):
    """The template itself refuses the messages, with ``raise_exception``."""


class _Budget(threading.local):
    """What is left of the running rendering, by thread."""

    steps_left = 0
    ends_s = 0.0


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with ticks in every loop and macro, and bounds on the texts that operations make."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, limits: RenderLimits) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self._limits = limits
        self._budget = _Budget()
        self.filters["tojson"] = _tojson
        self.filters["format"] = self._format
        self.filters = {name: self._bounded(function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace
        self.globals.pop("lipsum", None)

    def run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        self._budget.steps_left = self._limits.steps
        self._budget.ends_s = time.monotonic() + self._limits.seconds
        parts, length = [], 0
        for part in template.generate(**variables):
            length += len(part)
            self._check_length(length)
            parts.append(part)
        return "".join(parts)

    def tick(self) -> str:
        """One turn of a loop or one call; compiled into every body."""
        self._budget.steps_left -= 1
        if self._budget.steps_left < 0:
            raise TemplateLimitExceeded(f"more than {self._limits.steps} loop turns and calls")
        if self._budget.steps_left % 64 == 0 and time.monotonic() > self._budget.ends_s:
            raise TemplateLimitExceeded(f"more than {self._limits.seconds} seconds")
        return ""

    def join_operands(self, *values: object) -> str:
        """The ``~`` operator."""
        self._check_weight(values)
        return "".join(map(str, values))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for body_owner in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            tick = nodes.ExprStmt(_call("tick", []), lineno=body_owner.lineno)
            body_owner.body.insert(0, tick)  # type: ignore[attr-defined]
        _replace_concat(template)
        template.set_environment(self)
        return template

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self._check_repeat(left, right)
            self._check_repeat(right, left)
        elif operator == "**" and (abs(left) > 10**6 or abs(right) > 64):
            raise TemplateLimitExceeded("a power too large")
        elif operator == "%" and isinstance(left, str):
            self._check_format(left)
            self._check_weight((left, right))
        elif operator == "+" and isinstance(left, str | list | tuple):
            self._check_length(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(function, "__self__", None), str):
            self._check_text_method(args)
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, str):
            self._check_length(len(result))
        return result

    def _check_text_method(self, args: Sequence[Any]) -> None:
        """``'a'.ljust(10**9)`` and ``text.replace('', text)``: refused before the text is made."""
        sizes = [abs(arg) for arg in args if isinstance(arg, int)]
        self._check_length(max(sizes, default=0))
        if any(isinstance(arg, str) and len(arg) > 4096 for arg in args):
            self._budget.steps_left -= 1000
            self.tick()

    def _check_repeat(self, value: Any, times: Any) -> None:
        if isinstance(value, str | list | tuple | bytes) and isinstance(times, int):
            self._check_length(len(value) * max(times, 0))
        elif isinstance(value, int) and abs(value) > 2**512:
            raise TemplateLimitExceeded("a number too large")

    def _check_format(self, pattern: str) -> None:
        if _WIDE_FORMAT.search(pattern):
            raise TemplateLimitExceeded("a format too wide")

    def _check_weight(self, value: object) -> None:
        """Bounds the text that a value would be as a string: the same long text may stand in a list many times."""
        weight, pending = 0, [value]
        while pending:
            item = pending.pop()
            if isinstance(item, Mapping):
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                pending += item
            weight += len(item) if isinstance(item, str) else 1
            self._check_length(weight)

    def _check_length(self, length: int) -> None:
        if length > self._limits.output_chars:
            raise TemplateLimitExceeded(f"a text of more than {self._limits.output_chars} characters")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            self._check_format(str(value.__self__))
        return wrapped

    def _format(self, value: object, *args: Any, **kwargs: Any) -> str:
        pattern = str(value)
        self._check_format(pattern)
        self._check_weight((pattern, *args, kwargs))
        return pattern % (kwargs or args)

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter with bounded numbers, texts and result; it keeps the marks by which Jinja passes the environment."""

        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            for value in (*args, *kwargs.values()):
                if isinstance(value, int) and abs(value) > _MAX_FILTER_NUMBER:
                    raise TemplateLimitExceeded("a filter's number too large")
                if isinstance(value, list | tuple | Mapping):
                    self._check_weight(value)
            result = function(*args, **kwargs)
            if isinstance(result, str):
                self._check_length(len(result))
            return result

        bounded.__dict__.update(getattr(function, "__dict__", {}))
        return bounded


class _GenerationTag(Extension):
    """``{% generation %}``: marks the assistant's words for training; renders as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` without underscore attributes, as transformers restricts it."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


def _replace_concat(template: nodes.Template) -> None:
    """``a ~ b`` becomes a call of ``join_operands``: Jinja offers no other way to see it."""
    pending: list[nodes.Node] = [template]
    while pending:
        node = pending.pop()
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(node, field, _call("join_operands", value.nodes).set_lineno(value.lineno, override=False))
            elif isinstance(value, list):
                value[:] = [_call("join_operands", x.nodes) if isinstance(x, nodes.Concat) else x for x in value]
        pending.extend(node.iter_child_nodes())


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefused(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
