"""How far volumes depend on where windows lie across the slices.

    python benchmarks/windows.py DATA OUT [--model NAME_OR_CARD]

The recipe's validation people (T1w, skull-stripped, manual labels) on the model's grid, with 0, 5,
10 or 16 slices of air put below, which changes nothing but where windows lie. Prints how far each
volume is from that of the manual labels, and over the places its standard deviation (root of the
mean square over people) and the mean Dice, all in per cent, and writes OUT/windows.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from accuracy import tissue_scans
from calibration import truth_of
from numpy.typing import NDArray
from torch.nn import Module

from bids_jointseg import image
from bids_jointseg.card import ModelCard, read_card
from bids_jointseg.image import Grid
from bids_jointseg.inference import combine, predict
from bids_jointseg.labels import CLASSES, TISSUES
from bids_jointseg.metrics import dice_of
from bids_jointseg.network import load_model
from bids_jointseg.recipe import read_recipe

SLICES = (0, 5, 10, 16)
CHANNELS = [CLASSES.index(name) for name in TISSUES]


def segmented(
    network: Module, card: ModelCard, seen: NDArray[np.float32], grid: Grid, to: Grid, below: int
) -> NDArray[np.intp]:
    """Return the channels of a normalised T1w on another grid, seen with slices of air below."""
    air = ((0, 0), (0, 0), (below, 0))
    images = {'T1w': np.pad(seen, air, constant_values=float(seen.min()))}
    members = predict(network, images, window=card.window, mirror=grid.lateral_axis, device='cpu')
    p = image.keep_brain(combine([one[..., below:] for one in members], card.temperature), grid)
    joint = image.joint_probabilities({'T1w': (p, grid)}, to, {'T1w': np.eye(4)})
    return joint.argmax(axis=0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--model', default='jointseg')
    options = parser.parse_args()
    card = read_card(options.model)
    network = load_model(card)
    sources = {source.name: source for source in read_recipe('jointseg').datasets}
    cases = tissue_scans(sources['neuromorphometrics'], options.data, 'validation')
    people = []
    print(f'| person | slices | {" | ".join(TISSUES)} |\n|---|---:|' + '---:|' * len(TISSUES))
    for name, case in cases.items():
        scan = image.load_scan(case.images['T1w'])
        known, *_ = truth_of(case, scan.grid)
        ((images, grid),) = image.to_model_grids(
            {'T1w': scan},
            image.transforms(np.eye(4)),
            in_plane_mm=card.in_plane_mm,
            slice_mm=card.slice_mm,
        ).values()
        seen = image.normalise(images['T1w'])
        places = []
        for below in SLICES:
            found = segmented(network, card, seen, grid, scan.grid, below)
            volumes, slices = count(found), grid.shape[2] + below
            places.append(
                {
                    'slices': slices,
                    'difference': (100 * (volumes / count(known) - 1)).tolist(),
                    'dice': [dice_of(found == c, known == c) for c in CHANNELS],
                    'volume': volumes.tolist(),
                }
            )
            print(row(name, slices, places[-1]['difference']), flush=True)
        people.append(places)
    volume, overlap = (
        np.array([[place[what] for place in places] for places in people])
        for what in ('volume', 'dice')
    )
    shares = volume.std(axis=1, ddof=1) / volume.mean(axis=1)
    spread = 100 * np.sqrt(np.mean(np.square(shares), axis=0))
    print(row('SD over places', '', spread))
    print(row('Dice', '', overlap.mean(axis=(0, 1))))
    record = {
        'model': card.sha256,
        'tissues': TISSUES,
        'people': dict(zip(cases, people, strict=True)),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / 'windows.json').write_text(json.dumps(record, indent=2) + '\n')


def count(channels: NDArray[np.intp]) -> NDArray[np.int64]:
    """Return the voxels of each tissue."""
    return np.bincount(channels[channels >= 0], minlength=len(CLASSES))[CHANNELS]


def row(name: str, slices: int | str, values: Iterable[float]) -> str:
    """Return a row of the table."""
    return f'| {name} | {slices} | {" | ".join(f"{value:.2f}" for value in values)} |'


if __name__ == '__main__':
    main()
