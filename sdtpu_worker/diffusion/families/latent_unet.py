"""What the families with a conditional UNet over an autoencoder's latents share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.adapters import Adapted
from sdtpu_worker.diffusion.control_nets import ControlNet
from sdtpu_worker.diffusion.families.family import WINDOWS, Arrays, Params, Pictures, PictureUse
from sdtpu_worker.diffusion.families.text_windows import context_of
from sdtpu_worker.diffusion.prompt_inputs import Prompt, PromptInputs, read_prompts
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.models.network import Network
from sdtpu_worker.redaction import brief


@dataclass(frozen=True)
class LatentUNet:
    """The UNet, the decoder and their sizes.

    Attributes:
        unet: the network, whose parameters are the part `unet`.
        decoder: of the autoencoder; the part `vae`.
        encoder: of the autoencoder, also the part `vae`; None for a worker that takes no pictures.
        default_size: `(height, width)` in pixels.
        controls: the ControlNets that jobs can ask for.
        scale_factor: pixels per latent, along one side.
        size_multiple: what the sides of an image must be a multiple of, in pixels.
        latent_channels: of a latent.
        picture_channels: what the UNet sees of a picture beside the latents: 0; C for a model that follows edit
            instructions (InstructPix2Pix); C + 1 for an inpainting model.
        scaling_factor: what latents were multiplied by before the UNet was trained on them.
        latent_mean, latent_std: by channel, what latents were brought to before that; None for latents as they are.
        prompt_windows: how many windows a job's prompt may have; with 1 the programs know of no others.
        guidance_width: of the embedding by which a distilled UNet is told the guidance scale; 0 for other UNets.
        is_guided: every job has a row in the batch for its negative prompt.
        dtype: of the computation in the UNet and the text encoders.
        decoder_dtype: of the computation in the decoder.
        configs: by part, the configs as JSON, for `facts`.
    """

    unet: Network
    decoder: Network
    encoder: Network | None
    controls: tuple[ControlNet, ...]
    default_size: Lane
    scale_factor: int
    size_multiple: int
    latent_channels: int
    picture_channels: int
    scaling_factor: float
    latent_mean: tuple[float, ...] | None
    latent_std: tuple[float, ...] | None
    prompt_windows: int
    guidance_width: int
    is_guided: bool
    dtype: Any
    decoder_dtype: Any
    configs: Mapping[str, Any] = field(repr=False)

    @property
    def rows(self) -> int:
        """See `Family.rows`."""
        if not self.is_guided:
            return 1
        return 3 if self.picture_use is PictureUse.EDIT else 2

    @property
    def follows_guidance_scale(self) -> bool:
        """See `Family.follows_guidance_scale`."""
        return self.is_guided or self.guidance_width > 0

    @property
    def picture_use(self) -> PictureUse:
        """See `Family.picture_use`."""
        if self.picture_channels:
            return PictureUse.EDIT if self.picture_channels == self.latent_channels else PictureUse.INPAINT
        return PictureUse.START if self.encoder is not None else PictureUse.NONE

    @property
    def control_names(self) -> tuple[str, ...]:
        """See `Family.control_names`."""
        return tuple(control.name for control in self.controls)

    def control_shapes(self, size: Lane) -> tuple[jax.ShapeDtypeStruct, ...]:
        """See `Family.control_shapes`."""
        height, width = (side // self.scale_factor for side in size)
        return tuple(jax.ShapeDtypeStruct((height, width, each.channels), self.dtype) for each in self.controls)

    def embed_control(self, params: Params, number: int, picture: jax.Array) -> jax.Array:
        """See `Family.embed_control`."""
        control = self.controls[number]
        embedded: jax.Array = control.network(params[control.part], picture[None], method="embed")[0]
        return embedded

    def control(
        self,
        params: Params,
        number: int,
        latents: jax.Array,
        timesteps: jax.Array,
        conditioning: Arrays,
        embedded: jax.Array,
    ) -> Any:
        """See `Family.control`."""
        control, sample = self.controls[number], latents.transpose(0, 2, 3, 1).astype(self.dtype)
        more = {name: conditioning[name] for name in ("text_embeds", "time_ids") if name in conditioning}
        return control.network(params[control.part], sample, timesteps, context_of(conditioning), embedded, **more)

    def encode_image(self, params: Params, image: jax.Array, noise: jax.Array) -> jax.Array:
        """See `Family.encode_image`."""
        mean, logvar = self._moments(params, image)
        latents = mean + jnp.exp(0.5 * logvar) * noise.transpose(1, 2, 0)
        if self.latent_mean is not None and self.latent_std is not None:
            latents = (latents - jnp.asarray(self.latent_mean)) * self.scaling_factor / jnp.asarray(self.latent_std)
        else:
            latents = latents * self.scaling_factor
        return latents.transpose(2, 0, 1)

    def _moments(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return mean and logarithm of the variance of an image's latents, `(h, w, C) float32`."""
        assert self.encoder is not None
        moments = self.encoder(params["vae"], image[None].astype(self.decoder_dtype))
        return moments.mean[0].astype(jnp.float32), moments.logvar[0].astype(jnp.float32)

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """See `Family.decode`."""
        latents = latents.transpose(1, 2, 0)
        if self.latent_mean is not None and self.latent_std is not None:
            latents = latents * jnp.asarray(self.latent_std) / self.scaling_factor + jnp.asarray(self.latent_mean)
        else:
            latents = latents / self.scaling_factor
        return self.decoder(params["vae"], latents[None].astype(self.decoder_dtype))[0].astype(jnp.float32)

    def facts(self) -> Mapping[str, Any]:
        """See `Family.facts`."""
        own = {"family": type(self).__name__, "is_guided": self.is_guided, "prompt_windows": self.prompt_windows}
        return {**own, **self.configs}

    def _skip(self, request: GenerationRequest, layers: int) -> np.ndarray:
        """Return how many layers of a text encoder a request leaves out, `(rows,) int32`.

        It concerns the prompt alone: PyTorch's pipelines encode negative prompts with all layers.

        Raises:
            InvalidRequest: more than there are.
        """
        if request.clip_skip >= layers:
            raise InvalidRequest(
                f"clip_skip must be 0 to {layers - 1}: the text encoder of this checkpoint has {layers} layers,"
                f" got {request.clip_skip}"
            )
        return np.array([0, 0, request.clip_skip][-self.rows :], np.int32)

    def _check_guidance(self, request: GenerationRequest) -> None:
        """Make sure that the model can follow the guidance scale.

        Raises:
            InvalidRequest: it has no row for a negative prompt.
        """
        if (request.guidance_scale or 0) > 1 and not self.follows_guidance_scale:
            raise InvalidRequest(
                "guidance_scale must be 1 or less: this worker serves its checkpoint without guidance"
                f" (sdtpu_guidance), got {brief(request.guidance_scale)}"
            )
        if request.guidance_rescale and not self.is_guided:
            raise InvalidRequest(
                "guidance_rescale must be 0: this worker serves its checkpoint without guidance (sdtpu_guidance), got"
                f" {brief(request.guidance_rescale)}"
            )

    def _read_prompts(self, tokenizer: PromptTokenizer, prompt: Prompt, negative: Prompt, syntax: str) -> PromptInputs:
        """Return what a text encoder takes of a job's rows."""
        return read_prompts(tokenizer, [negative] * (self.rows - 1) + [prompt], syntax, self.prompt_windows)

    def _window_counts(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Return what the inputs have besides where prompts may have several windows: `(rows,) int32`."""
        return {WINDOWS: counts} if self.prompt_windows > 1 else {}

    def _prompt_shapes(self, lengths: Mapping[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes and dtypes of what `_read_prompts` makes of a job, for text encoders.

        Args:
            lengths: by what the names of an encoder's inputs end in, the tokens of a window.
        """
        shapes = {}
        for ending, length in lengths.items():
            shape = self.rows, self.prompt_windows, length
            shapes[f"prompt_ids{ending}"] = jax.ShapeDtypeStruct(shape, jnp.int32)
            shapes[f"prompt_weights{ending}"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        if self.prompt_windows > 1:
            shapes[WINDOWS] = jax.ShapeDtypeStruct((self.rows,), jnp.int32)
        return shapes

    def _check_pictures(self, request: GenerationRequest) -> None:
        """Make sure that the model gets the pictures that it needs.

        Raises:
            InvalidRequest: it gets others.
        """
        use = self.picture_use
        if request.image is not None and use is PictureUse.NONE:
            raise InvalidRequest("image must be left out: this worker takes no pictures (sdtpu_image_inputs is off)")
        if any(getattr(request, name) is None for name in use.needed):
            what = {
                PictureUse.INPAINT: "is for inpainting, and draws what the mask covers",
                PictureUse.EDIT: "changes an image as the prompt says",
            }[use]
            raise InvalidRequest(f"{' and '.join(use.needed)} must be given: this worker's checkpoint {what}")
        useless = ("strength", "mask_image") if use is PictureUse.EDIT else ("image_guidance_scale",)
        for name in useless:
            if getattr(request, name) is not None:
                of_edits = "follows edit instructions (InstructPix2Pix)"
                which = f"this worker's checkpoint {of_edits}, with image_guidance_scale"
                if use is not PictureUse.EDIT:
                    which = f"only a checkpoint that {of_edits} can use it"
                raise InvalidRequest(f"{name} must be left out: {which}, got {brief(getattr(request, name))}")

    def _picture_shapes(self, size: Lane) -> dict[str, jax.ShapeDtypeStruct]:
        """Return what the conditioning has besides, for a UNet that sees a picture."""
        if not self.picture_channels:
            return {}
        height, width = (side // self.scale_factor for side in size)
        return {"picture": jax.ShapeDtypeStruct((height, width, self.picture_channels), self.dtype)}

    def _picture_of(self, params: Params, pictures: Pictures | None) -> dict[str, Any]:
        """Return what the conditioning has of it.

        For an inpainting model that is the mask, and the latents of what it does not cover. A model that follows edit
        instructions sees the image's latents, not scaled, in all rows but the first.
        """
        if not self.picture_channels:
            return {}
        assert pictures is not None
        if self.picture_use is PictureUse.EDIT:
            mean, _ = self._moments(params, pictures.image)
            return {"picture": jnp.stack([jnp.zeros_like(mean), mean, mean][-self.rows :])}
        uncovered = pictures.image * ~pictures.mask[..., None]
        latents = self.encode_image(params, uncovered, pictures.noise[1]).transpose(1, 2, 0)
        mask = pictures.mask[:: self.scale_factor, :: self.scale_factor, None].astype(jnp.float32)
        return {"picture": jnp.stack([jnp.concatenate([mask, latents], axis=-1)] * self.rows)}

    def _guidance_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return what inputs and conditioning have besides, for a UNet that is told the guidance scale."""
        if not self.guidance_width:
            return {}
        return {"guidance_embedding": jax.ShapeDtypeStruct((self.guidance_width,), jnp.float32)}

    def _guidance_inputs(self, request: GenerationRequest) -> dict[str, np.ndarray]:
        """Return the guidance scale as a distilled UNet is told it: sines, then cosines, of 1000 times what exceeds 1.

        Source: arXiv 2310.04378, section 4, with the embedding of timesteps.
        """
        if not self.guidance_width:
            return {}
        half = self.guidance_width // 2
        frequencies = np.exp(-math.log(10_000) / (half - 1) * np.arange(half))
        angles = 1000 * ((request.guidance_scale or 0.0) - 1) * frequencies
        return {"guidance_embedding": np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32)}

    def _guidance_of(self, inputs: Arrays) -> dict[str, Any]:
        """Return what the conditioning has of it: one copy for each row."""
        return {name: jnp.stack([inputs[name]] * self.rows) for name in self._guidance_shapes()}

    def _ask_unet(
        self,
        params: Params,
        latents: jax.Array,
        timesteps: jax.Array,
        conditioning: Arrays,
        added: Any,
        adapters: Adapted | None,
        **more: Any,
    ) -> jax.Array:
        """Return the UNet's output, channels first as the slots have them."""
        if added is not None:
            more |= {"down_residuals": added.down, "mid_residual": added.mid}
        if self.guidance_width:
            more["timestep_cond"] = conditioning["guidance_embedding"]
        sample = latents.transpose(0, 2, 3, 1).astype(self.dtype)
        if self.picture_channels:
            sample = jnp.concatenate([sample, conditioning["picture"].astype(self.dtype)], axis=-1)
        of_unet = None if adapters is None else adapters["unet"]
        out = self.unet(params["unet"], sample, timesteps, context_of(conditioning), adapters=of_unet, **more)
        return out.transpose(0, 3, 1, 2).astype(jnp.float32)


def transformer_layers(unet: Network) -> dict[str, tuple[int, int]]:
    """Return the linear layers and the convolutions of 1 × 1 in a UNet's transformers: by weight, its features."""
    return {name: sizes for name, sizes in linear_layers(unet).items() if ".attentions." in name}


def linear_layers(network: Network) -> dict[str, tuple[int, int]]:
    """Return the linear layers and the convolutions of 1 × 1: by the name of the weight `(in, out)`."""
    return {
        name: (shape[-2], shape[-1])
        for name, shape in network.shapes.items()
        if name in network.torch_axes and len(shape) in (2, 4) and set(shape[:-2]) <= {1}
    }
