"""Networks of the Hugging Face hub, by transformers (extra `[hf]`): image classifiers, CLIP and segmentations.

Each sees 8-bit pictures as its own image processor prepares them, by transformers' PIL backend, which needs no
torchvision.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from workbench.datasets.classifier import Classifier
from workbench.diffusion.images import to_bytes
from workbench.diffusion.models import best_device
from workbench.formats.checkpoints import hash_weights, read_json
from workbench.formats.hub import fetch
from workbench.paths import local
from workbench.shapes import with_channels

CLIP = "openai/clip-vit-base-patch32"
"""Repository of the name "clip"."""

BATCH = 32

_UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError)


def find_folder(source: str | Path, *, bundled: Iterable[str] = ()) -> Path:
    """Folder of a model: a folder as it is, a hub id from the hub's cache or the hub; "clip" is `CLIP`."""
    path = local(source)
    if path.is_dir():
        return path
    _transformers()
    kinds = ("*.safetensors", "pytorch_model*.bin")  # pickled weights are read without executing them
    return fetch(
        CLIP if source == "clip" else str(source),
        *(("*.json", "*.txt", weights) for weights in kinds),
        complete=lambda folder: any(path for kind in kinds for path in folder.glob(kind)),
        bundled=bundled,
    )


def image_classifier(folder: Path, *, name: str, device: torch.device) -> Classifier:
    """A transformers image classifier: an attribute a class."""
    network = _load(_transformers().AutoModelForImageClassification, folder, name, device)
    prepare = _processor(folder)
    config = network.config
    heads = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == config.num_labels]

    def score(batch: torch.Tensor) -> torch.Tensor:
        return network(pixel_values=prepare(batch).to(device)).logits

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


def prompted_classifier(
    folder: Path, prompts: Mapping[str, tuple[str, str]], *, name: str, device: torch.device
) -> Classifier:
    """CLIP, zero-shot: an attribute a pair of prompts, with it and without it."""
    for attribute, pair in prompts.items():
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(prompt, str) for prompt in pair):
            raise ValueError(f"prompts[{attribute!r}] is {pair!r}; give two texts, with the attribute and without it")
    network, images, texts = _clip(folder, name, device)
    with torch.inference_mode():
        embedded = texts([text for pair in prompts.values() for text in pair])
        # The softmax over a pair is the sigmoid of the difference of its logits.
        difference = network.logit_scale.exp() * (embedded[0::2] - embedded[1::2]).T
    digest = hashlib.sha256(json.dumps([hash_weights(network), list(prompts.items())]).encode()).hexdigest()[:16]
    return Classifier(name, tuple(prompts), digest, device, lambda batch: images(batch) @ difference, images)


def load_clip(source: str | Path = "clip", *, device: str | torch.device | None = None) -> tuple[Callable, Callable]:
    """CLIP's encoders, for S_dir (`directional_similarity`).

    Parameters
    ----------
    source : str or path
        Hub id or folder; the papers take ViT-B/16 or B/32, which is "clip".

    Returns
    -------
    images : callable (images of shape (n, C, H, W), values in [-1, 1]) -> ndarray of shape (n, d)
    texts : callable (sequence of n texts) -> ndarray of shape (n, d)
        Both give embeddings of length 1.
    """
    folder = find_folder(source)
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ValueError(f"{source} is a model of type {kind!r}, not a CLIP")
    _, images, texts = _clip(folder, str(source), torch.device(device or best_device()))
    return _batched(images), torch.inference_mode()(lambda given: texts(list(given)).cpu().numpy())


def load_segmenter(source: str | Path, *, device: str | torch.device | None = None) -> Callable:
    """A semantic segmentation, such as a SegFormer of face parts, for SC (`segmentation_consistency`).

    Returns
    -------
    callable (images of shape (n, C, H, W), values in [-1, 1]) -> int array of shape (n, h, w)
        Class of every pixel, at the resolution of the network's output.
    """
    folder, device = find_folder(source), torch.device(device or best_device())
    network = _load(_transformers().AutoModelForSemanticSegmentation, folder, str(source), device)
    prepare = _processor(folder)
    return _batched(lambda batch: network(pixel_values=prepare(batch).to(device)).logits.argmax(dim=1))


def _batched(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], np.ndarray]:
    @torch.inference_mode()
    def whole(images: torch.Tensor) -> np.ndarray:
        return np.concatenate([function(batch).cpu().numpy() for batch in torch.as_tensor(images).split(BATCH)])

    return whole


def _clip(folder: Path, name: str, device: torch.device) -> tuple[nn.Module, Callable, Callable]:
    """A CLIP and its encoders of images and of texts."""
    transformers = _transformers()
    network = _load(transformers.CLIPModel, folder, name, device)
    prepare = _processor(folder)
    with _unreadable(f"{folder} has no tokenizer that can be read"):
        tokeniser = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def images(batch: torch.Tensor) -> torch.Tensor:
        return F.normalize(network.get_image_features(pixel_values=prepare(batch).to(device)).pooler_output, dim=1)

    def texts(given: Sequence[str]) -> torch.Tensor:
        tokens = tokeniser(given, padding=True, return_tensors="pt").to(device)
        return F.normalize(network.get_text_features(**tokens).pooler_output, dim=1)

    return network, images, texts


def _processor(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's image processor for images in [-1, 1]."""
    with _unreadable(f"{folder} has no image processor (preprocessor_config.json) that can be read"):
        processor = _transformers().AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )

    def prepare(images: torch.Tensor) -> torch.Tensor:
        pictures = [*to_bytes(with_channels(images, 3), progress=False).numpy()]
        return processor(images=pictures, input_data_format="channels_first", return_tensors="pt")["pixel_values"]

    return prepare


def _load(kind, folder: Path, name: str, device: torch.device) -> nn.Module:
    """A transformers network in eval mode, all of its weights read from the folder."""
    log = _transformers().utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    # It warns of weights that are missing or left over; the missing ones are an error here.
    log.set_verbosity_error()
    log.disable_progress_bar()
    what = "a segmentation" if "Segmentation" in kind.__name__ else "an image classifier or CLIP"
    try:
        with _unreadable(f"{folder} can't be loaded as {what}"), torch.random.fork_rng(devices=[]):
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
def _unreadable(what: str) -> Iterator[None]:
    """Errors of reading a folder, as one sentence."""
    try:
        yield
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what} ({reason}); copy the folder again") from error


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"networks of the hub need transformers; run `pip install -e .[hf]` ({error})") from error
    return transformers
