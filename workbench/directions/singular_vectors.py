"""Top singular vectors of a linear map, from its products: by ARPACK's Lanczos method, or by Haas et al.'s algorithms.

For one to eight vectors of avataaars32 Lanczos takes 14 to 67 products, subspace iteration 17 to 640, and LOBPCG up to
116 (`tests/benchmarks/test_jacobian_speed.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from tqdm.auto import tqdm

ROUNDING = 1e-6
"""Relative size below which a singular value is rounding noise of the network's float32."""

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Triplets:
    """values (k,), right (k, d), left (k, n), residuals (k,); all float64, on the CPU.

    `residuals` are ||J'J v - s^2 v|| / s^2: some s^2 of J lies within this relative distance. `iterations` counts the
    batches that were multiplied with J'J, and `products` the vectors that were multiplied with J or J'.
    """

    values: torch.Tensor
    right: torch.Tensor
    left: torch.Tensor
    residuals: torch.Tensor
    iterations: int
    products: int


def top_singular_vectors(
    jvp: Product,
    vjp: Product,
    k: int,
    *,
    d: int,
    block: int | None = None,
    tol: float = 1e-6,
    max_iterations: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Triplets:
    """Top k singular triplets of J from J v, v of d values, and J'u of rows.

    The error of a value is r^2 / (2 gap), by its residual r and the relative gap to
    the next value (Kato and Temple; Parlett 1998, chapter 10); the methods stop at residuals below sqrt(tol) / 3.
    """
    if tol <= 0 or max_iterations < 1:
        raise ValueError(f"tol ({tol}) must be positive and max_iterations ({max_iterations}) at least 1")
    rng, batches = torch.Generator().manual_seed(seed), []
    bar = tqdm(desc="jacobian", unit=" products", disable=not progress, delay=2, leave=False)

    def squared(v: torch.Tensor) -> torch.Tensor:
        batches.append(len(v))
        bar.update(2 * len(v))
        return vjp(jvp(v))

    settings = {"residual": tol**0.5 / 3, "max_iterations": max_iterations}
    with bar:
        if block is None:
            right = _lanczos(squared, k, _random(1, d, rng)[0], **settings)
        else:
            right = _subspace_iterations(squared, k, d, block, rng, **settings)
        images = jvp(right)
        values, order = images.norm(dim=1).sort(descending=True)
        right, images = right[order], images[order]
        right, images = (_sign(right) * each for each in (right, images))
        squares = _divisor(values).square()[:, None]
        residuals = ((vjp(images) - values[:, None] ** 2 * right) / squares).norm(dim=1)
    left = images / _divisor(values)[:, None]
    return Triplets(values, right, left, residuals, len(batches), 2 * (sum(batches) + k))


def _lanczos(squared: Product, k: int, start: torch.Tensor, *, residual: float, max_iterations: int) -> torch.Tensor:
    """Top eigenvectors of J'J by ARPACK, one product with J'J at a time; the basis is short, so that it stops early."""
    d = len(start)
    operator = LinearOperator(
        (d, d), lambda v: squared(torch.from_numpy(v.reshape(1, -1).copy()))[0].numpy(), dtype=np.float64
    )
    basis = min(max(2 * k + 1, 4), d)
    try:
        _, vectors = eigsh(operator, k, v0=start.numpy(), ncv=basis, tol=residual, maxiter=max_iterations)
    except ArpackNoConvergence as error:
        raise _not_converged(max_iterations) from error
    return torch.from_numpy(vectors.T.copy())


def _subspace_iterations(
    squared: Product,
    k: int,
    d: int,
    block: int,
    rng: torch.Generator,
    *,
    residual: float,
    max_iterations: int,
) -> torch.Tensor:
    """Algorithm 2 of Haas et al.: block after block, each orthogonal to those before; Algorithm 1 is one block of k."""
    found = torch.empty(0, d, dtype=torch.double)
    while len(found) < k:
        wanted = min(block, k - len(found))
        v = _random(block, d, rng)
        for _ in range(max_iterations):
            v = _orthonormal(v, found)
            w = squared(v)
            w = w - (w @ found.T) @ found
            squares, mixing = torch.linalg.eigh(v @ w.T)
            squares, (v, w) = squares.flip(0), (mixing.T.flip(0) @ each for each in (v, w))
            if ((w - squares[:, None] * v).norm(dim=1) <= residual * squares)[:wanted].all():
                break
            v = w
        else:
            raise _not_converged(max_iterations)
        found = torch.cat([found, v[:wanted]])
    return found


def _orthonormal(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Rows orthonormal to each other and to the basis."""
    for _ in range(2):  # the second pass removes what rounding left
        rows = torch.linalg.qr((rows - (rows @ basis.T) @ basis).T).Q.T
    return rows


def _random(m: int, d: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(m, d, dtype=torch.double, generator=rng)


def _divisor(values: torch.Tensor) -> torch.Tensor:
    """Values to divide by: where J has no more than rounding noise, what that noise is relative to."""
    return values.clamp_min(ROUNDING * values[0]).clamp_min(torch.finfo(values.dtype).tiny)


def _sign(vectors: torch.Tensor) -> torch.Tensor:
    """The signs that make each vector's entry of largest size positive, (k, 1)."""
    return vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()


def _not_converged(iterations: int) -> RuntimeError:
    return RuntimeError(
        f"the singular vectors did not converge in {iterations} iterations; raise max_iterations or tol, or, with "
        "block, take a larger one"
    )
