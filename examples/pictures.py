"""Jobs that start from a picture: image to image, inpainting, and a LoRA, on the shipped checkpoint.

    python examples/pictures.py [--out pictures]

Needs `pip install -e '.[demo]'`. It starts a private Redis and a worker on four simulated devices, sends the jobs as a
web app does, and writes the pictures, the mask and a contact sheet to `--out`. With a queue and a worker of your own,
only the function `send` is of interest.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from sdtpu_worker import generate, image_grid, open_image
from sdtpu_worker.testing.processes import private_redis, running, wait_for_line, worker_command, worker_env

LEFT = "circle on the left of a white background"
STEPS = 30


def send(out: Path) -> list[Image.Image]:
    """Send one job after the other, each with the picture of the one before it; save and return the pictures."""
    red = generate.delay(f"a red {LEFT}", seed=0, num_inference_steps=STEPS).get(timeout=120)
    # The same place in another colour: less than half of the picture is given up.
    blue = generate.delay(f"a blue {LEFT}", image=red, strength=0.4, seed=10, num_inference_steps=STEPS).get(
        timeout=120
    )
    # A heart in its stead: only what is light in the mask is drawn again.
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((0, 0, 41, 63), fill=255)
    prompt = "a green heart on the left of a white background"
    heart = generate.delay(prompt, image=blue, mask_image=mask, seed=4, num_inference_steps=STEPS).get(timeout=120)
    # The first request again, drawn as an outline by a LoRA that this job alone uses.
    outline = generate.delay(f"a red {LEFT}", seed=0, num_inference_steps=STEPS, loras=["outline"]).get(timeout=120)
    pictures = [open_image(red), open_image(blue), mask.convert("RGB"), open_image(heart), open_image(outline)]
    for name, picture in zip(("red", "blue", "mask", "heart", "outline"), pictures, strict=True):
        picture.save(out / f"{name}.png")
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the pictures")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "worker.log"
    with private_redis() as url, tempfile.TemporaryDirectory() as folder:
        env = worker_env(url, SDTPU_PLATFORM="cpu", SDTPU_CPU_DEVICES="4", SDTPU_LORAS="outline=embedded-outline")
        with running(worker_command("sdtpu_worker.app"), log, env=env, cwd=Path(folder)) as worker:
            wait_for_line(worker, log, " ready.", 180)
            os.environ |= {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}
            import sdtpu_worker.app  # noqa: F401  the ready-made app, which reads these two

            pictures = send(out)
    image_grid(pictures, 1, len(pictures)).save(out / "grid.png")
    shown = "a red circle, the blue one made of it, the mask, the heart drawn in its stead, the circle as an outline"
    print(f"{out / 'grid.png'}: {shown}")


if __name__ == "__main__":
    main()
