r"""What changed between two sessions of one person, and what did not.

Volumes are compared as they were measured, each on its own scan. The change of a volume with
the 95 % intervals :math:`[l_0, u_0]` around :math:`v_0` and :math:`[l_1, u_1]` around
:math:`v_1` is :math:`d = v_1 - v_0` with the interval

.. math:: \Bigl[d - \sqrt{(v_1 - l_1)^2 + (u_0 - v_0)^2},\;
                d + \sqrt{(u_1 - v_1)^2 + (v_0 - l_0)^2}\Bigr],

the half-widths in quadrature (Zou and Donner, Stat Med 2008, for intervals that are not even).

Lesions are compared where they are. The two reference scans are registered rigidly by their
brains, in both directions, and the transform :math:`M` in the middle of the two is taken, so that
the answer is the same whichever scan comes first (Reuter et al., NeuroImage 2012, on why that
matters). Every lesion stays as it was segmented, on its own grid: the centres of its voxels are
mapped, never its label map. (The indicator of a lesion of one voxel, moved by half a voxel along
three axes, is nowhere above 1/8: resampling loses what is small.) For pictures, and only for
them, both scans are brought to the space half-way, :math:`M^{1/2}`.

Rules are constants below, each with its reason. They are made to call noise no change; what they
cannot tell is called unclear.

References
----------
Goodkin et al. (1992), *MRI lesion enlargement in multiple sclerosis: disease-related activity,
chance occurrence, or measurement artifact?*, Arch Neurol 49:261; Thompson et al. (2018),
*Diagnosis of multiple sclerosis: 2017 revisions of the McDonald criteria*, Lancet Neurol 17:162;
Grahl et al. (2019), *Evidence for a white matter lesion size threshold to support the diagnosis
of relapsing remitting multiple sclerosis*, Mult Scler Relat Disord 29:124.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from scipy import ndimage, sparse
from scipy.linalg import sqrtm
from scipy.spatial import cKDTree

from bids_jointseg import __version__, bids, figures, image, registration
from bids_jointseg.image import Grid, ImageError, Volume
from bids_jointseg.labels import LABELS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bids_jointseg.image import Matrix

LOGGER = logging.getLogger('bids_jointseg')

WHITE, LESION = (
    next(label.index for label in LABELS if label.abbreviation == name) for name in ('WM', 'L')
)

TOLERANCE_VOXELS = 2.0
"""Farthest centre of a voxel of the same lesion: the two would touch if one grew by a voxel. The
voxel is what registration and partial volume may be wrong by."""

FINEST_MM = 1.0
"""Voxels count as no smaller than this in the tolerance: registration is no better."""

SMALLEST_MM3 = math.pi / 6 * 3.0**3
"""Of a new or resolved lesion, and of a growth: a ball of 3 mm. McDonald's criteria ask for 3 mm
in the long axis (Thompson et al., 2018), and a ball of that size is what tells patients from
others best (Grahl et al., 2019). Challenges that score manual masks count from 3 mm^3."""

SMALLEST_VOXELS = 3
"""Of a new or resolved lesion: one or two voxels are what noise makes on coarse grids."""

EVIDENCE = 0.5
"""By how much the probability of lesion has to rise (or fall) for each voxel by which a lesion is
larger (or smaller) than before, on average: half of the range, as from even odds to certainty.
Less is a voxel that was nearly lesion before and is just lesion now. As much is asked of the
FLAIR, in units of how far the lesion stands out from the white matter around it."""

AROUND_MM = (2.0, 10.0)
"""How far from a lesion the white matter lies that it is compared with: beyond its own rim, and
near enough to be as bright for the coil."""

AROUND_VOXELS = 30
"""Fewest voxels of that white matter that tell how bright it is."""

RELATIVE = 0.25
"""Least growth or shrinkage as a share of the smaller volume (Goodkin et al., 1992: twice the
variation of repeated measurements is 24 % of the area of the larger lesions; that of the smaller
ones, 45 %, is what `BOUNDARY` asks for there)."""

BOUNDARY = 0.5
"""How much of each voxel on the surface of a lesion is in doubt, in each scan. Both scans'
doubts, in quadrature, are what a growth or shrinkage has to exceed."""

ALIKE = 0.1
"""Largest relative difference of voxel sizes within one protocol."""

DISAGREEMENT_MM = 1.0
"""Largest difference of the two directions of registration that is not worth a warning."""

RIM_MM = 5.0
"""Of what is around the brain and still registered: fluid, whose edge to the brain helps."""

PROTOCOL = ('Manufacturer', 'ManufacturersModelName', 'MagneticFieldStrength')
"""Fields of a raw sidecar that tell one scanner from another."""

TILT_DEGREES = 3.0
"""Between thick slices: beyond, they cut small lesions otherwise (docs/longitudinal.md)."""

TILTED_SLICES = 3
"""Fewest slices of a lesion that changed where thick slices are tilted: two are what one shows."""

RULES = {
    'tolerance_voxels': TOLERANCE_VOXELS,
    'finest_mm': FINEST_MM,
    'smallest_mm3': round(SMALLEST_MM3, 2),
    'smallest_voxels': SMALLEST_VOXELS,
    'evidence': EVIDENCE,
    'around_mm': list(AROUND_MM),
    'around_voxels': AROUND_VOXELS,
    'relative': RELATIVE,
    'boundary': BOUNDARY,
    'thick_mm': image.THICK_MM,
    'tilt_degrees': TILT_DEGREES,
    'tilted_slices': TILTED_SLICES,
}

VOLUME_COLUMNS = {
    'since': {'Description': 'Session with which this one is compared'},
    'name': {'Description': 'Abbreviation of the class, as in seg-jointseg_dseg.tsv, or brain'},
    'before_mm3': {'Description': 'Volume in the earlier session', 'Units': 'mm^3'},
    'after_mm3': {'Description': 'Volume in this session', 'Units': 'mm^3'},
    'change_mm3': {'Description': 'Difference', 'Units': 'mm^3'},
    'low_mm3': {'Description': 'Lower end of its 95 % interval', 'Units': 'mm^3'},
    'high_mm3': {'Description': 'Upper end of its 95 % interval', 'Units': 'mm^3'},
    'change_percent': {'Description': 'Difference, of the earlier volume', 'Units': '%'},
    'low_percent': {'Description': 'Lower end of its 95 % interval', 'Units': '%'},
    'high_percent': {'Description': 'Upper end of its 95 % interval', 'Units': '%'},
    'changed': {
        'Description': 'Whether the interval leaves 0 out; n/a where there is none, or where the '
        'two scans are of different kinds',
        'Levels': {'yes': 'it does', 'no': 'it does not'},
    },
}
LESION_COLUMNS = {
    'since': {'Description': 'Session with which this one is compared'},
    'lesion': {'Description': 'Number of the lesion, the changed ones first'},
    'change': {
        'Description': 'What became of the lesion',
        'Levels': {name: words for name, (_, words) in figures.CHANGES.items()},
    },
    'before_mm3': {'Description': 'Volume in the earlier session', 'Units': 'mm^3'},
    'after_mm3': {'Description': 'Volume in this session', 'Units': 'mm^3'},
    'change_mm3': {'Description': 'Difference', 'Units': 'mm^3'},
    'margin_mm3': {
        'Description': 'Difference that the surfaces of the lesion leave in doubt',
        'Units': 'mm^3',
    },
    'x_mm': {'Description': "Centroid in this session's scan, towards the right", 'Units': 'mm'},
    'y_mm': {'Description': 'Centroid, towards the front', 'Units': 'mm'},
    'z_mm': {'Description': 'Centroid, upwards', 'Units': 'mm'},
    'before_lesions': {
        'Description': "Its numbers in the earlier session's desc-lesions_morph.tsv"
    },
    'after_lesions': {'Description': "Its numbers in this session's desc-lesions_morph.tsv"},
}
OUTPUTS = tuple(
    f'desc-{name}_morph.{extension}'
    for name in ('lesionchange', 'longitudinal')
    for extension in ('tsv', 'csv', 'json')
)
"""Suffixes of the tables, in the order of writing; the last says that all is there."""


# --- volumes ------------------------------------------------------------------------------------

Interval = tuple[float, float, float]
"""A value, the lower and the upper end of its interval; NaN for what is not known."""


def change_interval(before: Interval, after: Interval) -> Interval:
    """Return the difference of two values and its interval, see the top of the module.

    Parameters
    ----------
    before, after
        Value, low and high end, in one unit.

    Returns
    -------
    Interval
        In the same unit; NaN ends where one of the four is not known.
    """
    (v0, l0, u0), (v1, l1, u1) = before, after
    difference = v1 - v0
    return (
        difference,
        difference - math.hypot(v1 - l1, u0 - v0),
        difference + math.hypot(u1 - v1, v0 - l0),
    )


def compare_volumes(
    before: Mapping[str, Interval], after: Mapping[str, Interval], *, alike: bool = True
) -> list[dict[str, Any]]:
    """Compare the volumes of two sessions.

    Parameters
    ----------
    before, after
        Class -> volume in mm^3 and its 95 % interval.
    alike
        Whether the scans are of one kind; if not, their intervals do not say how they differ.

    Returns
    -------
    list[dict]
        One row per class of `after` that `before` has: :data:`VOLUME_COLUMNS` but `since`;
        'n/a' for what is not known.
    """
    rows = []
    for name, volume in after.items():
        if name not in before:
            continue
        change = change_interval(before[name], volume)
        base = before[name][0]
        percent = [100 * value / base if base else math.nan for value in change]
        changed = change[1] > 0 or change[2] < 0
        known = alike and all(map(math.isfinite, change))
        rows.append(
            {
                'name': name,
                'before_mm3': _cell(base),
                'after_mm3': _cell(volume[0]),
                **{
                    f'{end}_{unit}': _cell(value)
                    for unit, values in (('mm3', change), ('percent', percent))
                    for end, value in zip(('change', 'low', 'high'), values, strict=True)
                },
                'changed': ('yes' if changed else 'no') if known else 'n/a',
            }
        )
    return rows


def _cell(value: float) -> float | str:
    return round(value, 2) + 0.0 if math.isfinite(value) else 'n/a'


# --- space --------------------------------------------------------------------------------------


def halfway(matrix: Matrix) -> Matrix:
    """Return the rigid transform that, applied twice, is the one given, `(4, 4)`.

    Raises
    ------
    ImageError
        If it turns by half a turn, where two answers are as good.
    """
    root = np.asarray(sqrtm(matrix))
    if np.iscomplexobj(root) and np.abs(root.imag).max() < 1e-6:
        root = root.real
    if np.iscomplexobj(root) or np.abs(root @ root - matrix).max() > 1e-6:
        raise ImageError('the two scans lie upside down to one another: correct their headers')
    return np.asarray(root)


def align(
    earlier: Volume, later: Volume, brains: tuple[NDArray[np.bool_], NDArray[np.bool_]]
) -> tuple[Matrix, float]:
    """Register two scans of one person by their brains, both ways.

    Scalp, jaw and neck move against the brain, so only the brain and :data:`RIM_MM` around it
    are looked at. With :math:`F` from later to earlier and :math:`B` from earlier to later, the
    answer is the middle of :math:`F` and :math:`B^{-1}`, :math:`F (F^{-1} B^{-1})^{1/2}`.

    Parameters
    ----------
    earlier, later
        The scans.
    brains
        (X, Y, Z) masks on their grids.

    Returns
    -------
    tuple[Matrix, float]
        (4, 4), RAS mm of `later` -> RAS mm of `earlier`; and by how much (mm, root mean square
        over the brain) the two directions differ, a lower bound of the error.

    Raises
    ------
    ImageError
        If they cannot be aligned.
    """
    first, second = (
        _bare(scan, brain) for scan, brain in zip((earlier, later), brains, strict=True)
    )
    forward = registration.register(second, first)
    back = np.asarray(np.linalg.inv(registration.register(first, second)), np.float64)
    middle = forward @ halfway(np.linalg.inv(forward) @ back)
    points = image.transformed(later.grid.affine, np.argwhere(brains[1])[::97])
    apart = np.subtract(image.transformed(forward, points), image.transformed(back, points))
    return middle, float(np.sqrt((apart**2).sum(axis=1).mean()))


def _bare(scan: Volume, brain: NDArray[np.bool_]) -> Volume:
    """Return a scan without what is farther than a rim from the brain."""
    if not brain.any():
        raise ImageError('no brain was found in one of the two scans: look at its report')
    far = ndimage.distance_transform_edt(~brain, sampling=scan.grid.spacing_mm) > RIM_MM
    return Volume(np.where(far, np.float32(0), scan.data), scan.grid)


def midway_grid(
    earlier: Grid,
    later: Grid,
    later_to_earlier: Matrix,
    brains: tuple[NDArray[np.bool_], NDArray[np.bool_]],
) -> tuple[Grid, Matrix, Matrix]:
    """Return a grid half-way between two scans, to which both are as near.

    Its axes are the mean of both scans' axes, its voxel size the geometric mean of theirs, and
    it covers both brains.

    Parameters
    ----------
    earlier, later
        The grids of the scans.
    later_to_earlier
        (4, 4) rigid, RAS mm.
    brains
        (X, Y, Z) masks on them.

    Returns
    -------
    tuple[Grid, Matrix, Matrix]
        The grid, upright; RAS mm of it -> RAS mm of the earlier and of the later scan.
    """
    to_earlier = halfway(later_to_earlier)
    to_later = np.asarray(np.linalg.inv(to_earlier), np.float64)
    axes, spacings, corners = [], [], []
    for grid, brain, there in ((earlier, brains[0], to_earlier), (later, brains[1], to_later)):
        mask, upright = figures.upright(brain, grid)
        affine = np.linalg.inv(there) @ upright.affine
        spacings.append(upright.spacing_mm)
        axes.append(affine[:3, :3] / upright.spacing_mm)
        corners.append(image.transformed(affine, np.argwhere(mask)[::7]))
    left, _, right = np.linalg.svd(axes[0] + axes[1])
    direction, spacing = left @ right, np.sqrt(spacings[0] * spacings[1])
    along = np.concatenate(corners) @ direction
    low, high = along.min(axis=0) - 10, along.max(axis=0) + 10
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = direction @ low
    shape = np.ceil((high - low) / spacing).astype(int) + 1
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine), to_earlier, to_later


def slice_tilt(earlier: Grid, later: Grid, later_to_earlier: Matrix) -> float:
    """Return by how many degrees the slices of two scans are tilted; 0 where both are thin.

    Parameters
    ----------
    earlier, later
        Grids of the two scans.
    later_to_earlier
        (4, 4) rigid, RAS mm -> RAS mm.
    """
    if max(earlier.slice_mm, later.slice_mm) < image.THICK_MM:
        return 0.0
    before, after = (grid.affine[:3, grid.thick_axis] / grid.slice_mm for grid in (earlier, later))
    cosine = abs(float(before @ (later_to_earlier[:3, :3] @ after)))
    return float(np.degrees(np.arccos(min(1.0, cosine))))


# --- lesions ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What was found in one scan.

    Attributes
    ----------
    labels
        (X, Y, Z), values of :data:`.labels.LABELS`.
    grid
        Where the voxels lie.
    probability
        (X, Y, Z) of lesion, 0 to 1, or None where it was not kept.
    flair
        (X, Y, Z), of any brightness, or None where it was not kept.
    """

    labels: NDArray[np.integer]
    grid: Grid
    probability: NDArray[np.floating] | None = None
    flair: NDArray[np.floating] | None = None

    @property
    def brain(self) -> NDArray[np.bool_]:
        """(X, Y, Z), true within the brain."""
        return np.asarray(self.labels > 0)

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return abs(float(np.linalg.det(self.grid.affine[:3, :3])))

    def numbered(self) -> tuple[NDArray[np.integer], int]:
        """Return its lesions, numbered as in its table of lesions, and how many there are."""
        parts, count = ndimage.label(self.labels == LESION, np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        rank = np.zeros(count + 1, int)
        rank[np.argsort(-sizes, kind='stable') + 1] = np.arange(1, count + 1)
        return rank[parts], count


def compare_lesions(
    earlier: Segmentation,
    later: Segmentation,
    later_to_earlier: Matrix,
    *,
    judged: bool = True,
) -> list[dict[str, Any]]:
    """Say what became of every lesion.

    Two lesions, groups of voxels that touch at least at a corner, are the same if some of their
    voxels are within :data:`TOLERANCE_VOXELS` on either scan's grid. Lesions that merged or fell
    apart are one, so a new lesion beside an old one counts as its growth.

    Parameters
    ----------
    earlier, later
        The two segmentations.
    later_to_earlier
        (4, 4) rigid, RAS mm of the later scan -> RAS mm of the earlier.
    judged
        False if lesions cannot be trusted one by one: all that is not stable is then unclear.

    Returns
    -------
    list[dict]
        One row for each: :data:`LESION_COLUMNS` but `since`, the changed and the larger first.
    """
    tilted = slice_tilt(earlier.grid, later.grid, later_to_earlier) > TILT_DEGREES
    sides = (
        _Side(earlier, later, np.linalg.inv(later_to_earlier), tilted=tilted),
        _Side(later, earlier, later_to_earlier, tilted=tilted),
    )
    old, new = sides
    links = [
        pair
        for side, columns in ((old, (0, 1)), (new, (1, 0)))
        for pair in side.near(old if side is new else new)[:, columns].tolist()
    ]
    count = old.count + new.count
    if not count:
        return []
    ends = np.array(links, int).reshape(-1, 2) - 1 + [0, old.count]
    graph = sparse.coo_matrix((np.ones(len(ends)), ends.T), shape=(count, count))
    found, groups = sparse.csgraph.connected_components(graph, directed=False)
    rows = []
    for group in range(found):
        members = np.flatnonzero(groups == group) + 1
        before, after = members[members <= old.count], members[members > old.count] - old.count
        mm3 = [
            float(side.sizes[part].sum()) * side.own.voxel_mm3
            for side, part in ((old, before), (new, after))
        ]
        margin = math.hypot(
            *(
                BOUNDARY * float(side.surfaces[part].sum()) * side.own.voxel_mm3
                for side, part in ((old, before), (new, after))
            )
        )
        side, part = (new, after) if after.size else (old, before)
        centre = side.sums[part].sum(axis=0) / side.sizes[part].sum()
        if side is old:
            centre = image.transformed(side.to_other, centre)
        # The scan in which there is more of it has to be sure of it.
        sure = (new if mm3[1] > mm3[0] else old).sure(after if mm3[1] > mm3[0] else before, mm3)
        change = _judge(mm3, margin, sure)
        rows.append(
            {
                'change': change if judged or change == 'stable' else 'unclear',
                'before_mm3': round(mm3[0], 2),
                'after_mm3': round(mm3[1], 2),
                'change_mm3': round(mm3[1] - mm3[0], 2),
                'margin_mm3': round(margin, 2),
                **dict(zip(('x_mm', 'y_mm', 'z_mm'), centre.round(2).tolist(), strict=True)),
                'before_lesions': ' '.join(map(str, before)) or 'n/a',
                'after_lesions': ' '.join(map(str, after)) or 'n/a',
            }
        )
    order = list(figures.CHANGES)
    rows.sort(
        key=lambda row: (order.index(row['change']), -max(row['before_mm3'], row['after_mm3']))
    )
    return [{'lesion': number} | row for number, row in enumerate(rows, start=1)]


class _Side:
    """The lesions of one scan, measured, and what the other scan shows at their places.

    Arrays are indexed by the number of the lesion, from 1.
    """

    def __init__(
        self, own: Segmentation, other: Segmentation, to_other: NDArray[Any], *, tilted: bool
    ) -> None:
        parts, self.count = own.numbered()
        self.own, self.other, self.to_other, self.tilted = own, other, to_other, tilted
        self.voxels = np.argwhere(parts)
        self.number = parts[tuple(self.voxels.T)]
        self.sizes = np.bincount(self.number, minlength=self.count + 1)
        inner = ndimage.binary_erosion(parts > 0, ndimage.generate_binary_structure(3, 1))
        self.surfaces = np.bincount(parts[(parts > 0) & ~inner], minlength=self.count + 1)
        points = image.transformed(own.grid.affine, self.voxels)
        self.sums = np.stack([self._sum(column) for column in points.T], axis=-1)
        to_voxels = np.linalg.inv(other.grid.affine)
        self.to_places = to_voxels @ to_other @ own.grid.affine
        self.places = image.transformed(self.to_places, self.voxels)
        self.shifts = _slice_shifts(own, other, to_other) @ to_voxels[:3, :3].T
        # Outside of the other scan there is no brain either.
        seen = _values(other.brain, self.places, order=0)
        self.seen = self._sum(seen) / np.maximum(self.sizes, 1)
        self.rise = None
        if own.probability is not None and other.probability is not None:
            there = self._highest(other.probability, self.places)
            self.rise = self._sum(own.probability[tuple(self.voxels.T)] - there)

    def _sum(self, values: NDArray[Any]) -> NDArray[Any]:
        return np.bincount(self.number, values, minlength=self.count + 1)

    def _highest(self, field: NDArray[Any], places: NDArray[Any]) -> NDArray[Any]:
        """Return the highest values of the other scan where its slices may have cut the same."""
        values = [_values(field, places + shift) for shift in self.shifts]
        return np.asarray(np.max(values, axis=0))

    def sure(self, part: NDArray[np.integer], mm3: Sequence[float]) -> bool:
        """Tell whether there is evidence that there is more of these lesions in this scan."""
        voxels = self.sizes[part].sum()
        if self.seen[part] @ self.sizes[part] <= voxels / 2:
            return False  # the other scan has no brain there
        if min(mm3) == 0 and (voxels < SMALLEST_VOXELS or max(mm3) < SMALLEST_MM3):
            return False
        if self.tilted:
            slices = self.voxels[np.isin(self.number, part), self.own.grid.thick_axis]
            if len(np.unique(slices)) < TILTED_SLICES:
                return False
        gained = abs(mm3[1] - mm3[0]) / self.own.voxel_mm3
        if self.rise is not None and self.rise[part].sum() < EVIDENCE * gained:
            return False
        return self._brighter(part, gained)

    def _brighter(self, part: NDArray[np.integer], gained: float) -> bool:
        """Tell whether the FLAIRs show it, too, if they can.

        What was as bright against the white matter around it before is no other now, whatever
        the coil and the contrast made of its probability.
        """
        own, other = self.own.flair, self.other.flair
        if own is None or other is None:
            return True
        chosen = np.isin(self.number, part)
        voxels, places = self.voxels[chosen], self.places[chosen]
        around = self._white_around(voxels)
        there = image.transformed(self.to_places, around)
        white = _values(self.other.labels == WHITE, there, order=0) > 0
        if white.sum() < AROUND_VOXELS:
            return True
        levels = [np.median(own[tuple(around[white].T)]), np.median(_values(other, there[white]))]
        if min(levels) <= 0:
            return True
        now = own[tuple(voxels.T)] / levels[0] - 1
        before = self._highest(other, places) / levels[1] - 1
        contrast = float(now.mean())
        return contrast > 0 and float((now - before).sum()) >= EVIDENCE * contrast * gained

    def _white_around(self, voxels: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the voxels of white matter around some of a lesion, `(n, 3)`."""
        spacing = self.own.grid.spacing_mm
        reach = np.ceil(AROUND_MM[1] / spacing).astype(int)
        low = np.maximum(voxels.min(0) - reach, 0)
        high = voxels.max(0) + reach + 1
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        labels = self.own.labels[box]
        outside = np.ones(labels.shape, bool)
        outside[tuple((voxels - low).T)] = False
        distance = ndimage.distance_transform_edt(outside, sampling=spacing)
        near = (distance > AROUND_MM[0]) & (distance <= AROUND_MM[1])
        return np.argwhere((labels == WHITE) & near) + low

    def near(self, other: _Side) -> NDArray[np.integer]:
        """Return pairs (own, other) of lesions that are the same, on the grid of the other."""
        if not (self.count and other.count):
            return np.zeros((0, 2), int)
        spacing = other.own.grid.spacing_mm
        units = spacing / np.maximum(spacing, FINEST_MM)
        distance, nearest = cKDTree(other.voxels * units).query(
            self.places * units, distance_upper_bound=TOLERANCE_VOXELS * (1 + 1e-6)
        )
        close = np.isfinite(distance)
        pairs = np.stack([self.number[close], other.number[nearest[close]]], axis=-1)
        return np.unique(pairs, axis=0)


def _values(field: NDArray[Any], places: NDArray[Any], order: int = 1) -> NDArray[np.float32]:
    """Return what a volume shows at voxels `(n, 3)`, interpolated; 0 outside."""
    array = np.asarray(field, np.float32)
    return np.asarray(ndimage.map_coordinates(array, places.T, order=order))


def _slice_shifts(
    own: Segmentation, other: Segmentation, to_other: NDArray[Any]
) -> NDArray[np.floating]:
    """Return how far the slices may have cut a lesion elsewhere, RAS mm of the other scan (n, 3).

    Not at all, and for thick slices of either scan by half a slice, up and down.
    """
    slices = [
        0.5 * axis
        for matrix in (to_other[:3, :3] @ own.grid.affine[:3, :3], other.grid.affine[:3, :3])
        for axis in matrix.T
        if np.linalg.norm(axis) >= image.THICK_MM
    ]
    return np.array([np.zeros(3), *slices, *(-axis for axis in slices)])


def _judge(mm3: Sequence[float], margin: float, sure: bool) -> str:
    """Return the class of a lesion of these volumes before and after."""
    before, after = mm3
    if not (before and after):
        return ('new' if after else 'resolved') if sure else 'unclear'
    if not sure or abs(after - before) <= max(margin, SMALLEST_MM3, RELATIVE * min(mm3)):
        return 'stable'
    return 'enlarged' if after > before else 'shrunk'


# --- a person -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """The finished results of one scan.

    Attributes
    ----------
    session
        Without ``ses-``.
    summary
        ``<stem>_seg-jointseg_morph.json``, whose content is `record`.
    reference
        The raw scan on whose grid the results are.
    sources
        BIDS URIs of the raw scans that were segmented.
    """

    session: str
    summary: Path
    record: Mapping[str, Any]
    reference: Path
    sources: tuple[str, ...]

    @property
    def stem(self) -> str:
        """Start of the names of its results."""
        return self.summary.name.removesuffix('_seg-jointseg_morph.json')

    @property
    def suffix(self) -> str:
        """Kind of the reference."""
        return _suffix(self.reference.name)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Suffixes of the scans that were segmented."""
        return tuple(sorted(_suffix(uri) for uri in self.sources))

    def file(self, suffix: str) -> Path:
        """Return where one of its results is."""
        return self.summary.with_name(f'{self.stem}_{suffix}')

    @property
    def scan(self) -> Path:
        """The reference as it was segmented, or the raw one where that was not kept."""
        modality = 'FLAIR' if self.suffix == 'FLAIR' else 'T1w'
        kept = self.file(f'desc-preproc_{modality}.nii.gz')
        return kept if kept.is_file() else self.reference

    @property
    def shown(self) -> Path:
        """What lesions are shown on: the FLAIR, where it was kept on the reference's grid."""
        flair = self.file('space-T1w_desc-preproc_FLAIR.nii.gz')
        return flair if flair.is_file() else self.scan

    @property
    def probability(self) -> Path | None:
        """Probability of lesion, if it was kept."""
        path = self.file('seg-jointseg_label-L_probseg.nii.gz')
        return path if path.is_file() else None

    def volumes(self) -> dict[str, Interval]:
        """Return the brain's and every class' volume with its interval, mm^3."""
        found = {
            'brain': _interval(self.record, 'brain_volume_mm3', 'brain_low_mm3', 'brain_high_mm3')
        }
        path = self.file('seg-jointseg_morph.tsv')
        with path.open(encoding='utf-8', newline='') as stream:
            for row in csv.DictReader(stream, delimiter='\t'):
                found[row['name']] = _interval(row, 'volume_mm3', 'low_mm3', 'high_mm3')
        return found

    def segmentation(self) -> Segmentation:
        """Read what was found."""
        labels = image.load_labels(self.file('seg-jointseg_dseg.nii.gz'))
        probability = None
        if self.probability is not None:
            stored: Any = nib.load(self.probability)
            probability = np.asarray(stored.dataobj, np.float32)
        flair = image.load_scan(self.shown).data if _suffix(self.shown.name) == 'FLAIR' else None
        return Segmentation(labels.data.astype(np.uint8), labels.grid, probability, flair)


def _interval(row: Mapping[str, Any], *keys: str) -> Interval:
    def number(key: str) -> float:
        try:
            return float(row.get(key, 'n/a'))
        except (TypeError, ValueError):
            return math.nan

    value, low, high = map(number, keys)
    return value, low, high


def _suffix(name: str) -> str:
    return name.split('/')[-1].split('.')[0].rsplit('_', 1)[-1]


def find_visits(out_dir: Path, bids_dir: Path, subject: str) -> list[list[Visit]]:
    """Return the scans of a person that can be compared, each list in the order of sessions.

    Scans are of one list if their names differ by session and run only, if the same modalities
    were segmented, and by the same model. Of several runs in a session the first is taken.

    Parameters
    ----------
    out_dir, bids_dir
        The results, and the dataset that was segmented.
    subject
        Without ``sub-``.
    """
    lists: dict[tuple[Any, ...], dict[str, Visit]] = {}
    for summary in sorted(out_dir.glob(f'sub-{subject}/ses-*/anat/*_seg-jointseg_morph.json')):
        stem = summary.name.removesuffix('_seg-jointseg_morph.json')
        sidecar = summary.with_name(f'{stem}_seg-jointseg_dseg.json')
        try:
            record = json.loads(summary.read_text(encoding='utf-8'))
            space = json.loads(sidecar.read_text(encoding='utf-8'))['SpatialReference']
            settings = dict(record['configuration'])
            sources = tuple(record['Sources'])
            reference = bids.raw_path(space, bids_dir)
            _ = [bids.raw_path(uri, bids_dir) for uri in sources]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            LOGGER.warning('%s: not compared, it cannot be read (%r)', summary, error)
            continue
        named = bids.entities(summary)
        visit = Visit(named['ses'], summary, record, reference, sources)
        if not visit.file('seg-jointseg_dseg.nii.gz').is_file():
            continue
        for name in ('level', 'repeatability', 'random_seed'):
            settings.pop(name, None)  # these do not decide what is lesion
        own = {k: v for k, v in named.items() if k not in (*bids.OURS, 'sub', 'ses', 'run')}
        key = (visit.suffix, visit.modalities, *own.items(), json.dumps(settings, sort_keys=True))
        lists.setdefault(key, {}).setdefault(visit.session, visit)
    return [list(visits.values()) for visits in lists.values()]


def compare_sessions(out_dir: Path, bids_dir: Path, subject: str) -> list[Path]:
    """Compare the sessions of one person, each with the one before, and the last with the first.

    What is there and up to date stays as it is; what no longer has anything to be compared with
    is removed.

    Parameters
    ----------
    out_dir
        The derivative dataset, with finished results.
    bids_dir
        The dataset that was segmented.
    subject
        Without ``sub-``.

    Returns
    -------
    list[Path]
        Tables and figures of all comparisons, written now or before.

    Raises
    ------
    ImageError
        If a comparison failed; the others are complete.
    """
    written: list[Path] = []
    problems = []
    for visits in find_visits(out_dir, bids_dir, subject):
        for number, later in enumerate(visits[1:], start=1):
            earlier = [visits[number - 1]]
            if number == len(visits) - 1 > 1:
                earlier.append(visits[0])
            try:
                written += _compare(out_dir, bids_dir, earlier, later)
            except (ImageError, OSError, ValueError, KeyError) as error:
                problems.append(f'{later.stem}: {" ".join(str(error).split())}')
                LOGGER.debug('', exc_info=True)
    kept = {path.name for path in written}
    for pattern in ('ses-*/anat/*_desc-l*_morph.*', 'figures/*_desc-longitudinal*.png'):
        for path in out_dir.glob(f'sub-{subject}/{pattern}'):
            ours = path.suffix == '.png' or path.name.endswith(OUTPUTS)
            if ours and path.name not in kept:
                path.unlink()
    if problems:
        raise ImageError('; '.join(problems))
    return written


def _compare(out_dir: Path, bids_dir: Path, earlier: Sequence[Visit], later: Visit) -> list[Path]:
    """Compare one scan with earlier ones, unless that is done; return its tables and figures."""
    inputs: dict[str, str] = {}
    for visit in (later, *earlier):
        inputs |= _hashes(visit, out_dir, bids_dir)
    drawn = [
        out_dir
        / later.summary.relative_to(out_dir).parts[0]
        / 'figures'
        / f'{later.stem}_desc-{desc}_{_suffix(later.shown.name)}.png'
        for desc, _ in zip(('longitudinal', 'longitudinalfirst'), earlier, strict=False)
    ]
    paths = [later.file(suffix) for suffix in OUTPUTS]
    made_by = {'version': __version__, 'rules': RULES, 'inputs': inputs}
    if all(path.is_file() for path in (*paths, *drawn)):
        try:
            known = json.loads(paths[-1].read_text(encoding='utf-8'))
        except ValueError:
            known = {}
        if isinstance(known, dict) and {key: known.get(key) for key in made_by} == made_by:
            return [*paths, *drawn]
    paths[-1].unlink(missing_ok=True)  # what is there now is about to be replaced

    volumes: list[dict[str, Any]] = []
    lesions: list[dict[str, Any]] = []
    comparisons = []
    after, scan = later.segmentation(), image.load_scan(later.scan)
    for visit, figure in zip(earlier, drawn, strict=True):
        before, other = visit.segmentation(), image.load_scan(visit.scan)
        matrix, apart = align(other, scan, (before.brain, after.brain))
        unlike = _unlike(visit, later, bids_dir)
        judged = 'FLAIR' in later.modalities
        since = {'since': f'ses-{visit.session}'}
        rows = compare_lesions(before, after, matrix, judged=judged)
        volumes += [
            since | row
            for row in compare_volumes(visit.volumes(), later.volumes(), alike=not unlike)
        ]
        lesions += [since | row for row in rows]
        notes = [f'{words}: volumes may differ for that alone' for words in unlike]
        if apart > DISAGREEMENT_MM:
            notes.append(f'the two directions of registration differ by {apart:.1f} mm: look')
        tilt = slice_tilt(other.grid, scan.grid, matrix)
        if tilt > TILT_DEGREES:
            notes.append(
                f'thick slices, tilted by {tilt:.0f} degrees against those before: what became of '
                'lesions of one or two slices is not to be told'
            )
        if not judged:
            notes.append('no FLAIR: a lesion on the T1w alone is no evidence of change')
        notes += [
            f'ses-{one.session} has warnings of its own'
            for one in (visit, later)
            if one.record.get('flags')
        ]
        comparisons.append(
            {
                'since': since['since'],
                'earlier': _uri(visit.file('seg-jointseg_dseg.nii.gz'), out_dir),
                'later': _uri(later.file('seg-jointseg_dseg.nii.gz'), out_dir),
                'figure': figure.name,
                'lesions': {
                    name: sum(row['change'] == name for row in rows) for name in figures.CHANGES
                },
                'evidence': ', '.join(
                    name
                    for name, *arrays in (
                        ('labels', before.labels, after.labels),
                        ('probabilities', before.probability, after.probability),
                        ('FLAIR', before.flair, after.flair),
                    )
                    if all(array is not None for array in arrays)
                ),
                'later_to_earlier': matrix.round(6).tolist(),
                'registration_disagreement_mm': round(apart, 3),
                'notes': notes,
            }
        )
        _draw(figure, (visit, later), (before, after), matrix, rows)

    sources = [_uri(path, out_dir, bids_dir) for path in _files((later, *earlier))]
    for name, columns, table in (
        ('lesionchange', LESION_COLUMNS, lesions),
        ('longitudinal', VOLUME_COLUMNS, volumes),
    ):
        for extension in ('tsv', 'csv'):
            path = later.file(f'desc-{name}_morph.{extension}')
            bids.write_table(path, tuple(columns), table)
        record: dict[str, Any] = {'Sources': sources, 'columns': columns, 'rules': RULES}
        if name == 'longitudinal':
            record |= {'comparisons': comparisons, **made_by}
        bids.write_json(later.file(f'desc-{name}_morph.json'), record)
    return [*paths, *drawn]


def _files(visits: Sequence[Visit]) -> list[Path]:
    """Return what a comparison reads."""
    return list(
        dict.fromkeys(
            path
            for visit in visits
            for path in (
                visit.file('seg-jointseg_morph.tsv'),
                visit.file('seg-jointseg_dseg.nii.gz'),
                visit.probability,
                visit.scan,
                visit.shown,
            )
            if path is not None
        )
    )


def _hashes(visit: Visit, out_dir: Path, bids_dir: Path) -> dict[str, str]:
    return {
        _uri(path, out_dir, bids_dir): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (*_files([visit]), visit.summary)
    }


def _uri(path: Path, out_dir: Path, bids_dir: Path | None = None) -> str:
    if bids_dir is not None and path.is_relative_to(bids_dir) and not path.is_relative_to(out_dir):
        return bids.raw_uri(path, bids_dir)
    return f'bids::{path.relative_to(out_dir).as_posix()}'


def _unlike(earlier: Visit, later: Visit, bids_dir: Path) -> list[str]:
    """Return what makes two scans different in kind, so that volumes may differ without change."""
    found = []
    for one, other in zip(
        sorted(earlier.sources, key=_suffix), sorted(later.sources, key=_suffix), strict=True
    ):
        paths = [bids.raw_path(uri, bids_dir) for uri in (one, other)]
        name = _suffix(other)
        if all(path.is_file() for path in paths):
            sizes = [np.sort(image.load_grid(path).spacing_mm) for path in paths]
            if np.abs(np.log(sizes[0] / sizes[1])).max() > math.log1p(ALIKE):
                words = ' and '.join(' x '.join(f'{mm:.2f}' for mm in size) for size in sizes)
                found.append(f'the {name} scans differ in voxel size ({words} mm)')
        said = [_sidecar(path) for path in paths]
        for field in PROTOCOL:
            values = [record.get(field) for record in said]
            if None not in values and values[0] != values[1]:
                found.append(f'the {name} scans differ in {field} ({values[0]} and {values[1]})')
    return found


def _sidecar(path: Path) -> dict[str, Any]:
    try:
        text = path.with_name(path.name.split('.')[0] + '.json').read_text(encoding='utf-8')
        record = json.loads(text)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _draw(
    path: Path,
    visits: tuple[Visit, Visit],
    found: tuple[Segmentation, Segmentation],
    later_to_earlier: Matrix,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Draw both scans and what became of the lesions, half-way between the scans."""
    before, after = found
    grid, *ways = midway_grid(
        before.grid, after.grid, later_to_earlier, (before.brain, after.brain)
    )
    scans, marked = [], {name: np.zeros(grid.shape, np.float32) for name in figures.CHANGES}
    brain = np.zeros(grid.shape, bool)
    for number, (visit, own, way) in enumerate(zip(visits, found, ways, strict=True)):
        scan = image.load_scan(visit.shown)
        scans.append(Volume(image.resample(scan, grid, way, threads=1), grid))
        whole = Volume(own.brain.astype(np.float32), own.grid)
        brain |= image.resample(whole, grid, way, threads=1) > 0.5
        parts, count = own.numbered()
        of_class = np.full(count + 1, '', dtype='<U8')
        for row in rows:
            ranks = row[('before_lesions', 'after_lesions')[number]]
            # A lesion is drawn as it is now; what is no longer, as it was.
            if ranks != 'n/a' and (number or row['change'] == 'shrunk' or not row['after_mm3']):
                of_class[[int(rank) for rank in ranks.split()]] = row['change']
        for name, array in marked.items():
            chosen = of_class == name
            if chosen.any():
                indicator = Volume(chosen[parts].astype(np.float32), own.grid)
                np.maximum(array, image.resample(indicator, grid, way, threads=1), out=array)
    to_grid = np.linalg.inv(ways[1])
    changed = [row for row in rows if row['change'] not in ('stable', 'unclear')]
    places = [
        (
            image.transformed(to_grid, np.array([row['x_mm'], row['y_mm'], row['z_mm']])),
            f'{row["change"]}: {row["before_mm3"]:.0f} to {row["after_mm3"]:.0f}',
        )
        for row in sorted(changed, key=lambda row: -abs(row['change_mm3']))
    ]
    counts = Counter(row['change'] for row in rows)
    figures.draw_changes(
        path,
        [(f'ses-{visit.session}', scan) for visit, scan in zip(visits, scans, strict=True)],
        brain,
        marked,
        {name: counts[name] for name in figures.CHANGES},
        places,
    )
