"""Rigid registration of two scans of one head, and the metric that others register by.

References
----------
Mattes et al. (2003), *PET-CT image registration in the chest using free-form deformations*.
"""

# SimpleITK is only half typed:
# mypy: allow-untyped-calls

from __future__ import annotations

import functools
import itertools
import logging
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from bids_jointseg.image import (
    ImageError,
    Volume,
    coarsened,
    cropped,
    foreground,
    resample,
    transformed,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bids_jointseg.image import Matrix

LOGGER = logging.getLogger('bids_jointseg')

LEAST_INFORMATION = 0.1
"""Mutual information (nats) below which two scans do not show one head: pairs of one head were
measured to have 0.38 (one of them skull-stripped) to 0.88, a head and noise 0.02."""
LEAST_OVERLAP = 0.2
"""Share of the smaller head in the other below which they do not overlap."""


def register(fixed: Volume, moving: Volume, *, seed: int = 0) -> Matrix:
    """Align two scans of one head rigidly, whatever their contrasts.

    Mattes' mutual information, maximised by Powell's method on a pyramid of 5, 2.5 and 1 mm
    (never finer than the scans). It starts from where the headers, the centres of the fields of
    view and the centres of mass say, each turned by -12, 0 and 12 degrees about every axis; the
    best two of these go on. The result is the same bit by bit every time, on one thread or two.

    Parameters
    ----------
    fixed, moving
        Scans of one head.
    seed
        Of the voxels that are sampled.

    Returns
    -------
    Matrix
        (4, 4) rigid, RAS mm of `fixed` -> RAS mm of `moving`: what :func:`resample` needs to
        bring `moving` onto the grid of `fixed`.

    Raises
    ------
    ImageError
        If no plausible alignment was found: the scans overlap too little or share too little
        information to be of one head.
    """
    centre = _centre_of_mass(fixed)
    shifts = (
        np.zeros(3),
        moving.grid.middle - fixed.grid.middle,
        _centre_of_mass(moving) - centre,
    )
    # Air tells nothing: all sampled voxels lie in or near the head.
    fixed, moving = clamped(cropped(fixed, margin_mm=8.0)), clamped(moving)
    angles = itertools.product(np.deg2rad((-12.0, 0.0, 12.0)), repeat=3)
    starts = [(*turn, *shift) for turn in angles for shift in shifts]

    @functools.cache
    def images_of(millimetres: float) -> list[Any]:
        return [sitk_image(coarsened(volume, millimetres)) for volume in (fixed, moving)]

    method = mutual_information(1.0, seed=seed)
    found = []
    for start in starts:
        method.SetInitialTransform(_euler(centre, start))
        # SimpleITK raises where the two do not overlap at all.
        with suppress(RuntimeError):
            found.append((method.MetricEvaluate(*images_of(5.0)), start))

    for millimetres, samples, step, keep in (
        (5.0, 20_000, 2.0, 2),
        (2.5, 60_000, 1.0, 1),
        (1.0, 45_000, 0.3, 1),
    ):
        images = images_of(millimetres)
        share = _share(images[0].GetSize(), samples)
        starts = [start for _, start in sorted(found)[:keep]]
        found = []
        for start in starts:
            transform = _euler(centre, start)
            method = mutual_information(share, seed=seed)
            # Twenty steps along a line, as others take, double the time and gain nothing.
            method.SetOptimizerAsPowell(
                numberOfIterations=4, maximumLineIterations=8, stepLength=step
            )
            method.SetOptimizerScales([60.0, 60.0, 60.0, 1.0, 1.0, 1.0])
            method.SetInitialTransform(transform, inPlace=True)
            with suppress(RuntimeError):
                method.Execute(*images)
                found.append((method.GetMetricValue(), tuple(transform.GetParameters())))
    if not found:
        raise ImageError('the two scans do not overlap: check that both show the same head')
    (value, best), matrix = found[0], np.eye(4)
    matrix[:3, :3] = np.array(_euler(centre, best).GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = centre + best[3:] - matrix[:3, :3] @ centre
    overlap = _overlap(fixed, moving, matrix)
    if -value < LEAST_INFORMATION or overlap < LEAST_OVERLAP:
        raise ImageError(
            f'the two scans cannot be aligned (overlap of the heads {overlap:.0%}, mutual '
            f'information {-value:.2f}): check that both show the same head'
        )
    distance = float(np.linalg.norm(transformed(matrix, centre) - centre))
    if distance > 50:
        LOGGER.warning(
            'The headers place the two scans %.0f mm apart; aligned by their content', distance
        )
    return matrix


def _euler(centre: Matrix, parameters: Sequence[float]) -> Any:
    """Return a rotation (three angles, radians) about a centre and a shift (mm)."""
    transform = sitk.Euler3DTransform(centre.tolist())
    transform.SetParameters([float(value) for value in parameters])
    return transform


def _share(size: Sequence[int], samples: int) -> float:
    """Return which share of an image's voxels to sample regularly: about `samples` of them.

    Regular samples are every n-th voxel in memory. Were n a multiple of a row's length, all of
    them would lie in one plane, perhaps of air; were a row a multiple of n, in a few. So the
    longer is kept far from multiples of the shorter: 0.38 or 0.62 of it beyond one.
    """
    row, step = size[0], max(1.0, math.prod(size) / samples)

    def apart(ratio: float) -> float:
        beyond = (math.floor(ratio) + far for far in (-0.38, 0.38, 0.62, 1.38))
        return min((far for far in beyond if far > 0), key=lambda far: abs(far - ratio))

    step = row * apart(step / row) if step > row else row / apart(row / step)
    # The library rounds 1 / share up.
    return 1.0 if step < 1.5 else 1 / (round(step) - 0.5)


def _overlap(fixed: Volume, moving: Volume, matrix: Matrix) -> float:
    """Return the share of the smaller head that lies within the other."""
    coarse = coarsened(fixed, 5.0)
    there = Volume((moving.data > foreground(moving.data)).astype(np.float32), moving.grid)
    a = coarse.data > foreground(coarse.data)
    b = resample(there, coarse.grid, matrix, threads=1) > 0.5
    voxels = there.data.sum() * np.prod(moving.grid.spacing_mm) / np.prod(coarse.grid.spacing_mm)
    return float((a & b).sum() / max(min(a.sum(), voxels), 1.0))


def _centre_of_mass(volume: Volume) -> Matrix:
    """Return the centre of the head (3,), RAS mm."""
    inside = volume.data > foreground(volume.data)
    return transformed(volume.grid.affine, np.array(ndimage.center_of_mass(inside)))


def mutual_information(share: float, *, seed: int) -> Any:
    """Return SimpleITK's registration by mutual information, without an optimiser.

    Parameters
    ----------
    share
        Of the fixed image's voxels, that is sampled regularly.
    seed
        Of the samples.
    """
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
    method.SetMetricUseFixedImageGradientFilter(False)
    method.SetMetricUseMovingImageGradientFilter(False)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(share, seed + 1)  # 0 would be the clock
    method.SetInterpolator(sitk.sitkLinear)
    method.SetNumberOfWorkUnits(2)  # the sum of two parts has the same bits in either order
    return method


def clamped(volume: Volume) -> Volume:
    """Return the volume without its brightest spots, which would waste most of a histogram."""
    limit = np.percentile(volume.data, 99.5)
    return Volume(np.clip(volume.data, 0, limit), volume.grid)


def sitk_image(volume: Volume) -> Any:
    """Return a SimpleITK image whose physical space is RAS mm, with orthonormal directions."""
    grid = volume.grid
    spacing = grid.spacing_mm
    left, _, right = np.linalg.svd(grid.affine[:3, :3] / spacing)
    direction = left @ right  # the nearest orthonormal one; SimpleITK takes no other
    image = sitk.GetImageFromArray(volume.data.T)
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    middle = (np.array(grid.shape) - 1) / 2
    image.SetOrigin((grid.middle - direction @ (spacing * middle)).tolist())
    return image
