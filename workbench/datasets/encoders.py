"""Networks of others that published metrics are defined with: CLIP, a segmenter, a face network, Inception.

None is bundled and none is needed; each says in a sentence what is missing. What they give goes into the functions of
`analysis.image_metrics`: `directional_similarity` (S_dir), `segmentation_consistency` (SC), `cosine_similarity` (ID)
and `frechet_distance` (FID).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from workbench.datasets import classifiers
from workbench.diffusion.models import best_device

BATCH = 32

Images = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class ClipEncoder:
    """CLIP's two encoders; embeddings have length 1.

    Attributes
    ----------
    name : str
    """

    name: str
    _images: Images = field(repr=False)
    _texts: Callable[[list[str]], torch.Tensor] = field(repr=False)

    def images(self, images: torch.Tensor) -> np.ndarray:
        """Embeddings of images of shape (n, 3, H, W), values in [-1, 1]; ndarray of shape (n, d)."""
        return _batched(self._images, images)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts; ndarray of shape (len(texts), d)."""
        return self._texts(list(texts)).cpu().numpy()


def load_clip(source: str | Path = "clip", *, device: str | torch.device | None = None) -> ClipEncoder:
    """CLIP for S_dir, from the hub's cache or a folder.

    Parameters
    ----------
    source : str or path
        "clip" is the one of `classifiers.CLIP`; the papers take ViT-B/16 or B/32.
    device : str or torch.device, optional

    Returns
    -------
    ClipEncoder

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        If it is not here and can't be fetched, transformers is missing, or it is no CLIP.
    """
    return ClipEncoder(str(source), *classifiers.clip_encoders(source, device=device))


def load_segmenter(
    source: str | Path, *, device: str | torch.device | None = None
) -> Callable[[torch.Tensor], np.ndarray]:
    """A semantic segmentation for SC, from the hub's cache or a folder.

    Parameters
    ----------
    source : str or path
        Of a transformers model for semantic segmentation, such as a SegFormer of face parts.
    device : str or torch.device, optional

    Returns
    -------
    callable (images of shape (n, 3, H, W) in [-1, 1]) -> int array of shape (n, h, w)
        Class of every pixel, at the resolution of the network's output.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As `load_clip`.
    """
    logits = classifiers.segmentation_logits(source, device=device)
    return lambda images: _batched(lambda batch: logits(batch).argmax(dim=1), images)


def identity_of(network: Images) -> Callable[[torch.Tensor], np.ndarray]:
    """What a face network is shown for ID, as published with ArcFace's IR-SE50 (DiffusionCLIP's id_loss).

    Images are resized to 256 pixels, cropped to rows 35 to 222 and columns 32 to 219, and averaged down to 112 x 112.

    Parameters
    ----------
    network : callable (images of shape (n, 3, 112, 112) in [-1, 1]) -> Tensor of shape (n, d)

    Returns
    -------
    callable (images of shape (n, 3, H, W) in [-1, 1]) -> ndarray of shape (n, d)
        Features whose cosine is the identity.
    """

    def features(batch: torch.Tensor) -> torch.Tensor:
        face = F.interpolate(batch, size=(256, 256), mode="bilinear", align_corners=False)[:, :, 35:223, 32:220]
        return network(F.adaptive_avg_pool2d(face, (112, 112)))

    return lambda images: _batched(features, images)


def load_inception(*, device: str | torch.device | None = None) -> Callable[[torch.Tensor], np.ndarray]:
    """The 2048 pooled features of the Inception network that FID is defined with, by the package pytorch-fid.

    Parameters
    ----------
    device : str or torch.device, optional

    Returns
    -------
    callable (images of shape (n, 3, H, W) in [-1, 1]) -> ndarray of shape (n, 2048)

    Raises
    ------
    ImportError
        If pytorch-fid is missing.
    FileNotFoundError
        If its weights are not in torch's cache and can't be fetched.
    """
    try:
        inception = importlib.import_module("pytorch_fid.inception")
    except ImportError as error:
        raise ImportError(
            "FID is defined with the Inception network of the package pytorch-fid, which needs torchvision; install "
            f"both (pip install pytorch-fid), or take frechet_distance of other features ({error})"
        ) from error
    device = best_device() if device is None else torch.device(device)
    try:
        network = inception.InceptionV3().to(device).eval()
    except OSError as error:
        raise FileNotFoundError(
            "the weights of pytorch-fid's Inception are not in torch's cache and can't be fetched now; construct "
            "pytorch_fid.inception.InceptionV3() once on a machine with a network and copy ~/.cache/torch"
        ) from error
    # It takes values in [0, 1] and resizes to 299 pixels itself.
    return lambda images: _batched(lambda batch: network((batch.to(device) + 1) / 2)[0].flatten(1), images)


@torch.inference_mode()
def _batched(function: Images, images: torch.Tensor) -> np.ndarray:
    images = torch.as_tensor(images).float().clamp(-1, 1)
    return np.concatenate([function(batch).cpu().numpy() for batch in images.split(BATCH)])
