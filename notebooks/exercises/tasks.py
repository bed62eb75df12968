"""The tasks of the five sheets: the right answer of each, and the usual wrong ones with their hints."""

from __future__ import annotations

import numpy as np

from workbench.exercises import choice, prediction, task


def _centred(h: np.ndarray) -> np.ndarray:
    return h - h.mean(axis=0)


def _variances(h: np.ndarray) -> np.ndarray:
    return np.linalg.svd(h, compute_uv=False) ** 2


# 1. What h-space is


@task("1.1")
def _(x0, noise, alpha_bar):
    a = float(alpha_bar)
    yield np.sqrt(a) * x0 + np.sqrt(1 - a) * noise, "right. Where x0 has variance 1, so has x_t, at every t."
    yield (
        a * x0 + (1 - a) * noise,
        "the variances add up to 1, not the standard deviations: what is the variance of c times noise?",
    )
    yield (
        np.sqrt(1 - a) * x0 + np.sqrt(a) * noise,
        "at t = 0, where alpha_bar is close to 1, this would be noise; which of the two fades?",
    )
    yield (
        np.sqrt(a) * x0 + (1 - a) * noise,
        "the image has its root, the noise does not; both weights are standard deviations.",
    )
    yield np.sqrt(a) * x0 + noise, "the noise is not weighted, so that x_t would have a variance above 1."


@task("1.2")
def _(x_t, eps, alpha_bar):
    a = float(alpha_bar)
    rest = x_t - np.sqrt(1 - a) * eps
    yield (
        rest / np.sqrt(a),
        "right. It is blurred where the noise hides the details: P_t is the mean of the images that x_t may come from.",
    )
    yield rest, "you took the noise away; what is left is sqrt(alpha_bar) times the image, too low in contrast."
    yield rest / a, "the image was multiplied by the root of alpha_bar; divide by the same number."
    yield (x_t + np.sqrt(1 - a) * eps) / np.sqrt(a), "the noise is in x_t with a plus; solve the equation for x0."
    yield (
        (x_t - (1 - a) * eps) / np.sqrt(a),
        "eps has variance 1, so that its weight is a standard deviation, not a variance.",
    )
    yield x_t - eps, "both have weights in x_t: solve x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps for x0."


@task("1.3")
def _(h_shape, x_shape):
    h, x = float(np.prod(h_shape)), float(np.prod(x_shape))
    yield h / x, "right. h has more numbers than the image: what makes it useful is its order, not its size."
    yield x / h, "that is the reciprocal: numbers of h for one number of the image."
    yield h_shape[0] / x_shape[0], "these are the channels alone; a number belongs to a channel and a place."
    yield (
        (h_shape[1] * h_shape[2]) / (x_shape[1] * x_shape[2]),
        "these are the places alone; h has many more channels than an image.",
    )


prediction("1.4")


@task("1.5")
def _(own, donor, swapped):
    own, donor, swapped = (np.asarray(table, dtype=bool) for table in (own, donor, swapped))
    differ, follows = own != donor, swapped == donor
    share = (follows & differ).sum() / max(differ.sum(), 1)
    yield share, "right. Attributes that both have already follow nobody, so that they must not count."
    yield follows.mean(), "attributes that sample and donor share are counted as if they followed; leave them out."
    yield 1 - share, "that is the share that stays as in the sample; asked is the share that follows the donor."
    yield (follows & differ).mean(), "you count the right ones and divide by all; divide by the number that differ."


choice(
    "1.6",
    "b",
    "Shapes that the bottleneck decides follow the donor; what the skips and the noise carry stays.",
    a="then the swapped row would equal the donors; compare backgrounds and colours.",
    c="then the swapped row would equal the samples; compare hair and faces.",
)


@task("1.7")
def _(before, after):
    gaps = (after - before).reshape(len(after), -1)
    yield np.abs(gaps).max(axis=1), "right, and the first is 0: an edit of scale 0 is the sample, to the bit."
    yield gaps.mean(axis=1), "differences of both signs cancel in a mean; take the largest absolute one."
    yield np.abs(gaps).mean(axis=1), "a mean hides one pixel that differs; take the largest."
    yield gaps.max(axis=1), "the largest difference may be a negative one; take absolute values first."


# 2. Geometry


@task("2.1")
def _(h, k):
    variances = _variances(_centred(h))
    yield variances[:k] / variances.sum(), "right. A few directions carry much of the variance of thousands of numbers."
    raw = _variances(h)
    yield raw[:k] / raw.sum(), "h was not centred: the first component points to the mean, which all samples share."
    roots = np.sqrt(variances)
    yield roots[:k] / roots.sum(), "singular values are lengths; variances are their squares."
    yield variances[:k] / variances[:k].sum(), "the shares are of *all* the variance, not of that of the first k."
    rows = _variances(h - h.mean(axis=1, keepdims=True))
    yield rows[:k] / rows.sum(), "this centres each sample by its own mean; each *column* has to have mean 0."


@task("2.2")
def _(variances):
    v = np.asarray(variances, dtype=np.float64)
    yield v.sum() ** 2 / (v**2).sum(), "right. It is d where d directions have the same variance and all others none."
    yield (v**2).sum() / v.sum() ** 2, "upside down: this is at most 1."
    yield v.sum() / (v**2).sum(), "the sum in the numerator is squared; as it is, the result depends on the unit of h."
    yield np.sqrt(v).sum() ** 2 / v.sum(), "these are standard deviations in place of variances."


prediction("2.3")


@task("2.4")
def _(ratios):
    yield max(ratios, key=ratios.get), "right. Is it at the end that you predicted?"
    yield (
        min(ratios, key=ratios.get),
        "that is the timestep of the smallest ratio, or a position in the list of timesteps.",
    )
    yield max(ratios.values()), "that is the largest ratio; asked is the timestep at which it is reached."


def _neighbours(points: np.ndarray, k: int, *, itself: bool = False) -> list[set[int]]:
    squares = (points**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * points @ points.T
    if not itself:
        np.fill_diagonal(distances, np.inf)
    else:
        np.fill_diagonal(distances, -np.inf)
    return [set(row[:k]) for row in np.argsort(distances, axis=1)]


def _kept(h: np.ndarray, points: np.ndarray, k: int, **options: bool) -> float:
    both = zip(_neighbours(h, k, **options), _neighbours(points, k, **options), strict=True)
    return float(np.mean([len(a & b) / k for a, b in both]))


@task("2.5")
def _(h, points, k):
    yield _kept(h, points, k), "right. Two numbers per sample keep only some of the neighbours of thousands."
    yield _kept(h, points, k, itself=True), "every sample is its own nearest neighbour in both; leave it out."
    yield k * _kept(h, points, k), "that is the number of neighbours kept; divide by k."


@task("2.6")
def _(n, k):
    yield k / (n - 1), "right. Only what is above it says something about the map."
    yield k / n, "a sample can't be its own neighbour, so that n - 1 are left to choose from."
    yield 1 / (n - 1), "that is the chance of one given sample to be *the* nearest; there are k places."


def _cka(x: np.ndarray, y: np.ndarray) -> float:
    cross, own, other = (np.sum((a @ a.T) * (b @ b.T)) for a, b in ((x, y), (x, x), (y, y)))
    return float(cross / np.sqrt(own * other))


@task("2.7")
def _(x, y):
    a, b = _centred(x), _centred(y)
    yield _cka(a, b), "right. It compares the arrangement of the samples, whatever axes each of the two spaces has."
    yield _cka(x, y), "not centred: both clouds lie far from the origin, which looks like agreement."
    yield np.sqrt(np.sum((a @ a.T) * (b @ b.T))), "this has a unit and no upper bound; divide by the norms of both."
    cross, own, other = (np.sum((p @ p.T) * (q @ q.T)) for p, q in ((a, b), (a, a), (b, b)))
    yield float(np.sqrt(cross / np.sqrt(own * other))), "the norm in the numerator is squared, and yours is not."


choice(
    "2.8",
    "c",
    "UMAP keeps neighbours together; gaps between groups, and their sizes, mean little.",
    a="UMAP stretches empty space as it likes; run it with another seed and compare the gaps.",
    b="crowded and sparse regions are drawn equally dense; sizes of groups say little about variances.",
)


# 3. Unsupervised directions


@task("3.1")
def _(h, v):
    along = h @ v
    yield along.std(ddof=1), "right: this is one unit of scale, in the samples that the component was found on."
    yield along.std(ddof=0), "of n samples the mean was estimated too; divide by n - 1."
    yield along.var(ddof=1), "that is the variance; the unit is a standard deviation."
    yield np.sqrt(np.mean(along**2)), "this measures from the origin; measure from the mean of the samples."
    yield h.std(ddof=1), "that is the spread of all numbers of h; project the samples on v first."


prediction("3.2")


@task("3.3")
def _(before, after):
    squares = np.square(after - before).reshape(len(before), -1)
    yield (
        np.sqrt(squares.mean(axis=1)),
        "right. A random direction of the same length is the control of every claim about a direction.",
    )
    yield squares.mean(axis=1), "that is the mean square; take its root, to have the unit of the pixels."
    yield (
        np.abs(after - before).reshape(len(before), -1).mean(axis=1),
        "that is the mean absolute change; the root mean square weights large changes more.",
    )
    yield np.sqrt(squares.sum(axis=1)), "sum in place of mean: this grows with the number of pixels."
    yield np.sqrt(squares.mean()), "one number for all samples; keep the first axis, one number a sample."


@task("3.4")
def _(plus, minus, delta):
    yield (plus - minus) / (2 * delta), "right. The error of the central difference falls with the square of the step."
    yield (plus - minus) / delta, "the two points are 2 delta apart."
    yield (minus - plus) / (2 * delta), "the sign is that of a step backwards."
    yield plus - minus, "a derivative is a change per step: divide by the distance of the two points."


@task("3.5")
def _(jacobian):
    top = np.linalg.svd(jacobian, compute_uv=False)[0]
    yield (
        top,
        "right. Only products with vectors were needed, so that it works for all of h too.",
    )
    yield top**2, "one round multiplies by the Jacobian *and* its transpose, so its growth is the square."
    yield np.sqrt(np.square(jacobian).sum()), "that is the Frobenius norm, made of all singular values."


@task("3.6")
def _(change, mask):
    squares = np.square(change).sum(axis=0)
    inside = np.asarray(mask, dtype=bool)
    yield squares[inside].sum() / squares.sum(), "right. Compare it with the region's share of the pixels."
    yield (
        squares[inside].mean() / squares.mean(),
        "means in place of sums: this says how much more a pixel inside changes, and may exceed 1.",
    )
    absolute = np.abs(change).sum(axis=0)
    yield (
        absolute[inside].sum() / absolute.sum(),
        "these are absolute changes; the share of the *squared* change is asked for.",
    )
    yield inside.mean(), "that is the region's share of the pixels, whatever the edit does."


choice(
    "3.7",
    "a",
    "Components belong to the population, singular vectors to one image at one timestep.",
    b="the Jacobian was computed at one image; whether another responds alike has to be measured.",
    c="neither has seen a label: which attributes they change is an accident of the data.",
)


# 4. Supervised directions and entanglement


@task("4.1")
def _(h, scores, k):
    order = np.argsort(np.asarray(scores))
    v = h[order[-k:]].mean(axis=0) - h[order[:k]].mean(axis=0)
    unit = v / np.linalg.norm(v)
    yield unit, "right. No training: two means and their difference."
    yield -unit, "this leads away from the attribute: highest less lowest scores."
    yield v, "right direction, but its length is not 1."
    high = h[order[-k:]].mean(axis=0)
    yield high / np.linalg.norm(high), "the mean of the positive samples alone contains what *all* samples share."
    above = _centred(h)[order[-k:]].mean(axis=0)
    yield (
        above / np.linalg.norm(above),
        "close: this compares with all samples in place of those with the lowest scores.",
    )


@task("4.2")
def _(h_fit, h_other, v):
    yield (
        (h_other @ v).std(ddof=1),
        "right. v was chosen to separate *these* examples, so along it they spread more than others do.",
    )
    yield (
        (h_fit @ v).std(ddof=1),
        "these are the samples that v was made of, which it fits too well; take the others.",
    )


prediction("4.3")


@task("4.4")
def _(v, u):
    yield (v @ u) / np.linalg.norm(v) / np.linalg.norm(u), "right. Compare its sign with the correlation of the labels."
    yield v @ u, "an inner product depends on the lengths; divide by both."
    yield (
        np.degrees(np.arccos(np.clip((v @ u) / np.linalg.norm(v) / np.linalg.norm(u), -1, 1))),
        "that is the angle; asked is its cosine.",
    )


@task("4.5")
def _(v, u):
    rest = v - (v @ u) / (u @ u) * u
    yield rest, "right: nothing of u is left in it, and it is shorter than v."
    yield (
        v - (v @ u) * u,
        "u is not of length 1, so that its inner product counts too much or too little: divide by u @ u.",
    )
    yield v + (v @ u) / (u @ u) * u, "this doubles the part along u in place of removing it."
    yield v - u, "this takes away all of u, however little of it v has."
    yield (
        rest / np.linalg.norm(rest),
        "right direction; leave its length as it is, since it shows how much was removed.",
    )
    yield u - (u @ v) / (v @ v) * v, "this is u without v; asked is v without u."


@task("4.6")
def _(effects):
    e = np.asarray(effects, dtype=np.float64)
    own = np.abs(np.diag(e)).sum()
    yield (np.abs(e).sum() - own) / own, "right: 0 is an edit that changes its own attribute alone."
    yield (e.sum() - np.trace(e)) / np.trace(e), "effects of both signs cancel in the sum; take absolute values."
    yield np.abs(e).sum() / own, "the diagonal is counted among the side effects; take it away."
    yield own / (np.abs(e).sum() - own), "upside down: side effects per effect are asked for."


@task("4.7")
def _(h, a, b):
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    v = np.mean([h[a & c].mean(axis=0) - h[~a & c].mean(axis=0) for c in (b, ~b)], axis=0)
    yield v, "right. In each term the other attribute is the same on both sides, so that its difference drops out."
    yield (
        h[a].mean(axis=0) - h[~a].mean(axis=0),
        "this is the plain difference: its two sides differ in the other attribute too.",
    )
    yield 2 * v, "a sum of the two differences; take their mean."
    yield -v, "with the attribute less without it."


choice(
    "4.8",
    "c",
    "The network after the bottleneck is not linear: what an edit changes has to be measured on images.",
    a="orthogonal in h, not in effect: look at the table once more.",
    b="the angle is what the projection changed; the table shows what that did to the images.",
)


# 5. Boundaries and the mixing step


@task("5.1")
def _(x, w, b):
    size, raw = np.linalg.norm(w), x @ w
    yield (raw + b) / size, "right. Its sign is the class, its size a length in the space of x."
    yield raw + b, "this is the score of the classifier; divide by the length of w to have a distance."
    yield raw / size, "the intercept is missing: this is the distance from a parallel plane through the origin."
    yield raw / size + b, "the intercept belongs to w: divide both by the length."
    yield np.abs(raw + b) / size, "the sign says on which side x lies; keep it."


@task("5.2")
def _(x, n, b, to):
    d = x @ n + b
    yield x + (to - d)[:, None] * n, "right: whatever their distances were, all are at the same one now."
    yield x + to * n, "this moves *by* that distance; each sample has its own way to go."
    yield x + (to + d)[:, None] * n, "check the sign: a sample that lies there already must not move."
    yield x - d[:, None] * n, "this projects on the boundary, at distance 0."


def _nearer_mean(train: np.ndarray, y: np.ndarray, test: np.ndarray, *, middle: bool = True) -> np.ndarray:
    one, zero = train[y].mean(axis=0), train[~y].mean(axis=0)
    w = one - zero
    return test @ w > (w @ (one + zero) / 2 if middle else 0.0)


@task("5.3")
def _(x, y):
    y, half = np.asarray(y, dtype=bool), len(y) // 2
    train, test = slice(half), slice(half, None)
    right = float(np.mean(_nearer_mean(x[train], y[train], x[test]) == y[test]))
    yield right, "right. This is what to expect of a new image; beside it belongs the share of the larger class."
    own = float(np.mean(_nearer_mean(x[train], y[train], x[train]) == y[train]))
    yield (
        own,
        "these are the images that the boundary was fitted on: it is close to 1 for *any* labels of few images.",
    )
    shifted = float(np.mean(_nearer_mean(x[train], y[train], x[test], middle=False) == y[test]))
    yield shifted, "the boundary goes through the origin here; it belongs halfway between the two means."
    everything = float(np.mean(_nearer_mean(x, y, x) == y))
    yield everything, "the test half was used in the fit."


@task("5.4")
def _(alpha_bar, mean_square, d):
    a = np.asarray(alpha_bar, dtype=np.float64)
    square = a * mean_square + 1 - a
    yield np.sqrt(d * square), "right. Noise lies on a shell, and images inverted in few steps lie inside of it."
    yield d * square, "that is the mean squared length; take its root."
    yield np.sqrt(square), "that is the root mean square of one value; d of them make the length."
    yield np.sqrt(d * (np.sqrt(a) * mean_square + 1 - a)), "squares of the weights are alpha_bar and 1 - alpha_bar."


prediction("5.5")


@task("5.6")
def _(curve, level):
    above = [t for t, value in curve.items() if value >= level]
    stays = [t for t in curve if all(value >= level for u, value in curve.items() if u <= t)]
    yield max(stays), "right: from there down to the image the agreement never falls below the level again."
    yield max(above), "the curve falls below the level again after that; from the mixing step on it must *stay*."
    yield min(above), "that is the smallest timestep of all; asked is the largest from which on the curve stays above."
    yield (
        max(curve, key=curve.get),
        "that is the highest point; the question is from where on the curve stays above the level.",
    )


prediction("5.7")


@task("5.8")
def _(changes):
    right = max(changes, key=changes.get)
    yield right, "right. Beside the change belongs what the edit costs: compare the PSNR in the table."
    for name in changes:
        yield name, f"{name} changes the score by {changes[name]:.2f}; another space by more."
