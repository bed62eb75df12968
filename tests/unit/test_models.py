"""Loading: every layout of a model folder, and a sentence for everything that is none."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import time
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

import workbench as wb
from workbench import paths
from workbench.diffusion.loading import load_shapes
from workbench.diffusion.models import refuse_other_model
from workbench.formats.checkpoints import hash_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
BUNDLED = {
    "avataaars32": "d24fc2efe1c1dd40",
    "avataaars32-h": "f6abe8066c1f7a14",
    "avataaars64": "3d7729cecc72861c",
    "avataaars32-text": "5be20648f671b35a",
    "eurosat32": "fbecb56de3273143",
}
"""The bundled models and their weights."""


def images_for(model, n: int = 2) -> torch.Tensor:
    return torch.randn(n, *model.image_shape, generator=torch.Generator().manual_seed(0))


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def refused(words, source, kind=ValueError, **options) -> None:
    with pytest.raises(kind, match=words):
        wb.load_model(source, **options)


# What loads


@pytest.mark.parametrize("name", [name for name in BUNDLED if name != "avataaars32-text"])
def test_a_bundled_folder_is_the_network_that_diffusers_loads(name):
    model = wb.load_model(name, device="cpu")
    assert model.hash == BUNDLED[name]
    pipeline = DDPMPipeline.from_pretrained(paths.models() / name)
    x_t = images_for(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x_t, 500), pipeline.unet(x_t, 500).sample, atol=1e-4, rtol=1e-4)


def test_the_bundled_text_model_is_the_network_that_diffusers_loads():
    model = wb.load_model("avataaars32-text", device="cpu")
    assert model.hash == BUNDLED[model.name]
    folder, tokens, x_t = paths.models() / model.name, model.text.tokens("a smiling person"), images_for(model)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    with torch.no_grad():
        expected = unet(x_t, 500, encoder_hidden_states=tokens.repeat(len(x_t), 1, 1)).sample
        torch.testing.assert_close(model.conditioned(condition=tokens)(x_t, 500), expected, atol=1e-4, rtol=1e-4)


def test_the_bundled_models_are_listed_and_load_by_their_names(model, tiny, tiny_folder, monkeypatch):
    bundled = {found["name"]: found["images"] for found in wb.list_models() if found["where"] == "bundled"}
    assert bundled.keys() == BUNDLED.keys() and bundled["avataaars32"] == model.image_shape == (3, 32, 32)
    assert (model.schedule.T, model.tap) == (1000, "after")
    assert f"weights {model.hash}, clip_sample off" in repr(model) and "\n" not in repr(model)
    tiny_folder.rename(tiny_folder.with_name("my model"))
    monkeypatch.setattr(paths, "models", lambda: tiny_folder.parent)
    assert [found["name"] for found in wb.list_models() if found["where"] == "bundled"] == ["my model"]
    assert wb.load_model("my model", device="cpu").hash == tiny.hash


def test_a_folder_with_unet_and_scheduler_or_a_flat_one_loads(tiny, tiny_folder, tmp_path, make_unet, monkeypatch):
    loaded = wb.load_model(tiny_folder, device="cpu")
    assert (loaded.name, loaded.hash) == ("tiny", tiny.hash)
    assert torch.equal(loaded(images_for(tiny), 30), tiny(images_for(tiny), 30))
    make_unet().save_pretrained(tmp_path / "flat")  # as the google repositories are
    DDPMScheduler().save_pretrained(tmp_path / "flat")
    monkeypatch.chdir(tmp_path)
    assert wb.load_model("./flat", device="cpu").hash == tiny.hash


def test_old_attention_names_in_a_bin_file_are_brought_up_to_date(tiny, tiny_folder):
    new_to_old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def old(name: str) -> str:
        for new, before in new_to_old.items():
            name = name.replace(new, before)
        return name

    state = load_file(tiny_folder / "unet" / WEIGHTS)
    (tiny_folder / "unet" / WEIGHTS).unlink()
    renamed = {old(name): tensor for name, tensor in state.items()}
    torch.save(renamed, tiny_folder / "unet" / "diffusion_pytorch_model.bin")
    assert wb.load_model(tiny_folder, device="cpu").hash == tiny.hash


def shard(folder, *, suffix: str, index: bool) -> None:
    """The weights in two files, with or without the index that diffusers writes beside them."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002{suffix}.safetensors" for i in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(state)}
    for file in names:
        save_file({name: tensor for name, tensor in state.items() if where[name] == file}, folder / file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": where})
        (folder / f"diffusion_pytorch_model.safetensors.index{suffix}.json").write_text(text)


@pytest.mark.parametrize("suffix", ["", ".fp16"])
@pytest.mark.parametrize("index", [True, False])
def test_weights_in_shards_load_and_a_missing_one_is_named(tiny, tiny_folder, suffix, index):
    shard(tiny_folder / "unet", suffix=suffix, index=index)
    assert wb.load_model(tiny_folder, device="cpu").hash == tiny.hash
    lost = f"diffusion_pytorch_model-00001-of-00002{suffix}.safetensors"
    (tiny_folder / "unet" / lost).unlink()
    refused(lost, tiny_folder, FileNotFoundError, device="cpu")


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_a_variant_is_loaded_where_there_is_no_other_and_never_before_it(tiny, tiny_folder, variant):
    plain = tiny_folder / "unet" / WEIGHTS
    state = {name: tensor.half() for name, tensor in load_file(plain).items()}
    save_file(state, plain.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    assert wb.load_model(tiny_folder, device="cpu").hash == tiny.hash
    plain.unlink()
    low = wb.load_model(tiny_folder, device="cpu")
    assert low.hash != tiny.hash
    assert low(images_for(low), 500).dtype == torch.float32
    torch.testing.assert_close(low(images_for(low), 500), tiny(images_for(low), 500), atol=1e-2, rtol=1e-2)


def test_the_moving_average_of_a_training_is_loaded_and_said_and_the_weights_themselves_by_their_path(
    tiny, tiny_folder, make_unet
):
    average = wb.wrap(make_unet(seed=1), DDPMScheduler(), name="average", device="cpu").hash
    checkpoint = tiny_folder / "checkpoint-500"
    for folder in (tiny_folder, checkpoint):
        make_unet().save_pretrained(folder / "unet")
        make_unet(seed=1).save_pretrained(folder / "unet_ema")
        with pytest.warns(UserWarning, match="unet_ema, which is loaded"):
            assert wb.load_model(folder, device="cpu").hash == average
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert wb.load_model(folder / "unet", device="cpu").hash == tiny.hash
            assert wb.load_model(folder / "unet_ema", device="cpu").hash == average


def test_the_hash_is_the_weights_own(tiny, make_unet):
    assert wb.wrap(make_unet(), DDPMScheduler(), name="other name", device="cpu").hash == tiny.hash
    assert wb.wrap(make_unet(seed=1), DDPMScheduler(), name="tiny", device="cpu").hash != tiny.hash
    assert hash_weights(make_unet().to(memory_format=torch.channels_last)) == hash_weights(make_unet())
    assert re.fullmatch("[0-9a-f]{16}", tiny.hash)


def test_wrap_copies_so_that_your_network_stays_as_it_is(make_unet):
    """The copy's weights are channels last, and compute what they did before."""
    unet = make_unet().train().requires_grad_(True)
    wrapped = wb.wrap(unet, DDPMScheduler(), name="copy", device="cpu")
    inner, before = wrapped.unet.unet, wrapped(images_for(wrapped), 5)
    torch.testing.assert_close(before, make_unet()(images_for(wrapped), 5).sample, atol=1e-5, rtol=1e-5)
    assert unet.training and all(p.requires_grad for p in unet.parameters()) and unet.conv_in.weight.is_contiguous()
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    assert torch.equal(wrapped(images_for(wrapped), 5), before)
    assert not inner.training and not any(p.requires_grad for p in inner.parameters())
    assert inner.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_schedule_is_the_schedulers(make_unet):
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", num_train_timesteps=400)
    schedule = wb.wrap(make_unet(), scheduler, name="cosine", device="cpu").schedule
    assert (schedule.T, schedule.spacing) == (400, "trailing")
    torch.testing.assert_close(torch.from_numpy(schedule.alpha_bars.copy()), scheduler.alphas_cumprod.double())


def test_lower_precision_agrees_and_gives_float32(tiny_folder, tiny):
    low = wb.load_model(tiny_folder, device="cpu", dtype="bfloat16")
    x_t = images_for(tiny)
    eps, h = low(x_t, 500), low.encode(x_t, 500).h
    assert eps.dtype == h.dtype == torch.float32
    # bfloat16 has 8 bits: 0.4% a rounding, some dozens of them.
    torch.testing.assert_close(eps, tiny(x_t, 500), atol=0.05, rtol=0.05)
    assert not torch.equal(eps, tiny(x_t, 500))
    assert "bfloat16" in repr(low)
    assert low.hash == tiny.hash
    assert low.tapped("before").dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_a_compiled_model_computes_the_same(tiny, tiny_folder):
    """One size of batch alone: every other is compiled anew, which takes longer than all other tests of this file."""
    compiled = wb.load_model(tiny_folder, device="cpu", compile=True)
    x_t = images_for(tiny, 1)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x_t, 500), tiny(x_t, 500), atol=1e-4, rtol=1e-4)
    assert compiled.hash == tiny.hash
    assert compiled.compiled and not tiny.compiled
    run = wb.sample(tiny, [0], steps=2, progress=False)
    with pytest.raises(ValueError, match="is compiled, which keeps no derivatives; load it with compile=False"):
        wb.find_jacobian(compiled, replace(run, model=compiled), t=run.timesteps[0], k=1)


def test_a_model_that_can_not_be_compiled_says_so(tiny_folder, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: setattr(self, "forward", fail))
    refused(r"tiny .*\(no compiler\); load it with compile=False", tiny_folder, device="cpu", compile=True)


def test_a_tapped_model_is_the_same_weights_elsewhere(tiny):
    before = tiny.tapped("before")
    assert (before.tap, before.hash, before.unet.unet) == ("before", tiny.hash, tiny.unet.unet)
    assert torch.equal(before(images_for(tiny), 5), tiny(images_for(tiny), 5))
    assert before.provenance() == {**tiny.provenance(), "tap": "before"}


def test_a_repository_in_the_hub_cache_loads_and_is_listed(tiny, tiny_folder, tmp_path, monkeypatch):
    hub, commit = tmp_path / "hub", "0" * 40
    repository = hub / "models--somebody--ddpm"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(hub))
    loaded = wb.load_model("somebody/ddpm", device="cpu")
    assert (loaded.name, loaded.hash) == ("somebody/ddpm", tiny.hash)
    (entry,) = [each for each in wb.list_models() if each["where"] == "hub cache"]
    assert (entry["name"], entry["images"]) == ("somebody/ddpm", (3, 8, 8))


def test_loading_a_model_leaves_the_allocator_of_the_users_process_alone(tiny_folder, monkeypatch):
    def called(*_):
        raise AssertionError("glibc's settings were changed")

    monkeypatch.setattr("workbench.diffusion.memory.ctypes.CDLL", called)
    with pytest.raises(AssertionError, match="were changed"):
        wb.keep_freed_memory()
    wb.load_model(tiny_folder, device="cpu")


# What does not


def test_a_name_that_is_none_lists_the_bundled_models_at_once():
    start = time.perf_counter()
    for source, words in (("avatars", "'avatars'"), ("/no/such/folder", "no model"), ("no/ddpm", "download no/ddpm")):
        refused(f"(?s)(?=.*avataaars32).*{words}", source, FileNotFoundError)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("unet/config.json", "no unet/config.json and no config.json"),
        (f"unet/{WEIGHTS}", WEIGHTS),
        ("scheduler/scheduler_config.json", "scheduler_config.json"),
    ],
)
def test_a_missing_part_is_named(tiny_folder, missing, message):
    (tiny_folder / missing).unlink()
    refused(message, tiny_folder, FileNotFoundError)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\udc80"])
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_config_that_is_no_json_object_is_named(tiny_folder, name, content):
    (tiny_folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(os.path.basename(name), tiny_folder)


def test_a_truncated_weights_file_or_one_of_something_else_is_refused(tiny_folder, make_unet):
    weights, single = (tiny_folder / "unet" / name for name in (WEIGHTS, "diffusion_pytorch_model.bin"))
    cut(weights)
    refused(f"{WEIGHTS} can't be read as weights; it is truncated", tiny_folder)
    weights.unlink()
    torch.save({"state_dict": {}}, single)
    refused(single.name, tiny_folder)
    torch.save(make_unet().state_dict(), single)
    cut(single)
    refused(f"{single.name} can't be read as weights; it is truncated", tiny_folder)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_pickle_is_refused_and_not_executed(tiny_folder, tmp_path, write):
    (tiny_folder / "unet" / WEIGHTS).unlink()
    write({"weight": Malicious(tmp_path / "executed")}, tiny_folder / "unet" / "diffusion_pytorch_model.bin")
    refused("can't be read as weights", tiny_folder)
    assert not (tmp_path / "executed").exists()


def with_two_values(state, value: float):
    state["conv_in.weight"][0, 0, 0, :2] = value
    return state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: with_two_values(state, float("nan")), "2 of 216 values of conv_in.weight"),
        (lambda state: with_two_values(state, float("inf")), "2 of 216 values of conv_in.weight"),
        (lambda state: {**state, "extra.weight": torch.zeros(1)}, "extra.weight"),
        (lambda state: {k: v for k, v in state.items() if k != "conv_out.bias"}, "conv_out.bias"),
    ],
)
def test_weights_that_can_not_be_the_networks_are_named(tiny_folder, change, words):
    path = tiny_folder / "unet" / WEIGHTS
    save_file(change(load_file(path)), path)
    refused(words, tiny_folder)


@pytest.mark.parametrize("part", ["vae", "vqvae", "text_encoder"])
def test_a_part_that_is_missing_is_named(tiny_folder, part):
    index = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], part: ["diffusers", "VQModel"]}
    (tiny_folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=f"lacks {part}/config.json"):
        wb.load_model(tiny_folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"beta_schedule": "cosine"}, "scheduler_config.json .*cosine"),
        ({"num_train_timesteps": -3}, "scheduler_config.json"),
        ({"timestep_spacing": "even"}, "scheduler_config.json .*'even'"),
    ],
)
def test_a_schedule_that_can_not_be_used_is_named_before_weights_are_read(tiny_folder, changes, words):
    (tiny_folder / "unet" / WEIGHTS).write_bytes(b"not read")
    edit_json(tiny_folder / "scheduler" / "scheduler_config.json", **changes)
    refused(words, tiny_folder)


@pytest.mark.parametrize(
    "changes, T, prediction",
    [
        ({"predict_epsilon": True}, 1000, "epsilon"),
        ({"predict_epsilon": False}, 1000, "sample"),
        ({"prediction_type": "v_prediction"}, 1000, "v_prediction"),
        ({"timesteps": 200}, 200, "epsilon"),
    ],
)
def test_keys_of_schedulers_old_and_new_are_understood(tiny_folder, changes, T, prediction):
    path = tiny_folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "num_train_timesteps"} | changes))
    model = wb.load_model(tiny_folder, device="cpu")
    assert (model.schedule.T, model.prediction) == (T, prediction)


def test_a_scheduler_without_alpha_bar_is_refused(make_unet, tiny_folder):
    """Its config would otherwise be filled up with DDPM's defaults, and the images would be noise."""
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        wb.wrap(make_unet(), FlowMatchEulerDiscreteScheduler(), name="flow")
    shutil.rmtree(tiny_folder / "scheduler")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tiny_folder / "scheduler")
    refused("FlowMatchEulerDiscreteScheduler", tiny_folder)


LEVELS = {"block_out_channels": [8] * 4, "down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"block_out_channels": [12, 16]}, r"conv_in.weight: .*\[8, 3, 3, 3\].*\[12, 3, 3, 3\]"),
        ({"block_out_channels": [8]}, "does not describe a U-Net"),
        ({"down_block_types": ["NoSuchBlock", "DownBlock2D"]}, "does not describe a U-Net"),
        ({"norm_num_groups": 5}, "does not describe a U-Net"),
        ({"attention_head_dim": 0}, "does not describe a U-Net"),
        ({"mid_block_type": None}, "no middle block"),
        ({"_class_name": "UNet1DModel"}, "UNet1DModel"),
        ({"sample_size": 7}, "sample_size is 7.*multiples of 2"),
        ({"sample_size": 28, **LEVELS}, "sample_size is 28.*multiples of 8"),
        ({"sample_size": [8, 9]}, r"sample_size is \[8, 9\]"),
        ({"sample_size": "8"}, "sample_size is '8'"),
        ({"sample_size": 0}, "sample_size is 0"),
        ({"sample_size": None}, "sample_size"),
        ({"in_channels": 6}, "in_channels is 6 and out_channels is 3"),
        ({"out_channels": 4}, "in_channels is 3 and out_channels is 4"),
        ({"attention_head_dim": 32}, "can't compute an image of its sample_size, 8"),
    ],
)
def test_a_config_of_another_network_or_of_no_images_size_is_refused(tiny_folder, changes, words):
    edit_json(tiny_folder / "unet" / "config.json", **changes)
    refused(words, tiny_folder)
    if "_class_name" not in changes and not words.startswith(("conv_in", "can't compute")):  # both by weights or a pass
        with pytest.raises(ValueError, match=words):
            load_shapes(tiny_folder)


def test_a_precision_or_a_device_that_is_not_there_is_refused(tiny_folder):
    refused("'int8' .*one of float32, bfloat16, float16", tiny_folder, dtype="int8")
    for device in ("cuda:99" if torch.cuda.is_available() else "cuda", "warp-drive"):
        refused(f"device '{device}'", tiny_folder, device=device)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hash": "ffff"}, "the run belongs to the model 'tiny'.*weights ffff.*sample it again"),
        ({"tap": "before"}, r"'after'.*'before'; use model.tapped\('after'\)"),
        ({"network": "ffff"}, "another network around the same weights"),
        ({"schedule": {"hash": "ffff"}}, "another noise schedule"),
    ],
)
def test_what_was_made_with_another_model_is_refused(tiny, change, match):
    own = tiny.provenance()
    with pytest.raises(ValueError, match=match):
        refuse_other_model("the run", own, own | change, remedy="sample it again")
    refuse_other_model("the run", own, own | {"name": "another name"})
    refuse_other_model("the boundary", None, own | change)
    refuse_other_model("the boundary", own, None)
    refuse_other_model("x_t", own, own | {"tap": "before"}, tap=False)
    old = {key: own[key] for key in ("name", "hash", "tap")}  # of a file that says no more
    refuse_other_model("the direction", old, own)
