"""The TPU's own compiler takes every kernel in the sizes of real models, for the chips that they are meant for."""

from __future__ import annotations

import pytest

from tests.device.tpu_compiler import compile_layers

V5E, V6E = "v5e:2x4", "v6e:2x4"
ATTENTIONS = {
    "Stable Diffusion 1.x at 512, 4,096 tokens": {"tokens": 4096, "features": 320, "heads": 8},
    "the same, to the prompt": {"tokens": 4096, "features": 320, "heads": 8, "prompt": 768},
    "the same, 1,024 tokens": {"tokens": 1024, "features": 640, "heads": 8},
    "Stable Diffusion XL at 832 x 1216, 988 tokens": {"tokens": 988, "features": 1280, "heads": 20},
    "the same, to the prompt of XL": {"tokens": 988, "features": 1280, "heads": 20, "prompt": 2048},
}


@pytest.mark.slow
@pytest.mark.parametrize("topology", [V5E, V6E])
def test_the_compiler_takes_the_kernels(topology):
    cases = [{"layer": "attention", "topology": topology, **sizes} for sizes in ATTENTIONS.values()]
    cases.append({"layer": "feed forward", "topology": topology, "tokens": 4096, "features": 320})
    *of_attention, of_feed_forward = compile_layers(cases)
    for name, found in zip(ATTENTIONS, of_attention, strict=True):
        assert found == {"kernels": ["packed_attention"], "transposes": 0}, name
    assert of_feed_forward == {"kernels": ["gated_feed_forward"], "transposes": 0}
