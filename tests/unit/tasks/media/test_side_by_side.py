"""Pictures are prepared and answered beside one another: a large one holds nobody up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream_server.tasks.items import ImageInput
from slipstream_server.tasks.media.runners import media_runner
from unit.tasks.media import tiny_media as tiny


def test_a_picture_is_answered_while_another_is_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner: Any = media_runner("image-classification", tiny.vit(tmp_path), tmp_path, torch.device("cpu"))
    large, small = ImageInput(tiny.png(1, 400, 400)), ImageInput(tiny.png(2))
    with torch.inference_mode():
        raw = runner.run(runner.prepare(small, {}))
    preprocess: Callable[..., Any] = runner._pipeline.preprocess
    has_begun, may_end = threading.Event(), threading.Event()

    def slowly(picture: Any, **how: Any) -> Any:
        has_begun.set()
        assert may_end.wait(60)
        return preprocess(picture, **how)

    with ThreadPoolExecutor(2) as threads, monkeypatch.context() as patch:
        patch.setattr(runner._pipeline, "preprocess", slowly)
        prepared = threads.submit(runner.prepare, large, {})
        assert has_begun.wait(60)
        try:
            answered = threads.submit(runner.finish, small, {}, raw).result(timeout=20)
            assert not prepared.done()
        finally:
            may_end.set()
        assert len(prepared.result(timeout=60)) == 1
    assert {label.label for label in answered.labels} == {"cat", "dog", "bird"}
