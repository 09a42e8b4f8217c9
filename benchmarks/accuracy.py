"""Dice of a model on people whom nothing was learned from, through the app itself.

    python benchmarks/accuracy.py DATA OUT [--model NAME_OR_CARD] [--part test|validation]

Runs `jointseg` on the recipe's test (or validation) people: real skull-stripped T1w with tissue
labels, painted whole heads with the lesions of unseen patients, and, for the test part, the one
real lesion patient; the last two as T1w and FLAIR, T1w alone and FLAIR alone. Prints a table,
writes OUT/accuracy.json, and all measures into OUT/tables.

One version paints the same pictures for every model. Between versions the heads and masks stay
those of the same people, but the pictures change with how they are painted (0.1.0 drew no
vessels): compare painted heads within a version only.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bids_jointseg.bids import Annotated, annotated_scans
from bids_jointseg.card import read_card
from bids_jointseg.cli import main as jointseg
from bids_jointseg.evaluation import score, write_tables
from bids_jointseg.image import load_labels
from bids_jointseg.interfaces import PaintHead
from bids_jointseg.labels import PROTOCOLS, TISSUES
from bids_jointseg.recipe import Source, read_recipe

INPUTS = (('T1w', 'FLAIR'), ('T1w',), ('FLAIR',))


@dataclass(frozen=True)
class Case:
    """One scan, whose images lie on one grid, with its reference."""

    images: dict[str, Path]
    annotation: Path
    protocol: str


def annotated(source: Source, data: Path, part: str) -> list[Annotated]:
    """Return what a dataset has of the people of a part that nothing is learned from."""
    people = source.test if part == 'test' else source.validation
    return [item for item in annotated_scans(source, data / source.root) if item.subject in people]


def tissue_scans(source: Source, data: Path, part: str) -> dict[str, Case]:
    """Return the T1w scans with tissue labels, rescans included."""
    every = {key: value for key, value in source.entities.items() if key != 'ses'}
    return {
        f'{item.subject}ses{item.scan.session}': Case(
            {'T1w': item.scan.t1w}, item.annotation, source.protocol
        )
        for item in annotated(replace(source, entities=every), data, part)
    }


def paint_heads(
    heads: Source, patients: Source, data: Path, part: str, folder: Path
) -> dict[str, Case]:
    """Paint whole heads, each with the lesions of another unseen patient."""
    folder.mkdir(parents=True)
    masks = [item.annotation for item in annotated(patients, data, part)]
    # The mask of the patient who has scans is not used for painting.
    masks = [path for path in masks if not list(path.parent.glob('*FLAIR*'))]
    made = {}
    for number, item in enumerate(annotated(heads, data, part)):
        paint = PaintHead(
            annotation=str(item.annotation),
            protocol=heads.protocol,
            masks=[str(path) for path in masks],
            seed=number,
            stem=str(folder / f'sub-{item.subject}'),
        )
        outputs = paint.run().outputs
        images = {'T1w': Path(outputs.t1w), 'FLAIR': Path(outputs.flair)}
        made[item.subject] = Case(images, Path(outputs.labels), 'jointseg')
    return made


def real_patient(source: Source, data: Path) -> dict[str, Case]:
    """Return the one patient who has scans and an expert's mask."""
    stem = data / source.root / 'sub-26' / 'anat' / 'sub-26_space-MNI152'
    images = {name: Path(f'{stem}_desc-brain_{name}.nii.gz') for name in ('T1w', 'FLAIR')}
    return {'26': Case(images, Path(f'{stem}_label-lesion_mask.nii.gz'), source.protocol)}


def write_dataset(folder: Path, cases: dict[str, Case]) -> None:
    """Make a raw BIDS dataset of links."""
    for subject, case in cases.items():
        anat = folder / f'sub-{subject}' / 'anat'
        anat.mkdir(parents=True)
        for modality, path in case.images.items():
            (anat / f'sub-{subject}_{modality}.nii.gz').symlink_to(path.resolve())
    description = {'Name': folder.name, 'BIDSVersion': '1.10.0', 'DatasetType': 'raw'}
    (folder / 'dataset_description.json').write_text(json.dumps(description))


def measure(name: str, cases: dict[str, Case], model: str, out: Path) -> list[dict]:
    """Run the app on some cases and compare: the rows of the tables."""
    write_dataset(out / 'bids' / name, cases)
    with tempfile.TemporaryDirectory() as work:
        arguments = [str(out / 'bids' / name), str(out / name), 'participant', '--model', model]
        code = jointseg([*arguments, '--level', 'minimal', '-w', work, '--skip-bids-validation'])
    if code:
        sys.exit(f'jointseg ended with code {code} on {name}')
    rows = []
    for subject, case in cases.items():
        (path,) = (out / name / f'sub-{subject}').rglob(f'sub-{subject}_seg-jointseg_dseg.nii.gz')
        found, truth = load_labels(path), load_labels(case.annotation)
        reference = PROTOCOLS[case.protocol]
        rows += score(
            PROTOCOLS['jointseg'].encode(found.data.astype(np.int64)),
            reference.encode(truth.data.astype(np.int64)),
            truth.grid.spacing_mm,
            reference=reference,
            dataset=name,
            scan=subject,
            model=read_card(model).name,
        )
    return rows


def line(scores: Collection[dict[str, float]]) -> str:
    """Return the mean of some scans' scores as cells."""
    values = {
        name: [scan[name] for scan in scores if name in scan and not np.isnan(scan[name])]
        for name in (*TISSUES, 'L')
    }
    means = {name: np.mean(found) for name, found in values.items() if found}
    tissue = [means[name] for name in TISSUES if name in means]
    cells = [f'{np.mean(tissue):.2f}' if tissue else '-']
    cells += [f'{means[name]:.1f}' if name in means else '-' for name in values]
    return ' | '.join(cells)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    options.add_argument('data', type=Path)
    options.add_argument('out', type=Path)
    options.add_argument('--model', default='jointseg')
    options.add_argument('--recipe', default='jointseg')
    options.add_argument('--part', default='test', choices=('test', 'validation'))
    arguments = options.parse_args()
    logging.basicConfig(level=logging.INFO)
    data, out, part = arguments.data.resolve(), arguments.out.resolve(), arguments.part
    sources = {source.name: source for source in read_recipe(arguments.recipe).datasets}
    shutil.rmtree(out, ignore_errors=True)

    sets = {'neuromorphometrics_T1w': tissue_scans(sources['neuromorphometrics'], data, part)}
    patients = sources['openms-mni']
    several = {'heads': paint_heads(sources['heads'], patients, data, part, out / 'painted')}
    if part == 'test':
        several['patient'] = real_patient(patients, data)
    for name, cases in several.items():
        for inputs in INPUTS:
            sets[f'{name}_{"_".join(inputs)}'] = {
                subject: replace(case, images={key: case.images[key] for key in inputs})
                for subject, case in cases.items()
            }
    rows = []
    for name, cases in sets.items():
        rows += measure(name, cases, arguments.model, out)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        scans = results.setdefault(row['dataset'], {})
        scans.setdefault(row['scan'], {})[row['region']] = row['dice']

    print('| scans | n | tissue mean | ' + ' | '.join((*TISSUES, 'L')) + ' |')
    print('|---|---|---|' + '---|' * (len(TISSUES) + 1))
    for name, scans in results.items():
        print(f'| {name} | {len(scans)} | {line(scans.values())} |')
    card = read_card(arguments.model)
    record = {'model': card.name, 'sha256': card.sha256, 'part': part, 'dice': results}
    (out / 'accuracy.json').write_text(json.dumps(record, indent=1))
    write_tables(rows, out / 'tables')


if __name__ == '__main__':
    main()
