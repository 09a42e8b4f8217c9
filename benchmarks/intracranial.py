"""How well the volume within the skull is told.

    python benchmarks/intracranial.py DATA OUT [--part {validation,test}]

Of painted heads of the recipe `intracranial`, each painted four times, as they are and in slices
of 4 mm: by how much the volume by a T1w differs from that of the label map, mean and standard
deviation over paintings, per cent. The lowest part of the cerebellum is that of the reference. And
the volume of the raw visits of `openms`, which nobody labelled, in ml: it is the same in both
visits of a person. Writes OUT/intracranial.json.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from accuracy import annotated, paint_heads, resliced
from calibration import PAINTINGS, SLICE_MM, segment

from bids_jointseg import image
from bids_jointseg.bids import annotated_scans
from bids_jointseg.card import read_card
from bids_jointseg.image import Volume
from bids_jointseg.labels import PROTOCOLS, bits
from bids_jointseg.locator import find_inside
from bids_jointseg.network import load_model
from bids_jointseg.quality import INDEX, intracranial_ml
from bids_jointseg.recipe import read_recipe


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--part', choices=('validation', 'test'), default='validation')
    options = parser.parse_args()
    rows = _painted(options.data, options.out, options.part) + _visits(options.data)
    (options.out / 'intracranial.json').write_text(json.dumps(rows, indent=2) + '\n')


def label_ml(path: Path) -> float:
    """Return what the skull holds by a whole-head label map, down to its cerebellum."""
    labels = image.load_labels(path)
    sets = PROTOCOLS['intracranial'].encode(labels.data.astype(np.int64))
    upwards = labels.grid.affine[2]
    cerebellum = np.argwhere(sets == bits({'CBM'})) @ upwards[:3]
    inside = np.argwhere(sets != bits({'BG'})) @ upwards[:3]
    above = inside >= np.percentile(cerebellum, 0.1) - np.abs(upwards[:3]).max() / 2
    return float(above.sum() * labels.grid.spacing_mm.prod() / 1000)


def _painted(data: Path, out: Path, part: str) -> list[dict[str, object]]:
    sources = {source.name: source for source in read_recipe('intracranial').datasets}
    truth = {
        item.subject: label_ml(item.annotation)
        for item in annotated(sources['heads'], data, part)
        if item.annotation
    }
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in PAINTINGS:
        folder = out / f'{part}{seed}'
        cases = paint_heads(sources['heads'], sources['openms-mni'], data, part, folder, seed=seed)
        for head, case in cases.items():
            fine = {'T1w': image.load_scan(case.images['T1w'])}
            reference = image.load_labels(case.annotation)
            cerebellum = (reference.data == INDEX['CBM']).astype(np.float32)
            for slices, scans in (('1 mm', fine), ('4 mm', resliced(fine, SLICE_MM))):
                scan = scans['T1w']
                there = image.resample(Volume(cerebellum, reference.grid), scan.grid) > 0.5
                labels = np.where(there, INDEX['CBM'], 0).astype(np.uint8)
                held = intracranial_ml(find_inside(scan), labels, scan)
                if held is not None:
                    found[head, slices].append(100 * (held / truth[head] - 1))
    rows: list[dict[str, object]] = []
    print('| head | ml | slices | n | difference, % | SD, % |\n|---|---:|---|---:|---:|---:|')
    for (head, slices), values in found.items():
        mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
        rows.append({'head': head, 'slices': slices, 'differences': values})
        print(
            f'| {head} | {truth[head]:.0f} | {slices} | {len(values)} | {mean:+.1f} | '
            f'{spread:.1f} |'
        )
    return rows


def _visits(data: Path) -> list[dict[str, object]]:
    card = read_card('jointseg')
    network = load_model(card)
    (source,) = (one for one in read_recipe('jointseg').datasets if one.name == 'openms')
    rows: list[dict[str, object]] = []
    print('\n| visit | ml |\n|---|---:|')
    for item in annotated_scans(source, data / source.root):
        assert item.scan is not None
        assert item.scan.t1w is not None
        scan = image.load_scan(item.scan.t1w)
        alone = image.transforms(np.eye(4))
        joint, _ = segment(network, card, {'T1w': scan}, alone, mirror=False)
        held = intracranial_ml(find_inside(scan), image.label_map(joint), scan)
        rows.append({'visit': item.name, 'ml': held})
        print(f'| {item.name} | {"n/a" if held is None else round(held, 1)} |', flush=True)
    return rows


if __name__ == '__main__':
    main()
