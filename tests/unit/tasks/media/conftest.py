"""Tiny models are made once for each file of tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unit.tasks.media import tiny_media as tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tiny.Maker], tuple[Any, Path]]:
    kept: dict[tiny.Maker, tuple[Any, Path]] = {}

    def make(maker: tiny.Maker) -> tuple[Any, Path]:
        if maker not in kept:
            folder = tmp_path_factory.mktemp(maker.__name__)
            kept[maker] = (maker(folder), folder)
        return kept[maker]

    return make
