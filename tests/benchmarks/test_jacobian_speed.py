"""The Jacobian's spectrum against the sequential power iteration of the released code, and solver against solver.

Why ARPACK's Lanczos method is the solver: products with J and J' on avataaars32, means over two samples at t of 600
and 200, cold. "Own" is the block Davidson method that this project had before; LOBPCG is SciPy's, with as many vectors
as are asked for, stopped at the same residual.

| k | tol  | Lanczos | own | LOBPCG              | Algorithm 1 |
|---|------|---------|-----|---------------------|-------------|
| 1 | 1e-3 | 14      | 14  | 4, errors to 1e3 tol | 17         |
| 1 | 1e-6 | 17      | 19  | 15                  | 30          |
| 3 | 1e-3 | 27      | 25  | 25, errors to 1e3 tol | 68        |
| 3 | 1e-6 | 32      | 33  | 45                  | 233         |
| 8 | 1e-3 | 60      | 45  | 78, errors to 37 tol | 225        |
| 8 | 1e-6 | 67      | 55  | 116                 | 643         |

From the vectors of the timestep before, Lanczos takes 12, 24 and 60 products to 1e-3 (own: 10, 22, 43). Nowhere was
the own method 1.5 times faster, so it went.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import workbench as wb
from workbench.directions.jacobian import find_jacobian

pytestmark = pytest.mark.slow

T, K = 600, 3
SAMPLES = 5


@pytest.fixture(scope="module")
def runs(model):
    return wb.sample(model, range(SAMPLES), steps=50, eta=1.0, record_h=True, record_x=True, progress=False)


def power_iteration(model, x_t, *, stop) -> np.ndarray:
    """One left singular vector after the other, by the released code's own two calls for the products.

    `stop(i, sigmas)` ends the iteration of vector i, given its estimates so far.
    """
    with torch.enable_grad():
        bottleneck = model.encode(x_t, T)
        h = bottleneck.h.clone().requires_grad_()
        eps = model.decode(bottleneck.with_h(h))

    def pull_and_push(v):
        (g,) = torch.autograd.grad(eps, h, v, retain_graph=True)

        def moved(a):
            bottleneck = model.encode(x_t, T)
            return model.decode(bottleneck.with_h(h.detach() - g + a * g))

        with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
            return torch.autograd.functional.jacobian(
                moved, torch.ones(1), strategy="forward-mode", vectorize=True
            ).squeeze(-1)

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


def its_own(i, sigmas, *, tol=1e-5) -> bool:
    """At most 50 iterations, or the eleventh change of the eigenvalue below `tol`, counted in all."""
    small = np.abs(np.diff(np.square(sigmas))) < tol
    return len(sigmas) >= 50 or small.sum() > 10


@pytest.fixture(scope="module")
def plain(model):
    """The same weights in the memory format that forward mode works in; the released code knows no other."""
    plain = wb.wrap(model.unet.unet, model.schedule, name="plain", device="cpu")
    plain.unet.unet.to(memory_format=torch.contiguous_format)
    return plain


def test_faster_and_more_exact_than_the_power_iteration(model, plain, runs, record):
    """Over several samples: a sixth of its time as it stops by itself, and at most a tenth of its largest error.

    To bring all three values within 1e-3, the power iteration is given its best case twice: its own rule with the
    loosest power of ten that is enough for this sample, and a stop at the very product that brings a value there, which
    it could not know. Ours stops by its own rule.
    """
    times, errors = {}, {}

    def measure(name, reference, f):
        start = time.perf_counter()
        found = f()
        times.setdefault(name, []).append(time.perf_counter() - start)
        values = getattr(found, "singular_values", found)
        errors.setdefault(name, []).append(float(np.abs(values / reference - 1).max()))
        return errors[name][-1]

    for run in (runs[i] for i in range(len(runs))):
        x_t = run.x_at(T)

        def find(run=run, **settings):
            return find_jacobian(model, run, t=T, k=K, progress=False, **settings)

        def power(stop, x_t=x_t):
            return power_iteration(plain, x_t, stop=stop)

        reference = find(tol=1e-9).singular_values

        def near(i, sigmas, reference=reference):
            return abs(sigmas[-1] / reference[i] - 1) <= 1e-3 or len(sigmas) >= 300

        measure("ours", reference, find)
        measure("released", reference, lambda power=power: power(its_own))
        measure("ours to 1e-3", reference, lambda find=find: find(tol=1e-3))
        for tol in (1e-2, 1e-3, 1e-4, 1e-5):
            stop = partial(its_own, tol=tol)
            if measure("released to 1e-3", reference, lambda power=power, stop=stop: power(stop)) <= 1e-3:
                break
            times["released to 1e-3"].pop(), errors["released to 1e-3"].pop()
        measure("power to 1e-3", reference, lambda power=power, near=near: power(near))

    seconds = {name: median(values) for name, values in times.items()}
    record(
        "Jacobian, each as it stops by itself",
        seconds["released"] / seconds["ours"],
        "times as fast",
        goal="at least 6",
    )
    for theirs in ("released to 1e-3", "power to 1e-3"):
        record(f"Jacobian, ours to 1e-3, against {theirs}", seconds[theirs] / seconds["ours to 1e-3"], "times as fast")
    assert max(errors["ours"]) <= 0.1 * max(errors["released"])
    assert max(errors["ours to 1e-3"]) <= 1e-3


def test_lanczos_takes_fewer_products_than_the_papers_algorithms(model, runs, record):
    """To the same residual, for one, three and eight vectors."""
    for k in (1, 3, 8):
        options = {"t": T, "k": k, "tol": 1e-5, "progress": False}
        lanczos, one_block, singly = (find_jacobian(model, runs[0], **options, block=b) for b in (None, k, 1))
        for name, other in (("Algorithm 1", one_block), ("Algorithm 2, one vector at a time", singly)):
            np.testing.assert_allclose(lanczos.singular_values, other.singular_values, rtol=1e-4)
            ratio = other.products / lanczos.products
            record(f"Jacobian, {k} vectors, {name} against Lanczos", ratio, "times the products", goal="at least 1")
            assert ratio > 1


def test_the_cost_in_k(model, runs, record):
    """Two to sixteen vectors, each to convergence."""
    costs = {}
    for _ in range(2):
        for k in (2, 4, 8, 16):
            start = time.perf_counter()
            found = find_jacobian(model, runs[0], t=T, k=k, progress=False)
            assert found.residuals.max() <= 1e-3
            costs.setdefault(k, []).append(time.perf_counter() - start)
    seconds = {k: median(values) for k, values in costs.items()}
    record("Jacobian, 16 vectors against 2", seconds[16] / seconds[2], "times as long", goal="below 8")
