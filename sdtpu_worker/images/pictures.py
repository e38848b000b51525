"""Pictures on their way in: what is taken, and what becomes of it.

A rule for each thing that files can be. Only PNG, JPEG and WebP are decoded, of a side of at most 4,096 pixels, which
is read from the header first. A picture is turned as its EXIF orientation says. What is transparent shows white.
Sixteen bits become eight; CMYK, palettes and grey become RGB; colour profiles are ignored, as in diffusers. Several
frames are refused (of a JPEG with more pictures in it, as phones make, the first is meant).
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from sdtpu_worker.contract.parameter_checks import MAX_SIDE
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.images.decode import CONTENT_TYPES

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PICTURE_BYTES = 32 * 2**20
_FORMATS = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp"}
_OPAQUE, _DARKEST_DRAWN = 255, 128


def check_picture_bytes(name: str, data: bytes) -> str:
    """Look at a picture's header, and return its format: png, jpeg or webp.

    Args:
        name: the parameter, for the error.
        data: the encoded picture.

    Raises:
        InvalidRequest: it is none that is taken; the text says why.
    """
    return _FORMATS[str(_open(name, data).format)]


def decode_picture(name: str, data: bytes) -> Image:
    """Return a picture in RGB.

    Args:
        name: the parameter, for the error.
        data: the encoded picture.

    Raises:
        InvalidRequest: it is none that is taken; the text says why.
    """
    from PIL import Image

    picture = _load(name, data)
    if not _is_transparent(picture):
        return picture.convert("RGB")
    coloured = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")


def decode_mask(name: str, data: bytes) -> Image:
    """Return a mask of mode `1`: white where the image is to be drawn again, from the luminance of 128 on.

    Args:
        name: the parameter, for the error.
        data: the encoded picture.

    Raises:
        InvalidRequest: it is none that is taken, or parts of it are transparent, which would not say what is meant.
    """
    from PIL import Image

    picture = _load(name, data)
    if _is_transparent(picture):
        raise InvalidRequest(
            f"{name} must have no transparent parts: light is drawn again, dark stays; got a picture of mode"
            f" {picture.mode} with some"
        )
    grey = picture.convert("L")
    return grey.point(lambda value: _OPAQUE * (value >= _DARKEST_DRAWN)).convert("1", dither=Image.Dither.NONE)


def _open(name: str, data: bytes) -> Image:
    """Return a picture of which only the header was read."""
    from PIL import Image

    wanted = f"a PNG, JPEG or WebP picture of at most {MAX_SIDE:,} pixels a side"
    if not data:
        raise InvalidRequest(f"{name} must be {wanted}, got nothing: 0 bytes")
    if len(data) > MAX_PICTURE_BYTES:
        raise InvalidRequest(
            f"{name} must be a picture of at most {MAX_PICTURE_BYTES // 2**20} MiB, got {len(data):,} bytes; scale it"
            " to the size that is drawn"
        )
    try:
        picture = Image.open(io.BytesIO(data), formats=list(CONTENT_TYPES))
        frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise InvalidRequest(f"{name} must be {wanted}, got one of many more pixels; scale it") from exc
    except Exception as exc:  # foreign bytes make Pillow raise any kind of error, also warnings turned into errors
        raise InvalidRequest(f"{name} must be {wanted}, got {len(data):,} bytes of something else") from exc
    if frames > 1:
        raise InvalidRequest(f"{name} must be one picture, got an animation of {frames} frames; send one of them")
    if max(picture.size) > MAX_SIDE:
        raise InvalidRequest(f"{name} must be {wanted}, got {picture.width:,} x {picture.height:,}; scale it")
    return picture


def _load(name: str, data: bytes) -> Image:
    """Return a picture of eight bits, turned as it was meant."""
    from PIL import ImageOps

    picture = _open(name, data)
    try:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # a PNG with 16 bits of grey
            picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    except Exception as exc:  # as above
        raise InvalidRequest(
            f"{name} must be a whole picture, got {len(data):,} bytes that cannot be decoded to the end"
            f" ({type(exc).__name__}); send the file again"
        ) from exc
    return picture


def _is_transparent(picture: Image) -> bool:
    """Return whether a part of a picture is not opaque."""
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return False
    return any(picture.convert("RGBA").getchannel("A").histogram()[:_OPAQUE])
