"""A part of `accelerator.py`: diffusers in PyTorch on one device, with the same checkpoint, steps, batch and dtype.

    python benchmarks/accelerator_diffusers.py --model FOLDER --batch 4 --out FILE --seconds 150

Needs torch and diffusers, and nothing of this package. It runs what a careful user would: the pipeline's own scheduler
loop with guidance, PyTorch's scaled dot product attention (diffusers' default, flash attention where the device has
it), weights and images in `channels_last`, cuDNN's search for the fastest convolutions, no progress bar. First as it
is, which starts at once; then, with `--compile`, with the UNet and the decoder under `torch.compile`, whose first call
may take minutes: it is run after all that needs no waiting, and its time to compile is a figure of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from benchmarks.accelerator_figures import Report, repeat

_RUNS = 7


def main() -> None:
    """Measure one batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], required=True)
    parser.add_argument("--compile", metavar="MODE", help="of torch.compile, such as reduce-overhead")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    report = Report(args.out, batch=args.batch, device_kind=kind, dtype=args.dtype, versions=versions)
    pipe = load(args.model, getattr(torch, args.dtype), device, report)
    bench = Bench(pipe, args.batch, args.steps, device, until)
    bench.measure(report, "eager", "eager: SDPA, channels_last")
    if args.compile and time.monotonic() < until:
        started = time.monotonic()
        pipe.unet = torch.compile(pipe.unet, mode=args.compile, fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode=args.compile)
        bench.latents()
        bench.decode()
        report.add("torch.compile, with the first call", [time.monotonic() - started], "s", mode=args.compile)
        bench.measure(report, "compiled", f"torch.compile(mode={args.compile!r}): SDPA, channels_last")
    if device == "cuda":
        report.say(memory_bytes={"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.memory_reserved()})


def load(folder: Path, dtype: torch.dtype, device: str, report: Report) -> Any:
    """Return diffusers' pipeline for a checkpoint, on a device."""
    started = time.monotonic()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    report.add("load the checkpoint", [time.monotonic() - started], "s")
    return pipe


class Bench:
    """Measures a pipeline.

    Args:
        pipe: loaded.
        batch: images at a time, each with its negative prompt.
        steps: of each image.
        device: `cuda` or `cpu`.
        until: `time.monotonic()` after which runs are few.
    """

    def __init__(self, pipe: Any, batch: int, steps: int, device: str, until: float) -> None:
        self._pipe, self._batch, self._steps, self._device, self._until = pipe, batch, steps, device, until
        self._latents: torch.Tensor | None = None

    def latents(self) -> torch.Tensor:
        """Return what the steps make, with prompts encoded, before it is decoded."""
        generator = torch.Generator(self._device).manual_seed(0)
        made: torch.Tensor = self._pipe(
            ["a red circle"] * self._batch,
            negative_prompt=[""] * self._batch,
            num_inference_steps=self._steps,
            guidance_scale=7.5,
            generator=generator,
            output_type="latent",
        ).images
        self._latents = made
        return made

    def decode(self) -> torch.Tensor:
        """Return the decoded batch."""
        assert self._latents is not None
        vae = self._pipe.vae
        if vae.config.force_upcast and vae.dtype == torch.bfloat16:
            vae.to(torch.float32)  # as the pipeline does for XL
        with torch.no_grad():
            latents = self._latents.to(vae.dtype).to(memory_format=torch.channels_last)
            decoded: torch.Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return decoded

    def measure(self, report: Report, name: str, how: str) -> None:
        """Add the figures of one way to run it."""
        steps = self._runs(self.latents)
        per_image = [1000 * each / self._steps / self._batch for each in steps]
        report.add("a step of one image", per_image, "ms of a device", way=name, how=how)
        decodes = self._runs(self.decode)
        report.add("a decode", [1000 * each / self._batch for each in decodes], "ms of a device an image", way=name)
        both = [self._batch / (step + decode) for step, decode in zip(steps, decodes, strict=False)]
        report.add("images", both, "images/s of one device", way=name, of=f"batches of {self._steps} steps, no PNG")

    def _runs(self, run: Callable[[], Any]) -> list[float]:
        def seconds() -> float:
            started = time.perf_counter()
            run()
            if self._device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        seconds()  # the first is not counted
        return repeat(seconds, _RUNS, min(self._until, time.monotonic() + 25))


if __name__ == "__main__":
    main()
