"""Sounds from callers' bytes: one channel of float32 samples at the rate a model wants.

Containers are told apart by their first bytes and read by libsndfile, block by block, so that a small file that unpacks
into hours is refused before it does; no program is started and nothing is fetched. Runs on a helper thread.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import AudioInput

MAX_AUDIO_BYTES = 15 * 1024 * 1024
MAX_AUDIO_S = 1800.0
MIN_AUDIO_S = 0.025
"""Shorter ones have less than one frame of the usual acoustic models."""
MAX_RATE_HZ = 384_000
MAX_CHANNELS = 8
MAX_FRAMES = 100_000_000
MAX_AMPLITUDE = 2.0
"""Raw samples are -1 to 1; resampling on the caller's side overshoots that a little."""

_BLOCK_FRAMES = 1 << 18
_CONTAINERS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "MPEG")
_SIZE_UNKNOWN = (0, 0xFFFFFFFF)


def decode_sound(sound: AudioInput, rate_hz: int, field: str) -> np.ndarray:
    """Samples of shape [time], float32, at ``rate_hz``; raises InvalidField with the field at fault."""
    data_field = f"{field}.data"
    if not 0 < len(sound.data) <= MAX_AUDIO_BYTES:
        raise InvalidField.of(data_field, f"{len(sound.data)} bytes; 1 to {MAX_AUDIO_BYTES} are allowed")
    if sound.encoding == "container":
        samples_T, own_rate_hz = _read_container(sound.data, data_field)
    else:
        samples_T, own_rate_hz = _read_raw(sound, field), sound.sampling_rate_hz
    _check_length(len(samples_T), own_rate_hz, data_field)
    if not np.isfinite(samples_T).all():
        raise InvalidField.of(data_field, "holds samples that are not finite")
    return _resample(samples_T, own_rate_hz, rate_hz)


def _read_raw(sound: AudioInput, field: str) -> np.ndarray:
    """Rate and length are judged before a sample is looked at."""
    rate_hz = sound.sampling_rate_hz
    if not 1 <= rate_hz <= MAX_RATE_HZ:
        raise InvalidField.of(f"{field}.sampling_rate_hz", f"{rate_hz}; 1 to {MAX_RATE_HZ} are allowed")
    width = 4 if sound.encoding == "pcm_f32le" else 2
    if len(sound.data) % width:
        raise InvalidField.of(f"{field}.data", f"{len(sound.data)} bytes are no whole number of {width}-byte samples")
    if width == 2:
        return np.frombuffer(sound.data, dtype="<i2").astype(np.float32) / 32768.0
    samples_T = np.frombuffer(sound.data, dtype="<f4").astype(np.float32)
    if np.abs(samples_T).max(initial=0.0) > MAX_AMPLITUDE:  # NaN compares false and is named by the caller
        raise InvalidField.of(f"{field}.data", f"holds samples beyond {MAX_AMPLITUDE}; they run from -1 to 1")
    return samples_T


def _read_container(data: bytes, field: str) -> tuple[np.ndarray, int]:
    import soundfile

    if not _is_container(data):
        raise InvalidField.of(field, "is no WAV, FLAC, OGG or MP3 file")
    _check_riff(data, field)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_container(file, field)
            samples_T = np.concatenate(list(_blocks(file, field)) or [np.zeros(0, np.float32)])
            if file.format == "FLAC" and len(samples_T) != file.frames:
                raise InvalidField.of(field, f"is cut off after {len(samples_T)} of {file.frames} samples")
            return samples_T, int(file.samplerate)
    except (soundfile.SoundFileError, RuntimeError, ValueError, OverflowError, MemoryError) as error:
        raise InvalidField.of(field, f"the sound is damaged or cut off ({type(error).__name__})") from None


def _is_container(data: bytes) -> bool:
    is_wave = data[:4] == b"RIFF" and data[8:12] == b"WAVE"
    is_mp3 = data[:3] == b"ID3" or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0)
    return is_wave or is_mp3 or data[:4] in (b"fLaC", b"OggS")


def _check_riff(data: bytes, field: str) -> None:
    """libsndfile reads what is there of a WAV file that is cut off; its header says how much there should be."""
    if data[:4] != b"RIFF":
        return
    declared = int.from_bytes(data[4:8], "little")
    if declared not in _SIZE_UNKNOWN and declared + 8 > len(data) + 1:  # the last byte may be padding
        raise InvalidField.of(field, f"is cut off: {len(data)} of {declared + 8} bytes")


def _check_container(file: Any, field: str) -> None:
    if file.format not in _CONTAINERS:
        raise InvalidField.of(field, f"is a {file.format} file; WAV, FLAC, OGG and MP3 are read")
    if not 1 <= file.samplerate <= MAX_RATE_HZ:
        raise InvalidField.of(field, f"{file.samplerate} samples a second; 1 to {MAX_RATE_HZ} are allowed")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise InvalidField.of(field, f"{file.channels} channels; 1 to {MAX_CHANNELS} are allowed")


def _blocks(file: Any, field: str) -> Iterator[np.ndarray]:
    """One channel, block by block; stops a file that goes on for too long. What the header says is not trusted."""
    num_frames = 0
    while True:
        block_TC = file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)
        if not len(block_TC):
            return
        num_frames += len(block_TC)
        _check_not_too_long(num_frames, int(file.samplerate), field)
        yield block_TC.mean(axis=1)


def _check_not_too_long(num_frames: int, rate_hz: int, field: str) -> None:
    if num_frames > MAX_FRAMES or num_frames > MAX_AUDIO_S * rate_hz:
        raise InvalidField.of(
            field, f"is longer than {MAX_AUDIO_S:.0f} s or {MAX_FRAMES} samples, the most that is allowed"
        )


def _check_length(num_frames: int, rate_hz: int, field: str) -> None:
    _check_not_too_long(num_frames, rate_hz, field)
    if num_frames < MIN_AUDIO_S * rate_hz:
        raise InvalidField.of(field, f"{num_frames / rate_hz:.4f} s; at least {MIN_AUDIO_S} s are needed")


def _resample(samples_T: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    if from_hz == to_hz:
        return samples_T
    import soxr

    return np.asarray(soxr.resample(samples_T, from_hz, to_hz, quality="HQ"), dtype=np.float32)
