"""What a job's events come to, and the curve drawn of it."""

from datetime import UTC, datetime

from slipstream_client.cli.job_lines import in_time, line_of, loss_in_words
from slipstream_client.cli.job_story import JobStory
from slipstream_client.cli.loss_plot import loss_plot
from slipstream_client.job_events import (
    AttemptStarted,
    EvaluationCompleted,
    EvaluationStarted,
    JobEvent,
    MetricsLogged,
    StateChanged,
    TrainingProgress,
)


def event(payload, attempt=1):
    return JobEvent(sequence=1, attempt=attempt, time=datetime.now(UTC), kind="", payload=payload)


def logged(step, loss):
    return MetricsLogged(
        step=step, epoch=0.5, loss=loss, learning_rate=1e-3, gradient_norm=None, tokens_per_second=10.0,
        peak_memory_bytes=0, metrics={},
    )  # fmt: skip


def evaluated(step, loss):
    return EvaluationCompleted(
        step=step, epoch=0, metrics={"eval_loss": loss}, row_count=5, duration_s=None, best=False
    )


def started(resumed_step):
    return AttemptStarted(
        resumed_step=resumed_step, process_count=1, devices=("cpu",), trainable_parameter_count=0, parameter_count=0,
        total_steps=20, train_row_count=10, evaluation_row_count=5, data_type="float32",
    )  # fmt: skip


def told(*payloads):
    story = JobStory()
    for payload in payloads:
        story.take(event(payload))
    return story


def test_curves_and_progress():
    progress = TrainingProgress(
        step=4, total_steps=20, epoch=0.4, loss=1.0, learning_rate=None, trained_token_count=0,
        tokens_per_second=None, remaining_duration_s=30.0, evaluated_row_count=0,
    )  # fmt: skip
    story = told(evaluated(0, 3.0), started(0), logged(2, 2.5), logged(4, None), progress, evaluated(4, 2.0))
    assert (story.losses, story.held_out) == ([(2, 2.5)], [(0, 3.0), (4, 2.0)])
    assert (story.step, story.total_steps, story.remaining_s, story.loss) == (4, 20, 30.0, 2.5)


def test_a_new_attempt_takes_back_what_came_after_its_checkpoint():
    story = told(started(0), evaluated(0, 3.0), logged(2, 2.5), logged(8, 2.0), evaluated(8, 2.0), started(5))
    assert (story.losses, story.held_out, story.step) == ([(2, 2.5)], [(0, 3.0)], 5)


def test_an_evaluation_runs_between_its_two_events():
    story = told(EvaluationStarted(step=0, row_count=24))
    assert (story.is_evaluating, story.evaluation_rows) == (True, 24)
    story.take(event(evaluated(0, 3.0)))
    assert not story.is_evaluating


def test_steps_are_lines_only_where_they_are_asked_for():
    step = event(logged(2, 2.5))
    assert line_of(step, with_metrics=False) is None
    assert "2 · loss 2.5000" in line_of(step, with_metrics=True).plain
    assert "not finite" in line_of(event(logged(2, None)), with_metrics=True).plain
    state = StateChanged(previous_state="", state="queued", state_message="waiting for [cpu]", error=None)
    assert line_of(event(state), with_metrics=False).plain.endswith("waiting for [cpu]")
    assert line_of(event(None), with_metrics=True) is None


def test_the_curve_has_its_size_and_falls_from_left_to_right():
    plot = loss_plot([(step, 3.0 - step / 10) for step in range(1, 21)], [(0, 3.5), (20, 1.2)], width=60, height=12)
    lines = plot.plain.splitlines()
    assert len(lines) == 12
    assert max(map(len, lines)) <= 60
    braille = [(x, y) for y, line in enumerate(lines) for x, letter in enumerate(line) if "⠁" <= letter <= "⣿"]
    assert min(braille)[1] < max(braille)[1]
    assert plot.plain.count("•") == 2
    assert lines[-1].split() == ["0", "4", "8", "12", "16", "20"]


def test_a_single_point_is_drawn():
    assert loss_plot([(1, 2.0)], [], width=40, height=10).plain.strip()


def test_in_words():
    assert (in_time(72.4), in_time(7383)) == ("1:12", "2:03:03")
    assert loss_in_words(3.0, 1.5) == "held-out loss 3.000 → 1.500 (-50%)"
    assert (loss_in_words(None, 1.5), loss_in_words(3.0, None)) == ("held-out loss 1.500", "")
