"""The Jacobian's spectrum against the sequential power iteration of the released code, in one run, by ratios."""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import workbench as wb
from workbench.directions.jacobian import find_jacobian

pytestmark = pytest.mark.slow

T, K = 600, 3


@pytest.fixture(scope="module")
def run(model):
    return wb.sample(model, [0], steps=50, eta=1.0, record_h=True, record_x=True, progress=False)


@pytest.fixture(scope="module")
def reference(model, run) -> np.ndarray:
    return find_jacobian(model, run, t=T, k=K, oversample=8, tol=1e-10, progress=False).singular_values


def power_iteration(model, x_t, *, stop) -> np.ndarray:
    """One left singular vector after the other, each product through the whole network.

    `stop(i, sigmas)` ends the iteration of vector i, given its estimates so far.
    """
    with torch.enable_grad():
        bottleneck = model.encode(x_t, T)
        h = bottleneck.h.clone().requires_grad_()
        eps = model.decode(bottleneck.with_h(h))

    def pull_and_push(v):
        (g,) = torch.autograd.grad(eps, h, v, retain_graph=True)
        with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]), forward_ad.dual_level():
            bottleneck = model.encode(x_t, T)
            dual = forward_ad.make_dual(bottleneck.h, g)
            return forward_ad.unpack_dual(model.decode(bottleneck.with_h(dual))).tangent

    v = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0))
    found = torch.empty(0, v.numel())
    values = []
    for i in range(K):
        sigmas = []
        while not sigmas or not stop(i, sigmas):
            v = v.flatten() - found.T @ (found @ v.flatten())
            v = pull_and_push((v / v.norm()).view_as(x_t))
            sigmas.append(float(v.norm()) ** 0.5)
        found = torch.cat([found, (v / v.norm()).view(1, -1)])
        values.append(sigmas[-1])
    return np.array(values)


def as_released(i, sigmas) -> bool:
    """At most 50 iterations, or the tenth change of the eigenvalue below 1e-5, counted in all."""
    small = np.abs(np.diff(np.square(sigmas))) < 1e-5
    return len(sigmas) >= 50 or small.sum() > 10


def timed(f):
    start = time.perf_counter()
    return f(), time.perf_counter() - start


def errors_of(values, reference) -> np.ndarray:
    return np.abs(np.asarray(values) / reference - 1)


@pytest.fixture(scope="module")
def plain(model):
    """The same weights in the memory format that forward mode works in; the released code knows no other."""
    plain = wb.wrap(model.unet.unet, model.schedule, name="plain", device="cpu")
    plain.unet.unet.to(memory_format=torch.contiguous_format)
    return plain


def test_a_sixth_of_the_time_at_a_tenth_of_the_error(model, plain, run, reference, record_property, capsys):
    """Against the power iteration as it stops by itself, and against the one that goes on to 1e-3."""

    def to_a_thousandth(i, sigmas) -> bool:
        return abs(sigmas[-1] / reference[i] - 1) <= 1e-3 or len(sigmas) >= 300

    x_t = run.x_at(T)
    rounds = []
    for _ in range(3):
        ours, seconds = timed(lambda: find_jacobian(model, run, t=T, k=K, progress=False))
        baseline, baseline_seconds = timed(lambda: power_iteration(plain, x_t, stop=as_released))
        rounds.append((seconds, baseline_seconds))
    exact, exact_seconds = timed(lambda: power_iteration(plain, x_t, stop=to_a_thousandth))
    seconds, baseline_seconds = (median(column) for column in zip(*rounds, strict=True))
    error, baseline_error = errors_of(ours.singular_values, reference), errors_of(baseline, reference)
    with capsys.disabled():
        print(
            f"\nours {seconds:.2f} s, errors {error}; baseline {baseline_seconds:.2f} s, errors {baseline_error}; "
            f"baseline to 1e-3 {exact_seconds:.2f} s, errors {errors_of(exact, reference)}; "
            f"ratios {baseline_seconds / seconds:.1f} and {exact_seconds / seconds:.1f}"
        )
    assert error.max() <= 0.1 * baseline_error.max()
    assert seconds <= baseline_seconds / 6
    assert seconds <= exact_seconds / 10


def test_the_cost_grows_less_than_linearly_in_k(model, run, capsys):
    """Sixteen vectors cost less than eight times what two do."""
    rounds = []
    for _ in range(2):
        rounds.append(
            [timed(lambda k=k: find_jacobian(model, run, t=T, k=k, progress=False))[1] for k in (2, 4, 8, 16)]
        )
    costs = [median(column) for column in zip(*rounds, strict=True)]
    with capsys.disabled():
        print(f"\nk = 2, 4, 8, 16: {', '.join(f'{c:.2f} s' for c in costs)}")
    assert all(b < 2 * a for a, b in zip(costs, costs[1:], strict=False))
