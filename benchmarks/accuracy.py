"""What a model reaches on people whom nothing was learned from, through the app itself.

    python benchmarks/accuracy.py DATA OUT [--model NAME_OR_CARD] [--part test|validation]

Runs `jointseg`, with its default settings, on the recipe's test (or validation) people:

- real skull-stripped T1w with tissue labels, rescans included: Dice, the difference between the
  volumes of two scans of one person and whether the intervals hold it, how well the manual
  labels of the two agree, and lesions found in healthy people under 45;
- the same T1w in slices of 3 mm, the paper's grid: Dice;
- painted whole heads with the lesions of unseen patients, and the same without their skull, as
  T1w and FLAIR, T1w alone and FLAIR alone: Dice, and what the skull costs;
- for the test part, the one real lesion patient, in the same three ways, and the raw visits of
  `openms`, whose tissue nobody drew: agreement of T1w alone with T1w and FLAIR.

Prints and writes OUT/accuracy.md and OUT/accuracy.json. OUT/evaluation has all measures of each
set, and pictures of its worst, median and best scan beside their references. What is there is
not run again.

One version paints the same pictures for every model. Between versions the heads and masks stay
those of the same people, but the pictures change with how they are painted (0.1.0 drew no
vessels): compare painted heads within a version only.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from patients import brain_of
from scipy.linalg import sqrtm

from bids_jointseg.bids import Annotated, annotated_scans
from bids_jointseg.cache import sets_on
from bids_jointseg.card import read_card
from bids_jointseg.cli import main as jointseg
from bids_jointseg.evaluation import evaluate
from bids_jointseg.image import (
    Volume,
    load_grid,
    load_labels,
    load_scan,
    model_grid,
    resample,
    save,
    volumes_mm3,
)
from bids_jointseg.interfaces import PaintHead
from bids_jointseg.labels import CLASSES, INDICES, PROTOCOLS, TISSUES, bits
from bids_jointseg.longitudinal import compare_volumes
from bids_jointseg.metrics import dice, summary
from bids_jointseg.recipe import Source, read_recipe
from bids_jointseg.registration import register

INPUTS = (('T1w', 'FLAIR'), ('T1w',), ('FLAIR',))
JOINTSEG = PROTOCOLS['jointseg']
YOUNG = 45
"""Years, below which a lesion in a healthy person is taken for a mistake."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One scan, whose images lie on one grid, with its reference."""

    person: str
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
            item.subject, {'T1w': item.scan.t1w}, item.annotation, source.protocol
        )
        for item in annotated(replace(source, entities=every), data, part)
    }


def paint_heads(
    heads: Source,
    patients: Source,
    data: Path,
    part: str,
    folder: Path,
    *,
    seed: int = 0,
    intact: bool = False,
) -> dict[str, Case]:
    """Paint whole heads, each with the lesions of another unseen patient."""
    folder.mkdir(parents=True, exist_ok=True)
    masks = [item.annotation for item in annotated(patients, data, part)]
    # The mask of the patient who has scans is not used for painting.
    masks = [path for path in masks if not list(path.parent.glob('*FLAIR*'))]
    made = {}
    for number, item in enumerate(annotated(heads, data, part), seed):
        stem = folder / f'sub-{item.subject}'
        images = {name: Path(f'{stem}_{name}.nii.gz') for name in ('T1w', 'FLAIR')}
        labels = Path(f'{stem}_desc-painted_dseg.nii.gz')
        if not labels.is_file():  # the last that is written
            PaintHead(
                annotation=str(item.annotation),
                protocol=heads.protocol,
                masks=[str(path) for path in masks],
                seed=number,
                intact=intact,
                stem=str(stem),
            ).run()
        made[item.subject] = Case(item.subject, images, labels, 'jointseg')
    return made


def strip(cases: Mapping[str, Case], folder: Path) -> dict[str, Case]:
    """Take the skull off, as a good tool does: the brain and the fluid in its folds stay."""
    folder.mkdir(parents=True, exist_ok=True)
    stripped = {}
    for subject, case in cases.items():
        labels = load_labels(case.annotation)
        brain = brain_of(labels.data)
        images = {}
        for name, path in case.images.items():
            scan = load_scan(path)
            images[name] = folder / path.name
            save(images[name], np.where(brain, scan.data, 0), scan.grid, dtype=np.float32)
        stripped[subject] = replace(case, images=images)
    return stripped


def resliced(scans: Mapping[str, Volume], slice_mm: float) -> dict[str, Volume]:
    """Bring scans onto slices of that distance, in the first one's field of view."""
    first = next(iter(scans.values()))
    grid = model_grid(first, in_plane_mm=1.0, slice_mm=(slice_mm, slice_mm))
    return {name: Volume(resample(scan, grid), grid) for name, scan in scans.items()}


def in_slices(cases: Mapping[str, Case], folder: Path, slice_mm: float) -> dict[str, Case]:
    """Bring scans and their references onto slices of that distance: at 3 mm, the paper's grid."""
    folder.mkdir(parents=True, exist_ok=True)
    thick = {}
    for subject, case in cases.items():
        scans = resliced({name: load_scan(path) for name, path in case.images.items()}, slice_mm)
        grid = next(iter(scans.values())).grid
        images = {name: folder / f'sub-{subject}_{name}.nii.gz' for name in scans}
        for name, scan in scans.items():
            save(images[name], scan.data, grid, dtype=np.float32)
        sets = sets_on(grid, load_labels(case.annotation), PROTOCOLS[case.protocol])
        annotation = folder / f'sub-{subject}_dseg.nii.gz'
        save(annotation, own_labels(sets), grid, dtype=np.uint8)
        thick[subject] = Case(case.person, images, annotation, 'jointseg')
    return thick


def real_patient(source: Source, data: Path) -> dict[str, Case]:
    """Return the one patient who has scans and an expert's mask."""
    stem = data / source.root / 'sub-26' / 'anat' / 'sub-26_space-MNI152'
    images = {name: Path(f'{stem}_desc-brain_{name}.nii.gz') for name in ('T1w', 'FLAIR')}
    return {'26': Case('26', images, Path(f'{stem}_label-lesion_mask.nii.gz'), source.protocol)}


def write_dataset(folder: Path, cases: Mapping[str, Case]) -> None:
    """Make a raw BIDS dataset of links, and a derivative of the references."""
    for root, kind in ((folder, 'raw'), (folder / 'derivatives' / 'reference', 'derivative')):
        for subject, case in cases.items():
            anat = root / f'sub-{subject}' / 'anat'
            anat.mkdir(parents=True, exist_ok=True)
            images = case.images if kind == 'raw' else {'dseg': case.annotation}
            for suffix, path in images.items():
                link = anat / f'sub-{subject}_{suffix}.nii.gz'
                if not link.is_symlink():
                    link.symlink_to(path.resolve())
        record: Row = {'Name': root.name, 'BIDSVersion': '1.10.0', 'DatasetType': kind}
        if kind == 'derivative':
            record['GeneratedBy'] = [{'Name': 'bids_jointseg benchmarks'}]
        (root / 'dataset_description.json').write_text(json.dumps(record))


def run(bids: Path, out: Path, model: str, *more: str) -> None:
    """Run the app on a dataset; it does what is missing or was made by another card."""
    arguments = [str(bids), str(out), 'participant', '--model', model, '--level', 'minimal']
    arguments += ['-w', str(out.parent / 'work' / out.name), '--skip-bids-validation', *more]
    code = jointseg(arguments)
    if code:
        sys.exit(f'jointseg ended with code {code} on {bids}')


def label_map(out: Path, subject: str) -> Path:
    """Return the label map that the app wrote on the grid of a scan."""
    (path,) = (out / f'sub-{subject}').rglob(f'sub-{subject}_seg-jointseg_dseg.nii.gz')
    return path


def volume_mm3(path: Path, name: str) -> float:
    """Return the volume of a class in a label map."""
    (index,) = (index for index, names in JOINTSEG.sets.items() if names == {name})
    labels = load_labels(path)
    return float((labels.data == index).sum() * np.prod(labels.grid.spacing_mm))


def compare(name: str, bids: Path, reference: Path, protocol: str, out: Path) -> list[Row]:
    """Compare what the app wrote with the references, in tables and figures, once."""
    folder = out / 'evaluation' / name
    if not (folder / 'scans.tsv').is_file():
        evaluate(
            {'jointseg': out / name},
            reference,
            folder,
            reference_protocol=protocol,
            images=bids,
            dataset=name,
        )
    return [
        row | {'dice': float(row['dice'].replace('n/a', 'nan'))}
        for row in read_table(folder / 'scans.tsv')
    ]


def interval(values: Iterable[float], digits: int = 1) -> str:
    """Return the mean, with its 95 % confidence interval where there are several values."""
    found = summary(list(values))
    if not found.n:
        return '-'
    text = f'{found.mean:.{digits}f}'
    if found.n > 1:
        text += f' ({found.ci[0]:.{digits}f} to {found.ci[1]:.{digits}f})'
    return text


def dice_table(sets: Mapping[str, Mapping[str, Case]], rows: Sequence[Row]) -> list[str]:
    """Return Dice for each set and class; a person's scans count once, with their mean."""
    lines = [f'| scans | n | tissue | {" | ".join((*TISSUES, "L"))} |']
    lines += ['|---|---|' + '---:|' * 8]
    for name, cases in sets.items():
        people: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            if row['dataset'] == name and not np.isnan(row['dice']):
                case = cases[row['scan'].removeprefix('sub-')]
                person = people.setdefault(case.person, defaultdict(list))
                person[row['region']].append(row['dice'])
                if row['region'] in TISSUES:
                    person['tissue'].append(row['dice'])
        cells = [
            interval(np.mean(person[region]) for person in people.values() if region in person)
            for region in ('tissue', *TISSUES, 'L')
        ]
        count = f'{len(cases)}' + f' of {len(people)}' * (len(people) < len(cases))
        lines.append(f'| {name} | {count} | {" | ".join(cells)} |')
    return lines


def rescans(cases: Mapping[str, Case], out: Path) -> dict[str, list[Row]]:
    """Return person -> what the app's two volumes of each tissue say of a change (there is none).

    `percent` is the difference, `manual_percent` that of the manual labels of the two scans, and
    `half_width_percent` half of the interval of one scan.
    """
    scans = defaultdict(list)
    for subject, case in cases.items():
        drawn = volumes_mm3(true_labels(case), load_grid(case.annotation))
        scans[case.person].append((volumes(out, subject), drawn))
    found = {}
    for person, ((before, drawn_before), *others) in scans.items():
        for after, drawn_after in others:
            found[person] = [
                {
                    'name': name,
                    'percent': _apart(before[name][0], after[name][0]),
                    'manual_percent': _apart(drawn_before[name], drawn_after[name]),
                    'changed': row['changed'],
                    'half_width_percent': 50
                    * (before[name][2] - before[name][1])
                    / before[name][0],
                }
                for row in compare_volumes(before, after)
                if (name := row['name']) in TISSUES
            ]
    return found


def _apart(one: float, other: float) -> float:
    """Return how far two volumes differ, per cent of their mean."""
    return 200 * abs(one - other) / (one + other)


def volumes(out: Path, subject: str) -> dict[str, tuple[float, float, float]]:
    """Return class -> volume in mm3 and its interval, as the app wrote them."""
    table = label_map(out, subject).with_name(f'sub-{subject}_seg-jointseg_morph.tsv')
    return {
        row['name']: tuple(  # type: ignore[misc]
            float(row[key].replace('n/a', 'nan')) for key in ('volume_mm3', 'low_mm3', 'high_mm3')
        )
        for row in read_table(table)
    }


def rescan_table(found: Mapping[str, list[Row]]) -> list[str]:
    """Return how far volumes of two scans of one person differ, and what the intervals say."""
    each = [row for rows in found.values() for row in rows]
    lines = [f'| two scans of one person, n = {len(found)} | {" | ".join(TISSUES)} |']
    lines.append('|---|' + '---:|' * 6)
    for words, key, middle in (
        ('difference of the volumes, mean %', 'percent', np.mean),
        ('of the manual labels, mean %', 'manual_percent', np.mean),
        ('half-width of the interval, median %', 'half_width_percent', np.median),
    ):
        cells = (middle([row[key] for row in each if row['name'] == name]) for name in TISSUES)
        lines.append(f'| {words} | {" | ".join(f"{cell:.2f}" for cell in cells)} |')
    held = sum(row['changed'] == 'no' for row in each)
    told = sum(row['changed'] != 'n/a' for row in each)
    return [*lines, '', f'No change lies inside the interval for {held} of {told} volumes.']


def true_labels(case: Case) -> NDArray[np.uint8]:
    """Return the reference in the package's numbers, 255 where nothing is known."""
    labels = load_labels(case.annotation).data.astype(np.int64)
    return own_labels(PROTOCOLS[case.protocol].encode(labels))


def own_labels(sets: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return sets of one class in the package's numbers, 255 for all others."""
    found = np.full(sets.shape, 255, np.uint8)
    for index, name in zip(INDICES, CLASSES, strict=True):
        found[sets == bits({name})] = index
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the lines of a table."""
    with path.open(newline='') as file:
        return list(csv.DictReader(file, delimiter='\t'))


def manual_agreement(cases: Mapping[str, Case]) -> dict[str, dict[str, float]]:
    """Return person -> Dice between the manual labels of two scans: how far these can be trusted.

    Each scan is taken half of the rigid way to the other, so both labels are interpolated alike.
    """
    scans = defaultdict(list)
    for case in cases.values():
        scans[case.person].append(case)
    found = {}
    for person, pair in scans.items():
        if len(pair) != 2:
            continue
        fixed, moving = (load_scan(case.images['T1w']) for case in pair)
        half = np.real(sqrtm(register(fixed, moving)))
        there = []
        for case, way in zip(pair, (np.linalg.inv(half), half), strict=True):
            truth, grid = true_labels(case), load_grid(case.annotation)
            shares = [
                resample(Volume((truth == index).astype(np.float32), grid), fixed.grid, way)
                for index in INDICES
            ]
            there.append(INDICES[np.argmax(shares, axis=0)].astype(np.uint8))
        scores = dice(*there)
        found[person] = {name: scores[name] for name in TISSUES}
    return found


def false_lesions(cases: Mapping[str, Case], out: Path, data: Path) -> dict[str, float]:
    """Return the volume of lesions in mm3 that were found in each healthy young person's scan."""
    ages = {
        row['participant_id'].removeprefix('sub-'): float(row['age'])
        for row in read_table(data / 'neuromorphometrics' / 'participants.tsv')
    }
    return {
        subject: volume_mm3(label_map(out, subject), 'L')
        for subject, case in cases.items()
        if ages[case.person] < YOUNG
    }


def agreement(data: Path, out: Path, model: str) -> list[Row]:
    """Segment the raw visits with and without FLAIR and compare the two, visit by visit."""
    both, name = out / 'openms_T1w_FLAIR', 'openms_T1w'
    run(data / 'openms', both, model)
    run(data / 'openms', out / name, model, '--ignore', 'flair')
    return compare(name, data / 'openms', both, 'jointseg', out)


def main() -> None:
    """Measure, print and draw."""
    options = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    options.add_argument('data', type=Path)
    options.add_argument('out', type=Path)
    options.add_argument('--model', default='jointseg')
    options.add_argument('--recipe', default='jointseg')
    options.add_argument('--part', default='test', choices=('test', 'validation'))
    options.add_argument(
        '--sets', nargs='+', default=[], help='only these, such as neuromorphometrics_T1w openms'
    )
    arguments = options.parse_args()
    logging.basicConfig(level=logging.INFO)
    data, out, part = arguments.data.resolve(), arguments.out.resolve(), arguments.part
    sources = {source.name: source for source in read_recipe(arguments.recipe).datasets}
    card = read_card(arguments.model)

    tissue = 'neuromorphometrics_T1w'
    ways = ['_'.join(inputs) for inputs in INPUTS]
    thick = f'{tissue}_3mm'
    known = [tissue, thick, *(f'{name}_{way}' for name in ('heads', 'stripped') for way in ways)]
    if part == 'test':
        known += [*(f'patient_{way}' for way in ways), 'openms']
    wanted = arguments.sets or known
    if not set(wanted) <= set(known):
        options.error(f'--sets: the {part} part has {", ".join(known)}')
    patients = sources['openms-mni']
    several = {}
    if any(name.startswith(('heads', 'stripped')) for name in wanted):
        heads = paint_heads(sources['heads'], patients, data, part, out / 'painted')
        several = {'heads': heads, 'stripped': strip(heads, out / 'stripped')}
    if part == 'test':
        several['patient'] = real_patient(patients, data)
    scans = tissue_scans(sources['neuromorphometrics'], data, part)
    sets = {tissue: scans}
    if thick in wanted:
        sets[thick] = in_slices(scans, out / 'slices', 3.0)
    sets |= {
        f'{name}_{way}': {
            subject: replace(case, images={key: case.images[key] for key in inputs})
            for subject, case in cases.items()
        }
        for name, cases in several.items()
        for way, inputs in zip(ways, INPUTS, strict=True)
    }
    sets = {name: cases for name, cases in sets.items() if name in wanted}
    rows = []
    for name, cases in sets.items():
        bids = out / 'bids' / name
        write_dataset(bids, cases)
        run(bids, out / name, arguments.model)
        (protocol,) = {case.protocol for case in cases.values()}
        rows += compare(name, bids, bids / 'derivatives' / 'reference', protocol, out)

    lines = dice_table(sets, rows) if sets else []
    record: Row = {'model': card.name, 'sha256': card.sha256, 'part': part}
    record['dice'] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        record['dice'][row['dataset']][row['scan']][row['region']] = row['dice']
    if tissue in sets:
        found = rescans(sets[tissue], out / tissue)
        if found:
            lines += ['', *rescan_table(found)]
        record['rescans'] = found
        manual = manual_agreement(sets[tissue])
        if manual:
            cells = (interval(person[name] for person in manual.values()) for name in TISSUES)
            lines += ['', f'| manual labels of two scans, Dice | {" | ".join(TISSUES)} |']
            lines += ['|---|' + '---:|' * 6, f'| n = {len(manual)} | {" | ".join(cells)} |']
        record['manual_agreement'] = manual
        lesions = false_lesions(sets[tissue], out / tissue, data)
        record['false_lesions_mm3'] = lesions
        each = ', '.join(f'{value:.0f}' for value in sorted(lesions.values()))
        lines += ['', f'Lesions in {len(lesions)} scans of healthy people under {YOUNG}, T1w: ']
        lines[-1] += f'median {np.median([*lesions.values()]):.0f} mm3 ({each}).'
    if 'openms' in wanted:
        same: dict[str, dict[str, float]] = {}
        for row in agreement(data, out, arguments.model):
            same.setdefault(row['scan'], {})[row['region']] = row['dice']
        lines += ['', f'| openms, T1w against T1w+FLAIR, Dice | {" | ".join((*TISSUES, "L"))} |']
        lines += ['|---|' + '---:|' * 7]
        for scan, dice in same.items():
            cells = ' | '.join(f'{dice.get(name, np.nan):.1f}' for name in (*TISSUES, 'L'))
            lines.append(f'| {scan} | {cells} |')
        record['agreement'] = same
    text = '\n'.join(lines).strip() + '\n'
    sys.stdout.write(text)
    (out / 'accuracy.md').write_text(text)
    (out / 'accuracy.json').write_text(json.dumps(record, indent=1))


if __name__ == '__main__':
    main()
