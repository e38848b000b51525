"""Images on their way back from a store: check what a result says of its image, and decode nothing else."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdtpu_worker.contract.request import MAX_SIDE
from sdtpu_worker.contract.result import GenerationResult, StoredImage
from sdtpu_worker.errors import StorageError

if TYPE_CHECKING:
    from PIL.Image import Image

CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""What a web server may call each format; also all formats that are ever decoded."""


def named_image(result: Any) -> tuple[str, StoredImage]:
    """Return the task id and the image that a result names, of the types and within the bounds that a worker's have.

    Args:
        result: a `GenerationResult`, or whatever a result backend gave.

    Raises:
        StorageError: it is no result of `sdtpu.generate`; the text says why.
    """
    try:
        parsed = result if isinstance(result, GenerationResult) else GenerationResult.from_json(result)
        task_id, image = parsed.task_id, parsed.image
        texts, sides = (task_id, image.uri, image.format), (image.width, image.height)
    except Exception as exc:  # any writer of the result backend chooses what is there
        raise StorageError(
            f"not a result of sdtpu.generate, which alone has an image: {type(result).__name__}"
        ) from exc
    if not all(isinstance(text, str) for text in texts):
        raise StorageError("not a result of sdtpu.generate: the task_id and the image's uri and format must be strings")
    if image.format not in CONTENT_TYPES:
        raise StorageError(f"an image's format must be one of {', '.join(CONTENT_TYPES)}, got {image.format[:40]!r}")
    if not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
        raise StorageError(f"an image's width and height must be integers from 1 to {MAX_SIDE}")
    return task_id, image


def image_content_type(result: Mapping[str, Any] | GenerationResult) -> str:
    """Return what a web server may call a result's image: `image/png`, `image/jpeg` or `image/webp`, nothing else.

    Send it with `X-Content-Type-Options: nosniff`, so that no browser takes the bytes for something else.

    Raises:
        StorageError: it is no result of `sdtpu.generate`, or names another format.
    """
    return CONTENT_TYPES[named_image(result)[1].format]


def decode_image(data: bytes, image_format: str, width: int, height: int) -> Image:
    """Decode an image if it is of the given format and size, which are compared before any pixel is decoded.

    No other decoder than the format's own looks at the data.

    Args:
        data: the encoded image.
        image_format: a key of `CONTENT_TYPES`.
        width: pixels.
        height: pixels.

    Raises:
        StorageError: the data are of another format or size, or cannot be decoded.
    """
    from PIL import Image

    wanted = f"{image_format.upper()} of {width} x {height} pixels"
    try:
        image = Image.open(io.BytesIO(data), formats=[image_format])
        found = f"{image.format} of {image.width} x {image.height} pixels"  # a JPEG of several pictures is an MPO
        if found == wanted:
            image.load()
            return image
    except Exception as exc:  # whatever a stranger's bytes make Pillow raise, a warning that is an error included
        raise StorageError(f"the stored {len(data):,} bytes are no {wanted}: {type(exc).__name__}: {exc}") from exc
    raise StorageError(f"the stored image is a {found}, but its result says {wanted}")
