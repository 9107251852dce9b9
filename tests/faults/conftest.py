"""Models for the fault tests: a tiny real one, and a context so large that the engine that does nothing never ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def boundless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("boundless") / "boundless", context_tokens=4_000_000)
