"""What training reads: every scan, prepared once and kept in one file.

On the grid that the participant workflow gives it: intensities in one byte, the set of classes
that the annotation leaves open at each voxel, and, where scans are painted, the kind of tissue.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor

from bids_jointseg import synth
from bids_jointseg.files import replacing
from bids_jointseg.image import Grid, Volume, foreground, model_grid, normalise, resample
from bids_jointseg.labels import ALL, PROTOCOLS, Protocol, bits

NOTHING = bits(ALL)
"""The set that says nothing."""

MNI_SHAPE = (182, 218, 182)
"""Of lesion masks: the canonical 1 mm MNI152 grid."""

NECK_MM = 70.0
"""Kept below the brain of a painted head: nobody needs shoulders."""


@dataclass(frozen=True)
class Person:
    """One cached scan.

    Attributes
    ----------
    dataset, subject, name
        Whose it is, and what it is called: `sub-01_ses-1`.
    spacing_mm
        Of its voxels; the slices are along the last axis.
    images
        Modality -> intensities `(X, Y, Z)`, float16, air 0: in units of white matter where the
        kinds are known, of the mean of the head elsewhere.
    levels
        Modality -> mean and standard deviation that normalisation takes, in the same units.
    sets
        Classes that each voxel may be of (:func:`bids_jointseg.labels.bits`), uint8.
    kinds
        Kind of tissue (:mod:`bids_jointseg.synth`), uint8, or None where nothing is painted.
    means
        Modality -> median of each kind, NaN where there is none, `(K,)`.
    counts
        Voxels of each kind in the whole volume.
    box
        First and last voxel of the cerebrum on each axis (of the head, where kinds are unknown),
        `(2, 3)`.
    """

    dataset: str
    subject: str
    name: str
    spacing_mm: tuple[float, float, float]
    images: dict[str, Tensor]
    levels: dict[str, tuple[float, float]]
    sets: Tensor
    kinds: Tensor | None
    means: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    box: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))

    @property
    def isotropic(self) -> bool:
        """Whether slices of any direction and thickness can be made of its voxels."""
        return max(self.spacing_mm) < 1.5 * min(self.spacing_mm)

    @cached_property
    def lesions(self) -> Tensor:
        """Voxels that are annotated as lesions, `(N, 3)`; looked for once, not in each sample."""
        return (self.sets == bits({'L'})).nonzero()


def painted_grid(labels: Volume, protocol: str) -> tuple[Grid, NDArray[np.uint8]]:
    """Return the grid of a head that has no scan, at 1 mm, and its kinds of tissue.

    Parameters
    ----------
    labels
        Whole-head label map.
    protocol
        What its labels are.
    """
    kinds = synth.kinds_of(protocol, labels.data.astype(np.int64))
    head = (kinds != synth.AIR).astype(np.float32)
    upwards = labels.grid.affine[2]
    axes = np.ogrid[tuple(slice(size) for size in head.shape)]
    height = sum(step * axis for step, axis in zip(upwards[:3], axes, strict=True)) + upwards[3]
    brain = np.isin(kinds, synth.BRAIN)
    head[np.broadcast_to(height < height_of(brain, upwards) - NECK_MM, head.shape)] = 0
    grid = model_grid(Volume(head, labels.grid), in_plane_mm=1.0, slice_mm=(1.0, 1.0))
    return grid, _without_specks(kinds_on(grid, labels, protocol))


def painted_person(labels: Volume, protocol: str) -> tuple[Person, Grid]:
    """Return a person whose scans are to be painted, and their grid, without a cache."""
    grid, kinds = painted_grid(labels, protocol)
    person = Person(
        dataset='',
        subject='',
        name='',
        spacing_mm=tuple(grid.spacing_mm.tolist()),
        images={},
        levels={},
        sets=torch.from_numpy(sets_on(grid, labels, PROTOCOLS[protocol])),
        kinds=torch.from_numpy(kinds),
        counts=_counts(kinds),
        box=_box(np.isin(kinds, synth.CEREBRUM)),
    )
    return person, grid


def _without_specks(kinds: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fill voxels of air within tissue, which label maps have where labels met."""
    parts, _ = ndimage.label(kinds == synth.AIR)
    small = (np.bincount(parts.ravel()) < 10)[parts] & (parts > 0)
    nearest = ndimage.distance_transform_edt(
        kinds == synth.AIR, return_distances=False, return_indices=True
    )
    return np.where(small, kinds[tuple(nearest)], kinds)


def height_of(mask: NDArray[np.bool_], upwards: NDArray[np.floating]) -> float:
    """Return the lowest height in mm of a mask; `upwards` is the third row of its affine."""
    return float((np.argwhere(mask) @ upwards[:3]).min() + upwards[3])


def kinds_on(
    grid: Grid, labels: Volume, protocol: str, matrix: ArrayLike | None = None
) -> NDArray[np.uint8]:
    """Return the kind of tissue of each voxel of a grid, that of the nearest source voxel."""
    kinds = synth.kinds_of(protocol, labels.data.astype(np.int64)).astype(np.float32)
    move = np.eye(4) if matrix is None else matrix
    return resample(Volume(kinds, labels.grid), grid, move, order=0).astype(np.uint8)


def sets_on(
    grid: Grid, labels: Volume, protocol: Protocol, matrix: ArrayLike | None = None
) -> NDArray[np.uint8]:
    """Return which classes each voxel of a grid may be of, from a label map.

    The share of each set is resampled, and the largest wins. Outside of the label map nothing is
    said.

    Parameters
    ----------
    grid
        Where the sets are wanted.
    labels
        Label map on its own grid.
    protocol
        What its labels say.
    matrix
        (4, 4), RAS mm of the grid -> RAS mm of the label map; identity by default.
    """
    encoded = protocol.encode(labels.data.astype(np.int64))
    move = np.eye(4) if matrix is None else matrix
    best = np.full(grid.shape, 0.5, dtype=np.float32)
    sets = np.full(grid.shape, NOTHING, dtype=np.uint8)
    inside = resample(Volume(np.ones(encoded.shape, np.float32), labels.grid), grid, move)
    best[inside > 0.5] = 0
    for value in np.unique(encoded):
        share = resample(Volume((encoded == value).astype(np.float32), labels.grid), grid, move)
        larger = share > best
        sets[larger], best[larger] = value, share[larger]
    return sets


def cached_file(folder: Path, dataset: str, name: str, reference: str) -> Path:
    """Return where a scan is cached; `reference` is the pass of the network, or `painted`."""
    return folder / f'{dataset}_{name}_ref-{reference}.npz'


def cached_files(folder: Path, dataset: str, name: str) -> list[Path]:
    """Return what is cached of a scan."""
    return sorted(folder.glob(f'{dataset}_{name}_ref-*.npz'))


def write_person(
    path: Path,
    *,
    dataset: str,
    subject: str,
    name: str,
    grid: Grid,
    images: Mapping[str, NDArray[np.floating]],
    sets: NDArray[np.uint8] | None = None,
    kinds: NDArray[np.uint8] | None = None,
) -> None:
    """Cache one scan for :func:`read_person`; the file appears whole.

    Parameters
    ----------
    path
        The file to write, `.npz`.
    dataset, subject, name
        Whose it is.
    grid
        The model's, of all arrays.
    images
        Modality -> intensities on it. One byte resolves them finer than their noise, up to the
        99.9th percentile of the head, where normalisation cuts.
    sets
        From :func:`sets_on`; None where nothing is annotated.
    kinds
        From :func:`kinds_on`; None where nothing is painted.
    """
    arrays: dict[str, Any] = {
        'dataset': dataset,
        'subject': subject,
        'name': name,
        'spacing': grid.spacing_mm,
    }
    for modality, image in images.items():
        head = image[image > foreground(image)]
        limit = float(np.percentile(head, 99.9)) if head.size else 1.0
        arrays[f'image_{modality}'] = (image / limit * 255).round().clip(0, 255).astype(np.uint8)
    if sets is not None:
        arrays['sets'] = sets
    if kinds is not None:
        # Whatever a scan shows outside of the labels, it is not air.
        shown = [images[modality] > 0 for modality in images]
        bright = np.logical_and.reduce(shown) if shown else np.zeros(kinds.shape, bool)
        arrays['kinds'] = np.where((kinds == synth.AIR) & bright, synth.CSF, kinds)
    write_arrays(path, arrays)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write the arrays of a cached scan as they are; the file appears whole."""
    with replacing(path) as temporary, temporary.open('wb') as file:
        np.savez_compressed(file, **arrays)


def read_person(
    path: Path,
    landmarks: Mapping[str, Sequence[float]] | None = None,
    tells: Sequence[str] = (),
    *,
    loose_edges: bool = False,
) -> Person:
    """Read one file of the cache.

    Parameters
    ----------
    path
        From :func:`write_person`.
    landmarks
        Modality -> landmarks of histogram scaling (:func:`bids_jointseg.image.normalise`).
    tells
        Classes that may be told apart; all if empty.
    loose_edges
        Voxels at the border of two labels may be of either (:func:`loosen`).
    """
    with np.load(path) as stored:
        arrays = dict(stored)
    raw = {modality: arrays[key] for modality, key in _image_keys(arrays).items()}
    kinds = arrays.get('kinds')
    images, levels, means = {}, {}, {}
    for modality, image in raw.items():
        scaled = normalise(image.astype(np.float32), (landmarks or {}).get(modality))
        # Z-scores, moved so that air is 0 and the mean of the head is 1.
        mean = -float(scaled.min()) or 1.0
        scaled, level = scaled / mean + 1, (1.0, 1 / mean)
        if kinds is not None:
            white = float(np.median(scaled[kinds == synth.WHITE]))
            scaled, level = scaled / white, (1 / white, 1 / mean / white)
            means[modality] = np.array(
                [
                    np.median(scaled[kinds == kind]) if (kinds == kind).any() else np.nan
                    for kind in range(len(synth.KINDS))
                ]
            )
        images[modality] = torch.from_numpy(scaled.astype(np.float16))
        levels[modality] = level
    shape = kinds.shape if kinds is not None else next(iter(raw.values())).shape
    if kinds is not None:
        inside = np.isin(kinds, synth.CEREBRUM)
        count = _counts(kinds)
    else:
        image = next(iter(raw.values()))
        inside, count = image > foreground(image), {}
    sets = arrays.get('sets', np.full(shape, NOTHING, np.uint8))
    if tells:
        hidden = np.uint8(bits(ALL - set(tells)))
        sets = np.where(sets & hidden, sets | hidden, sets)
    if loose_edges:
        sets = loosen(sets)
    return Person(
        dataset=str(arrays['dataset']),
        subject=str(arrays['subject']),
        name=str(arrays['name']),
        spacing_mm=tuple(arrays['spacing'].tolist()),
        images=images,
        levels=levels,
        sets=torch.from_numpy(sets),
        kinds=None if kinds is None else torch.from_numpy(kinds),
        means=means,
        counts=count,
        box=_box(inside),
    )


def loosen(sets: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the sets of a label map whose borders are another convention's.

    A voxel may be what its neighbours (those that share a face) may be. Lesions stay exact, and
    what is around them is taken to lie in white matter.

    Parameters
    ----------
    sets
        Classes that each voxel may be of, uint8 (X, Y, Z).
    """
    lesion = sets == bits({'L'})
    tissue = np.where(lesion, np.uint8(bits({'WM'})), sets)
    found = tissue.copy()
    for axis in range(sets.ndim):
        here, there = found.swapaxes(0, axis), tissue.swapaxes(0, axis)
        here[1:] |= there[:-1]
        here[:-1] |= there[1:]
    return np.where(lesion, sets, found)


def _box(inside: NDArray[np.bool_]) -> np.ndarray:
    """Return the first and last voxel on each axis, `(2, 3)`."""
    spans = [np.flatnonzero(inside.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return np.array([[span[0] for span in spans], [span[-1] for span in spans]], dtype=float)


def _counts(kinds: NDArray[np.uint8]) -> dict[int, int]:
    values, counts = np.unique(kinds, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _image_keys(stored: Iterable[str]) -> dict[str, str]:
    """Return modality -> the name of its array in a file of the cache."""
    return {key.removeprefix('image_'): key for key in stored if key.startswith('image_')}


def modalities_of(path: Path) -> tuple[str, ...]:
    """Return the modalities that one file of the cache has scans of."""
    with np.load(path) as stored:
        return tuple(_image_keys(stored))


def raw_images(path: Path) -> dict[str, NDArray[np.uint8]]:
    """Return modality -> intensities of one file of the cache, to train landmarks on."""
    with np.load(path) as stored:
        return {modality: stored[key] for modality, key in _image_keys(stored).items()}


def read_mask(path: Path) -> Tensor:
    """Return a lesion mask in 1 mm MNI152 space, canonical orientation, uint8 `(X, Y, Z)`.

    Raises
    ------
    ValueError
        If the mask is on another grid.
    """
    array = np.asanyarray(nib.as_closest_canonical(nib.load(path)).dataobj) > 0
    if array.shape != MNI_SHAPE:
        raise ValueError(f'{path}: not on the 1 mm MNI152 grid {MNI_SHAPE}: {array.shape}')
    return torch.from_numpy(array.astype(np.uint8))
