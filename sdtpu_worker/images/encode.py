"""Images on the host, on their way out: encode pixels, arrange several images in a grid."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_QUALITY = {"jpeg": {"quality": 95}, "webp": {"quality": 92}, "png": {"compress_level": 6}}


def encode_image(pixels: np.ndarray, image_format: str, text: Mapping[str, Any]) -> bytes:
    """Return the encoded image; the same pixels and text give the same bytes.

    Args:
        pixels: `(height, width, 3) uint8`.
        image_format: png, jpeg or webp.
        text: the parameters to write into the text chunks of a PNG; the other formats have none.
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


def image_grid(images: Sequence[Image], rows: int, cols: int) -> Image:
    """Return one image that shows `images` in `rows` x `cols` cells, row by row; cells without an image are white.

    Raises:
        ValueError: there are no images, or more images than cells.
    """
    from PIL import Image

    if not images or len(images) > rows * cols:
        raise ValueError(f"image_grid needs 1 to rows * cols = {rows * cols} images, got {len(images)}")
    width, height = max(image.width for image in images), max(image.height for image in images)
    grid = Image.new("RGB", (cols * width, rows * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid
