"""Which idea pays: the released model goes on at half its resolution, each time with one change.

    python benchmarks/ablation.py DATA OUT [--rows NAME ...] [--seconds N]

Small classes and lesions take more iterations from random weights than a row can be given. So
every row begins with the released weights and the package's recipe `jointseg`, on voxels
of 2 mm, which it never saw, and learns these for the same time of a processor, with one thing
changed: what a row lacks, the weights have had before, and a difference says what it brings now.
A row has as many iterations as fit into `--seconds`, timed before. Scored are whole scans
on their own grids, of the recipe's validation people alone: three real T1w, and two painted heads
with unseen lesions from T1w and FLAIR, T1w, and FLAIR. Test people are not even read.

Models are trained as `jointseg-train` does (:func:`bids_jointseg.training.train_recipe`). Only the
cache is made here: a recipe paints scans at 1 mm, this one at 2 mm.

Writes OUT/ablation.md and OUT/ablation.json. A row that is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from accuracy import INPUTS, Case, paint_heads, tissue_scans, true_labels
from numpy.typing import NDArray

from bids_jointseg import cache, image, registration
from bids_jointseg.bids import annotated_scans
from bids_jointseg.card import read_card
from bids_jointseg.image import Grid
from bids_jointseg.inference import predict
from bids_jointseg.labels import CLASSES, PROTOCOLS, TISSUES, bits
from bids_jointseg.metrics import dice
from bids_jointseg.network import load_model
from bids_jointseg.recipe import Recipe, Source, read_recipe
from bids_jointseg.training import train_recipe

MM = 2.0
WINDOW = (48, 56, 24)
TRIAL = 12
"""Iterations that are timed."""
BOTH = INPUTS[0]
PSEUDO = 'openms-pseudo'
RELEASED = 'released weights as they are'
SAMPLES: dict[str, Any] = {'thin_window': WINDOW, 'window': (*WINDOW[:2], 16), 'outside_share': 0}
TRAINING: dict[str, Any] = {
    'init': 'jointseg', 'average': 0.98, 'consistency_from': 0, 'consistency_every': 4,
    'rate': 1.5e-3,
}  # fmt: skip


def base(steps: int) -> Recipe:
    """Return the recipe that all rows are made of."""
    recipe = read_recipe('jointseg')
    return replace(
        recipe,
        slice_mm=(1.0, 1.0),
        fractions=(1.0, 0.0, 0.0),  # but for the people whom it lists
        training=replace(recipe.training, **TRAINING, steps=steps, validate_every=steps),
        samples=replace(recipe.samples, **SAMPLES),
    )


Change = Callable[[Recipe], Recipe]


def training(**values: Any) -> Change:
    """Change the optimisation."""
    return lambda recipe: replace(recipe, training=replace(recipe.training, **values))


def samples(**values: Any) -> Change:
    """Change what is sampled."""
    return lambda recipe: replace(recipe, samples=replace(recipe.samples, **values))


def datasets(change: Callable[[Source], Source | None]) -> Change:
    """Change datasets, or leave them out."""
    return lambda recipe: replace(
        recipe, datasets=tuple(new for new in map(change, recipe.datasets) if new)
    )


def without(root: str) -> Change:
    """Leave the datasets of a folder out."""
    return datasets(lambda source: None if source.root == root else source)


def wider(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return a network with twice the channels; it begins with the same answers."""
    return {**architecture, 'channels': tuple(2 * n for n in architecture['channels'])}


def self_taught(recipe: Recipe) -> Recipe:
    """Add the unlabelled visits with the labels that the first row gives them."""
    labels: dict[str, Any] = {'annotation': '.', 'protocol': 'jointseg'}
    taught = [replace(s, name=PSEUDO, **labels) for s in recipe.datasets if s.name == 'openms']
    return replace(recipe, datasets=(*recipe.datasets, *taught))


ROWS: dict[str, Change] = {
    RELEASED: training(),
    'base': training(),
    'without R^t_1': without('openms'),
    'without steadiness': training(steadiness=0.0),
    'Tanimoto for Soergel': training(overlap='tanimoto'),
    'real scans only': without('heads'),
    'painted heads only': without('neuromorphometrics'),
    'no lesions in tissue people': datasets(
        lambda s: replace(s, lesions=s.root != 'neuromorphometrics')
    ),
    'no modality dropout': samples(modalities=((BOTH, 1.0),)),
    'slices of 6 mm': lambda recipe: replace(recipe, slice_mm=(3.0, 3.0)),
    'no averaging': training(average=0.0),
    'twice the channels': lambda recipe: replace(recipe, architecture=wider(recipe.architecture)),
    'self-training': self_taught,
    'base, seed 2': training(seed=2020),
    'base, seed 3': training(seed=2021),
}


# --- data ---------------------------------------------------------------------------------------


def cache_people(recipe: Recipe, data: Path, folder: Path) -> list[Path]:
    """Cache every person but the test people on voxels of 2 mm; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for source in recipe.datasets:
        for item in () if source.lesion_masks else annotated_scans(source, data / source.root):
            if item.subject in source.test:
                continue
            paths.append(folder / f'{source.name}_{item.name}.npz')
            if paths[-1].is_file():
                continue
            labels = image.load_labels(item.annotation) if item.annotation else None
            arrays: dict[str, Any] = {'images': {}}
            if item.scan is None:
                fine, kinds = cache.painted_grid(labels, source.protocol)
                arrays['kinds'] = kinds[::2, ::2, ::2]
                spread = np.diag([2.0, 2.0, 2.0, 1.0])
                grid = Grid(arrays['kinds'].shape, fine.affine @ spread)
            else:
                t1w = image.load_scan(item.scan.t1w)
                scan = image.load_scan(item.scan.flair) if item.scan.flair else t1w
                grid = image.model_grid(scan, in_plane_mm=MM, slice_mm=(MM, MM))
                if item.scan.flair:
                    move = registration.register(scan, t1w)
                    arrays['images']['FLAIR'] = image.resample(scan, grid, threads=1)
                    arrays['images']['T1w'] = image.resample(t1w, grid, move, threads=1)
                else:
                    arrays['images']['T1w'] = image.resample(scan, grid, threads=1)
                if source.painted:
                    arrays['kinds'] = cache.kinds_on(grid, labels, source.protocol)
            if labels:
                arrays['sets'] = cache.sets_on(grid, labels, PROTOCOLS[source.protocol])
            identity = {'dataset': source.name, 'subject': item.subject, 'name': item.name}
            cache.write_person(paths[-1], grid=grid, **identity, **arrays)
    return paths


def lesion_masks(recipe: Recipe, data: Path) -> dict[str, dict[str, Path]]:
    """Return the masks of all patients but the test patients."""
    return {
        source.name: {
            item.subject: item.annotation
            for item in annotated_scans(source, data / source.root)
            if item.subject not in source.test
        }
        for source in recipe.datasets
        if source.lesion_masks
    }


def pseudo_labelled(paths: list[Path], model: Path, folder: Path) -> list[Path]:
    """Cache the unlabelled visits with the labels that a model gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    network = load_model(read_card(model))
    classes = np.array([bits({name}) for name in CLASSES], np.uint8)
    written = []
    for path in paths:
        with np.load(path) as stored:
            arrays = dict(stored)
        if str(arrays['dataset']) != 'openms':
            continue
        images = {
            name: image.normalise(array.astype(np.float32))
            for name, array in cache.raw_images(path).items()
        }
        (found,) = predict(network, images, window=WINDOW, device='cpu')
        arrays |= {'dataset': PSEUDO, 'sets': classes[found.argmax(axis=0)]}
        written.append(folder / f'{PSEUDO}_{arrays["name"]}.npz')
        cache.write_arrays(written[-1], arrays)
    return written


# --- one row ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What all rows share: the cached people, lesion masks, and the cases that score."""

    paths: list[Path]
    masks: dict[str, dict[str, Path]]
    cases: dict[str, Case]
    out: Path
    seconds: float

    def run(self, name: str) -> dict[str, Any]:
        """Train and score a row, unless it is there."""
        folder = self.out / name.replace('^', '').replace(' ', '-').replace(',', '')
        kept = folder / 'row.json'
        if not kept.is_file():
            steps, model = (0, 'jointseg') if name == RELEASED else self.trained(name, folder)
            slice_mm = MM * ROWS[name](base(1)).slice_mm[0]
            row = {'row': name, 'iterations': steps} | self.score(model, slice_mm)
            folder.mkdir(exist_ok=True)
            kept.write_text(json.dumps(row, indent=1))
        return dict(json.loads(kept.read_text()))

    def trained(self, name: str, folder: Path) -> tuple[int, str]:
        """Train a row for its processor seconds; return the iterations and the model's card."""
        paths = self.paths
        if name == 'self-training':
            teacher = self.out / 'base' / 'jointseg.json'
            paths = [*paths, *pseudo_labelled(paths, teacher, self.out / 'pseudo')]
        plan = folder / 'iterations'
        if not plan.is_file():  # the same again, if the training is cut off and goes on
            # What it takes to begin and to end is not counted, nor what the first training of a
            # process takes longer.
            _, ends, trial = (
                self.train(name, paths, steps, folder / kind)
                for kind, steps in (('first', 1), ('ends', 1), ('trial', TRIAL))
            )
            plan.write_text(str(round((TRIAL - 1) * self.seconds / (trial - ends))))
        steps = int(plan.read_text())
        self.train(name, paths, steps, folder)
        return steps, str(folder / 'jointseg.json')

    def train(self, name: str, paths: list[Path], steps: int, folder: Path) -> float:
        """Train a row, or go on training it, and return the processor seconds of this."""
        recipe = ROWS[name](base(steps))
        names = {source.name for source in recipe.datasets}
        chosen = [path for path in paths if path.name.partition('_')[0] in names]
        begun = time.process_time()
        card = train_recipe(
            recipe, cache=chosen, masks=self.masks, folder=folder, device='cpu', workers=0
        )
        if not card.training['finished']:
            sys.exit(f'{name}: stopped at {card.training["steps"]}; the same command goes on')
        return time.process_time() - begun

    def score(self, model: str, slice_mm: float) -> dict[str, float]:
        """Return the mean Dice of tissue and lesions for each kind of scan and input."""
        network = load_model(read_card(model))
        found: dict[str, list[float]] = {}
        for case in self.cases.values():
            truth = true_labels(case)
            for names in INPUTS:
                if not case.images.keys() >= set(names):
                    continue
                labels = segment(network, {n: case.images[n] for n in names}, slice_mm)
                scores = dice(labels, truth, valid=truth != 255)
                kind = f'{"head" if "FLAIR" in case.images else "real"} {"+".join(names)}'
                for tissue in TISSUES:
                    found.setdefault(f'{kind} {tissue}', []).append(scores[tissue])
                if kind.startswith('head'):
                    found.setdefault(f'{kind} L', []).append(scores['L'])
        means = {key: round(float(np.mean(values)), 2) for key, values in found.items()}
        for kind in dict.fromkeys(key.rsplit(' ', 1)[0] for key in found):
            of_kind = [means[f'{kind} {tissue}'] for tissue in TISSUES]
            means[f'{kind} tissue'] = round(float(np.mean(of_kind)), 2)
        return means


def segment(
    network: torch.nn.Module, files: Mapping[str, Path], slice_mm: float
) -> NDArray[np.uint8]:
    """Return the label map of scans that lie on one grid, on that grid, without mirror image."""
    scans = {name: image.load_scan(path) for name, path in files.items()}
    first, reference = next(iter(scans.items()))
    grid = image.model_grid(reference, in_plane_mm=MM, slice_mm=(slice_mm, slice_mm))
    images = {
        name: image.normalise(image.resample(scan, grid, threads=1))
        for name, scan in scans.items()
    }
    depth = WINDOW[2] if slice_mm == MM else SAMPLES['window'][2]
    (found,) = predict(network, images, window=(*WINDOW[:2], depth), device='cpu')
    joint = image.joint_probabilities(
        {first: (found, grid)}, reference.grid, {first: np.eye(4)}, threads=1
    )
    return image.label_map(joint)


COLUMNS = {
    'real T1w: tissue': 'real T1w tissue',
    'head T1w+FLAIR: tissue': 'head T1w+FLAIR tissue',
    'T1w: tissue': 'head T1w tissue',
    'FLAIR: tissue': 'head FLAIR tissue',
    'T1w+FLAIR: lesions': 'head T1w+FLAIR L',
    'FLAIR: lesions': 'head FLAIR L',
    'T1w: lesions': 'head T1w L',
}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = ['| row | iterations | ' + ' | '.join(COLUMNS) + ' |', '|---|' + '---:|' * 8]
    for row in rows:
        cells = [f'{row[key]:.1f}' for key in COLUMNS.values()]
        lines.append(f'| {row["row"]} | {row["iterations"]} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Train, score and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=list(ROWS), metavar='NAME')
    parser.add_argument('--seconds', type=float, default=250.0, help='of a processor, each row')
    options = parser.parse_args()
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S')
    logging.getLogger('bids_jointseg').setLevel(logging.INFO)
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    recipe = read_recipe('jointseg')
    data, out = options.data.absolute(), options.out.absolute()
    sources = {source.name: source for source in recipe.datasets}
    cases = tissue_scans(sources['neuromorphometrics'], data, 'validation')
    cases |= paint_heads(
        sources['heads'], sources['openms-mni'], data, 'validation', out / 'painted'
    )
    bench = Bench(
        cache_people(recipe, data, out / 'cache'),
        lesion_masks(recipe, data),
        cases,
        out,
        options.seconds,
    )
    rows = []
    for name in options.rows:
        rows.append(bench.run(name))
        (out / 'ablation.md').write_text(table(rows))
        (out / 'ablation.json').write_text(json.dumps(rows, indent=1))
    sys.stdout.write(table(rows))


if __name__ == '__main__':
    main()
