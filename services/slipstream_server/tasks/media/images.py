"""Pictures from callers' bytes and back to PNG. Everything is bounded before anything is decoded.

Only five formats are tried, by their first bytes; sizes are read from the header and refused there, so that a small
file that unpacks into a large picture never does. Knows nothing about models. Runs on a helper thread.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import EncodedImage

MAX_IMAGE_BYTES = 15 * 1024 * 1024
MAX_IMAGE_PIXELS = 64_000_000
MAX_SIDE_RATIO = 100
"""A picture one pixel wide would be resized to one with a side of millions."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def decode_image(data: bytes, field: str, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Any:
    """An RGB ``PIL.Image.Image``, turned as its EXIF orientation says, as Transformers' pipelines do.

    Raises InvalidField with ``field`` for bytes that are no such picture, are cut off, or unpack into too much.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not 0 < len(data) <= MAX_IMAGE_BYTES:
        raise InvalidField.of(field, f"{len(data)} bytes; 1 to {MAX_IMAGE_BYTES} are allowed")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(image.width, image.height, field, max_pixels)
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except InvalidField:
        raise
    except Image.DecompressionBombError:
        raise InvalidField.of(field, f"more than {max_pixels} pixels, the most that is allowed") from None
    except UnidentifiedImageError:
        raise InvalidField.of(field, "is no PNG, JPEG, WebP, BMP or GIF picture") from None
    # Pillow's decoders raise these and a few more of their own for files that are damaged or cut off.
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise InvalidField.of(field, f"the picture is damaged or cut off ({type(error).__name__})") from None


def _check_size(width: int, height: int, field: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise InvalidField.of(field, f"a picture of {width} x {height} pixels is empty")
    if width * height > max_pixels:
        raise InvalidField.of(field, f"{width} x {height} pixels; at most {max_pixels} are allowed")
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise InvalidField.of(
            field, f"{width} x {height} pixels; one side may be at most {MAX_SIDE_RATIO} times the other"
        )


def encode_image(image: Any) -> EncodedImage:
    """The PNG file of a ``PIL.Image.Image``."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return EncodedImage(png=file.getvalue(), width_pixels=image.width, height_pixels=image.height)


def encode_mask(mask_HW: np.ndarray) -> EncodedImage:
    """A single-channel PNG, 255 where ``mask_HW`` is not zero."""
    from PIL import Image

    return encode_image(Image.fromarray(np.where(mask_HW, np.uint8(255), np.uint8(0))))
