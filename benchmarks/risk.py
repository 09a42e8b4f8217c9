"""What the terms of the risk bring, on data of which both tissue and lesions are known.

    python benchmarks/risk.py agreement DATA OUT [--seeds 3] [--arms 4]
    python benchmarks/risk.py table1 DATA OUT

Both train small models with `jointseg-train` on painted patients (:mod:`patients`), whose tissue
the training is not told, and score whole scans of people it has not seen.

`agreement`: controls (T1w, tissue) and patients (T1w and FLAIR, lesions) with and without the
unlabelled term R^t_1, with its options, over some seeds. The arms of a seed go on from the same
weights, learned without the term: its warm-up. Head 01 to 06 are controls, 07 to 12 patients, 13
to 16 are tested.

`table1`: the columns W, N and W+N of the paper's Table 1. N is the tissue of Neuromorphometrics,
W the lesions of the patients painted from heads 01 to 16; tested are the permanent test people
(5 of Neuromorphometrics with 8 scans, heads 17 to 20 with the lesions of patients 27 to 30).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from patients import paint

from bids_jointseg.evaluation import write_tables
from bids_jointseg.labels import TISSUES
from bids_jointseg.metrics import summary

PAINTED = ['T1w', 'FLAIR']
GROUPS = {
    'patients-1': (['01', '02', '03', '04', '05', '06'], ['01', '02', '03', '04', '05', '06']),
    'patients-2': (['07', '08', '09', '10', '11', '12'], ['08', '09', '10', '11', '12', '13']),
    'patients-3': (['13', '14', '15', '16'], ['14', '15', '16', '17']),
    'patients-4': (['17', '18', '19', '20'], ['27', '28', '29', '30']),
}
WITHOUT = {'consistency_from': 1_000_000}
ARMS: dict[str, dict[str, object]] = {
    'without R^t_1': WITHOUT,
    'with R^t_1': {},
    'its target detached': {'stop_gradient': True},
    'lesion voxels in it': {'spare_lesions': False},
}
TISSUE_ONLY = ['BG', 'CGM', 'SGM', 'BS', 'CBM', 'VEN']
"""White matter is then white matter or lesion: what a tissue-only protocol says."""
INPUTS = ('T1w+FLAIR', 'T1w', 'FLAIR')
COMMON = """\
version = '0'
licence = 'for this measurement only'
modalities = ['T1w', 'FLAIR']
fractions = [1.0, 0.0, 0.0]
"""
WARM_UP = 1000
AGREEMENT = """\
in_plane_mm = 2.0
slice_mm = [3.0, 3.0]
window = [64, 80, 32]
[architecture]
name = 'unet'
channels = [8, 16, 32, 64]
[training]
steps = 250
validate_every = 100
consistency_from = 0
consistency_every = 2
supervise_subsets = false
average = 0.98
[samples]
window = [48, 64, 24]
intact_share = 0.5
outside_share = 0.0
view_share = 0.0
"""
TABLE1 = """\
in_plane_mm = 1.0
slice_mm = [3.0, 3.0]
window = [96, 112, 48]
[architecture]
name = 'unet'
channels = [16, 32, 64, 128]
[training]
steps = 1200
validate_every = 200
consistency_from = 300
consistency_every = 1
average = 0.99
[samples]
window = [96, 112, 24]
outside_share = 0.1
"""


def dataset(root: Path, *, told: Sequence[str] = (), test: bool = False) -> str:
    """Return a painted dataset's table for a recipe."""
    modalities = ['T1w'] if root.name == 'controls' else PAINTED
    return f"""
[[datasets]]
name = '{root.name}'
root = '{root}'
modalities = {json.dumps(modalities)}
annotation = 'derivatives/painted'
protocol = 'jointseg'
tells = {json.dumps(list(told))}
test = {json.dumps(['*'] if test else [])}
"""


def tissue_dataset(data: Path) -> str:
    """Return the table of Neuromorphometrics."""
    return f"""
[[datasets]]
name = 'neuromorphometrics'
root = '{data / 'neuromorphometrics'}'
modalities = ['T1w']
annotation = 'derivatives/manual'
entities = {{desc = 'neuromorphometrics'}}
protocol = 'neuromorphometrics'
validation = ['0113', '0353', '0417']
test = ['0111', '0117', '0395', '0300', '0331']
"""


def settings_with(settings: str, changes: Mapping[str, object]) -> str:
    """Return a recipe's settings with others in its table [training]."""
    lines = [
        line
        for line in settings.splitlines(keepends=True)
        if line.partition(' =')[0] not in changes
    ]
    more = ''.join(f'{key} = {json.dumps(value)}\n' for key, value in changes.items())
    return ''.join(lines).replace('[training]\n', f'[training]\n{more}')


def train(name: str, recipe: str, out: Path) -> Path:
    """Train a recipe, unless it is done, and return the folder of its model and scores."""
    folder = out / name.replace('^', '').replace(' ', '-')
    done = folder / 'done'
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'recipe.toml').write_text(recipe)
        code = 'import sys; from bids_jointseg.cli import train; sys.exit(train(sys.argv[1:]))'
        command = [sys.executable, '-c', code, str(folder / 'recipe.toml'), str(folder)]
        command += ['--work-dir', str(out / 'work'), '--device', 'cpu', '--nprocs', '1']
        environment = os.environ | {'OMP_NUM_THREADS': '1'}
        subprocess.run(command, check=True, env=environment)
        done.touch()
    return folder


def read_scores(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a training's table of scores."""
    with (folder / 'evaluation' / 'scans.tsv').open(newline='') as file:
        return list(csv.DictReader(file, delimiter='\t'))


def inputs_of(row: dict[str, str]) -> str:
    """Return which scans a row was made from: 'name (T1w+FLAIR)' -> 'T1w+FLAIR'."""
    return row['model'].rsplit('(', 1)[1].rstrip(')')


def mean_dice(rows: list[dict[str, str]], inputs: str, regions: Sequence[str]) -> float:
    """Return the mean over regions of the mean over scans."""
    means = []
    for region in regions:
        found = [
            float(row['dice'])
            for row in rows
            if row['region'] == region and inputs_of(row) == inputs and row['dice'] != 'n/a'
        ]
        means.append(np.mean(found))
    return float(np.mean(means))


def agreement(data: Path, out: Path, seeds: int, arms: int) -> None:
    """Compare the first arms and write a table."""
    chosen = dict(list(ARMS.items())[:arms])
    made = out / 'data'
    paint(data, made / 'controls', GROUPS['patients-1'][0], [], ['T1w'], 100, alike=True)
    for number, name in enumerate(('patients-2', 'patients-3'), start=2):
        paint(data, made / name, *GROUPS[name], PAINTED, 100 * number, alike=True)
    people = dataset(made / 'controls', told=TISSUE_ONLY)
    people += dataset(made / 'patients-2', told=['L'])
    test = dataset(made / 'patients-3', test=True)
    scores: dict[str, list[list[dict[str, str]]]] = {}
    for seed in range(seeds):
        begin = settings_with(AGREEMENT, WITHOUT | {'seed': seed, 'steps': WARM_UP})
        start = train(f'start {seed}', f"name = 'start'\n{COMMON}{begin}{people}", out)
        for arm, changes in chosen.items():
            settings = settings_with(
                AGREEMENT, changes | {'seed': seed, 'init': str(start / 'start.json')}
            )
            recipe = f"name = 'agreement'\n{COMMON}{settings}{people}{test}"
            scores.setdefault(arm, []).append(read_scores(train(f'{arm} {seed}', recipe, out)))
    lines = ['| | | ' + ' | '.join(chosen) + ' |', '|---|---|' + '---:|' * arms]
    table = {}
    for regions, title in ((TISSUES, 'mean of six tissues'), (('L',), 'lesions')):
        for inputs in INPUTS:
            cells = []
            for arm, runs in scores.items():
                values = [mean_dice(rows, inputs, regions) for rows in runs]
                plain = [mean_dice(rows, inputs, regions) for rows in scores['without R^t_1']]
                gain = summary(np.subtract(values, plain))
                table[f'{title}, {inputs}, {arm}'] = {'dice': values, 'gain': gain.mean} | {
                    'interval': gain.ci
                }
                text = f'{np.mean(values):.1f}'
                if arm != 'without R^t_1':
                    text += f' ({gain.mean:+.1f}'
                    if gain.n > 1:
                        text += f': {gain.ci[0]:+.1f} to {gain.ci[1]:+.1f}'
                    text += ')'
                cells.append(text)
            lines.append(f'| {title} | {inputs} | ' + ' | '.join(cells) + ' |')
    text = '\n'.join(lines) + '\n'
    (out / 'agreement.md').write_text(text)
    (out / 'agreement.json').write_text(json.dumps(table, indent=1))
    sys.stdout.write(text)


def table1(data: Path, out: Path) -> None:
    """Train the columns and write the table."""
    made = out / 'data'
    for number, (name, (heads, masks)) in enumerate(GROUPS.items(), start=1):
        paint(data, made / name, heads, masks, PAINTED, 100 * number)
    patients = [made / f'patients-{number}' for number in (1, 2, 3)]
    lesions = ''.join(dataset(root, told=['L']) for root in patients)
    test = dataset(made / 'patients-4', test=True)
    recipes = {
        'N': tissue_dataset(data) + test,
        'W': lesions + test,
        'W+N': tissue_dataset(data) + lesions + test,
    }
    rows = []
    for name, datasets in recipes.items():
        # Lesions alone say nothing about tissue: there is nothing to agree on.
        settings = settings_with(TABLE1, WITHOUT if name == 'W' else {})
        folder = train(name, f"name = '{name}'\n{COMMON}{settings}{datasets}", out)
        # What a column was not told it cannot say.
        told = {'N': TISSUES, 'W': ('L',)}.get(name, (*TISSUES, 'L'))
        rows += [row for row in read_scores(folder) if row['region'] in told]
    numbers = [{k: _number(v) for k, v in row.items()} for row in rows]
    for path in write_tables(numbers, out / 'table1'):
        sys.stdout.write(f'{path}\n')


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return float('nan') if text == 'n/a' else text


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    options.add_argument('what', choices=('agreement', 'table1'))
    options.add_argument('data', type=Path)
    options.add_argument('out', type=Path)
    options.add_argument('--seeds', type=int, default=3)
    options.add_argument('--arms', type=int, default=len(ARMS), help='the first so many')
    arguments = options.parse_args()
    data, out = arguments.data.absolute(), arguments.out.absolute()
    if arguments.what == 'agreement':
        agreement(data, out, arguments.seeds, arguments.arms)
    else:
        table1(data, out)


if __name__ == '__main__':
    main()
