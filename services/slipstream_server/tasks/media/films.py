"""Frames from callers' films. The container is told apart by its first bytes and named to the decoder, so that nothing
that refers to other files or addresses (playlists, concatenations) is ever parsed. Runs on a helper thread.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from slipstream_server.errors import InvalidField

MAX_FILM_BYTES = 15 * 1024 * 1024
MAX_FRAME_PIXELS = 9_000_000
MAX_KEPT_BYTES = 512 * 1024 * 1024
MAX_DECODED_PIXELS = 4_000_000_000


def decode_film(data: bytes, indices: Sequence[int], field: str) -> np.ndarray:
    """The frames at ``indices`` (rising, counted from 0) as uint8 [frames, height, width, 3]; raises InvalidField."""
    import av

    if not 0 < len(data) <= MAX_FILM_BYTES:
        raise InvalidField.of(field, f"{len(data)} bytes; 1 to {MAX_FILM_BYTES} are allowed")
    container = _container(data)
    if container is None:
        raise InvalidField.of(field, "is no MP4, WebM, Matroska or AVI film")
    try:
        with av.open(io.BytesIO(data), mode="r", format=container, metadata_errors="ignore") as film:
            if not film.streams.video:
                raise InvalidField.of(field, "has no picture")
            return _frames(film, indices, field)
    except (av.FFmpegError, ValueError, EOFError) as error:
        raise InvalidField.of(field, f"the film is damaged or cut off ({type(error).__name__})") from None


def _container(data: bytes) -> str | None:
    """The decoder's name of the container."""
    if data[4:8] == b"ftyp":
        return "mov"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    return "avi" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else None


def _frames(film: Any, indices: Sequence[int], field: str) -> np.ndarray:
    stream = film.streams.video[0]
    stream.thread_count = 1
    _check_size(stream.codec_context.width, stream.codec_context.height, indices, field)
    wanted, kept, num_frames = set(indices), [], 0
    for frame in film.decode(stream):
        # A film may change its size midway.
        _check_size(frame.width, frame.height, indices, field)
        if num_frames in wanted:
            kept.append(frame.to_ndarray(format="rgb24"))
        num_frames += 1
        if num_frames > indices[-1]:
            return np.stack(kept)
    raise InvalidField.of(field, f"has {num_frames} frames; {indices[-1] + 1} are needed")


def _check_size(width: int, height: int, indices: Sequence[int], field: str) -> None:
    pixels = width * height
    if not 0 < pixels <= MAX_FRAME_PIXELS:
        raise InvalidField.of(field, f"frames of {width} x {height} pixels; 1 to {MAX_FRAME_PIXELS} are allowed")
    if pixels * 3 * len(indices) > MAX_KEPT_BYTES or pixels * (indices[-1] + 1) > MAX_DECODED_PIXELS:
        raise InvalidField.of(field, f"{len(indices)} frames of {width} x {height} pixels are too many; ask for fewer")
