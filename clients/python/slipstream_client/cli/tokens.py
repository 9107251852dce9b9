"""``slipstream tokenize`` and ``slipstream count-tokens``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape
from rich.text import Text

from slipstream_client.cli import terminal
from slipstream_client.cli.generate import read_prompt
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.target import Target
from slipstream_client.results import Tokenization

TextArgument = Annotated[str | None, typer.Argument(help="The text; unset or -: read from stdin.")]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="Whose tokenizer; unset: the default model's.")]
SpecialOption = Annotated[
    bool | None,
    typer.Option("--special-tokens/--no-special-tokens", help="Whether special tokens are added.", show_default=False),
]
# Neighbouring tokens differ, and each can be read on a dark and on a light ground.
COLOURS = ("black on cyan", "black on yellow", "black on green", "black on magenta")


@with_groups
def tokenize(
    text: TextArgument = None,
    *,
    model: ModelOption = "",
    special_tokens: SpecialOption = None,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Show how a model's tokenizer cuts a text."""
    content = read_prompt(text)
    found = target.run(lambda client: client.tokenize(content, model=model, add_special_tokens=special_tokens))
    if as_json:
        terminal.print_json(found)
    elif terminal.out.is_terminal:
        _print_coloured(content, found)
    else:
        for token in found.tokens:
            sys.stdout.write(f"{token.id}\t{token.token!r}\n")


def _print_coloured(content: str, found: Tokenization) -> None:
    line = Text()
    for place, token in enumerate(found.tokens):
        shown = content[token.start : token.end] or token.token
        line.append(shown.replace("\n", "⏎\n"), style=COLOURS[place % len(COLOURS)])
    terminal.out.print(line)
    terminal.out.print(" ".join(map(str, found.ids)), style="dim")
    terminal.note(f"{len(found.tokens)} tokens · {found.model.removeprefix('models/')}")


@with_groups
def count_tokens(
    text: TextArgument = None,
    *,
    model: ModelOption = "",
    chat: Annotated[bool, typer.Option("--chat", help="Count it as one message of a chat.")] = False,
    special_tokens: SpecialOption = None,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Count the tokens of a prompt, as generate would, without running the model."""
    content = read_prompt(text)
    prompt = [{"role": "user", "content": content}] if chat else content
    count = target.run(lambda client: client.count_tokens(prompt, model=model, add_special_tokens=special_tokens))
    if as_json:
        terminal.print_json(count)
    else:
        share = f" [dim]of {count.context_tokens} · {escape(count.model.removeprefix('models/'))}[/]"
        terminal.out.print(f"{count.prompt_tokens}{share if terminal.out.is_terminal else ''}")
