"""Protocols: the methods, attributes and sample sizes of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT = 10**9
"""Seeds of the held-out samples count from here, far from any population."""

CHANGE = 0.2
"""Root mean square change of an image, in [-1, 1], at which methods are compared."""

LADDER = (0.25, 0.5, 1.0, 2.0)
"""Strengths that are measured, in units of the one that changes samples of the population by `CHANGE`."""

MIDDLE = LADDER.index(1.0)
"""Position of that strength."""


@dataclass(frozen=True)
class Protocol:
    """Methods, attributes and sample sizes of a benchmark.

    Attributes
    ----------
    methods, attributes : tuple of str
    population : int
        Number of samples that a method learns from.
    labelled : int
        Number of labelled images that a method learns from; the last images of the set, at most half, serve as real
        images.
    held_out : int
        Number of samples to edit. No method sees them.
    repeats : int
        Number of populations, each with its own seeds.
    steps : int
        Number of visited timesteps.
    eta : float
    t : int
        Timestep, of 1000, of methods that act at one; the nearest visited one to that part of the chain is used.
    shown : int
        Number of held-out samples whose edited images are kept, chosen by the seed.
    seed : int
    transfer : bool
        Also edit samples of the population, and held-out samples with one step inserted between each two.
    """

    methods: tuple[str, ...]
    attributes: tuple[str, ...]
    population: int = 192
    labelled: int = 192
    held_out: int = 24
    repeats: int = 1
    steps: int = 10
    eta: float = 1.0
    t: int = 500
    shown: int = 4
    seed: int = 0
    transfer: bool = True


QUICK_ATTRIBUTES = ("Smiling", "Long_Hair", "Dark_Skin")

SIZES = {
    "quick": {"population": 192, "held_out": 16, "repeats": 1, "steps": 10},
    "full": {"population": 1000, "held_out": 128, "repeats": 3, "steps": 50},
}
"""Two sizes of a protocol: minutes and days on two cores."""
