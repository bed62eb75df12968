"""The spectrum of the Jacobian against the dense one, on U-Nets that are small enough to write it down."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel

import workbench as wb
from workbench.diffusion.sampling import Injection
from workbench.directions import linearised
from workbench.directions.direction import load_direction
from workbench.directions.jacobian import JacobianSpectrum, find_jacobian, find_pullback
from workbench.directions.linearised import Linearised
from workbench.directions.singular_vectors import top_singular_vectors

T_FOUND = 600
STEPS = [800, T_FOUND, 500, 200, 0]


@pytest.fixture(scope="module")
def small_model(make_unet):
    """Random U-Nets with attention at both levels and in the mid block; h has 256 entries, an image 192."""
    kinds = {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2}

    def make(**config) -> wb.Model:
        unet = make_unet(**{"attention_head_dim": 4, **kinds, **config})
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                parameter.data *= 1.5  # a stronger network, whose Jacobian changes with x_t
        return wb.wrap(unet, DDPMScheduler(), name="small", device="cpu")

    return make


def half_mask(*columns: slice, shape=(8, 8)) -> tuple[np.ndarray, torch.Tensor]:
    """A mask of these rows and columns, and which of the outputs are inside."""
    mask = np.zeros(shape, dtype=bool)
    mask[..., *columns] = True
    if shape[0] == 3:
        mask[1] = False
    return mask, torch.from_numpy(np.broadcast_to(mask, (3, 8, 8)).flatten().copy())


@pytest.fixture(scope="module")
def model(small_model) -> wb.Model:
    return small_model()


@pytest.fixture(scope="module")
def run(model) -> wb.Trajectory:
    return wb.sample(model, [5], steps=STEPS, eta=1.0, record_h=True, record_x=True, progress=False)


def dense(f, x: torch.Tensor) -> torch.Tensor:
    """The Jacobian, row by row in reverse mode; (n, d), float64."""
    with torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]):
        J = torch.autograd.functional.jacobian(f, x.clone())
    return J.reshape(-1, x.numel()).double()


def dense_of_h(model: wb.Model, x_t: torch.Tensor, t: int, *, output: str = "eps") -> torch.Tensor:
    with torch.no_grad():
        bottleneck = model.encode(x_t, t)

    def f(h):
        eps = model.decode(bottleneck.with_h(h))
        return eps if output == "eps" else model.schedule.predict_x0(x_t, eps, t)

    return dense(f, bottleneck.h)


@pytest.fixture(scope="module")
def J(model, run) -> torch.Tensor:
    """The dense Jacobian of the run at T_FOUND."""
    return dense_of_h(model, run.x_at(T_FOUND), T_FOUND)


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest principal angle between the row spaces of two sets of orthonormal vectors, in radians."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return float(torch.linalg.matrix_norm(a - (a @ b.T) @ b, 2).arcsin())


def assert_matches(found: JacobianSpectrum, J: torch.Tensor) -> None:
    _, sigma, right = torch.linalg.svd(J, full_matrices=False)
    k = len(found)
    np.testing.assert_allclose(found.singular_values, sigma[:k], rtol=1e-4)
    assert angle(found.right, right[:k]) < 1e-3


@pytest.mark.parametrize(
    ("tap", "time"), [("after", "default"), ("after", "scale_shift"), ("middle", "scale_shift"), ("before", "default")]
)
def test_the_spectrum_is_the_dense_ones(tap, time, small_model):
    """sigma to 1e-4 and the space of vectors to 1e-3 rad, with attention everywhere, at every tap."""
    model = small_model(resnet_time_scale_shift=time).tapped(tap)
    run = wb.sample(model, [5], steps=STEPS, progress=False)
    J = dense_of_h(model, run.x_at(T_FOUND), T_FOUND)
    found = find_jacobian(model, run, t=T_FOUND, k=3, progress=False)
    assert_matches(found, J)
    effects = found.right.flatten(1) @ J.T.float()
    np.testing.assert_allclose(effects, found.left.flatten(1).numpy() * found.singular_values[:, None], atol=1e-5)
    assert (found.residuals < 0.01).all()


def test_the_products_are_adjoint_and_exact(model, run, J):
    """<J v, u> = <v, J'u>, and both are the dense Jacobian's, also for more vectors than the graph is wide."""
    with torch.no_grad():
        bottleneck = model.encode(run.x_at(T_FOUND), T_FOUND)
    f = lambda h: model.decode(bottleneck.repeat(len(h)).with_h(h))  # noqa: E731
    linear = Linearised(f, bottleneck.h, width=3)
    rng = torch.Generator().manual_seed(0)
    v = torch.randn(7, J.shape[1], dtype=torch.double, generator=rng)
    u = torch.randn(7, J.shape[0], dtype=torch.double, generator=rng)
    Jv, Ju = linear.jvp(v), linear.vjp(u)
    torch.testing.assert_close((Jv * u).sum(1), (v * Ju).sum(1), rtol=1e-4, atol=1e-4 * float(J.norm()))
    torch.testing.assert_close(Jv, v @ J.T, rtol=0, atol=1e-5 * float(Jv.abs().max()))
    torch.testing.assert_close(Ju, u @ J, rtol=0, atol=1e-5 * float(Ju.abs().max()))


@pytest.mark.parametrize("block", [None, 9])
def test_the_network_runs_once(model, run, block):
    """The encoder once, and the decoder once for each vector of a block, whatever the number of products."""
    seen = {"conv_in": [], "conv_out": []}
    with contextlib.ExitStack() as hooks:
        for name, passed in seen.items():
            layer = getattr(model.unet.unet, name)
            hook = layer.register_forward_hook(lambda _, x, y, passed=passed: passed.append(len(y)))
            hooks.callback(hook.remove)
        found = find_jacobian(model, run, t=T_FOUND, k=3, block=block, progress=False)
    assert found.iterations > 2
    assert seen["conv_in"] == [1] and sum(seen["conv_out"]) == (block or 1)


@pytest.mark.parametrize(
    "config",
    [
        {"attention_head_dim": None},
        {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
        {"down_block_types": ["ResnetDownsampleBlock2D"] * 2, "up_block_types": ["ResnetUpsampleBlock2D"] * 2},
        {"downsample_type": "resnet", "upsample_type": "resnet", "act_fn": "gelu"},
        {"add_attention": False, "dropout": 0.1, "downsample_padding": 0},
        {"attn_norm_num_groups": 2, "layers_per_block": 2},
    ],
)
def test_every_layer_of_the_unet_has_its_products(config, small_model):
    """Kinds of blocks, attention (fused, and written out in the mid block), resampling and activations, against the
    dense Jacobian."""
    model = small_model(seed=3, **config)
    for layer in model.unet.unet.mid_block.modules():
        if isinstance(layer, Attention):
            layer.set_processor(AttnProcessor())
    run = wb.sample(model, [5], steps=STEPS, record_x=True, progress=False)
    J = dense_of_h(model, run.x_at(T_FOUND), T_FOUND)
    assert_matches(find_jacobian(model, run, t=T_FOUND, k=2, tol=1e-8, progress=False), J)


def test_eps_and_x0_give_the_same_directions(model, run):
    """P_t is linear in eps: the same right singular vectors, and sigma times sqrt((1 - a) / a) (Haas et al., SM C)."""
    eps = find_jacobian(model, run, t=T_FOUND, tol=1e-8, progress=False)
    x0 = find_jacobian(model, run, t=T_FOUND, tol=1e-8, output="x0", progress=False)
    a = model.schedule.alpha_bar(T_FOUND)
    torch.testing.assert_close(eps.right, x0.right, rtol=0, atol=1e-4)
    np.testing.assert_allclose(x0.singular_values, eps.singular_values * ((1 - a) / a) ** 0.5, rtol=1e-5)
    assert_matches(x0, dense_of_h(model, run.x_at(T_FOUND), T_FOUND, output="x0"))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_a_mask_only_removes_rows_and_a_full_one_none(model, run, J, shape):
    """The masked spectrum is that of the dense Jacobian without the rows outside; the left vectors are zero there."""
    mask, rows = half_mask(slice(2, 5), slice(1, 6), shape=shape)
    found = find_jacobian(model, run, t=T_FOUND, mask=mask, tol=1e-6, progress=False)
    assert_matches(found, J[rows])
    assert not found.left.flatten(1)[:, ~rows].any()
    effect = (found.right.flatten(1).double() @ J.T).square()
    np.testing.assert_allclose(found.inside_mask, effect[:, rows].sum(1) / effect.sum(1), rtol=1e-4)
    assert (found.inside_mask < 0.999).all()
    full = find_jacobian(model, run, t=T_FOUND, mask=torch.ones(8, 8, dtype=torch.int64), progress=False)
    np.testing.assert_allclose(full.inside_mask, 1.0)
    free = find_jacobian(model, run, t=T_FOUND, progress=False)
    np.testing.assert_allclose(full.singular_values, free.singular_values, rtol=1e-6)
    record, whole = (spectrum[0].provenance["parameters"]["mask"] for spectrum in (found, full))
    assert record["outputs"] == int(rows.sum()) and record["sha256"] != whole["sha256"]


@pytest.mark.parametrize("block", [1, 4])
def test_the_papers_algorithms_find_the_same_as_lanczos(model, run, block):
    """Algorithm 1 with as many vectors as are asked for and with more, and Algorithm 2; they take more products."""
    lanczos = find_jacobian(model, run, t=T_FOUND, k=4, progress=False)
    found = find_jacobian(model, run, t=T_FOUND, k=4, block=block, progress=False)
    np.testing.assert_allclose(found.singular_values, lanczos.singular_values, rtol=1e-4)
    assert angle(found.right, lanczos.right) < 3e-3
    assert found.products > lanczos.products


def test_the_jacobian_is_taken_on_the_runs_own_trajectory(model, run):
    """With eta 1, at the x_t that this sample's noise led to; another noise has another spectrum."""
    lean = wb.sample(model, [5], steps=STEPS, eta=1.0, progress=False)
    found = find_jacobian(model, lean, t=200, tol=1e-6, progress=False)
    own = dense_of_h(model, run.x_at(200), 200)
    assert_matches(found, own)
    from_the_same_x_T = wb.Trajectory(model, run.x_T, run.x0, run.timesteps, run.etas, seeds=(6,))
    fresh = dense_of_h(model, from_the_same_x_T.x_at(200), 200)
    difference = (torch.linalg.svdvals(fresh) / torch.linalg.svdvals(own) - 1)[:3].abs().max()
    assert difference > 1e-3, "the oracle can't tell the run's own noise from fresh noise"


@pytest.mark.parametrize("tol", [1e-2, 1e-5])
def test_the_error_is_below_the_tolerance(model, run, J, tol):
    """for several starts; the space of vectors turns by no more than the gap allows."""
    _, sigma, right = torch.linalg.svd(J, full_matrices=False)
    gap = float(1 - (sigma[3] / sigma[2]) ** 2)
    for seed in range(3):
        found = find_jacobian(model, run, t=T_FOUND, k=3, tol=tol, seed=seed, progress=False)
        assert np.abs(found.singular_values / sigma[:3].numpy() - 1).max() <= tol
        assert angle(found.right, right[:3]) <= 2 * (2 * tol / gap) ** 0.5


@pytest.mark.parametrize("block", [None, 2])
def test_a_search_that_does_not_converge_is_an_error(model, run, block):
    with pytest.raises(RuntimeError, match="1 iterations"):
        find_jacobian(model, run, t=T_FOUND, tol=1e-8, max_iterations=1, block=block, progress=False)


def test_the_same_seed_gives_the_same_vectors(model, run):
    """and another start the same answer; the global generator is left alone."""
    state = torch.get_rng_state()
    a, b = (find_jacobian(model, run, t=T_FOUND, seed=1, progress=False) for _ in range(2))
    c = find_jacobian(model, run, t=T_FOUND, seed=2, tol=1e-8, progress=False)
    assert torch.equal(a.right, b.right)
    assert torch.equal(torch.get_rng_state(), state)
    assert angle(a.right, c.right) < 1e-3
    assert ((a.right * c.right).flatten(1).sum(1) > 0).all(), "the sign must not depend on the start"


def test_each_is_a_direction_for_all_of_the_runs_timesteps(model, run, tmp_path):
    """The vector found at t, everywhere, of unit length; it can be saved, loaded and applied."""
    found = find_jacobian(model, run, t=T_FOUND, k=2, progress=False)
    assert isinstance(found, Sequence) and len(found) == 2 and len(list(found)) == 2
    first = found[0]
    assert first.timesteps == run.timesteps
    assert all(torch.equal(unit, found.right[0]) for unit in first.unit)
    torch.testing.assert_close(first.unit.flatten(1).norm(dim=1), torch.ones(5))
    assert first.extras["singular_value"] == pytest.approx(found.singular_values[0])
    assert {"model", "etas", "method", "parameters", "seeds"} <= set(first.provenance)
    assert first.provenance["parameters"]["sigma"] == "rms of the sample's h"
    torch.testing.assert_close(first.sigma, run.h.values[:, 0].flatten(1).square().mean(1).sqrt())
    loaded = load_direction(first.save(tmp_path / "a.safetensors"), model=model)
    assert loaded.provenance == first.provenance
    edited = wb.replay(run, edit=Injection.adding(first.delta(3.0)[:, None]), progress=False)
    assert (edited.x0 - run.x0).abs().max() > 1e-3


def test_one_unit_is_one_sigma_of_a_population(model, run, tmp_path):
    """With a population: the standard deviation of its projection, timestep by timestep; else the sample's own rms."""
    bare = wb.sample(model, [5], steps=STEPS, progress=False)
    a, b = (find_jacobian(model, r, t=T_FOUND, k=1, progress=False)[0].sigma for r in (bare, run))
    torch.testing.assert_close(a, b)
    store = wb.extract(model, 12, steps=STEPS, out=tmp_path / "store", dtype="float32", progress=False)
    found = find_jacobian(model, run, t=T_FOUND, k=2, population=store, progress=False)
    for direction, v in zip(found, found.right, strict=True):
        expected = [(store.at(t) @ v.flatten().numpy()).std(ddof=1) for t in STEPS]
        np.testing.assert_allclose(direction.sigma, expected, rtol=1e-5)
        assert direction.provenance["parameters"]["sigma"] == "population"
        assert direction.provenance["parameters"]["population"]["n"] == 12
    other = wb.extract(model, 3, steps=2, out=tmp_path / "other", progress=False)
    refused(model, run, "lacks .* of the run's 5 timesteps", population=other)
    refused(model.tapped("before"), run, "'before'", population=store)


@pytest.mark.parametrize("map", ["x->h", "x->x0"])
def test_pullbacks_are_the_dense_ones(model, run, map):
    """Park et al.'s and LOCO-Edit's maps, through the whole of the network that they pass."""
    x_t = run.x_at(T_FOUND)
    f = {
        "x->h": lambda x: model.encode(x, T_FOUND).h,
        "x->x0": lambda x: model.schedule.predict_x0(x, model(x, T_FOUND), T_FOUND),
    }[map]
    _, sigma, right = torch.linalg.svd(dense(f, x_t), full_matrices=False)
    found = find_pullback(model, run, t=T_FOUND, map=map, progress=False)
    np.testing.assert_allclose(found.singular_values, sigma[:3], rtol=1e-4)
    assert angle(found.right, right[:3]) < 1e-3
    assert found.left.shape == (3, *(model.h_shape if map == "x->h" else model.image_shape))


def test_the_nullspace_projection_avoids_what_moves_the_outside(model, run):
    """v_p = (I - V V') v with V of the rows outside of the mask, normalised; against the dense projection."""
    mask, rows = half_mask(slice(None), slice(4))
    x_t = run.x_at(T_FOUND)
    J = dense(lambda x: model.schedule.predict_x0(x, model(x, T_FOUND), T_FOUND), x_t)
    settings = {"t": T_FOUND, "k": 2, "mask": mask, "tol": 1e-8, "progress": False}
    plain = find_pullback(model, run, **settings)
    found = find_pullback(model, run, nullspace=5, **settings)
    v = torch.linalg.svd(J[rows], full_matrices=False)[2][:2]
    outside = torch.linalg.svd(J[~rows], full_matrices=False)[2][:5]
    expected = v - (v @ outside.T) @ outside
    expected = expected / expected.norm(dim=1, keepdim=True)
    cosines = (found.right.flatten(1).double() * expected).sum(1).abs()
    np.testing.assert_allclose(cosines, 1.0, atol=1e-5)
    effect = expected @ J.T  # all that is said of the vectors is of the projected ones
    lengths = effect[:, rows].norm(dim=1)
    np.testing.assert_allclose(found.singular_values, lengths, rtol=1e-4)
    np.testing.assert_allclose(found.inside_mask, lengths.square() / effect.square().sum(dim=1), rtol=1e-4)
    left = (effect[:, rows] / lengths[:, None] * found.left.flatten(1).double()[:, rows]).sum(dim=1)
    np.testing.assert_allclose(left.abs(), 1.0, atol=1e-5)
    assert np.isnan(found.residuals).all() and "projected" in repr(found)
    assert (found.inside_mask > plain.inside_mask).all()
    assert found.products > plain.products > 2 * plain.iterations, "those of the null space are counted"
    assert (found.right.flatten(1).double() @ outside.T).abs().max() < 1e-4
    assert (plain.right.flatten(1).double() @ outside.T).abs().max() > 1e-2


def planted(sigma: Sequence[float], *, n: int = 40, d: int = 60) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(n, len(sigma), dtype=torch.double, generator=rng)).Q
    right = torch.linalg.qr(torch.randn(d, len(sigma), dtype=torch.double, generator=rng)).Q
    return (left * torch.tensor(sigma, dtype=torch.double)) @ right.T


def svd_of(J: torch.Tensor, k: int, **settings):
    return top_singular_vectors(lambda v: v @ J.T, lambda u: u @ J, k, d=J.shape[1], **settings)


SPECTRA = {
    "geometric": np.geomspace(1.0, 1e-3, 30),
    "flat": np.linspace(1.0, 0.9, 40),
    "repeated": np.array([5.0, 5.0, 5.0, 5.0, 1.0, 0.5]),
    "steep": np.array([1e4, 1.0, 1e-2, 1e-3]),
}


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, None) for name in SPECTRA] + [(n, b) for n in ("geometric", "repeated", "steep") for b in (1, 2, 9)],
)
def test_planted_spectra_are_recovered(name, block):
    """Of any linear map: gaps small or none, repeated values, a steep fall, more vectors asked for than it has."""
    J = planted(SPECTRA[name])
    found = svd_of(J, 3, tol=1e-8, block=block)
    _, s, v = torch.linalg.svd(J)
    torch.testing.assert_close(found.values, s[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.right @ found.right.T, torch.eye(3, dtype=torch.double))
    torch.testing.assert_close(found.right @ J.T, found.values[:, None] * found.left)
    if s[2] > 1.0001 * s[3]:
        assert angle(found.right, v[:3]) < 1e-3


def test_a_map_of_lower_rank_has_zeros_at_the_end():
    found = svd_of(planted([3.0, 2.0]), 4)
    torch.testing.assert_close(found.values[:2], torch.tensor([3.0, 2.0], dtype=torch.double))
    assert (found.values[2:] < 1e-6).all()
    assert torch.isfinite(found.right).all() and torch.isfinite(found.left).all()


@pytest.mark.parametrize("block", [None, 1, 3])
def test_the_residual_bounds_the_error_of_the_values(block):
    """A singular value of J^2 lies within residual * sigma^2 of each sigma^2, also of a loose tolerance."""
    J = planted(np.linspace(1.0, 0.5, 40))
    found = svd_of(J, 3, tol=0.1, block=block)
    squares = torch.linalg.svdvals(J).square()
    for value, residual in zip(found.values.square(), found.residuals, strict=True):
        assert (squares - value).abs().min() <= residual * value


def refused(model, run, match, *, find=find_jacobian, **arguments):
    with pytest.raises(ValueError, match=match):
        find(model, run, **{"t": T_FOUND, "progress": False, **arguments})


def test_errors_say_what_to_do(model, run, small_model):
    refused(model, wb.sample(model, range(2), steps=2, progress=False), r"has 2; give run\[0\]")
    refused(small_model(seed=1), run, model.hash)
    half = wb.wrap(model.unet.unet, model.schedule, name="small", device="cpu", dtype="bfloat16")
    refused(half, run, "float32")
    one = np.zeros((8, 8), bool)
    one[0, 0] = True
    for match, options in (
        ("timestep 610", {"t": 610}),
        ("'h'", {"output": "h"}),
        (r"\(4, 4\); this model takes \(8, 8\)", {"mask": np.ones((4, 4), bool)}),
        ("the mask is empty", {"mask": np.zeros((8, 8), bool)}),
        ("mask > 0.5", {"mask": np.full((8, 8), 0.7)}),
        (r"k is 4 .* 3 outputs inside the mask .*1\.\.3", {"mask": one, "k": 4}),
        ("k is 0", {"k": 0}),
        ("block 0", {"block": 0}),
        ("tol", {"tol": 0.0}),
        ("h->eps", {"find": find_pullback, "map": "h->eps"}),
        ("the output of x->h has none", {"find": find_pullback, "map": "x->h", "mask": np.ones((8, 8), bool)}),
        ("outside of a mask", {"find": find_pullback, "nullspace": 3}),
    ):
        refused(model, run, match, **options)


def test_one_thread_at_a_time_chooses_the_kernels_of_attention():
    """The choice is the process's: two that overlap would leave it as neither found it."""
    held = []

    def double(x):
        held.append(linearised._KERNELS.locked())
        return 2 * x

    Linearised(double, torch.ones(1, 1, 2, 2))
    assert held == [True] and not linearised._KERNELS.locked()
