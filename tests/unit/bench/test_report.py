"""What a benchmark's line says of the code that was measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.bench import report
from tests.bench.report import Comparison, commit_of, keep

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *words: str) -> str:
    author = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
    ran = subprocess.run(["git", "-C", str(folder), *author, *words], check=True, capture_output=True, text=True)
    return ran.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a file of the product and one beside it."""
    for name in ("services/engine.py", "tests/bench/results.jsonl"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "all of it")
    return tmp_path


@needs_git
def test_the_commit_is_the_one_that_is_checked_out(checkout: Path) -> None:
    assert commit_of(checkout) == git(checkout, "log", "-1", "--format=%h")


@needs_git
def test_a_plus_says_that_the_product_has_changed_since(checkout: Path) -> None:
    clean = commit_of(checkout)
    (checkout / "tests/bench/results.jsonl").write_text("2\n")
    assert commit_of(checkout) == clean
    (checkout / "services/engine.py").write_text("2\n")
    assert commit_of(checkout) == f"{clean}+"
    git(checkout, "add", ".")
    assert commit_of(checkout) == f"{clean}+"


@needs_git
def test_a_copy_without_a_repository_has_no_commit(checkout: Path) -> None:
    assert commit_of(checkout / "services") == "unknown"
    (checkout / "services" / ".git").mkdir()  # none that git knows
    (checkout / ".git").rename(checkout / "gone")
    assert commit_of(checkout / "services") == "unknown"


@needs_git
def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert commit_of(checkout) == "unknown"


def test_kept_lines_carry_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS_FOLDER", tmp_path)
    monkeypatch.setattr(report, "COMMIT", "abc1234+")
    comparison = Comparison(
        bench="engine",
        workload="closed",
        side="ours",
        versus="theirs",
        ours=[3.0],
        theirs=[2.0],
        unit="tokens/s",
        seed=1,
        device="cpu",
        dtype="float32",
    )
    keep(comparison.line())
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text())["commit"] == "abc1234+"
