"""Scans and grids: read, check, resample, normalise, map back, measure.

Arrays have shape ``(X, Y, Z)`` in the order of the scan's own voxel axes, a :class:`Grid` says
where their voxels lie (``affine``: voxel -> RAS mm), and every transform is a 4 x 4 matrix that
maps RAS mm of the *reference* (the grid that gets values) to RAS mm of the image they are taken
from, which is ITK's direction.

The model never sees a rotated scan: its grid (:func:`model_grid`) is a permutation, reflection,
crop and in-plane rescaling of the scan's voxel axes, so thick slices stay as they were acquired.
Intensities are interpolated, labels never are: probabilities are brought to the native grid
(:func:`joint_probabilities`) and the label is their argmax.

References
----------
Nyul, Udupa and Zhang (2000), *New variants of a method of MRI scale standardization*;
Cardoso et al. (2015), *Scale factor point spread function matching* (the anti-alias Gaussian);
Marques et al. (2010), *MP2RAGE, a self bias-field corrected sequence*.
"""

# nibabel and SimpleITK are only half typed:
# mypy: allow-untyped-calls

from __future__ import annotations

import gzip
import itertools
import logging
import math
import os
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from bids_jointseg.files import replacing, write_bytes
from bids_jointseg.labels import CLASSES, INDICES, LABELS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Float32 = NDArray[np.float32]
    Matrix = NDArray[np.float64]

LOGGER = logging.getLogger('bids_jointseg')

PERCENTILES = (1.0, *range(10, 100, 10), 99.0)
"""Where Nyul's landmarks lie in the foreground's distribution."""

_IDENTITY = np.eye(4)
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS

THICK_MM = 2.5
"""Distance from which slices are thick: they cut what is small, and cut it otherwise next time."""

SPIKE = 1000
"""Times the 99th percentile of a scan above which a voxel shows no tissue."""

NOISY_MM = 9.0
"""Side of a cube whose noise says whether it lies in the air of a uniform image."""

NEGLIGIBLE = 1e-4
"""Probability that is taken for none: most classes then fill but a part of the head."""

NEAR_MM = 5.0
"""How far from the brain, along each axis, the network may suspect more of it: what it suspects
further away is face or neck, but for 3 in 10 000 voxels at most of four painted scans."""

_DEFLATE = 1032
"""Most bytes that one byte of a gzip file can stand for."""

_INTERPOLATORS = {0: sitk.sitkNearestNeighbor, 1: sitk.sitkLinear, 3: sitk.sitkBSpline}
_CORNERS = np.array(list(itertools.product((0.0, 1.0), repeat=3)))


class ImageError(ValueError):
    """An image cannot be used; one line that names the file (where there is one) and a remedy."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an array lie.

    Attributes
    ----------
    shape
        Number of voxels along the three array axes.
    affine
        (4, 4) float64, voxel -> RAS mm.
    """

    shape: tuple[int, int, int]
    affine: Matrix

    @property
    def spacing_mm(self) -> Matrix:
        """(3,) distance of neighbouring voxel centres along each array axis."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def thick_axis(self) -> int:
        """Array axis across the slices.

        That is the coarsest axis; among axes at least two thirds as coarse (all three of a
        near-isotropic scan) it is the one nearest to superior-inferior.
        """
        spacing = self.spacing_mm
        upright = np.abs(self.affine[2, :3]) / spacing
        return int(np.argmax(np.where(spacing > spacing.max() / 1.5, upright, -1.0)))

    @property
    def lateral_axis(self) -> int:
        """Array axis nearest to left-right."""
        return int(np.argmax(np.abs(self.affine[0, :3]) / self.spacing_mm))

    @property
    def slice_mm(self) -> float:
        """Distance of neighbouring slices, along the thick axis."""
        return float(self.spacing_mm[self.thick_axis])

    @property
    def middle(self) -> Matrix:
        """(3,) middle of the field of view, RAS mm."""
        return transformed(self.affine, (np.array(self.shape) - 1) / 2)

    def part(self, box: tuple[slice, slice, slice]) -> Grid:
        """Return the grid of a part of an array that lies on this one."""
        spans = [span.indices(size) for span, size in zip(box, self.shape, strict=True)]
        affine = self.affine.copy()
        affine[:3, 3] = transformed(self.affine, np.array([first for first, *_ in spans]))
        x, y, z = (len(range(*span)) for span in spans)
        return Grid((x, y, z), affine)


def lies_on(labels: Grid, grids: Mapping[str, Grid]) -> str | None:
    """Return the name of the first grid on which a label map lies, voxel by voxel, or None."""
    for name, grid in grids.items():
        if labels.shape == grid.shape and np.allclose(grid.affine, labels.affine, atol=1e-2):
            return name
    return None


@dataclass(frozen=True, eq=False)
class Volume:
    """An image: ``data`` float32 (X, Y, Z) and the grid on which it lies."""

    data: Float32
    grid: Grid


# ---------------------------------------------------------------------------------------------
# Files


def load_scan(path: str | os.PathLike[str]) -> Volume:
    """Read a scan and conform it in memory; its voxel axes stay as they are.

    Questionable data are repaired with a warning: a fourth axis of length one is dropped,
    non-finite voxels are set to 0, stray ones far brighter than any tissue are dimmed, and so is
    the air of a uniform image. Where the qform and the sform disagree, the sform wins.

    Parameters
    ----------
    path
        A NIfTI file.

    Returns
    -------
    Volume
        Intensities as float32 (X, Y, Z), scaled by the header's slope and intercept.

    Raises
    ------
    ImageError
        If the file cannot be read or cannot be a scan of a head: see the message.
    """
    image, grid = _open(path)
    try:
        with np.errstate(over='ignore'):
            data = np.asarray(image.dataobj, dtype=np.float32).reshape(grid.shape, order='A')
    except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        raise ImageError(
            f'{path}: the image data cannot be read ({_one_line(error)}): '
            'the file is truncated or damaged, copy or convert it again'
        ) from error
    finite = np.isfinite(data)
    if not finite.all():
        if not finite.any():
            raise ImageError(f'{path}: no voxel is a finite number: convert the scan again')
        LOGGER.warning(
            '%s: %d voxels are not finite numbers and are set to 0', path, (~finite).sum()
        )
        data = np.where(finite, data, np.float32(0))
    if data.min() == data.max():
        raise ImageError(
            f'{path}: every voxel is {data.flat[0]:g}: this is no scan, replace or leave it out'
        )
    if data.max() <= 0:
        raise ImageError(
            f'{path}: no intensity is above zero: save the scan with its original intensities'
        )
    return Volume(_without_bright_air(path, _without_spikes(path, data), grid), grid)


def _without_spikes(path: str | os.PathLike[str], data: Float32) -> Float32:
    """Dim what is :data:`SPIKE` times as bright as the head: it would pass for all of the head."""
    bright = float(np.percentile(data[data > 0], 99))
    if float(data.max()) <= SPIKE * bright:
        return data
    LOGGER.warning(
        '%s: %d voxels are more than %d times as bright as the head and are dimmed',
        path,
        (data > SPIKE * bright).sum(),
        SPIKE,
    )
    return np.minimum(data, np.float32(bright))


def _without_bright_air(path: str | os.PathLike[str], data: Float32, grid: Grid) -> Float32:
    """Set to 0 what is only noise, and as bright as the head: the air of a uniform image.

    The uniform image of MP2RAGE (``UNIT1``) is a ratio of two images (Marques et al., 2010, eq.
    3), in air any number from -0.5 to 0.5 with the same probability, which many programs store
    as 0 to 4095. There is such air where the corners of the scan are mostly brighter than what
    separates head from air, and vary as much as that, from voxel to voxel; and it is where noise
    is more than half as strong as there, averaged over :data:`NOISY_MM`.
    """
    least = min(float(data.min()), 0)
    if float(data.max()) - least > 1e9:  # no scanner's numbers, whose squares would be infinite
        return data
    spans = [(slice(0, size // 12 + 1), slice(-(size // 12) - 1, None)) for size in data.shape]

    def at_corners(array: Float32) -> Float32:
        return np.concatenate([array[corner].ravel() for corner in itertools.product(*spans)])

    values = at_corners(data) - least
    # Every other voxel says as much, in an eighth of the time.
    separates = foreground(data[::2, ::2, ::2] - least)
    if np.median(values) < separates or values.std() < 0.4 * values.mean():
        return data
    lifted = data - least
    noise = (lifted - ndimage.uniform_filter(lifted, 3)) ** 2
    noise = ndimage.uniform_filter(noise, np.maximum(5, np.rint(NOISY_MM / grid.spacing_mm)))
    level = np.median(at_corners(noise))
    air = noise > level / 2
    if level < values.var() / 3 or air.all():  # the corners are alike within, or there is no head
        return data
    LOGGER.warning(
        '%s: the air is noise as bright as the head, as in a uniform MP2RAGE image: it is set to '
        '0, with what is as noisy in the head',
        path,
    )
    return np.where(air, np.float32(0), lifted)


def load_labels(path: str | os.PathLike[str]) -> Volume:
    """Read a label map on its own grid, as float32 (X, Y, Z) with whole numbers.

    Raises
    ------
    ImageError
        If the file cannot be read or holds other numbers: labels that were interpolated.
    """
    image, grid = _open(path)
    try:
        data = np.asarray(image.dataobj, dtype=np.float32).reshape(grid.shape, order='A')
    except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        raise ImageError(
            f'{path}: the labels cannot be read ({_one_line(error)}): copy the file again'
        ) from error
    labels = np.rint(data)
    if not np.array_equal(labels, data):
        raise ImageError(
            f'{path}: not a label map, some values are no whole numbers: '
            'labels must not be interpolated'
        )
    return Volume(labels, grid)


def load_grid(path: str | os.PathLike[str]) -> Grid:
    """Read where a scan's voxels lie, from the header only.

    Raises
    ------
    ImageError
        If the header cannot be that of a scan of a head.
    """
    return _open(path)[1]


def _open(path: str | os.PathLike[str]) -> tuple[nib.Nifti1Pair, Grid]:
    """Open a NIfTI file, check its header, and leave its data on disk."""
    if Path(path).is_symlink() and not Path(path).exists():
        raise ImageError(
            f'{path}: a link to a file that is not there: get its content first (datalad get)'
        )
    try:
        with _repairs() as repaired:
            image = nib.load(path, mmap=False)  # type: ignore[call-arg]
    except FileNotFoundError as error:
        raise ImageError(f'{path}: no such file: check the path') from error
    except PermissionError as error:
        raise ImageError(f'{path}: not allowed to read it: check its permissions') from error
    except (
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        zlib.error,
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
    ) as error:
        if Path(path).is_file() and _is_pointer(path):
            raise ImageError(
                f'{path}: a git-annex pointer without content: get it first (datalad get)'
            ) from error
        raise ImageError(
            f'{path}: not a readable NIfTI file ({_one_line(error)}): '
            'copy it again or convert the scan to NIfTI'
        ) from error
    if not isinstance(image, nib.Nifti1Pair):
        raise ImageError(f'{path}: not a NIfTI file: convert the scan to NIfTI')
    dtype = image.get_data_dtype()
    if dtype.fields or dtype.kind not in 'fiu':
        kind = 'a colour (RGB) image' if dtype.fields else f'an image of {dtype} numbers'
        raise ImageError(f'{path}: {kind}: give the magnitude scan with one number per voxel')

    shape = image.shape
    if len(shape) < 3 or any(length != 1 for length in shape[3:]):
        raise ImageError(
            f'{path}: has {len(shape)} dimensions {shape}, not 3: extract the one volume to use'
        )
    if len(shape) > 3:
        LOGGER.warning('%s: %d dimensions with one volume: read as 3-D', path, len(shape))

    if any('non-zero' in line for line in repaired) and not image.header['sform_code']:
        raise ImageError(f'{path}: its voxels have no size: repair pixdim, or convert it again')
    if repaired:
        LOGGER.warning('%s: its header was repaired: %s', path, '; '.join(repaired))
    affine = np.asarray(image.affine, dtype=np.float64)
    grid = Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)
    spacing = grid.spacing_mm
    if not (
        np.isfinite(affine).all()
        and abs(float(np.linalg.det(affine[:3, :3]))) > 1e-3 * spacing.prod() > 0
    ):
        raise ImageError(
            f'{path}: its affine is zero, singular or not finite: repair qform or sform, '
            'or convert the scan again'
        )
    if spacing.min() < 0.1 or spacing.max() > 20:
        raise ImageError(
            f'{path}: voxels of {_by(spacing)} mm cannot be a scan of a head: '
            'correct the affine (are its units mm?)'
        )
    if min(grid.shape) < 8 or (spacing * grid.shape).min() < 60:
        raise ImageError(
            f'{path}: {_by(grid.shape)} voxels of {_by(spacing)} mm do not cover a brain: '
            'give a whole-brain scan'
        )
    stored: Any = image.dataobj
    needed = stored.offset + math.prod(grid.shape) * dtype.itemsize
    if needed > _most_bytes(Path(image.file_map['image'].filename or path)):
        raise ImageError(
            f'{path}: the file is truncated, or its header wrong: {_by(grid.shape)} voxels '
            'cannot be in a file of this size, copy or convert it again'
        )
    _warn_of_geometry(path, image, grid)
    return image, grid


@contextmanager
def _repairs() -> Iterator[list[str]]:
    """Collect what nibabel says of a header that it repairs; it does not name the file."""
    said: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = nib.imageglobals.logger
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Collect()], False
    try:
        with warnings.catch_warnings(record=True, action='always') as caught:
            yield said
    finally:
        logger.handlers, logger.propagate = before
        said += [' '.join(str(warning.message).split()) for warning in caught]


def _is_pointer(path: str | os.PathLike[str]) -> bool:
    """Tell whether git-annex left a pointer where the content would be."""
    start = b'/annex/objects/'
    try:
        with Path(path).open('rb') as stream:
            return stream.read(len(start)) == start
    except OSError:
        return False


def _most_bytes(path: Path) -> float:
    """Return how much a file can hold, unpacked, so that no memory is asked for in vain."""
    if path.suffix == '.gz':
        return path.stat().st_size * _DEFLATE
    return path.stat().st_size if path.suffix in ('.nii', '.img') else math.inf


def _warn_of_geometry(path: str | os.PathLike[str], image: Any, grid: Grid) -> None:
    """Log what is questionable in a header."""
    skew = grid.affine[:3, :3] / grid.spacing_mm
    if np.abs(skew.T @ skew - np.eye(3)).max() > 1e-3:
        LOGGER.warning(
            '%s: its voxel axes are not orthogonal: aligned as if they were, results stay on '
            'its own grid',
            path,
        )
    try:
        qform, sform = image.get_qform(coded=True)[0], image.get_sform(coded=True)[0]
    except (ValueError, nib.spatialimages.HeaderDataError):
        LOGGER.warning('%s: its qform is not a rotation: the sform is used', path)
        return
    if qform is None and sform is None:
        LOGGER.warning('%s: states no orientation: left and right are assumed, check them', path)
    elif qform is not None and sform is not None:
        ends = _CORNERS * (np.array(grid.shape) - 1)
        distance = np.linalg.norm(
            transformed(qform, ends) - transformed(sform, ends), axis=1
        ).max()
        if not distance < 0.5:
            LOGGER.warning(
                '%s: qform and sform disagree by up to %.1f mm: the sform is used',
                path,
                distance,
            )


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split()) or type(error).__name__


def _by(values: Iterable[float]) -> str:
    return ' x '.join(f'{value:.4g}' for value in values)


def save(
    path: str | os.PathLike[str],
    data: NDArray[Any],
    grid: Grid,
    *,
    dtype: DTypeLike,
    slope: float | None = None,
    like: str | os.PathLike[str] | None = None,
) -> None:
    """Write a NIfTI-1 file; it appears whole or not at all, and equal input gives equal bytes.

    Parameters
    ----------
    path
        Ends in ``.nii`` or ``.nii.gz``.
    data
        (X, Y, Z) values; rounded and clipped to the range of an integer `dtype`. An array of
        `dtype` itself holds the numbers in the file.
    grid
        Where the voxels lie: becomes sform and qform with code 1.
    dtype
        Of the numbers in the file.
    slope
        Number in the file times `slope` is the value; None means 1. Probabilities are uint8
        with 1/255.
    like
        A scan on the same grid whose sform, qform and their codes are copied bit by bit, so
        that every program places the two alike.

    Raises
    ------
    ImageError
        If `data`, `grid` and `like` differ in shape.
    """
    if data.shape != grid.shape:
        raise ImageError(f'{path}: data {data.shape} do not fit their grid {grid.shape}')
    kind = np.dtype(dtype)
    header = nib.Nifti1Header()
    header.set_data_dtype(kind)
    header.set_data_shape(grid.shape)
    header.set_zooms(grid.spacing_mm)
    header.set_xyzt_units('mm')
    header.set_sform(grid.affine, code=1)
    header.set_qform(grid.affine, code=1)
    if like is not None:
        source: Any = nib.load(like).header
        if tuple(source['dim'][1:4]) != grid.shape:
            raise ImageError(f'{path}: its grid {grid.shape} is not that of {like}')
        if source['sform_code'] or source['qform_code']:
            for field in ('qform_code', 'sform_code', 'quatern_b', 'quatern_c', 'quatern_d'):
                header[field] = source[field]
            for axis in 'xyz':
                header[f'qoffset_{axis}'] = source[f'qoffset_{axis}']
                header[f'srow_{axis}'] = source[f'srow_{axis}']
            header['pixdim'][:4] = source['pixdim'][:4]
    header.set_slope_inter(1.0 if slope is None else slope, 0.0)
    header['magic'] = b'n+1'
    header['vox_offset'] = 352

    if data.dtype != kind:
        data = data if slope is None else data / slope
        if kind.kind in 'iu':
            limits = np.iinfo(kind)
            data = np.clip(np.rint(data), limits.min, limits.max)
    with replacing(path) as temporary, temporary.open('wb') as stream:
        packed: IO[bytes] = stream
        if str(path).endswith('.gz'):
            # No name and no time in the header: equal content gives equal bytes. Level 6 takes
            # up to three times as long, and saves nothing of a scan, 1 to 3 % of probabilities,
            # and a sixth to a quarter of a label map.
            packed = gzip.GzipFile('', 'wb', 4, stream, mtime=0)  # type: ignore[assignment]
        header.write_to(packed)
        packed.write(data.astype(kind, copy=False).tobytes(order='F'))
        if packed is not stream:
            packed.close()


def save_itk(matrix: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write a transform as an ITK affine in text, as SimpleITK, ANTs and nitransforms read it.

    Parameters
    ----------
    matrix
        (4, 4), RAS mm of the reference -> RAS mm of the image that is resampled; the file says
        the same in LPS mm.
    path
        Ends in ``.txt``.
    """
    lps = _FLIP @ np.asarray(matrix, dtype=np.float64) @ _FLIP
    numbers = ' '.join(repr(float(value)) for value in [*lps[:3, :3].ravel(), *lps[:3, 3]])
    text = (
        '#Insight Transform File V1.0\n'
        '#Transform 0\n'
        'Transform: AffineTransform_double_3_3\n'
        f'Parameters: {numbers}\n'
        'FixedParameters: 0 0 0\n'
    )
    write_bytes(Path(path), text.encode())


def load_itk(path: str | os.PathLike[str]) -> Matrix:
    """Read an ITK affine written as text.

    Returns
    -------
    Matrix
        (4, 4), RAS mm of the reference -> RAS mm of the image that is resampled.

    Raises
    ------
    ImageError
        If the file does not hold exactly one affine.
    """
    try:
        lines = Path(path).read_text().splitlines()
        fields = dict(line.split(': ', 1) for line in lines if not line.startswith('#') and line)
        kind = fields['Transform'].split('_')[0]
        parameters = np.array(fields['Parameters'].split(), dtype=np.float64)
        centre = np.array(fields['FixedParameters'].split(), dtype=np.float64)
        lps = np.eye(4)
        lps[:3, :3] = parameters[:9].reshape(3, 3)
        lps[:3, 3] = parameters[9:] + centre - lps[:3, :3] @ centre
        if kind not in ('AffineTransform', 'MatrixOffsetTransformBase'):
            raise ValueError(kind)
        if not (np.isfinite(lps).all() and abs(float(np.linalg.det(lps))) > 1e-6):
            raise ValueError('it cannot be inverted')
    except (OSError, KeyError, ValueError) as error:
        raise ImageError(
            f'{path}: not an ITK affine in text ({_one_line(error)}): save it as one .txt affine'
        ) from error
    return np.asarray(_FLIP @ lps @ _FLIP)


# ---------------------------------------------------------------------------------------------
# Intensities


def foreground(data: NDArray[Any]) -> float:
    """Return the intensity that separates the head from the air.

    The fixed point of ``t <- mean(x[x > t]) / 2`` from ``t = 0`` over the finite ``x > 0``. It
    rises until it stands, and it does not depend on how much empty margin the scan has.
    """
    values = data[np.isfinite(data) & (data > 0)].astype(np.float32, copy=False)
    threshold = 0.0
    while values.size:
        raised = 0.5 * float(values.mean(dtype=np.float64))
        if raised <= threshold:
            break
        threshold = raised
        values = values[values > threshold]
    return threshold


def train_landmarks(scans: Iterable[NDArray[Any]]) -> tuple[float, ...]:
    """Return the mean percentiles of the foreground of some scans (Nyul et al., 2000).

    Each scan is first scaled so that its foreground's 1st and 99th percentiles are 0 and 100.

    Parameters
    ----------
    scans
        Intensities of one modality, any shape.

    Returns
    -------
    tuple[float, ...]
        One intensity for each of :data:`PERCENTILES`.
    """
    scaled = []
    for data in scans:
        found = np.percentile(data[data > foreground(data)], PERCENTILES)
        scaled.append(100 * (found - found[0]) / max(found[-1] - found[0], 1e-6))
    return tuple(float(value) for value in np.mean(scaled, axis=0))


def normalise(data: NDArray[Any], landmarks: Sequence[float] | None = None) -> Float32:
    """Scale intensities to zero mean and unit variance over the head.

    The statistics are those of the foreground, never of the array, so the result does not
    depend on the empty margin. Intensities below zero become zero and those above the 99.9th
    percentile of the foreground become that percentile.

    Parameters
    ----------
    data
        Intensities, any shape.
    landmarks
        Optional: intensities to which the foreground's :data:`PERCENTILES` are mapped first,
        linearly in between (histogram scaling, Nyul et al., 2000).

    Returns
    -------
    Float32
        Same shape.
    """
    inside = data > foreground(data)
    values = data[inside].astype(np.float64)
    if not values.size:
        return np.zeros(data.shape, dtype=np.float32)
    limit = np.percentile(values, 99.9)
    values = np.minimum(values, limit)
    result = np.clip(data, 0, limit).astype(np.float32)
    if landmarks is not None:
        found, first = np.unique(np.percentile(values, PERCENTILES), return_index=True)
        to = np.asarray(landmarks, dtype=np.float64)[first]
        values, result = _piecewise(values, found, to), _piecewise(result, found, to)
    scale = values.std() or 1.0
    return np.asarray((result - values.mean()) / scale, dtype=np.float32)


def _piecewise(values: NDArray[Any], found: Matrix, to: Matrix) -> NDArray[Any]:
    """Map `found` to `to`, linearly in between; the end segments go on."""
    if len(found) < 2:
        return values
    slopes = np.diff(to) / np.diff(found)
    below, above = np.minimum(values - found[0], 0), np.maximum(values - found[-1], 0)
    return np.asarray(np.interp(values, found, to) + slopes[0] * below + slopes[-1] * above)


# ---------------------------------------------------------------------------------------------
# Grids and resampling


def model_grid(volume: Volume, *, in_plane_mm: float, slice_mm: tuple[float, float]) -> Grid:
    """Return the grid on which the model sees a scan.

    It covers the head (the foreground and 6 mm around) in the scan's own voxel axes, permuted
    and reflected to point right, anterior and superior as nearly as they do, and then with the
    thick axis last: axial scans are (R, A, S), coronal (R, S, A), sagittal (A, S, R).

    Parameters
    ----------
    volume
        A scan.
    in_plane_mm
        Voxel size within a slice.
    slice_mm
        Smallest and largest slice distance of the model. A distance in between is kept, with
        the centres of the scan's own slices; else the nearer bound is taken.

    Returns
    -------
    Grid
        Its shape is what the head needs, not a multiple of anything.
    """
    grid = volume.grid
    spacing, thick = grid.spacing_mm, grid.thick_axis
    target = np.full(3, in_plane_mm, dtype=np.float64)
    target[thick] = np.clip(spacing[thick], *slice_mm)
    # A header's rounding must not cause an interpolation.
    target = np.where(np.abs(target / spacing - 1) < 1e-3, spacing, target)

    first, last = _head_box(volume, margin_mm=6.0)
    reduced = _subgrid(grid, target, first, last)
    orientation = nib.orientations.io_orientation(grid.affine)
    order = sorted(range(3), key=lambda axis: (axis == thick, orientation[axis, 0]))
    to_scan = np.zeros((4, 4))
    to_scan[3, 3] = 1
    for new, old in enumerate(order):
        to_scan[old, new] = orientation[old, 1]
        if orientation[old, 1] < 0:
            to_scan[old, 3] = reduced.shape[old] - 1
    shape = tuple(reduced.shape[axis] for axis in order)
    return Grid((shape[0], shape[1], shape[2]), reduced.affine @ to_scan)


def _head_box(volume: Volume, margin_mm: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first and the last voxel index (3,) of the head's box with a margin."""
    data, shape = volume.data, np.array(volume.grid.shape)
    inside = data > foreground(data)
    first, last = np.zeros(3, dtype=np.intp), shape - 1
    for axis in range(3):
        counts = inside.sum(axis=tuple(other for other in range(3) if other != axis))
        # Planes with next to nothing are specks or noise, not the head.
        (planes,) = np.nonzero(counts > 0.01 * counts.max())
        if planes.size:
            first[axis], last[axis] = planes[0], planes[-1]
    margin = np.ceil(margin_mm / volume.grid.spacing_mm).astype(np.intp)
    return np.maximum(first - margin, 0), np.minimum(last + margin, shape - 1)


def _subgrid(grid: Grid, spacing: ArrayLike, first: ArrayLike, last: ArrayLike) -> Grid:
    """Return a grid with other spacing, same axes, from voxel `first` to about `last`."""
    first, last = np.asarray(first, dtype=np.float64), np.asarray(last, dtype=np.float64)
    factor = np.asarray(spacing) / grid.spacing_mm
    shape = tuple(int(length) for length in np.rint((last - first) / factor) + 1)
    affine = grid.affine.copy()
    affine[:3, :3] *= factor
    affine[:3, 3] = transformed(grid.affine, first)
    return Grid((shape[0], shape[1], shape[2]), affine)


def transformed(matrix: NDArray[Any], points: NDArray[Any]) -> Matrix:
    """Return where a matrix (4, 4) moves points (..., 3)."""
    return np.asarray(points @ matrix[:3, :3].T + matrix[:3, 3])


def resample(
    volume: Volume,
    grid: Grid,
    grid_to_volume: ArrayLike = _IDENTITY,
    *,
    order: int = 1,
    threads: int | None = None,
) -> Float32:
    """Bring a volume onto a grid.

    Where the grid is coarser than the volume, the volume is first smoothed along its own axes
    by a Gaussian with ``sigma = 0.42 sqrt(f^2 - 1)`` voxels, `f` being the ratio of voxel
    sizes: what a voxel of the volume, blurred so, sees is what a voxel of the grid sees.

    Parameters
    ----------
    volume
        Intensities or a probability (X, Y, Z).
    grid
        Where values are wanted.
    grid_to_volume
        (4, 4), RAS mm of the grid -> RAS mm of the volume.
    order
        0 nearest (and no smoothing), 1 linear, 3 cubic B-spline.
    threads
        Number of threads; None is SimpleITK's default. The result does not depend on it.

    Returns
    -------
    Float32
        Array of ``grid.shape``; 0 outside the volume.
    """
    data, shape = volume.data, np.array(volume.grid.shape)
    to_source = np.linalg.inv(volume.grid.affine) @ np.asarray(grid_to_volume) @ grid.affine
    result = np.zeros(grid.shape, dtype=np.float32)

    factor = np.abs(to_source[:3, :3]).max(axis=1)
    sigma = 0.42 * np.sqrt(np.maximum(factor**2 - 1, 0)) * (order > 0)
    margin = (np.ceil(3 * sigma) + (2 if order < 2 else 12)).astype(int)

    # Only the voxels of the grid that see more than zeros, and only the voxels they need.
    (seen,) = ndimage.find_objects((data != 0).view(np.uint8)) or [None]
    if seen is None:
        return result
    low = np.maximum([axis.start for axis in seen] - margin, 0)
    high = np.minimum([axis.stop for axis in seen] + margin, shape)
    box = transformed(np.linalg.inv(to_source), low + _CORNERS * (high - low) - 0.5)
    start, stop = _span(box, grid.shape)
    if (start == stop).any():
        return result
    box = transformed(to_source, start + _CORNERS * (stop - 1 - start))
    low, high = _span(box, volume.grid.shape, margin)
    if (low == high).any():
        return result
    data = data[tuple(map(slice, low, high))]
    for axis in range(3):
        if sigma[axis] > 0.1:
            data = ndimage.gaussian_filter1d(data, sigma[axis], axis, mode='nearest', truncate=3)

    offset = transformed(to_source, start) - low
    run = sitk.ResampleImageFilter()
    # Everything in voxel units: no direction, so sheared affines are as good as any.
    run.SetSize([int(length) for length in stop - start])
    run.SetTransform(sitk.AffineTransform(to_source[:3, :3].ravel().tolist(), offset.tolist()))
    run.SetInterpolator(_INTERPOLATORS[order])
    if threads is not None:
        run.SetNumberOfWorkUnits(threads)
    image = sitk.GetImageFromArray(np.asarray(data.T, dtype=np.float32))
    result[tuple(map(slice, start, stop))] = sitk.GetArrayFromImage(run.Execute(image)).T
    return result


def _span(
    points: Matrix, shape: tuple[int, int, int], margin: int | NDArray[np.intp] = 0
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first voxel (3,) of an array's part that holds points (n, 3), and its end."""
    low = np.clip(np.floor(points.min(axis=0) - margin), 0, shape).astype(int)
    return low, np.clip(np.ceil(points.max(axis=0) + margin) + 1, low, shape).astype(int)


def box_around(
    mask: NDArray[np.bool_], reach_mm: float | Matrix, grid: Grid
) -> tuple[slice, slice, slice]:
    """Return the part of an array that holds a mask, which is not empty, and so much around it."""
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    return widened(box, reach_mm, grid)


def widened(
    box: tuple[slice, slice, slice], reach_mm: float | Matrix, grid: Grid
) -> tuple[slice, slice, slice]:
    """Return a box with so much around it, in mm, for each axis or for all."""
    reach = np.ceil(reach_mm / grid.spacing_mm).astype(int)
    x, y, z = (
        slice(max(0, axis.start - r), axis.stop + r) for axis, r in zip(box, reach, strict=True)
    )
    return x, y, z


def cropped(volume: Volume, margin_mm: float) -> Volume:
    """Return the part of a volume that the head fills."""
    first, last = _head_box(volume, margin_mm)
    x, y, z = map(slice, first, last + 1)
    return Volume(volume.data[x, y, z], volume.grid.part((x, y, z)))


def sparse(grid: Grid, millimetres: float) -> tuple[tuple[slice, ...], Matrix]:
    """Return what takes voxels about so many millimetres apart, and how far apart they are."""
    step = np.maximum(1, np.round(millimetres / grid.spacing_mm)).astype(int)
    return tuple(slice(None, None, int(n)) for n in step), grid.spacing_mm * step


def coarsened(volume: Volume, millimetres: float) -> Volume:
    """Return the volume with voxels of at least so many millimetres."""
    spacing = np.maximum(volume.grid.spacing_mm, millimetres)
    grid = _subgrid(volume.grid, spacing, np.zeros(3), np.array(volume.grid.shape) - 1)
    return Volume(resample(volume, grid, threads=1), grid)


# ---------------------------------------------------------------------------------------------
# From the model's grids back to the scans


def plan_passes(
    t1w: Grid | None, flair: Grid | None, flair_to_t1w: ArrayLike = _IDENTITY
) -> tuple[str, ...]:
    """Say on which scans' slices the model has to look.

    Always on the FLAIR's, which carry the small lesions. On the T1w's too where these resolve
    more across the FLAIR's slices: where the T1w's voxels, measured along the FLAIR's thick
    axis, are less than two thirds of its slice distance (thinner slices, or slices in another
    direction).

    Parameters
    ----------
    t1w, flair
        The scans' grids.
    flair_to_t1w
        (4, 4), RAS mm of the FLAIR -> RAS mm of the T1w.

    Returns
    -------
    tuple[str, ...]
        ``('FLAIR',)``, ``('FLAIR', 'T1w')`` or ``('T1w',)``.
    """
    if flair is None:
        return () if t1w is None else ('T1w',)
    if t1w is None:
        return ('FLAIR',)
    across = flair.affine[:3, flair.thick_axis] / flair.slice_mm
    step = np.linalg.inv(t1w.affine[:3, :3]) @ np.asarray(flair_to_t1w)[:3, :3] @ across
    finer = 1 / float(np.linalg.norm(step)) < flair.slice_mm * 2 / 3 - 1e-3
    return ('FLAIR', 'T1w') if finer else ('FLAIR',)


def to_model_grids(
    scans: Mapping[str, Volume],
    between: Mapping[tuple[str, str], ArrayLike],
    *,
    in_plane_mm: float,
    slice_mm: tuple[float, float],
    fast: bool = False,
    threads: int | None = None,
) -> dict[str, tuple[dict[str, Float32], Grid]]:
    """Bring all scans onto the grid of every pass of the network.

    Parameters
    ----------
    scans
        Modality -> scan.
    between
        From :func:`transforms`.
    in_plane_mm, slice_mm
        See :func:`model_grid`.
    fast
        Take the first pass only.
    threads
        See :func:`resample`.

    Returns
    -------
    dict[str, tuple[dict[str, Float32], Grid]]
        Whose slices the pass looks at (:func:`plan_passes`) -> modality -> image (X, Y, Z), and
        their grid.
    """
    grids = {name: scan.grid for name, scan in scans.items()}
    looks = plan_passes(grids.get('T1w'), grids.get('FLAIR'), between['FLAIR', 'T1w'])
    passes = {}
    for look in looks[: 1 if fast else None]:
        grid = model_grid(scans[look], in_plane_mm=in_plane_mm, slice_mm=slice_mm)
        images = {
            name: resample(scan, grid, between[look, name], threads=threads)
            for name, scan in scans.items()
        }
        passes[look] = (images, grid)
    return passes


def transforms(t1w_to_flair: ArrayLike) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Return (from, to) -> matrix that maps points, RAS mm, of one scan to the other."""
    matrix = np.asarray(t1w_to_flair, dtype=float)
    return {
        ('T1w', 'T1w'): np.eye(4),
        ('FLAIR', 'FLAIR'): np.eye(4),
        ('T1w', 'FLAIR'): matrix,
        ('FLAIR', 'T1w'): np.linalg.inv(matrix),
    }


def covered(
    target: Grid, grids: Mapping[str, Grid], target_to: Mapping[str, ArrayLike]
) -> tuple[slice, slice, slice]:
    """Return the part of a grid that holds every voxel of it within some other grids.

    Parameters
    ----------
    target
        The grid.
    grids
        Name -> another grid.
    target_to
        Name -> (4, 4), RAS mm of the target -> RAS mm of that grid.
    """
    corners = np.concatenate(
        [
            transformed(
                np.linalg.inv(np.asarray(target_to[name]) @ target.affine) @ grid.affine,
                _CORNERS * grid.shape - 0.5,
            )
            for name, grid in grids.items()
        ]
    )
    x, y, z = map(slice, *_span(corners, target.shape))
    return x, y, z


def spread(
    array: NDArray[Any],
    part: tuple[slice, slice, slice],
    shape: tuple[int, int, int],
    *,
    outside: ArrayLike = 0,
) -> NDArray[Any]:
    """Return an array (..., X, Y, Z) of that shape, of which one is a part.

    Elsewhere it has the values `outside`, which broadcast with it.
    """
    whole = np.full((*array.shape[:-3], *shape), outside, array.dtype)
    whole[..., *part] = array
    return whole


def joint_probabilities(
    passes: Mapping[str, tuple[Float32, Grid]],
    target: Grid,
    target_to: Mapping[str, ArrayLike],
    *,
    threads: int | None = None,
) -> Float32:
    """Bring the probabilities of one or two passes onto one grid and join them.

    Outside a pass' grid all is background. With two passes the lesion is the FLAIR pass', and
    the other classes are the T1w pass' scaled to what the lesion leaves; a lesion that the T1w
    pass alone sees is white matter.

    Parameters
    ----------
    passes
        Reference modality (``'T1w'``, ``'FLAIR'``) -> probabilities (C, X, Y, Z) in the order
        of :data:`~bids_jointseg.labels.CLASSES`, and their grid.
    target
        Where they are wanted.
    target_to
        Reference modality -> (4, 4), RAS mm of the target -> RAS mm of that pass' scan.
    threads
        As for :func:`resample`.

    Returns
    -------
    Float32
        (C, *target.shape), summing to 1 over classes.
    """
    lesion = CLASSES.index('L')
    two = 'T1w' in passes and 'FLAIR' in passes
    joint = np.zeros((len(CLASSES), *target.shape), dtype=np.float32)

    def brought(name: str, channel: int) -> Float32:
        probabilities, grid = passes[name]
        values = np.array(probabilities[channel], np.float32)
        values[values < NEGLIGIBLE] = 0
        return resample(Volume(values, grid), target, target_to[name], threads=threads)

    for channel in range(1, len(CLASSES)):
        # The lesion's own pass; with one pass it is the only one.
        name = 'FLAIR' if two and channel == lesion else 'T1w' if 'T1w' in passes else 'FLAIR'
        joint[channel] = brought(name, channel)
    if two:
        others = 1 - brought('T1w', lesion)
        # The tiny weight decides where nothing but lesion is left of the T1w pass.
        tiny = np.float32(1e-3)
        joint[CLASSES.index('WM')] += tiny * (others < 1)
        scale = (1 - joint[lesion]) / (others + tiny * (others < 1))
        for channel in range(1, len(CLASSES)):
            if channel != lesion:
                joint[channel] *= scale
    joint[0] = np.maximum(1 - joint[1:].sum(axis=0), 0)
    return joint


def keep_brain(probabilities: NDArray[Any], grid: Grid) -> NDArray[Any]:
    """Turn what the network saw apart from the brain, in the neck or the face, into background.

    The brain is the largest part that is left when the mask (background under one half) loses a
    rim of 2 voxels within the slices, which cuts thin bridges, grown back by 4 within the mask.
    What is too faint for the mask is kept near it only: :data:`NEAR_MM`.

    Parameters
    ----------
    probabilities
        (C, X, Y, Z), background first.
    grid
        Theirs.

    Returns
    -------
    NDArray
        Same shape; a copy, if there is a brain.
    """
    mask = np.asarray(probabilities[0] < 0.5)
    plane = ndimage.generate_binary_structure(3, 1)
    within = plane.copy()
    if grid.slice_mm > 2 * grid.spacing_mm.min():
        np.moveaxis(within, grid.thick_axis, 0)[[0, 2]] = False
    core = ndimage.binary_erosion(mask, within, iterations=2)
    parts, count = ndimage.label(core)
    if not count:
        return probabilities
    largest = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    brain = ndimage.binary_dilation(largest, plane, iterations=4, mask=mask)
    box = [1 + 2 * round(NEAR_MM / millimetres) for millimetres in grid.spacing_mm]
    near = ndimage.maximum_filter(brain, box)
    apart = ~brain & (mask | ~near)
    kept = probabilities.copy()
    call_background(kept, apart)
    return kept


def call_background(probabilities: NDArray[Any], where: NDArray[np.bool_]) -> None:
    """Make voxels background for certain, in place; `(C, X, Y, Z)`, background first."""
    for channel, values in enumerate(probabilities):
        np.copyto(values, channel == 0, where=where)


def label_map(probabilities: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the label (a value of :data:`~bids_jointseg.labels.INDICES`) of highest probability.

    Parameters
    ----------
    probabilities
        (C, X, Y, Z).

    Returns
    -------
    NDArray[np.uint8]
        (X, Y, Z).
    """
    # One class after the other takes a fifth of the time of NumPy's argmax along the first axis.
    highest = np.array(probabilities[0])
    found = np.full(highest.shape, INDICES[0], np.uint8)
    for index, probability in zip(INDICES[1:], probabilities[1:], strict=True):
        found[probability > highest] = index
        np.maximum(highest, probability, out=highest)
    return found


def volumes_mm3(label_map: NDArray[Any], grid: Grid) -> dict[str, float]:
    """Return abbreviation -> volume in mm^3 of every class but the background."""
    voxel = abs(float(np.linalg.det(grid.affine[:3, :3])))
    counts = np.bincount(np.asarray(label_map, dtype=np.uint8).ravel(), minlength=256)
    return {label.abbreviation: float(counts[label.index] * voxel) for label in LABELS[1:]}


def doubt_mm3(
    probabilities: NDArray[Any], label_map: NDArray[Any], grid: Grid
) -> dict[str, float]:
    r"""Return the volume of each label that is expected to be wrong, if the probabilities hold.

    .. math:: \sum_{v: y_v = c} (1 - p_{vc}) + \sum_{v: y_v \ne c} p_{vc}

    Parameters
    ----------
    probabilities
        (C, X, Y, Z).
    label_map
        (X, Y, Z), made of them.
    grid
        Theirs.

    Returns
    -------
    dict[str, float]
        Abbreviation -> mm^3, and the same for all of them together as ``brain``.
    """
    voxel = abs(float(np.linalg.det(grid.affine[:3, :3])))
    found = {}
    for channel, label in enumerate(LABELS[1:], start=1):
        inside, p = label_map == label.index, probabilities[channel]
        sure = p[inside].sum(dtype=np.float64)
        found[label.abbreviation] = float(inside.sum() - 2 * sure + p.sum(dtype=np.float64))
    inside, p = label_map > 0, probabilities[0]
    sure = inside.sum() - p[inside].sum(dtype=np.float64)
    found['brain'] = float(inside.sum() - 2 * sure + (p.size - p.sum(dtype=np.float64)))
    return {name: max(0.0, value) * voxel for name, value in found.items()}
