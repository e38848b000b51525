"""The ControlNets that a worker serves beside its checkpoint: a folder or a hub name each (`sdtpu_controlnets`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtpu_worker.diffusion.json_files import read_json
from sdtpu_worker.diffusion.loading.hub import download_weights
from sdtpu_worker.diffusion.loading.part_files import WHOLE_FOLDER, has_weights, open_part
from sdtpu_worker.diffusion.loading.tensors import TensorSource
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import read_controlnet_config
from sdtpu_worker.models.network import Network

_CONFIG = "config.json"


@dataclass(frozen=True)
class ControlNet:
    """One that a job can ask for.

    Attributes:
        name: as jobs say it.
        network: the model, whose parameters are the part `part`.
        channels: of what a picture is embedded to.
        config: its config as JSON.
        folder: with its weights.
    """

    name: str
    network: Network
    channels: int
    config: Mapping[str, Any]
    folder: Path

    @property
    def part(self) -> str:
        """The name of its parameters among a checkpoint's."""
        return f"controlnet {self.name}"

    def open(self) -> TensorSource:
        """Open its weights; only headers are read.

        Raises:
            InvalidCheckpoint: there are none of an allowed format, or they are broken.
        """
        return open_part(self.folder, WHOLE_FOLDER)


def find_controlnets(
    sources: Mapping[str, str], unet: Any, factor: int, latent_channels: int
) -> tuple[ControlNet, ...]:
    """Find ControlNets, and make sure that they are for the UNet; return them in the order of their names.

    Args:
        sources: by name, a folder or a hub name like `owner/name`.
        unet: the config of the checkpoint's UNet.
        factor: pixels per latent, along one side.
        latent_channels: of a latent.

    Raises:
        InvalidCheckpoint: one is missing, its config is broken, or it is for another UNet.
    """
    found = []
    for name, source in sorted(sources.items()):
        folder = _find(name, source)
        raw = read_json(folder / _CONFIG)
        config = read_controlnet_config(raw, str(folder / _CONFIG))
        _check(name, folder, config, unet, factor, latent_channels)
        found.append(ControlNet(name, networks.controlnet(config), config.block_out_channels[0], raw, folder))
    return tuple(found)


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
    try:
        return download_weights(source, "main", ["*.json"], lambda found: has_weights(found, WHOLE_FOLDER))
    except Exception as exc:  # the hub client raises its own, requests' and OS errors alike
        raise InvalidCheckpoint(
            f"sdtpu_controlnets: {name} is no folder {source!r} here, and the hub did not give it"
            f" ({type(exc).__name__}: {exc}); check the name"
        ) from exc


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
