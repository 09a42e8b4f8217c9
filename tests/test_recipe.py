"""What a recipe says, who is held out, and which label map goes with which scan."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import describe_dataset

from bids_jointseg.bids import annotated_scans
from bids_jointseg.labels import ALL
from bids_jointseg.recipe import Recipe, RecipeError, Source, TrainingSettings, read_recipe

HEAD = "name = 'x'\nversion = '0'\nlicence = 'CC0-1.0'\narchitecture = {name = 'unet'}\n"
LESIONS = """
[[datasets]]
name = 'lesions'
modalities = ['T1w', 'FLAIR']
annotation = 'derivatives/manual'
suffix = 'mask'
protocol = 'binary-lesion'
"""
MASKS = """
[[datasets]]
name = '{}'
lesion_masks = true
annotation = '.'
suffix = 'mask'
protocol = 'binary-lesion'
"""


def write(folder: Path, text: str) -> Path:
    path = folder / 'mine.toml'
    path.write_text(text, 'utf-8')
    return path


def test_a_recipe_is_read(tmp_path):
    (tmp_path / 'own.tsv').write_text('index\tclasses\n0\tBG\n1\tWM\n2\tCGM\n', 'utf-8')
    text = f"""{HEAD}folds = 2
[samples]
modalities = [[['T1w'], 0.5], [['T1w', 'FLAIR'], 0.5]]
{LESIONS}
entities = {{desc = 'manual'}}
test = ['sub-01', '02']
[[datasets]]
name = 'tissue'
root = '/elsewhere/tissue'
modalities = ['T1w']
annotation = '.'
protocol = 'own.tsv'
[[datasets]]
name = 'more'
modalities = ['T1w', 'FLAIR']
[[datasets]]
name = 'hidden'
modalities = ['T1w', 'FLAIR']
share = 2
annotation = '.'
protocol = 'mrbrains18'
tells = ['L']
[[datasets]]
name = 'masks'
annotation = '.'
protocol = 'binary-lesion'
lesion_masks = true
[smoke]
folds = 1
training.steps = 3
"""
    recipe = read_recipe(write(tmp_path, text))
    lesions, tissue, more, hidden, masks = recipe.datasets
    assert recipe.samples.modalities == ((('T1w',), 0.5), (('T1w', 'FLAIR'), 0.5))
    assert lesions.entities == {'desc': 'manual'}
    assert lesions.test == ('01', '02')
    assert [source.root for source in recipe.datasets[:2]] == ['lesions', '/elsewhere/tissue']
    assert [source.stream for source in recipe.datasets] == [
        'lesions', 'tissue', 'unlabelled', 'lesions', 'masks',
    ]  # fmt: skip
    assert tissue.labels is not None
    assert tissue.labels.sets[2] == {'CGM'}
    assert hidden.labels is not None
    assert hidden.labels.sets[3] == ALL - {'L'}
    assert more.labels is None
    assert masks.labels is not None
    smoke = read_recipe(tmp_path / 'mine.toml', smoke=True)
    assert (recipe.folds, recipe.training) == (2, TrainingSettings())
    assert (smoke.folds, smoke.training) == (1, TrainingSettings(steps=3))
    assert smoke.architecture == recipe.architecture


SOURCE = "[[datasets]]\nname = 'a'\n"
TISSUE = f"{SOURCE}modalities = ['T1w']\nannotation = '.'\nprotocol = 'freesurfer'\n"


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('steps', 'not TOML'),
        ("name = 'x'", 'a recipe has to say version, licence, architecture'),
        (f'surprise = 1\n{HEAD}{TISSUE}', 'unknown: surprise; a recipe has name,'),
        (f'{HEAD}{TISSUE}role = 1', 'unknown: role; a dataset has name, root'),
        (HEAD, r'no dataset: .*\[\[datasets\]\]'),
        (f'{HEAD}{TISSUE}{TISSUE}', 'two datasets are called a'),
        (f'folds = 0\n{HEAD}{TISSUE}', 'folds is 0'),
        (f'fractions = [0.5, 0.1]\n{HEAD}{TISSUE}', r'fractions is \[0.5, 0.1\]: .*together 1'),
        (f"{HEAD}{SOURCE}modalities = 'T1w'", "a: modalities is 'T1w': give a list"),
        (f"{HEAD}{SOURCE}modalities = ['T2w']", 'a: modalities has T2w: the model has T1w, FLAIR'),
        (f'{HEAD}{SOURCE}', 'neither modalities nor annotation'),
        (f"{HEAD}{SOURCE}painted = ['T1w']", 'without annotation there is nothing to paint'),
        (f"{HEAD}{SOURCE}annotation = '.'", 'give both annotation.*and protocol'),
        (
            f"{HEAD}{SOURCE}annotation = '.'\nprotocol = 'gif'\npainted = ['T1w']",
            'painted from the protocols freesurfer, intracranial and neuromorphometrics alone',
        ),
        (
            f"in_plane_mm = 2.0\nslice_mm = [2.0, 4.0]\n{HEAD}{SOURCE}annotation = '.'\n"
            "protocol = 'freesurfer'\npainted = ['T1w']",
            'thick slices are painted at 1 mm',
        ),
        (f"{HEAD}{TISSUE}suffix = 'T1w'", "suffix is 'T1w': choose dseg or mask"),
        (f"{HEAD}{TISSUE}test = ['1']\nvalidation = ['sub-1']", '1 in validation and in test'),
        (f"{HEAD}{TISSUE}tells = ['GM']", "a: no such class: 'GM'"),
        (f'{HEAD}{TISSUE}share = -1', 'share is -1'),
        (f'{HEAD}{TISSUE}share = 2', "share is 2.*no other dataset is of the stream 'lesions'"),
        (
            HEAD + TISSUE + ''.join(MASKS.format(name) for name in 'bc') + 'share = 2',
            "c: share is 2.*each patient counts alike in 'masks'",
        ),
        (f'{HEAD}{TISSUE}[training]\nstep = 3', r'unknown: step; \[training\] has steps, batch'),
        (f'{HEAD}{TISSUE}[samples]\nwindows = 3', r'unknown: windows; \[samples\] has window,'),
        (f"{HEAD}{TISSUE}[training]\nrate = 'low'", r"\[training\] rate is 'low': not a float"),
        (f'{HEAD}{TISSUE}[samples]\nwindow = [9, 9]', r'\[samples\] window is \[9, 9\]: give 3'),
        (f"{HEAD}{TISSUE}[training]\noptimiser = 'sgd'", "is 'sgd': choose adam or adamw"),
        (
            f'{HEAD}{TISSUE}[training]\nsteadiness = -1',
            r'\] steadiness is -1.*: give a number from 0$',
        ),
        (
            f'{HEAD}{TISSUE}[training]\nrate = nan',
            r'\[training\] rate is nan: give a number above 0$',
        ),
        (f'{HEAD}{TISSUE}[training]\nvalidate_every = 0', 'is 0: give a number above 0$'),
        (f'{HEAD}{TISSUE}[samples]\nview_share = 1.5', 'is 1.5: give a number from 0 to 1$'),
        (
            f'{HEAD}{TISSUE}[training]\nsteadiness = 1.0\n[samples]\naugment = false',
            'steadiness acquires a window twice',
        ),
        (f'training = 1\n{HEAD}{TISSUE}', r'training is 1: write it as a table \[training\]'),
        (f"folds = 'two'\n{HEAD}{TISSUE}", 'a value is of the wrong kind'),
        (f"{HEAD}[datasets]\nname = 'a'", r'write each dataset as \[\[datasets\]\]'),
        (f'{HEAD}{TISSUE}lesion_masks = true', 'no modalities'),
        (f"{HEAD}{SOURCE}annotation = '.'\nprotocol = 'freesurfer'", 'read, or painted'),
        (TISSUE.replace('freesurfer', 'aal').join((HEAD, '')), "a: no protocol 'aal': choose"),
        (TISSUE.replace('freesurfer', 'none.tsv').join((HEAD, '')), r'none\.tsv: cannot read'),
    ],
)
def test_a_bad_recipe_is_named(tmp_path, text, message):
    with pytest.raises(RecipeError, match=rf'mine\.toml: .*{message}') as caught:
        read_recipe(write(tmp_path, text))
    assert '\n' not in str(caught.value)


def test_a_missing_recipe_or_trial_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r'give a TOML file, or one of .*jointseg'):
        read_recipe('surprise')
    with pytest.raises(RecipeError, match=r'mine\.toml: no table \[smoke\]'):
        read_recipe(write(tmp_path, f'{HEAD}{TISSUE}'), smoke=True)


PEOPLE = [f'{number:02}' for number in range(20)]


def recipe_of(*sources: Source, **settings: object) -> Recipe:
    return Recipe('x', '0', 'CC0-1.0', {}, sources, **settings)  # type: ignore[arg-type]


def annotated(name: str, **settings: object) -> Source:
    return Source(name, annotation='.', protocol='neuromorphometrics', **settings)  # type: ignore[arg-type]


def split(recipe: Recipe, people: Iterable[str], fold: int = 0) -> dict[str, str]:
    """Return the parts of the only dataset's people."""
    (source,) = recipe.datasets
    return recipe.split({source.name: people}, fold)[source.name]


def test_people_are_split_by_lot_and_the_parts_move_on_from_fold_to_fold():
    recipe = recipe_of(annotated('a'), folds=4)
    folds = [split(recipe, PEOPLE, fold) for fold in range(4)]
    for parts in folds:
        values = list(parts.values())
        assert [values.count(part) for part in ('train', 'validation', 'test')] == [14, 2, 4]
        assert list(parts) == PEOPLE
    tested = [person for parts in folds for person, part in parts.items() if part == 'test']
    assert len(tested) == len(set(tested)) == 16
    assert split(recipe, PEOPLE[::-1] + PEOPLE, 2) == folds[2]
    assert split(recipe_of(annotated('a'), folds=4, split_seed=1), PEOPLE) != folds[0]
    assert split(recipe_of(annotated('c'), folds=4), PEOPLE, 1) != folds[1]


def test_datasets_of_one_folder_show_the_same_people():
    recipe = recipe_of(annotated('a'), annotated('b', root='a'), folds=4)
    for fold in range(4):
        found = recipe.split({'a': PEOPLE[:10], 'b': PEOPLE[4:16]}, fold)
        assert {name: list(parts) for name, parts in found.items()} == {
            'a': PEOPLE[:10], 'b': PEOPLE[4:16],
        }  # fmt: skip
        for person in PEOPLE[4:10]:
            assert found['a'][person] == found['b'][person]
    # a list of one of them is one of all
    recipe = recipe_of(annotated('a', test=('05',)), annotated('b', root='a'))
    assert recipe.split({'a': PEOPLE[:6], 'b': PEOPLE[5:7]})['b'] == {'05': 'test', '06': 'train'}


def test_all_people_without_labels_are_in_training():
    recipe = recipe_of(Source('a', modalities=('T1w', 'FLAIR')))
    assert split(recipe, PEOPLE[:2]) == {'00': 'train', '01': 'train'}


def test_small_datasets_have_every_part():
    recipe = recipe_of(annotated('a'), folds=4)
    for count in (3, 7):
        assert set(split(recipe, PEOPLE[:count], 3).values()) == {
            'train', 'validation', 'test',
        }  # fmt: skip
    with pytest.raises(RecipeError, match=r'a: 2 people are too few .* list people under'):
        split(recipe, PEOPLE[:2])
    alone = recipe_of(annotated('a'), fractions=(1.0, 0.0, 0.0))
    assert split(alone, PEOPLE[:1]) == {'00': 'train'}


def test_lists_win_in_all_folds(caplog):
    source = annotated('a', validation=('03',), test=('sub-01', '99'))
    recipe = recipe_of(source, folds=4)
    with caplog.at_level(logging.WARNING):
        folds = [split(recipe, PEOPLE[:5], fold) for fold in range(4)]
    assert folds[0] == {
        '00': 'train', '01': 'test', '02': 'train', '03': 'validation', '04': 'train',
    }  # fmt: skip
    assert all(parts == folds[0] for parts in folds)
    assert '99' in caplog.text
    everybody = recipe_of(annotated('b', test=('*',)))
    assert set(split(everybody, PEOPLE).values()) == {'test'}


def make(root: Path, *names: str) -> Path:
    """Make a dataset of empty files: 'sub-1_T1w', or 'manual/sub-1_dseg' in derivatives."""
    describe_dataset(root)
    for name in names:
        *pipeline, file = name.split('/')
        folder = root.joinpath(*(('derivatives', *pipeline) if pipeline else ()))
        folder /= file.split('_')[0]
        if '_ses-' in file:
            folder /= file.split('_')[1]
        (folder / 'anat').mkdir(parents=True, exist_ok=True)
        (folder / 'anat' / f'{file}.nii.gz').touch()
    return root


def found(source: Source, root: Path) -> list[tuple]:
    return [
        (
            item.name,
            item.scan and item.scan.t1w and item.scan.t1w.name.split('.')[0],
            item.scan and item.scan.flair and item.scan.flair.name.split('.')[0],
            item.annotation and item.annotation.name.split('.')[0],
        )
        for item in annotated_scans(source, root)
    ]


def tissue(**changes: object) -> Source:
    settings = {
        'modalities': ('T1w', 'FLAIR'), 'annotation': 'derivatives/m', 'protocol': 'freesurfer',
    }  # fmt: skip
    return Source('a', **settings | changes)  # type: ignore[arg-type]


def test_label_maps_go_with_their_scans(tmp_path, caplog):
    root = make(
        tmp_path,
        'sub-1_ses-1_T1w', 'sub-1_ses-1_FLAIR', 'sub-1_ses-2_T1w', 'sub-2_run-1_T1w',
        'sub-2_run-2_T1w', 'sub-3_FLAIR', 'sub-4_T1w',
        'm/sub-1_ses-1_space-FLAIR_desc-x_dseg', 'm/sub-1_ses-2_desc-x_dseg',
        'm/sub-1_ses-2_space-MNI152_dseg', 'm/sub-1_ses-1_desc-brain_mask',
        'm/sub-2_run-2_dseg', 'm/sub-3_dseg', 'other/sub-4_dseg',
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert found(tissue(), root) == [
            ('sub-1_ses-1', 'sub-1_ses-1_T1w', 'sub-1_ses-1_FLAIR',
             'sub-1_ses-1_space-FLAIR_desc-x_dseg'),
            ('sub-1_ses-2', 'sub-1_ses-2_T1w', None, 'sub-1_ses-2_desc-x_dseg'),
            ('sub-2_run-2', 'sub-2_run-2_T1w', None, 'sub-2_run-2_dseg'),
            ('sub-3', None, 'sub-3_FLAIR', 'sub-3_dseg'),
        ]  # fmt: skip
    assert 'a: left out, without a label map: sub-2_run-1, sub-4' in caplog.text
    # only what is asked for
    assert found(tissue(modalities=('T1w',), entities={'ses': 2, 'desc': 'x'}), root) == [
        ('sub-1_ses-2', 'sub-1_ses-2_T1w', None, 'sub-1_ses-2_desc-x_dseg')
    ]
    flairs = found(tissue(modalities=('FLAIR',)), root)
    assert [row[:3] for row in flairs] == [
        ('sub-1_ses-1', None, 'sub-1_ses-1_FLAIR'),
        ('sub-3', None, 'sub-3_FLAIR'),
    ]
    unlabelled = Source('a', modalities=('T1w', 'FLAIR'))
    assert [item.annotation for item in annotated_scans(unlabelled, root)] == [None] * 6


def test_painted_datasets_and_lesion_masks_are_their_label_maps(tmp_path):
    root = make(tmp_path, 'sub-1_desc-x_dseg', 'sub-2_space-MNI152_label-lesion_mask')
    assert found(tissue(modalities=(), painted=('T1w',), annotation='.'), root) == [
        ('sub-1', None, None, 'sub-1_desc-x_dseg')
    ]
    masks = Source('a', annotation='.', suffix='mask', protocol='binary-lesion', lesion_masks=True)
    assert found(masks, root) == [('sub-2', None, None, 'sub-2_space-MNI152_label-lesion_mask')]


def test_two_label_maps_for_one_scan_are_an_error(tmp_path):
    maps = ('m/sub-1_desc-x_dseg', 'm/sub-1_desc-y_dseg', 'm/sub-1_dseg')
    root = make(tmp_path, 'sub-1_T1w', *maps)
    both = r'sub-1_desc-x_dseg.* and \S*sub-1_desc-y_dseg.* labels of sub-1: .*`entities`'
    with pytest.raises(RecipeError, match=both):
        annotated_scans(tissue(), root)
    with pytest.raises(RecipeError, match=both):
        annotated_scans(tissue(modalities=(), painted=('T1w',)), root)
    assert found(tissue(entities={'desc': 'y'}), root)[0][3] == 'sub-1_desc-y_dseg'
    assert found(tissue(entities={'desc': ''}), root)[0][3] == 'sub-1_dseg'


def test_a_label_map_has_one_scan(tmp_path, caplog):
    root = make(tmp_path, 'sub-1_acq-a_FLAIR', 'sub-1_acq-b_FLAIR', 'sub-1_T1w', 'm/sub-1_dseg')
    with caplog.at_level(logging.WARNING):
        ((name, *_),) = found(tissue(), root)
    assert name == 'sub-1'
    taken = 'sub-1_acq-b left out: sub-1_dseg.nii.gz is taken for the labels of sub-1;'
    assert taken in caplog.text


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none: no such folder: the dataset 'a' is expected"):
        annotated_scans(tissue(), tmp_path / 'none')
    root = make(tmp_path / 'a', 'sub-1_T1w')
    message = r'derivatives/m: no label map sub-\*_desc-x_dseg\.nii\.gz: put those'
    with pytest.raises(RecipeError, match=message):
        annotated_scans(tissue(entities={'desc': 'x'}), root)
    make(root, 'm/sub-2_dseg')
    with pytest.raises(RecipeError, match=r'no label map goes with a scan of .* as sub-1: '):
        annotated_scans(tissue(), root)
    with pytest.raises(RecipeError, match=r"the dataset 'a': .*no T1w and no FLAIR"):
        annotated_scans(tissue(), make(tmp_path / 'b', 'sub-1_T2w', 'm/sub-1_dseg'))
    with pytest.raises(RecipeError, match='no FLAIR: the dataset'):
        annotated_scans(tissue(modalities=('FLAIR',)), root)
