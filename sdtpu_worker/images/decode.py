"""Images on their way back from a store: check what a result says of its image, and decode only that."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdtpu_worker.contract.parameter_checks import MAX_SIDE
from sdtpu_worker.contract.result import GenerationResult, StoredImage
from sdtpu_worker.errors import StorageError

if TYPE_CHECKING:
    from PIL.Image import Image

CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""The content type of each format; no other format is ever decoded."""


def named_image(result: Any) -> tuple[str, StoredImage]:
    """Return the task id and the image that a result names, after checking their types and bounds.

    Args:
        result: a `GenerationResult`, or any value that a result backend gave.

    Raises:
        StorageError: `result` is not a result of `sdtpu.generate`; the text says why.
    """
    try:
        parsed = result if isinstance(result, GenerationResult) else GenerationResult.from_json(result)
        task_id, image = parsed.task_id, parsed.image
        texts, sides = (task_id, image.uri, image.format), (image.width, image.height)
    except Exception as exc:  # the value may be anything: others can write to the result backend
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
    """Return the content type of a result's image: `image/png`, `image/jpeg` or `image/webp`, and no other.

    Send it with `X-Content-Type-Options: nosniff`, so that no browser treats the bytes as anything else.

    Args:
        result: what `AsyncResult.get()` returned, or a `GenerationResult`.

    Raises:
        StorageError: `result` is not a result of `sdtpu.generate`, or names another format.
    """
    return CONTENT_TYPES[named_image(result)[1].format]


def decode_image(data: bytes, image_format: str, width: int, height: int) -> Image:
    """Return the decoded image, if the data have this format and size; both are compared before pixels are decoded.

    Only the decoder of this format reads the data.

    Args:
        data: the encoded image.
        image_format: a key of `CONTENT_TYPES`.
        width: pixels.
        height: pixels.

    Raises:
        StorageError: the data have another format or size, or cannot be decoded.
    """
    from PIL import Image

    wanted = f"{image_format.upper()} of {width} x {height} pixels"
    try:
        image = Image.open(io.BytesIO(data), formats=[image_format])
        found = f"{image.format} of {image.width} x {image.height} pixels"  # a JPEG of several is an MPO
        if found == wanted:
            image.load()
            return image
    except Exception as exc:  # foreign bytes make Pillow raise any kind of error, also warnings turned into errors
        raise StorageError(f"the stored {len(data):,} bytes are not a {wanted}: {type(exc).__name__}: {exc}") from exc
    raise StorageError(f"the stored image is a {found}, but its result says {wanted}")
