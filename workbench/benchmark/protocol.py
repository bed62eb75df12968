"""What a benchmark measures, and on how many samples."""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT = 10**9
"""Seeds of the held-out samples count from here, far from any population."""


@dataclass(frozen=True)
class Protocol:
    """What is measured, and on how many.

    Attributes
    ----------
    methods, attributes : tuple of str
    population : int
        Samples that a method learns from.
    labelled : int
        Labelled images that a method learns from; the last ones of the set, at most half of it, stand for real images.
    held_out : int
        Samples that are edited. No method sees them.
    repeats : int
        Populations, each of other seeds.
    steps : int
        Visited timesteps.
    eta : float
    t : int
        Timestep of methods that act at one; the nearest visited is taken.
    shown : int
        Held-out samples whose edited images are kept, drawn by the seed.
    seed : int
    transfer : bool
        Also edit samples of the population, and held-out ones with a step between each two.
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
"""Two sizes of a protocol: minutes and hours on two cores."""
