r"""Standard space: find a template of TemplateFlow, register a scan with it, bring results there.

A scan is registered brain to brain: both are masked, so that neither skull nor neck matters, and
closed, so that the fluid between the gyri is on both. An affine comes first (*SimpleITK*), then a
free-form deformation (Rueckert et al., IEEE TMI 1999): with the cubic B-spline :math:`B` and
control points :math:`\phi_k`, spaced :math:`\delta` apart, the transform

.. math:: T(x) = A (x + u(x)), \quad u(x) = \sum_k \phi_k B(x / \delta - k),

of points of the template to points of the scan maximises :math:`I(F, M \circ T) - \lambda E(u)`,
Mattes' mutual information (IEEE TMI 2003) less the bending energy. ITK has the same model without
:math:`E`, but its Jacobians are dense: one gradient takes 10 s (voxels of 4 mm, 3000 control
points), and 0.05 s with the separable products here. The result is an ordinary ITK transform.

Lesions say nothing of how brains differ: they are left out of the metric (cost-function masking,
Brett et al., NeuroImage 2001), and so is what the scan does not show.

TemplateFlow's folder is read, its library is not imported: that would write into the folder, and
fetch what is missing. Nothing here needs a network.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy import ndimage, optimize, sparse
from threadpoolctl import threadpool_limits

from bids_jointseg import bids, figures, image, metrics
from bids_jointseg.config import NATIVE_SPACES
from bids_jointseg.files import replacing, write_bytes
from bids_jointseg.image import Grid, ImageError, Volume
from bids_jointseg.labels import CLASSES, LABELS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from bids_jointseg.config import StandardSpace

LOGGER = logging.getLogger('bids_jointseg')

CLOSED_MM = 5.0
"""Half the width of the gaps in a brain mask that are filled: sulci and fissures."""
MARGIN_MM = 12.0
"""What is kept around a brain."""
METRIC_MARGIN_MM = 4.0
"""How far around the template's brain the metric looks: the edge of the brain must be in it."""
AFFINE_MM = 4.0
TURNS_DEG = ((0, 0.0), *((0, sign * turn) for turn in (15.0, 30.0, 45.0) for sign in (-1, 1)),
             (1, -25.0), (1, 25.0), (2, -25.0), (2, 25.0))  # fmt: skip
"""About which axis, and how far, the affine registration starts from the headers: the best of
these goes on."""
CONTROL_MM = 8.0
"""Distance of the control points."""
STIFFNESS = 100.0
"""Weight of the bending energy: with 30 some voxels fold, with 300 gyri are not reached."""
CALM = 1e-3
"""Weight, relative to the bending energy, of the first derivatives', for what is far from any
brain."""
LEVELS = ((8.0, 40), (4.0, 40), (2.0, 20))
"""Size of the voxels in mm, and most iterations."""
BINS = 32
TARGET_MM = 2.0
"""Voxel size of the template that scans are registered with, as nearly as there is one."""
LEAST_BYTES = 400
"""What is smaller is no image: TemplateFlow's placeholders are empty."""
GOOD_DICE, GOOD_AFFINE_DICE = 0.95, 0.90
"""Dice of the two brains after registration, and after the affine alone, below which it failed.

Measured on real T1w and FLAIR scans: 0.975 to 0.982, and 0.934 to 0.961. A deformation fits any
two masks, so that a head turned by 90 degrees still has up to 0.955 in the end, but 0.82 and less
after the affine.
"""

_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS


# --- templates ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """Files of a template.

    Attributes
    ----------
    image, mask
        Of the resolution that results are wanted in.
    target_image, target_mask
        Of the resolution that scans are registered with: one transform serves all resolutions.
    """

    image: Path
    mask: Path
    target_image: Path
    target_mask: Path


def template_home() -> Path:
    """Return the folder of TemplateFlow, as its library finds it."""
    home = os.environ.get('TEMPLATEFLOW_HOME')
    if not home:
        from platformdirs import user_cache_dir  # TemplateFlow's own way

        home = user_cache_dir('templateflow')
    return Path(home).absolute()


def template_uri(path: Path) -> str:
    """Return the BIDS URI of a file of a template."""
    start = next(k for k, part in enumerate(path.parts) if part.startswith('tpl-'))
    return 'bids:templateflow:' + '/'.join(path.parts[start:])


def find_template(space: StandardSpace) -> Template:
    """Find a template in TemplateFlow's folder; never fetch it.

    Without a resolution, that is the first, or a template's only one.

    Raises
    ------
    BidsError
        If it is not there, or not whole; one line that says how to fetch it.
    """
    home = template_home()
    folder, start = home / f'tpl-{space.name}', f'tpl-{space.name}'
    if space.cohort is not None:
        folder, start = folder / f'cohort-{space.cohort}', f'{start}_cohort-{space.cohort}'
    # Resolution -> which file -> path.
    found: dict[int | None, dict[str, Path]] = defaultdict(dict)
    pattern = rf'{start}(?:_res-0*(\d+))?_((?:desc-brain_)?T1w|(?:desc|label)-brain_mask)\.nii\.gz'
    for path in sorted(folder.glob('*.nii.gz')) if folder.is_dir() else ():
        match = re.fullmatch(pattern, path.name)
        if match:
            found[int(match[1]) if match[1] else None][match[2]] = path
    whole: dict[int | None, tuple[Path, Path]] = {}
    reasons: dict[int | None, str] = {}
    for resolution, files in found.items():
        scan = files.get('T1w') or files.get('desc-brain_T1w')
        mask = next(
            (files[name] for name in ('desc-brain_mask', 'label-brain_mask', 'desc-brain_T1w')
             if name in files), None,
        )  # fmt: skip
        if scan is None or mask is None:
            reasons[resolution] = f'no {"brain mask" if scan else "T1w"} beside it'
        else:
            reasons[resolution] = _problem(scan) or _problem(mask)
            if not reasons[resolution]:
                whole[resolution] = (scan, mask)
    wanted = space.resolution
    if wanted is None and not (found.keys() & {1, None}) and len(found) == 1:
        (wanted,) = found
    elif wanted is None:
        wanted = None if None in found and 1 not in found else 1
    if wanted not in whole:
        raise bids.BidsError(_missing(space, wanted, home, reasons.get(wanted, '')))
    target = min(whole.values(), key=lambda files: (abs(_voxel_mm(files[0]) - TARGET_MM), files))
    return Template(*whole[wanted], *target)


def _problem(path: Path) -> str:
    """Return why a file is no image, or ''."""
    if not path.exists():  # a broken link of DataLad
        return f'{path.name} is a link to nothing'
    if path.stat().st_size < LEAST_BYTES:
        return f'{path.name} is an empty placeholder'
    try:
        nib.load(path).dataobj[-1, -1, -1]  # type: ignore[attr-defined]  # read to its end
    except Exception:  # whatever nibabel and gzip find
        return f'{path.name} is damaged'
    return ''


def _voxel_mm(path: Path) -> float:
    return float(np.mean(nib.load(path).header.get_zooms()[:3]))  # type: ignore[attr-defined]


def _missing(space: StandardSpace, resolution: int | None, home: Path, reason: str) -> str:
    asked = ''.join(
        f', {name}={value}'
        for name, value in (('cohort', space.cohort), ('resolution', resolution))
        if value is not None
    )
    gets = '; '.join(
        f"get('{space.name}'{asked}, suffix='{suffix}', desc={desc}, extension='nii.gz')"
        for suffix, desc in (('T1w', None), ('mask', "'brain'"))
    )
    where = 'without a resolution' if resolution is None else f'at resolution {resolution}'
    return (
        f'--output-spaces {space}: TEMPLATEFLOW_HOME {home} has no template {space.name} '
        f'{where}{f" ({reason})" if reason else ""}: fetch it where there is a network with  '
        f'python -c "from templateflow.api import get; {gets}"'
    )


def load_template(scan: Path, mask: Path) -> tuple[Volume, NDArray[np.bool_]]:
    """Read a template and its brain, (X, Y, Z) both.

    Raises
    ------
    ImageError
        If they are not images of one grid.
    """
    volume = image.load_scan(scan)
    brain = image.load_scan(mask)
    if image.lies_on(brain.grid, {'T1w': volume.grid}) is None:
        raise ImageError(f'{mask}: not on the grid of {scan.name}: fetch both again')
    return volume, brain.data > 0


# --- registration -------------------------------------------------------------------------------


def register(
    template: Volume,
    template_brain: NDArray[np.bool_],
    scan: Volume,
    brain: NDArray[np.bool_],
    lesions: NDArray[np.bool_] | None = None,
) -> Any:
    """Register a scan with a template.

    There is no randomness, and one thread: the same images give the same numbers.

    Parameters
    ----------
    template, template_brain
        T1w (X, Y, Z), and true within its brain.
    scan, brain
        T1w or FLAIR (I, J, K) in any frame, and true within its brain.
    lesions
        (I, J, K), true where the scan must not be compared.

    Returns
    -------
    SimpleITK.CompositeTransform
        An affine after a B-spline: points of the template -> points of the scan, LPS mm.

    Raises
    ------
    ImageError
        If one of them shows no brain, or no affine brings them together.
    """
    if not (brain.any() and template_brain.any()):
        raise ImageError('no brain to register with the template: look at the segmentation')
    step = max(TARGET_MM, round(float(template.grid.spacing_mm.min()), 3))
    excluded = np.zeros(brain.shape, bool) if lesions is None else lesions
    # The rim of a lesion is neither lesion nor tissue.
    compared = (~ndimage.binary_dilation(excluded, np.ones((3, 3, 3)))).astype(np.float32)
    with threadpool_limits(1):
        fixed, inside = _brain(template, template_brain, step)
        moving, _ = _brain(scan, brain, step)
        # Zero outside of the field of view.
        weight = Volume(
            image.resample(Volume(compared, scan.grid), moving.grid, threads=1), moving.grid
        )
        affine = _register_affine(fixed, inside, moving, weight)
        lattice = Lattice.over(template.grid)
        control = np.zeros((3, *lattice.shape))
        for millimetres, iterations in LEVELS:
            if millimetres < step and millimetres != LEVELS[0][0]:
                continue  # there is nothing finer to see
            level = [
                image.coarsened(volume, millimetres) for volume in (fixed, inside, moving, weight)
            ]
            control = _deform(level, affine, lattice, control, iterations)
    return _to_itk(affine, lattice, control)


def _brain(volume: Volume, brain: NDArray[np.bool_], step: float) -> tuple[Volume, Volume]:
    """Return a brain, 0 to 1 and 0 around it, and its closed mask, with isotropic RAS axes."""
    grid = volume.grid
    corners = np.argwhere(brain)
    low, high = corners.min(axis=0) - 0.5, corners.max(axis=0) + 0.5
    corners = np.array(np.meshgrid(*zip(low, high, strict=True))).reshape(3, -1).T
    points = image.transformed(grid.affine, corners)
    low, high = points.min(axis=0) - MARGIN_MM, points.max(axis=0) + MARGIN_MM
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = low
    x, y, z = (int(n) for n in np.ceil((high - low) / step) + 1)
    upright = Grid((x, y, z), affine)
    share = image.resample(Volume(brain.astype(np.float32), grid), upright, threads=1)
    mask = closed(share > 0.5, upright)
    data = image.resample(volume, upright, threads=1)
    # Between the brain's own brightest spot and nothing; the edge is as sharp as it was.
    top = float(np.percentile(data[mask], 99.5)) if mask.any() else 0.0
    if top <= 0:
        raise ImageError('nothing bright within the brain mask: look at the segmentation')
    data = np.clip(data / top, 0, 1) * np.maximum(share, mask)
    return Volume(data, upright), Volume(mask.astype(np.float32), upright)


def closed(mask: NDArray[np.bool_], grid: Grid) -> NDArray[np.bool_]:
    """Fill the gaps of a mask (X, Y, Z) that are less than twice :data:`CLOSED_MM` wide.

    Our brain is tissue and ventricles, a template's reaches to the skull.
    """
    spacing = grid.spacing_mm
    reach = [(int(r) + 1,) * 2 for r in np.ceil(CLOSED_MM / spacing)]
    padded = np.pad(mask, reach)
    grown = ndimage.distance_transform_edt(~padded, sampling=spacing) <= CLOSED_MM
    shrunk = ndimage.distance_transform_edt(grown, sampling=spacing) > CLOSED_MM
    back = tuple(slice(first, -first) for first, _ in reach)
    return np.asarray((shrunk | padded)[back])


def _register_affine(
    fixed: Volume, inside: Volume, moving: Volume, weight: Volume
) -> NDArray[np.float64]:
    """Return the affine (4, 4), RAS mm of the template -> RAS mm of the scan."""
    fixed, inside, moving, weight = (
        image.coarsened(volume, AFFINE_MM) for volume in (fixed, inside, moving, weight)
    )
    around = _metric_region(inside)
    images = [_itk_image(fixed.data, fixed.grid), _itk_image(moving.data, moving.grid)]
    masks = [
        _itk_image(around.astype(np.uint8), fixed.grid),
        _itk_image((weight.data > 0.5).astype(np.uint8), moving.grid),
    ]
    # Shift and scale are those of the brains.
    centres, volumes_mm3 = [], []
    for volume in (fixed, moving):
        brain, grid = volume.data > 0, volume.grid
        centre = _linear(grid) @ np.array(ndimage.center_of_mass(brain)) + grid.affine[:3, 3]
        centres.append(_FLIP[:3, :3] @ centre)
        volumes_mm3.append(brain.sum() * grid.spacing_mm.prod())
    scale = float(np.cbrt(volumes_mm3[1] / volumes_mm3[0]))

    def method(share: float) -> Any:
        found = sitk.ImageRegistrationMethod()
        found.SetMetricAsMattesMutualInformation(BINS)
        found.SetMetricUseFixedImageGradientFilter(False)
        found.SetMetricUseMovingImageGradientFilter(False)
        found.SetMetricSamplingStrategy(found.REGULAR)
        found.SetMetricSamplingPercentage(share, 1)
        found.SetMetricFixedMask(masks[0])
        found.SetMetricMovingMask(masks[1])
        found.SetInterpolator(sitk.sitkLinear)
        found.SetNumberOfWorkUnits(1)
        return found

    starts = []
    for number, (axis, degrees) in enumerate(TURNS_DEG):
        start = sitk.AffineTransform(3)
        start.SetCenter(centres[0].tolist())
        start.Rotate((axis + 1) % 3, (axis + 2) % 3, float(np.deg2rad(degrees)))
        start.Scale(scale)
        start.SetTranslation((centres[1] - centres[0]).tolist())
        evaluated = method(0.5)
        evaluated.SetInitialTransform(start)
        starts.append((evaluated.MetricEvaluate(*images), number, start))
    affine = min(starts)[2]
    run = method(0.5)
    run.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=1e-3, numberOfIterations=150, relaxationFactor=0.5,
        gradientMagnitudeTolerance=1e-6,
    )  # fmt: skip
    run.SetOptimizerScalesFromPhysicalShift()
    run.SetInitialTransform(affine, inPlace=True)
    try:
        run.Execute(*images)
    except RuntimeError as error:  # all samples left the scan
        raise ImageError('no affine brings the brain onto the template: look at both') from error
    lps = np.eye(4)
    lps[:3, :3] = np.array(affine.GetMatrix()).reshape(3, 3)
    lps[:3, 3] = centres[0] + affine.GetTranslation() - lps[:3, :3] @ centres[0]
    return np.asarray(_FLIP @ lps @ _FLIP)


def _metric_region(inside: Volume) -> NDArray[np.bool_]:
    """Return where the metric looks: the brain and a rim."""
    return np.asarray(
        ndimage.distance_transform_edt(inside.data < 0.5, sampling=inside.grid.spacing_mm)
        <= max(METRIC_MARGIN_MM, float(inside.grid.spacing_mm[0]))
    )


def _linear(grid: Grid) -> NDArray[np.float64]:
    return grid.affine[:3, :3]


def _itk_image(data: NDArray[Any], grid: Grid) -> Any:
    """Return an image in ITK's LPS frame; its axes are taken as orthogonal."""
    found = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    lps = _FLIP @ grid.affine
    left, _, right = np.linalg.svd(lps[:3, :3] / grid.spacing_mm)
    found.SetSpacing(grid.spacing_mm.tolist())
    found.SetDirection((left @ right).ravel().tolist())
    found.SetOrigin(lps[:3, 3].tolist())
    return found


# --- free-form deformation ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Lattice:
    """Control points of a cubic B-spline, along RAS axes.

    Attributes
    ----------
    shape
        Number of control points along the axes.
    origin
        (3,) RAS mm of the first.
    """

    shape: tuple[int, int, int]
    origin: NDArray[np.float64]

    @classmethod
    def over(cls, grid: Grid) -> Lattice:
        """Return the control points that a deformation of a whole grid needs."""
        ends = np.array(np.meshgrid(*((-0.5, n - 0.5) for n in grid.shape))).reshape(3, -1)
        points = _linear(grid) @ ends + grid.affine[:3, 3:]
        low, high = points.min(axis=1), points.max(axis=1)
        cells = np.ceil((high - low) / CONTROL_MM).astype(int)
        first = (low + high) / 2 - cells * CONTROL_MM / 2
        x, y, z = (int(n) + 3 for n in cells)
        return cls((x, y, z), first - CONTROL_MM)

    def basis(self, grid: Grid) -> list[Any]:
        """Return the sparse weights (voxels, control points) of each axis of an upright grid."""
        found = []
        for axis, count in enumerate(self.shape):
            points = grid.affine[axis, 3] + grid.affine[axis, axis] * np.arange(grid.shape[axis])
            at = (points - self.origin[axis]) / CONTROL_MM
            found.append(sparse.csr_array(_spline(at[:, None] - np.arange(count))))
        return found


def _spline(t: NDArray[Any]) -> NDArray[Any]:
    """Return the cubic B-spline."""
    t = np.abs(t)
    return np.where(t < 1, (4 - 6 * t**2 + 3 * t**3) / 6, np.maximum(2 - t, 0) ** 3 / 6)


def _spline_slope(t: NDArray[Any]) -> NDArray[Any]:
    """Return the derivative of the cubic B-spline."""
    size = np.abs(t)
    slope = np.where(size < 1, 1.5 * size**2 - 2 * size, -(np.maximum(2 - size, 0) ** 2) / 2)
    return np.sign(t) * slope


def _separable(weights: Sequence[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Apply one matrix along each axis of an array (X, Y, Z)."""
    for matrix in weights:
        shape = values.shape
        flat = matrix @ values.reshape(shape[0], -1)
        values = np.ascontiguousarray(flat.reshape(matrix.shape[0], *shape[1:]).transpose(1, 2, 0))
    return values


def bending(control: NDArray[Any]) -> tuple[float, NDArray[Any]]:
    r"""Return the bending energy and its gradient.

    :math:`E = \frac{1}{n} \sum |\partial_{ab} \phi|^2 + c \, |\partial_a \phi|^2`, by differences
    of the control points (mm), with :math:`c` = :data:`CALM`.

    Parameters
    ----------
    control
        (3, X, Y, Z) mm.

    Returns
    -------
    tuple
        In mm^-2 (and without unit for the second term), and (3, X, Y, Z).
    """
    energy, gradient = 0.0, np.zeros_like(control)
    terms: list[tuple[tuple[int, ...], float]] = []
    for a in (1, 2, 3):
        terms += [((a,), CALM), ((a, a), 1.0), *(((a, b), 2.0) for b in range(a + 1, 4))]
    for axes, weight in terms:
        value = control
        for axis in axes:
            value = np.diff(value, axis=axis) / CONTROL_MM
        weight = weight / control[0].size
        energy += weight * float(np.square(value).sum())
        value = 2 * weight * value
        for axis in axes:  # differences are antisymmetric
            width = [(1, 1) if k == axis else (0, 0) for k in range(4)]
            value = -np.diff(np.pad(value, width), axis=axis) / CONTROL_MM
        gradient += value
    return energy, gradient


def _deform(
    volumes: Sequence[Volume],
    affine: NDArray[np.float64],
    lattice: Lattice,
    control: NDArray[np.float64],
    iterations: int,
) -> NDArray[np.float64]:
    """Improve the control points (3, ...), mm, on one level of the pyramid.

    `volumes` are the template, its brain, the scan, and where that is to be compared.
    """
    fixed, inside, moving, weight = volumes
    basis = lattice.basis(fixed.grid)
    adjoint = [matrix.T.tocsr() for matrix in basis]
    region = _metric_region(inside)
    voxels = np.nonzero(region)
    points = _linear(fixed.grid) @ np.stack(voxels) + fixed.grid.affine[:3, 3:]
    rows = np.rint(_bin(fixed.data[voxels])).astype(np.intp)
    to_voxel = np.linalg.inv(moving.grid.affine) @ affine
    slopes = np.gradient(moving.data)

    def cost(flat: NDArray[Any]) -> tuple[float, NDArray[Any]]:
        control = flat.reshape(3, *lattice.shape)
        moved = points + np.stack([_separable(basis, part)[voxels] for part in control])
        at = (to_voxel[:3, :3] @ moved + to_voxel[:3, 3:]).astype(np.float32)
        seen = ndimage.map_coordinates(weight.data, at, order=1) > 0.5
        found = _bin(ndimage.map_coordinates(moving.data, at, order=1))
        information, change = _information(rows, found, seen)
        slope = np.stack([ndimage.map_coordinates(part, at, order=1) for part in slopes])
        slope = change * (to_voxel[:3, :3].T @ slope)
        gradient = np.empty_like(control)
        for axis in range(3):
            spread = np.zeros(fixed.grid.shape)
            spread[voxels] = slope[axis]
            gradient[axis] = _separable(adjoint, spread)
        energy, stiff = bending(control)
        return STIFFNESS * energy - information, (STIFFNESS * stiff - gradient).ravel()

    found = optimize.minimize(
        cost,
        control.ravel(),
        jac=True,
        method='L-BFGS-B',
        options={'maxiter': iterations, 'maxcor': 8, 'ftol': 1e-5, 'gtol': 0.0},
    )
    return np.asarray(found.x).reshape(control.shape)


def _bin(values: NDArray[Any]) -> NDArray[np.float64]:
    """Map intensities, 0 to 1, to bins, with two bins left at each end for the spline."""
    return np.clip(2 + values.astype(np.float64) * (BINS - 5), 2, BINS - 3 - 1e-6)


def _information(
    rows: NDArray[np.intp], found: NDArray[np.float64], seen: NDArray[np.bool_]
) -> tuple[float, NDArray[np.float64]]:
    """Return Mattes' mutual information (nats) and its derivative by the moving intensities.

    Parameters
    ----------
    rows
        (N,) bins of the fixed intensities, whole.
    found
        (N,) bins of the moving intensities.
    seen
        (N,), true where the two are to be compared.

    Returns
    -------
    tuple
        The information, and (N,) its derivative by intensities from 0 to 1.
    """
    first = np.floor(found).astype(np.intp) - 1
    total = float(max(seen.sum(), 1))
    joint = np.zeros(BINS * BINS)
    for k in range(4):
        weights = _spline(found - (first + k)) * seen
        joint += np.bincount(rows * BINS + first + k, weights, BINS * BINS)
    joint = joint.reshape(BINS, BINS) / total
    there = joint > 0
    logs = np.log(joint, where=there, out=np.zeros_like(joint))
    margins = [joint.sum(axis=axis, keepdims=True) for axis in (0, 1)]
    parts = [np.log(m, where=m > 0, out=np.zeros_like(m)) for m in margins]
    information = float((joint * (logs - parts[0] - parts[1])).sum())
    # The fixed margin stays as it is, and the derivatives of a distribution sum to zero.
    inner = np.where(there, logs - parts[0], 0)
    change = sum(_spline_slope(found - (first + k)) * inner[rows, first + k] for k in range(4)) * (
        seen * (BINS - 5) / total
    )
    return information, np.asarray(change)


# --- transforms ---------------------------------------------------------------------------------


def _to_itk(affine: NDArray[np.float64], lattice: Lattice, control: NDArray[np.float64]) -> Any:
    """Return the transform as ITK writes it: a composite that applies its last part first."""
    lps = _FLIP @ affine @ _FLIP
    linear = sitk.AffineTransform(3)
    linear.SetMatrix(lps[:3, :3].ravel().tolist())
    linear.SetTranslation(lps[:3, 3].tolist())
    cells = np.array(lattice.shape) - 3
    warp = sitk.BSplineTransform(3, 3)
    warp.SetTransformDomainDirection(_FLIP[:3, :3].ravel().tolist())
    warp.SetTransformDomainOrigin((_FLIP[:3, :3] @ (lattice.origin + CONTROL_MM)).tolist())
    warp.SetTransformDomainPhysicalDimensions((cells * CONTROL_MM).tolist())
    warp.SetTransformDomainMeshSize(cells.tolist())
    # A tenth of a micrometre is enough, and a third of the file.
    flipped = np.round(np.diag(_FLIP)[:3, None] * [part.ravel(order='F') for part in control], 4)
    warp.SetParameters((flipped.ravel() + 0.0).tolist())
    return sitk.CompositeTransform([linear, warp])


def save_transform(transform: Any, path: Path) -> Path:
    """Write a transform as ITK's text, which appears whole or not at all.

    Parameters
    ----------
    transform
        From :func:`register`.
    path
        Ends in ``.txt``. SimpleITK and ITK read it, and ANTs, which is built on ITK.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        text = Path(f'{temporary}.txt')  # ITK knows a format by its name alone
        try:
            sitk.WriteTransform(transform, str(text))
            text.replace(temporary)
        finally:
            text.unlink(missing_ok=True)
    return path


def load_transform(path: Path) -> Any:
    """Read a transform that :func:`save_transform` wrote."""
    return sitk.CompositeTransform(sitk.ReadTransform(str(path)))


def map_grid(transform: Any, grid: Grid) -> NDArray[np.float32]:
    """Return where the voxels of a template lie in a scan.

    Parameters
    ----------
    transform
        From :func:`register`.
    grid
        Of the template, at any resolution.

    Returns
    -------
    NDArray[np.float32]
        (3, X, Y, Z) RAS mm.
    """
    like = _itk_image(np.zeros(grid.shape, np.uint8), grid)
    run = sitk.TransformToDisplacementFieldFilter()
    run.SetReferenceImage(like)
    run.SetOutputPixelType(sitk.sitkVectorFloat32)
    run.SetNumberOfWorkUnits(1)
    shift = sitk.GetArrayFromImage(run.Execute(transform)).T
    axes = np.ogrid[tuple(map(slice, grid.shape))]
    found = np.empty((3, *grid.shape), np.float32)
    for k in range(3):
        found[k] = sum(grid.affine[k, axis] * axes[axis] for axis in range(3)) + grid.affine[k, 3]
        found[k] += _FLIP[k, k] * shift[k]
    return found


class Puller:
    """Brings arrays of one scan onto the grid of a template.

    Where the template is coarser, an array is blurred first as :func:`.image.resample` does.

    Parameters
    ----------
    transform
        From :func:`register`.
    grid
        Of the template.
    scan
        Grid of the scan, in any frame.
    """

    def __init__(self, transform: Any, grid: Grid, scan: Grid) -> None:
        self.grid = grid
        inverse = np.linalg.inv(scan.affine)
        points = map_grid(transform, grid)
        flat = points.reshape(3, -1)
        self.at = (inverse[:3, :3].astype(np.float32) @ flat).reshape(points.shape)
        self.at += inverse[:3, 3].astype(np.float32)[:, None, None, None]
        linear = np.array(sitk.AffineTransform(transform.GetNthTransform(0)).GetMatrix())
        ras = _FLIP[:3, :3] @ linear.reshape(3, 3) @ _FLIP[:3, :3]
        factor = np.abs(inverse[:3, :3] @ ras @ _linear(grid)).max(axis=1)
        self.sigma = 0.42 * np.sqrt(np.maximum(factor**2 - 1, 0))

    def __call__(self, data: NDArray[Any]) -> NDArray[np.float32]:
        """Return an array (I, J, K) of intensities or a probability as (X, Y, Z); 0 outside."""
        values = np.asarray(data, np.float32)
        for axis in range(3):
            if self.sigma[axis] > 0.1:
                values = ndimage.gaussian_filter1d(
                    values, self.sigma[axis], axis, mode='nearest', truncate=3
                )
        return np.asarray(ndimage.map_coordinates(values, self.at, order=1), np.float32)


def bring_probabilities(
    pull: Puller, probabilities: Iterable[NDArray[Any]]
) -> NDArray[np.float32]:
    """Bring the probabilities of all classes onto a template.

    Parameters
    ----------
    pull
        For the scan.
    probabilities
        (C, I, J, K), 0 to 1, one array after the other in the order of
        :data:`~bids_jointseg.labels.CLASSES`, background first.

    Returns
    -------
    NDArray[np.float32]
        (C, X, Y, Z), summing to 1 over classes; their argmax is the label.
    """
    found = np.zeros((len(CLASSES), *pull.grid.shape), np.float32)
    for channel, part in enumerate(probabilities):
        if channel:
            found[channel] = pull(part)
    found[0] = np.maximum(1 - found[1:].sum(axis=0), 0)
    return found


def measure_fit(
    transform: Any,
    template: Grid,
    template_brain: NDArray[np.bool_],
    scan: Grid,
    brain: NDArray[np.bool_],
) -> dict[str, Any]:
    """Measure a registration.

    Parameters
    ----------
    transform
        From :func:`register`.
    template, template_brain
        Grid, and true within the brain (X, Y, Z).
    scan, brain
        Grid, and true within the brain (I, J, K).

    Returns
    -------
    dict[str, Any]
        ``brain_dice``: Dice of the scan's closed brain mask, brought to the template, and the
        template's; ``affine_brain_dice``: the same before the deformation. ``volume_ratio``:
        least, median and largest ratio of the volumes of a piece of brain in the scan and in the
        template (0 and less is a fold). ``flags``: what a reader should look at.
    """
    pull = Puller(transform, template, scan)
    affine = sitk.CompositeTransform([transform.GetNthTransform(0)])
    theirs = closed(template_brain, template)
    dice, before = (
        metrics.dice_of(closed(way(brain) > 0.5, template), theirs) / 100
        for way in (pull, Puller(affine, template, scan))
    )
    points = map_grid(transform, template)
    columns = [np.stack(np.gradient(points[k]), -1) for k in range(3)]
    jacobian = np.linalg.det(np.stack(columns, -2)[template_brain])
    jacobian = jacobian / np.linalg.det(_linear(template))
    low, middle, high = (float(v) for v in np.percentile(jacobian, (0, 50, 100)))
    flags = []
    if dice < GOOD_DICE or before < GOOD_AFFINE_DICE:
        flags.append(
            f'the brain does not fit the template (Dice {before:.2f} after the affine, {dice:.2f} '
            'in the end): look at the results in standard space before using them'
        )
    return {
        'brain_dice': round(dice, 4),
        'affine_brain_dice': round(before, 4),
        'volume_ratio': [round(v, 3) for v in (low, middle, high)],
        'flags': flags,
    }


# --- the cohort ---------------------------------------------------------------------------------

_MASK = re.compile(r'.+?_(space-[^_]+(?:_cohort-\d+)?(?:_res-\d+)?)_label-L_mask\.nii\.gz')
_BRIGHTNESS = {'WM': 0.9, 'L': 0.9, 'BS': 0.85, 'SGM': 0.7, 'CGM': 0.55, 'CBM': 0.55, 'VEN': 0.15}


def lesion_maps(out_dir: Path) -> list[Path]:
    """Write how often each voxel of a template is a lesion, for every space with results.

    Every person counts once: of several scans of one person, the mean is taken first. One image
    is in memory at a time.

    Parameters
    ----------
    out_dir
        The derivative dataset.

    Returns
    -------
    list[Path]
        ``group_<space>_label-L_probseg`` as ``.nii.gz`` (float32, 0 to 1), ``.json`` (people,
        scans, sources) and ``.png`` for each space; what is left of earlier ones is removed.
    """
    spaces: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(out_dir.glob('sub-*/**/anat/*_label-L_mask.nii.gz')):
        match = _MASK.fullmatch(path.name)
        if match and match[1].removeprefix('space-') not in NATIVE_SPACES:
            spaces[match[1]][bids.entities(path)['sub']].append(path)
    written = []
    for space, people in sorted(spaces.items()):
        written += _lesion_map(out_dir, space, people)
    for path in out_dir.glob('group_space-*_label-L_probseg.*'):
        if path not in written:
            path.unlink()
    return written


def _lesion_map(out_dir: Path, space: str, people: dict[str, list[Path]]) -> list[Path]:
    grid: Grid | None = None
    total: NDArray[np.float64] = np.zeros(0)
    shown: NDArray[np.float32] = np.zeros(0, np.float32)
    sources: list[str] = []
    persons = 0
    record: dict[str, Any] = {}
    for paths in people.values():
        scans = []
        for path in paths:
            try:
                here = image.load_labels(path)
            except ImageError as error:
                LOGGER.warning('%s: left out of the lesion map', error)
                continue
            if grid is None:
                grid = here.grid
                total, shown = np.zeros(grid.shape), np.zeros(grid.shape, np.float32)
                record = _read_json(path.with_name(path.name.split('.')[0] + '.json'))
            if image.lies_on(here.grid, {space: grid}) is None:
                LOGGER.warning('%s: left out of the lesion map, its grid is another one', path)
                continue
            scans.append((path, here.data > 0))
        for path, mask in scans:
            total += mask / len(scans)
            shown += _background(path, shown.shape)
            sources.append(f'bids::{path.relative_to(out_dir).as_posix()}')
        persons += bool(scans)
    if grid is None:
        return []
    frequency = (total / persons).astype(np.float32)
    path = out_dir / f'group_{space}_label-L_probseg.nii.gz'
    image.save(path, frequency, grid, dtype=np.float32)
    description: dict[str, Any] = {
        'Description': 'Share of people with a white-matter lesion; of several scans of one '
        'person, the mean counts',
        'participants': persons,
        'scans': len(sources),
        'Sources': sources,
    }
    description |= {k: record[k] for k in ('SpatialReference', 'Resolution') if k in record}
    stem = path.name.removesuffix('.nii.gz')
    picture = figures.draw_frequency(
        Volume(shown / np.float32(len(sources)), grid), frequency, people=persons
    )
    return [
        path,
        bids.write_json(out_dir / f'{stem}.json', description),
        write_bytes(out_dir / f'{stem}.png', picture),
    ]


def _background(mask: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return what a lesion mask is shown over, 0 to 1: the T1w, or its labels as one."""
    name = re.sub(r'(_res-\d+)?_label-L_mask', r'_seg-jointseg\1_dseg', mask.name)
    scan = mask.with_name(mask.name.replace('_label-L_mask', '_desc-preproc_T1w'))
    try:
        labels = image.load_labels(mask.with_name(name)).data.astype(np.uint8)
        if scan.exists() and labels.any():  # not where the level is minimal, nor for a FLAIR
            data = image.load_scan(scan).data
            return np.clip(data / np.percentile(data[labels > 0], 99.5), 0, 1)
    except (ImageError, IndexError):  # the mask counts all the same
        return np.zeros(shape, np.float32)
    table = np.zeros(256, np.float32)
    for label in LABELS[1:]:
        table[label.index] = _BRIGHTNESS[label.abbreviation]
    return np.asarray(table[labels])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, ValueError):
        return {}
