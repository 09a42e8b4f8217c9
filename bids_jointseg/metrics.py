r"""Agreement of two segmentations.

Dice, in per cent: :math:`200 |A \cap B| / (|A| + |B|)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bids_jointseg.labels import LABELS


def dice(
    found: NDArray[np.integer],
    truth: NDArray[np.integer],
    *,
    valid: NDArray[np.bool_] | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return the Dice of each class, in per cent; NaN where both are empty.

    Parameters
    ----------
    found, truth
        Label maps with the indices of :mod:`bids_jointseg.labels`, of one shape.
    valid
        Voxels that count; all by default.
    classes
        Abbreviations; every class but the background by default.

    Returns
    -------
    dict[str, float]
        Abbreviation -> Dice.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if found.shape != truth.shape:
        raise ValueError(f'shapes differ: {found.shape} and {truth.shape}')
    if valid is not None:
        found, truth = found[valid], truth[valid]
    scores = {}
    for label in LABELS[1:]:
        if classes is None or label.abbreviation in classes:
            a, b = found == label.index, truth == label.index
            size = int(a.sum()) + int(b.sum())
            both = int((a & b).sum())
            scores[label.abbreviation] = 200 * both / size if size else float('nan')
    return scores
