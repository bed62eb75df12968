"""A diffusion model whose data and posterior are known: a mixture of two Gaussians, with the exact eps."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from workbench.datasets.classifiers import load_classifier
from workbench.diffusion.models import Model
from workbench.diffusion.schedule import NoiseSchedule
from workbench.diffusion.unet import Bottleneck


class Config(dict):
    """A network's settings, by name or by attribute."""

    __getattr__ = dict.__getitem__


class ExactNetwork:
    """x_0 = c mu + s n, with c = +1 or -1 alike, n ~ N(0, I); mu and s of the images' shape. h_t is x_t."""

    tap, dtype, device, compiled, condition = "after", torch.float32, torch.device("cpu"), False, None

    def __init__(self, mu: torch.Tensor, s: torch.Tensor, schedule: NoiseSchedule) -> None:
        self.mu, self.s2, self.schedule = mu, s**2, schedule
        channels, size, _ = self.x_shape = self.h_shape = tuple(mu.shape)
        config = Config(in_channels=channels, sample_size=size, block_out_channels=(channels,))
        self.unet = SimpleNamespace(config=config, parameters=lambda: [])

    def encode(self, x_t, t):
        return Bottleneck(x_t, (x_t,), torch.full((len(x_t), 1), float(t)))

    def decode(self, bottleneck, delta_h=None):
        (x_t,), t = bottleneck.skips, int(bottleneck.emb[0, 0])
        a = self.schedule.alpha_bar(t)
        p, mean = self.posterior(x_t, t)
        plus, minus = mean(1.0), mean(-1.0)
        expected = p.view(-1, 1, 1, 1) * plus + (1 - p.view(-1, 1, 1, 1)) * minus
        return (x_t - a**0.5 * expected) / (1 - a) ** 0.5

    def __call__(self, x_t, t):
        return self.decode(self.encode(x_t, t))

    def posterior(self, x_t, t):
        """P(c = 1 | x_t), shape (n,), and the mean of x_0 given x_t and c."""
        a = self.schedule.alpha_bar(t)
        v = a * self.s2 + 1 - a
        p = torch.sigmoid((2 * a**0.5 * self.mu / v * x_t).flatten(1).sum(1))
        return p, lambda c: c * self.mu + a**0.5 * self.s2 / v * (x_t - a**0.5 * c * self.mu)

    def draw_x0(self, x_t, t, generator):
        """One x_0 of the exact posterior for every x_t."""
        a = self.schedule.alpha_bar(t)
        p, mean = self.posterior(x_t, t)
        c = (torch.rand(len(x_t), generator=generator) < p).float().view(-1, 1, 1, 1) * 2 - 1
        sd = (self.s2 * (1 - a) / (a * self.s2 + 1 - a)).sqrt()
        return mean(c) + sd * torch.randn(x_t.shape, generator=generator)


def exact_model(mu: torch.Tensor, s: torch.Tensor) -> Model:
    """A Model of the mixture on the linear schedule."""
    schedule = NoiseSchedule.linear()
    return Model("mixture", ExactNetwork(mu, s, schedule), schedule, "exact")


def which_class(model: Model):
    """A classifier of one attribute, "plus": which of the two Gaussians an image comes from."""
    mu = model.unet.mu

    def probability(images):
        return torch.sigmoid(1e3 * (images * mu).flatten(1).sum(1, keepdim=True))

    return load_classifier(probability, attributes=["plus"])


def rms(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Root mean square difference of images."""
    return (a - b).square().flatten(1).mean(1).sqrt().numpy()
