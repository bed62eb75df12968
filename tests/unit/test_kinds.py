"""Conditional networks, latents and other predictions give what diffusers' own networks and pipelines give."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_models
import torch
from diffusers import DDIMScheduler, DDPMScheduler, VQModel
from small_models import WIDTH, text_unet

import workbench as wb
from workbench.diffusion import codec
from workbench.diffusion.conditions import as_condition
from workbench.diffusion.noise import normal
from workbench.diffusion.unet import SplitUNet
from workbench.directions import boundary_accuracy

LENGTH = 5
"""L of the tokens."""

TEXT = {
    "Stable Diffusion": {},
    "Stable Diffusion 2: linear projections, heads a level": {
        "use_linear_projection": True,
        "attention_head_dim": (1, 2),
    },
    "one block with cross-attention, mid block without": {"mid_block_type": "UNetMidBlock2D"},
    "DeepFloyd IF, stage I": {
        "in_channels": 3,
        "out_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
        "time_embedding_act_fn": "gelu",
        "resnet_skip_time_act": True,
        "cross_attention_norm": "group_norm",
        "cross_attention_dim": 32,
        "encoder_hid_dim": WIDTH,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "attention_head_dim": 8,
    },
}


def tokens(seed: int) -> torch.Tensor:
    return torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def noise(unet, n: int = 3) -> torch.Tensor:
    return torch.randn(n, unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=TEXT)
def text_network(request):
    return text_unet(**TEXT[request.param])


@pytest.fixture(scope="module", params=[None, "timestep"])
def class_network(request, make_unet):
    kind = {"num_class_embeds": 4} if request.param is None else {"class_embed_type": request.param}
    return make_unet(**kind)


def every_tap(split: SplitUNet) -> list[SplitUNet]:
    return [split.at(tap=tap) for tap in split.taps]


def test_every_tap_of_a_text_network_decodes_to_its_own_forward_bit_for_bit(text_network):
    x_t, c = noise(text_network), tokens(0)
    split = SplitUNet(text_network, condition=as_condition(tokens=c))
    for t in (0, torch.tensor([3, 500, 999])):
        expected = text_network(x_t, t, c.repeat(3, 1, 1)).sample[:, : x_t.shape[1]]
        for tapped in every_tap(split):
            b = tapped.encode(x_t, t)
            assert torch.equal(tapped.decode(b), expected), tapped.tap
            assert tuple(b.h.shape[1:]) == tapped.h_shape, tapped.tap


def test_every_tap_of_a_class_network_decodes_to_its_own_forward_bit_for_bit(class_network):
    x_t, schedule = noise(class_network), wb.NoiseSchedule.linear()
    model = wb.wrap(class_network, schedule, name="a", label=3, device="cpu")
    expected = model.unet.unet(x_t, 500, torch.full((3,), 3)).sample
    for tapped in every_tap(model.unet):
        assert torch.equal(tapped(x_t, 500), expected), tapped.tap
    assert not torch.equal(model.conditioned(label=2)(x_t, 500), expected)


@pytest.mark.parametrize("tap", ["down.0", "skip.0", "skip.2", "up.0", "up.1"])
def test_taps_outside_of_the_mid_block_are_where_hooks_see_them(tiny, tap):
    unet, seen = tiny.unet.unet, {}
    kind, k = tap.split(".")
    if kind == "skip":
        # The decoder takes skips from the end: two a block here.
        def keep(module, inputs):
            seen["skips"] = (*inputs[1], *seen.get("skips", ()))

        hooks = [block.register_forward_pre_hook(keep) for block in unet.up_blocks]
    else:
        block = (unet.down_blocks if kind == "down" else unet.up_blocks)[int(k)]
        hooks = [block.register_forward_hook(lambda module, inputs, out: seen.update(out=out))]
    x_t = noise(unet)
    unet(x_t, 250)
    for hook in hooks:
        hook.remove()
    expected = seen["skips"][int(k)] if kind == "skip" else seen["out"][0] if kind == "down" else seen["out"]
    model = tiny.tapped(tap)
    assert torch.equal(model.encode(x_t, 250).h, expected)
    b = model.encode(x_t, 250)
    moved = model.decode(b, torch.randn(b.h.shape, generator=torch.Generator().manual_seed(1)))
    assert (moved - model.decode(b)).abs().max() > 1e-5


def test_an_edit_of_a_skip_reaches_only_the_decoder(tiny):
    """A change of the last skip must not change what the mid block is given, which is the same tensor."""
    model, x_t = tiny.tapped("skip.3"), noise(tiny.unet.unet)
    b = model.encode(x_t, 250)
    assert torch.equal(b.residual, tiny.encode(x_t, 250).h)
    expected = tiny.unet.decode(
        wb.Bottleneck(b.residual, (*b.skips[:3], b.skips[3] + 1.0), b.emb, "after"),
    )
    assert torch.equal(model.decode(b, torch.ones_like(b.h)), expected)


def test_guidance_combines_both_passes_and_a_change_of_h_is_made_in_both():
    unet = text_unet()
    x_t, own, other = noise(unet), tokens(0), tokens(1)
    plain = [wb.wrap(unet, wb.NoiseSchedule.linear(), name="a", condition=c, device="cpu") for c in (own, other)]
    guided = plain[0].conditioned(condition=own, negative=other, guidance_scale=3.0)
    states = [model.encode(x_t, 400) for model in plain]
    b = guided.encode(x_t, 400)
    torch.testing.assert_close(b.h, states[0].h)
    delta = torch.randn(b.h.shape, generator=torch.Generator().manual_seed(3))
    for change in (torch.zeros_like(delta), delta):
        c, u = (model.decode(state, change) for model, state in zip(plain, states, strict=True))
        torch.testing.assert_close(guided.decode(b, change), u + 3 * (c - u), atol=1e-5, rtol=1e-5)
    expected = guided.decode(b, delta)
    torch.testing.assert_close(guided.decode(b.repeat(2), delta.repeat_interleave(2, 0))[::2], expected)
    torch.testing.assert_close(guided.decode(b[[2, 0]], delta[[2, 0]]), expected[[2, 0]])
    pieces = [guided.encode(x_t[rows], 400) for rows in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(guided.decode(wb.Bottleneck.joined(pieces), delta), expected)
    both = b.repeat(2)  # as an asymmetric edit does
    both.h[0::2] += delta
    torch.testing.assert_close(guided.decode(both)[0::2], expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_samples_of_every_prediction_are_those_of_diffusers(make_unet, prediction):
    unet = make_unet()
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction)
    model = wb.wrap(unet, scheduler, name="a", device="cpu")
    run = wb.sample(model, [5, 6], steps=4, eta=0.0, progress=False)
    x = run.x_T.clone()
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x, eta=0.0).prev_sample
    torch.testing.assert_close(run.x0, x, atol=1e-4, rtol=1e-4)
    back = wb.invert(model, run.x0.clamp(-1, 1), steps=4, method="edit-friendly", progress=False)
    torch.testing.assert_close(wb.replay(back, residual=True, progress=False).x0, back.x0, atol=1e-5, rtol=0)
    assert model.provenance().get("prediction", "epsilon") == prediction


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_parts_give_what_the_undivided_network_gives(make_unet, scale):
    """Of every kind: notebook 10 shows the difference."""
    condition = {"condition": tokens(0), "negative": tokens(1), "guidance_scale": scale}
    learned = make_unet(out_channels=6, num_class_embeds=4)
    for unet, options in ((text_unet(), condition), (learned, {"label": 1, "prediction": "v_prediction"})):
        model, x_t = wb.wrap(unet, wb.NoiseSchedule.linear(), name="a", device="cpu", **options), noise(unet)
        assert torch.equal(model.undivided(x_t, 300), model(x_t, 300))


def test_a_schedule_of_zero_terminal_snr_runs_where_eps_is_defined(make_unet):
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    model = wb.wrap(make_unet(), scheduler, name="a", device="cpu")
    with pytest.raises(ValueError, match="999"):
        wb.sample(model, [0], steps=4, progress=False)
    run = wb.sample(model, [0], steps=[998, 700, 300, 0], progress=False)
    assert torch.isfinite(run.x0).all()
    assert model.schedule.alpha_bar(999) == 0.0


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A tiny Stable Diffusion on disk, and its pipeline."""
    folder = tmp_path_factory.mktemp("sd")
    return folder / "model", small_models.stable_diffusion(folder)


@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_images_of_stable_diffusion_are_those_of_its_pipeline(stable_diffusion, scale):
    folder, pipeline = stable_diffusion
    options = {"prompt": "a cafe", "negative_prompt": "bad", "guidance_scale": scale}
    model = wb.load_model(folder, device="cpu", **options)
    run = wb.sample(model, [5, 6], steps=4, eta=0.0, progress=False)
    assert (model.latent, model.x_shape, model.image_shape) == (True, (4, 8, 8), (3, 16, 16))
    expected = pipeline(
        **options | {"prompt": ["a cafe"] * 2, "negative_prompt": ["bad"] * 2},
        latents=run.x_T,
        num_inference_steps=4,
        output_type="pt",
    ).images
    torch.testing.assert_close((run.images / 2 + 0.5).clamp(0, 1), expected, atol=1e-5, rtol=0)
    assert model.condition.provenance()["prompt"] == "a cafe"


def test_a_prompt_is_known_by_its_words_and_its_encoder(stable_diffusion, monkeypatch):
    """The last digits of its tokens differ from processor to processor."""
    folder, _ = stable_diffusion
    model = wb.load_model(folder, device="cpu", prompt="a cafe")
    tokens = type(model.text).tokens
    monkeypatch.setattr(type(model.text), "tokens", lambda *args, **on: tokens(*args, **on) * (1 + 1e-6))
    again = model.conditioned(prompt="a cafe")
    assert not torch.equal(again.condition.values, model.condition.values)
    assert again.condition.hash == model.condition.hash
    others = [model.conditioned(prompt="a bag"), model.conditioned(prompt="a cafe", negative_prompt="bad")]
    others.append(model.conditioned(prompt="a cafe", guidance_scale=2.0))
    hashes = {each.condition.hash for each in (model, *others)}
    monkeypatch.setitem(vars(model.text), "hash", "another encoder")
    assert len(hashes | {model.conditioned(prompt="a cafe").condition.hash}) == 5


def test_weights_by_their_path_and_variants_keep_the_other_parts(stable_diffusion, tmp_path):
    """As a training leaves them: `unet_ema/` beside `unet/`, and everything in half precision alone."""
    folder, pipeline = stable_diffusion
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    shutil.copytree(whole / "unet", whole / "unet_ema")
    shutil.copytree(whole / "unet", whole / "checkpoint-500" / "unet")
    for place in (whole / "unet", whole / "unet_ema", whole / "checkpoint-500", whole / "checkpoint-500" / "unet"):
        model = wb.load_model(place, device="cpu", prompt="a cafe")
        assert (model.latent, model.image_shape) == (True, (3, 16, 16))
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    half = wb.load_model(tmp_path / "half", device="cpu", prompt="a cafe")
    assert torch.equal(half.condition.values, model.condition.values)


def test_a_latent_model_is_inverted_edited_and_extracted_like_any_other(stable_diffusion, tmp_path):
    folder, _ = stable_diffusion
    model = wb.load_model(folder, device="cpu", prompt="a cafe")
    run = wb.sample(model, range(6), steps=4, eta=0.0, record_x=True, progress=False)
    store = wb.extract(model, 6, steps=4, eta=0.0, out=tmp_path / "store.zarr", record_x=True, progress=False)
    np.testing.assert_allclose(store.images[:], run.images.numpy(), atol=1e-5)
    assert store.at(run.timesteps[0]).shape == (6, math.prod(model.h_shape))
    images = run.images.clamp(-1, 1)
    inverted = wb.invert(model, images, steps=4, residual=True, progress=False)
    again = wb.replay(inverted, residual=True, progress=False)
    torch.testing.assert_close(again.images, inverted.images, atol=1e-4, rtol=0)
    assert np.isfinite(inverted.round_trip_error()).all()
    direction = wb.find_pca(store, k=1, progress=False)[0]
    grid = wb.edit_grid(model, run, direction, scales=[0.0, 2.0], progress=False)
    assert grid.images.shape == (6, 2, *model.image_shape)
    torch.testing.assert_close(grid.images[:, 0], run.images)
    mask = np.zeros((16, 16), dtype=bool)
    mask[3, 3] = True  # one pixel of the latent (1, 1)
    kept = wb.find_jacobian(model, run[0], t=run.timesteps[1], k=1, mask=mask, progress=False)
    assert kept.directions[0].provenance["parameters"]["mask"]["outputs"] == 4
    boundary = wb.fit_boundary(run, np.array([0, 1] * 3), t=run.timesteps[1], space="x", method="mean")
    assert tuple(boundary.normal.shape) == model.x_shape


def test_what_is_measured_on_a_latent_model_keeps_latents_and_images_apart(stable_diffusion, tmp_path, monkeypatch):
    """Noise and x_0 are of the latents; what is compared and shown are images."""
    model, drawn, compared = wb.load_model(stable_diffusion[0], device="cpu", prompt="a cafe"), [], []
    store = wb.extract(model, 12, steps=4, eta=0.0, out=tmp_path / "store.zarr", record_x=True, progress=False)
    t = store.timesteps[2]

    def spied(seeds, shape, **options):
        drawn.append(tuple(shape))
        return normal(seeds, shape, **options)

    monkeypatch.setattr(boundary_accuracy, "normal", spied)
    table = wb.accuracy_over_time(model, store, pd.Series([0, 1] * 6, name="a"), timesteps=[t], cv=2)
    assert "forward-diffused" in set(table.samples) and drawn == [model.x_shape]

    def distance(a, b):
        compared.append((tuple(a.shape[1:]), tuple(b.shape[1:])))
        return (a - b).square().flatten(1).mean(dim=1).numpy()

    wb.mixing_step(store, criterion="perceptual", model=model, distance=distance, progress=False)
    assert set(compared) == {(model.image_shape, model.image_shape)}
    run = wb.sample(model, [0], steps=4, eta=0.0, progress=False)
    session = wb.EditSession(model, run, wb.find_pca(store, k=1, progress=False)[0])
    predicted = session.predictions().before
    assert tuple(predicted.shape[1:]) == model.image_shape
    # Not the same: the schedule of Stable Diffusion ends at alpha_bar(0), a little below 1.
    torch.testing.assert_close(predicted[-1], run.images[0], atol=1e-2, rtol=0)


def test_vq_latents_and_class_labels_from_a_folder(tmp_path, make_unet, monkeypatch):
    """The layout of CompVis/ldm-celebahq-256: vqvae/, unet/ of UNet2DModel, scheduler/."""
    vae = VQModel(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=16,
    ).eval()
    vae.save_pretrained(tmp_path / "vqvae")
    make_unet(num_class_embeds=3).save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    index = '{"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"], "unet": ["diffusers", "UNet2DModel"]}'
    (tmp_path / "model_index.json").write_text(index)
    model = wb.load_model(tmp_path, device="cpu", label=2)
    x0 = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(x0 / vae.config.scaling_factor).sample
    torch.testing.assert_close(model.to_images(x0), expected)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(model.to_latents(images), vae.encode(images).latents * vae.config.scaling_factor)
    assert model.condition.about == {"label": 2}
    monkeypatch.setattr(codec, "BATCH_PIXELS", 16 * 16 * 2)  # of two images, whatever the channels of the latents
    sizes, decode = [], model.codec.vae.decode
    monkeypatch.setattr(model.codec.vae, "decode", lambda x: sizes.append(len(x)) or decode(x))
    model.to_images(x0.repeat(2, 1, 1, 1))
    assert sizes == [2, 2]


def test_latents_of_codes_narrower_than_the_encoder_and_rare_schedules_load(tmp_path, make_unet):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    narrow = {"latent_channels": 8, "vq_embed_dim": 3, "num_vq_embeddings": 16, "norm_num_groups": 4}
    vae = VQModel(block_out_channels=(4, 8), **blocks, **narrow).eval()
    model = wb.wrap(make_unet(), DDPMScheduler(), name="vq", device="cpu", vae=vae)
    assert model.to_latents(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 8, 8)
    make_unet().save_pretrained(tmp_path / "unet")
    DDPMScheduler(beta_schedule="sigmoid").save_pretrained(tmp_path / "scheduler")
    expected = wb.wrap(make_unet(), DDPMScheduler(beta_schedule="sigmoid"), name="sigmoid", device="cpu")
    assert wb.load_model(tmp_path, device="cpu").schedule.provenance() == expected.schedule.provenance()


def test_a_model_comes_back_as_a_provenance_recorded_it(stable_diffusion, make_unet):
    folder, _ = stable_diffusion
    plain = wb.load_model(folder, device="cpu")
    for options in ({"prompt": "a cafe", "negative_prompt": "bad"}, {"prompt": "a bag", "guidance_scale": 2.0}):
        recorded = plain.tapped("skip.1").conditioned(**options).provenance()
        assert plain.as_recorded(recorded).provenance() == recorded
    labelled = wb.wrap(make_unet(num_class_embeds=4), wb.NoiseSchedule.linear(), name="a", device="cpu")
    recorded = labelled.conditioned(label=2, negative=3, guidance_scale=2.0).provenance()
    assert labelled.as_recorded(recorded).provenance() == recorded
    with pytest.raises(ValueError, match="tokens that no file holds"):
        plain.as_recorded(plain.conditioned(condition=torch.zeros(1, 7, WIDTH)).provenance())


def test_directions_carry_over_to_another_condition_and_samples_do_not(make_unet):
    unet = make_unet(num_class_embeds=4)
    models = [wb.wrap(unet, wb.NoiseSchedule.linear(), name="a", label=k, device="cpu") for k in (1, 2)]
    runs = [wb.sample(model, [0, 1], steps=2, record_h=True, progress=False) for model in models]
    provenance = {"model": models[0].provenance(), "method": "ones"}
    delta = torch.ones(2, *models[0].h_shape)
    direction = wb.Direction.from_delta(delta, timesteps=runs[0].timesteps, name="ones", provenance=provenance)
    wb.edit(models[1], runs[1], direction, progress=False)
    with pytest.raises(ValueError, match="another condition"):
        wb.edit(models[1], runs[0], direction, progress=False)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ({}, {"label": 1}, "unconditional.*label"),
        ({}, {"prompt": "a face"}, "'a face'.*no text encoder"),
        ({}, {"condition": tokens(0)}, "unconditional.*text"),
        ({"num_class_embeds": 4}, {"label": 4}, "label 4.*0 to 3"),
        ({"num_class_embeds": 4}, {"label": 1.5}, "1.5"),
        ({"num_class_embeds": 4}, {"label": 1, "guidance_scale": 3.0}, "3.0.*negative"),
        ({"num_class_embeds": 4}, {"label": 1, "guidance_scale": float("nan")}, "nan"),
        ({"num_class_embeds": 4}, {"label": 1, "condition": tokens(0)}, "one of them"),
        ({"text": True}, {"condition": torch.zeros(1, 5, 9)}, "9 wide.*8"),
        ({"text": True}, {"condition": torch.zeros(2, 5, 8)}, r"\(2, 5, 8\)"),
        ({"text": True}, {"label": 1}, "on a text, not on a label"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(make_unet, kind, options, message):
    unet = text_unet() if kind.get("text") else make_unet(**kind)
    with pytest.raises(ValueError, match=message):
        wb.wrap(unet, wb.NoiseSchedule.linear(), name="a", device="cpu").conditioned(**options)


def test_a_conditional_model_without_a_condition_says_what_to_give(make_unet):
    for unet, example in ((make_unet(num_class_embeds=4), "label="), (text_unet(), "prompt=")):
        model = wb.wrap(unet, wb.NoiseSchedule.linear(), name="a", device="cpu")
        with pytest.raises(ValueError, match=example):
            wb.sample(model, [0], steps=2, progress=False)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"text_encoder_2": ["transformers", "CLIPTextModel"]}', "SDXL"),
        ('{"transformer": ["diffusers", "DiTTransformer2DModel"]}', "transformer.*no bottleneck"),
        ('{"controlnet": ["diffusers", "ControlNetModel"]}', "controlnet"),
    ],
)
def test_pipelines_of_other_kinds_are_refused_by_their_part(tiny_folder, index, message):
    (tiny_folder / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        wb.load_model(tiny_folder)


@pytest.mark.parametrize("prompt", ["", "   ", 3, "0 1"])
def test_prompts_without_known_words_are_refused(stable_diffusion, prompt):
    with pytest.raises(ValueError, match=repr(prompt)):
        wb.load_model(stable_diffusion[0], device="cpu", prompt=prompt)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(stable_diffusion):
    with pytest.warns(UserWarning, match="more than 7 tokens"):
        wb.load_model(stable_diffusion[0], device="cpu", prompt="a b c d e f g h")
