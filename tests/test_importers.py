"""The packaged recipes on files as the published datasets have them: found, and understood."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import describe_dataset, put

from bids_jointseg.bids import annotated_scans
from bids_jointseg.labels import ALL, IGNORE, bits
from bids_jointseg.recipe import RECIPES, Recipe, TrainingSettings, read_recipe

NAMES = sorted(path.stem for path in RECIPES.glob('*.toml'))


def image(data: np.ndarray, spacing_mm: tuple[float, float, float]) -> nib.Nifti1Image:
    return nib.Nifti1Image(data, np.diag([*spacing_mm, 1.0]))


def scan(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> nib.Nifti1Image:
    return image(np.random.default_rng(0).integers(0, 900, shape).astype(np.int16), spacing_mm)


def wmh2017(root: Path) -> None:
    """60 scans of three sites; T1 resampled to the FLAIR, wmh.nii.gz on its grid."""
    describe_dataset(root)
    for label in ('utrecht0', 'singapore50', 'amsterdam100'):
        spacing = (0.96, 0.95, 3.0)
        anat = root / f'sub-{label}' / 'anat'
        put(scan((6, 5, 3), spacing), anat / f'sub-{label}_T1w.nii.gz')
        put(scan((6, 5, 3), spacing), anat / f'sub-{label}_FLAIR.nii.gz')
        wmh = np.zeros((6, 5, 3), np.float32)
        wmh[2:4, 2, 1], wmh[0, 0, 2] = 1, 2
        anat = root / 'derivatives' / 'manual' / f'sub-{label}' / 'anat'
        put(image(wmh, spacing), anat / f'sub-{label}_dseg.nii.gz')


def miccai2012(root: Path) -> None:
    """T1w of OASIS at 1 mm, five people twice, labels 0 to 207."""
    describe_dataset(root)
    for name in ('1000_ses-1', '1010_ses-1', '1061_ses-1', '1061_ses-2'):
        folders = Path(f'sub-{name.split("_")[0]}', name.split('_')[1], 'anat')
        put(scan((6, 5, 4), (1, 1, 1)), root / folders / f'sub-{name}_T1w.nii.gz')
        labels = np.zeros((6, 5, 4), np.int16)
        labels[0, 0] = 44, 45, 59, 207
        labels[1, 0] = 35, 71, 52, 46
        path = root / 'derivatives' / 'manual' / folders / f'sub-{name}_dseg.nii.gz'
        put(image(labels, (1, 1, 1)), path)


def gif(root: Path) -> None:
    """T1w with NiftyWeb's parcellation, labels 0 to 208."""
    describe_dataset(root)
    for label in ('002S0295', '002S0413', '002S0685'):
        anat = Path(f'sub-{label}', 'anat')
        put(scan((6, 5, 4), (1.2, 1, 1)), root / anat / f'sub-{label}_T1w.nii.gz')
        labels = np.full((6, 5, 4), 1, np.float32)
        labels[0, 0] = 84, 208, 60, 35
        labels[1, 0] = 72, 53, 4, 66
        path = root / 'derivatives' / 'gif' / anat / f'sub-{label}_dseg.nii.gz'
        put(image(labels, (1.2, 1, 1)), path)


def mrbrains18(root: Path) -> None:
    """Seven people; all on one grid, segm.nii.gz with labels 0 to 10."""
    describe_dataset(root)
    spacing = (0.958, 0.958, 3.0)
    for label in ('1', '4', '5', '7', '14', '070', '148'):
        anat = Path(f'sub-{label}', 'anat')
        put(scan((11, 4, 3), spacing), root / anat / f'sub-{label}_T1w.nii.gz')
        put(scan((11, 4, 3), spacing), root / anat / f'sub-{label}_FLAIR.nii.gz')
        segm = np.zeros((11, 4, 3), np.int16)
        segm[:, 0, 0] = np.arange(11)
        put(image(segm, spacing), root / 'derivatives/manual' / anat / f'sub-{label}_dseg.nii.gz')


def encoded(recipe: Recipe, name: str, data: Path) -> tuple[list[str], np.ndarray]:
    """Index a dataset of a recipe; return the names of its scans, and what the first says."""
    (source,) = (source for source in recipe.datasets if source.name == name)
    found = annotated_scans(source, data / source.root)
    for item in found:
        assert item.scan is not None
        assert item.annotation is not None
        scans = [path for path in (item.scan.t1w, item.scan.flair) if path is not None]
        assert [path.name.split('.')[0].split('_')[-1] for path in scans] == [*source.modalities]
        assert {nib.load(path).shape for path in (*scans, item.annotation)} == {
            nib.load(item.annotation).shape
        }
    assert source.labels is not None
    labels = np.asanyarray(nib.load(found[0].annotation).dataobj)
    return [item.name for item in found], source.labels.encode(labels)


@pytest.mark.parametrize('recipe', ['paper-w', 'paper-wn'])
def test_wmh2017(tmp_path, recipe):
    wmh2017(tmp_path / 'wmh2017')
    names, sets = encoded(read_recipe(recipe), 'wmh2017', tmp_path)
    assert names == ['sub-amsterdam100', 'sub-singapore50', 'sub-utrecht0']
    assert sets[2, 2, 1] == bits({'L'})
    assert sets[0, 0, 2] == bits(IGNORE)
    assert (sets == bits(ALL - {'L'})).sum() == sets.size - 3


@pytest.mark.parametrize('recipe', ['paper-n', 'paper-wn'])
def test_tissue_of_two_protocols(tmp_path, recipe):
    miccai2012(tmp_path / 'neuromorphometrics')
    gif(tmp_path / 'adni2-gif')
    names, sets = encoded(read_recipe(recipe), 'neuromorphometrics', tmp_path)
    assert names == ['sub-1000_ses-1', 'sub-1010_ses-1', 'sub-1061_ses-1', 'sub-1061_ses-2']
    expected = [['WM', 'WM', 'SGM', 'CGM'], ['BS', 'CBM', 'VEN', 'BG']]
    assert sets[:2, 0].tolist() == [[bits({name}) for name in row] for row in expected]
    assert (sets[2:] == bits({'BG'})).all()
    names, sets = encoded(read_recipe(recipe), 'adni2-gif', tmp_path)
    assert names == ['sub-002S0295', 'sub-002S0413', 'sub-002S0685']
    assert sets[0, 0].tolist() == [bits({name}) for name in ('WM', 'CGM', 'SGM', 'BS')]
    assert sets[1, 0].tolist() == [bits(g) for g in ({'CBM'}, {'VEN'}, {'BG'}, IGNORE)]
    assert (sets[2:] == bits({'BG'})).all()


@pytest.mark.parametrize('recipe', ['paper-m', 'paper-wn'])
def test_mrbrains18(tmp_path, recipe):
    mrbrains18(tmp_path / 'mrbrains18')
    names, sets = encoded(read_recipe(recipe), 'mrbrains18', tmp_path)
    assert len(names) == 7
    single = ('BG', 'CGM', 'SGM', 'WM', 'L', 'BG', 'VEN', 'CBM', 'BS')
    expected = [bits({name}) for name in single] + [bits(IGNORE)] * 2
    assert sets[:, 0, 0].tolist() == expected


OWN = """name = 'own'
version = '0'
licence = 'CC0-1.0'
architecture = {name = 'unet'}
[[datasets]]
name = 'cohort'
modalities = ['T1w']
annotation = 'derivatives/labels'
"""


@pytest.mark.parametrize(
    ('protocol', 'labels', 'expected'),
    [
        # aparc+aseg: white matter, hypointensity, hippocampus, cortex, thalamus, choroid plexus
        (
            'freesurfer',
            (0, 41, 77, 53, 2035, 49, 63, 72),
            ({'BG'}, {'WM'}, {'L'}, {'CGM'}, {'CGM'}, {'SGM'}, IGNORE, {'VEN'}),
        ),
        # SPM's order of tissues: gray is either kind, white may hold lesions
        (
            'own.tsv',
            (0, 1, 2, 3, 0, 0, 0, 9),
            (
                {'BG'}, {'CGM', 'SGM'}, {'WM', 'L'}, {'VEN', 'BG'}, {'BG'}, {'BG'}, {'BG'}, IGNORE,
            ),
        ),
    ],
)  # fmt: skip
def test_labels_of_ones_own(tmp_path, protocol, labels, expected):
    rows = ['0\tBG', '1\tCGM SGM', '2\tWM L', '3\tVEN BG', '9\tignore']
    (tmp_path / 'own.tsv').write_text('\n'.join(['index\tclasses', *rows]), 'utf-8')
    (tmp_path / 'own.toml').write_text(f"{OWN}protocol = '{protocol}'\n", 'utf-8')
    root = describe_dataset(tmp_path / 'cohort')
    put(scan((8, 1, 1), (1, 1, 1)), root / 'sub-1' / 'anat' / 'sub-1_T1w.nii')
    volume = np.array(labels, np.int32).reshape(8, 1, 1)
    folder = root / 'derivatives' / 'labels' / 'sub-1' / 'anat'
    put(image(volume, (1, 1, 1)), folder / 'sub-1_desc-aparcaseg_dseg.nii.gz')
    names, sets = encoded(read_recipe(tmp_path / 'own.toml'), 'cohort', tmp_path)
    assert names == ['sub-1']
    assert sets.ravel().tolist() == [bits(group) for group in expected]


def test_every_column_of_the_papers_table_has_its_recipe():
    papers = ['paper', 'paper-m', 'paper-n', 'paper-w', 'paper-wn']
    assert NAMES == ['intracranial', 'jointseg', 'locator', 'open', *papers]


@pytest.mark.parametrize('name', NAMES)
def test_packaged_recipes_are_sound(name):
    recipe, smoke = read_recipe(name), read_recipe(name, smoke=True)
    assert recipe.name == smoke.name == name
    assert smoke.datasets == recipe.datasets
    assert smoke.folds == 1
    assert smoke.training.steps <= 20
    assert np.prod(smoke.samples.window) < np.prod(recipe.samples.window) / 8
    for source in recipe.datasets:
        assert source.name in (RECIPES / f'{name}.toml').read_text('utf-8').split('\nname')[0]
        assert (source.labels is None) == (source.stream == 'unlabelled')
    json.dumps([asdict(recipe.training), asdict(recipe.samples)], allow_nan=False)


def test_streams_of_the_packaged_recipes():
    streams = {
        name: {source.name: source.stream for source in read_recipe(name).datasets}
        for name in NAMES
    }
    assert streams == {
        'jointseg': {
            'neuromorphometrics': 'tissue',
            'neuromorphometrics-painted': 'tissue',
            'heads': 'lesions',
            'openms-mni': 'masks',
            'openms': 'unlabelled',
        },
        'intracranial': {'heads': 'lesions', 'openms-mni': 'masks'},
        'locator': {'heads': 'lesions', 'openms-mni': 'masks'},
        'open': {'heads': 'lesions', 'openms-mni': 'masks', 'openms': 'unlabelled'},
        'paper': {
            'neuromorphometrics': 'tissue',
            'heads': 'lesions',
            'openms-mni': 'masks',
            'openms': 'unlabelled',
        },
        'paper-w': {'wmh2017': 'lesions'},
        'paper-n': {'neuromorphometrics': 'tissue', 'adni2-gif': 'tissue'},
        'paper-m': {'mrbrains18': 'lesions'},
        'paper-wn': {
            'wmh2017': 'lesions',
            'neuromorphometrics': 'tissue',
            'adni2-gif': 'tissue',
            'mrbrains18': 'lesions',
        },
    }


@pytest.mark.parametrize('name', [name for name in NAMES if name.startswith('paper-')])
def test_the_papers_settings(name):
    recipe = read_recipe(name)
    assert recipe.architecture == {'name': 'highresnet', 'channels': (16, 32, 64), 'blocks': 3}
    assert (recipe.in_plane_mm, recipe.slice_mm, recipe.landmarks) == (1.0, (3.0, 3.0), True)
    assert (recipe.folds, recipe.fractions, recipe.window) == (4, (0.7, 0.1, 0.2), None)
    training = recipe.training
    assert (training.optimiser, training.rate, training.betas) == (
        'adam', 0.005, (0.9, 0.999),
    )  # fmt: skip
    assert (training.decay, training.schedule) == (0, 'constant')
    assert (training.overlap, training.entropy_weight) == ('tanimoto', 0)
    assert (training.average, training.batch) == (0, 1)
    assert recipe.samples.window == (120, 120, 40)
    assert recipe.samples.augment is False
    # R^t_1 after 5000 iterations of the joint model; nowhere else
    agreement = (training.consistency_from, training.consistency_every)
    usual = TrainingSettings()
    assert agreement == {'paper-wn': (5000, 1), 'paper-w': (training.steps, 1)}.get(
        name, (usual.consistency_from, usual.consistency_every)
    )


def test_mrbrains18_only_evaluates_the_joint_model():
    recipe = read_recipe('paper-wn')
    held_out = {source.name: source.test for source in recipe.datasets if source.test}
    assert held_out == {'mrbrains18': ('*',)}
    source = recipe.datasets[-1]
    for fold in range(4):
        parts = recipe.split({source.name: ['1', '4', '070']}, fold)[source.name]
        assert set(parts.values()) == {'test'}
    # seven people still have every part in the fully supervised model
    recipe = read_recipe('paper-m')
    people = {'mrbrains18': ['1', '4', '5', '7', '14', '070', '148']}
    parts = recipe.split(people, 3)['mrbrains18']
    assert sorted(parts.values()) == ['test', *['train'] * 5, 'validation']
