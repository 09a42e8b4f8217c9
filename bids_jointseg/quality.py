"""Quality control: what is measured of a scan and its segmentation, and what it is called.

Every rule has limits with a reason. A verdict is `pass`, `check` (look before you use it) or
`fail` (do not use it unseen); it is reported, and nothing is ever deleted for it.

Signal and noise are measured where our own labels say what tissue is, after MRIQC (Esteban et
al., PLoS ONE 2017); registration and handedness by whether mutual information rises when the
FLAIR is moved or mirrored.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage
from scipy.optimize import minimize

from bids_jointseg import coil, image
from bids_jointseg.image import Grid, Volume
from bids_jointseg.labels import LABELS, TISSUES
from bids_jointseg.lesions import TOUCH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from bids_jointseg.image import Matrix

INDEX = {label.abbreviation: label.index for label in LABELS}
VERDICTS = ('pass', 'check', 'fail')
LEAST_TISSUE = 100
"""Voxels of a tissue that its intensity is told from."""
BRIGHTNESS = {
    'WM': 1.0, 'L': 1.0, 'BS': 0.9, 'SGM': 0.8, 'CGM': 0.6, 'CBM': 0.5, 'VEN': 0.25,
}  # fmt: skip
"""Of each label where a brain is compared with its mirror image: about that of a T1w."""
CUT_INSIDE_MM2 = 6500.0
"""Of what the skull holds, 6 mm from the border of a scan, from which its volume is not told: of a
ball of 75 mm, the cap that is cut off would be 1 %."""
COIL_PERCENT = 15.0
"""Of the coil's unevenness, from which tissue is lost although the scan is evened out."""
COARSE_MM = 2.5
"""Voxels of the scans whose information is compared."""


@dataclass(frozen=True)
class Rule:
    """What a measure must not exceed, or fall below.

    Attributes
    ----------
    measure
        Its name in :func:`measure`'s result.
    words
        What is wrong beyond a limit, with the value as ``{}`` in Python's format.
    check, fail
        Limits of the two verdicts; None leaves a verdict out.
    above
        Values above a limit are wrong; else those below.
    reason
        Where the limits come from.
    """

    measure: str
    words: str
    check: float | None
    fail: float | None
    above: bool
    reason: str

    def verdict(self, value: float) -> str:
        """Return what a value is called; what could not be measured (NaN) passes."""
        for verdict, limit in (('fail', self.fail), ('check', self.check)):
            if limit is not None and (value > limit if self.above else value < limit):
                return verdict
        return 'pass'


_SCANS = 'limits lie between real scans and the same scans damaged on purpose (docs/quality.md)'
RULES = (
    Rule('brain_ml', 'brain volume {:.0f} mL is very small', 850, 700, False, 'adults'),
    Rule('brain_ml', 'brain volume {:.0f} mL is very large', 1900, 2000, True, 'adults'),
    Rule(
        'cut_mm2',
        'the brain reaches the edge of the scan ({:.0f} mm²): volumes may be too small',
        1000,
        6000,
        True,
        'more than a brainstem; half of the largest section of a brain',
    ),
    Rule(
        'gray_to_white_T1w',
        'the T1w does not look like one: gray matter is {:.2f} times as bright as white matter',
        0.95,
        1.0,
        True,
        'on a T1w white matter is the brighter one, but for infants',
    ),
    Rule(
        'gray_to_white_FLAIR',
        'the FLAIR does not look like one: gray matter is {:.2f} times as bright as white matter',
        0.9,
        0.87,
        False,
        'on a FLAIR gray matter is the brighter one, or nearly so',
    ),
    Rule(
        'fluid_to_white_FLAIR',
        'the FLAIR does not look like one: ventricles are {:.2f} times as bright as white matter',
        0.6,
        0.9,
        True,
        'a FLAIR nulls fluid',
    ),
    Rule(
        'contrast_to_noise_T1w',
        'the T1w is noisy: contrast to noise {:.1f}',
        5,
        2,
        False,
        _SCANS,
    ),
    Rule(
        'contrast_to_noise_FLAIR',
        'the FLAIR is noisy: contrast to noise {:.1f}',
        12,
        4,
        False,
        _SCANS,
    ),
    *(
        rule
        for name in ('T1w', 'FLAIR')
        for rule in (
            Rule(
                f'air_percent_{name}',
                f'the air around the {name} holds {{:.1f}} % of the signal: noise or motion',
                7,
                None,
                True,
                'noise of 6 % of white matter: the contrast to noise of a T1w then is about 5',
            ),
            Rule(
                f'ghost_percent_{name}',
                f'ghosts of {{:.1f}} % of the signal on two sides of the {name}: motion',
                1,
                None,
                True,
                _SCANS,
            ),
            Rule(
                f'coil_percent_{name}',
                f'the coil brightens the {name} very unevenly ({{:.0f}} %): correct it first',
                COIL_PERCENT,
                None,
                True,
                'from about there a point of tissue is lost although the scan is evened out',
            ),
        )
    ),
    Rule(
        'misalignment_mm',
        'the FLAIR fits the T1w better where it is moved by {:.0f} mm: look at the registration',
        3,
        12,
        True,
        'the smallest move that is tried is 4 mm',
    ),
    Rule(
        'mirrored_ratio',
        'the mirror image of the FLAIR tells {:.2f} times as much about the T1w: one of the two '
        'may be mirrored',
        0.9,
        1.0,
        True,
        _SCANS,
    ),
    Rule(
        'asymmetry_percent',
        'left and right differ by {:.0f} % of a tissue',
        6,
        15,
        True,
        '1.6 times the largest of 19 people whose tissue was drawn by hand (3.7 %)',
    ),
    Rule(
        'stray_lesions_mm3',
        '{:.0f} mm3 of lesion lie apart from any white matter',
        50,
        None,
        True,
        'lesions of the white matter touch it',
    ),
    Rule(
        'thickness_mm_T1w',
        'voxels of {:.1f} mm in the T1w are larger than those that the model was trained on',
        6.5,
        12,
        True,
        'training had slices of up to 6 mm',
    ),
    Rule(
        'thickness_mm_FLAIR',
        'voxels of {:.1f} mm in the FLAIR are larger than those that the model was trained on',
        6.5,
        12,
        True,
        'training had slices of up to 6 mm',
    ),
)
"""All rules; see there for the reasons of the limits."""


def measure(
    volumes: Mapping[str, Volume],
    labels: NDArray[np.uint8],
    *,
    between: Mapping[tuple[str, str], Matrix],
    doubt_mm3: Mapping[str, float],
    agreement: float | None = None,
) -> dict[str, float]:
    """Measure one scan.

    Parameters
    ----------
    volumes
        Modality -> scan; the reference comes first.
    labels
        (X, Y, Z) on the grid of the reference.
    between
        (from, to) -> (4, 4), RAS mm of one scan -> RAS mm of the other.
    doubt_mm3
        From :func:`.image.doubt_mm3`.
    agreement
        Mean Dice of the tissues between the members of the ensemble, 0 to 1.

    Returns
    -------
    dict[str, float]
        Name of a rule -> value; what cannot be measured is absent.
    """
    reference, scan = next(iter(volumes.items()))
    grid, spacing = scan.grid, scan.grid.spacing_mm
    brain = labels > 0
    brain_mm3 = float(brain.sum() * spacing.prod())
    found = {'brain_ml': brain_mm3 / 1000, 'cut_mm2': cut_mm2(brain, grid)}
    if not brain.any():
        return found
    tissue_mm3 = sum(doubt_mm3.get(name, 0.0) for name in (*TISSUES, 'L'))
    found['doubt_percent'] = 50 * tissue_mm3 / brain_mm3
    if agreement is not None:
        found['agreement'] = agreement
    found['stray_lesions_mm3'] = _stray_mm3(labels, grid)
    for name, volume in volumes.items():
        on_it = labels if name == reference else _labels_on(labels, grid, volume.grid, between)
        found |= {f'{key}_{name}': value for key, value in _signal(name, volume, on_it).items()}
        found[f'thickness_mm_{name}'] = float(volume.grid.spacing_mm.max())
    mirror = mirror_plane(labels, grid)
    found['asymmetry_percent'] = _asymmetry(labels, grid, mirror)
    if len(volumes) == 2:
        other = volumes['FLAIR']
        found |= _alignment(scan, other, brain, between['T1w', 'FLAIR'], mirror)
    return found


def intracranial_ml(inside: Volume, labels: NDArray[np.uint8], scan: Volume) -> float | None:
    """Return the volume within the skull, down to the lowest part of the cerebellum, ml.

    Parameters
    ----------
    inside
        Share of each cube that the skull holds, from :func:`.locator.find_inside`.
    labels
        (X, Y, Z) on the grid of the scan, values of :data:`.labels.LABELS`.
    scan
        That was segmented.

    Returns
    -------
    float | None
        None of a scan without its skull, or which ends within it (:data:`CUT_INSIDE_MM2`), or
        parts of which are too dark (:data:`COIL_PERCENT`).
    """
    cerebellum = np.argwhere(labels == INDEX['CBM'])
    if len(cerebellum) < LEAST_TISSUE or skull_stripped(scan, labels > 0):
        return None
    if _coil_percent(*_around_brain(scan, labels)) > COIL_PERCENT:
        return None
    cubes, grid = inside.grid, scan.grid
    heights = image.transformed(np.linalg.inv(cubes.affine) @ grid.affine, cerebellum)[:, 2]
    # Of a thousand voxels one may be stray.
    above = np.arange(cubes.shape[2]) + 0.5 - np.percentile(heights, 0.1)
    everywhere = np.argwhere(np.ones(cubes.shape, bool))
    voxels = image.transformed(np.linalg.inv(grid.affine) @ cubes.affine, everywhere)
    seen = ((voxels >= -0.5) & (voxels <= np.array(grid.shape) - 0.5)).all(axis=1)
    seen = seen.reshape(cubes.shape)
    share = np.where(seen, inside.data * above.clip(0, 1), 0)
    # On the border itself the network is unsure.
    near = ndimage.binary_erosion(seen) & ~ndimage.binary_erosion(seen, iterations=2)
    if (share[near] > 0.5).sum() * cubes.spacing_mm[0] ** 2 > CUT_INSIDE_MM2:
        return None
    return float(share.sum() * cubes.spacing_mm.prod() / 1000)


def skull_stripped(volume: Volume, brain: NDArray[np.bool_]) -> bool:
    """Tell whether a scan shows a brain without its head.

    Scalp, face and neck are more than half as large as the brain; what a brain extraction
    leaves beside the tissue is fluid and a rim, far less.

    Parameters
    ----------
    volume
        The scan.
    brain
        (X, Y, Z), true within the brain.
    """
    outside = (volume.data > image.foreground(volume.data)) & ~brain
    return bool(outside.sum() < 0.25 * brain.sum())


def judge(measures: Mapping[str, float]) -> tuple[str, list[str]]:
    """Return the verdict on a scan and the reasons for it, the gravest first."""
    reasons = []
    for rule in RULES:
        value = measures.get(rule.measure, math.nan)
        verdict = rule.verdict(value)
        if verdict != 'pass':
            reasons.append((verdict, f'{verdict}: {rule.words.format(value)}'))
    reasons.sort(key=lambda reason: -VERDICTS.index(reason[0]))
    return (reasons[0][0] if reasons else 'pass'), [words for _, words in reasons]


def mirror_plane(labels: NDArray[np.integer], grid: Grid) -> Matrix:
    """Return the reflection in the plane in which a brain is most like its mirror image.

    Its labels are compared, not the scan, whose coil and noise differ between the sides.

    Parameters
    ----------
    labels
        (X, Y, Z), values of :data:`.labels.LABELS`.
    grid
        Where its voxels lie.

    Returns
    -------
    Matrix
        (4, 4), RAS mm -> RAS mm.
    """
    brightness = np.zeros(256, np.float32)
    for name, value in BRIGHTNESS.items():
        brightness[INDEX[name]] = value
    coarse = image.coarsened(Volume(brightness[labels], grid), 4.0)
    points, values = _within(labels > 0, grid, coarse)
    sampled = _sampler(coarse)
    middle = points.mean(axis=0)

    def unlike(parameters: Sequence[float], step: int = 1) -> float:
        there = sampled(_reflection(middle, parameters), points[::step])
        with np.errstate(invalid='ignore'):  # no correlation where all is one class
            alike = np.corrcoef(values[::step], there)[0, 1]
        return 1 - float(np.nan_to_num(alike))

    # A head that is turned has other minima: the search begins in the lowest of many.
    turns = (0, -6, 6, -12, 12)
    start = min(itertools.product((0, -5, 5), turns, turns), key=partial(unlike, step=7))
    options = {'xtol': 0.05, 'ftol': 1e-4, 'maxfev': 150}
    best = minimize(unlike, start, method='Powell', options=options, bounds=[(-15, 15)] * 3)
    return _reflection(middle, best.x)


def _reflection(middle: Matrix, parameters: Sequence[float]) -> Matrix:
    """Return the reflection in a nearly sagittal plane, shifted (mm) and turned twice (deg)."""
    shift, yaw, roll = parameters
    yaw, roll = np.deg2rad((yaw, roll))
    normal = np.array([math.cos(yaw) * math.cos(roll), math.sin(yaw), math.sin(roll)])
    normal /= np.linalg.norm(normal)
    matrix = np.eye(4)
    matrix[:3, :3] -= 2 * np.outer(normal, normal)
    matrix[:3, 3] = 2 * (normal @ middle + shift) * normal
    return matrix


def _scaled(scan: Volume) -> Volume:
    """Return a scan on a coarse grid, from 0 to 1, without its brightest spots."""
    coarse = image.coarsened(scan, COARSE_MM)
    top = float(np.percentile(coarse.data, 99.5))
    return Volume(np.clip(coarse.data, 0, top) / max(top, 1e-6), coarse.grid)


def _within(
    mask: NDArray[np.bool_], grid: Grid, coarse: Volume
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return points (n, 3), RAS mm, of a mask on a coarse grid, and the values there."""
    there = image.resample(Volume(mask.astype(np.float32), grid), coarse.grid, threads=1)
    voxels = np.argwhere(there > 0.5)
    return image.transformed(coarse.grid.affine, voxels), coarse.data[tuple(voxels.T)]


def _sampler(scan: Volume) -> Callable[[Matrix, NDArray[Any]], NDArray[Any]]:
    """Return what gives a scan's values at points that a matrix has moved."""
    inverse = np.linalg.inv(scan.grid.affine)

    def values(matrix: Matrix, points: NDArray[Any]) -> NDArray[Any]:
        voxels = image.transformed(inverse @ matrix, points)
        return np.asarray(ndimage.map_coordinates(scan.data, voxels.T, order=1))

    return values


def _information(a: NDArray[Any], b: NDArray[Any], bins: int = 32) -> float:
    """Return the mutual information, in nats, of two samples from 0 to 1."""
    rows, columns = (np.minimum((x * bins).astype(np.intp), bins - 1) for x in (a, b))
    joint = np.bincount(rows * bins + columns, minlength=bins**2).reshape(bins, bins)
    joint = joint / max(joint.sum(), 1)
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / apart[there])).sum())


def _alignment(
    t1w: Volume, flair: Volume, brain: NDArray[np.bool_], matrix: Matrix, mirror: Matrix
) -> dict[str, float]:
    """Return how far a better place of the FLAIR is, and how well its mirror image fits.

    The FLAIR is moved along and turned about each axis; where it tells more about the T1w than
    where it is, it is misplaced by at least so much.
    """
    wide = ndimage.binary_dilation(brain, iterations=max(1, round(6 / t1w.grid.spacing_mm.min())))
    points, values = _within(wide, t1w.grid, _scaled(t1w))
    sampled = _sampler(_scaled(flair))
    middle = points.mean(axis=0)

    def information(change: Matrix) -> float:
        return _information(values, sampled(matrix @ change, points))

    here = information(np.eye(4))
    best, farthest = here, 0.0
    for axis, size in itertools.product(range(3), (4.0, 8.0, 14.0, 22.0)):
        for sign in (-1, 1):
            shift = np.eye(4)
            shift[axis, 3] = sign * size
            turn = _turn(middle, axis, sign * size)
            for change in (shift, turn):
                told = information(change)
                if told > best:
                    best = told
                    moved = image.transformed(change, points) - points
                    farthest = float(np.linalg.norm(moved, axis=1).mean())
    return {
        'misalignment_mm': farthest,
        'mirrored_ratio': information(mirror) / max(here, 1e-6),
    }


def _turn(middle: Matrix, axis: int, degrees: float) -> Matrix:
    """Return a rotation about an axis through a point."""
    i, j = (other for other in range(3) if other != axis)
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    matrix = np.eye(4)
    matrix[[i, j], [i, j]] = cosine
    matrix[i, j], matrix[j, i] = -sine, sine
    matrix[:3, 3] = middle - matrix[:3, :3] @ middle
    return matrix


def _labels_on(
    labels: NDArray[np.uint8],
    grid: Grid,
    target: Grid,
    between: Mapping[tuple[str, str], Matrix],
) -> NDArray[np.uint8]:
    """Return the T1w's labels at the nearest voxels of the FLAIR, to measure there."""
    matrix = np.linalg.inv(grid.affine) @ between['FLAIR', 'T1w'] @ target.affine
    found = ndimage.affine_transform(
        labels, matrix[:3, :3], matrix[:3, 3], output_shape=target.shape, order=0
    )
    return np.asarray(found)


def _signal(name: str, volume: Volume, labels: NDArray[np.uint8]) -> dict[str, float]:
    """Return contrast, contrast to noise, and the level of what is seen in the air."""
    if not labels.any():
        return {}
    inner, labels = _around_brain(volume, labels)
    white = _white(labels)
    medians = {
        key: float(np.median(inner.data[mask]))
        for key, mask in (
            ('WM', white),
            ('CGM', labels == INDEX['CGM']),
            ('VEN', ndimage.binary_erosion(labels == INDEX['VEN'], TOUCH[1:2])),
        )
        if mask.sum() >= LEAST_TISSUE
    }
    if medians.get('WM', 0) <= 0:
        return {}
    found = {'coil_percent': _coil_percent(inner, labels)}
    found |= {
        key: medians[other] / medians['WM']
        for key, other in (('gray_to_white', 'CGM'), ('fluid_to_white', 'VEN'))
        if other in medians
    }
    other = 'CGM' if name == 'T1w' else 'VEN'
    noise = noise_level(inner, white)
    # There is none where rounding to whole numbers, or a filter, has taken it.
    if other in medians and noise > 0:
        found['contrast_to_noise'] = abs(medians['WM'] - medians[other]) / noise
    values, air = _air(volume)
    if air.sum() > 1000:
        # Medians: where fat is saturated, scalp is dark, and some lies as far off as air.
        found['air_percent'] = 100 * float(np.median(values[air])) / medians['WM']
        # Ghosts lie along the axis of phase encoding: beside the head, or before and behind it.
        along = [air & (~air).any(axis=axis, keepdims=True) for axis in _plane(volume.grid)]
        sides = [values[a & ~b] for a, b in (along, along[::-1])]
        if min(len(side) for side in sides) > 300:
            first, second = (float(np.median(side)) for side in sides)
            found['ghost_percent'] = 100 * abs(first - second) / medians['WM']
    return found


def _around_brain(volume: Volume, labels: NDArray[np.uint8]) -> tuple[Volume, NDArray[np.uint8]]:
    """Return the part of a scan, and of its labels, that holds the brain."""
    box = image.box_around(labels > 0, volume.grid.spacing_mm, volume.grid)
    return Volume(volume.data[box], volume.grid.part(box)), labels[box]


def _white(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return the white matter, off its border."""
    return np.asarray(ndimage.binary_erosion(labels == INDEX['WM'], TOUCH[1:2]))


def _coil_percent(scan: Volume, labels: NDArray[np.uint8]) -> float:
    """Return how unevenly the coil brightens a brain (:func:`.coil.unevenness`)."""
    return 100 * coil.unevenness(scan, _white(labels), labels > 0)


def _plane(grid: Grid) -> list[int]:
    """Return the two axes of a slice."""
    return [axis for axis in range(3) if axis != grid.thick_axis]


def noise_level(scan: Volume, white: NDArray[np.bool_]) -> float:
    """Return the SD of a scan's noise, of its intensities.

    From the residual of a voxel against its four neighbours in the slice (Gasser et al. 1986).

    Parameters
    ----------
    scan
        Intensities (X, Y, Z).
    white
        (X, Y, Z), voxels of white matter to look at, off its border.
    """
    near = sum(np.roll(scan.data, step, axis) for axis in _plane(scan.grid) for step in (-1, 1))
    residual = (math.sqrt(4 / 5) * (scan.data - near / 4))[white]
    return 1.4826 * float(np.median(np.abs(residual - np.median(residual))))


def _air(volume: Volume) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return voxels about 3 mm apart, and which of them are more than 10 mm off the head."""
    some, apart_mm = image.sparse(volume.grid, 3.0)
    values = volume.data[some]
    head = values > image.foreground(volume.data)
    parts, count = ndimage.label(head)
    if count:
        head = ndimage.binary_fill_holes(parts == np.bincount(parts.ravel())[1:].argmax() + 1)
    far = ndimage.distance_transform_edt(~head, sampling=apart_mm) > 10
    return values, far


def cut_mm2(brain: NDArray[np.bool_], grid: Grid) -> float:
    """Return the largest area of brain on an outermost plane of the scan."""
    spacing = grid.spacing_mm
    return max(
        float(brain.take(end, axis=axis).sum() * spacing.prod() / spacing[axis])
        for axis in range(3)
        for end in (0, -1)
    )


def _stray_mm3(labels: NDArray[np.uint8], grid: Grid) -> float:
    """Return the volume of lesions that touch neither white matter nor what lies within it."""
    lesion = labels == INDEX['L']
    if not lesion.any():
        return 0.0
    labels = labels[image.box_around(lesion, grid.spacing_mm, grid)]
    parts, count = ndimage.label(labels == INDEX['L'], TOUCH)
    plausible = np.isin(labels, [INDEX[name] for name in ('WM', 'SGM', 'BS', 'CBM')])
    near = ndimage.binary_dilation(plausible, TOUCH)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    sizes[np.unique(parts[near])] = 0
    return float(sizes.sum() * grid.spacing_mm.prod())


def _asymmetry(labels: NDArray[np.uint8], grid: Grid, mirror: Matrix) -> float:
    """Return the largest difference between left and right of a paired tissue, per cent."""
    values, vectors = np.linalg.eigh(np.eye(3) - mirror[:3, :3])
    normal = vectors[:, values.argmax()]
    distance = mirror[:3, 3] @ normal / 2
    worst = 0.0
    for name in ('WM', 'CGM', 'CBM'):
        voxels = np.argwhere(labels == INDEX[name])
        if len(voxels) > 500:
            side = image.transformed(grid.affine, voxels) @ normal > distance
            share = side.mean()
            worst = max(worst, 100 * abs(2 * share - 1))
    return float(worst)
