"""The ControlNets that a worker serves beside its checkpoint: a folder or a hub name each (`sdtpu_controlnets`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtpu_worker.diffusion.loading.load import iterate_weights
from sdtpu_worker.diffusion.loading.part_files import WHOLE_FOLDER, has_weights, open_part
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import read_controlnet_config
from sdtpu_worker.models.network import Network

_CONFIG = "config.json"
_PATTERNS = (
    ["*model.safetensors", "*model-?????-of-?????.safetensors", "*.index.json"],
    ["*fp16*.safetensors"],
    ["*.safetensors"],
    ["*.msgpack"],
)
"""Files of weights to download, one after the other until they are whole."""


@dataclass(frozen=True)
class ControlNet:
    """One that a job can ask for.

    Attributes:
        name: as jobs say it.
        network: the model, whose parameters are the part `part`.
        channels: of what a picture is embedded to.
        config: its config as JSON.
    """

    name: str
    network: Network
    channels: int
    config: Mapping[str, Any]

    @property
    def part(self) -> str:
        """The name of its parameters among a checkpoint's."""
        return f"controlnet {self.name}"


def load_controlnets(
    sources: Mapping[str, str], unet: Any, factor: int, latent_channels: int, dtype: Any
) -> tuple[tuple[ControlNet, ...], dict[str, dict[str, Any]]]:
    """Load ControlNets, and make sure that they are for the UNet.

    Args:
        sources: by name, a folder or a hub name like `owner/name`.
        unet: the config of the checkpoint's UNet.
        factor: pixels per latent, along one side.
        latent_channels: of a latent.
        dtype: of the parameters.

    Returns:
        The networks in the order of their names, and their parameters by part.

    Raises:
        InvalidCheckpoint: one is missing or broken, or is for another UNet.
    """
    found, params = [], {}
    for name, source in sorted(sources.items()):
        folder = _find(name, source)
        raw = _read_json(folder / _CONFIG)
        config = read_controlnet_config(raw, str(folder / _CONFIG))
        _check(name, folder, config, unet, factor, latent_channels)
        network = networks.controlnet(config)
        control = ControlNet(name, network, config.block_out_channels[0], raw)
        tensors = open_part(folder, WHOLE_FOLDER)
        params[control.part] = dict(iterate_weights(tensors, network.shapes, dtype))
        found.append(control)
    return tuple(found), params


def _find(name: str, source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise InvalidCheckpoint(
            f"sdtpu_controlnets: {name} must be a folder in the diffusers layout (config.json and safetensors) or a hub"
            f" name like 'owner/name', got {source!r}; convert a single file where it is trusted, with diffusers'"
            " `ControlNetModel.from_single_file` and `save_pretrained`"
        )
    from huggingface_hub import snapshot_download

    try:
        for patterns in _PATTERNS:
            found = Path(snapshot_download(source, revision="main", allow_patterns=[_CONFIG, *patterns]))
            if has_weights(found, WHOLE_FOLDER):
                break
    except Exception as exc:  # the hub client raises its own, requests' and OS errors alike
        raise InvalidCheckpoint(
            f"sdtpu_controlnets: {name} is no folder {source!r} here, and the hub did not give it"
            f" ({type(exc).__name__}: {exc}); check the name"
        ) from exc
    return found


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise InvalidCheckpoint(f"{path} must be a ControlNet's config, it cannot be read: {exc}") from exc
    if not isinstance(data, dict):
        raise InvalidCheckpoint(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _check(name: str, folder: Path, config: Any, unet: Any, factor: int, latent_channels: int) -> None:
    """Make sure that a ControlNet is a copy of the UNet's way down."""
    embedded = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    wanted = {
        **{
            key: getattr(unet, key)
            for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")
        },
        "down_block_types": len(unet.down_block_types),
        "in_channels": latent_channels,
        "conditioning_embedding_out_channels": factor,
    }
    for key, value in wanted.items():
        got = {"down_block_types": len(config.down_block_types), "conditioning_embedding_out_channels": embedded}.get(
            key, getattr(config, key)
        )
        if _plain(got) != _plain(value):
            raise InvalidCheckpoint(
                f"sdtpu_controlnets: {name} ({folder}) is for another UNet: {key} must be {_plain(value)}"
                f"{' pixels per latent' if key.startswith('conditioning') else ''}, as for this checkpoint,"
                f" got {_plain(got)}"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
