"""The split U-Net is diffusers' own, bit for bit, and its taps are where they are said to be."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from workbench.diffusion.stages import DiffusersStages
from workbench.diffusion.unet import SplitUNet

TAPS = DiffusersStages.taps

NETWORKS = {
    "attention at the last level": {},
    "ResnetDownsample blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
    },
    "guided-diffusion's kind": {
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "out_channels": 6,
        "layers_per_block": 2,
    },
    "centred input": {"center_input_sample": True},
    "mid block without attention": {"add_attention": False},
    "one level": {
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
    },
    "scaled mid block": {"mid_block_scale_factor": 1.4142},
    "one channel, not square": {"in_channels": 1, "out_channels": 1, "sample_size": (8, 12)},
    "other activation, dropout in training only": {"act_fn": "mish", "dropout": 0.3},
}


@pytest.fixture(params=NETWORKS, scope="module")
def network(request, make_unet):
    return make_unet(**NETWORKS[request.param])


def images_for(unet, n: int = 3) -> torch.Tensor:
    size = unet.config.sample_size
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(n, unet.config.in_channels, *size, generator=torch.Generator().manual_seed(0))


def first_half(unet, out: torch.Tensor) -> torch.Tensor:
    return out[:, : unet.config.in_channels]


@pytest.mark.parametrize("tap", TAPS)
def test_decode_of_encode_is_the_plain_forward_bit_for_bit(network, tap):
    split, x_t = SplitUNet(network, tap=tap), images_for(network)
    for t in (0, 500, torch.tensor([3, 500, 999])):
        expected = first_half(network, network(x_t, t).sample)
        assert torch.equal(split.decode(split.encode(x_t, t)), expected)
        assert torch.equal(split(x_t, t), expected)


@pytest.mark.parametrize("tap", TAPS)
def test_a_zero_edit_changes_nothing_and_another_changes_eps(network, tap):
    split, x_t = SplitUNet(network, tap=tap), images_for(network)
    b = split.encode(x_t, 400)
    plain = split.decode(b)
    assert torch.equal(split.decode(b, torch.zeros_like(b.h)), plain)
    delta = torch.randn(b.h.shape[1:], generator=torch.Generator().manual_seed(1))
    assert (split.decode(b, delta) - plain).abs().max() > 1e-5
    assert (split.decode(b, delta) - split.decode(b, -delta)).abs().max() > 1e-5
    swapped = b.with_h(b.h + delta)
    assert swapped.skips is b.skips and torch.equal(split.decode(b, delta), split.decode(swapped))


def test_h_is_what_hooks_on_the_mid_block_see(network):
    seen = {}
    mid, last = network.mid_block, network.mid_block.resnets[-1]
    hooks = [
        mid.register_forward_pre_hook(lambda module, inputs: seen.update(before=inputs[0])),
        mid.register_forward_hook(lambda module, inputs, output: seen.update(after=output)),
        last.norm2.register_forward_hook(lambda module, inputs, output: seen.update(norm=output)),
        last.conv2.register_forward_pre_hook(lambda module, inputs: seen.update(activated=inputs[0])),
    ]
    x_t = images_for(network)
    network(x_t, 250)
    for hook in hooks:
        hook.remove()
    h = {tap: SplitUNet(network, tap=tap).encode(x_t, 250).h for tap in TAPS}
    assert torch.equal(h["before"], seen["before"])
    assert torch.equal(h["after"], seen["after"])
    if network.config.resnet_time_scale_shift == "default":
        assert torch.equal(h["middle"], seen["norm"])
    # With scale and shift too, h is what the non-linearity is given.
    assert torch.equal(last.nonlinearity(h["middle"]), seen["activated"])


@pytest.mark.parametrize("tap", TAPS)
def test_an_edit_reaches_the_decoder_through_h_alone(tiny, tap):
    """At the tap "before" h is a skip too; editing h in place would edit both."""
    split = tiny.tapped(tap).unet
    b = split.encode(images_for(split.unet), 300)
    kept = [s.clone() for s in (*b.skips, b.h, b.emb)]
    handed = []
    block = split.unet.up_blocks[0]
    hook = block.register_forward_pre_hook(lambda module, inputs: handed.append(inputs[1]))
    split.decode(b, torch.ones_like(b.h))
    hook.remove()
    assert all(torch.equal(now, then) for now, then in zip((*b.skips, b.h, b.emb), kept, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(handed[0], kept[: len(b.skips)][-2:], strict=True))
    if tap == "before":
        assert torch.equal(b.skips[-1], b.h)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("k", [1, 2])
def test_repeated_states_share_no_memory(tiny, n, k):
    """An asymmetric edit writes into one of each two; of a single sample, too, the other must stay as it is."""
    b = tiny.encode(images_for(tiny.unet.unet, n), 500)
    both, before = b.repeat(k), b.h.clone()
    both.h[0::k] = 7.0
    assert torch.equal(b.h, before)
    if k == 2:
        assert torch.equal(both.h[1::2], before)


@pytest.mark.parametrize("tap", TAPS)
def test_a_state_is_repeated_and_indexed_sample_by_sample(tiny, tap):
    model = tiny.tapped(tap)
    b = model.encode(images_for(tiny.unet.unet), torch.tensor([10, 500, 900]))
    eps = model.decode(b)
    torch.testing.assert_close(model.decode(b.repeat(2)), eps.repeat_interleave(2, dim=0))
    torch.testing.assert_close(model.decode(b[1:]), eps[1:])
    torch.testing.assert_close(model.decode(b[[2, 0]]), eps[[2, 0]])
    torch.testing.assert_close(model.decode(b[torch.tensor([1])]), eps[[1]])


def test_gradients_flow_through_encode_and_decode(tiny):
    x_t = images_for(tiny.unet.unet, 1).requires_grad_()
    b = tiny.encode(x_t, 300)
    delta = torch.zeros_like(b.h, requires_grad=True)
    tiny.decode(b, delta).sum().backward()
    assert x_t.grad.abs().sum() > 0
    assert delta.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_embed_type": "identity"}, "conditioned on identity"),
        ({"time_embedding_type": "fourier"}, "score-SDE"),
    ],
)
def test_networks_that_can_not_be_split_are_refused(make_unet, config, message):
    with pytest.raises(ValueError, match=message):
        SplitUNet(make_unet(**config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 32}, "SDXL"),
        ({"class_embed_type": "timestep"}, "conditioned on timestep"),
        ({"num_class_embeds": 3}, "3 classes beside the text"),
        ({"cross_attention_dim": (8, 16)}, "several widths"),
    ],
)
def test_text_networks_with_further_conditions_are_refused(config, message):
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    options = {"sample_size": 8, "block_out_channels": (32, 32), "cross_attention_dim": 8, **blocks, **config}
    if "addition_embed_type" in config:
        options["addition_time_embed_dim"] = 8
    with pytest.raises(ValueError, match=message):
        SplitUNet(UNet2DConditionModel(**options))


def test_what_is_no_unet_is_refused():
    with pytest.raises(ValueError, match="Linear has no middle block"):
        SplitUNet(torch.nn.Linear(2, 2))


def test_an_unknown_tap_is_refused_and_the_known_ones_are_listed(tiny):
    with pytest.raises(ValueError, match="'inside' is not known; it is one of before, middle, after"):
        tiny.tapped("inside")
