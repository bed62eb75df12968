"""Networks of the Hugging Face hub, by transformers: image classifiers and segmentations.

Each sees 8-bit pictures as its own image processor prepares them, by transformers' PIL backend, which needs no
torchvision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from workbench.datasets.classifier import Classifier
from workbench.diffusion.images import to_bytes
from workbench.diffusion.models import best_device
from workbench.formats.checkpoints import hash_weights
from workbench.formats.hub import find_folder
from workbench.shapes import with_channels

if TYPE_CHECKING:  # slow to import
    from transformers import BaseImageProcessor

BATCH = 32

_UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError)


def image_classifier(folder: Path, *, name: str, device: torch.device) -> Classifier:
    """A transformers image classifier: an attribute a class."""
    import transformers  # takes a second or two

    network = load_network(transformers.AutoModelForImageClassification, folder, name, device)
    processor = load_processor(folder)
    config = network.config
    heads = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == config.num_labels]

    def score(batch: torch.Tensor) -> torch.Tensor:
        return network(pixel_values=prepare(processor, batch).to(device)).logits

    def features(batch: torch.Tensor) -> torch.Tensor:
        seen = []
        with heads[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            score(batch)
        return seen[0].flatten(1)

    exclusive = config.problem_type != "multi_label_classification" and config.num_labels > 1
    return Classifier(
        name,
        tuple(config.id2label[i] for i in range(config.num_labels)),
        hash_weights(network),
        device,
        score,
        features if heads else None,
        (lambda scores: scores.softmax(dim=1)) if exclusive else torch.sigmoid,
    )


def load_segmenter(source: str | Path, *, device: str | torch.device | None = None) -> Callable:
    """A semantic segmentation, such as a SegFormer of face parts, for SC (`segmentation_consistency`).

    Returns
    -------
    callable (images of shape (n, C, H, W), values in [-1, 1]) -> int array of shape (n, h, w)
        Class of every pixel, at the resolution of the network's output.
    """
    import transformers

    folder, device = find_folder(source), torch.device(device or best_device())
    network = load_network(transformers.AutoModelForSemanticSegmentation, folder, str(source), device)
    processor = load_processor(folder)
    return batched(lambda batch: network(pixel_values=prepare(processor, batch).to(device)).logits.argmax(dim=1))


def batched(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], np.ndarray]:
    @torch.inference_mode()
    def whole(images: torch.Tensor) -> np.ndarray:
        return np.concatenate([function(batch).cpu().numpy() for batch in torch.as_tensor(images).split(BATCH)])

    return whole


def load_processor(folder: Path) -> BaseImageProcessor:
    """The model's own image processor."""
    import transformers

    with unreadable(f"{folder} has no image processor (preprocessor_config.json) that can be read"):
        return transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )


def prepare(processor: BaseImageProcessor, images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as an image processor prepares 8-bit pictures."""
    pictures = [*to_bytes(with_channels(images, 3), progress=False).numpy()]
    return processor(images=pictures, input_data_format="channels_first", return_tensors="pt")["pixel_values"]


def load_network(kind: type, folder: Path, name: str, device: torch.device) -> nn.Module:
    """A transformers network in eval mode, all of its weights read from the folder."""
    import transformers

    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    # It warns of weights that are missing or left over; the missing ones are an error here.
    log.set_verbosity_error()
    log.disable_progress_bar()
    what = "a segmentation" if "Segmentation" in kind.__name__ else "an image classifier or CLIP"
    try:
        with unreadable(f"{folder} can't be loaded as {what}"), torch.random.fork_rng(devices=[]):
            network, report = kind.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{name} lacks the weights {missing[0]} and {len(missing) - 1} more; take a finished model")
    return network.eval().requires_grad_(False).to(device)


@contextlib.contextmanager
def unreadable(what: str) -> Iterator[None]:
    """Errors of reading a folder, as one sentence."""
    try:
        yield
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what} ({reason}); copy the folder again") from error
