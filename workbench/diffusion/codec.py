"""The autoencoder of a latent diffusion model: between images and the latents that the network denoises."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, VQModel
from tqdm.auto import tqdm

from workbench.formats.checkpoints import hash_weights

BATCH_PIXELS = 2**18
"""Pixels of images that are encoded or decoded at once."""


class Codec:
    """An autoencoder with the scale of its latents (Rombach et al. 2022).

    Parameters
    ----------
    vae : AutoencoderKL or VQModel
        The deterministic encoder is used: the mean of AutoencoderKL's distribution.

    Attributes
    ----------
    hash : str
        Content hash of the weights.

    Raises
    ------
    ValueError
        If it is of another class.
    """

    def __init__(self, vae: torch.nn.Module) -> None:
        if not isinstance(vae, (AutoencoderKL, VQModel)):
            raise ValueError(f"{type(vae).__name__} is not supported; the workbench takes AutoencoderKL and VQModel")
        self.vae, self.hash = vae.eval().requires_grad_(False), hash_weights(vae)
        self._scale = vae.config.scaling_factor
        self._shift = vae.config.get("shift_factor") or 0.0

    @property
    def factor(self) -> int:
        """Pixels of an image along a side of one latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def image_shape(self, x_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the images of latents of a shape."""
        return (self.vae.config.out_channels, x_shape[1] * self.factor, x_shape[2] * self.factor)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (n, C, H, W), float32, on the CPU, of latents."""

        def images(x: torch.Tensor) -> torch.Tensor:
            return self.vae.decode(x / self._scale + self._shift).sample

        return self._map(images, latents, "decoding images", self.factor**2)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents (n, C, h, w), float32, on the CPU, of images in [-1, 1]."""

        def latents(x: torch.Tensor) -> torch.Tensor:
            found = self.vae.encode(x)
            latent = found.latents if isinstance(self.vae, VQModel) else found.latent_dist.mode()
            return (latent - self._shift) * self._scale

        return self._map(latents, images, "encoding images", 1)

    def _map(self, function, x: torch.Tensor, verb: str, pixels: int) -> torch.Tensor:
        """A function of batches; `pixels` of an image are one value of x."""
        parts = x.split(max(1, BATCH_PIXELS // (pixels * x.shape[-1] * x.shape[-2])))
        device = next(self.vae.parameters()).device
        with torch.inference_mode():
            shown = tqdm(parts, verb, delay=2, leave=False, disable=len(parts) == 1)
            return torch.cat([function(part.to(device).float()).float().cpu() for part in shown])
