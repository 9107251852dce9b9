"""The options of ``generate`` and ``chat`` that decide how an answer is drawn and when it ends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from slipstream_client.errors import InvalidRequestError

SAMPLING, STOPPING = "Sampling", "Stopping"


def _sampling(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=SAMPLING, show_default=False)


def _stopping(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=STOPPING, show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFlags:
    """Unset means: the model's own default."""

    model: Annotated[str | None, typer.Option("--model", "-m", help="Model to ask; unset: the service's default.")] = (
        None
    )
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", help="Adapter: NAME, NAME@ALIAS or NAME@v3.")] = None
    do_sample: Annotated[bool | None, _sampling("Draw at random, or take the likeliest.", "--sample/--greedy")] = None
    temperature: Annotated[float | None, _sampling("Divides the logits; 0 is greedy.", "--temperature", "-t")] = None
    top_k: Annotated[int | None, _sampling("Keep the k likeliest tokens; 0 keeps all.")] = None
    top_p: Annotated[float | None, _sampling("Keep the likeliest tokens up to this probability.")] = None
    min_p: Annotated[float | None, _sampling("Drop tokens below this share of the likeliest one's probability.")] = None
    typical_p: Annotated[float | None, _sampling("Locally typical sampling.")] = None
    repetition_penalty: Annotated[float | None, _sampling("Makes seen tokens less likely; 1 is none.")] = None
    presence_penalty: Annotated[float | None, _sampling("Subtracted from the logits of tokens in the answer.")] = None
    frequency_penalty: Annotated[float | None, _sampling("The same, for each time they are in it.")] = None
    no_repeat_ngram_size: Annotated[int | None, _sampling("No n-gram of this size comes twice.")] = None
    seed: Annotated[int | None, _sampling("The same seed gives the same answer.")] = None
    logit_bias: Annotated[list[str] | None, _sampling("TOKEN_ID=BIAS; may be repeated.")] = None
    max_new_tokens: Annotated[int | None, _stopping("The most tokens to produce.", "--max-new-tokens", "-n")] = None
    min_new_tokens: Annotated[int | None, _stopping("The fewest tokens to produce.")] = None
    stop: Annotated[list[str] | None, _stopping("Stop before this text; may be repeated.")] = None
    stop_token_ids: Annotated[
        list[int] | None, _stopping("Stop at this token; may be repeated.", "--stop-token-id")
    ] = None
    ignore_eos: Annotated[bool | None, _stopping("Go on after the end-of-sequence token.", "--ignore-eos")] = None
    priority: Annotated[Literal["low", "normal", "high"] | None, typer.Option(help="Who goes first.")] = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments for the client, without what is unset."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.logit_bias:
            given["logit_bias"] = dict(map(parse_bias, self.logit_bias))
        return {name: value for name, value in given.items() if value is not None and value != []}


def parse_bias(text: str) -> tuple[int, float]:
    """``50256=-100`` as token id and bias."""
    token_id, equals, bias = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return int(token_id), float(bias)
    except ValueError:
        raise InvalidRequestError.of("sampling.logit_bias", f"{text!r} is not TOKEN_ID=BIAS") from None
