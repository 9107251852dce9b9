"""Which engine runs a model: decided here and nowhere else. Torch-free; any thread."""

from __future__ import annotations

from typing import Final

from slipstream_server.errors import UnsupportedField
from slipstream_server.inference.worker_config import EngineName
from slipstream_server.models.facts import Family, ModelFacts
from slipstream_server.models.task_classes import writes_text

PADDED: Final = "padded"
CONTINUOUS: Final = "continuous"
TASKS: Final = "tasks"
NULL: Final = "null"


def engine_for(facts: ModelFacts, asked: str, configured: str) -> EngineName:
    """The engine for a model.

    ``asked`` is the load's own batching ("" where it says nothing), ``configured`` the operator's ("auto" likewise).
    Raises UnsupportedField where the model cannot do what was asked.
    """
    if configured == NULL:
        return NULL
    if not writes_text(facts):
        if asked:
            raise UnsupportedField.of("options.batching", f"is for models that generate; this is a {kind(facts)}")
        return TASKS
    if asked == CONTINUOUS and not runs_continuously(facts):
        raise UnsupportedField.of(
            "options.batching", f"BATCHING_CONTINUOUS is not for a model of the kind {kind(facts)}"
        )
    if asked == PADDED or not runs_continuously(facts) or (not asked and configured == PADDED):
        return PADDED
    return CONTINUOUS


def runs_continuously(facts: ModelFacts) -> bool:
    """Whether requests can join and leave this model's batch at every step."""
    keeps_keys_and_values = facts.kv_elements_per_layer_token is not None
    return facts.family is Family.DECODER and keeps_keys_and_values


def kind(facts: ModelFacts) -> str:
    """The model's class, for messages."""
    return facts.architectures[0][:80] if facts.architectures else facts.model_type[:80]
