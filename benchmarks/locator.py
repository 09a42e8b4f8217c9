"""How much of the brain the locator finds, and how much that is none.

    python benchmarks/locator.py DATA OUT [--part test|validation]

On real skull-stripped T1w with manual labels and on painted whole heads of 1 mm (T1w and FLAIR,
and each alone): how many per cent of the tissue lie where a model may find brain, and how many ml
there are more than 10 mm away from it. Prints a table and writes OUT/locator-PART.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from accuracy import INPUTS, Case, paint_heads, tissue_scans
from calibration import truth_of
from scipy import ndimage

from bids_jointseg import image
from bids_jointseg.card import read_card
from bids_jointseg.locator import find_brain
from bids_jointseg.recipe import read_recipe

FAR_MM = 10.0


def measure(case: Case, inputs: tuple[str, ...]) -> dict[str, float]:
    """Return the share of the tissue that is covered, and what is covered far from it."""
    scans = {name: image.load_scan(case.images[name]) for name in inputs}
    between = image.transforms(np.eye(4))
    passes = image.to_model_grids(scans, between, in_plane_mm=1.0, slice_mm=(1.0, 1.0), fast=True)
    ((images, grid),) = passes.values()
    seen = {name: image.normalise(data) for name, data in images.items()}
    part, _, near = find_brain(seen, grid, device='cpu')
    covered = np.zeros(grid.shape, bool)
    covered[part] = near
    labels = image.load_labels(case.annotation).grid
    known, *_ = truth_of(case, labels)
    tissue = image.resample(image.Volume((known > 0).astype(np.float32), labels), grid) > 0.5
    far = ndimage.distance_transform_edt(~tissue, sampling=grid.spacing_mm) > FAR_MM
    voxel = float(np.prod(grid.spacing_mm))
    head = images[inputs[0]] > image.foreground(images[inputs[0]])
    return {
        'covered, %': round(100 * float(covered[tissue].mean()), 3),
        'far, ml': round(float((covered & far & head).sum()) * voxel / 1000, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--part', choices=['test', 'validation'], default='validation')
    options = parser.parse_args()
    sources = {source.name: source for source in read_recipe('jointseg').datasets}
    real = tissue_scans(sources['neuromorphometrics'], options.data, options.part)
    heads = paint_heads(
        sources['heads'],
        sources['openms-mni'],
        options.data,
        options.part,
        options.out / f'heads-{options.part}',
    )
    groups = {'real T1w without skull': (real, (('T1w',),)), 'painted heads': (heads, INPUTS)}
    found = {}
    print('| scans | n | covered, %: least | mean | far, ml: most | mean |\n' + '|---' * 6 + '|')
    for what, (cases, every) in groups.items():
        for inputs in every:
            rows = [measure(case, inputs) for case in cases.values()]
            covered, far = ([row[name] for row in rows] for name in rows[0])
            name = f'{what}, {"+".join(inputs)}'
            found[name] = {
                'scans': len(rows),
                'covered, %: least': min(covered),
                'mean': round(float(np.mean(covered)), 3),
                'far, ml: most': max(far),
                'far, mean': round(float(np.mean(far)), 1),
            }
            print('| ' + ' | '.join(map(str, (name, *found[name].values()))) + ' |', flush=True)
    card = read_card('locator')
    command = f'python benchmarks/locator.py DATA OUT --part {options.part}'
    record = {'command': command, 'weights': card.sha256, **found}
    (options.out / f'locator-{options.part}.json').write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
    main()
