"""What a job's events come to: its state, how far it is, and its curves. No terminal, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from slipstream_client.job_events import (
    AttemptStarted,
    EvaluationCompleted,
    EvaluationStarted,
    JobEvent,
    MetricsLogged,
    StateChanged,
    TrainingProgress,
)

Point = tuple[int, float]


@dataclass(slots=True)
class JobStory:
    """A job as far as its events have told. Losses are in nats; ``remaining_s`` None while unknown."""

    state: str = ""
    state_message: str = ""
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    remaining_s: float | None = None
    attempt: int = 0
    is_evaluating: bool = False
    evaluated_rows: int = 0
    evaluation_rows: int = 0
    losses: list[Point] = field(default_factory=list)
    held_out: list[Point] = field(default_factory=list)

    @property
    def loss(self) -> float | None:
        """The last training loss."""
        return self.losses[-1][1] if self.losses else None

    def take(self, event: JobEvent) -> None:
        """Let the story go on by one event."""
        self.attempt = max(self.attempt, event.attempt)
        match event.payload:
            case StateChanged() as changed:
                self.state, self.state_message = changed.state, changed.state_message
            case AttemptStarted() as started:
                self._begin_attempt(started)
            case TrainingProgress() as progress:
                self._progress(progress)
            case MetricsLogged() as logged:
                self._metrics(logged)
            case EvaluationStarted() as started:
                self.is_evaluating, self.evaluated_rows, self.evaluation_rows = True, 0, started.row_count
            case EvaluationCompleted() as evaluated:
                self.is_evaluating = False
                if (loss := evaluated.metrics.get("eval_loss")) is not None:
                    self.held_out.append((evaluated.step, loss))

    def _begin_attempt(self, started: AttemptStarted) -> None:
        """What came after the step from which a new attempt goes on did not happen to the result."""
        self.total_steps = started.total_steps or self.total_steps
        self.step = started.resumed_step
        self.remaining_s = None
        self.losses = [point for point in self.losses if point[0] <= started.resumed_step]
        self.held_out = [point for point in self.held_out if point[0] <= started.resumed_step]

    def _progress(self, progress: TrainingProgress) -> None:
        self.step = progress.step
        self.total_steps = progress.total_steps or self.total_steps
        self.epoch = progress.epoch
        self.remaining_s = progress.remaining_duration_s
        self.evaluated_rows = progress.evaluated_row_count
        if progress.tokens_per_second is not None:
            self.tokens_per_second = progress.tokens_per_second

    def _metrics(self, logged: MetricsLogged) -> None:
        self.step, self.epoch = max(self.step, logged.step), logged.epoch
        self.learning_rate, self.tokens_per_second = logged.learning_rate, logged.tokens_per_second
        if logged.loss is not None:
            self.losses.append((logged.step, logged.loss))
