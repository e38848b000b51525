"""Pictures on the host: encode an array, check what a result says of one, decode it, arrange several in a grid."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdtpu_worker.contract.request import MAX_SIDE
from sdtpu_worker.contract.result import GenerationResult, StoredImage
from sdtpu_worker.errors import StorageError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""What a web server may call each format; also all formats that are ever decoded."""
_QUALITY = {"jpeg": {"quality": 95}, "webp": {"quality": 92}, "png": {"compress_level": 6}}


def encode_image(pixels: np.ndarray, image_format: str, text: Mapping[str, Any]) -> bytes:
    """Encode an image; the same pixels and text give the same bytes.

    Args:
        pixels: `(height, width, 3) uint8`.
        image_format: png, jpeg or webp.
        text: parameters for a PNG's text chunks; the other formats carry none.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    options: dict[str, Any] = dict(_QUALITY[image_format])
    if image_format == "png":
        options["pnginfo"] = chunks = PngInfo()
        for name, value in text.items():
            chunks.add_itxt(name, str(value))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


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
    except Exception as exc:  # whoever writes to the result backend chooses what is there
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
    """Decode a picture if it is of the given format and size, which are compared before any pixel is decoded.

    No other decoder than the format's own looks at the data.

    Args:
        data: the encoded picture.
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


def image_grid(images: Sequence[Image], rows: int, cols: int) -> Image:
    """Return one picture with the images in `rows` x `cols` cells, row by row; missing ones stay blank.

    Raises:
        ValueError: there are no images, or more than cells.
    """
    from PIL import Image

    if not images or len(images) > rows * cols:
        raise ValueError(f"image_grid needs 1 to rows * cols = {rows * cols} images, got {len(images)}")
    width, height = max(image.width for image in images), max(image.height for image in images)
    grid = Image.new("RGB", (cols * width, rows * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid
