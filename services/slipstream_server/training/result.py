"""What a finished job leaves behind: ``result.json``, written last and at once. Torch-free; any thread."""

from __future__ import annotations

from pathlib import Path

import msgspec

from slipstream_server.errors import CorruptArtifact
from slipstream_server.training.job_folder import FileDigest, write_atomically

_MAX_RESULT_BYTES = 1024 * 1024


class TrainingResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Losses are means over labels, in nats; null where not finite or without held-out rows.

    ``num_tokens`` counts what was trained on without padding, over all attempts and processes; ``seconds`` is the last
    attempt's time from start to end. ``files`` are those of the adapter folder.
    """

    attempt: int
    steps: int
    train_loss: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    num_tokens: int
    num_train_examples: int
    num_held_out_examples: int
    num_truncated_examples: int
    num_trainable_parameters: int
    seconds: float
    recipe_digest: str
    versions: dict[str, str]
    files: tuple[FileDigest, ...]


def write_result(path: Path, result: TrainingResult) -> None:
    """Raises OSError, and leaves what was there, where there is no room."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(result), indent=2))


def read_result(path: Path) -> TrainingResult | None:
    """The result at ``path``, None where there is none yet; raises CorruptArtifact where it is none of ours."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_RESULT_BYTES)
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(content, type=TrainingResult)
    except msgspec.DecodeError as error:
        raise CorruptArtifact("result.json: not the result of a training") from error
