"""The parts of a checkpoint: each config read strictly, each network made of it, then each tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sdtpu_worker.diffusion.checkpoint_file import CheckpointFile
from sdtpu_worker.diffusion.checkpoint_folder import Folder
from sdtpu_worker.diffusion.control_nets import find_controlnets
from sdtpu_worker.diffusion.families.stable_diffusion import StableDiffusion
from sdtpu_worker.diffusion.families.stable_diffusion_xl import StableDiffusionXL
from sdtpu_worker.diffusion.known_models import KnownModel
from sdtpu_worker.diffusion.loading.embeddings import Embeddings, read_embeddings
from sdtpu_worker.diffusion.loading.load import iterate_weights
from sdtpu_worker.diffusion.loading.lora import MergedLora, merge_loras
from sdtpu_worker.diffusion.loading.tensors import Shapes, TensorSource
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint
from sdtpu_worker.models import networks
from sdtpu_worker.models.configs import read_autoencoder_config, read_clip_text_config, read_unet_config
from sdtpu_worker.models.network import Network
from sdtpu_worker.redaction import brief

_TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"


@dataclass(frozen=True)
class _Wanted:
    """What a part is loaded for.

    Attributes:
        open: opens its tensors.
        shapes: of all parameters that the part must have.
        dtype: of the parameters.
        kept: the names of those that are used; None for all.
        takes_loras: LoRAs may change it.
    """

    open: Callable[[], TensorSource]
    shapes: Shapes
    dtype: Any
    kept: Collection[str] | None = None
    takes_loras: bool = False

    def keeps(self, name: str) -> bool:
        """Return whether a parameter is used."""
        return self.kept is None or name in self.kept


class Parts:
    """Reads the parts of one checkpoint, and keeps the parameters.

    Args:
        source: the folder or the file; also a known model, if no weights are read.
        dtype: of parameters and computation.
        loras: `(name, weight)` of what is merged into the parameters.
        takes_pictures: keep the half of the autoencoder that makes latents of pictures.
        controlnets: by name, the folders or hub names of ControlNets.
        prompt_windows: how many windows a job's prompt may have.
        embeddings: as for `read_embeddings`.

    Attributes:
        shapes: by part, then by tensor name, shapes and dtypes of the parameters; empty until `family` has read the
            configs.
        embeddings: the words with vectors of their own; likewise.
    """

    def __init__(
        self,
        source: Folder | CheckpointFile | KnownModel,
        dtype: Any,
        loras: Sequence[tuple[str, float]] = (),
        takes_pictures: bool = True,
        controlnets: Mapping[str, str] | None = None,
        prompt_windows: int = 1,
        embeddings: Mapping[str, str] | str | None = None,
    ) -> None:
        self._prompt_windows, self._embedding_sources, self.embeddings = prompt_windows, embeddings, Embeddings()
        self._controlnets = controlnets or {}
        self.source, self.dtype, self._loras_wanted, self._takes_pictures = source, dtype, loras, takes_pictures
        self.shapes: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
        self._configs: dict[str, Any] = {}
        self._wanted: dict[str, _Wanted] = {}
        self._unet_config = self._config("unet", read_unet_config)

    @property
    def guidance_width(self) -> int:
        """Width of the embedding by which a distilled UNet is told the guidance scale; 0 for other UNets."""
        return self._unet_config.time_cond_proj_dim or 0

    @property
    def lora_shapes(self) -> dict[str, Shapes]:
        """Shapes of the parameters of each part that LoRAs may change; empty until `family` has read them."""
        return {part: wanted.shapes for part, wanted in self._wanted.items() if wanted.takes_loras}

    def family(self, is_guided: bool) -> StableDiffusion | StableDiffusionXL:
        """Read the configs, and return the family.

        Args:
            is_guided: every job has a row for its negative prompt.

        Raises:
            InvalidCheckpoint: a config is broken, or does not fit another.
        """
        make = self._stable_diffusion_xl if self.source.is_xl else self._stable_diffusion
        family = make(is_guided)
        for part, wanted in self._wanted.items():
            shapes = dict(wanted.shapes)
            if (table := shapes.get(_TOKEN_TABLE)) and self.embeddings.vectors:
                shapes[_TOKEN_TABLE] = (table[0] + self.embeddings.more_rows(part), *table[1:])
            self.shapes[part] = {
                name: jax.ShapeDtypeStruct(shape, wanted.dtype) for name, shape in shapes.items() if wanted.keeps(name)
            }
        return family

    def read(
        self, go_on: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, dict[str, Any]], tuple[MergedLora, ...]]:
        """Read every part's parameters, one tensor at a time, and merge LoRAs; call `family` before.

        Args:
            go_on: called before each tensor; what it raises ends the reading.

        Returns:
            Host arrays by part, then by tensor name, in the shapes of `shapes`; and what was merged.

        Raises:
            InvalidCheckpoint: a tensor is missing or broken, or a LoRA does not fit.
        """
        merge, params = merge_loras(self._loras_wanted, self.lora_shapes), {}
        for part, wanted in self._wanted.items():
            params[part] = dict[str, Any]()
            for name, array in iterate_weights(wanted.open(), wanted.shapes, wanted.dtype, merge.changes.get(part)):
                go_on()
                if wanted.keeps(name):
                    params[part][name] = array
            if (table := params[part].get(_TOKEN_TABLE)) is not None:
                params[part][_TOKEN_TABLE] = self.embeddings.extend(table, part)
        return params, merge.merged

    def _stable_diffusion(self, is_guided: bool) -> StableDiffusion:
        text_encoder, tokenizer, config = self._text_encoder("text_encoder", "tokenizer", projection=False)
        self._check_context(config.hidden_size)
        self.embeddings = read_embeddings(self._embedding_sources, {"text_encoder": config.hidden_size})
        return StableDiffusion(
            text_encoder=text_encoder,
            tokenizer=tokenizer.with_words(self.embeddings.words(config.vocab_size)),
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            **self._latent_unet(is_guided, force_upcast=False),
        )

    def _stable_diffusion_xl(self, is_guided: bool) -> StableDiffusionXL:
        first, tokenizer, config = self._text_encoder("text_encoder", "tokenizer", projection=False)
        second, tokenizer_2, config_2 = self._text_encoder("text_encoder_2", "tokenizer_2", projection=True)
        width = config.hidden_size + config_2.hidden_size
        self._check_context(width)
        widths = {"text_encoder": config.hidden_size, "text_encoder_2": config_2.hidden_size}
        self.embeddings = read_embeddings(self._embedding_sources, widths)
        return StableDiffusionXL(
            text_encoder=first,
            text_encoder_2=second,
            tokenizer=tokenizer.with_words(self.embeddings.words(config.vocab_size)),
            tokenizer_2=tokenizer_2.with_words(self.embeddings.words(config_2.vocab_size)),
            width=width,
            layers=min(config.num_hidden_layers, config_2.num_hidden_layers),
            pooled_width=config_2.projection_dim,
            zeroes_empty=self.source.zeroes_empty,
            **self._latent_unet(is_guided, force_upcast=True),
        )

    def _latent_unet(self, is_guided: bool, force_upcast: bool) -> dict[str, Any]:
        """Return what both families have, for their constructors.

        Args:
            is_guided: every job has a row for its negative prompt.
            force_upcast: whether the autoencoder's key of this name counts.
        """
        vae_config = self._config("vae", read_autoencoder_config)
        unet_config = self._unet_config
        picture_channels = self._picture_channels(unet_config.in_channels, vae_config.latent_channels)
        in_float32 = force_upcast and bool(self._configs["vae"].get("force_upcast"))
        decoder_dtype = jnp.float32 if in_float32 else self.dtype
        unet = self._network("unet", lambda: networks.unet(unet_config), self.dtype)
        decoder, encoder = self._autoencoder(vae_config, decoder_dtype)
        factor = 2 ** (len(vae_config.block_out_channels) - 1)
        height, width = _pair(unet_config.sample_size, self.source.name)
        controls = find_controlnets(self._controlnets, unet_config, factor, vae_config.latent_channels)
        for control in controls:
            self._configs[control.part] = control.config
            self._wanted[control.part] = _Wanted(control.open, control.network.shapes, self.dtype)
        return {
            "unet": unet,
            "decoder": decoder,
            "encoder": encoder,
            "controls": controls,
            "default_size": (height * factor, width * factor),
            "scale_factor": factor,
            "size_multiple": factor * 2 ** (len(unet_config.block_out_channels) - 1),
            "latent_channels": vae_config.latent_channels,
            "picture_channels": picture_channels,
            "scaling_factor": vae_config.scaling_factor,
            "latent_mean": _numbers(vae_config.latents_mean),
            "latent_std": _numbers(vae_config.latents_std),
            "prompt_windows": self._prompt_windows,
            "guidance_width": self.guidance_width,
            "is_guided": is_guided,
            "dtype": self.dtype,
            "decoder_dtype": decoder_dtype,
            "configs": self._configs,
        }

    def _picture_channels(self, unet_channels: int, latent_channels: int) -> int:
        """Return how many channels the UNet takes besides the latents.

        Raises:
            InvalidCheckpoint: they are not those of a model that is served.
            ConfigurationError: they are, but the worker takes no pictures.
        """
        more = unet_channels - latent_channels
        if more not in (0, latent_channels + 1, *(() if self.source.is_xl else (latent_channels,))):
            of_edits = "" if self.source.is_xl else f", {2 * latent_channels} for one that follows edit instructions,"
            raise InvalidCheckpoint(
                f"{self.source.name}: in_channels of the UNet must be {latent_channels}, as many as the VAE's latents"
                f" have{of_edits} or {2 * latent_channels + 1} for an inpainting checkpoint, got {unet_channels}"
            )
        if more and not self._takes_pictures:
            raise ConfigurationError(
                f"sdtpu_image_inputs must be on for {self.source.name}: its UNet sees a picture, and draws nothing"
                " without one"
            )
        return more

    def _autoencoder(self, config: Any, dtype: Any) -> tuple[Network, Network | None]:
        """Return the decoder, and the encoder if it is used; all tensors of both halves must be there."""
        decoder = self._make(lambda: networks.decoder(config), "vae")
        encoder = self._make(lambda: networks.encoder(config), "vae")
        shapes = {**decoder.shapes, **encoder.shapes}
        kept = None if self._takes_pictures else decoder.shapes.keys()
        self._wanted["vae"] = _Wanted(partial(self.source.open, "vae", shapes), shapes, dtype, kept)
        return decoder, encoder if self._takes_pictures else None

    def _text_encoder(self, part: str, tokenizer: str, projection: bool) -> tuple[Network, PromptTokenizer, Any]:
        config = self._config(part, read_clip_text_config)
        prompts = self.source.tokenizer(tokenizer, config.max_position_embeddings)
        return self._network(part, lambda: networks.text_encoder(config, projection), self.dtype), prompts, config

    def _config(self, part: str, read: Callable[..., Any]) -> Any:
        """Return a part's config, and keep its JSON."""
        label, self._configs[part] = self.source.label(part), dict(self.source.config(part))
        try:
            return read(self._configs[part], label)
        except InvalidCheckpoint:
            raise
        except Exception as exc:  # a config that makes no model fails in as many ways as there are fields
            raise InvalidCheckpoint(f"{label}: this config cannot be used: {type(exc).__name__}: {exc}") from exc

    def _network(self, part: str, make: Callable[[], Network], dtype: Any) -> Network:
        """Return a network; its parameters are loaded later."""
        network = self._make(make, part)
        opener = partial(self.source.open, part, network.shapes)
        self._wanted[part] = _Wanted(opener, network.shapes, dtype, takes_loras=True)
        return network

    def _make(self, make: Callable[[], Network], part: str) -> Network:
        try:
            return make()
        except Exception as exc:  # as above, with as many ways as there are layers
            raise InvalidCheckpoint(
                f"{self.source.label(part)}: this config cannot be used: {type(exc).__name__}: {exc}"
            ) from exc

    def _check_context(self, width: int) -> None:
        widths = self._unet_config.cross_attention_dim
        if any(each != width for each in (widths if isinstance(widths, list | tuple) else [widths])):
            raise InvalidCheckpoint(
                f"{self.source.name}: cross_attention_dim of the UNet must be {width}, what its text encoder makes,"
                f" got {brief(widths)}"
            )


def _pair(value: Any, name: str) -> tuple[int, int]:
    if value is None:
        raise InvalidCheckpoint(f"{name}: sample_size of the UNet must be an integer, or two of them, got none")
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values))
