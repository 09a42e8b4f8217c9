"""What an uneven coil costs, and what evening it out brings back.

    python benchmarks/coil.py DATA OUT [--model NAME_OR_CARD]

The T1w of the recipe's validation people (real ones, skull-stripped, manual labels) are multiplied
by smooth fields whose logarithm has a standard deviation of 0 to 40 % over the brain, and
segmented as they are and as the app does it: what is more uneven than `coil.UNEVEN` is evened
out and looked at again. One pass without mirror image. Prints mean Dice of tissue in per cent and
by how much the volume of white matter differs from that of the labels, means over people, and
writes OUT/coil.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from accuracy import Case, tissue_scans, true_labels
from calibration import segment
from numpy.typing import NDArray

from bids_jointseg import coil, image
from bids_jointseg.card import read_card
from bids_jointseg.image import Volume
from bids_jointseg.labels import TISSUES
from bids_jointseg.metrics import dice
from bids_jointseg.network import load_model
from bids_jointseg.quality import INDEX
from bids_jointseg.recipe import read_recipe
from bids_jointseg.synth import smooth_field

SPREADS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
"""Standard deviations over the brain."""
CELL_MM = 60.0


def through_a_coil(scan: Volume, brain: NDArray[np.bool_], spread: float, seed: int) -> Volume:
    """Return a scan as a coil gives it whose sensitivity varies by so much over the brain."""
    generator = torch.Generator().manual_seed(seed)
    cell = CELL_MM / float(scan.grid.spacing_mm.min())
    field = smooth_field(scan.data.shape, cell, generator).numpy()
    field *= spread / field[brain].std()
    return Volume((scan.data * np.exp(field)).astype(np.float32), scan.grid)


def scores(found: NDArray[np.uint8], truth: NDArray[np.uint8]) -> tuple[float, float]:
    """Return the mean Dice of tissues, and the error of the volume of white matter, per cent."""
    overlaps = dice(found, truth)
    ours, theirs = ((labels == INDEX['WM']).sum() for labels in (found, truth))
    tissue = float(np.mean([overlaps[name] for name in TISSUES]))
    return tissue, float(100 * (ours / theirs - 1))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--model', default='jointseg')
    options = parser.parse_args()
    (source,) = (s for s in read_recipe('jointseg').datasets if s.name == 'neuromorphometrics')
    cases: list[Case] = list(tissue_scans(source, options.data, 'validation').values())
    card = read_card(options.model)
    network = load_model(card)
    record = []
    print('| SD of the coil, % | as it is: tissue | WM, % | evened out: tissue | WM, % |')
    print('|---:|---:|---:|---:|---:|')
    for number, spread in enumerate(SPREADS):
        rows = []
        for case in cases:
            truth = true_labels(case)
            scan = image.load_scan(case.images['T1w'])
            brain = (truth > 0) & (truth < 255)
            bent = {'T1w': through_a_coil(scan, brain, spread, seed=number)}
            row: list[float] = []
            for limit in (np.inf, coil.UNEVEN):
                with patch.object(coil, 'UNEVEN', limit):
                    joint, _ = segment(
                        network, card, bent, image.transforms(np.eye(4)), mirror=False
                    )
                row += scores(image.label_map(joint), truth)
            rows.append(row)
        record.append({'spread': spread, 'people': rows})
        cells = np.mean(rows, axis=0)
        shown = ' | '.join(f'{x:+.1f}' if k % 2 else f'{x:.2f}' for k, x in enumerate(cells))
        print(f'| {100 * spread:.0f} | {shown} |', flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / 'coil.json').write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
    main()
