"""How unevenly a coil brightens a scan, by the white matter that was found in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from bids_jointseg.image import Volume, sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNEVEN = 0.1
"""From which :func:`unevenness` a scan is evened out, and looked at again."""
SMOOTH_MM = 12.0
"""Standard deviation of the Gaussian by which white matter is averaged."""
_COARSE_MM = 3.0


def unevenness(scan: Volume, white: NDArray[np.bool_], brain: NDArray[np.bool_]) -> float:
    """Return the standard deviation over the brain of the logarithm of the coil's sensitivity.

    Parameters
    ----------
    scan
        Intensities (X, Y, Z), 0 where there is no signal.
    white, brain
        (X, Y, Z), true in white matter, off its border, and in the brain.
    """
    field, some = _log_sensitivity(scan, white)
    inside = brain[some]
    return float(field[inside].std()) if inside.any() else 0.0


def evened(scan: Volume, white: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the intensities that a coil of the same sensitivity everywhere would have given.

    Parameters
    ----------
    scan, white
        See :func:`unevenness`.
    """
    field, some = _log_sensitivity(scan, white)
    finer, shape = [1 / along.step for along in some], scan.data.shape
    fine = ndimage.affine_transform(field, finer, output_shape=shape, order=1, mode='nearest')
    return np.asarray(scan.data / np.exp(fine), dtype=np.float32)


def _log_sensitivity(
    scan: Volume, white: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], tuple[slice, ...]]:
    """Return the mean logarithm of the white matter around some voxels, and which they are."""
    some, apart_mm = sparse(scan.grid, _COARSE_MM)
    values = scan.data[some]
    known = white[some] & (values > 0)
    log = np.zeros(values.shape, np.float32)
    if not known.any():
        return log, some
    log[known] = np.log(values[known])
    log[known] -= np.median(log[known])
    total, weight = (
        # What is far from any white matter has the mean of a wider surrounding.
        sum(
            share * ndimage.gaussian_filter(part, width * SMOOTH_MM / apart_mm, truncate=8)
            for share, width in ((1, 1), (1e-3, 3))
        )
        for part in (log, known.astype(np.float32))
    )
    return np.asarray(total / np.maximum(weight, 1e-12)), some
