"""Transforms of training samples: each draws its parameters once, a plain function applies them.

Geometry maps the voxels of a window to those of a source volume, so that one interpolation does
it all; intensity imitates scanners: coil sensitivity, contrast, noise, thick slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_jointseg.synth import blur, smooth_field

AXES = {'axial': (0, 1, 2), 'coronal': (0, 2, 1), 'sagittal': (1, 2, 0)}
"""Slicing -> the anatomical axis (right, anterior, superior) along each axis of a window."""


@dataclass(frozen=True)
class Geometry:
    """Where a window's voxels lie in a source volume.

    Attributes
    ----------
    matrix, centre
        Window voxel `v` -> source voxel `matrix @ (v - (shape - 1) / 2) + centre`.
    shape
        Of the window, finely sampled along the slice axis (the last).
    bend
        Standard deviation of the elastic part in source voxels.
    """

    matrix: np.ndarray
    centre: np.ndarray
    shape: tuple[int, int, int]
    bend: float


def draw_geometry(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    slicing: str,
    centre: np.ndarray,
    step: float,
    *,
    upright: bool = False,
) -> Geometry:
    """Draw rotation, scale, shear, mirror and elastic bend of a window.

    Parameters
    ----------
    rng
        Source of all draws.
    shape
        Of the window in source voxels, slice axis last.
    slicing
        `axial`, `coronal` or `sagittal`.
    centre
        Source voxel at the middle of the window.
    step
        Source voxels between two neighbours along the slice axis.
    upright
        Only mirror left and right, and keep to the voxels of the source: where `step` is 1,
        nothing is interpolated.
    """
    angles = np.deg2rad(rng.uniform(-15, 15, 3) if rng.random() < 0.8 else np.zeros(3))
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ turn
    scale = np.diag(rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3))
    shear = np.eye(3) + np.where(np.eye(3) > 0, 0, rng.uniform(-0.04, 0.04, (3, 3)))
    permute = np.zeros((3, 3))
    for axis, source in enumerate(AXES[slicing]):
        permute[source, axis] = 1
    spread = np.diag([1.0, 1.0, step])
    mirror = np.diag([-1.0 if rng.random() < 0.5 else 1.0, 1.0, 1.0])
    bend = rng.uniform(0, 1.6) if rng.random() < 0.5 else 0.0
    if upright:
        matrix = mirror @ permute @ spread
        corner = matrix @ ((np.array(shape) - 1) / 2)
        return Geometry(matrix, np.round(centre - corner) + corner, shape, 0.0)
    return Geometry(mirror @ rotation @ scale @ shear @ permute @ spread, centre, shape, bend)


def coarser(geometry: Geometry, factor: float, *, slices: bool) -> Geometry:
    """Return a geometry whose voxels lie `factor` times as far apart, between `slices` or not."""
    spread = np.diag([factor, factor, factor if slices else 1.0])
    return replace(geometry, matrix=geometry.matrix @ spread)


def coordinates(geometry: Geometry, generator: Generator) -> Tensor:
    """Return the source voxel of each window voxel, `(X, Y, Z, 3)`."""
    axes = [torch.arange(size, dtype=torch.float32) - (size - 1) / 2 for size in geometry.shape]
    matrix = torch.as_tensor(geometry.matrix, dtype=torch.float32)
    terms = [
        axis.reshape([-1 if i == k else 1 for i in range(3)] + [1]) * matrix[:, k]
        for k, axis in enumerate(axes)
    ]
    points = terms[0] + terms[1] + terms[2] + torch.as_tensor(geometry.centre, dtype=torch.float32)
    if geometry.bend:
        field = [smooth_field(geometry.shape, 24, generator) for _ in range(3)]
        points = points + geometry.bend * torch.stack(field, -1)
    return points


def warp(volume: Tensor, points: Tensor, mode: str = 'bilinear') -> Tensor:
    """Return the values of a volume `(X, Y, Z)` at source voxels `(..., 3)`; 0 outside.

    Parameters
    ----------
    volume
        Any type; only the part that the points need is converted to float.
    points
        `(X', Y', Z', 3)`.
    mode
        `nearest` or `bilinear` (of the eight neighbours).
    """
    low = [max(0, int(points[..., i].min()) - 1) for i in range(3)]
    high = [min(volume.shape[i], int(points[..., i].max()) + 3) for i in range(3)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return torch.zeros(points.shape[:3])
    part = volume[low[0] : high[0], low[1] : high[1], low[2] : high[2]].float()
    size = torch.tensor(part.shape, dtype=torch.float32)
    unit = (points - torch.tensor(low, dtype=torch.float32) + 0.5) / size * 2 - 1
    # grid_sample names the last axis of the volume first.
    return F.grid_sample(
        part[None, None],
        unit.flip(-1)[None],
        mode=mode,
        padding_mode='zeros',
        align_corners=False,
    )[0, 0]


def slices(fine: Tensor, count: int) -> Tensor:
    """Return means over `count` neighbouring fine slices: `(..., Z * count)` -> `(..., Z)`."""
    return fine if count == 1 else fine.unflatten(-1, (-1, count)).mean(-1)


@dataclass(frozen=True)
class Intensity:
    """How one scan was acquired: see :func:`draw_intensity`."""

    bias: float
    gamma: float
    noise: float
    thickness: tuple[float, float, float]
    clean_air: bool
    level: float
    scale: float


def draw_intensity(rng: np.random.Generator, coil: float = 0.18) -> Intensity:
    """Draw coil bias, gamma, noise, voxel size on each axis, and the error of normalisation.

    `coil` is the largest standard deviation of the logarithm of its sensitivity.
    """
    thickness = np.array([rng.uniform(0, 0.45), rng.uniform(0, 0.45), rng.uniform(0, 0.45)])
    if rng.random() < 0.35:
        # Thick slices that somebody resampled: half of their distance as a Gaussian, in voxels.
        thickness[rng.choice(3, p=[0.15, 0.15, 0.7])] = rng.uniform(0.6, 2.0)
    return Intensity(
        bias=rng.uniform(0, coil) if rng.random() < 0.7 else 0.0,
        gamma=float(np.exp(rng.uniform(-0.25, 0.25))) if rng.random() < 0.5 else 1.0,
        noise=rng.uniform(0, 0.06) if rng.random() < 0.85 else rng.uniform(0.06, 0.12),
        thickness=(float(thickness[0]), float(thickness[1]), float(thickness[2])),
        clean_air=bool(rng.random() < 0.5),
        level=rng.uniform(-0.2, 0.2),
        scale=rng.uniform(0.85, 1.2),
    )


def undisturbed(drawn: Intensity) -> Intensity:
    """Return an acquisition that changes nothing, but for a little error of normalisation."""
    return Intensity(
        bias=0.0,
        gamma=1.0,
        noise=0.0,
        thickness=(0.0, 0.0, 0.0),
        clean_air=True,
        level=drawn.level / 4,
        scale=drawn.scale**0.25,
    )


def drawn_again(drawn: Intensity, rng: np.random.Generator) -> Intensity:
    """Return another acquisition of a head: contrast, coil, noise and normalisation differ.

    What was lost to thick slices stays lost.
    """
    return replace(
        drawn,
        gamma=drawn.gamma * float(np.exp(rng.uniform(-0.2, 0.2))),
        noise=drawn.noise or rng.uniform(0, 0.03),
        level=drawn.level + rng.uniform(-0.05, 0.05),
        scale=drawn.scale * rng.uniform(0.95, 1.05),
        bias=drawn.bias or rng.uniform(0, 0.05),
    )


def level_after(mean: float, std: float, gamma: float) -> tuple[float, float]:
    """Return mean and SD of a scan after gamma, as a normal distribution has them, nearly."""
    return mean**gamma, std * gamma * mean ** (gamma - 1)


def acquire(image: Tensor, drawn: Intensity, generator: Generator) -> Tensor:
    """Return an image in units of white matter as a scanner would give it, `(X, Y, Z)`.

    Noise is Rician: the magnitude of a signal with Gaussian noise in both of its parts.
    """
    shape = tuple(image.shape)
    air = image <= 0
    image = blur(image, drawn.thickness)
    if drawn.gamma != 1.0:
        image = image.clamp_min(0) ** drawn.gamma
    if drawn.bias:
        image = image * (drawn.bias * smooth_field(shape, 50, generator)).exp()
    real = image + drawn.noise * torch.randn(shape, generator=generator)
    noisy = (real**2 + (drawn.noise * torch.randn(shape, generator=generator)) ** 2).sqrt()
    # Air that a program set to zero (brain extraction, defacing) has no noise.
    return torch.where(air, torch.zeros(()), noisy) if drawn.clean_air else noisy


@dataclass(frozen=True)
class View:
    """First voxel of a scan on each axis of a window, and the first beyond its end."""

    low: tuple[int, int, int]
    high: tuple[int, int, int]


def draw_view(rng: np.random.Generator, shape: Sequence[int], chance: float = 0.15) -> View:
    """Draw the field of view of one scan: with `chance` it ends inside a window of `shape`.

    It ends on one or two sides, more often along the slices (the last axis) than across them,
    after at most 0.4 of the window.
    """
    low, high = [0, 0, 0], [int(size) for size in shape]
    sides = int(rng.integers(1, 3)) if rng.random() < chance else 0
    for _ in range(sides):
        axis = int(rng.choice(3, p=[0.2, 0.2, 0.6]))
        cut = int(rng.uniform(0, 0.4) * shape[axis])
        if rng.random() < 0.5:
            low[axis] = cut
        else:
            high[axis] = int(shape[axis]) - cut
    return View((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def limit_view(image: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Return an image `(..., X, Y, Z)` with air (0) outside of a view, and what is inside.

    Returns
    -------
    tuple[Tensor, Tensor]
        The image, and bool `(X, Y, Z)`.
    """
    inside = torch.zeros(image.shape[-3:], dtype=torch.bool)
    inside[tuple(slice(a, b) for a, b in zip(view.low, view.high, strict=True))] = True
    return torch.where(inside, image, torch.zeros((), dtype=image.dtype)), inside


def standardise(image: Tensor, mean: float, std: float, drawn: Intensity) -> Tensor:
    """Return z-scores, with the error that normalisation over another field of view makes."""
    return ((image - mean) / (std * drawn.scale) + drawn.level).clamp(-6, 8)


def within_slices(geometry: Geometry) -> Geometry:
    """Return the geometry without what leaves the slices: thick ones are kept as they are."""
    matrix = geometry.matrix.copy()
    matrix[2, :2] = matrix[:2, 2] = 0
    matrix[2, 2] = np.sign(matrix[2, 2])
    return replace(geometry, matrix=matrix)
