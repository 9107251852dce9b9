"""``slipstream generate``: complete one prompt, and show the text as it comes."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from slipstream_client.adapter_results import short_name
from slipstream_client.cli import terminal
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.sampling import AnswerFlags
from slipstream_client.cli.target import Target
from slipstream_client.client import SlipstreamClient
from slipstream_client.results import Generation, GenerationDelta
from slipstream_client.streams import AnswerStream

OUTPUT, CONSTRAINT, BEAMS = "Output", "Constraint", "Beam search"
MAX_PROMPT_CHARACTERS = 4 * 1024 * 1024


@with_groups
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; unset or -: read from stdin.")] = None,
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message; implies --chat.")] = None,
    answer: AnswerFlags,
    num_return_sequences: Annotated[
        int | None, typer.Option("--num-return-sequences", help="Sequences to return.", rich_help_panel=OUTPUT)
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Log-probabilities of so many tokens (--json).", rich_help_panel=OUTPUT)
    ] = None,
    echo: Annotated[bool | None, typer.Option("--echo", help="Begin with the prompt.", rich_help_panel=OUTPUT)] = None,
    include_stop: Annotated[
        bool | None, typer.Option("--include-stop", help="Keep the stop text.", rich_help_panel=OUTPUT)
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Show special tokens.", rich_help_panel=OUTPUT)
    ] = False,
    num_beams: Annotated[int | None, typer.Option(help="Number of beams.", rich_help_panel=BEAMS)] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Above 0: longer.", rich_help_panel=BEAMS)] = None,
    early_stopping: Annotated[
        bool | None, typer.Option("--early-stopping", help="Stop at num_beams candidates.", rich_help_panel=BEAMS)
    ] = None,
    json_schema: Annotated[
        str | None, typer.Option(help="JSON schema, as text, that the answer has to match.", rich_help_panel=CONSTRAINT)
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Pattern that it has to match.", rich_help_panel=CONSTRAINT)] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="One of these; may be repeated.", rich_help_panel=CONSTRAINT)
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Show the text as it comes.", rich_help_panel=OUTPUT)
    ] = True,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Complete a prompt.

    The text goes to stdout, everything else to stderr: `slipstream generate "Once upon a time" -n 40 > story.txt`
    """
    text = read_prompt(prompt)
    options = answer.options() | {
        "num_return_sequences": num_return_sequences,
        "logprobs": logprobs,
        "echo": echo,
        "include_stop": include_stop,
        "skip_special_tokens": False if special_tokens else None,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
        "json_schema": json_schema,
        "regex": regex,
        "choices": choice or None,
    }
    sent = _messages(text, system) if chat or system else text
    one_sequence = (num_return_sequences or 1) == 1

    async def work(client: SlipstreamClient) -> None:
        if stream and as_json:
            await _print_events(client.stream_generate(sent, **options))
        elif stream and one_sequence:
            await _print_stream(client.stream_generate(sent, **options))
        else:
            _print_whole(await client.generate(sent, **options), as_json)

    target.run(work)


def read_prompt(prompt: str | None) -> str:
    """The prompt given as an argument, or all of stdin without its last line break."""
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, or pipe one in", param_hint="PROMPT")
    text = sys.stdin.read(MAX_PROMPT_CHARACTERS + 1)
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise typer.BadParameter(f"stdin holds more than {MAX_PROMPT_CHARACTERS} characters", param_hint="PROMPT")
    return text.removesuffix("\n")


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


async def _print_stream(stream: AnswerStream[GenerationDelta]) -> None:
    began_s = time.perf_counter()
    first_s: float | None = None
    try:
        async for delta in stream:
            first_s = first_s or time.perf_counter()
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    finally:
        if not stream.text.endswith("\n"):
            sys.stdout.write("\n" if stream.text or stream.finished else "")
            sys.stdout.flush()
    if terminal.err.is_terminal:
        terminal.note(summary(stream, began_s, first_s or time.perf_counter(), time.perf_counter()))


def summary(stream: AnswerStream[Any], began_s: float, first_s: float, ended_s: float) -> str:
    """One line about an answer: model, tokens, speed, why it ended."""
    usage = stream.usage
    spent_s = ended_s - first_s
    # The first token came at first_s: what the rest took is the speed of decoding.
    speed = f"{(usage.completion_tokens - 1) / spent_s:.1f} tokens/s" if usage.completion_tokens > 1 and spent_s else ""
    cached = f" ({usage.cached_prompt_tokens} cached)" if usage.cached_prompt_tokens else ""
    parts = [
        stream.model.removeprefix("models/"),
        short_name(stream.adapter_version),
        f"{usage.prompt_tokens}{cached} + {usage.completion_tokens} tokens",
        f"first after {(first_s - began_s) * 1000:.0f} ms",
        speed,
        f"ended by {stream.finish_reason.replace('_', ' ')}",
    ]
    return " · ".join(filter(None, parts))


async def _print_events(stream: AnswerStream[GenerationDelta]) -> None:
    """JSON Lines: the deltas, then one line about the whole."""
    async for delta in stream:
        terminal.print_json({"event": "delta"} | _without_empty(delta))
    finished = {
        "event": "finished",
        "model": stream.model,
        "adapter_version": stream.adapter_version,
        "finish_reasons": stream.finish_reasons,
        "usage": stream.usage,
        "request_id": stream.request_id,
    }
    terminal.print_json(finished)


def _without_empty(delta: GenerationDelta) -> dict[str, Any]:
    fields = {
        "index": delta.index,
        "text": delta.text,
        "token_ids": delta.token_ids,
        "finish_reason": "" if delta.finish_reason == "unspecified" else delta.finish_reason,
        "matched_stop": delta.matched_stop,
        "logprobs": delta.logprobs,
    }
    return {name: value for name, value in fields.items() if value or name in ("index", "text")}


def _print_whole(generation: Generation, as_json: bool) -> None:
    if as_json:
        terminal.print_json(generation)
        return
    several = len(generation.completions) > 1
    for completion in generation.completions:
        if several:
            terminal.err.rule(f"[dim]{completion.index + 1} of {len(generation.completions)}[/]", align="left")
        sys.stdout.write(completion.text + "\n")
        sys.stdout.flush()
