"""The runner on a tiny model: what it teaches, tells and leaves behind, and what it does when something goes wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from slipstream_server.errors import InvalidDataset
from slipstream_server.training.checkpoints import last_complete_checkpoint, list_checkpoint_folders
from slipstream_server.training.events import Checkpoint, Evaluation, Failed, Finished, Progress, Started, Stopped
from slipstream_server.training.failures import ExitStatus
from slipstream_server.training.job_folder import JobFolder
from slipstream_server.training.recipe import TrainingRecipe, parse_recipe
from slipstream_server.training.result import TrainingResult, read_result

from .conftest import TEMPLATE, MakeJob, RunHere, conversation, events

pytestmark = pytest.mark.timeout(300)


def recipe_of(folder: JobFolder) -> TrainingRecipe:
    return parse_recipe(folder.recipe.read_bytes())


def change_recipe(folder: JobFolder, **values: object) -> None:
    document = json.loads(folder.recipe.read_bytes())
    folder.recipe.write_text(json.dumps({**document, **values}))


def result_of(folder: JobFolder) -> TrainingResult:
    result = read_result(folder.result)
    assert result is not None
    return result


def failure_of(folder: JobFolder, attempt: int = 1) -> Failed:
    last = events(folder, attempt)[-1]
    assert isinstance(last, Failed)
    return last


def test_whole_job_is_told_from_start_to_result(make_job: MakeJob, run_here: RunHere) -> None:
    job = make_job(evaluation_interval_steps=6)
    assert run_here(job) == ExitStatus.FINISHED
    told = events(job)
    assert isinstance(told[0], Started)
    assert (told[0].num_train_examples, told[0].num_held_out_examples, told[0].total_steps) == (32, 8, 12)
    assert [event.step for event in told if isinstance(event, Evaluation)] == [0, 6, 12]
    assert [event.step for event in told if isinstance(event, Progress)] == [3, 4, 6, 8, 9, 12]
    assert [event.step for event in told if isinstance(event, Checkpoint)] == [4, 8, 12]
    assert isinstance(told[-1], Finished)
    result = result_of(job)
    assert result.eval_loss_before is not None
    assert result.eval_loss_after is not None
    assert result.eval_loss_after < 0.8 * result.eval_loss_before
    assert result.steps == 12
    progress = [event for event in told if isinstance(event, Progress)]
    assert all(event.tokens_per_second > 0 and event.grad_norm and event.loss for event in progress)
    assert (progress[-1].eta_s, progress[-1].epoch) == (0, 1.5)


def test_adapter_is_two_portable_files_with_the_digests_told(make_job: MakeJob, run_here: RunHere) -> None:
    job = make_job(max_steps=1)
    run_here(job)
    files = {file.name: file.sha256 for file in result_of(job).files}
    on_disk = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in job.adapter.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert files == on_disk
    config = json.loads((job.adapter / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "acme/tiny"
    modules = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["target_modules"], config["r"], config["lora_alpha"]) == (modules, 8, 16)
    assert str(job.path.parent) not in (job.adapter / "adapter_config.json").read_text()


def test_same_recipe_gives_the_same_bytes(make_job: MakeJob, run_here: RunHere) -> None:
    first, second = make_job("first", max_steps=3), make_job("second", max_steps=3)
    run_here(first)
    run_here(second)
    assert result_of(first).files == result_of(second).files


def reference_loss(folder: Path, rows: list[dict[str, Any]]) -> float:
    """Mean loss over the answers' tokens, each row alone and unpadded, with losses looked up in log-probabilities."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, count = 0.0, 0
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        prompt = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
        learnt = tokenizer(f"{answer}<|im_end|>").input_ids
        with torch.no_grad():
            log_probabilities = model(torch.tensor([prompt + learnt])).logits[0].log_softmax(-1)
        for place, token in enumerate(learnt, start=len(prompt)):
            total -= log_probabilities[place - 1, token].item()
        count += len(learnt)
    return total / count


def test_base_evaluation_equals_the_plain_model_row_by_row(
    make_job: MakeJob, run_here: RunHere, tiny_model: Path, tmp_path: Path
) -> None:
    """Rows of unequal lengths in padded batches of unequal sizes: neither padding nor batching may show."""
    rows = [conversation("q" * (1 + 3 * place), "answer" * (1 + 2 * (place % 3))) for place in range(7)]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = make_job(max_steps=1, max_length=200)
    change_recipe(job, eval_file=str(held_out))
    run_here(job)
    assert result_of(job).eval_loss_before == pytest.approx(reference_loss(tiny_model, rows), abs=1e-5)


def test_batch_is_padded_right_and_masked_by_length() -> None:
    """Worked out by hand; the padding id is also a real token of both rows."""
    from slipstream_server.training.dataset import PaddedCollator

    batch = PaddedCollator(pad_token_id=1)(
        [
            {"token_ids": [5, 1, 6, 1], "loss_mask": [0, 0, 1, 1]},
            {"token_ids": [7, 1], "loss_mask": [0, 1]},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 1, 6, 1], [7, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 1], [-100, 1, -100, -100]]


def test_runner_masks_as_a_hand_does(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from slipstream_server.training.examples import Example, make_example
    from slipstream_server.training.model import ModelTokenizer
    from slipstream_server.training.rows import ConversationRow, Message

    own = AutoTokenizer.from_pretrained(tiny_model)
    assert own.chat_template == TEMPLATE
    turns = (Message(role="user", content="é?"), Message(role="assistant", content="ok"))
    row = ConversationRow(line=1, messages=turns)
    example = make_example(row, ModelTokenizer(own, frozenset()), max_length=64)
    assert isinstance(example, Example)
    # é is two bytes: start and "user\n" are 6 tokens, "é?" 3, end and "\n" 2, start and "assistant\n" 11;
    # then o, k, end; then "\n"
    assert example.loss_mask == (False,) * 22 + (True,) * 3 + (False,)
    assert example.token_ids[22:25] == tuple(own.convert_tokens_to_ids(["o", "k", "<|im_end|>"]))


def stop_after_first(kind: type, job: JobFolder, attempt: int = 1) -> threading.Thread:
    """Sends this process SIGTERM once an event of ``kind`` is in the spool."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if any(isinstance(event, kind) for event in events(job, attempt)):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_stopped_training_goes_on_as_if_nothing_had_happened(make_job: MakeJob, run_here: RunHere) -> None:
    settings = {"max_steps": 60, "checkpoint_interval_steps": 1000, "logging_interval_steps": 7}
    whole, parts = make_job("whole", **settings), make_job("parts", **settings)
    assert run_here(whole) == ExitStatus.FINISHED

    watcher = stop_after_first(Progress, parts)
    assert run_here(parts) == ExitStatus.STOPPED
    watcher.join()
    stopped = events(parts)[-1]
    assert isinstance(stopped, Stopped)
    assert 7 <= stopped.step < 60
    assert stopped.checkpoint == f"checkpoint-{stopped.step}"
    assert not parts.result.exists()

    assert run_here(parts, 2) == ExitStatus.FINISHED
    started = events(parts, 2)[0]
    assert isinstance(started, Started)
    assert started.resumed_from_step == stopped.step
    assert [event.step for event in events(parts, 2) if isinstance(event, Evaluation)] == [60]
    expected, found = result_of(whole), result_of(parts)
    assert found.files == expected.files
    assert found.train_loss == pytest.approx(expected.train_loss, abs=1e-6)
    assert (found.eval_loss_before, found.eval_loss_after) == (expected.eval_loss_before, expected.eval_loss_after)
    assert (found.num_tokens, found.steps) == (expected.num_tokens, expected.steps)


def test_broken_newest_checkpoint_costs_only_its_steps(make_job: MakeJob, run_here: RunHere) -> None:
    job = make_job(keep_checkpoints=3)
    run_here(job)
    expected = result_of(job)
    job.result.unlink()
    newest = list_checkpoint_folders(job.checkpoints)[-1]
    (newest / "optimizer.pt").write_bytes(b"half")
    assert run_here(job, 2) == ExitStatus.FINISHED
    started = events(job, 2)[0]
    assert isinstance(started, Started)
    assert started.resumed_from_step == 8
    assert result_of(job).files == expected.files
    last = last_complete_checkpoint(job.checkpoints, recipe_digest=recipe_of(job).digest())
    assert last is not None
    assert last.step == 12


def test_checkpoint_of_the_last_step_leaves_nothing_to_train(make_job: MakeJob, run_here: RunHere) -> None:
    """13 rows of 4 do not divide evenly into epochs, where a step too many would go unnoticed."""
    job = make_job(max_steps=11, batch_size_per_device=3)
    run_here(job)
    expected = result_of(job)
    job.result.unlink()
    assert run_here(job, 2) == ExitStatus.FINISHED
    assert not any(isinstance(event, Progress) for event in events(job, 2))
    assert (result_of(job).files, result_of(job).steps) == (expected.files, 11)
    assert result_of(job).eval_loss_after == expected.eval_loss_after


def test_attempt_that_finds_a_result_only_says_so(make_job: MakeJob, run_here: RunHere) -> None:
    job = make_job(max_steps=1)
    run_here(job)
    assert run_here(job, 2) == ExitStatus.FINISHED
    (only,) = events(job, 2)
    assert isinstance(only, Finished)


def test_second_runner_in_the_folder_is_refused(make_job: MakeJob, run_here: RunHere) -> None:
    import fcntl

    job = make_job()
    with (job.path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run_here(job) == ExitStatus.FAILED
    assert failure_of(job).reason == "WRONG_STATE"


def test_row_that_cannot_be_trained_on_is_named(make_job: MakeJob, run_here: RunHere) -> None:
    job = make_job()
    train = Path(recipe_of(job).train_file)
    lines = train.read_text().splitlines()
    lines[16] = '{"messages": [{"role": "user", "content": "no answer"}]}'
    train.write_text("\n".join(lines))
    assert run_here(job) == ExitStatus.INVALID
    failure = failure_of(job)
    assert failure.reason == InvalidDataset.reason
    assert failure.message.startswith("line 17, messages: ")


@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        (
            {"adapter": {"target_modules": ["q_proj", "nonsense"]}},
            "INVALID_FIELD",
            "'nonsense'; it has down_proj, gate_proj",
        ),
        ({"world_size": 2}, "INVALID_FIELD", "expects 2 processes, the launcher started 1"),
        ({"hyperparameters": {"max_length": 4096}}, "INVALID_FIELD", "4096 exceeds the model's context of 256"),
        ({"base_model_folder": "/nowhere/at/all"}, "MODEL_LOAD_FAILED", "acme/tiny could not be loaded"),
        ({"train_file": "/nowhere/at/all"}, "INVALID_DATASET", "No such file"),
        ({"hyperparameters": {"learning_rate": 7}}, "INVALID_FIELD", "learning_rate: 7.0 is not above 0"),
        ({"unknown": 1}, "INVALID_FIELD", "unknown"),
    ],
)
def test_what_the_runner_cannot_do_is_told_without_a_path(
    make_job: MakeJob, run_here: RunHere, changes: dict[str, object], reason: str, text: str
) -> None:
    job = make_job()
    change_recipe(job, **changes)
    assert run_here(job) != ExitStatus.FINISHED
    failure = failure_of(job)
    assert failure.reason == reason
    assert text in failure.message
    assert "/nowhere" not in failure.message


def test_training_that_leaves_the_numbers_fails(make_job: MakeJob, run_here: RunHere) -> None:
    job = make_job(learning_rate=1.0, max_grad_norm=1e6, max_steps=400, logging_interval_steps=1)
    from slipstream_server.training import loop

    original = loop._Telling.on_log

    def poisoned(self: Any, args: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
        if "loss" in logs and state.global_step == 3:
            logs["loss"] = float("nan")
        original(self, args, state, control, logs, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Telling, "on_log", poisoned)
        assert run_here(job) == ExitStatus.INVALID
    assert "not a finite number at step 3" in failure_of(job).message


def test_full_disk_is_told_and_leaves_the_last_good_checkpoint(
    make_job: MakeJob, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slipstream_server.training import loop

    original = loop.complete_checkpoint

    def full_at_eight(path: Path, **rest: Any) -> Any:
        if path.name == "checkpoint-8":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, **rest)

    job = make_job()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "complete_checkpoint", full_at_eight)
        assert run_here(job) == ExitStatus.STORAGE_FULL
    assert failure_of(job).reason == "STORAGE_FULL"
    assert [path.name for path in list_checkpoint_folders(job.checkpoints)] == ["checkpoint-4"]
    assert run_here(job, 2) == ExitStatus.FINISHED


def test_memory_that_runs_out_is_told(make_job: MakeJob, run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import Trainer

    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(Trainer, "training_step", no_memory)
    job = make_job()
    assert run_here(job) == ExitStatus.OUT_OF_MEMORY
    assert failure_of(job).reason == "OUT_OF_MEMORY"
