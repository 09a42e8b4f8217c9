"""A whole training, from BIDS datasets that are each annotated for one task to its tables."""

from __future__ import annotations

import csv
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import describe_dataset, put

from bids_jointseg import cli
from bids_jointseg.cache import read_person
from bids_jointseg.card import ModelCard, read_card
from bids_jointseg.labels import ALL, bits

RECIPE = """
name = 'tiny'
version = '0'
licence = 'CC0-1.0'
in_plane_mm = 6.0
slice_mm = [6.0, 9.0]
landmarks = true
folds = 2
fractions = [0.5, 0.25, 0.25]

[architecture]
name = 'unet'
channels = [2, 4]

[training]
steps = 4
validate_every = 2
consistency_from = 1
consistency_every = 2

[samples]
window = [16, 16, 8]
augment = false

[[datasets]]
name = 'patients'
modalities = ['T1w', 'FLAIR']
annotation = 'derivatives/manual'
suffix = 'mask'
protocol = 'binary-lesion'

[[datasets]]
name = 'controls'
modalities = ['T1w']
annotation = 'derivatives/atlas'
protocol = 'atlas.tsv'

[[datasets]]
name = 'strangers'
modalities = ['T1w', 'FLAIR']
test = ['2']
"""
# The atlas does not say where CSF ends and a ventricle begins.
ATLAS = 'index\tclasses\n0\tBG\n1\tBG\n3\tCGM\n4\tWM\n5\tVEN BG\n'

T1W = ((26, 30, 26), (6.0, 6.0, 6.0))
FLAIR = ((26, 30, 18), (6.0, 6.0, 9.0))
LEVELS = {'T1w': (5, 300, 100, 600, 800, 200, 500), 'FLAIR': (5, 250, 80, 700, 500, 100, 1000)}
RADII = np.array([[74, 86, 74], [69, 81, 69], [64, 76, 64], [52, 64, 52], [14, 24, 14]])


def draw(grid: tuple, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Draw head, skull, gray, white and fluid (1 to 5) and a lesion (6); return labels, affine."""
    shape, spacing = grid
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(spacing) * (np.array(shape) - 1) / 2
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), -1) * spacing
    points = points + affine[:3, 3] - shift
    labels = np.zeros(shape, np.int16)
    for value, radius in enumerate(RADII * (1 + 0.01 * seed), start=1):
        labels[np.linalg.norm(points / radius, axis=-1) < 1] = value
    labels[np.linalg.norm(points - (32, 10 + seed, 14), axis=-1) < 13] = 6
    return labels, affine


def scan(grid: tuple, suffix: str, seed: int, *, lesion: bool, shift: float = 0.0):
    """Return an image and its label map."""
    labels, affine = draw(grid, seed, shift)
    if not lesion:
        labels[labels == 6] = 4
    data = np.array(LEVELS[suffix])[labels] + np.random.default_rng(seed).normal(0, 12, grid[0])
    return (
        nib.Nifti1Image(data.clip(0).astype(np.int16), affine),
        nib.Nifti1Image(labels.astype(np.uint8), affine),
    )


def of(root: Path, stem: str, *, folder: str = '') -> Path:
    """Return the path of a file, without its suffix."""
    parts = stem.split('_')
    return root / folder / Path(*parts[: 1 + stem.count('_ses-')]) / 'anat' / stem


def add_pair(root: Path, stem: str, seed: int) -> nib.Nifti1Image:
    """Add a T1w and a FLAIR on another grid; return the labels of the FLAIR."""
    t1w, _ = scan(T1W, 'T1w', seed, lesion=True)
    flair, labels = scan(FLAIR, 'FLAIR', seed, lesion=True, shift=9.0)
    put(t1w, of(root, f'{stem}_T1w.nii.gz'))
    put(flair, of(root, f'{stem}_FLAIR.nii.gz'))
    return labels


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    """The recipe, beside its data."""
    folder = tmp_path_factory.mktemp('data')
    patients, controls, strangers = (
        describe_dataset(folder / name) for name in ('patients', 'controls', 'strangers')
    )
    for number in range(1, 5):
        labels = add_pair(patients, f'sub-{number}', number)
        mask = nib.Nifti1Image((labels.get_fdata() == 6).astype(np.uint8), labels.affine)
        stem = f'sub-{number}_space-FLAIR_mask.nii.gz'
        put(mask, of(patients, stem, folder='derivatives/manual'))
    # Of the last one, half of a file is lost.
    broken = of(patients, 'sub-4_FLAIR.nii.gz')
    broken.write_bytes(broken.read_bytes()[:3000])
    # The first control came twice.
    for seed, stem in enumerate(('sub-1_ses-1', 'sub-1_ses-2', 'sub-2', 'sub-3'), start=10):
        image, labels = scan(T1W, 'T1w', seed, lesion=False)
        data = labels.get_fdata().astype(np.uint8)
        data[data == 2] = 5  # fluid beneath the skull
        put(image, of(controls, f'{stem}_T1w.nii.gz'))
        labels = nib.Nifti1Image(data, labels.affine)
        put(labels, of(controls, f'{stem}_dseg.nii.gz', folder='derivatives/atlas'))
    add_pair(strangers, 'sub-1', 20)
    put(scan(T1W, 'T1w', 21, lesion=True)[0], of(strangers, 'sub-2_T1w.nii.gz'))
    (folder / 'tiny.toml').write_text(RECIPE)
    (folder / 'atlas.tsv').write_text(ATLAS)
    return folder / 'tiny.toml'


def jointseg_train(*arguments: object) -> tuple[int, list[str]]:
    """Return the exit code and what is written to the standard output."""
    options = ['--device', 'cpu', '--nprocs', '2', '--omp-nthreads', '1', '--workers', '0']
    with redirect_stdout(StringIO()) as stream:
        code = int(cli.train([*map(str, arguments), *options]))
    return code, stream.getvalue().splitlines()


@dataclass(frozen=True)
class Call:
    """What one call of the command left: its exit code, its words, its files and their ages."""

    code: int
    table: list[str]
    written: dict[Path, int]
    curves: list[list[str]]

    def of(self, pattern: str) -> dict[Path, int]:
        return {path: age for path, age in self.written.items() if path.match(pattern)}


@pytest.fixture(scope='module')
def calls(recipe, tmp_path_factory):
    """Three times the same command; the first one is stopped in the first step of each fold."""
    out = tmp_path_factory.mktemp('out')
    found = []
    for more in (['--hours', '1e-9'], [], []):
        code, table = jointseg_train(recipe, out, *more)
        written = {path: path.stat().st_mtime_ns for path in out.rglob('*') if path.is_file()}
        curves = [path.read_text().splitlines() for path in sorted(out.glob('fold-*/curve.csv'))]
        found.append(Call(code, table, written, curves))
    return out, found


def cards(out: Path) -> list[ModelCard]:
    return [read_card(out / f'fold-{fold}' / 'tiny.json') for fold in range(2)]


def parts(card: ModelCard) -> dict[str, dict[str, list[str]]]:
    told = card.training
    return {name: told[name] for name in ('people', 'unlabelled', 'validation', 'test')}


@pytest.mark.slow
def test_a_broken_scan_is_named_and_left_out(calls):
    out, found = calls
    for call in found:
        assert call.code == cli.Exit.SCANS_FAILED
        head, row, *rest = call.table
        assert head.split() == ['failed', 'at', 'why']
        assert row.split()[:2] == ['patients_sub_4', 'check']
        assert 'sub-4_FLAIR.nii.gz: the image data cannot be read' in row
        assert rest == []
    names = {path.name.rpartition('_ref-')[0] for path in found[0].of('scans/*.npz')}
    assert names == {
        *(f'patients_sub-{number}' for number in range(1, 4)),
        *('controls_sub-1_ses-1', 'controls_sub-1_ses-2', 'controls_sub-2', 'controls_sub-3'),
        *('strangers_sub-1', 'strangers_sub-2'),
    }
    for card in cards(out):
        assert all('4' not in people.get('patients', ()) for people in parts(card).values())


@pytest.mark.slow
def test_labels_reach_the_grid_of_either_scan(calls):
    """The mask was drawn on the FLAIR, which lies elsewhere than the T1w."""
    out, _ = calls
    files = sorted((out / 'work' / 'scans').glob('patients_sub-1_ref-*.npz'))
    assert files
    for path in files:
        person = read_person(path)
        assert person.images.keys() == {'T1w', 'FLAIR'}
        lesion = person.sets == bits({'L'})
        assert {bits({'L'}), bits(ALL - {'L'})} <= set(person.sets.unique().tolist())
        volume = int(lesion.sum()) * np.prod(person.spacing_mm)
        assert volume == pytest.approx(4 / 3 * np.pi * 13**3, rel=0.3)
        flair = person.images['FLAIR'].float()
        assert flair[lesion].mean() > 1.5 * flair[flair > 0.2].mean()
    (path,) = (out / 'work' / 'scans').glob('controls_sub-2_ref-*.npz')
    sets = set(read_person(path).sets.unique().tolist())
    assert {bits({'BG'}), bits({'CGM'}), bits({'WM'}), bits({'BG', 'VEN'})} <= sets


@pytest.mark.slow
def test_a_stopped_training_goes_on_and_nothing_is_computed_twice(calls):
    out, (first, second, third) = calls
    assert first.curves == [] or all(len(lines) < 2 for lines in first.curves)
    assert not first.of('evaluation/*')
    assert all(len(lines) == 1 + 2 for lines in second.curves)
    assert second.curves == third.curves
    for card in cards(out):
        assert card.training['finished']
        assert card.training['steps'] == 4
    cached = first.of('scans/*.npz')
    assert len(cached) >= 9
    assert second.of('scans/*.npz') == third.of('scans/*.npz') == cached
    scores = second.of('score/rows.json')
    assert scores
    assert third.of('score/rows.json') == scores


@pytest.mark.slow
def test_the_card_names_the_split_and_nobody_is_in_two_parts(calls):
    out, _ = calls
    tested = []
    for card in cards(out):
        split = parts(card)
        for dataset, count in (('patients', 3), ('controls', 3), ('strangers', 1)):
            people = [name for part in split.values() for name in part.get(dataset, ())]
            assert len(people) == len(set(people)) == count, dataset
        # Of two strangers, one has a T1w alone, which says nothing.
        assert split['unlabelled'] == {'strangers': ['1']}
        assert split['people'].keys() == {'patients', 'controls'}
        tested.append({(name, *split['test'][name]) for name in ('patients', 'controls')})
        assert card.landmarks.keys() == {'T1w', 'FLAIR'}
        assert card.licence == 'CC0-1.0'
    assert not tested[0] & tested[1]


@pytest.mark.slow
def test_whole_scans_of_test_people_are_scored(calls):
    out, _ = calls
    with (out / 'evaluation' / 'scans.tsv').open() as file:
        rows = list(csv.DictReader(file, delimiter='\t'))
    found = {(row['dataset'], row['scan'], row['model'], row['region']) for row in rows}
    expected = set()
    for fold, card in enumerate(cards(out)):
        ((patient,), (control,)) = (card.training['test'][n] for n in ('patients', 'controls'))
        expected |= {
            ('patients', f'sub-{patient}_fold-{fold}', f'tiny ({inputs})', 'L')
            for inputs in ('T1w+FLAIR', 'FLAIR')
        }
        scans = ('sub-1_ses-1', 'sub-1_ses-2') if control == '1' else (f'sub-{control}',)
        expected |= {
            ('controls', f'{name}_fold-{fold}', 'tiny (T1w)', region)
            for name in scans
            for region in ('CGM', 'WM')
        }
    # The atlas tells no ventricles from what surrounds the brain.
    assert found == expected
    assert {path.name for path in (out / 'evaluation').iterdir()} >= {'cohort.tsv', 'table1.md'}


@pytest.mark.slow
def test_a_trial_scores_one_test_scan_of_each_dataset(recipe, tmp_path):
    listed = "protocol = 'atlas.tsv'\ntest = ['1']\nvalidation = ['2']\n"
    text = RECIPE.replace("protocol = 'atlas.tsv'\n", listed)
    # The controls come twice, as in the recipe of the default model.
    entry = '[[datasets]]' + text.split('[[datasets]]')[2]
    text += entry.replace("'controls'", "'again'\nroot = 'controls'")
    trial = recipe.with_name('trial.toml')
    trial.write_text(f'{text}\n[smoke]\nfolds = 1\n[smoke.training]\nsteps = 2\n')
    code, _ = jointseg_train(trial, tmp_path, '--smoke')
    assert code == cli.Exit.SCANS_FAILED  # the patient whose file is broken
    assert len(parts(read_card(tmp_path / 'tiny.json'))['test']['controls']) == 1
    with (tmp_path / 'evaluation' / 'scans.tsv').open() as file:
        scored = {(row['dataset'], row['scan']) for row in csv.DictReader(file, delimiter='\t')}
    # The control who is tested came twice.
    assert sorted(dataset for dataset, _ in scored) == ['controls', 'patients']
    assert ('controls', 'sub-1_ses-1') in scored


def test_what_is_wrong_is_said_before_anything_is_computed(recipe, tmp_path, capsys):
    other = tmp_path / 'data'
    other.mkdir()
    bad = {
        'table': RECIPE.replace('augment', 'augmented'),
        'layers': RECIPE.replace('[2, 4]', '[]'),
        'start': RECIPE.replace('[samples]', "init = 'none.json'\n[samples]"),
    }
    (tmp_path / 'atlas.tsv').write_text(ATLAS)
    for name, text in bad.items():
        (tmp_path / f'{name}.toml').write_text(text)
    for arguments, says in (
        ([tmp_path / 'table.toml'], r'table\.toml: unknown: augmented; \[samples\] has window'),
        ([tmp_path / 'layers.toml'], r"layers\.toml: architecture 'unet': "),
        ([tmp_path / 'start.toml'], r'start\.toml: .*none\.json: cannot read the model card'),
        ([recipe, '--fold', '2'], r'no fold 2, only 0 to 1'),
        (['paper-wn'], r'paper-wn.* say where its --data lie'),
        ([recipe, '--data', other], r'patients: no such folder'),
        ([tmp_path / 'none.toml'], r'none\.toml: cannot read the recipe'),
    ):
        first, *rest = arguments
        code, table = jointseg_train(first, tmp_path / 'out', *rest)
        assert code == cli.Exit.USAGE
        assert table == []
        assert re.search(says, capsys.readouterr().err)
    assert not list((tmp_path / 'out').glob('work/*'))
