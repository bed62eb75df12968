"""Networks of others for published metrics, with tiny ones of the same kinds in their place."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from workbench.analysis.image_metrics import directional_similarity, segmentation_consistency
from workbench.datasets import encoders

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def images():
    return 2 * torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A random SegFormer of four classes."""
    folder = tmp_path_factory.mktemp("segformer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.SegformerForSemanticSegmentation(
            transformers.SegformerConfig(
                num_labels=4, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1],
                decoder_hidden_size=8,
            )
        )  # fmt: skip
    network.eval().save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"height": 32, "width": 32}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    return folder, network


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP that reads letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = len(tokens) - 1
    text = {"vocab_size": end + 1, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**shared, **text, "max_position_embeddings": 40, "projection_dim": 8},
                vision_config={**shared, "image_size": 32, "patch_size": 8, "projection_dim": 8},
                projection_dim=8,
            )
        )
    network.eval().save_pretrained(folder)
    square = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size=square, crop_size=square).save_pretrained(folder)
    return folder


def test_clip_embeds_images_and_texts_in_one_space(clip, images):
    encoder = encoders.load_clip(clip, device="cpu")
    embedded, texts = encoder.images(images), encoder.texts(["a smiling person", "a person"])
    assert embedded.shape == (5, 8) and texts.shape == (2, 8)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([embedded, texts]), axis=1), 1.0, rtol=1e-5)
    moved = encoder.images(-images)
    found = directional_similarity(embedded, moved, source=texts[1], target=texts[0])
    text = texts[0] - texts[1]
    for i in range(5):
        step = moved[i] - embedded[i]
        assert found[i] == pytest.approx(step @ text / np.linalg.norm(step) / np.linalg.norm(text), abs=1e-4)


def test_a_segmenter_gives_the_class_of_every_pixel(segmenter, images):
    folder, network = segmenter
    segment = encoders.load_segmenter(folder, device="cpu")
    maps = segment(images)
    with torch.no_grad():
        np.testing.assert_array_equal(maps, network(images).logits.argmax(dim=1))
    assert segmentation_consistency(maps, maps).tolist() == [1.0] * 5


def test_the_face_network_sees_the_published_crop(images):
    shown = []
    features = encoders.identity_of(lambda batch: shown.append(batch) or batch.flatten(1))(images)
    large = F.interpolate(images, size=(256, 256), mode="bilinear", align_corners=False)
    expected = F.adaptive_avg_pool2d(large[:, :, 35:223, 32:220], 112)
    assert shown[0].shape == (5, 3, 112, 112) and features.shape == (5, 3 * 112 * 112)
    torch.testing.assert_close(shown[0], expected)


def test_inception_is_that_of_pytorch_fid_shown_values_in_0_to_1(images, monkeypatch):
    class InceptionV3(torch.nn.Module):
        def forward(self, x):
            assert 0 <= x.min() and x.max() <= 1
            return [x.mean(dim=(2, 3), keepdim=True)]

    module = ModuleType("pytorch_fid.inception")
    module.InceptionV3 = InceptionV3
    monkeypatch.setitem(sys.modules, "pytorch_fid", ModuleType("pytorch_fid"))
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", module)
    features = encoders.load_inception(device="cpu")(images)
    np.testing.assert_allclose(features, ((images + 1) / 2).mean(dim=(2, 3)), rtol=1e-5)

    def offline(self):
        raise OSError("urlopen error")

    monkeypatch.setattr(InceptionV3, "__init__", offline)
    with pytest.raises(FileNotFoundError, match="are not in torch's cache and can't be fetched now"):
        encoders.load_inception(device="cpu")


def test_what_is_missing_is_a_sentence(monkeypatch, segmenter, tmp_path):
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    with pytest.raises(ImportError, match="pip install pytorch-fid"):
        encoders.load_inception()
    with pytest.raises(FileNotFoundError, match="it can't be fetched now"):
        encoders.load_clip("somebody/clip")
    with pytest.raises(ValueError, match="is a model of type 'segformer', not a CLIP"):
        encoders.load_clip(segmenter[0])
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="can't be loaded as a segmentation"):
        encoders.load_segmenter(tmp_path)
