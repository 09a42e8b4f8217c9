"""Which scans go together, what results are called, and that nothing is half-written."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import describe_dataset

from bids_jointseg import bids
from bids_jointseg.bids import BidsError, DataError, Scan
from bids_jointseg.card import ModelCard
from bids_jointseg.config import Settings, SettingsError

CARD = ModelCard('tiny', '0', {}, sha256='abc', licence='CC0-1.0')


def scans_of(*names: str, sizes: dict[str, float] | None = None) -> list[tuple]:
    """Pair files by their names alone; return (stem, T1w, FLAIR) without the common parts."""
    paths = [Path(f'{name}.nii.gz') for name in names]
    found = bids.pair(
        [path for path in paths if '_T1w' in path.name],
        [path for path in paths if '_FLAIR' in path.name],
        lambda path: (sizes or {}).get(path.name.split('.')[0], 1.0),
    )
    short = [
        tuple(path and path.name.split('.')[0] for path in (scan.t1w, scan.flair))
        for scan in found
    ]
    return [(scan.stem, *pair) for scan, pair in zip(found, short, strict=True)]


def test_one_result_per_t1w():
    assert scans_of('sub-1_run-1_T1w', 'sub-1_run-2_T1w', 'sub-1_FLAIR') == [
        ('sub-1_run-1', 'sub-1_run-1_T1w', 'sub-1_FLAIR'),
        ('sub-1_run-2', 'sub-1_run-2_T1w', 'sub-1_FLAIR'),
    ]


def test_only_the_same_session_is_paired():
    assert scans_of('sub-1_ses-a_T1w', 'sub-1_ses-b_FLAIR') == [
        ('sub-1_ses-a', 'sub-1_ses-a_T1w', None),
        ('sub-1_ses-b', None, 'sub-1_ses-b_FLAIR'),
    ]


@pytest.mark.parametrize(
    ('flairs', 'sizes', 'taken'),
    [
        # no contrast agent, although it is the same run and finer
        (('sub-1_ce-gad_run-1_FLAIR', 'sub-1_FLAIR'), {'sub-1_FLAIR': 9}, 'sub-1_FLAIR'),
        # the same run, although it is coarser
        (
            ('sub-1_run-1_FLAIR', 'sub-1_run-2_FLAIR'),
            {'sub-1_run-1_FLAIR': 9},
            'sub-1_run-1_FLAIR',
        ),
        # the finer
        (
            ('sub-1_acq-a_FLAIR', 'sub-1_acq-b_FLAIR'),
            {'sub-1_acq-a_FLAIR': 9},
            'sub-1_acq-b_FLAIR',
        ),
        # the first by name
        (('sub-1_acq-b_FLAIR', 'sub-1_acq-a_FLAIR'), {}, 'sub-1_acq-a_FLAIR'),
    ],
)
def test_the_best_of_several_flairs(flairs, sizes, taken):
    found = scans_of('sub-1_run-1_T1w', *flairs, sizes=sizes)
    assert sorted(row[2] for row in found) == sorted(flairs)
    assert [row[2] for row in found if row[1]] == [taken]


def test_a_tie_is_noted():
    names = ['sub-1_T1w', 'sub-1_acq-a_FLAIR', 'sub-1_acq-b_FLAIR']
    paths = [Path(f'{name}.nii.gz') for name in names]
    scan = bids.pair(paths[:1], paths[1:], lambda path: 1.0)[0]
    assert scan.notes == ('sub-1_acq-a_FLAIR.nii.gz taken of 2 that suit equally well',)


def test_other_entities_decide_before_the_name():
    found = scans_of('sub-1_rec-n_T1w', 'sub-1_FLAIR', 'sub-1_rec-n_FLAIR')
    assert ('sub-1_rec-n', 'sub-1_rec-n_T1w', 'sub-1_rec-n_FLAIR') in found


def make(root: Path, *names: str) -> Settings:
    """Make a dataset of empty files; `name` may lack the extension."""
    describe_dataset(root)
    for name in names:
        entities = bids.entities(Path(name))
        folder = root / f'sub-{entities["sub"]}'
        if 'ses' in entities:
            folder /= f'ses-{entities["ses"]}'
        (folder / 'anat').mkdir(parents=True, exist_ok=True)
        (folder / 'anat' / (name if '.' in name else f'{name}.nii.gz')).touch()
    return Settings(root, root.parent / 'out')


def with_(settings: Settings, **changes: object) -> Settings:
    return Settings(**vars(settings) | changes)


def test_plan_reads_a_dataset(tmp_path):
    settings = make(
        tmp_path / 'bids',
        'sub-1_T1w',
        'sub-1_FLAIR',
        'sub-1_T1w.json',
        'sub-1_FLAIR.json',
        'sub-1_part-phase_T1w',
        'sub-2_T2w',
    )
    (settings.bids_dir / 'derivatives' / 'x' / 'sub-3' / 'anat').mkdir(parents=True)
    (scan,), skipped = bids.plan(settings)
    assert (scan.stem, scan.subject, scan.session) == ('sub-1', '1', None)
    assert scan.t1w == settings.bids_dir / 'sub-1/anat/sub-1_T1w.nii.gz'
    assert scan.flair == settings.bids_dir / 'sub-1/anat/sub-1_FLAIR.nii.gz'
    assert [(item.path.name, item.reason, item.failed) for item in skipped] == [
        ('sub-1_part-phase_T1w.nii.gz', 'part-phase is not a magnitude image', False),
        ('sub-2', 'no T1w and no FLAIR', True),
    ]


def test_a_uniform_image_is_the_t1w_of_a_session_without_one(tmp_path):
    settings = make(
        tmp_path / 'bids',
        'sub-1_ses-1_UNIT1',
        'sub-1_ses-1_inv-1_MP2RAGE',
        'sub-1_ses-1_FLAIR',
        'sub-1_ses-2_T1w',
        'sub-1_ses-2_acq-u_UNIT1',
        'sub-2_uniT1',
    )
    (settings.bids_dir / 'sub-2/anat/sub-2_FLAIR.nii').touch()
    found, skipped = bids.plan(settings)
    assert [(scan.stem, scan.t1w and scan.t1w.name) for scan in found] == [
        ('sub-1_ses-1', 'sub-1_ses-1_UNIT1.nii.gz'),
        ('sub-1_ses-2', 'sub-1_ses-2_T1w.nii.gz'),
        ('sub-2', None),
    ]
    assert found[0].flair is not None
    assert [(item.path.name, item.reason, item.failed) for item in skipped] == [
        ('sub-1_ses-2_acq-u_UNIT1.nii.gz', bids.UNIFORM, False),
        ('sub-2_uniT1.nii.gz', bids.MISNAMED, True),
    ]
    filters = tmp_path / 'filters.json'
    filters.write_text('{"t1w": {"suffix": "UNIT1"}, "flair": {"session": "1"}}')
    found, _ = bids.plan(with_(settings, bids_filter_file=filters))
    assert [scan.stem for scan in found] == ['sub-1_ses-1', 'sub-1_ses-2_acq-u']


def test_plan_indexes_only_the_chosen(tmp_path):
    settings = make(tmp_path / 'bids', 'sub-1_T1w', 'sub-12_T1w', 'sub-2_T1w')
    layout = bids._index(with_(settings, participant_label=('1',)))
    assert layout.get_subjects() == ['1']
    scans, _ = bids.plan(with_(settings, participant_label=('2', '12')))
    assert [scan.stem for scan in scans] == ['sub-12', 'sub-2']


def test_plan_selects(tmp_path):
    settings = make(
        tmp_path / 'bids', 'sub-1_ses-1_T1w', 'sub-1_ses-1_FLAIR', 'sub-1_ses-2_acq-x_T1w'
    )

    def stems(**changes: object) -> list[str]:
        return [scan.stem for scan in bids.plan(with_(settings, **changes))[0]]

    assert stems() == ['sub-1_ses-1', 'sub-1_ses-2_acq-x']
    assert stems(session_label=('2',)) == ['sub-1_ses-2_acq-x']
    (scan,) = bids.plan(with_(settings, session_label=('1',), ignore=('flair',)))[0]
    assert scan.flair is None

    filters = tmp_path / 'filters.json'
    for query, expected in (
        ({'t1w': {'acquisition': 'x'}, 'flair': {'session': '2'}}, ['sub-1_ses-2_acq-x']),
        ({'t1w': {'acquisition': None}}, ['sub-1_ses-1']),
        ({'t1w': {'acquisition': 'Query.ANY'}, 'bold': {}}, ['sub-1_ses-1', 'sub-1_ses-2_acq-x']),
        ({'t1w': {'session': ['1', '2']}}, ['sub-1_ses-1', 'sub-1_ses-2_acq-x']),
    ):
        filters.write_text(json.dumps(query))
        assert stems(bids_filter_file=filters) == expected, query


@pytest.mark.parametrize('text', ['{', '[]', '{"t1w": 3}', '{"t1w": {"nonsense": "1"}}'])
def test_a_bad_filter_file_is_named(tmp_path, text):
    filters = tmp_path / 'filters.json'
    filters.write_text(text)
    settings = with_(make(tmp_path / 'bids', 'sub-1_T1w'), bids_filter_file=filters)
    with pytest.raises(BidsError, match=r'^(\S*filters\.json|--bids-filter-file): ') as caught:
        bids.plan(settings)
    assert '\n' not in str(caught.value)


def test_the_index_may_be_kept(tmp_path):
    settings = make(tmp_path / 'bids', 'sub-1_T1w', 'sub-2_T1w')
    kept = with_(settings, bids_database_dir=tmp_path / 'index')
    assert len(bids.plan(with_(kept, participant_label=('1',)))[0]) == 1
    assert len(bids.plan(kept)[0]) == 2
    other = make(tmp_path / 'other', 'sub-1_T1w')
    with pytest.raises(BidsError, match='holds another dataset'):
        bids.plan(with_(other, bids_database_dir=tmp_path / 'index'))


@pytest.mark.parametrize(
    'names',
    [
        ('sub-1_T1w.nii', 'sub-1_T1w.nii.gz'),
        ('sub-1_ce-gad_T1w', 'sub-1_FLAIR', 'sub-1_ce-gad_FLAIR'),
    ],
)
def test_two_results_never_share_a_name(tmp_path, names):
    with pytest.raises(BidsError, match=r'would give results of one name .*--bids-filter-file'):
        bids.plan(make(tmp_path / 'bids', *names))


def test_nothing_to_do(tmp_path):
    describe_dataset(tmp_path)
    with pytest.raises(DataError, match=r'no folder sub-\*'):
        bids.plan(Settings(tmp_path, tmp_path / 'out'))
    settings = make(tmp_path / 'bids', 'sub-1_T2w')
    with pytest.raises(DataError, match='no T1w and no FLAIR'):
        bids.plan(settings)
    with pytest.raises(BidsError, match='no participant 7'):
        bids.plan(with_(settings, participant_label=('7',)))


def test_entities_that_results_set_are_dropped_from_the_stem():
    scan = bids.pair([Path('sub-26_space-MNI_desc-brain_T1w.nii.gz')], [])[0]
    assert scan.stem == 'sub-26'


def test_names_of_results():
    scan = Scan('1', 'a', Path('t'), None, 'sub-1_ses-a_run-2')
    assert bids.derivative(Path('/out'), scan, 'label-L_mask.nii.gz') == Path(
        '/out/sub-1/ses-a/anat/sub-1_ses-a_run-2_label-L_mask.nii.gz'
    )
    for level in ('minimal', 'full'):
        names = bids.expected(scan, level)
        assert len(set(names)) == len(names)
        assert names[-1] == 'seg-jointseg_morph.json'
        for name in names:
            if name.endswith('.nii.gz'):
                assert name.replace('.nii.gz', '.json') in names


def test_files_appear_whole(tmp_path, monkeypatch):
    path = bids.write_text(tmp_path / 'a' / 'file', 'old')

    def fail(*args: object) -> None:
        raise OSError('disk full')

    monkeypatch.setattr(bids.os, 'replace', fail)
    with pytest.raises(OSError, match='disk full'):
        bids.write_text(path, 'new')
    assert path.read_text() == 'old'
    assert [item.name for item in path.parent.iterdir()] == ['file']


def test_several_processes_may_describe_one_dataset(tmp_path):
    settings = make(tmp_path / 'bids', 'sub-1_T1w')
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: bids.create_dataset(settings, CARD), range(32)))
    record = json.loads((settings.output_dir / 'dataset_description.json').read_text())
    assert record['DatasetLinks'] == {'raw': settings.bids_dir.as_uri()}
    assert 'abc' in json.dumps(record['GeneratedBy'])
    assert not list(settings.output_dir.glob('.*tmp'))
    lines = (settings.output_dir / 'seg-jointseg_dseg.tsv').read_text().splitlines()
    assert lines[0] == 'index\tname\tabbreviation\tcolor\tmapping'
    assert lines[3] == '7\tWhite-matter lesion\tL\t#d55e00\t7'


def test_a_folder_of_another_pipeline_is_left_alone(tmp_path):
    settings = make(tmp_path / 'bids', 'sub-1_T1w')
    record = {'Name': 'x', 'GeneratedBy': [{'Name': 'fMRIPrep'}]}
    bids.write_json(settings.output_dir / 'dataset_description.json', record)
    with pytest.raises(BidsError, match='holds the results of fMRIPrep'):
        bids.create_dataset(settings, CARD)


def test_results_within_the_dataset_link_to_it(tmp_path):
    settings = make(tmp_path / 'bids', 'sub-1_T1w')
    settings = with_(settings, output_dir=settings.bids_dir / 'derivatives' / 'jointseg')
    bids.create_dataset(settings, CARD)
    record = json.loads((settings.output_dir / 'dataset_description.json').read_text())
    assert record['DatasetLinks'] == {'raw': '../..'}


def test_validation_errors_are_about_the_chosen(tmp_path):
    settings = make(tmp_path / 'bids', 'sub-1_T1w', 'sub-2_T1w', 'sub-2_nonsense.txt')
    (settings.bids_dir / 'dataset_description.json').unlink()
    errors = bids.validation_errors(with_(settings, participant_label=('1',)))
    assert '/dataset_description.json: MISSING_DATASET_DESCRIPTION' in errors
    assert not any(re.search('sub-2', error) for error in errors)


def test_settings_survive_toml(tmp_path):
    settings = Settings(
        tmp_path,
        tmp_path / 'ö "x"',
        participant_label=('01', '02'),
        derivatives={'pre': tmp_path},
        mem=3.5,
        fast=True,
    )
    again = Settings.from_toml(settings.to_toml(), run_id=settings.run_id)
    assert again == settings
    assert Settings.from_toml(settings.to_toml()).run_id != settings.run_id
    assert Settings.from_toml(settings.to_toml(), fast=False).fast is False


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('speed = 3', 'no such setting: speed'),
        ('nprocs = "two"', "nprocs is 'two': not a int"),
        ('level = "most"', "level is 'most'"),
        ('nprocs = 0', 'nprocs is 0'),
        ('device = "tpu"', "device is 'tpu'"),
        ('output_spaces = ["MNI152NLin2009cAsym:2"]', 'NAME\\[:res-N\\]'),
        ('=', 'not TOML'),
    ],
)
def test_bad_settings_are_named(text, message):
    with pytest.raises(SettingsError, match=message) as caught:
        Settings.from_toml(text, bids_dir=Path('/in'), output_dir=Path('/out'))
    assert '\n' not in str(caught.value)
