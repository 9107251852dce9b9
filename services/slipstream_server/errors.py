"""Every failure Slipstream can name, as one tree of exceptions.

    SlipstreamError
    ├── InvalidRequest          InvalidField · PromptTooLong · UnsupportedField · UnknownParameter
    │                           MalformedRequest
    ├── NotFound                ModelNotFound · AdapterNotFound · AdapterVersionNotFound · AliasNotFound
    │                           ConversationNotFound · MessageNotFound · DatasetNotFound · JobNotFound
    │                           CheckpointNotFound
    ├── AlreadyExists           ResourceExists · RequestIdReused
    ├── FailedPrecondition      WrongState · IncompatibleAdapter · UnsafeWeights · CorruptArtifact · InvalidDataset
    │                           AliasMissing · GateClosed · MissingDependency · ModelLoadFailed · SchemaTooNew
    ├── Aborted                 StaleEtag · StaleGeneration · FencedOut
    ├── ResourceExhausted       QueueFull · QuotaExceeded · MessageTooLarge · OutOfMemory · StorageFull · SlowReader
    ├── Unavailable             Draining · ModelNotReady · WorkerDied · DependencyUnavailable
    ├── DeadlineExceeded
    ├── Cancelled
    ├── Unauthenticated
    ├── PermissionDenied
    ├── Unimplemented
    └── InternalError

A class that can be raised carries its ``reason``: the name of a value of ``slipstream.type.v1.ErrorReason`` without the
enum's prefix. The classes directly below ``SlipstreamError`` are the ones that ``rpc/status.py`` maps to gRPC status
codes; nothing here knows about gRPC. Messages are written for the caller: they name the field, the value and what is
allowed, and never hold a path of this machine or a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field of a request: its path in proto spelling (``sampling.top_p``) and what is wrong with it."""

    field: str
    description: str


class SlipstreamError(Exception):
    """A failure with a reason a client can switch on.

    ``metadata`` goes to the client as it is (ErrorInfo.metadata); ``retry_after_s`` says that waiting helps.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    @property
    def field(self) -> str:
        """The first field at fault; empty where the failure is about none."""
        return self.violations[0].field if self.violations else ""


class InvalidRequest(SlipstreamError):
    """The request can never succeed as it is."""

    reason = "INVALID_FIELD"

    @classmethod
    def of(cls, field: str, description: str) -> Self:
        """The error for one bad ``field``; ``description`` names the value and what is allowed."""
        return cls(f"{field}: {description}", violations=[FieldViolation(field, description)])


class InvalidField(InvalidRequest):
    """A field holds a value outside its documented range."""

    reason = "INVALID_FIELD"


class PromptTooLong(InvalidRequest):
    """The prompt, or prompt and max_new_tokens together, exceed the model's context."""

    reason = "PROMPT_TOO_LONG"


class UnsupportedField(InvalidRequest):
    """The field is valid, but this model, batcher or build cannot honour it."""

    reason = "UNSUPPORTED_FIELD"


class UnknownParameter(InvalidRequest):
    """A task parameter that the task does not have."""

    reason = "UNKNOWN_PARAMETER"


class MalformedRequest(InvalidRequest):
    """Bytes that are no message of the expected type."""

    reason = "MALFORMED_REQUEST"


class NotFound(SlipstreamError):
    """Something named by the request does not exist."""

    reason = "NOT_FOUND"


class ModelNotFound(NotFound):
    reason = "MODEL_NOT_FOUND"

    @classmethod
    def named(cls, name: str, known: Iterable[str] = ()) -> Self:
        """The error for a name that no model has; it names the nearest of ``known``, where one is near."""
        near = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.7)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return cls(f"no model {name[:80]!r} is known{hint}", metadata={"model": name[:80]})


class AdapterNotFound(NotFound):
    reason = "ADAPTER_NOT_FOUND"


class AdapterVersionNotFound(NotFound):
    reason = "ADAPTER_VERSION_NOT_FOUND"


class AliasNotFound(NotFound):
    reason = "ALIAS_NOT_FOUND"


class ConversationNotFound(NotFound):
    reason = "CONVERSATION_NOT_FOUND"


class MessageNotFound(NotFound):
    reason = "MESSAGE_NOT_FOUND"


class DatasetNotFound(NotFound):
    reason = "DATASET_NOT_FOUND"


class JobNotFound(NotFound):
    reason = "JOB_NOT_FOUND"


class CheckpointNotFound(NotFound):
    reason = "CHECKPOINT_NOT_FOUND"


class AlreadyExists(SlipstreamError):
    """A resource of that name exists."""

    reason = "ALREADY_EXISTS"


class ResourceExists(AlreadyExists):
    reason = "ALREADY_EXISTS"


class RequestIdReused(AlreadyExists):
    """The same request_id came before with a different request."""

    reason = "REQUEST_ID_REUSED"


class FailedPrecondition(SlipstreamError):
    """The system is not in the state the request needs."""

    reason = "WRONG_STATE"


class WrongState(FailedPrecondition):
    reason = "WRONG_STATE"


class IncompatibleAdapter(FailedPrecondition):
    """The adapter does not fit the model it is asked for."""

    reason = "INCOMPATIBLE_ADAPTER"


class UnsafeWeights(FailedPrecondition):
    """Weights that are not safetensors, or a config that asks for remote code."""

    reason = "UNSAFE_WEIGHTS"


class CorruptArtifact(FailedPrecondition):
    """Bytes that do not have the promised hash, length or format."""

    reason = "CORRUPT_ARTIFACT"


class InvalidDataset(FailedPrecondition):
    """A dataset whose rows cannot be trained on."""

    reason = "INVALID_DATASET"


class AliasMissing(FailedPrecondition):
    """A bare adapter name was used, and the adapter has no alias ``live``."""

    reason = "ALIAS_MISSING"


class GateClosed(FailedPrecondition):
    """An alias's gate refuses the version."""

    reason = "GATE_CLOSED"


class MissingDependency(FailedPrecondition):
    """A package that the request needs is not installed on the server."""

    reason = "MISSING_DEPENDENCY"


class ModelLoadFailed(FailedPrecondition):
    """The model's files could not be turned into a running model."""

    reason = "MODEL_LOAD_FAILED"


class SchemaTooNew(FailedPrecondition):
    """The database was written by a newer Slipstream."""

    reason = "SCHEMA_TOO_NEW"


class Aborted(SlipstreamError):
    """Lost a race; read again and retry."""

    reason = "STALE_ETAG"


class StaleEtag(Aborted):
    reason = "STALE_ETAG"


class StaleGeneration(Aborted):
    reason = "STALE_GENERATION"


class FencedOut(Aborted):
    """A newer owner has taken over; this writer's token is stale."""

    reason = "FENCED_OUT"


class ResourceExhausted(SlipstreamError):
    """A bound was reached."""

    reason = "QUOTA_EXCEEDED"


class QueueFull(ResourceExhausted):
    reason = "QUEUE_FULL"


class QuotaExceeded(ResourceExhausted):
    reason = "QUOTA_EXCEEDED"


class MessageTooLarge(ResourceExhausted):
    reason = "MESSAGE_TOO_LARGE"


class OutOfMemory(ResourceExhausted):
    """The device has not enough memory for the request."""

    reason = "OUT_OF_MEMORY"


class StorageFull(ResourceExhausted):
    reason = "STORAGE_FULL"


class SlowReader(ResourceExhausted):
    """The client did not read its stream for longer than the write timeout."""

    reason = "SLOW_READER"


class Unavailable(SlipstreamError):
    """Not now; the same request may succeed later."""

    reason = "DEPENDENCY_UNAVAILABLE"


class Draining(Unavailable):
    reason = "DRAINING"


class ModelNotReady(Unavailable):
    reason = "MODEL_NOT_READY"


class WorkerDied(Unavailable):
    reason = "WORKER_DIED"


class DependencyUnavailable(Unavailable):
    """Another service, or the database, does not answer."""

    reason = "DEPENDENCY_UNAVAILABLE"


class DeadlineExceeded(SlipstreamError):
    reason = "DEADLINE_EXCEEDED"


class Cancelled(SlipstreamError):
    reason = "CANCELLED"


class Unauthenticated(SlipstreamError):
    reason = "UNAUTHENTICATED"


class PermissionDenied(SlipstreamError):
    reason = "PERMISSION_DENIED"


class Unimplemented(SlipstreamError):
    """The method exists in the contract; this build does not answer it yet."""

    reason = "METHOD_NOT_IMPLEMENTED"


class InternalError(SlipstreamError):
    """Anything unforeseen. The message is generic; the details are in the log under the id it names."""

    reason = "INTERNAL"
