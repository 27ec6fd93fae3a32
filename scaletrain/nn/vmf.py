"""Von Mises-Fisher distributions: unit vectors around a mean direction, with a density proportional
to exp(kappa cos).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scaletrain import rng

# of the table: its size, and how many standard deviations it spans to each side
_POINTS, _REACH = 8193, 30.0


class VonMisesFisher(nn.Module):
    """vMF(mean, kappa) on the unit sphere of `dim` >= 2 dimensions; kappa from 0 (uniform) to 1e6.

    The cosine t between a sample and the mean has the density exp(kappa t) (1 - t^2)^((dim - 3) /
    2), whatever the mean. In s = artanh t that is smooth and has one peak, at any concentration: a
    table of its integral turns one uniform number into one exact sample, without the rejections of
    Wood's method, whose number of draws is not known beforehand.
    """

    grid: Tensor
    below: Tensor

    def __init__(self, dim: int, kappa: float) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(
                f"a von Mises-Fisher distribution needs 2 dimensions or more, not {dim}: set "
                "method.dim"
            )

        self.kappa = kappa
        half = (dim - 1) / 2
        # where kappa (1 - t^2) = (dim - 1) t
        peak = kappa / (half + math.hypot(half, kappa))
        spread = ((1 - peak**2) * (2 * kappa * peak + dim - 1)) ** -0.5
        s = math.atanh(peak) + spread * torch.linspace(
            -_REACH, _REACH, _POINTS, dtype=torch.float64
        )
        log = kappa * s.tanh() - (dim - 1) * (s.cosh().log())
        density = (log - log.max()).exp()

        total = torch.cumulative_trapezoid(density, s)
        # Of the density of t; the area of the sphere across t belongs to every kappa and is left
        # out.
        self.log_normaliser = float(total[-1].log() + log.max())
        self.register_buffer("grid", s, persistent=False)
        self.register_buffer(
            "below", torch.cat([total.new_zeros(1), total]) / total[-1], persistent=False
        )

    def log_prob(self, cosine: Tensor) -> Tensor:
        """Logarithm of the density at a point with this cosine to the mean, up to a constant that
        depends on `dim` only.
        """
        return self.kappa * cosine - self.log_normaliser

    def sample(self, mean: Tensor, keys: Tensor, purpose: str) -> Tensor:
        """mean [b, dim], unit vectors; keys [b] -> [b, dim]: one sample for each, whose gradient
        flows into the mean.
        """
        # inside (0, 1), where quantiles are finite
        draws = rng.uniform(keys, purpose, mean.shape[1] + 1).double() + 2.0**-25
        s = self._quantile(draws[:, 0])[:, None].to(mean)
        noise = torch.special.ndtri(draws[:, 1:]).to(mean)
        across = nn.functional.normalize(noise - (noise * mean).sum(1, keepdim=True) * mean, dim=1)

        return s.tanh() * mean + across / s.cosh()

    def _quantile(self, u: Tensor) -> Tensor:
        """Uniform numbers -> values of artanh t, linear between the table's entries."""
        below = self.below.to(u)
        right = torch.searchsorted(below, u.contiguous()).clamp(1, len(below) - 1)
        low, high = below[right - 1], below[right]
        part = (u - low) / (high - low).clamp_min(torch.finfo(u.dtype).tiny)

        return torch.lerp(self.grid.to(u)[right - 1], self.grid.to(u)[right], part)
