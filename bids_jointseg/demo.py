"""A small synthetic BIDS dataset, segmented: ``jointseg-demo OUT_DIR``.

The anatomy is the ICBM152 2009 average brain that nilearn ships, so nothing is downloaded. An
average is symmetric, blurred and has no head, so each subject gets

- a smooth random deformation (size, asymmetry, wider ventricles with age) and some sharpening;
- cerebrospinal fluid, skull, scalp, eyes, air and neck, built from the distance to the brain;
- white-matter lesions beside the ventricles and in the deep white matter, bright on FLAIR and
  dark on T1w;
- for each scan, its own pose in the scanner, bias field, noise and slice thickness.

FLAIR contrast is a function of T1w contrast: fluid dark, gray matter above white matter. The
images are good enough to show every part of the app at work, and no more: accuracy is measured
on real scans. The true lesion masks are written beside the raw dataset, under the names that the
app gives its own.

References
----------
Fonov et al., Unbiased average age-appropriate atlases for pediatric studies, NeuroImage 54
(2011). Fonov et al., Unbiased nonlinear average age-appropriate brain templates from birth to
adulthood, NeuroImage 47 (2009).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from nibabel.affines import apply_affine, from_matvec
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_jointseg import __version__, image

if TYPE_CHECKING:
    from collections.abc import Sequence

    import nibabel as nib
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

LOGGER = logging.getLogger('bids_jointseg')

# Intensities of what surrounds the brain, relative to it: T1w (fat is bright), FLAIR (fat is
# saturated). The last one is air.
FLUID, BONE, MARROW, MUSCLE, FAT, SKIN, AIR = range(7)
T1W = np.array([0.20, 0.06, 0.55, 0.48, 1.15, 0.60, 0.00], np.float32)
FLAIR = np.array([0.08, 0.04, 0.22, 0.34, 0.42, 0.36, 0.00], np.float32)


@dataclass(frozen=True)
class Subject:
    """Who is scanned. ``lesions``: how many beside the ventricles and in the deep white matter."""

    name: str
    age: int
    sex: str
    group: str
    lesions: tuple[int, int]


@dataclass(frozen=True)
class Acquisition:
    """One scan: how the head lies, how the slices lie, what the file looks like.

    ``pose`` is the head's rotation about x, y, z (degrees) and shift (mm); ``tilt`` the rotation
    of the slices about x (degrees); ``axes`` the orientation of the stored array; ``growth``
    scales the lesions' radii.
    """

    subject: str
    session: str | None
    modality: str
    pose: tuple[float, float, float, float, float, float]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    tilt: float = 0
    axes: str = 'RAS'
    growth: float = 1

    @property
    def stem(self) -> str:
        """The scan's BIDS name without suffix."""
        session = f'_ses-{self.session}' if self.session else ''
        return f'sub-{self.subject}{session}'

    @property
    def folder(self) -> Path:
        """The scan's folder inside a dataset."""
        session = [f'ses-{self.session}'] if self.session else []
        return Path(f'sub-{self.subject}', *session, 'anat')


SUBJECTS = (
    Subject('01', 58, 'F', 'patient', (9, 14)),
    Subject('02', 34, 'M', 'control', (0, 0)),
    Subject('03', 71, 'M', 'patient', (12, 10)),
)

_3D = ((184, 232, 192), (1, 1, 1))
_2D = ((192, 232, 50), (1, 1, 3))

# Three situations: T1w with a FLAIR that the patient moved before; T1w alone; FLAIR alone, twice.
# Arrays are stored as scanners' converters leave them: sagittal, LAS, oblique.
ACQUISITIONS = (
    Acquisition('01', None, 'T1w', (3, -1, 2, 1, -3, 2), *_3D, axes='PSR'),
    Acquisition('01', None, 'FLAIR', (-2, 2, -3, 4, 1, -3), *_2D, tilt=8, axes='LAS'),
    Acquisition('02', None, 'T1w', (-2, 1, -4, 0, 2, 1), *_3D, axes='LAS'),
    Acquisition('03', '1', 'FLAIR', (1, 2, 2, -2, 0, 1), *_2D, tilt=12),
    Acquisition('03', '2', 'FLAIR', (4, -2, -1, 3, 2, -2), *_2D, tilt=5, growth=1.15),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the dataset, run participant and group on it, say where the reports are.

    Returns the exit code of the last run; group does not follow a participant run that failed.
    """
    parser = argparse.ArgumentParser(
        prog='jointseg-demo',
        description='Make a small synthetic BIDS dataset from the ICBM152 template (nothing is '
        'downloaded) and run jointseg on it. Unknown options are handed to jointseg.',
    )
    parser.add_argument('out_dir', type=Path, help='folder to create')
    parser.add_argument('--only-data', action='store_true', help='make the dataset, run nothing')
    parser.add_argument('--seed', type=int, default=0, help='random seed (default: %(default)s)')
    options, rest = parser.parse_known_args(argv)
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S')
    LOGGER.setLevel(logging.INFO)

    out_dir = options.out_dir.resolve()
    bids_dir, derivatives = out_dir / 'bids', out_dir / 'derivatives'
    make_dataset(bids_dir, out_dir / 'truth', seed=options.seed)
    if options.only_data:
        return 0

    from bids_jointseg import cli

    for level in ('participant', 'group'):
        command = [str(bids_dir), str(derivatives), level, '-w', str(out_dir / 'work'), *rest]
        LOGGER.info('jointseg %s', ' '.join(command))
        if code := cli.main(command):
            return int(code)
    LOGGER.info('Reports:')
    for report in sorted(derivatives.glob('*.html')):
        sys.stdout.write(f'{report}\n')
    return 0


def make_dataset(bids_dir: Path, truth_dir: Path, *, seed: int = 0) -> None:
    """Write the raw dataset and, as a derivative, its true lesion masks.

    The same seed gives the same bytes. Existing scans are overwritten.
    """
    _describe(bids_dir, truth_dir)
    LOGGER.info('Building a head around the ICBM152 template')
    template = _template()
    heads: dict[str, Head] = {}
    for number, scan in enumerate(ACQUISITIONS):
        if scan.subject not in heads:
            index = [subject.name for subject in SUBJECTS].index(scan.subject)
            rng = np.random.default_rng([seed, index])
            heads = {scan.subject: deform(template, SUBJECTS[index], rng)}
        LOGGER.info('Scanning %s_%s', scan.stem, scan.modality)
        rng = np.random.default_rng([seed, len(SUBJECTS) + number])
        intensity, lesion, grid = acquire(heads[scan.subject], scan, rng)
        anat = bids_dir / scan.folder
        anat.mkdir(parents=True, exist_ok=True)
        image.save(anat / f'{scan.stem}_{scan.modality}.nii.gz', intensity, grid, dtype=np.int16)

        paired = scan.modality == 'FLAIR' and any(
            other.stem == scan.stem and other.modality == 'T1w' for other in ACQUISITIONS
        )
        space = '_space-FLAIR' if paired else ''
        anat = truth_dir / scan.folder
        anat.mkdir(parents=True, exist_ok=True)
        mask = anat / f'{scan.stem}{space}_label-L_mask'
        image.save(mask.with_suffix('.nii.gz'), lesion, grid, dtype=np.uint8)
        source = f'bids:raw:{(scan.folder / f"{scan.stem}_{scan.modality}.nii.gz").as_posix()}'
        sidecar: dict[str, object] = {
            'Description': 'True lesions',
            'Type': 'Lesion',
            'Sources': [source],
        }
        if space:
            sidecar['SpatialReference'] = source
        _write_json(mask.with_suffix('.json'), sidecar)


@dataclass(frozen=True, eq=False)
class Head:
    """A head in its own space: arrays (X, Y, Z) on one 1 mm grid.

    ``t1w`` and ``flair`` are noise-free intensities with white matter near 0.87 and 0.75;
    ``lesions`` are the signed distances (in units of each lesion's radius, negative inside) to
    the nearest lesion.
    """

    grid: image.Grid
    t1w: Array
    flair: Array
    lesions: Array


@dataclass(frozen=True, eq=False)
class Template:
    """The average head: arrays (X, Y, Z) on one 1 mm grid in MNI space.

    ``brain`` is the T1w intensity, ``inside`` how much of a voxel is brain, ``t1w`` and ``flair``
    the intensities of everything around it.
    """

    grid: image.Grid
    brain: Array
    inside: Array
    white: Array
    ventricles: Array
    t1w: Array
    flair: Array


def _template() -> Template:
    """Read the template from nilearn's package data and build a head around it."""
    from nilearn.datasets import load_mni152_template, load_mni152_wm_template

    loaded = load_mni152_template(resolution=1)
    # Room for nose and neck, less air elsewhere; below its last slice the cord goes on.
    below, front, air = 28, 16, 7
    affine = loaded.affine @ from_matvec(np.eye(3), (air, air, -below))

    def frame(volume: nib.Nifti1Image) -> Array:
        data = volume.get_fdata(dtype=np.float32)[air:-air, air:, :-air]
        return np.pad(data, ((0, 0), (0, front), (below, 0)))

    brain, white = frame(loaded), frame(load_mni152_wm_template(resolution=1))
    brain[:, :, :below] = brain[:, :, below : below + 1]
    grid = image.Grid(brain.shape, affine)
    x, y, z = _coordinates(grid)

    mask = ndimage.binary_fill_holes(brain > 0.1)
    deep = (brain < 0.45) & mask & (np.abs(x) < 40) & (np.abs(y + 8) < 55) & (np.abs(z - 11) < 24)
    labels, _ = ndimage.label(ndimage.binary_opening(deep))
    ventricles = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    materials = _materials(mask, grid)
    return Template(
        grid=grid,
        brain=np.where(mask, np.maximum(brain, T1W[FLUID]), T1W[FLUID]).astype(np.float32),
        inside=_smooth(mask, 0.7),
        white=white,
        ventricles=ventricles.astype(np.float32),
        t1w=_smooth(T1W[materials], 0.6),
        flair=_smooth(FLAIR[materials], 0.6),
    )


def _materials(brain: NDArray[np.bool_], grid: image.Grid) -> NDArray[np.int64]:
    """Say what each voxel around the brain is made of: an index into T1W and FLAIR.

    Ellipsoids in MNI mm stand for face, neck, eyes and sinuses; the rest follows from the
    distance to the smoothed brain and from the depth below the skin.
    """
    rng = np.random.default_rng(152)
    x, y, z = _coordinates(grid)

    def ellipsoid(centre: Sequence[float], radii: Sequence[float]) -> NDArray[np.bool_]:
        (a, b, c), (i, j, k) = centre, radii
        return np.asarray(((abs(x) - a) / i) ** 2 + ((y - b) / j) ** 2 + ((z - c) / k) ** 2 < 1)

    # Closing by 9 mm: fissures and the gap under the cerebrum lie inside the skull.
    hull = ndimage.distance_transform_edt(ndimage.distance_transform_edt(~brain) < 9) > 9
    outside = ndimage.distance_transform_edt(~hull).astype(np.float32)
    inner = outside - 2.5
    outer = inner - 6.5 - 0.8 * _noise(grid.shape, 30, rng)
    scalp = outer - 5 - 0.7 * _noise(grid.shape, 30, rng)
    neck = (((x / 58) ** 2 + ((y + 28) / 62) ** 2) < 1) & (z < -45)
    face = ellipsoid((0, 28, -72), (66, 62, 66)) | ellipsoid((0, 84, -60), (10, 18, 20))
    head = _smooth((scalp < 0) | neck | face, 3) > 0.5
    depth = ndimage.distance_transform_edt(head) + 0.7 * _noise(grid.shape, 12, rng)

    material = np.full(grid.shape, MUSCLE)
    material[_noise(grid.shape, 5, rng) > 1.1] = FAT
    material[ellipsoid((33, 52, -38), (19, 24, 17))] = FAT
    skull = (inner > 0) & (outer < 0) & ((z > -58) | (abs(x) < 34))
    material[skull] = BONE
    third = (outer - inner) / 3
    material[skull & (inner > -third) & (outer < third)] = MARROW
    material[inner <= 0] = FLUID
    material[depth < 5.5] = FAT
    material[depth < 1.8] = SKIN
    around = outer > 0
    material[ellipsoid((33, 58, -38), (13, 13, 13)) & around] = FLUID
    for centre, radii in (
        ((0, 62, -62), (9, 19, 16)),
        ((27, 56, -72), (11, 13, 12)),
        ((0, 18, -88), (11, 9, 24)),
    ):
        material[ellipsoid(centre, [r + 1.5 for r in radii]) & around] = BONE
        material[ellipsoid(centre, radii) & around] = AIR
    material[~head] = AIR
    return material


def deform(template: Template, subject: Subject, rng: np.random.Generator) -> Head:
    """One subject's head: the template through a smooth deformation, then contrast and lesions."""
    grid = template.grid
    x = np.stack(np.broadcast_arrays(*_coordinates(grid)))
    scale = rng.normal(1, 0.025, 3)[:, None, None, None]
    wide = _smooth(template.ventricles, 6)
    slope = np.stack([np.gradient(wide, axis=axis) for axis in range(3)])
    # Moving the sampling points up the slope widens the ventricles; fluid fills up with age.
    widening = 2.5 * (subject.age - 30) / 40 * slope / np.abs(slope).max()
    # Large waves shape the head, small ones only the gyri.
    folds = _smooth(template.inside, 4)
    shift = np.stack(
        [
            3.5 * _noise(grid.shape, 64, rng)
            + folds * (1.5 * _noise(grid.shape, 30, rng) + 0.9 * _noise(grid.shape, 12, rng))
            for _ in range(3)
        ]
    )
    centre = np.array([0, -18, 5])[:, None, None, None]
    points = (x - centre) / scale + centre + shift + widening
    points = apply_affine(np.linalg.inv(grid.affine), np.moveaxis(points, 0, -1))
    points = np.moveaxis(points, -1, 0).astype(np.float32)

    def warp(volume: Array) -> Array:
        return np.asarray(ndimage.map_coordinates(volume, points, order=1), np.float32)

    brain = warp(template.brain)
    # An average is smoother than anyone; unsharp masking brings back some edges.
    brain = np.clip(brain + 1.0 * (brain - _smooth(brain, 1.5)), 0.15, 0.97)
    inside = warp(template.inside)
    mottle = 1 + 0.05 * _noise(grid.shape, 3, rng)
    contrast = np.interp(
        brain, (0.15, 0.30, 0.55, 0.66, 0.86, 0.97), (0.06, 0.14, 0.62, 0.98, 0.76, 0.70)
    ).astype(np.float32)
    t1w = inside * brain + (1 - inside) * mottle * warp(template.t1w)
    flair = inside * contrast + (1 - inside) * mottle * warp(template.flair)
    lesions = _lesions(warp(template.white), warp(template.ventricles) > 0.5, subject, grid, rng)
    return Head(grid, t1w.astype(np.float32), flair.astype(np.float32), lesions)


def _lesions(
    white: Array,
    ventricles: NDArray[np.bool_],
    subject: Subject,
    grid: image.Grid,
    rng: np.random.Generator,
) -> Array:
    """Distance to the nearest lesion, in its radii minus 1.

    Ellipsoids with uneven surfaces; beside the ventricles they are larger and lie across the wall
    (Dawson's fingers), and a rim of uneven width joins some of them.
    """
    x, y, z = _coordinates(grid)
    if not any(subject.lesions):
        return np.full(grid.shape, np.inf, np.float32)
    away = ndimage.distance_transform_edt(~ventricles).astype(np.float32)
    cerebrum = (white > 0.75) & (z > -12) & (abs(y + 15) < 75) & (abs(x) > 10)
    uneven = 0.45 * _noise(grid.shape, 4, rng)
    distance = away / np.maximum(0.5 + 1.6 * _noise(grid.shape, 20, rng), 0.1) - 1
    places = ((away > 2) & (away < 6), (away > 9) & (away < 30) & (z > 5))
    for place, count, size in zip(places, subject.lesions, (3.6, 2.4), strict=True):
        candidates = np.argwhere(cerebrum & place)
        for centre in rng.permutation(candidates)[:count]:
            radius = size * np.exp(rng.normal(0, 0.3))
            low = np.maximum(centre - 15, 0)
            box = tuple(slice(a, b) for a, b in zip(low, centre + 16, strict=True))
            across = np.array([slope[tuple(centre - low)] for slope in np.gradient(away[box])])
            across /= np.linalg.norm(across) + 1e-6
            stretch = rng.uniform(1.2, 1.9)
            offset = np.moveaxis(np.mgrid[box], 0, -1) - centre
            along = offset @ across
            round_ = np.sqrt((offset**2).sum(-1) + along**2 * (stretch**-2 - 1))
            distance[box] = np.minimum(distance[box], round_ / radius + uneven[box] - 1)
    # Lesions stay in the white matter.
    return np.maximum(distance, (0.5 - white) * 4).astype(np.float32)


def acquire(
    head: Head, scan: Acquisition, rng: np.random.Generator
) -> tuple[Array, Array, image.Grid]:
    """Scan a head: intensities 0..about 1200 (X, Y, Z), true lesion mask, and their grid.

    Order as in a scanner: tissue contrast, pose, partial volume of the slices, receive bias,
    Rician noise.
    """
    # Radii grow, so distances in units of the radius shrink.
    lesion = np.clip(0.5 - 3 * ((head.lesions + 1) / scan.growth - 1), 0, 1)
    tissue, bright = (head.t1w, 0.56) if scan.modality == 'T1w' else (head.flair, 1.32)
    tissue = tissue + lesion * (bright - tissue)

    grid = _grid(scan)
    world_to_head = np.linalg.inv(_rigid(scan.pose))
    tissue = image.resample(image.Volume(tissue, head.grid), grid, world_to_head)
    lesion = image.resample(image.Volume(lesion, head.grid), grid, world_to_head)
    bias = np.exp(0.12 * _noise(grid.shape, 70 / np.array(grid.spacing_mm), rng))
    # Thicker slices collect more signal: the same noise per mm3.
    sigma = 0.035 / np.sqrt(np.prod(scan.spacing_mm) ** 0.5)
    real, imaginary = rng.normal(0, sigma, (2, *grid.shape))
    intensity = 900 * np.hypot(tissue * bias + real, imaginary)
    return intensity.astype(np.float32), (lesion > 0.5).astype(np.float32), grid


def _grid(scan: Acquisition) -> image.Grid:
    """Lay the scan's voxels: centred on the head, slices tilted, axes as the file stores them."""
    affine = np.diag([*scan.spacing_mm, 1.0])
    affine[:3, :3] = Rotation.from_euler('x', scan.tilt, degrees=True).as_matrix() @ affine[:3, :3]
    centre = np.array([0, -16, 8 if scan.modality == 'FLAIR' else 0])
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(scan.shape) - 1) / 2)
    reorient = ornt_transform(axcodes2ornt('RAS'), axcodes2ornt(scan.axes))
    i, j, k = (int(scan.shape[axis]) for axis in np.argsort(reorient[:, 0]))
    return image.Grid((i, j, k), affine @ inv_ornt_aff(reorient, scan.shape))


def _rigid(pose: Sequence[float]) -> NDArray[np.float64]:
    """Matrix (4, 4), mm to mm, of rotations about x, y, z in degrees, then shifts in mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler('xyz', pose[:3], degrees=True).as_matrix()
    matrix[:3, 3] = pose[3:]
    return matrix


def _coordinates(grid: image.Grid) -> list[NDArray[np.float32]]:
    """Open mesh of world coordinates in mm, for a grid whose axes are those of the world."""
    affine = grid.affine
    axes = [affine[i, 3] + affine[i, i] * np.arange(n) for i, n in enumerate(grid.shape)]
    return list(np.meshgrid(*(a.astype(np.float32) for a in axes), indexing='ij', sparse=True))


def _noise(
    shape: Sequence[int], size: float | NDArray[np.float64], rng: np.random.Generator
) -> Array:
    """Smooth random field (X, Y, Z) of mean 0 and variance 1: a cubic B-spline of white noise.

    `size` is the distance of its knots in voxels.
    """
    weights = []
    for n, step in zip(shape, np.broadcast_to(size, 3), strict=True):
        position = np.arange(n) / step + 1
        t = np.abs(position[:, None] - np.arange(int(position[-1]) + 3))
        weights.append(np.where(t < 1, 4 - 6 * t**2 + 3 * t**3, np.clip(2 - t, 0, None) ** 3) / 6)
    lattice = rng.normal(0, (315 / 151) ** 1.5, [w.shape[1] for w in weights])
    return np.einsum('ai,bj,ck,ijk->abc', *weights, lattice, optimize=True).astype(np.float32)


def _smooth(volume: NDArray, sigma: float) -> Array:
    """Gaussian smoothing, sigma in voxels, in float32."""
    return ndimage.gaussian_filter(np.asarray(volume, np.float32), sigma)


def _describe(bids_dir: Path, truth_dir: Path) -> None:
    """Write everything of both datasets that is not an image or its sidecar."""
    bids_dir.mkdir(parents=True, exist_ok=True)
    truth_dir.mkdir(parents=True, exist_ok=True)
    common = {
        'BIDSVersion': '1.10.0',
        'License': 'Permission to use, copy, modify and distribute, as given for the template',
        'Authors': ['The bids_jointseg developers'],
        'ReferencesAndLinks': ['https://doi.org/10.1016/j.neuroimage.2010.07.033'],
        'HowToAcknowledge': 'Fonov et al., NeuroImage 54 (2011) 313-327, for the ICBM152 template',
    }
    generated = [{'Name': 'bids_jointseg', 'Version': __version__, 'Description': 'jointseg-demo'}]
    _write_json(
        bids_dir / 'dataset_description.json',
        {'Name': 'Synthetic demonstration of jointseg', **common, 'DatasetType': 'raw'},
    )
    _write_json(
        truth_dir / 'dataset_description.json',
        {
            'Name': 'Synthetic demonstration of jointseg: true lesions',
            **common,
            'DatasetType': 'derivative',
            'GeneratedBy': generated,
            'DatasetLinks': {'raw': Path('..', bids_dir.name).as_posix()},
        },
    )
    (bids_dir / 'README').write_text(README)
    (truth_dir / 'README').write_text(TRUTH)
    rows = ['participant_id\tage\tsex\tgroup']
    rows += [f'sub-{s.name}\t{s.age}\t{s.sex}\t{s.group}' for s in SUBJECTS]
    (bids_dir / 'participants.tsv').write_text('\n'.join(rows) + '\n')
    _write_json(bids_dir / 'participants.json', COLUMNS)
    # Metadata at the top apply to every scan of the suffix (BIDS' inheritance principle).
    _write_json(bids_dir / 'T1w.json', {**SCANNER, **PROTOCOLS['T1w']})
    _write_json(bids_dir / 'FLAIR.json', {**SCANNER, **PROTOCOLS['FLAIR']})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n')


README = """\
# Synthetic demonstration of jointseg

Made by jointseg-demo from the ICBM152 2009 nonlinear symmetric T1w template. The people, their
ages, their skulls, their scanner and their lesions are invented; every image is computed.

sub-01 has T1w and FLAIR (and moved between them), sub-02 T1w only, sub-03 FLAIR only, in two
sessions between which the lesions grew.

The template: Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal
Neurological Institute, McGill University. Permission to use, copy, modify, and distribute this
software and its documentation for any purpose and without fee is hereby granted, provided that
the above copyright notice appear in all copies. The authors and McGill University make no
representations about the suitability of this software for any purpose. It is provided "as is"
without express or implied warranty.
"""

TRUTH = """\
# True lesions of the synthetic demonstration

One mask per scan of the raw dataset, on the grid of that scan, under the name that jointseg gives
to its own mask of the same scan. A voxel belongs to a lesion when more than half of it does.
"""

COLUMNS: dict[str, object] = {
    'age': {'Description': 'Invented age', 'Units': 'year'},
    'sex': {'Description': 'Invented sex', 'Levels': {'F': 'female', 'M': 'male'}},
    'group': {
        'Description': 'Whether the images contain lesions',
        'Levels': {'patient': 'with lesions', 'control': 'without lesions'},
    },
}

SCANNER: dict[str, object] = {
    'Manufacturer': 'none: synthetic images',
    'MagneticFieldStrength': 3,
    'BodyPart': 'HEAD',
}

PROTOCOLS: dict[str, dict[str, object]] = {
    'T1w': {
        'PulseSequenceType': 'Gradient Recalled Inversion Recovery',
        'MRAcquisitionType': '3D',
        'SliceThickness': 1,
        'RepetitionTime': 2.3,
        'EchoTime': 0.003,
        'InversionTime': 0.9,
        'FlipAngle': 9,
    },
    'FLAIR': {
        'PulseSequenceType': 'Spin Echo Inversion Recovery',
        'MRAcquisitionType': '2D',
        'SliceThickness': 3,
        'RepetitionTime': 9,
        'EchoTime': 0.12,
        'InversionTime': 2.5,
        'FlipAngle': 150,
    },
}
