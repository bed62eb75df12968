"""Networks of the hub, with tiny ones of the same kinds in their place."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from workbench.analysis.image_metrics import segmentation_consistency
from workbench.datasets.classifiers import load_classifier, read_attributes
from workbench.datasets.clip import load_clip
from workbench.datasets.huggingface import load_segmenter
from workbench.datasets.labelled import load_images
from workbench.formats import hub as formats_hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Tiny models of random weights, saved as the hub has them."""
    folder = tmp_path_factory.mktemp("hub")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = {0: "cat", 1: "dog", 2: "fox"}
        encoder = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        # Weights this large make the outputs differ from image to image.
        vision = {**encoder, "image_size": 8, "patch_size": 4, "initializer_range": 0.5}
        vit = transformers.ViTForImageClassification(transformers.ViTConfig(**vision, id2label=names))
        sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
        tags = {"id2label": names, "problem_type": "multi_label_classification"}
        resnet = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, **tags))
        letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
        vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
        end = len(vocabulary) - 1
        text = {**encoder, "vocab_size": end + 1, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
        clip = transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**text, "max_position_embeddings": 40, "projection_dim": 8},
                vision_config={**vision, "projection_dim": 8},
                projection_dim=8,
            )
        )
        stages = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
        config = transformers.SegformerConfig(num_labels=4, **stages)
        segformer = transformers.SegformerForSemanticSegmentation(config)
    (folder / "letters").mkdir()
    (folder / "letters" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "letters" / "merges.txt").write_text("#version: 0.2\n")
    tokeniser = transformers.CLIPTokenizer.from_pretrained(folder / "letters")
    square, half = {"height": 8, "width": 8}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processors = {
        "vit": transformers.ViTImageProcessorPil(size=square),
        "resnet": transformers.ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=0.8),
        "clip": transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=square),
        "segformer": transformers.SegformerImageProcessorPil(size={"height": 32, "width": 32}, **half),
    }
    networks = {"vit": vit, "resnet": resnet, "clip": clip, "segformer": segformer}
    for name, network in networks.items():
        network.eval().save_pretrained(folder / name)
        processors[name].save_pretrained(folder / name)
    tokeniser.save_pretrained(folder / "clip")
    return SimpleNamespace(folder=folder, processors=processors, tokeniser=tokeniser, **networks)


@pytest.fixture(scope="module")
def faces():
    return load_images("avataaars")[:6]


@pytest.fixture(scope="module")
def pixels(hub, faces):
    """The same images as each model's own image processor prepares them."""
    pictures = list(((faces + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return {name: p(images=pictures, return_tensors="pt")["pixel_values"] for name, p in hub.processors.items()}


@torch.no_grad()
def test_a_classifier_of_exclusive_classes(hub, faces, pixels):
    classifier = load_classifier(hub.folder / "vit", device="cpu")
    expected = hub.vit(pixels["vit"]).logits
    assert classifier.attributes == ("cat", "dog", "fox") and classifier.name == "vit"
    assert read_attributes(hub.folder / "vit") == classifier.attributes
    np.testing.assert_allclose(classifier.scores(faces), expected, atol=1e-5)
    np.testing.assert_allclose(classifier(faces, batch_size=4), expected.softmax(1), atol=1e-5)
    assert expected.std(dim=0).min() > 0.1, "the images must differ for this to mean anything"
    features = classifier.features(faces)
    np.testing.assert_allclose(hub.vit.classifier(torch.from_numpy(features)), classifier.scores(faces), atol=1e-5)


@torch.no_grad()
def test_a_classifier_of_many_labels_gives_each_a_probability_of_its_own(hub, faces, pixels):
    classifier = load_classifier(str(hub.folder / "resnet"), device="cpu")
    np.testing.assert_allclose(classifier(faces), hub.resnet(pixels["resnet"]).logits.sigmoid(), atol=1e-5)
    assert classifier.features(faces).shape == (6, 8)


@torch.no_grad()
def test_clip_by_pairs_of_prompts(hub, faces, pixels):
    """The probability is the softmax over the pair, of the logits that CLIP itself gives."""
    prompts = {"Smiling": ("a smiling face", "a face"), "Old": ("an old one", "a young one")}
    classifier = load_classifier(hub.folder / "clip", prompts=prompts, device="cpu")
    probabilities = classifier(faces)
    assert list(probabilities) == ["Smiling", "Old"]
    for name, pair in prompts.items():
        inputs = hub.tokeniser(list(pair), padding=True, return_tensors="pt")
        logits = hub.clip(**inputs, pixel_values=pixels["clip"]).logits_per_image
        np.testing.assert_allclose(probabilities[name], logits.softmax(dim=1)[:, 0], atol=1e-4)
    assert probabilities.std().min() > 0
    np.testing.assert_allclose(np.linalg.norm(classifier.features(faces), axis=1), 1, atol=1e-5)
    other = load_classifier(hub.folder / "clip", prompts={"Smiling": ("a face", "a smiling face")}, device="cpu")
    np.testing.assert_allclose(other(faces)["Smiling"], 1 - probabilities["Smiling"], atol=1e-5)
    assert other.hash != classifier.hash
    published = load_classifier(hub.folder / "clip", device="cpu")
    assert published.attributes == read_attributes("clip") == ("Smiling", "Eyeglasses", "Old", "Male", "Wearing_Hat")


def test_clip_embeds_images_and_texts_in_one_space(hub, faces):
    clip = load_clip(hub.folder / "clip", device="cpu")
    images, texts = clip.images(faces), clip.texts(["a smiling person", "a person"])
    assert images.shape == (6, 8) and texts.shape == (2, 8)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([images, texts]), axis=1), 1.0, rtol=1e-5)


@torch.no_grad()
def test_a_segmenter_gives_the_class_of_every_pixel(hub, faces, pixels):
    maps = load_segmenter(hub.folder / "segformer", device="cpu")(faces)
    np.testing.assert_array_equal(maps, hub.segformer(pixels["segformer"]).logits.argmax(dim=1))
    assert segmentation_consistency(maps, maps).tolist() == [1.0] * 6


# What does not fit


@pytest.mark.parametrize("prompts", [{"Smiling": "a smile"}, {"Smiling": ("a smile",)}])
def test_prompts_are_pairs_of_texts(hub, prompts):
    with pytest.raises(ValueError, match="Smiling"):
        load_classifier(hub.folder / "clip", prompts=prompts)


def test_folders_of_another_kind_or_with_missing_files_are_refused(hub, tmp_path):
    """Also one whose head has no weights, for which transformers would draw random ones."""
    with pytest.raises(ValueError, match="a model of type 'segformer', not a CLIP"):
        load_clip(hub.folder / "segformer")
    with pytest.raises(ValueError, match="can't be loaded as a segmentation"):
        load_segmenter(hub.folder / "clip")
    folder = shutil.copytree(hub.folder / "vit", tmp_path / "mine")
    with pytest.raises(ValueError, match="prompts= is for CLIP; mine is a model of type 'vit'"):
        load_classifier(folder, prompts={"Smiling": ("a", "b")})
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "classifier" not in k}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="mine lacks the weights classifier"):
        load_classifier(folder)
    save_file(weights, folder / "model.safetensors")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        load_classifier(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="can't be loaded as an image classifier"):
        load_classifier(folder)


# The hub


@pytest.mark.parametrize("source", ["clip", "somebody/smiles"])
def test_without_a_network_the_hub_is_one_sentence(source, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nor in the hub cache.*bundled: avataaars.*`hf download .*/"):
        load_classifier(source)


def test_a_hub_id_is_looked_up_in_the_cache_first(hub, faces, monkeypatch):
    """Without asking the network; the name is that of the hub. Pickled weights are asked for after safetensors."""
    asked, found = [], {}

    def cached(repository, *, allow_patterns, local_files_only):
        asked.append((repository, allow_patterns[-1], local_files_only))
        return str(found[repository])

    monkeypatch.setattr(formats_hub, "snapshot_download", cached)
    found["somebody/vit"] = hub.folder / "vit"
    classifier = load_classifier("somebody/vit", device="cpu")
    assert classifier.name == "somebody/vit" and asked == [("somebody/vit", "*.safetensors", True)]
    pd.testing.assert_frame_equal(classifier(faces), load_classifier(hub.folder / "vit", device="cpu")(faces))
    found["somebody/letters"] = hub.folder / "letters"
    with pytest.raises(FileNotFoundError, match="letters/config.json"):
        load_classifier("somebody/letters")
    kinds = ("*.safetensors", "pytorch_model*.bin")
    assert asked[1:] == [("somebody/letters", kind, local) for local in (True, False) for kind in kinds]
