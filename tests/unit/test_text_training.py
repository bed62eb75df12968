"""Training on captions: the network begins as the unconditional one, and a run repeats and resumes to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import workbench as wb
from workbench.diffusion import training
from workbench.diffusion.networks import conditioned_unet
from workbench.diffusion.training import TrainingSettings, make_batch, train_model

SMALL = {"size": 8, "widths": (16, 16), "attention": (4,), "head_channels": 8, "batch_size": 8, "learning_rate": 3e-3}
QUIET = {"log_every": 2, "minutes": 0, "previews": 0, "progress": False}


def test_a_conditioned_network_begins_as_the_unconditional_one_without_its_attention(make_unet):
    unet = make_unet(attention_head_dim=4)
    conditioned = conditioned_unet(unet, token_width=12, seed=0)
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.tensor([10, 900]), torch.randn(2, 5, 12)
    with torch.no_grad():
        before = unet(x, t).sample
        for name, module in unet.named_modules():
            if name.endswith("to_out.0"):
                module.weight.zero_(), module.bias.zero_()
        without, given = unet(x, t).sample, conditioned(x, t, encoder_hidden_states=tokens).sample
    torch.testing.assert_close(given, without, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, without)
    assert conditioned.down_blocks[1].attentions[0].transformer_blocks[0].attn2.heads == 4
    single = conditioned_unet(make_unet(attention_head_dim=None), token_width=12, seed=0)
    assert single.down_blocks[1].attentions[0].transformer_blocks[0].attn2.heads == 1


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "model"
    settings = TrainingSettings(**SMALL, steps=8, text=str(squares[1]))
    train_model(squares[0], settings, out=out, **{**QUIET, "previews": 1})
    return out


def test_the_folder_is_a_text_to_image_model(trained):
    model = wb.load_model(trained, device="cpu")
    assert model.text is not None
    red, blue = (
        wb.sample(model.conditioned(prompt=f"a {c} square"), [0], steps=3, progress=False) for c in ("red", "blue")
    )
    assert not torch.equal(red.x0, blue.x0)
    with pytest.raises(ValueError, match="zebra"):
        model.conditioned(prompt="zebra")


def test_a_stopped_training_on_captions_goes_on_bit_for_bit(squares, trained, tmp_path, monkeypatch):
    settings, out = TrainingSettings(**SMALL, steps=8, text=str(squares[1])), tmp_path / "model"
    taken, step = [], training._take_step

    def stop(*given, **options):
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*given, **options)

    monkeypatch.setattr(training, "_take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train_model(squares[0], settings, out=out, **QUIET)
    monkeypatch.undo()
    train_model(squares[0], out=out, resume=True, **QUIET)
    one, other = (load_file(folder / "checkpoint.safetensors") for folder in (trained, out))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_caption_comes_and_some_are_left_out():
    settings = TrainingSettings(**SMALL, text="any", text_dropout=0.25)
    batches = [make_batch(settings, step, n=20, shape=(3, 8, 8)) for step in range(200)]
    untold = np.concatenate([batch.untold for batch in batches])
    chosen = np.concatenate([batch.caption for batch in batches])
    assert untold.mean() == pytest.approx(0.25, abs=0.03)
    assert np.histogram(chosen, bins=4, range=(0, 1))[0].min() > 0.2 * len(chosen)


def test_captions_are_needed(squares, tmp_path):
    settings = TrainingSettings(**SMALL, steps=2, text=str(squares[1]))
    with pytest.raises(ValueError, match="captions"):
        train_model(squares[0][:10], settings, out=tmp_path / "model", **QUIET)
