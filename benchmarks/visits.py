"""How two visits of one person differ that were scanned alike: coil, contrast, noise.

    python benchmarks/visits.py BIDS_DIR OUT_DIR

`OUT_DIR` holds the app's results. For every person with two sessions and each kind of scan:

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
from calibration import MOVED_COIL, draw_coil
from numpy.typing import NDArray
from scipy import ndimage

from bids_jointseg import image
from bids_jointseg.image import Grid, Volume
from bids_jointseg.quality import INDEX, noise_level

SMOOTH_MM = 20.0


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
    move = image.register(first, second)
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
    return {
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
    for name, row in found.items():
        print(name, {key: round(value, 2) for key, value in row.items()})
    text = json.dumps(found, indent=2) + '\n'
    (options.out_dir / 'visits.json').write_text(text)


if __name__ == '__main__':
    main()
