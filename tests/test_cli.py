"""What the command accepts, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import describe_dataset, draw_head, put

from bids_jointseg import __version__, bids, citation, cli
from bids_jointseg.config import Settings, SettingsError
from bids_jointseg.workflows import participant

JOINTSEG = [sys.executable, '-m', 'bids_jointseg.cli']


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*JOINTSEG, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def imported(*arguments: str | Path) -> set[str]:
    """Return the modules that a command imports."""
    command = [sys.executable, '-X', 'importtime', '-m', 'bids_jointseg.cli', *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith('import time:')]
    return {line.rsplit('|', 1)[1].strip() for line in lines}


@pytest.fixture
def empty(tmp_path):
    """A dataset with one participant, the files of which are empty."""
    root = describe_dataset(tmp_path / 'bids')
    (root / 'sub-01' / 'anat').mkdir(parents=True)
    (root / 'sub-01' / 'anat' / 'sub-01_T1w.nii.gz').touch()
    return root


def test_help_is_quick_and_light():
    modules = imported('--help')
    assert not modules & {'torch', 'nipype', 'bids', 'nibabel', 'scipy', 'matplotlib', 'SimpleITK'}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run('--help')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    for option in vars(Settings(Path('a'), Path('b'))):
        if option not in ('bids_dir', 'output_dir', 'analysis_level', 'run_id'):
            assert f'--{option.replace("_", "-")}' in done.stdout
    for code in (cli.Exit.NO_DATA, cli.Exit.INTERNAL, cli.Exit.REPORT_FAILED):
        assert str(int(code)) in done.stdout.split('exit codes:')[1]


def test_version():
    assert run('--version').stdout == f'jointseg {__version__}\n'


def test_dry_run_prints_the_pairing(dataset, tmp_path):
    arguments = (dataset, tmp_path / 'out', 'participant', '--dry-run')
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, '')
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows == [
        ['result', 'T1w', 'FLAIR', 'notes'],
        ['sub-01', 'sub-01_T1w.nii.gz', 'sub-01_FLAIR.nii.gz'],
        ['sub-02', 'sub-02_T1w.nii.gz', '-'],
        ['sub-03_ses-1', '-', 'sub-03_ses-1_FLAIR.nii.gz'],
    ]
    assert not (tmp_path / 'out').exists()
    assert not imported(*arguments) & {'torch', 'nipype'}


def test_dry_run_says_what_is_left_out(dataset, tmp_path):
    done = run(dataset, tmp_path / 'out', 'participant', '--dry-run', '--ignore', 'flair')
    tail = done.stdout.split('left out')[1].splitlines()[1:]
    assert [line.split(maxsplit=1) for line in tail] == [
        ['sub-01/anat/sub-01_FLAIR.nii.gz', '--ignore flair'],
        ['sub-03', 'no T1w and no FLAIR'],
        ['sub-03/ses-1/anat/sub-03_ses-1_FLAIR.nii.gz', '--ignore flair'],
    ]


def read(*arguments: str) -> Settings:
    return cli.read_arguments(['/in', '/out', 'participant', *arguments])


def test_options_become_settings():
    settings = read(
        *('--participant-label', 'sub-01', '02', 'sub-01', '--session_label', 'ses-a'),
        *('--omp_nthreads', '3', '--nthreads', '5', '--mem', '16000MB', '-w', 'somewhere'),
        *('--derivatives', 'pre=/pre', '--model', 'mine/net.json', '-vv', '--n_gpu_procs=2'),
    )
    assert settings.participant_label == ('01', '02')
    assert settings.session_label == ('a',)
    assert (settings.omp_nthreads, settings.nprocs, settings.n_gpu_procs) == (3, 5, 2)
    assert settings.mem == 16
    assert settings.work_dir == Path.cwd() / 'somewhere'
    assert settings.derivatives == {'pre': Path('/pre')}
    assert settings.model == str(Path.cwd() / 'mine/net.json')
    assert settings.verbose == 2


def test_a_file_sets_what_the_command_does_not(tmp_path):
    earlier = read('--level', 'minimal', '--nprocs', '3', '--participant-label', '01')
    file = tmp_path / 'config.toml'
    file.write_text(earlier.to_toml())
    settings = read('--config-file', str(file), '--nprocs', '2')
    assert (settings.level, settings.nprocs) == ('minimal', 2)
    assert settings.participant_label == ('01',)
    file.write_text('nonsense = 1')
    with pytest.raises(SettingsError, match=r'config\.toml: no such setting: nonsense'):
        read('--config-file', str(file))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--level', 'most'], 'invalid choice'),
        (['--nonsense'], 'unrecognized arguments: --nonsense'),
        (['--mem', 'much'], 'not an amount of memory'),
        (['--ignore', 't1w'], "ignore is 't1w'"),
        (['--device', 'tpu'], "device is 'tpu'"),
        (['--nprocs', '0'], 'nprocs is 0'),
        (['--output-spaces', 'MNI:2mm'], "output_spaces has 'MNI:2mm'"),
        (['--derivatives', 'nowhere'], 'write NAME=PATH'),
        (['--derivatives', 'pre=/nowhere'], 'no such folder'),
        (['--model', 'nonsense'], "model 'nonsense' is not in the package"),
        (['--model', '/nowhere/net.json'], '/nowhere/net.json: cannot read the model card'),
        (['--config-file', '/nowhere.toml'], '/nowhere.toml: cannot be read'),
        (['--bids-filter-file', '/nowhere.json'], '/nowhere.json: cannot read the filters'),
        (['--participant-label', '99'], 'no participant 99'),
    ],
)
def test_wrong_usage_is_one_line(empty, tmp_path, capfd, arguments, message):
    command = [str(empty), str(tmp_path / 'out'), 'participant', '-w', str(tmp_path / 'work')]
    try:
        code = cli.main([*command, *arguments])
    except SystemExit as stop:  # argparse's way
        code = stop.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, '')
    assert err.startswith('jointseg: ')
    assert message in err
    assert err.count('\n') == 1


def usage(capfd, *command: str | Path) -> str:
    assert cli.main([str(item) for item in command]) == cli.Exit.USAGE
    err = capfd.readouterr().err
    assert err.count('\n') == 1
    return err


def test_folders_are_checked(empty, tmp_path, capfd):
    work = ('-w', tmp_path / 'work')
    out = tmp_path / 'out'
    for name, command in (
        ('no input', (tmp_path / 'nowhere', out, 'participant', *work)),
        ('is the input', (empty, empty, 'participant', *work)),
        ('inside the input', (empty, empty / 'results', 'participant', *work)),
        ('inside the input', (empty, empty / 'derivatives', 'participant', *work)),
        ('inside the input', (empty, empty / 'derivatives' / 'a' / 'b', 'participant', *work)),
        ('inside the input', (empty, out, 'participant', '-w', empty / 'work')),
    ):
        message = usage(capfd, *command)
        assert name in message or 'is not a folder' in message
    file = tmp_path / 'file'
    file.touch()
    assert f'{file}/out cannot be written' in usage(
        capfd, empty, file / 'out', 'participant', *work
    )
    assert not (empty / 'derivatives').exists()


@pytest.mark.skipif(os.getuid() == 0, reason='root may write everywhere')
def test_no_permission_to_write(empty, tmp_path, capfd):
    locked = tmp_path / 'locked'
    locked.mkdir(mode=0o500)
    assert 'Permission denied' in usage(capfd, empty, locked / 'out', 'participant')


def test_derivatives_of_the_input_may_be_the_output(empty):
    inside = empty / 'derivatives' / 'jointseg'
    assert cli.main([str(empty), str(inside), 'participant', '--dry-run']) == 0


def test_nothing_usable(tmp_path, capfd):
    describe_dataset(tmp_path / 'bids')
    command = [str(tmp_path / 'bids'), str(tmp_path / 'out'), 'participant']
    command += ['-w', str(tmp_path / 'work')]
    assert cli.main(command) == cli.Exit.NO_DATA
    (tmp_path / 'bids' / 'sub-01' / 'func').mkdir(parents=True)
    assert cli.main(command) == cli.Exit.NO_DATA
    command[2] = 'group'
    assert cli.main(command) == cli.Exit.NO_DATA
    err = capfd.readouterr().err.splitlines()
    assert [line.split(':')[0] for line in err] == ['jointseg'] * 3


def test_an_internal_error_is_one_line_with_details(empty, tmp_path, capfd, monkeypatch):
    def fail(settings: Settings) -> None:
        raise RuntimeError('unforeseen')

    monkeypatch.setattr(bids, 'plan', fail)
    monkeypatch.setattr(cli.tempfile, 'gettempdir', lambda: str(tmp_path))
    code = cli.main([str(empty), str(tmp_path / 'out'), 'participant', '--dry-run'])
    assert code == cli.Exit.INTERNAL
    err = capfd.readouterr().err
    assert err.count('\n') == 1
    assert 'unforeseen' in err
    assert 'Traceback' in Path(err.split()[-1]).read_text()


@pytest.mark.parametrize('suffix', ['.yml', '.toml'])
def test_plugin_files(tmp_path, suffix):
    file = tmp_path / f'plugin{suffix}'
    file.write_text(
        {
            '.yml': 'plugin: MultiProc\nplugin_args: {n_procs: 7}\n',
            '.toml': 'plugin = "MultiProc"\nplugin_args = {n_procs = 7}\n',
        }[suffix]
    )
    name, arguments = cli.read_plugin(read('--use-plugin', str(file), '--mem', '8'))
    assert name == 'MultiProc'
    assert (arguments['n_procs'], arguments['memory_gb']) == (7, 8)
    assert arguments['mp_context'] == 'forkserver'
    file.write_text('plugin: [')
    with pytest.raises(SettingsError, match='not a plugin file'):
        cli.read_plugin(read('--use-plugin', str(file)))


def test_boilerplate_only(dataset, transforms, model, tmp_path):
    out = tmp_path / 'out'
    command = [dataset, out, 'participant', '-w', tmp_path / 'work', '--boilerplate-only']
    command += ['--model', model, '--derivatives', f'pre={transforms}']
    assert cli.main([str(item) for item in command]) == 0
    text = (out / 'logs' / 'CITATION.md').read_text()
    assert 'by a transform that was given' in text
    assert text.count('was processed alone') == 2
    page = (out / 'logs' / 'CITATION.html').read_text()
    assert '(<a href="#ref-bids">Gorgolewski et al. 2016</a>' in page
    assert '[@' not in page
    assert not list(out.glob('sub-*'))


def test_every_citation_has_an_entry():
    prose = Path(participant.__file__).read_text(encoding='utf-8')
    cited = set(re.findall(r'@(\w+)', ' '.join(re.findall(r'\[@[^]]*\]', prose))))
    entries = citation.parse_bibliography(citation.REFERENCES.read_text(encoding='utf-8'))
    assert {'bids', 'hemis', 'mattes'} <= cited <= set(entries)


def test_filters_and_validation_reach_the_command(tmp_path, capfd):
    root = describe_dataset(tmp_path / 'bids')
    put(draw_head('T1w', shape=(8, 8, 8)), root / 'sub-1' / 'anat' / 'sub-1_acq-x_T1w.nii.gz')
    put(draw_head('T1w', shape=(8, 8, 8)), root / 'sub-1' / 'anat' / 'sub-1_T1w.nii.gz')
    filters = tmp_path / 'filters.json'
    filters.write_text(json.dumps({'t1w': {'acquisition': 'x'}}))
    command = [str(root), str(tmp_path / 'out'), 'participant', '--dry-run']
    assert cli.main([*command, '--bids-filter-file', str(filters)]) == 0
    out = capfd.readouterr().out
    assert 'sub-1_acq-x_T1w.nii.gz' in out
    assert 'sub-1_T1w.nii.gz' not in out
