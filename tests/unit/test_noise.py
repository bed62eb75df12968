"""A seed is a sample: its noise depends on nothing else, and on nobody else's."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.diffusion.noise import FORWARD, STEP, check_seeds, initial_noise, normal, step_noise

SHAPE = (3, 32, 32)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]


def test_x_T_and_the_step_noises_of_neighbouring_seeds_are_independent():
    """The released code of Haas et al. uses seed + 1 for z, so x_T of the next sample is z of this one."""
    draws = {f"x_T of {s}": initial_noise([s], SHAPE) for s in range(4)}
    draws |= {f"z of {s} at {t}": step_noise([s], SHAPE, t=t) for s in range(4) for t in (0, 1, 980, 999)}
    draws |= {f"forward of {s} at {t}": normal([s], SHAPE, stream=FORWARD, t=t) for s in range(4) for t in (0, 999)}
    for (name, a), (other, b) in combinations(draws.items(), 2):
        # Five standard deviations, 1 / sqrt(3072) each.
        assert abs(correlation(a, b)) < 5 / np.sqrt(a.numel()), f"{name} and {other} are correlated"


def test_shifted_draws_do_not_overlap():
    """A counter-based generator whose counters overlap would repeat a part of one draw at an offset in another."""
    draws = [step_noise([0], SHAPE, t=t).flatten().numpy() for t in (0, 1, 2)] + [initial_noise([0], SHAPE).flatten()]
    values = np.concatenate([np.asarray(d) for d in draws])
    # float32 normals repeat by chance now and then; a shared block would repeat by the thousand.
    assert len(np.unique(values)) > 0.99 * len(values)


def test_the_noise_is_standard_normal():
    noise = normal(range(200), (3, 16, 16), stream=STEP, t=5).double()
    n = noise.numel()
    assert abs(noise.mean()) < 5 / np.sqrt(n)
    assert abs(noise.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((noise**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert noise.flatten(1).norm(dim=1).mean() == pytest.approx(np.sqrt(768 - 0.5), rel=0.01)


def test_a_sample_has_the_same_noise_in_any_batch_and_order():
    together = initial_noise([7, 3, 12], SHAPE)
    assert torch.equal(initial_noise([3], SHAPE)[0], together[1])
    assert torch.equal(initial_noise([12, 7, 3], SHAPE), together[[2, 0, 1]])
    z = step_noise([7, 3, 12], SHAPE, t=600)
    assert torch.equal(step_noise([12], SHAPE, t=600)[0], z[2])


def test_the_noise_of_a_seed_is_fixed_for_good():
    """Stores, directions and figures are looked up by seed: other noise for a seed would silently disown them."""
    first = [0.0599, 0.0156, -1.1644]
    np.testing.assert_allclose(initial_noise([0], (3,))[0].numpy(), initial_noise([0], (1000,))[0, :3].numpy())
    assert initial_noise([0], (3,)).dtype == torch.float32
    np.testing.assert_allclose(initial_noise([0], (3,))[0].numpy(), first, atol=1e-4)


@pytest.mark.parametrize("seed", [2**31, 2**32, 2**40 + 1, 2**63 - 1])
def test_large_seeds_are_seeds_of_their_own(seed):
    """torch's CPU generator keeps the lower 32 bits alone: 0 and 2**32 would be one sample."""
    draw = initial_noise([seed], SHAPE)
    assert abs(correlation(draw, initial_noise([seed % 2**32], SHAPE))) < 0.1 or seed < 2**32
    assert abs(correlation(draw, initial_noise([seed - 1], SHAPE))) < 0.1
    assert torch.equal(draw, initial_noise([seed], SHAPE))


def test_sampling_leaves_the_global_generators_alone(tiny):
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    run = wb.sample(tiny, range(3), steps=3, progress=False)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
    torch.manual_seed(4)
    assert torch.equal(wb.sample(tiny, range(3), steps=3, progress=False).x0, run.x0)


def test_seeds_come_as_one_number_or_any_iterable():
    assert check_seeds(5) == (5,)
    assert check_seeds(range(3)) == (0, 1, 2)
    assert check_seeds(s for s in (4, 2)) == (4, 2)
    assert check_seeds(np.array([1, 9])) == (1, 9)
    assert check_seeds(torch.tensor([1, 9])) == (1, 9)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([], "no seeds were given"),
        ([0, -1], r"integers from 0 to 2\*\*63 - 1, not -1..0"),
        ([2**63], "integers from 0"),
        ([0.5], "integers from 0"),
        ("0-3", "not the text '0-3'"),
        ([1, 2, 1], "seed 1 appears more than once"),
    ],
)
def test_seeds_that_are_none_are_refused(seeds, message):
    with pytest.raises(ValueError, match=message):
        check_seeds(seeds)
