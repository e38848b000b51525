"""Compiles layers for a TPU that is not there, in a process of its own: `python -m tests.device.tpu_compiler`.

It reads cases from its standard input, one JSON object per line with the arguments of `compile_layer`, and writes for
each what the compiler made of it. One process, since libtpu is loaded once for all and reads its variables then.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

from tests.support.paths import ROOT

# The host has no TPU, so libtpu must not look for one; and another process may compile at the same time.
_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}


def compile_layers(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each case what `compile_layer` found, from a new process."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input="\n".join(map(json.dumps, cases)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **_VARIABLES},
        timeout=880,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def compile_layer(
    layer: str, topology: str, tokens: int, features: int, heads: int = 1, prompt: int = 0, windows: int = 1
) -> dict[str, Any]:
    """Compile a layer in bfloat16 as it stands in a UNet's tick.

    Args:
        layer: `attention`, `block` for a transformer block with both its attentions and its dense layers, run in a loop
            over steps, `up_block` for a decoder's: a residual block that makes `features` of twice as many, another
            one, then the enlargement; or `transformer` for what is left of one without blocks, between two convolutions
            of eight rows of the batch.
        topology: such as `v5e:2x4`.
        tokens: of the image.
        features: of each.
        heads: of an attention.
        prompt: features of the 77 tokens of a prompt that it attends to; 0 for its own input.
        windows: how many windows of 77 tokens a block's prompts may have.

    Returns:
        The names of the kernels in the program, and how many transpositions, copies and conversions of whole images,
        and how many convolutions and conditionals of XLA are left. `prompt_products`: how many products for keys and
        values of a prompt run in every step.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from sdtpu_worker.diffusion.sharding import platform_of
    from sdtpu_worker.models.attention import Attention
    from sdtpu_worker.models.autoencoder import UpBlock
    from sdtpu_worker.models.configs import read_autoencoder_config
    from sdtpu_worker.models.convolution import Measured
    from sdtpu_worker.models.network import Network
    from sdtpu_worker.models.prompt_windows import PromptWindows
    from sdtpu_worker.models.selection import Selection, selecting
    from sdtpu_worker.models.transformer import TransformerBlock

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = Mesh(np.array(devices), ("device",))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*names)) for names in ([], ["device"]))
    is_up_block, is_image, side = layer == "up_block", layer in ("up_block", "transformer"), int(tokens**0.5)

    def make() -> Any:
        if is_up_block:
            return UpBlock(read_autoencoder_config({"layers_per_block": 1}), 2 * features, features, is_last=False)
        if layer == "transformer":
            return _between_convolutions(features)
        if layer == "attention":
            return Attention(features, prompt or features, heads)
        return TransformerBlock(features, prompt, heads, only_cross_attention=False)

    network = Network(make)

    def run(params: Any, x: jax.Array, context: Any, steps: jax.Array) -> jax.Array:
        with selecting(Selection(platform_of(devices[0]))):
            if is_up_block:
                return network(params, Measured(x)).image
            if layer == "block":
                return jax.lax.fori_loop(0, steps, lambda i, x: network(params, x, context), x)
            return network(params, x, x if context is None else context)

    def shaped(shape: tuple[int, ...], sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    rows = {"up_block": 1, "transformer": 8}.get(layer, 2)
    sizes = (side, side, (1 + is_up_block) * features) if is_image else (tokens, features)
    params = {name: shaped(shape, everywhere) for name, shape in network.shapes.items()}
    all_rows = rows * len(devices)
    context: Any = shaped((all_rows, 77, prompt), split) if prompt else None
    if windows > 1:
        counts = jax.ShapeDtypeStruct((all_rows,), jnp.int32, sharding=split)
        context = PromptWindows(context, shaped((all_rows, windows - 1, 77, prompt), split), counts)
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    program = jax.shard_map(
        run, mesh=mesh, in_specs=(PartitionSpec(), *[PartitionSpec("device")] * 2, PartitionSpec()),
        out_specs=PartitionSpec("device"), check_vma=False,
    )  # fmt: skip
    text = jax.jit(program).lower(params, shaped((all_rows, *sizes), split), context, steps).compile().as_text()
    kernels = re.findall(r'custom_call_target="tpu_custom_call".*?op_name="[^"]*/(\w+)/pallas_call"', text)
    operations = Counter(re.findall(r" = \S+ (transpose|convolution|conditional)\(", text))
    left = {f"{name}s": operations[name] for name in ("transpose", "convolution", "conditional")}
    moved = re.findall(r" = \w+\[([\d,]*)\]\S* (?:copy|convert)\(", text.partition("\nENTRY ")[2])
    copies = sum(math.prod(map(int, shape.split(","))) == rows * tokens * features for shape in moved if shape)
    return {"kernels": kernels, **left, "copies": copies, "prompt_products": _prompt_products(text, rows)}


def _between_convolutions(features: int) -> Any:
    """Return a transformer without blocks between two convolutions, and then no image, whose order would count."""
    import jax
    from flax import nnx

    from sdtpu_worker.models.convolution import measure
    from sdtpu_worker.models.layers import Conv
    from sdtpu_worker.models.transformer import SpatialTransformer

    class BetweenConvolutions(nnx.Module):
        def __init__(self) -> None:
            self.before, self.after = Conv(features, features), Conv(features, features)
            self.transformer = SpatialTransformer(features, 768, 8, 0, 32, False, False)

        def __call__(self, x: jax.Array, _: Any) -> jax.Array:
            y = self.transformer(measure(self.before(x)), x)
            return self.after(jax.nn.silu(y.normalised(self.transformer.norm))).max((1, 2))

    return BetweenConvolutions()


def _prompt_products(text: str, rows: int) -> int:
    """Return how many fusions of the loop's body make an array of as many rows and tokens as prompts have."""
    bodies = (text.partition(f"\n{name} ")[2].partition("\n}")[0] for name in re.findall(r"body=(%[\w.\-]+)", text))
    of_steps = max(bodies, key=len, default="")
    return len(re.findall(rf" = bf16\[{rows},(?:77|154|231),[\d,]+\]\S* fusion\(", of_steps))


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(compile_layer(**json.loads(line))), flush=True)
