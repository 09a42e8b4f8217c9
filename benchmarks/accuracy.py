"""Dice of a model on people whom nothing was learned from, through the app itself.

    python benchmarks/accuracy.py DATA OUT [--model NAME_OR_CARD] [--part test|validation]

Runs `jointseg` on the recipe's test (or validation) people: real skull-stripped T1w with tissue
labels, painted whole heads with the lesions of unseen patients, and, for the test part, the one
real lesion patient; the last two as T1w and FLAIR, T1w alone and FLAIR alone. Prints a table and
writes OUT/accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from bids_jointseg.card import read_card
from bids_jointseg.cli import main as jointseg
from bids_jointseg.labels import INDICES, PROTOCOLS, TISSUES
from bids_jointseg.metrics import dice
from bids_jointseg.recipe import Recipe, Source, read_recipe
from bids_jointseg.sampling import (
    Settings,
    Windows,
    read_lesions,
    read_person,
    write_lesions,
    write_person,
)

INPUTS = {'T1w+FLAIR': ('T1w', 'FLAIR'), 'T1w': ('T1w',), 'FLAIR': ('FLAIR',)}
LESION = 7


def classes_of(protocol: str, label_map: np.ndarray) -> np.ndarray:
    """Return the label map in our indices, 255 where the protocol leaves more than one open."""
    table = np.full(256, 255, np.uint8)
    for channel, index in enumerate(INDICES):
        table[1 << channel] = index
    return table[PROTOCOLS[protocol].encode(label_map)]


def write_dataset(folder: Path, scans: dict[str, dict[str, Path]]) -> None:
    """Make a raw BIDS dataset of links: subject -> modality -> file."""
    for subject, images in scans.items():
        anat = folder / f'sub-{subject}' / 'anat'
        anat.mkdir(parents=True, exist_ok=True)
        for modality, path in images.items():
            link = anat / f'sub-{subject}_{modality}.nii.gz'
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    description = {'Name': folder.name, 'BIDSVersion': '1.10.0', 'DatasetType': 'raw'}
    (folder / 'dataset_description.json').write_text(json.dumps(description))


def people_of(source: Source, part: str) -> tuple[str, ...]:
    """Return the subjects of a part that nothing is learned from."""
    return source.test if part == 'test' else source.validation


def tissue_scans(root: Path, source: Source, part: str) -> dict[str, tuple[Path, Path]]:
    """Return scan name -> (T1w, label map), rescans included."""
    found = {}
    for subject in people_of(source, part):
        for session in sorted((root / f'sub-{subject}').glob('ses-*')):
            name = f'sub-{subject}_{session.name}'
            labels = root / 'derivatives' / 'manual' / f'sub-{subject}' / session.name / 'anat'
            found[f'{subject}{session.name.replace("-", "")}'] = (
                session / 'anat' / f'{name}_T1w.nii.gz',
                labels / f'{name}_desc-neuromorphometrics_dseg.nii.gz',
            )
    return found


def paint_heads(
    data: Path, recipe: Recipe, part: str, folder: Path
) -> dict[str, tuple[dict[str, Path], Path]]:
    """Paint whole heads with the lesions of unseen patients: subject -> (images, labels)."""
    sources = {source.name: source for source in recipe.datasets}
    heads, patients = sources['heads'], sources['openms-mni']
    folder.mkdir(parents=True, exist_ok=True)
    masks = {
        subject: next((data / 'openms-mni' / f'sub-{subject}').rglob('*mask.nii.gz'))
        for subject in people_of(patients, part)
    }
    # The real patient's mask is not used for painting.
    masks = {s: m for s, m in masks.items() if not list(m.parent.glob('*FLAIR*'))}
    write_lesions(masks, folder / 'lesions.npz')
    settings = replace(Settings(), strip_share=0.0, modalities=((('T1w', 'FLAIR'), 1.0),))
    made = {}
    for number, subject in enumerate(people_of(heads, part)):
        annotation = next((data / 'heads' / f'sub-{subject}').rglob('*_dseg.nii.gz'))
        cached = folder / f'{subject}.npz'
        write_person(annotation, 'freesurfer', None, cached)
        person = read_person(cached)
        lesions = read_lesions(folder / 'lesions.npz', list(masks))
        windows = Windows([], [person], lesions, settings=settings, seed=0, length=1)
        rng = np.random.default_rng((2019, number))
        generator = torch.Generator().manual_seed(number)
        axes = [torch.arange(size, dtype=torch.float32) for size in person.kinds.shape]
        points = torch.stack(torch.meshgrid(*axes, indexing='ij'), -1)
        mask = lesions[number % len(lesions)]
        sample = windows.compose(person, points, 1, mask, np.eye(4), rng, generator)
        images = {}
        for modality, image in sample.images.items():
            images[modality] = folder / f'{subject}_{modality}.nii.gz'
            array = (image[0] - image.min()).numpy() * 200
            nib.save(nib.Nifti1Image(array.astype(np.int16), np.eye(4)), images[modality])
        labels = np.where(sample.valid[0] > 0, INDICES[sample.target.argmax(0)], 255)
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), np.eye(4)), folder / f'{subject}.nii.gz')
        made[subject] = (images, folder / f'{subject}.nii.gz')
    return made


def segment(bids: Path, out: Path, model: str, work: Path) -> None:
    """Run the app on a dataset."""
    arguments = [str(bids), str(out), 'participant', '--model', model, '--level', 'minimal']
    code = jointseg([*arguments, '-w', str(work), '--skip-bids-validation'])
    if code:
        sys.exit(f'jointseg ended with code {code} on {bids}')


def found_labels(out: Path, subject: str) -> np.ndarray:
    """Return the segmentation on the reference's grid."""
    (path,) = (out / f'sub-{subject}').rglob(f'sub-{subject}_seg-jointseg_dseg.nii.gz')
    return np.asanyarray(nib.load(path).dataobj)


def row(scores: list[dict[str, float]]) -> str:
    """Return the mean of some scans' scores as cells."""
    means = {name: np.nanmean([score[name] for score in scores]) for name in scores[0]}
    tissue = [means[name] for name in TISSUES if name in means]
    cells = [f'{np.mean(tissue):.2f}' if tissue else '-']
    cells += [f'{means[name]:.1f}' if name in means else '-' for name in (*TISSUES, 'L')]
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
    data, out = arguments.data.resolve(), arguments.out.resolve()
    recipe = read_recipe(arguments.recipe)
    sources = {source.name: source for source in recipe.datasets}
    shutil.rmtree(out, ignore_errors=True)
    results: dict[str, dict[str, dict[str, float]]] = {}

    def measure(
        name: str,
        scans: dict[str, dict[str, Path]],
        truths: dict[str, np.ndarray],
        classes: tuple[str, ...] = (*TISSUES, 'L'),
    ) -> None:
        write_dataset(out / 'bids' / name, scans)
        with tempfile.TemporaryDirectory() as work:
            segment(out / 'bids' / name, out / name, arguments.model, Path(work))
        results[name] = {
            subject: dice(
                found_labels(out / name, subject), truth, valid=truth != 255, classes=classes
            )
            for subject, truth in truths.items()
        }

    tissue = tissue_scans(
        data / 'neuromorphometrics', sources['neuromorphometrics'], arguments.part
    )
    measure(
        'neuromorphometrics_T1w',
        {subject: {'T1w': scan} for subject, (scan, _) in tissue.items()},
        {
            subject: classes_of(
                'neuromorphometrics', np.asanyarray(nib.load(labels).dataobj).astype(int)
            )
            for subject, (_, labels) in tissue.items()
        },
        TISSUES,
    )
    heads = paint_heads(data, recipe, arguments.part, out / 'painted')
    for name, modalities in INPUTS.items():
        measure(
            f'heads_{name.replace("+", "_")}',
            {s: {m: images[m] for m in modalities} for s, (images, _) in heads.items()},
            {s: np.asanyarray(nib.load(path).dataobj) for s, (_, path) in heads.items()},
        )
    if arguments.part == 'test':
        anat = data / 'openms-mni' / 'sub-26' / 'anat'
        stem = 'sub-26_space-MNI152'
        mask = np.asanyarray(nib.load(anat / f'{stem}_label-lesion_mask.nii.gz').dataobj) > 0
        truth = np.where(mask, LESION, 0).astype(np.uint8)
        for name, modalities in INPUTS.items():
            scans = {m: anat / f'{stem}_desc-brain_{m}.nii.gz' for m in modalities}
            measure(f'patient_{name.replace("+", "_")}', {'26': scans}, {'26': truth}, ('L',))
    print('| scans | n | tissue mean | ' + ' | '.join((*TISSUES, 'L')) + ' |')
    print('|---|---|---|' + '---|' * (len(TISSUES) + 1))
    for name, scores in results.items():
        print(f'| {name} | {len(scores)} | {row(list(scores.values()))} |')
    card = read_card(arguments.model)
    record = {'model': card.name, 'sha256': card.sha256, 'part': arguments.part, 'dice': results}
    (out / 'accuracy.json').write_text(json.dumps(record, indent=1))


if __name__ == '__main__':
    main()
