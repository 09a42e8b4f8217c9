"""How far the contrast of a T1w moves the volumes that a model finds in it.

    python benchmarks/contrast.py DATA OUT [--models NAME_OR_CARD ...]

The T1w of the recipe's validation people (real ones, skull-stripped, and two painted heads, each
painted twice) and of four raw visits of `openms` are segmented with an exponent of 0.93 and with
one of 1.07, about as far apart as those of two visits may be (`benchmarks/visits.py`): one pass
without mirror image and without the bias of the card. Then once more, in the contrast of its
kind: raised to a power, by what the first pass found. Prints half of the difference of a volume in
per cent, the root of the mean square over scans, and writes OUT/contrast.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from accuracy import paint_heads, tissue_scans
from calibration import head_level, segment, with_contrast
from numpy.typing import NDArray
from torch.nn import Module

from bids_jointseg import image, quality
from bids_jointseg.bids import annotated_scans
from bids_jointseg.card import ModelCard, read_card
from bids_jointseg.image import Volume
from bids_jointseg.labels import TISSUES
from bids_jointseg.network import load_model
from bids_jointseg.recipe import read_recipe

EXPONENTS = (0.93, 1.07)
PAINTINGS = (50, 60)
"""Seeds."""
RAW = 4
"""Visits."""
WAYS = ('as it is', 'in the contrast of its kind')
SEEN = (0.53, 0.67, 0.77, 0.87)
"""Cortex by white matter, medians, in ascending order."""
WANTED = (0.6, 0.6, 0.8, 0.8)
"""What these become, and linearly between them, in logarithms. An inversion-prepared gradient echo
has about 0.6 (0.56 to 0.66 in 19 people, median 0.597), a spin echo about 0.8."""


def scans_of(data: Path, out: Path) -> dict[str, list[Path]]:
    """Return the T1w of each kind."""
    sources = {source.name: source for source in read_recipe('jointseg').datasets}
    heads, masks = sources['heads'], sources['openms-mni']
    painted = [
        case
        for seed in PAINTINGS
        for case in paint_heads(
            heads, masks, data, 'validation', out / f'heads{seed}', seed=seed
        ).values()
    ]
    real = tissue_scans(sources['neuromorphometrics'], data, 'validation')
    raw = annotated_scans(sources['openms'], data / sources['openms'].root)
    return {
        'real': [case.images['T1w'] for case in real.values()],
        'painted heads': [case.images['T1w'] for case in painted],
        'raw visits': [item.scan.t1w for item in raw[:RAW]],
    }


def standard_exponent(scan: Volume, labels: NDArray[np.uint8]) -> float:
    """Return the power of its intensities that gives a T1w the contrast of its kind.

    1 where cortex is not the darker one. Beyond the ends of :data:`SEEN` it is that of the end.
    """
    between = image.transforms(np.eye(4))
    measures = quality.measure({'T1w': scan}, labels, between=between, doubt_mm3={})
    ratio = measures.get('gray_to_white_T1w', 1.0)
    if not 0 < ratio < 1:
        return 1.0
    seen = np.log(np.clip(ratio, SEEN[0], SEEN[-1]))
    return float(np.interp(seen, np.log(SEEN), np.log(WANTED)) / seen)


def volumes(network: Module, card: ModelCard, scan: Volume, exponent: float) -> list[list[float]]:
    """Return the volume of each tissue in a scan of that contrast, as it is and standardised."""
    found = []
    between = image.transforms(np.eye(4))
    for _ in WAYS:
        bent = with_contrast(scan.data, head_level(scan.data), exponent)
        scan = Volume(bent.astype(np.float32), scan.grid)
        joint, _ = segment(network, card, {'T1w': scan}, between, mirror=False)
        labels = image.label_map(joint)
        in_mm3 = image.volumes_mm3(labels, scan.grid)
        found.append([in_mm3[name] for name in TISSUES])
        exponent = standard_exponent(scan, labels)
    return found


def moved(network: Module, card: ModelCard, paths: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Return how far contrast moves the volume of each tissue, per cent, for each of the ways."""
    shares = []
    for path in paths:
        scan = image.load_scan(path)
        low, high = (np.array(volumes(network, card, scan, e)) for e in EXPONENTS)
        shares.append(100 * (high - low) / (high + low))
    roots = np.sqrt(np.mean(np.square(shares), axis=0)).round(2).tolist()
    return {
        way: dict(zip(TISSUES, root, strict=True)) for way, root in zip(WAYS, roots, strict=True)
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--models', nargs='+', default=['jointseg'])
    options = parser.parse_args()
    kinds = scans_of(options.data.resolve(), options.out.resolve())
    record = {}
    print(f'| model | T1w | seen | {" | ".join(TISSUES)} |')
    print('|---|---|---|' + '---:|' * len(TISSUES))
    for model in options.models:
        card = replace(read_card(model), bias={})
        network = load_model(card)
        record[model] = {kind: moved(network, card, paths) for kind, paths in kinds.items()}
        for kind, ways in record[model].items():
            for way, row in ways.items():
                cells = ' | '.join(f'{value:.2f}' for value in row.values())
                print(f'| {model} | {kind} | {way} | {cells} |', flush=True)
    (options.out / 'contrast.json').write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
    main()
