"""The workflows from scans to reports, on drawn heads with an untrained network."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import SHIFT_MM, describe_dataset, draw_head, put

from bids_jointseg import bids, cli, image
from bids_jointseg.bids import Scan
from bids_jointseg.card import FIRST_LOOKS, read_card
from bids_jointseg.config import Settings
from bids_jointseg.labels import CLASSES, INDICES

# What the validator may recommend beside what we give, and why we do not give it.
ACCEPTED = {
    ('TOO_FEW_AUTHORS', None): 'the authors of the input are not the authors of these results',
    ('SIDECAR_KEY_RECOMMENDED', '/seg-jointseg_dseg.tsv'): 'the look-up table is not an image',
}


SMALL = {'shape': (24, 28, 24), 'spacing_mm': (8.0, 8.0, 8.0)}


def jointseg(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope='session')
def options(model, transforms, tmp_path_factory):
    """Where the model is and where to work; nothing is registered."""
    work = tmp_path_factory.mktemp('work')
    given = ['--model', model, '--derivatives', f'pre={transforms}', '--nprocs', '2']
    return [*given, '--omp-nthreads', '1', '--skip-bids-validation', '-w', work]


@pytest.fixture(scope='session')
def results(dataset, options, tmp_path_factory):
    """The output dataset of both levels of analysis."""
    out = tmp_path_factory.mktemp('results') / 'out'
    assert jointseg(dataset, out, 'participant', *options) == 0
    assert jointseg(dataset, out, 'group') == 0
    return out


SCANS = {
    'sub-01': Scan('01', None, Path('T1w'), Path('FLAIR'), 'sub-01'),
    'sub-02': Scan('02', None, Path('T1w'), None, 'sub-02'),
    'sub-03_ses-1': Scan('03', '1', None, Path('FLAIR'), 'sub-03_ses-1'),
}
PROBABILITIES = [f'seg-jointseg_label-{name}_probseg' for name in CLASSES[1:]]
ALONE = [
    'desc-brain_mask',
    'label-L_mask',
    'seg-jointseg_desc-entropy_probseg',
    'seg-jointseg_dseg',
    *PROBABILITIES,
]
IMAGES = {
    'sub-01': [
        *ALONE,
        'desc-preproc_T1w',
        'desc-lesionfilled_T1w',
        'space-T1w_desc-preproc_FLAIR',
        'space-FLAIR_label-L_mask',
        'space-FLAIR_seg-jointseg_dseg',
    ],
    'sub-02': [*ALONE, 'desc-preproc_T1w', 'desc-lesionfilled_T1w'],
    'sub-03_ses-1': [*ALONE, 'desc-preproc_FLAIR'],
}


def anat(out: Path, stem: str) -> Path:
    return bids.derivative(out, SCANS[stem], '').parent


@pytest.mark.parametrize('stem', SCANS)
def test_every_file_is_there_and_no_other(results, stem):
    expected = {f'{name}{ext}' for name in IMAGES[stem] for ext in ('.nii.gz', '.json')}
    for table in ('seg-jointseg_morph', 'desc-lesions_morph'):
        expected |= {f'{table}{ext}' for ext in ('.tsv', '.csv', '.json')}
    if stem == 'sub-01':
        expected |= {
            'from-FLAIR_to-T1w_mode-image_xfm.txt',
            'from-T1w_to-FLAIR_mode-image_xfm.txt',
        }
    found = {path.name.removeprefix(f'{stem}_') for path in anat(results, stem).iterdir()}
    assert found == expected == set(bids.expected(SCANS[stem], 'full'))


def test_every_file_of_the_dataset_is_there(results):
    found = {path.name for path in results.iterdir()}
    assert found == {
        *('.bidsignore', 'README.md', 'dataset_description.json', 'seg-jointseg_dseg.tsv'),
        *('group.html', 'logs', 'sub-01', 'sub-02', 'sub-03'),
        *('sub-01.html', 'sub-02.html', 'sub-03.html'),
        *(f'group_volumes.{ext}' for ext in ('tsv', 'csv', 'json')),
        *(f'group_lesions.{ext}' for ext in ('tsv', 'csv')),
    }
    assert {path.name for path in (results / 'sub-03').iterdir()} == {'ses-1', 'figures', 'log'}
    (run,) = (results / 'sub-01' / 'log').iterdir()
    assert [path.name for path in run.iterdir()] == ['config.toml']
    again = Settings.from_toml((run / 'config.toml').read_text())
    assert again.output_dir == results


def test_the_validator_is_content(results, dataset):
    report = bids.validator(results)
    if report is None:
        pytest.skip('bids-validator-deno is not installed')
    issues = report['issues']['issues']
    assert [issue for issue in issues if issue['severity'] == 'error'] == []
    left = Counter(
        (issue['code'], issue['location'])
        for issue in issues
        if (issue['code'], None) not in ACCEPTED
        and (issue['code'], issue.get('location')) not in ACCEPTED
    )
    assert left == {}


@pytest.mark.parametrize(
    ('stem', 'space', 'source'),
    [
        ('sub-01', '', 'sub-01/anat/sub-01_T1w.nii.gz'),
        ('sub-01', 'space-FLAIR_', 'sub-01/anat/sub-01_FLAIR.nii.gz'),
        ('sub-02', '', 'sub-02/anat/sub-02_T1w.nii.gz'),
        ('sub-03_ses-1', '', 'sub-03/ses-1/anat/sub-03_ses-1_FLAIR.nii.gz'),
    ],
)
def test_labels_lie_on_the_native_grid(results, dataset, stem, space, source):
    scan = nib.load(dataset / source)
    folder = anat(results, stem)
    dseg = nib.load(folder / f'{stem}_{space}seg-jointseg_dseg.nii.gz')
    mask = nib.load(folder / f'{stem}_{space}label-L_mask.nii.gz')
    for found in (dseg, mask):
        assert found.shape == scan.shape
        np.testing.assert_array_equal(found.affine, scan.affine)
        assert found.get_data_dtype() == np.uint8
        assert (found.dataobj.slope, found.dataobj.inter) == (1, 0)
    labels = np.asarray(dseg.dataobj)
    assert set(np.unique(labels)) <= set(INDICES)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), labels == 7)


@pytest.mark.parametrize('stem', SCANS)
def test_probabilities_and_tables_agree_with_the_labels(results, stem):
    folder = anat(results, stem)

    def read(name: str) -> np.ndarray:
        return nib.load(folder / f'{stem}_{name}.nii.gz').get_fdata()

    labels = read('seg-jointseg_dseg')
    np.testing.assert_array_equal(read('desc-brain_mask'), labels > 0)
    foreground = np.stack([read(name) for name in PROBABILITIES])
    assert foreground.min() >= 0
    assert foreground.sum(0).max() < 1 + 8 * 0.5 / 255
    all_classes = np.concatenate([1 - foreground.sum(0)[None], foreground])
    best = np.sort(all_classes, axis=0)
    clear = best[-1] - best[-2] > 8 / 255
    np.testing.assert_array_equal(INDICES[all_classes.argmax(0)][clear], labels[clear])
    entropy = read('seg-jointseg_desc-entropy_probseg')
    p = np.clip(all_classes, 1e-9, 1)
    assert np.abs(entropy - -(p * np.log(p)).sum(0) / np.log(8)).max() < 0.05

    lines = (folder / f'{stem}_seg-jointseg_morph.tsv').read_text().splitlines()
    ends = ['low_mm3', 'high_mm3']
    assert lines[0].split('\t') == ['index', 'name', 'volume_mm3', *ends, 'percent_of_brain']
    summary = json.loads((folder / f'{stem}_seg-jointseg_morph.json').read_text())
    for look in FIRST_LOOKS:  # they decide results as well
        assert summary['configuration'][look] == read_card(look).sha256
    for line, index, name in zip(lines[1:], INDICES[1:], CLASSES[1:], strict=True):
        cells = line.split('\t')
        assert cells[:2] == [str(index), name]
        volume = float(cells[2])
        assert volume == (labels == index).sum() * 64
        # The card of the model knows how far the white matter's is to be trusted, by 1.5 times
        # what the probabilities (stored in 1/255) leave in doubt, by 2 from a FLAIR alone: all
        # of these scans are thick.
        if name == 'WM':
            p = foreground[0]
            half = 64 * np.where(labels == index, 1 - p, p).sum()
            half *= 2 if stem == 'sub-03_ses-1' else 1.5
            for cell, expected in zip(cells[3:5], (volume - half, volume + half), strict=True):
                assert float(cell) == pytest.approx(max(0, expected), rel=0.01, abs=64)
        else:
            assert cells[3:5] == ['n/a', 'n/a']
        share = 100 * float(cells[2]) / summary['brain_volume_mm3']
        assert float(cells[5]) == pytest.approx(share, abs=1e-4)
    lesions = (folder / f'{stem}_desc-lesions_morph.tsv').read_text().splitlines()[1:]
    assert len(lesions) == summary['lesion_count']
    long = sum(float(line.split('\t')[2]) >= 3 for line in lesions)
    assert long == summary['lesion_count_3mm']
    total = sum(float(line.split('\t')[1]) for line in lesions)
    assert total == pytest.approx((labels == 7).sum() * 64, rel=1e-4)
    comma = (folder / f'{stem}_desc-lesions_morph.csv').read_text()
    assert comma.replace(',', '\t').splitlines()[1:] == lesions


def test_the_flair_is_brought_to_the_t1w(results, dataset):
    folder = anat(results, 'sub-01')
    forward = image.load_itk(folder / 'sub-01_from-FLAIR_to-T1w_mode-image_xfm.txt')
    np.testing.assert_allclose(forward[:3, 3], SHIFT_MM)
    backward = image.load_itk(folder / 'sub-01_from-T1w_to-FLAIR_mode-image_xfm.txt')
    np.testing.assert_allclose(forward @ backward, np.eye(4), atol=1e-12)
    moved = nib.load(folder / 'sub-01_space-T1w_desc-preproc_FLAIR.nii.gz')
    t1w = nib.load(dataset / 'sub-01' / 'anat' / 'sub-01_T1w.nii.gz')
    np.testing.assert_array_equal(moved.affine, t1w.affine)
    wanted = draw_head('FLAIR').get_fdata()
    assert np.corrcoef(moved.get_fdata().ravel(), wanted.ravel())[0, 1] > 0.95


def test_sidecars_say_what_was_used(results):
    folder = anat(results, 'sub-01')

    def read(name: str) -> dict:
        return json.loads((folder / f'sub-01_{name}.json').read_text())

    t1w, flair = (f'bids:raw:sub-01/anat/sub-01_{name}.nii.gz' for name in ('T1w', 'FLAIR'))
    assert read('seg-jointseg_dseg')['Sources'] == [t1w, flair]
    assert read('space-FLAIR_seg-jointseg_dseg')['SpatialReference'] == flair
    assert read('space-T1w_desc-preproc_FLAIR')['SpatialReference'] == t1w
    assert read('label-L_mask')['Type'] == 'Lesion'
    assert read('desc-brain_mask')['Type'] == 'Brain'
    assert isinstance(read('desc-preproc_T1w')['SkullStripped'], bool)


def test_reports_show_every_scan(results):
    for stem in SCANS:
        page = (results / f'{stem.split("_")[0]}.html').read_text()
        assert stem in page
        assert 'data:image/png;base64' in page
        assert 'src="http' not in page
    flags = json.loads((anat(results, 'sub-02') / 'sub-02_seg-jointseg_morph.json').read_text())
    assert any('no FLAIR' in flag for flag in flags['flags'])


def contents(out: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in out.rglob('*') if path.is_file() and 'log' not in path.parts)
    return {
        str(path.relative_to(out)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files
    }


@pytest.fixture(scope='module')
def copy(results, tmp_path_factory):
    """A copy of the results that a test may change, at the same path for the work folder."""
    before = contents(results)
    yield results
    assert {name: content for name, (content, _) in contents(results).items()} == {
        name: content for name, (content, _) in before.items()
    }


def test_a_rerun_keeps_what_is_there(copy, dataset, options, caplog):
    before = contents(copy)
    assert jointseg(dataset, copy, 'participant', *options) == 0
    assert '25 of 25 stages kept from before' in caplog.text
    after = contents(copy)
    kept = {name for name in before if name.startswith('sub-0') and '/anat/' in name}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_a_rerun_restores_what_is_missing_and_only_that(copy, dataset, options, caplog):
    lost = anat(copy, 'sub-02') / 'sub-02_label-L_mask.nii.gz'
    lost.unlink()
    assert jointseg(dataset, copy, 'participant', *options) == 0
    assert '24 of 25 stages kept from before' in caplog.text
    assert lost.exists()


def test_reports_can_be_made_again(copy, dataset, options):
    page = copy / 'sub-01.html'
    before = page.read_bytes()
    page.unlink()
    assert jointseg(dataset, copy, 'participant', '--reports-only', *options) == 0
    assert page.read_bytes() == before


def test_a_failed_report_is_told_apart(copy, dataset, options, monkeypatch, caplog):
    from bids_jointseg import reports

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError('no ink')

    with monkeypatch.context() as patch:
        patch.setattr(reports, 'subject_report', fail)
        code = jointseg(dataset, copy, 'participant', *options)
    assert code == cli.Exit.REPORT_FAILED
    assert 'sub-01: the report failed' in caplog.text
    assert '3 of 3 scans complete' in caplog.text


def broken_t1w(kind: str) -> nib.Nifti1Image:
    head = draw_head('T1w', shape=(24, 28, 24), spacing_mm=(8, 8, 8))
    data, affine = head.get_fdata().astype(np.float32), head.affine.copy()
    if kind == 'nan':
        data[:] = np.nan
    elif kind == 'constant':
        data[:] = 7
    elif kind == '4d':
        data = np.stack([data, data], -1)
    elif kind == 'zero affine':
        affine[:3, :3] = 0
    scan = nib.Nifti1Image(data, affine if kind != 'zero affine' else None)
    if kind == 'zero affine':
        scan.header['sform_code'] = 1
        for axis in 'xyz':
            scan.header[f'srow_{axis}'] = 0
    return scan


def test_bad_scans_are_named_and_the_others_are_complete(model, tmp_path, capfd):
    root = describe_dataset(tmp_path / 'bids')

    def path(subject: str, suffix: str = 'T1w') -> Path:
        return root / f'sub-{subject}' / 'anat' / f'sub-{subject}_{suffix}.nii.gz'

    put(draw_head('T1w', **SMALL), path('good'))
    put(draw_head('T1w', **SMALL), path('truncated'))
    whole = path('truncated').read_bytes()
    path('truncated').write_bytes(whole[: len(whole) // 2])
    path('text').parent.mkdir(parents=True)
    path('text').write_text('this is not an image')
    for kind in ('nan', 'constant', '4d', 'zero affine'):
        put(broken_t1w(kind), path(kind.replace(' ', '')))
    put(draw_head('T1w', **SMALL), path('flair'))
    put(draw_head('FLAIR', **SMALL), path('flair', 'FLAIR'))
    path('flair', 'FLAIR').write_bytes(b'')
    path('link').parent.mkdir(parents=True)
    path('link').symlink_to(tmp_path / 'annex' / 'not-here.nii.gz')
    (root / 'sub-none').mkdir()

    out = tmp_path / 'out'
    command = (root, out, 'participant', '--model', model, '-w', tmp_path / 'work')
    code = jointseg(*command, '--level', 'minimal', '--skip-bids-validation', '--nprocs', '2')
    assert code == cli.Exit.SCANS_FAILED
    captured = capfd.readouterr()
    assert 'Traceback' not in captured.out + captured.err
    table = captured.out.splitlines()
    assert table[0].split() == ['failed', 'at', 'why']
    rows = {line.split()[0]: line for line in table[1:-1]}
    assert set(rows) == {
        *('sub-truncated', 'sub-text', 'sub-nan', 'sub-constant', 'sub-4d', 'sub-zeroaffine'),
        *('sub-flair', 'sub-link', 'sub-none'),
    }
    for subject, row in rows.items():
        if subject != 'sub-none':
            name = f'{subject}_{"FLAIR" if subject == "sub-flair" else "T1w"}.nii.gz: '
            assert name in row
    assert 'no T1w and no FLAIR' in rows['sub-none']
    assert table[-1].startswith('details: ')
    assert (out / 'sub-good.html').exists()
    good = Scan('good', None, path('good'), None, 'sub-good')
    assert {item.name for item in bids.derivative(out, good, '').parent.iterdir()} == {
        f'sub-good_{suffix}' for suffix in bids.expected(good, 'minimal')
    }
    for subject in rows:
        assert not list((out / subject).glob('anat/*'))
        crashes = list((out / subject).glob('log/*/crash-*.txt'))
        assert len(crashes) == (subject != 'sub-none')


def test_a_flair_elsewhere_is_an_error(model, tmp_path, capfd):
    """Two scans that share no tissue, whatever the start of the search."""
    root = describe_dataset(tmp_path / 'bids')
    anat = root / 'sub-1' / 'anat'
    put(draw_head('T1w', **SMALL), anat / 'sub-1_T1w.nii.gz')
    put(draw_head('FLAIR', **SMALL), anat / 'sub-1_FLAIR.nii.gz')
    # A transform that was given does not bring them together either.
    far = np.eye(4)
    far[:3, 3] = 1000
    given = tmp_path / 'given' / 'sub-1' / 'anat'
    given.mkdir(parents=True)
    image.save_itk(far, given / 'sub-1_from-FLAIR_to-T1w_mode-image_xfm.txt')
    command = (root, tmp_path / 'out', 'participant', '--model', model, '-w', tmp_path / 'work')
    code = jointseg(*command, '--derivatives', f'pre={tmp_path / "given"}', '--nprocs', '1')
    assert code == cli.Exit.SCANS_FAILED
    out = capfd.readouterr().out
    assert 'sub-1_FLAIR.nii.gz' in out
    assert 'overlap' in out


def settings_of(root: Path, tmp_path: Path, **changes: object) -> Settings:
    return Settings(root, tmp_path / 'out', work_dir=tmp_path / 'work', **changes)


def test_the_graph(dataset, model, tmp_path):
    from bids_jointseg.workflows.participant import STAGES, init_participant_wf, work_folder

    settings = settings_of(dataset, tmp_path, device='cuda:1')
    scans, _ = bids.plan(settings)
    card = read_card(model)
    workflow = init_participant_wf(scans=scans, settings=settings, card=card)
    paired = {node.name for node in workflow.get_node('sub_01_wf')._get_all_nodes()}
    assert paired == {*STAGES, 'inputnode', 'outputnode'}
    alone = {node.name for node in workflow.get_node('sub_02_wf')._get_all_nodes()}
    assert alone == paired - {'register'}
    segment = workflow.get_node('sub_01_wf.segment')
    assert segment.is_gpu_node()
    assert 'rigidly' in workflow.__desc__
    assert Path(workflow.base_dir) == work_folder(settings, card)
    other = read_card(shutil.copy(model, tmp_path / 'other.json'))
    object.__setattr__(other, 'sha256', 'another')
    assert work_folder(settings, other) != work_folder(settings, card)


def run_toys(tmp_path: Path, stages: tuple[str, ...]):
    """Run four scans of a few stages in one worker; the first stage of scan 1 kills it."""
    from nipype.interfaces.utility import Function
    from nipype.pipeline.engine import Node, Workflow

    from bids_jointseg.workflows import execution

    def work(number):
        import os

        if number == 1:
            os.kill(os.getpid(), 9)
        return number

    workflow = Workflow(name='top', base_dir=str(tmp_path))
    options = {'crashfile_format': 'txt', 'crashdump_dir': str(tmp_path / 'crashes')}
    workflow.config['execution'] = options | {'poll_sleep_duration': '0.1'}
    for number in range(4):
        scan = Workflow(name=f'scan_{number}_wf')
        nodes = [
            Node(Function(input_names=['number'], output_names=['out'], function=work), name=stage)
            for stage in stages
        ]
        nodes[0].inputs.number = number
        scan.add_nodes(nodes[:1])
        for node, following in pairwise(nodes):
            scan.connect(node, 'out', following, 'number')
        workflow.add_nodes([scan])
    names = {f'scan_{number}_wf': f'scan {number}' for number in range(4)}
    return execution.run(
        workflow,
        plugin='MultiProc',
        plugin_args={'n_procs': 1, 'mp_context': 'forkserver', 'raise_insufficient': False},
        log_file=tmp_path / 'nipype.log',
        crash_folders=[tmp_path / 'crashes'],
        progress=execution.Progress(names, dict.fromkeys(stages, 'done'), total=4 * len(stages)),
    )


def test_a_killed_worker_is_a_failure_and_the_others_go_on(tmp_path, caplog):
    caplog.set_level('INFO')
    failures = run_toys(tmp_path, ('check', 'segment'))
    assert [(item.scan, item.stage) for item in failures] == [('scan 1', 'check')]
    assert 'killed' in failures[0].reason
    # One scan is finished before the next begins.
    lines = [' '.join(record.getMessage().split('(')[0].split()) for record in caplog.records]
    assert lines == [
        '[1/8] scan 0 done',
        '[2/8] scan 0 done',
        'scan 1 failed',
        '[3/8] scan 2 done',
        '[4/8] scan 2 done',
        '[5/8] scan 3 done',
        '[6/8] scan 3 done',
    ]


def test_another_plugin_and_another_configuration(model, tmp_path, caplog):
    root = describe_dataset(tmp_path / 'bids')
    put(draw_head('T1w', **SMALL), root / 'sub-1' / 'anat' / 'sub-1_T1w.nii.gz')
    plugin = tmp_path / 'plugin.yml'
    plugin.write_text('plugin: Linear\n')
    out = tmp_path / 'out'
    command = [root, out, 'participant', '--model', model, '-w', tmp_path / 'work']
    command += ['--level', 'minimal', '--use-plugin', plugin, '--skip-bids-validation']
    assert jointseg(*command, '--fast', '--write-graph') == 0
    summary = out / 'sub-1' / 'anat' / 'sub-1_seg-jointseg_morph.json'
    assert json.loads(summary.read_text())['configuration']['fast'] is True

    # What does not depend on what changed is kept, the rest is computed again.
    caplog.clear()
    assert jointseg(*command) == 0
    configuration = json.loads(summary.read_text())['configuration']
    assert (configuration['fast'], configuration['level']) == (False, 'minimal')
    assert list((tmp_path / 'work').glob('jointseg-*/jointseg_wf/graph*'))


def test_scans_are_complete_without_their_figures(model, tmp_path, capfd):
    root = describe_dataset(tmp_path / 'bids')
    put(draw_head('T1w', **SMALL), root / 'sub-1' / 'anat' / 'sub-1_T1w.nii.gz')
    out = tmp_path / 'out'
    (out / 'sub-1').mkdir(parents=True)
    (out / 'sub-1' / 'figures').touch()  # in the way
    command = (root, out, 'participant', '--model', model, '-w', tmp_path / 'work')
    code = jointseg(*command, '--level', 'minimal', '--skip-bids-validation')
    assert code == cli.Exit.REPORT_FAILED
    assert capfd.readouterr().out.splitlines()[1].split()[:2] == ['sub-1', 'figures']
    scan = Scan('1', None, Path('T1w'), None, 'sub-1')
    assert all(
        bids.derivative(out, scan, suffix).exists() for suffix in bids.expected(scan, 'minimal')
    )


def test_several_runs_are_each_processed(dataset, tmp_path, capfd):
    root = describe_dataset(tmp_path / 'bids')
    for run in (1, 2):
        path = root / 'sub-1' / 'anat' / f'sub-1_run-{run}_T1w.nii.gz'
        put(draw_head('T1w', shape=(8, 8, 8), seed=run), path)
    assert jointseg(root, tmp_path / 'out', 'participant', '--dry-run') == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()[1:]] == [
        'sub-1_run-1',
        'sub-1_run-2',
    ]


def test_stop_on_first_crash(model, tmp_path, capfd):
    root = describe_dataset(tmp_path / 'bids')
    for subject in ('1', '2'):
        path = root / f'sub-{subject}' / 'anat' / f'sub-{subject}_T1w.nii.gz'
        path.parent.mkdir(parents=True)
        path.write_bytes(b'')
    command = (root, tmp_path / 'out', 'participant', '--model', model, '-w', tmp_path / 'work')
    code = jointseg(*command, '--stop-on-first-crash', '--nprocs', '1', '--skip-bids-validation')
    assert code == cli.Exit.SCANS_FAILED
    _, *rows, _ = capfd.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [['sub-1', 'check'], ['sub-2', 'write']]
    assert 'not all of its results are there' in rows[1]  # it was not even tried
