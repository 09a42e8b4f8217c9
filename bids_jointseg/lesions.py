"""What is measured of each lesion, and a T1w without them.

Zones follow the words of the criteria for multiple sclerosis (Thompson et al., Lancet Neurol
2018: periventricular lesions abut the ventricles, juxtacortical ones the cortex), applied to our
own labels: where no voxel of white matter is left between by more than the rim that partial
volume makes. Filling follows Chard et al. (J Magn Reson Imaging 2010): lesions get the
intensities of the white matter around them, noise included, so that tools that know of no
lesions do not take them for gray matter.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from bids_jointseg.image import box_around, transformed, widened
from bids_jointseg.labels import LABELS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from bids_jointseg.image import Grid

INDEX = {label.abbreviation: label.index for label in LABELS}
ZONES = ('periventricular', 'juxtacortical', 'infratentorial', 'deep')
VENTRICLE_MM = 3.0
"""Farthest voxel of a ventricle from a periventricular lesion, centre to centre (Kim et al.,
Biol Psychiatry 2008, call white matter up to 3 mm from the ventricles juxtaventricular)."""
CORTEX_MM = 1.8
"""Farthest voxel of cortex from a juxtacortical lesion: voxels of 1 mm that touch at a corner."""
LONG_MM = 3.0
"""Longest diameter from which the criteria for multiple sclerosis count a lesion."""
TOUCH = np.ones((3, 3, 3), bool)


def measure_lesions(
    labels: NDArray[np.uint8],
    grid: Grid,
    *,
    probability: NDArray[np.floating] | None = None,
    agreement: NDArray[np.floating] | None = None,
) -> list[dict[str, Any]]:
    """Measure every lesion: a group of voxels that touch at least at a corner (26-connected).

    Parameters
    ----------
    labels
        (X, Y, Z), values of :data:`.labels.LABELS`.
    grid
        Where the voxels lie.
    probability
        (X, Y, Z), of lesion, 0 to 1.
    agreement
        (X, Y, Z), share of the members of the ensemble that call a voxel lesion.

    Returns
    -------
    list[dict[str, Any]]
        Largest first: ``lesion`` (1, 2, ...), ``volume_mm3``, ``diameter_mm`` (longest, from
        voxel corner to voxel corner), centroid ``x_mm``, ``y_mm``, ``z_mm`` in RAS, ``voxels``,
        ``zone`` (one of :data:`ZONES`), ``probability`` and ``agreement`` (means over its voxels,
        None where not given).
    """
    parts, count = ndimage.label(labels == INDEX['L'], TOUCH)
    if not count:
        return []
    voxel_mm3 = abs(float(np.linalg.det(grid.affine[:3, :3])))
    reach_mm = max(VENTRICLE_MM, CORTEX_MM)
    rows: list[dict[str, Any]] = []
    for part, tight in enumerate(ndimage.find_objects(parts), start=1):
        # As much of the surroundings as decides on the zone.
        box = widened(tight, reach_mm, grid)
        inside = parts[box] == part
        voxels = np.argwhere(inside) + [axis.start for axis in box]
        points = transformed(grid.affine, voxels)
        x, y, z = points.mean(axis=0)
        rows.append(
            {
                'volume_mm3': float(len(voxels) * voxel_mm3),
                'diameter_mm': _diameter_mm(points, grid),
                'x_mm': float(x),
                'y_mm': float(y),
                'z_mm': float(z),
                'voxels': len(voxels),
                'zone': _zone(labels[box], inside, grid),
                'probability': _mean(probability, box, inside),
                'agreement': _mean(agreement, box, inside),
            }
        )
    rows.sort(key=lambda row: -row['voxels'])
    return [{'lesion': rank} | row for rank, row in enumerate(rows, start=1)]


def count_long(rows: Iterable[Mapping[str, Any]]) -> int:
    """Return how many rows of :func:`measure_lesions` are :data:`LONG_MM` long or longer."""
    return sum(row['diameter_mm'] >= LONG_MM for row in rows)


def zone_volumes(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return zone -> ``count`` and ``volume_mm3`` of the rows of :func:`measure_lesions`."""
    return {
        zone: {
            'count': sum(row['zone'] == zone for row in rows),
            'volume_mm3': round(sum(row['volume_mm3'] for row in rows if row['zone'] == zone), 2),
        }
        for zone in ZONES
    }


def fill_lesions(
    data: NDArray[np.floating], labels: NDArray[np.uint8], grid: Grid
) -> NDArray[np.float32]:
    r"""Return a T1w whose lesions look like the white matter around them.

    With white matter :math:`S` apart from the lesions and a Gaussian :math:`G`, a voxel gets

    .. math:: m + s \epsilon, \quad m = \frac{G * (I S)}{G * S}, \quad
        s^2 = \frac{G * ((I - m)^2 S)}{G * S}, \quad \epsilon \sim N(0, 1),

    with the smallest of four :math:`G` that still sees white matter. The rim of one voxel, where
    a lesion fades, is filled too. The noise is the same in every run.

    Parameters
    ----------
    data
        Intensities `(X, Y, Z)`.
    labels
        `(X, Y, Z)` on the same grid.
    grid
        Theirs.

    Returns
    -------
    NDArray[np.float32]
        `(X, Y, Z)`; as `data` outside of the filled voxels, and everywhere if there is no lesion
        or no white matter.
    """
    filled = np.array(data, np.float32)
    lesion, white = labels == INDEX['L'], labels == INDEX['WM']
    cross = ndimage.generate_binary_structure(3, 1)
    wanted = lesion | (ndimage.binary_dilation(lesion, cross) & white)
    source = white & ~wanted
    if not wanted.any() or not source.any():
        return filled
    # Only the surroundings of the lesions are looked at.
    box = box_around(wanted, 40, grid)
    values, seen, open_ = filled[box], source[box].astype(np.float32), wanted[box].copy()
    noise = np.random.default_rng(0).standard_normal(open_.shape, dtype=np.float32)
    for sigma_mm in (2.0, 4.0, 8.0, 16.0):
        if not open_.any():
            break
        # A kernel ends at 4 sigma, and what it sees has been blurred once before.
        near = box_around(open_, 9 * sigma_mm, grid)
        inside = open_[near]
        blur = partial(ndimage.gaussian_filter, sigma=sigma_mm / grid.spacing_mm, mode='constant')
        weight = blur(seen[near])
        # A fifth of the kernel on white matter is a sample, not its far tail.
        enough = inside & (weight > 0.2 if sigma_mm < 16 else weight > 1e-6)
        if not enough.any():
            continue
        safe = np.maximum(weight, 1e-6)
        mean = blur(values[near] * seen[near]) / safe
        spread = np.sqrt(np.maximum(blur((values[near] - mean) ** 2 * seen[near]) / safe, 0))
        filled[box][near][enough] = (mean + spread * noise[near])[enough]
        inside &= ~enough
    return filled


def _diameter_mm(points: NDArray[np.floating], grid: Grid) -> float:
    """Return the longest distance between corners of voxels with these centres, RAS mm."""
    corners = np.stack(np.meshgrid(*[(-0.5, 0.5)] * 3, indexing='ij'), -1).reshape(-1, 3)
    ends = (points[:, None] + corners @ grid.affine[:3, :3].T).reshape(-1, 3)
    return float(pdist(ends[ConvexHull(ends).vertices]).max())


def _zone(labels: NDArray[np.uint8], lesion: NDArray[np.bool_], grid: Grid) -> str:
    """Return the zone of a lesion from the labels around it."""
    around = labels[ndimage.binary_dilation(lesion, TOUCH) & ~lesion]
    tissue = around[(around != INDEX['BG']) & (around != INDEX['L'])]
    if np.isin(tissue, (INDEX['BS'], INDEX['CBM'])).sum() > tissue.size / 2:
        return 'infratentorial'
    away_mm = ndimage.distance_transform_edt(~lesion, sampling=grid.spacing_mm)
    if (away_mm[labels == INDEX['VEN']] <= VENTRICLE_MM).any():
        return 'periventricular'
    return 'juxtacortical' if (away_mm[labels == INDEX['CGM']] <= CORTEX_MM).any() else 'deep'


def _mean(
    array: NDArray[np.floating] | None, box: tuple[slice, ...], inside: NDArray[np.bool_]
) -> float | None:
    return None if array is None else float(np.mean(array[box][inside], dtype=np.float64))
