"""Bytes that are no picture, sound or film, or too much of one: typed errors, and memory that stays small."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slipstream_server.errors import InvalidField, InvalidRequest
from slipstream_server.tasks.items import AudioInput
from slipstream_server.tasks.media.films import decode_film
from slipstream_server.tasks.media.images import decode_image
from slipstream_server.tasks.media.sounds import decode_sound
from unit.tasks.media import tiny_media as tiny


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb(width: int, height: int) -> bytes:
    """A small PNG file that says it is large, and unpacks into whatever its rows need."""
    rows = zlib.compress(bytes(min(height * (width + 1), 50_000_000)), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(format_: str, **options: Any) -> bytes:
    file = io.BytesIO()
    tiny.picture(1, 64, 48).save(file, format=format_, **options)
    return file.getvalue()


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'

PICTURES = {
    "empty": lambda: b"",
    "text": lambda: b"hello there, this is no picture",
    "svg": lambda: SVG,
    "tiff": lambda: encoded("TIFF"),
    "pdf": lambda: encoded("PDF"),
    "ico": lambda: encoded("ICO"),
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "bomb": lambda: bomb(50_000, 50_000),
    "over 64 megapixels": lambda: bomb(8_001, 8_001),
    "no width": lambda: bomb(0, 10),
    "both empty": lambda: bomb(0, 0),
    "2^31 wide": lambda: bomb(2**31 - 1, 2**31 - 1),
    "one row": lambda: bomb(60_000, 1),
    "half a jpeg": lambda: encoded("JPEG")[:500],
    "half a png": lambda: encoded("PNG")[:-400],
    "half a webp": lambda: encoded("WEBP")[:200],
    "png header alone": lambda: encoded("PNG")[:20],
    "bytes flipped": lambda: (lambda b: b[:200] + bytes(255 - x for x in b[200:300]) + b[300:])(encoded("PNG")),
    "too many bytes": lambda: encoded("PNG") + bytes(15 * 1024 * 1024),
    "svg after a png signature": lambda: b"\x89PNG\r\n\x1a\n" + SVG,
    "zip behind gif": lambda: b"GIF89a" + b"PK\x03\x04" + bytes(40),
}


def peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_refused(name: str) -> None:
    data = PICTURES[name]()

    def refused() -> None:
        with pytest.raises(InvalidField) as caught:
            decode_image(data, "image.data")
        assert caught.value.violations[0].field == "image.data"
        assert "/" not in caught.value.message.replace("and/or", "")

    assert peak_bytes(refused) < 64 * 1024 * 1024


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_pictures_that_are_read(format_: str) -> None:
    image = decode_image(encoded(format_), "image.data")
    assert (image.mode, image.size) == ("RGB", (64, 48))
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(tiny.picture(1, 64, 48)).astype(int))
    assert difference.mean() < (25 if format_ in ("JPEG", "WEBP", "GIF") else 0.001)


def test_orientation_transparency_and_palettes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    assert decode_image(encoded("JPEG", exif=exif), "image.data").size == (48, 64)
    for mode in ("RGBA", "LA", "L", "P", "1"):
        file = io.BytesIO()
        tiny.picture(1).convert(mode).save(file, format="PNG")
        assert decode_image(file.getvalue(), "image.data").mode == "RGB"


def test_gif_gives_its_first_frame() -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:])
    assert decode_image(file.getvalue(), "image.data").getpixel((3, 3)) == (255, 0, 0)


def pcm(samples: Any, **more: Any) -> AudioInput:
    return AudioInput(data=np.asarray(samples, "<f4").tobytes(), encoding="pcm_f32le", **more)


def flac_of_silence(seconds: int) -> bytes:
    return tiny.wav(np.zeros(seconds * 8000, np.float32), 8000, "FLAC")


def changed(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


GOOD = tiny.wav(tiny.tone(1))
SOUNDS: dict[str, tuple[Callable[[], AudioInput], str]] = {
    "empty": (lambda: AudioInput(data=b""), "data"),
    "text": (lambda: AudioInput(data=b"this is no sound at all, really"), "data"),
    "picture": (lambda: AudioInput(data=tiny.png(1)), "data"),
    "playlist": (lambda: AudioInput(data=b"#EXTM3U\nfile:///etc/passwd\n"), "data"),
    "aiff": (lambda: AudioInput(data=tiny.wav(tiny.tone(1), 16000, "AIFF")), "data"),
    "half a wav": (lambda: AudioInput(data=GOOD[: len(GOOD) // 2]), "data"),
    "wav header alone": (lambda: AudioInput(data=GOOD[:30]), "data"),
    "wav of 255 channels": (lambda: AudioInput(data=changed(GOOD, 22, b"\xff\x00")), "data"),
    "wav at 10^9 Hz": (lambda: AudioInput(data=changed(GOOD, 24, struct.pack("<I", 10**9))), "data"),
    "wav at 0 Hz": (lambda: AudioInput(data=changed(GOOD, 24, bytes(4))), "data"),
    "half a flac": (lambda: AudioInput(data=flac_of_silence(2)[:-40]), "data"),
    "an hour in a small flac": (lambda: AudioInput(data=flac_of_silence(3600)), "data"),
    "mp3 frame and rubbish": (lambda: AudioInput(data=b"\xff\xfb" + bytes(range(256)) * 4), "data"),
    "nan": (lambda: pcm([0.0] * 800 + [float("nan")], sampling_rate_hz=16000), "data"),
    "infinity": (lambda: pcm([0.0] * 800 + [float("inf")], sampling_rate_hz=16000), "data"),
    "far too loud": (lambda: pcm([1e30] * 800, sampling_rate_hz=16000), "data"),
    "odd bytes": (lambda: AudioInput(data=bytes(1001), encoding="pcm_s16le", sampling_rate_hz=8000), "data"),
    "no rate": (lambda: pcm([0.0] * 800), "sampling_rate_hz"),
    "10^9 Hz": (lambda: pcm([0.0] * 800, sampling_rate_hz=10**9), "sampling_rate_hz"),
    "negative rate": (lambda: pcm([0.0] * 800, sampling_rate_hz=-1), "sampling_rate_hz"),
    "a week at 1 Hz": (lambda: pcm(np.zeros(604_800), sampling_rate_hz=1), "data"),
    "one sample": (lambda: pcm([0.5], sampling_rate_hz=16000), "data"),
    "too many bytes": (lambda: AudioInput(data=GOOD + bytes(15 * 1024 * 1024)), "data"),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_that_are_refused(name: str) -> None:
    make, field = SOUNDS[name]
    sound = make()

    def refused() -> None:
        with pytest.raises(InvalidField) as caught:
            decode_sound(sound, 16000, "audio")
        assert caught.value.violations[0].field == f"audio.{field}"

    assert peak_bytes(refused) < 256 * 1024 * 1024


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_sounds_that_are_read(container: str) -> None:
    tone = tiny.tone(1, 1.0, 48000)
    samples = decode_sound(AudioInput(data=tiny.wav(tone, 48000, container)), 16000, "audio")
    assert samples.dtype == np.float32
    assert abs(len(samples) - 16000) <= (0 if container in ("WAV", "FLAC") else 1500)
    spectrum = np.abs(np.fft.rfft(samples[:8000]))
    assert abs(int(spectrum.argmax()) * 16000 / 8000 - 330) < 4


def test_channels_are_averaged_and_raw_samples_scaled() -> None:
    left, right = np.full(1600, 0.5, np.float32), np.full(1600, -0.25, np.float32)
    stereo = AudioInput(data=tiny.wav(np.stack([left, right], axis=1)))
    assert decode_sound(stereo, 16000, "audio") == pytest.approx(0.125)
    raw = AudioInput(data=np.full(1600, 16384, "<i2").tobytes(), encoding="pcm_s16le", sampling_rate_hz=16000)
    assert decode_sound(raw, 16000, "audio") == pytest.approx(0.5)


def test_resampling_leaves_no_echo_of_high_tones() -> None:
    t = np.arange(48000) / 48000
    high = pcm(0.9 * np.sin(2 * np.pi * 12_000 * t), sampling_rate_hz=48000)
    assert np.abs(decode_sound(high, 16000, "audio")[200:-200]).max() < 0.001


FILMS = {
    "empty": b"",
    "text": b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n",
    "concatenation": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "gif": encoded("GIF"),
    "mp4 header alone": b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2",
    "playlist behind an mp4 header": b"\x00\x00\x00\x18ftyp" + b"#EXTM3U\nfile:///etc/passwd\n",
    "webm header alone": b"\x1a\x45\xdf\xa3" + bytes(100),
}


@pytest.mark.parametrize("name", FILMS)
def test_films_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_film(FILMS[name], range(4), "video.data")
    assert caught.value.violations[0].field == "video.data"


def test_films() -> None:
    film = tiny.film(num_frames=6)
    frames = decode_film(film, [0, 2, 5], "video.data")
    assert frames.shape == (3, 32, 32, 3)
    assert np.abs(frames[1].astype(int) - np.asarray(tiny.picture(2, 32, 32)).astype(int)).mean() < 30
    with pytest.raises(InvalidField, match=r"6 frames; 8 are needed"):
        decode_film(film, range(8), "video.data")
    with pytest.raises(InvalidField, match=r"cut off|frames"):
        decode_film(film[: len(film) // 2], range(6), "video.data")
    with pytest.raises(InvalidField, match="too many"):
        decode_film(film, range(0, 6_000_000, 2), "video.data")
