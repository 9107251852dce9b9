"""Which engine runs a model: decided here and nowhere else. Torch-free; any thread."""

from __future__ import annotations

from typing import Final, get_args

from slipstream_server.errors import UnsupportedField
from slipstream_server.inference.worker_config import EngineName
from slipstream_server.models.facts import Family, ModelFacts
from slipstream_server.models.task_classes import writes_text

PADDED: Final = "padded"
CONTINUOUS: Final = "continuous"
TASKS: Final = "tasks"
NULL: Final = "null"
BUILT: frozenset[str] = frozenset(get_args(EngineName))


def engine_for(facts: ModelFacts, asked: str, configured: str) -> EngineName:
    """The engine for a model.

    ``asked`` is the load's own batching ("" where it says nothing), ``configured`` the operator's ("auto" likewise).
    Raises UnsupportedField where the model or this build cannot do what was asked.
    """
    if configured == NULL:
        return NULL
    if not writes_text(facts):
        return _engine_without_generation(facts, asked)
    if asked == CONTINUOUS and not runs_continuously(facts):
        raise UnsupportedField.of(
            "options.batching", f"BATCHING_CONTINUOUS is not for a model of the kind {kind(facts)}"
        )
    if asked == PADDED or not runs_continuously(facts) or (not asked and configured == PADDED):
        return PADDED
    return CONTINUOUS


def runs_continuously(facts: ModelFacts) -> bool:
    """Whether requests can join and leave this model's batch at every step, with an engine of this build."""
    keeps_keys_and_values = facts.kv_elements_per_layer_token is not None
    return CONTINUOUS in BUILT and facts.family is Family.DECODER and keeps_keys_and_values


def kind(facts: ModelFacts) -> str:
    """The model's class, for messages."""
    return facts.architectures[0][:80] if facts.architectures else facts.model_type[:80]


def _engine_without_generation(facts: ModelFacts, asked: str) -> EngineName:
    if asked:
        raise UnsupportedField.of("options.batching", f"is for models that generate; this is a {kind(facts)}")
    if TASKS not in BUILT:
        raise UnsupportedField.of(
            "name", f"a {kind(facts)} has no head to generate with, and this build serves no other"
        )
    return TASKS
