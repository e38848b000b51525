"""Pictures that callers send: made what `generate` takes, and the mask of one API into that of another."""

from __future__ import annotations

import base64
import binascii
import io
from typing import TYPE_CHECKING

from sdtpu_worker.contract.parameter_checks import MAX_SIDE, SIDE_MULTIPLE
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.images.decode import CONTENT_TYPES
from sdtpu_worker.images.pictures import check_picture_bytes, decode_mask, decode_picture

if TYPE_CHECKING:
    from PIL.Image import Image


def read_base64(name: str, text: object) -> bytes:
    """Return the bytes in base64, plain or as a data URI.

    Raises:
        InvalidRequest: they are not base64.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} must be a picture in base64, got {type(text).__name__}")
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InvalidRequest(f"{name} must be a picture in base64: {exc}") from exc


def fit_picture(name: str, data: bytes, size: tuple[int, int] | None) -> bytes:
    """Return a picture, scaled if a size is given and it has another one.

    Args:
        name: the parameter, for errors.
        data: the encoded picture.
        size: width and height in pixels.

    Raises:
        InvalidRequest: it is no picture that is taken, or the size is none that can be drawn.
    """
    check_picture_bytes(name, data)
    if size is None:
        return data
    _check_size(size)
    picture = decode_picture(name, data)
    return data if picture.size == size else _encode(picture.resize(size))


def fit_mask(name: str, data: bytes, size: tuple[int, int] | None, is_inverted: bool = False) -> bytes:
    """Return a mask whose light parts are drawn again.

    Args:
        name: the parameter, for errors.
        data: the encoded mask.
        size: width and height in pixels to which it is scaled; None to leave it.
        is_inverted: whether its dark parts are meant.

    Raises:
        InvalidRequest: it is no mask that is taken.
    """
    from PIL import Image, ImageChops

    check_picture_bytes(name, data)
    mask = decode_mask(name, data).convert("L")
    mask = ImageChops.invert(mask) if is_inverted else mask
    return _encode(mask if size in (None, mask.size) else mask.resize(size or mask.size, Image.Resampling.NEAREST))


def mask_of_transparency(name: str, data: bytes, size: tuple[int, int] | None) -> bytes:
    """Return the mask that OpenAI's clients mean: where theirs is transparent, the picture is drawn again.

    Args:
        name: the parameter, for errors.
        data: their mask; one without an alpha channel counts as one of ours.
        size: as for `fit_mask`.

    Raises:
        InvalidRequest: it is no picture that is taken.
    """
    from PIL import Image

    check_picture_bytes(name, data)
    try:
        picture = Image.open(io.BytesIO(data), formats=list(CONTENT_TYPES))
        picture.load()
    except Exception as exc:  # foreign bytes make Pillow raise any kind of error
        raise InvalidRequest(f"{name} must be a whole picture, got one that cannot be decoded to the end") from exc
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return fit_mask(name, data, size)
    alpha = picture.convert("RGBA").getchannel("A")
    return fit_mask(name, _encode(alpha), size, is_inverted=True)


def _check_size(size: tuple[int, int]) -> None:
    if any(not 0 < side <= MAX_SIDE or side % SIDE_MULTIPLE for side in size):
        raise InvalidRequest(
            f"size must be width x height in multiples of {SIDE_MULTIPLE} up to {MAX_SIDE} pixels, got"
            f" {size[0]}x{size[1]}"
        )


def _encode(picture: Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=1)
    return buffer.getvalue()
