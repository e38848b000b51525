"""The networks of a checkpoint, each from its config."""

from __future__ import annotations

from typing import Any

from sdtpu_worker.models.autoencoder import AutoencoderDecoder, AutoencoderEncoder
from sdtpu_worker.models.autoencoder_tiny import AutoencoderTinyDecoder, AutoencoderTinyEncoder
from sdtpu_worker.models.clip_text import ClipTextEncoder
from sdtpu_worker.models.controlnet import ControlNet
from sdtpu_worker.models.network import Network
from sdtpu_worker.models.safety_checker import SafetyChecker
from sdtpu_worker.models.unet import UNet


def unet(config: Any) -> Network:
    """Return the UNet of a config of `read_unet_config`; called as `UNet.__call__`."""
    return Network(lambda: UNet(config))


def controlnet(config: Any) -> Network:
    """Return the ControlNet of a config of `read_controlnet_config`; called as `ControlNet.__call__` and `embed`."""
    return Network(lambda: ControlNet(config))


def text_encoder(config: Any, projection: bool = False) -> Network:
    """Return the text encoder of a config of `read_clip_text_config`; called as `ClipTextEncoder.__call__`."""
    return Network(lambda: ClipTextEncoder(config, projection))


def decoder(config: Any) -> Network:
    """Return the decoding half of a config of `read_autoencoder_config`; called as `AutoencoderDecoder.__call__`."""
    return Network(lambda: AutoencoderTinyDecoder(config) if _is_tiny(config) else AutoencoderDecoder(config))


def encoder(config: Any) -> Network:
    """Return the encoding half of a config of `read_autoencoder_config`; called as `AutoencoderEncoder.__call__`."""
    return Network(lambda: AutoencoderTinyEncoder(config) if _is_tiny(config) else AutoencoderEncoder(config))


def safety_checker(config: Any) -> Network:
    """Return the checker of a config of `read_safety_checker_config`; called as `SafetyChecker.__call__`."""
    return Network(lambda: SafetyChecker(config))


def _is_tiny(config: Any) -> bool:
    return hasattr(config, "num_decoder_blocks")
