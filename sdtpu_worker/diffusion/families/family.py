"""All that the programs, the slots and the snapshots know of a model.

A family says what a request becomes on the host, what a slot keeps of it, what one prediction of the model is, and how
latents become an image. Everything else is written once over this contract: a new kind of model is one more file beside
this one, and a line in `checkpoint.py` that says which checkpoints are of it.

Shapes below: C latent channels, h x w latents, R rows of a device's batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.adapters import Adapted, Layers

Params = Mapping[str, Mapping[str, Any]]
"""The parameters of a checkpoint: by part, then by the name of the tensor."""
Shapes = Mapping[str, jax.ShapeDtypeStruct]
Arrays = Mapping[str, Any]
WINDOWS = "windows"
"""What the inputs and the conditioning of a family that takes long prompts call the windows of each row's prompt,
int32. The programs make it 1 for rows of slots without a running job."""


class PictureUse(Enum):
    """What a model does with a job's pictures."""

    NONE = "none"
    """It takes none."""
    START = "start"
    """A job may start from an image with noise. The programs keep what a mask does not cover, after every step."""
    INPAINT = "inpaint"
    """It sees the mask, and what it does not cover, in every step; a sample may start from the image too."""
    EDIT = "edit"
    """It sees the image in every step, and changes it as the prompt says; no sample starts from it."""

    @property
    def needed(self) -> tuple[str, ...]:
        """The parameters that every job must have."""
        return {PictureUse.INPAINT: ("image", "mask_image"), PictureUse.EDIT: ("image",)}.get(self, ())


class Pictures(NamedTuple):
    """What a job brings besides words, on the job's own device.

    Attributes:
        image: `(height, width, 3) float32`, colours from -1 to 1.
        mask: `(height, width) bool`, True where the image is to be drawn again.
        noise: `(2, C, h, w) float32`, standard normal, for what is encoded: the image, and the image without what the
            mask covers.
    """

    image: jax.Array
    mask: jax.Array
    noise: jax.Array


class Family(Protocol):
    """What a model is to the programs. Methods with `params` are traced; the others run on the host, in any thread."""

    @property
    def rows(self) -> int:
        """Rows of the batch for each job.

        1: the prompt's alone; a guidance scale then does nothing in the programs. 2: the negative prompt's, then the
        prompt's (classifier-free guidance). 3: the negative prompt's, then the same with the image, then the prompt's
        with the image (two guidances, arXiv 2211.09800).
        """

    @property
    def follows_guidance_scale(self) -> bool:
        """Whether a guidance scale above 1 counts: by a negative prompt's row, or since the model is told it."""

    @property
    def latent_channels(self) -> int:
        """C."""

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, along one side."""

    @property
    def size_multiple(self) -> int:
        """What the sides of an image must be a multiple of, in pixels."""

    @property
    def default_size(self) -> Lane:
        """`(height, width)` in pixels."""

    @property
    def picture_use(self) -> PictureUse:
        """What the model does with pictures."""

    @property
    def control_names(self) -> tuple[str, ...]:
        """The ControlNets that jobs can ask for, by number; empty for a family or a worker without any."""

    @property
    def adapter_layers(self) -> Layers:
        """The layers that LoRAs of single jobs may change, by part; empty for a family that takes none."""

    def control_shapes(self, size: Lane) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Return shape and dtype of what `embed_control` returns, for each ControlNet.

        Args:
            size: `(height, width)` of the image in pixels.
        """

    def input_shapes(self) -> Shapes:
        """Return shapes and dtypes of what `make_inputs` makes of one request."""

    def make_inputs(self, request: GenerationRequest, size: Lane) -> tuple[dict[str, np.ndarray], bool]:
        """Return what `encode` needs of a request, and whether a prompt had to be cut.

        Args:
            request: the job's parameters.
            size: `(height, width)` of the image in pixels.

        Raises:
            InvalidRequest: the model cannot do what the request asks for.
        """

    def conditioning_shapes(self, size: Lane) -> Shapes:
        """Return shapes and dtypes of what a slot keeps for one row: what `encode` returns, without its first axis.

        Args:
            size: `(height, width)` of the image in pixels.
        """

    def encode(
        self, params: Params, inputs: Arrays, pictures: Pictures | None, adapters: Adapted | None = None
    ) -> Arrays:
        """Return what a slot keeps of a job besides its latents.

        Args:
            params: the parameters on the job's own device.
            inputs: of one job, as `make_inputs` made them.
            pictures: of the job, zeros where it has none; None for a family that takes no pictures.
            adapters: what is added to `adapter_layers`, for `rows` rows; None for a worker whose jobs name no LoRAs.

        Returns:
            By name `(rows, …)`.
        """

    def encode_image(self, params: Params, image: jax.Array, noise: jax.Array) -> jax.Array:
        """Return an image's latents; called only for a family that takes pictures.

        Args:
            params: the parameters on the job's own device.
            image: `(height, width, 3) float32`, colours from -1 to 1.
            noise: `(C, h, w) float32`, standard normal, for an encoder that gives a distribution.

        Returns:
            `(C, h, w) float32`, scaled as `decode` takes them.
        """

    def embed_control(self, params: Params, number: int, picture: jax.Array) -> jax.Array:
        """Return what a ControlNet makes of a picture, once for all steps.

        Args:
            params: the parameters on the job's own device.
            number: of the ControlNet.
            picture: `(height, width, 3) float32`, colours from 0 to 1.
        """

    def control(
        self,
        params: Params,
        number: int,
        latents: jax.Array,
        timesteps: jax.Array,
        conditioning: Arrays,
        embedded: jax.Array,
    ) -> Any:
        """Return what a ControlNet adds to the model: a tree of arrays `(R, …)`, the same tree for all of them.

        Args:
            params: the parameters on this device.
            number: of the ControlNet.
            latents, timesteps, conditioning: as for `predict`.
            embedded: of `embed_control`, `(R, …)`.
        """

    def predict(
        self,
        params: Params,
        latents: jax.Array,
        timesteps: jax.Array,
        conditioning: Arrays,
        added: Any,
        adapters: Adapted | None = None,
    ) -> jax.Array:
        """Return the output of the model.

        Args:
            params: the parameters on this device.
            latents: `(R, C, h, w) float32`, scaled as the model wants them.
            timesteps: `(R,) float32`.
            conditioning: by name `(R, …)`.
            added: the sum of what ControlNets add, as `control` returns it; None for a family without any.
            adapters: what is added to `adapter_layers`, for R rows; None for a worker whose jobs name no LoRAs.

        Returns:
            `(R, C, h, w) float32`.
        """

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Return an image.

        Args:
            params: the parameters on this device.
            latents: `(C, h, w) float32` after the last step.

        Returns:
            `(height, width, 3) float32`, colours from -1 to 1 or a little outside.
        """

    def facts(self) -> Mapping[str, Any]:
        """Return the JSON-compatible configs that pixels depend on, for the fingerprint of snapshots."""
