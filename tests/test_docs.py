"""What the documents show can be done as it is written there, and what they say is so.

Every `sh` block of README.md and docs/*.md is run by bash, page by page, in a folder that has the
files which the pages name (``BIDS_DIR``, ``RECIPE.toml`` ...). The PATH holds the real commands of
the package and what ``standins.py`` has in place of programs that a test cannot run. So a command
that is new to the documents is run, or not found, and then the test fails.
"""

from __future__ import annotations

import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import fields
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import standins
from conftest import SHIFT_MM, describe_dataset, draw_head, put

from bids_jointseg import (
    coil,
    image,
    inference,
    interfaces,
    lesions,
    locator,
    quality,
    recipe,
)
from bids_jointseg.card import MODELS, read_card
from bids_jointseg.labels import CLASSES, INDICES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = [ROOT / 'README.md', *sorted(DOCS.glob('*.md'))]
TRAINING = (DOCS / 'training.md').read_text(encoding='utf-8')

ONLY_PARSED = {
    r'python benchmarks/': 'its data are not in the repository, and it takes hours',
    r'jointseg-train RECIPE\.toml OUT_DIR': 'a training; the trial below is the same command',
    r'jointseg-train RECIPE OUT_DIR': 'the same',
    r'jointseg-train DATA_DIR/mine\.toml OUT_DIR': 'the same',
    r'jointseg-train paper-wn ': 'its data are not in the repository',
    r'exec jointseg-train /data/mine\.toml': 'a training of a day, on a cluster',
    r'--device cuda': 'tests run without a GPU; the plan is made',
}
"""Commands of which only the options are checked, by their own parser, and why."""

NOT_RUN = {
    'jointseg-evaluate NAME=PREDICTED REFERENCE OUT [--and': 'a synopsis, not to be typed',
    'sbatch --time=600': 'it needs a SLURM: tests/test_slurm.py has one',
    'make lock': 'it asks a package index',
    'docker run --rm --entrypoint cat': 'the file is in an image: tests/test_container.py has one',
}
"""Commands outside of `sh` blocks, and why they are not run here."""

PLACEHOLDERS = {
    r'\bPROTOCOL\b': 'neuromorphometrics',
    r'(?<![\w./:])/data/': '{sandbox}/data/',
    r'/scratch/': '{sandbox}/scratch/',
    r'\bTORCH_INDEX\b(?!=)': 'https://index.invalid',
    r'\bRECIPE\b(?!\.)': 'RECIPE.toml',
}
"""What cannot simply be a file or folder of its name; all others are."""

TOOLS = ('bash', 'cat', 'cp', 'env', 'id', 'ls', 'mkdir', 'rm', 'wc')


def read(path: Path) -> str:
    return path.read_text(encoding='utf-8')


FENCE = re.compile(r'^( *)```(.*)\n((?:.*\n)*?)\1```$', re.MULTILINE)


def fences(text: str) -> list[tuple[str, str]]:
    """Return language and content of every fenced block, in order."""
    return [(match[2], textwrap.dedent(match[3])) for match in FENCE.finditer(text)]


def blocks(text: str, language: str) -> list[str]:
    return [content for name, content in fences(text) if name == language]


def commands(block: str) -> list[str]:
    """Split a block where bash would: lines that are whole only together stay together."""
    found, lines = [], ''
    for line in block.splitlines(keepends=True):
        lines += line
        done = subprocess.run(['bash', '-n', '-c', lines], capture_output=True, text=True)
        if not (done.returncode or done.stderr or line.endswith('\\\n')):
            found += [lines] if lines.strip() else []
            lines = ''
    assert not lines.strip(), f'bash does not understand: {lines}'
    return found


def only_parsed(command: str) -> str:
    """Return the pattern by which a command is only parsed, or ''."""
    return next((pattern for pattern in ONLY_PARSED if re.search(pattern, command)), '')


ALL = {page: blocks(read(page), 'sh') for page in PAGES}


# --- every command ------------------------------------------------------------------------------


def segment(head: nib.Nifti1Image, values: dict[str, int]) -> nib.Nifti1Image:
    """Return the labels of a drawn T1w: GM, WM, VEN and L; 0 elsewhere."""
    levels = {0: '', 300: '', 100: '', 600: 'GM', 800: 'WM', 200: 'VEN', 500: 'L'}
    names = np.array(list(levels))
    nearest = np.abs(head.get_fdata()[..., None] - names).argmin(axis=-1)
    value = np.array([values.get(name, 0) for name in levels.values()], np.uint8)
    return nib.Nifti1Image(value[nearest], head.affine)


def flair(seed: int) -> nib.Nifti1Image:
    grid = {'shape': (48, 56, 32), 'spacing_mm': (4.0, 4.0, 6.0)}
    return draw_head('FLAIR', shift_mm=SHIFT_MM, seed=seed, **grid)


def small_dataset(root: Path) -> Path:
    """sub-01 has T1w and FLAIR, sub-02 a T1w."""
    describe_dataset(root)
    for number, label in enumerate(('sub-01', 'sub-02')):
        put(draw_head('T1w', seed=number), root / label / 'anat' / f'{label}_T1w.nii.gz')
    put(flair(3), root / 'sub-01' / 'anat' / 'sub-01_FLAIR.nii.gz')
    return root


def training_data(folder: Path) -> Path:
    """What docs/training.md describes, with its recipe and its table word by word."""
    folder.mkdir()
    (folder / 'mine.toml').write_text(*blocks(TRAINING, 'toml')[:1])
    (folder / 'tissue.tsv').write_text(*blocks(TRAINING, 'tsv'))
    controls, patients = (describe_dataset(folder / name) for name in ('controls', 'patients'))
    for number in range(1, 4):
        stem, t1w = f'sub-{number:02d}', draw_head('T1w', seed=number)
        put(t1w, controls / stem / 'anat' / f'{stem}_T1w.nii.gz')
        labels = segment(t1w, {'GM': 1, 'WM': 2, 'L': 2, 'VEN': 4})
        put(labels, controls / 'derivatives/manual' / stem / 'anat' / f'{stem}_dseg.nii.gz')
        put(t1w, patients / stem / 'anat' / f'{stem}_T1w.nii.gz')
        put(draw_head('FLAIR', seed=9 + number), patients / stem / 'anat' / f'{stem}_FLAIR.nii.gz')
        mask = segment(t1w, {'L': 1})
        put(mask, patients / 'derivatives/manual' / stem / 'anat' / f'{stem}_mask.nii.gz')
    return folder


def segmentations(folder: Path) -> None:
    """What docs/evaluation.md compares: derivatives of several tools, of sub-01."""
    t1w = draw_head('T1w', seed=0)
    put(t1w, folder / 'sub-01' / 'anat' / 'sub-01_T1w.nii.gz')
    name = Path('sub-01', 'anat', 'sub-01_dseg.nii.gz')
    ours = segment(t1w, {'GM': 8, 'WM': 2, 'VEN': 12, 'L': 7})
    for tool in ('jointseg', 'tissue-only'):
        put(ours, folder / 'derivatives' / tool / name)
    manual = segment(t1w, {'GM': 100, 'WM': 44, 'VEN': 4, 'L': 44})
    for place in (folder / 'derivatives' / 'manual', folder / 'REFERENCE_DIR'):
        put(manual, place / name)
    for number, tissue in enumerate(('GM', 'WM', 'VEN'), start=1):
        part = segment(t1w, {tissue: 1})
        put(part, folder / 'derivatives' / 'spm' / f'c{number}sub-01_T1w.nii')
    aseg = segment(t1w, {'GM': 3, 'WM': 2, 'VEN': 4, 'L': 77})
    aseg = nib.MGHImage(np.asarray(aseg.dataobj), aseg.affine)
    put(aseg, folder / 'derivatives' / 'freesurfer' / 'sub-01' / 'mri' / 'aseg.mgz')


def template_home(folder: Path) -> Path:
    """The ICBM152 brain that nilearn ships, in 6 mm, as TemplateFlow keeps it."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    name = 'tpl-MNI152NLin2009cAsym'
    scan, mask = load_mni152_template(resolution=6), load_mni152_brain_mask(resolution=6)
    scan = nib.Nifti1Image(np.rint(scan.get_fdata() * 1000).astype(np.int16), scan.affine)
    put(scan, folder / name / f'{name}_res-02_T1w.nii.gz')
    mask = nib.Nifti1Image(mask.get_fdata().astype(np.uint8), mask.affine)
    put(mask, folder / name / f'{name}_res-02_desc-brain_mask.nii.gz')
    return folder


@pytest.fixture(scope='module')
def sandbox(tmp_path_factory, model):
    """A copy of the repository, and beside its files all that the pages name."""
    folder = tmp_path_factory.mktemp('docs') / 'sandbox'
    unused = ('.*', '*.egg-info', '__pycache__', 'work', 'demo', 'site', 'tests', 'shared')
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*unused), symlinks=True)
    (folder / 'REPOSITORY').symlink_to('.')
    ci = folder / '.ci' / 'run'
    ci.parent.mkdir()
    ci.write_text(f'#!/bin/sh\nexec bash -n {ROOT}/.ci/run\n')  # it would run this test
    ci.chmod(0o755)

    for name in ('OUT_DIR', 'WORK_DIR', 'data', 'scratch/user'):
        (folder / name).mkdir(parents=True)
    small_dataset(folder / 'BIDS_DIR')
    small_dataset(folder / 'small')
    (folder / 'data' / 'bids').symlink_to(folder / 'BIDS_DIR')
    template_home(folder / 'data' / 'templateflow')
    shutil.copy(folder / 'small' / 'sub-01' / 'anat' / 'sub-01_T1w.nii.gz', folder / 'T1.nii.gz')
    put(flair(3), folder / 'FLAIR.nii.gz')
    segmentations(folder)
    data = training_data(folder / 'DATA_DIR')
    for name in ('mine.toml', 'tissue.tsv', 'controls', 'patients'):
        (folder / 'data' / name).symlink_to(data / name)
    text = (data / 'mine.toml').read_text().replace("'mine'", "'NAME'")
    (folder / 'RECIPE.toml').write_text(text)
    (folder / 'tissue.tsv').symlink_to(data / 'tissue.tsv')
    for target in ('model/tiny', 'MODEL_DIR/NAME'):
        (folder / target).parent.mkdir()
        for suffix in ('.json', '.safetensors'):
            shutil.copy(model.with_suffix(suffix), (folder / target).with_suffix(suffix))
    for name in ('image-jointseg', 'jointseg.sif'):
        (folder / name).touch()

    place = folder / 'bin'
    place.mkdir()
    for name in TOOLS:
        (place / name).symlink_to(shutil.which(name))
    (place / 'jointseg-evaluate').symlink_to(standins.SCRIPTS / 'jointseg-evaluate')
    for name in standins.PROGRAMS:
        file = place / name
        script = f'exec {sys.executable} {standins.__file__} {name} "$@"'
        file.write_text(f'#!/bin/sh\n{script}\n')
        file.chmod(0o755)
    # What is segmented here, no page computes again: with -w WORK_DIR, or without it in `work`.
    (folder / 'work').symlink_to('WORK_DIR')
    (folder / 'linear.yml').write_text('plugin: Linear\n')
    run('REAL=1 jointseg BIDS_DIR OUT_DIR participant', folder)
    server = subprocess.Popen(
        [sys.executable, standins.__file__, 'serve'],
        cwd=folder,
        env=os.environ | {'NO_ET': '1', 'NIPYPE_NO_ET': '1'},
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b'open\n'
    yield folder
    server.kill()
    server.wait()


def run(script: str, sandbox: Path) -> None:
    for pattern, value in PLACEHOLDERS.items():
        script = re.sub(pattern, value.format(sandbox=sandbox), script)
    kept = ('HOME', 'LANG', 'XDG_CACHE_HOME', 'OMP_NUM_THREADS', 'TMPDIR')
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {
        'PATH': str(sandbox / 'bin'),
        'SANDBOX': str(sandbox),
        'USER': 'user',
        'TEMPLATEFLOW_HOME': str(sandbox / 'data' / 'templateflow'),
    }
    done = subprocess.run(
        ['bash', '-euo', 'pipefail', '-c', script],
        cwd=sandbox,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f'{script}\n{done.stdout}\n{done.stderr}'
    assert 'Traceback' not in done.stderr, f'{script}\n{done.stderr}'


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if ALL[page]], ids=lambda page: page.stem)
def test_every_command_runs(page, sandbox):
    for block in ALL[page]:
        if block.startswith('#!'):  # not to be typed, but to be handed to the scheduler
            parsed = only_parsed(block)
            (sandbox / 'job.sh').write_text(
                re.sub('(?<![a-z])/(?=data|scratch)', f'{sandbox}/', block)
            )
            lines = [('sbatch job.sh', parsed)]
        else:
            lines = [(command, only_parsed(command)) for command in commands(block)]
        script = ''.join(
            f'export ONLY_PARSED={"1" if parsed else ""}\n{command}\n' for command, parsed in lines
        )
        run(script, sandbox)


def test_what_is_only_parsed_is_in_the_documents():
    shown = [command for found in ALL.values() for block in found for command in commands(block)]
    for pattern in ONLY_PARSED:
        assert any(re.search(pattern, command) for command in shown), pattern


def test_no_command_hides_from_the_tests():
    """A command in another fence would not be run; there are a few, each with its reason."""
    typed = re.compile(
        r'^ *(\$|(jointseg|docker|podman|apptainer|pip|python|sbatch|make)[\w-]* ).*', re.MULTILINE
    )
    hidden = [
        match[0]
        for page in PAGES
        for language, content in fences(read(page))
        if language != 'sh'
        for match in typed.finditer(content)
    ]
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in hidden), start
    assert not [line for line in hidden if not line.startswith(tuple(NOT_RUN))]


@pytest.mark.parametrize(
    ('command', 'wrong'),
    [
        ('jointseg BIDS_DIR OUT_DIR participant --fats', '--fats'),
        ('docker run jointseg /bids /out participant', '/bids is not bound'),
        ('docker build -t jointseg nowhere', 'no such file'),
        ('sbatch --tasks=3 job.sh', 'unrecognized'),
        ('make tset', 'tset'),
        ('jointsegg BIDS_DIR OUT_DIR participant', 'not found'),
        ('python benchmarks/accuracy.py DATA OUT', 'only parsed'),
        ('ONLY_PARSED=1 python benchmarks/accuracy.py DATA OUT --prat test', '--prat'),
        ('ONLY_PARSED=1 jointseg-train paper-wn OUT_DIR --dta DATA_DIR', '--dta'),
        ('ONLY_PARSED=1 jointseg-train paper-x OUT_DIR', 'paper-x'),
    ],
)
def test_a_wrong_command_is_noticed(command, wrong, sandbox):
    with pytest.raises(AssertionError, match=re.escape(wrong)):
        run(command, sandbox)


# --- every file and every number ----------------------------------------------------------------


@pytest.fixture(scope='module')
def results(sandbox):
    """All that the app can write, by real runs: two levels, a template, sessions, a failure."""
    folder = sandbox / 'outputs'
    root = small_dataset(folder / 'bids')
    shutil.rmtree(root / 'sub-02')
    for session in ('1', '2'):
        for label, scan in (('sub-02', draw_head('T1w')), ('sub-03', flair(int(session)))):
            suffix = 'T1w' if label == 'sub-02' else 'FLAIR'
            name = f'{label}_ses-{session}_{suffix}.nii.gz'
            put(scan, root / label / f'ses-{session}' / 'anat' / name)
    broken = root / 'sub-04' / 'anat' / 'sub-04_T1w.nii.gz'
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b'no image')
    for level in ('full', 'minimal'):
        run(
            f"""
            cd outputs
            command="jointseg bids {level} participant -w work --level {level}"
            $command || [ $? = 1 ]
            command="$command --output-spaces MNI152NLin2009cAsym:res-2"
            $command --participant-label 01
            $command --participant-label 03 --session-label 1
            jointseg bids {level} group
            """,
            sandbox,
        )
    return folder


def documented() -> dict[str, tuple[re.Pattern[str], bool]]:
    """Return each name of the tables of docs/outputs.md, what it stands for, whether minimal."""
    parts = {
        '<src>': r'sub-\d+(?:_ses-\d+)?',
        '<space>': 'space-MNI152NLin2009cAsym',
        '<run>': r'[\w-]+',
        '<name>': r'[\w.-]+',
        'NAME': 'MNI152NLin2009cAsym',
        'sub-X': r'sub-\d+',
        '[_res-N]': '_res-2',
        '[+N]': '',
    }
    found = {}
    for row in re.findall(r'^\| (`.*?) \| (yes|no) \|', read(DOCS / 'outputs.md'), re.MULTILINE):
        first, *more = re.findall(r'`([^`]+)`', row[0])
        stem = first.removesuffix('.gz').rpartition('.')[0]
        for name in (first, *(stem + extension for extension in more)):
            for choice in _choices(name):
                pattern = re.escape(choice)
                for part, meaning in parts.items():
                    pattern = pattern.replace(re.escape(part), meaning)
                if choice.startswith('<src>'):
                    pattern = rf'sub-\d+(?:/ses-\d+)?/anat/{pattern}'
                found[choice] = re.compile(pattern), row[1] == 'yes'
    return found


def _choices(name: str) -> list[str]:
    match = re.search(r'\{([^}]*)\}', name)
    if match is None:
        return [name]
    return [
        choice
        for word in match[1].split(',')
        for choice in _choices(name[: match.start()] + word + name[match.end() :])
    ]


@pytest.mark.slow
def test_every_file_is_documented_and_every_documented_file_is_there(results):
    names = documented()
    for level in ('full', 'minimal'):
        files = {
            path.relative_to(results / level).as_posix()
            for path in (results / level).rglob('*')
            if path.is_file()
        }
        seen = set()
        for file in sorted(files):
            fitting = [name for name, (pattern, _) in names.items() if pattern.fullmatch(file)]
            assert len(fitting) == 1, (level, file, fitting)
            seen.update(fitting)
        expected = {name for name, (_, minimal) in names.items() if minimal or level == 'full'}
        assert seen == expected, level


@pytest.mark.slow
def test_every_column_is_documented_and_every_documented_column_is_there(results):
    text = read(DOCS / 'outputs.md').split('\n## Columns')[1]
    sections = dict(re.findall(r'^### (.*?)\n(.*?)(?=^### |\Z)', text, re.MULTILINE | re.DOTALL))

    def columns(title: str) -> set[str]:
        rows = re.findall(r'^\| (`.*?) \|', sections[title], re.MULTILINE)
        return {name for row in rows for name in re.findall(r'`(\w+)`', row)}

    def header(pattern: str) -> set[str]:
        path = sorted((results / 'full').rglob(pattern))[0]
        with path.open(newline='') as file:
            return set(next(csv.reader(file, delimiter='\t')))

    identity = {'participant_id', 'session_id', 'scan'}
    counts = {name for name in columns('Cohort') if name.startswith('lesions_')}
    assert header('sub-*_seg-jointseg_morph.tsv') == columns('Volumes of a scan')
    assert header('sub-*_desc-lesions_morph.tsv') == columns('Lesions of a scan')
    assert header('sub-*_desc-longitudinal_morph.tsv') == columns('Change of volumes')
    assert header('sub-*_desc-lesionchange_morph.tsv') == columns('Change of lesions')
    assert header('group_volumes.tsv') == columns('Cohort') - counts
    assert header('group_lesions.tsv') == columns('Lesions of a scan') | identity
    assert header('group_changes.tsv') == columns('Change of volumes') | identity | counts


@pytest.mark.slow
def test_scans_take_as_many_files_and_bytes_as_is_said(results):
    text = read(DOCS / 'outputs.md').split('\n## Bytes per scan')[1]
    said = [[int(n) for n in re.findall(r'(\d+) files', row)] for row in text.splitlines()]
    worst = re.findall(r'it is (\d+) bytes .*? and (\d+) ', ' '.join(text.split()))[0]
    in_t1w, in_flair = map(int, worst)
    for counts, stem in zip(
        filter(None, said), ('sub-02_ses-1', 'sub-01', 'sub-03_ses-1'), strict=True
    ):
        folder = Path(*stem.split('_'), 'anat')
        for level, count in zip(('minimal', 'full'), counts, strict=True):
            names = list((results / level / folder).glob(f'{stem}_*'))
            names = [n for n in names if 'MNI' not in n.name and 'change' not in n.name]
            assert len(names) == count, (stem, level)
            size = sum(path.stat().st_size for path in names if path.name.endswith('.nii.gz'))
            grids = {
                suffix: float(np.prod(nib.load(path).shape))
                for path in (results / 'bids' / folder).glob('*.nii.gz')
                for suffix in [path.name.split('_')[-1].split('.')[0]]
            }
            rates = {'T1w': in_t1w, 'FLAIR': in_flair if 'T1w' in grids else in_t1w}
            assert size < sum(rates[suffix] * voxels for suffix, voxels in grids.items())


@pytest.mark.slow
def test_the_numbers_follow_from_the_formulas(results, model):
    """Each formula of docs/numbers.md, from the images that are written."""
    folder = results / 'full' / 'sub-01' / 'anat'

    def load(name: str) -> np.ndarray:
        return nib.load(folder / f'sub-01_{name}.nii.gz').get_fdata()

    y = load('seg-jointseg_dseg')
    p = np.stack([load(f'seg-jointseg_label-{name}_probseg') for name in CLASSES[1:]])
    p = np.concatenate([1 - p.sum(axis=0, keepdims=True), p])
    scan = nib.load(folder / 'sub-01_seg-jointseg_dseg.nii.gz')
    voxel = abs(np.linalg.det(scan.affine[:3, :3]))

    clear = np.diff(np.sort(p, axis=0)[-2:], axis=0)[0] > 0.02  # of the steps of 1/255
    np.testing.assert_array_equal(np.array(INDICES)[p.argmax(axis=0)][clear], y[clear])
    assert clear.mean() > 0.5

    q = p.clip(1e-9, 1)
    entropy = -(q * np.log(q)).sum(axis=0) / np.log(8)
    np.testing.assert_allclose(load('seg-jointseg_desc-entropy_probseg'), entropy, atol=0.05)

    with (folder / 'sub-01_seg-jointseg_morph.tsv').open(newline='') as file:
        rows = {row['name']: row for row in csv.DictReader(file, delimiter='\t')}
    volumes = {name: voxel * (y == int(row['index'])).sum() for name, row in rows.items()}
    for name, row in rows.items():
        assert float(row['volume_mm3']) == pytest.approx(volumes[name], abs=0.01)
        share = 100 * volumes[name] / sum(volumes.values())
        assert float(row['percent_of_brain']) == pytest.approx(share, abs=1e-4)
    scans = results / 'bids' / 'sub-01' / 'anat'
    slices = {
        name: image.load_grid(scans / f'sub-01_{name}.nii.gz').slice_mm
        for name in ('T1w', 'FLAIR')
    }
    kind = interfaces.acquisition(slices)
    for name, k in read_card(model).repeatability[kind].items():
        inside, probability = y == int(rows[name]['index']), p[CLASSES.index(name)]
        doubt = voxel * ((1 - probability)[inside].sum() + probability[~inside].sum())
        low, high = (float(rows[name][end]) for end in ('low_mm3', 'high_mm3'))
        assert high == pytest.approx(volumes[name] + k * doubt, rel=0.02)
        assert low == pytest.approx(max(0, volumes[name] - k * doubt), rel=0.02, abs=1)


NAMED = (coil, image, inference, interfaces, lesions, locator)


def test_the_functions_that_are_named_are_there():
    modules = {module.__name__.split('.')[-1]: module for module in NAMED}
    named = re.findall(rf'`({"|".join(modules)})\.(\w+)`', read(DOCS / 'numbers.md'))
    assert len(named) > 10
    for module, function in named:
        assert callable(getattr(modules[module], function)), function
    text = read(DOCS / 'numbers.md')
    assert f'at most {lesions.VENTRICLE_MM:g} mm' in text
    assert f'at most {lesions.CORTEX_MM:g} mm' in text


# --- the site -----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The site, built as `make docs` does: a warning is an error, the network is out of reach."""
    folder = tmp_path_factory.mktemp('site')
    (command,) = re.findall(r'-m sphinx (.*)$', read(ROOT / 'Makefile'), re.MULTILINE)
    words = command.replace('docs site', f'{DOCS} {folder}').split()
    nowhere = {f'{name}_proxy': 'http://127.0.0.1:9' for name in ('http', 'https', 'all')}
    done = subprocess.run(
        [sys.executable, '-m', 'sphinx', *words, '-d', str(tmp_path_factory.mktemp('doctrees'))],
        cwd=ROOT,
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_navigation(site):
    index = read(site / 'index.html')
    for page in DOCS.glob('*.md'):
        assert (site / f'{page.stem}.html').is_file()
        assert page.stem == 'index' or f'href="{page.stem}.html"' in index


def test_nothing_is_loaded_from_a_network(site):
    for page in [*site.rglob('*.html'), *site.rglob('*.css')]:
        text = read(page)
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]* rel="(?:stylesheet|icon)"[^>]* href="([^"]+)"', text)
        loaded += re.findall(r'(?:url\(|@import )["\']?([^"\')]+)', text)
        assert not [name for name in loaded if re.match('(https?:)?//', name)], page


def test_the_model_card_is_that_of_the_package(site):
    page = html.unescape(re.sub('<[^>]+>', ' ', read(site / 'model-card.html')))
    words = ' '.join(page.split())
    for path in MODELS.glob('*.json'):
        card = read_card(path.stem)
        assert card.sha256 in words
        assert f'{card.name} {card.version}' in words
        # Every word and number of it, however its measures are arranged.
        for value in leaves([card.training, card.accuracy, card.history, card.repeatability]):
            assert (value if isinstance(value, str) else json.dumps(value)) in words, value


def leaves(record: object) -> list[object]:
    """Return all that a JSON value holds and that is neither a list nor an object."""
    if isinstance(record, dict):
        record = list(record.values())
    if isinstance(record, list):
        return [leaf for item in record for leaf in leaves(item)]
    return [record]


def test_the_command_line_is_that_of_the_parsers(site):
    page = read(site / 'command-line.html')
    for name in ('jointseg', 'jointseg-demo', 'jointseg-train', 'jointseg-evaluate'):
        done = subprocess.run(
            [standins.SCRIPTS / name, '--help'], capture_output=True, text=True, check=True
        )
        options = set(re.findall(r'(?<![\w-])--[a-z][\w-]+', done.stdout))
        assert options, name
        assert options <= set(re.findall(r'--[a-z][\w-]+', re.sub('<[^>]+>', '', page))), name


def test_prose_is_no_wider_than_code():
    """Tables and fenced blocks aside, which cannot be wrapped."""
    limit = tomllib.loads(read(ROOT / 'pyproject.toml'))['tool']['ruff']['line-length']
    wide = [
        f'{page.name}: {line}'
        for page in (*ROOT.glob('*.md'), *DOCS.glob('*.md'))
        for line in FENCE.sub('', read(page)).splitlines()
        if len(line) > limit and not re.match(r'\s*\|| {4}', line)
    ]
    assert not wide, '\n'.join(wide)


# --- recipes and rules --------------------------------------------------------------------------


@pytest.mark.parametrize('smoke', [False, True])
def test_the_example_is_a_recipe(tmp_path, smoke):
    file = tmp_path / 'mine.toml'
    file.write_text(blocks(TRAINING, 'toml')[0])
    (tmp_path / 'tissue.tsv').write_text(blocks(TRAINING, 'tsv')[0])
    mine = recipe.read_recipe(file, smoke=smoke)
    assert [source.stream for source in mine.datasets] == ['tissue', 'lesions']
    assert mine.training.steps == (20 if smoke else 20000)
    assert mine.samples.window == ((48, 48, 16) if smoke else (112, 128, 32))


@pytest.mark.parametrize(
    ('heading', 'kind'),
    [
        ('At the top', recipe.Recipe),
        ('`[[datasets]]`', recipe.Source),
        ('`[training]`', recipe.TrainingSettings),
        ('`[samples]`', recipe.SampleSettings),
    ],
)
def test_every_field_of_a_recipe_is_explained(heading, kind):
    table = TRAINING.split(f'\n{heading}')[1].split('\n\n')[1]
    rows = [line.split('|')[1] for line in table.splitlines()[2:]]
    explained = {name for row in rows for name in re.findall(r'`(\w+)`', row)}
    # Tables of their own, and what the top of a recipe says of the model.
    elsewhere = {'datasets', 'training', 'samples'}
    assert explained == {entry.name for entry in fields(kind)} - elsewhere


def test_every_rule_of_the_quality_control_is_explained():
    text = read(DOCS / 'quality.md')
    for rule in quality.RULES:
        limits = ['' if limit is None else f'{limit:g}' for limit in (rule.check, rule.fail)]
        side = 'above' if rule.above else 'below'
        assert f'| `{rule.measure}` | {side} | {limits[0]} | {limits[1]} |' in text, rule.measure
