"""Compiles layers for a TPU that is not there, in a process of its own: `python -m tests.device.tpu_compiler`.

It reads cases from its standard input, one JSON object per line with the arguments of `compile_layer`, and writes for
each what the compiler made of it. One process, since libtpu is loaded once for all and reads its variables then.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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
    layer: str, topology: str, tokens: int, features: int, heads: int = 1, prompt: int = 0
) -> dict[str, Any]:
    """Compile a layer in bfloat16 as it stands in a UNet's tick.

    Args:
        layer: `attention`, or `block` for a transformer block with both its attentions and its dense layers.
        topology: such as `v5e:2x4`.
        tokens: of the image.
        features: of each.
        heads: of an attention.
        prompt: features of the 77 tokens of a prompt that it attends to; 0 for its own input.

    Returns:
        The names of the kernels in the program, and the numbers of its instructions that move data around.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from sdtpu_worker.models.attention import Attention
    from sdtpu_worker.models.network import Network
    from sdtpu_worker.models.selection import Selection, selecting
    from sdtpu_worker.models.transformer import TransformerBlock

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = Mesh(np.array(devices), ("device",))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*names)) for names in ([], ["device"]))
    is_attention = layer == "attention"

    def make() -> Any:
        if is_attention:
            return Attention(features, prompt or features, heads)
        return TransformerBlock(features, prompt, heads, only_cross_attention=False)

    network = Network(make)

    def run(params: Any, x: jax.Array, context: jax.Array | None) -> jax.Array:
        with selecting(Selection(devices[0].platform)):
            return network(params, x, x if context is None else context)

    def shaped(shape: tuple[int, ...], sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    rows = 2 * len(devices)
    params = {name: shaped(shape, everywhere) for name, shape in network.shapes.items()}
    context = shaped((rows, 77, prompt), split) if prompt else None
    program = jax.shard_map(
        run, mesh=mesh, in_specs=(PartitionSpec(), *[PartitionSpec("device")] * 2),
        out_specs=PartitionSpec("device"), check_vma=False,
    )  # fmt: skip
    text = jax.jit(program).lower(params, shaped((rows, tokens, features), split), context).compile().as_text()
    kernels = re.findall(r'custom_call_target="tpu_custom_call".*?op_name="[^"]*/(\w+)/pallas_call"', text)
    return {"kernels": kernels, "transposes": len(re.findall(r" = \S+ transpose\(", text))}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(compile_layer(**json.loads(line))), flush=True)
