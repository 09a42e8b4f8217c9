"""How two visits of one person differ that were scanned alike: place, coil, contrast, noise.

    python benchmarks/visits.py BIDS_DIR OUT_DIR

`OUT_DIR` holds the app's results. For every person with two sessions and each kind of scan:

- place: by how many degrees the head is turned in the second scan against the first, by how many
  millimetres its middle is moved against that of the field of view, and by what share an affine
  stretches an axis on its way to the other scan (root of the mean square over axes; the mean of
  both ways). The same of pairs that `calibration.py` draws (root of the mean square);
- coil: the logarithm of how bright white matter is in the second visit against the first, smoothed
  by a Gaussian of 20 mm; its standard deviation over the brain. The same is measured of pairs
  of `calibration.py`'s coils;
- contrast: the exponent that turns the brightness of cortex, against that of white matter, in the
  first visit into that of the second;
- noise: that of quality control, per cent of the brightness of white matter.

Writes OUT_DIR/visits.json.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from calibration import MOVED_COIL, draw_coil, draw_place
from numpy.typing import NDArray
from scipy import ndimage
from scipy.linalg import polar
from scipy.spatial.transform import Rotation

from bids_jointseg import image, registration
from bids_jointseg.image import Grid, Volume
from bids_jointseg.quality import INDEX, noise_level

SMOOTH_MM = 20.0
PAIRS = 1000
"""That are drawn."""


def place(move: NDArray[Any], first: Grid, second: Grid, centre: NDArray[Any]) -> NDArray[Any]:
    """Return where the head of one scan lies in the axes of another, about the middles (4, 4).

    Parameters
    ----------
    move
        (4, 4), RAS mm of the first -> RAS mm of the second.
    first, second
        Their grids.
    centre
        Of the head in the first, RAS mm (3,).
    """
    axes, middles = [], []
    for grid in (first, second):
        axes.append(grid.affine[:3, :3] / grid.spacing_mm)
        middles.append(grid.middle)
    there = move[:3, :3] @ centre + move[:3, 3]
    found = np.eye(4)
    found[:3, :3] = axes[1].T @ move[:3, :3] @ axes[0]
    found[:3, 3] = axes[1].T @ (there - middles[1]) - axes[0].T @ (centre - middles[0])
    return found


def how_far(places: NDArray[Any]) -> tuple[float, float]:
    """Return degrees and millimetres of places (n, 4, 4), root of the mean square over them."""
    turns = [Rotation.from_matrix(polar(matrix[:3, :3])[0]).magnitude() for matrix in places]
    moves = np.linalg.norm(places[:, :3, 3], axis=1)
    degrees, millimetres = (np.sqrt(np.mean(np.square(x))) for x in (np.rad2deg(turns), moves))
    return float(degrees), float(millimetres)


def stretches(first: Volume, second: Volume, move: NDArray[Any]) -> NDArray[Any]:
    """Return by which factor an affine stretches each axis of the first scan (3,)."""
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(move[:3, :3].ravel().tolist())
    affine.SetTranslation(move[:3, 3].tolist())
    run = registration.mutual_information(0.1, seed=0)
    run.SetOptimizerAsGradientDescent(1.0, 200, 1e-6, 10, run.Never, 0.1)
    run.SetOptimizerScalesFromPhysicalShift()
    run.SetInitialTransform(affine, inPlace=True)
    run.Execute(*(registration.sitk_image(registration.clamped(scan)) for scan in (first, second)))
    found = np.array(affine.GetMatrix()).reshape(3, 3)
    return np.linalg.norm(found @ first.grid.affine[:3, :3] / first.grid.spacing_mm, axis=0)


def spread(log_ratio: NDArray[Any], known: NDArray[Any], brain: NDArray[Any], grid: Grid) -> float:
    """Return the SD over the brain of a ratio that is known in some of its voxels, per cent."""
    sigma = SMOOTH_MM / grid.spacing_mm
    weight = ndimage.gaussian_filter(known.astype(np.float32), sigma)
    smooth = ndimage.gaussian_filter(np.where(known, log_ratio, 0).astype(np.float32), sigma)
    return 100 * float((smooth / np.maximum(weight, 1e-6))[brain].std())


def compare(one: tuple[Volume, Volume], other: tuple[Volume, Volume]) -> dict[str, float]:
    """Return how a scan differs from another of its kind, each with its label map."""
    (first, labels), (second, second_labels) = one, other
    grid = first.grid
    move = registration.register(first, second)
    there = image.resample(second, grid, move)

    def in_both(name: str) -> NDArray[np.bool_]:
        that = Volume((second_labels.data == INDEX[name]).astype(np.float32), second.grid)
        both = (labels.data == INDEX[name]) & (image.resample(that, grid, move) > 0.9)
        return np.asarray(both & (first.data > 0) & (there > 0))

    white, cortex = in_both('WM'), in_both('CGM')
    ratio = np.log(np.where(white, there, 1) / np.where(white, first.data, 1))
    ratio -= np.median(ratio[white])
    gray = [np.median(data[cortex]) / np.median(data[white]) for data in (first.data, there)]
    brain, inner = labels.data > 0, ndimage.binary_erosion(labels.data == INDEX['WM'])
    rng = np.random.default_rng(0)
    drawn = [np.log(draw_coil(grid.shape, MOVED_COIL, rng)) for _ in range(2)]
    voxel = np.argwhere(brain).mean(axis=0)
    centre = (grid.affine @ (*voxel, 1))[:3]
    degrees, millimetres = how_far(place(move, grid, second.grid, centre)[None])
    there_and_back = stretches(first, second, move), stretches(second, first, np.linalg.inv(move))
    factors = np.sqrt(there_and_back[0] / there_and_back[1])
    return {
        'turned, degrees': degrees,
        'moved, mm': millimetres,
        'stretched, %': 100 * float(np.sqrt(np.mean(np.log(factors) ** 2))),
        'coil, SD %': spread(ratio, white, brain, grid),
        'coils that are drawn, SD %': spread(drawn[1] - drawn[0], brain, brain, grid),
        'contrast, exponent': float(np.log(gray[1]) / np.log(gray[0])),
        'noise, %': 100 * noise_level(first, inner) / float(np.median(first.data[inner])),
    }


def main() -> None:
    """Compare all pairs of visits."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('bids_dir', type=Path)
    parser.add_argument('out_dir', type=Path)
    options = parser.parse_args()

    def read(labels: Path, space: str, suffix: str) -> tuple[str, tuple[Volume, Volume]]:
        """Return the name of a scan, and the scan with its label map."""
        name = f'{labels.name.partition(f"{space}_seg-")[0]}_{suffix}'
        folder = options.bids_dir / labels.parent.relative_to(options.out_dir)
        scan = image.load_scan(folder / f'{name}.nii.gz')
        return name, (scan, image.load_labels(labels))

    found = {}
    for suffix, space in (('T1w', ''), ('FLAIR', '_space-FLAIR')):
        for person in sorted(options.out_dir.glob('sub-*/')):
            maps = sorted(person.glob(f'ses-*/anat/*[0-9]{space}_seg-jointseg_dseg.nii.gz'))
            for pair in pairwise(maps):
                (first, one), (second, other) = (read(path, space, suffix) for path in pair)
                found[f'{first} and {second}'] = compare(one, other)
    rng = np.random.default_rng(0)
    drawn = [np.linalg.inv(draw_place(rng)) @ draw_place(rng) for _ in range(PAIRS)]
    degrees, millimetres = how_far(np.array(drawn))
    stretch = [np.log(np.linalg.norm(matrix[:3, :3], axis=0)) for matrix in drawn]
    found['places that are drawn'] = {
        'turned, degrees': degrees,
        'moved, mm': millimetres,
        'stretched, %': 100 * float(np.sqrt(np.mean(np.square(stretch)))),
    }
    for name, row in found.items():
        print(name, {key: round(value, 2) for key, value in row.items()})
    text = json.dumps(found, indent=2) + '\n'
    (options.out_dir / 'visits.json').write_text(text)


if __name__ == '__main__':
    main()
