"""The wheel holds both folders, whole, and runs where nothing else of the project is."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import bids_jointseg

ROOT = Path(__file__).parents[1]
FILES = ('pyproject.toml', 'README.md', 'LICENSE', 'LICENSE-weights.md')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Build without network, from a copy: setuptools leaves a build folder in the tree."""
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for name in ('bids_jointseg', 'workflows'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, '-m', 'pip', 'wheel', '-q']
    offline = ['--no-deps', '--no-build-isolation', '--no-index']
    subprocess.run([*pip, *offline, '-w', str(out), str(source)], check=True)
    (path,) = out.glob('*.whl')
    return path


def test_wheel_holds_every_file(wheel):
    places = {'bids_jointseg': 'bids_jointseg', 'workflows': 'bids_jointseg/workflows'}
    expected = {
        f'{name}/{path.relative_to(ROOT / folder).as_posix()}'
        for folder, name in places.items()
        for path in (ROOT / folder).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        content = {name for name in archive.namelist() if '.dist-info/' not in name}
        metadata = {Path(name).name for name in archive.namelist() if '.dist-info/' in name}
    assert content == expected
    assert {'LICENSE', 'LICENSE-weights.md', 'entry_points.txt'} <= metadata
    assert wheel.name.startswith(f'bids_jointseg-{bids_jointseg.__version__}-')


def test_what_is_imported_is_declared():
    """Another package's dependency may go away with its next release."""
    pyproject = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    lines = pyproject['project']['dependencies']
    declared = {re.match(r'[\w.-]+', line)[0].lower() for line in lines}
    imported = set()
    for path in [*ROOT.glob('bids_jointseg/**/*.py'), *ROOT.glob('workflows/**/*.py')]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split('.')[0])
    provided_by = packages_distributions()
    for name in imported - sys.stdlib_module_names - {'bids_jointseg'}:
        assert {found.lower() for found in provided_by[name]} & declared, name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_runs_in_a_clean_environment(wheel, tmp_path):
    """Nothing of the source tree is importable; of this environment, only the dependencies."""
    environment = tmp_path / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', str(environment)], check=True)
    python = environment / 'bin' / 'python'
    subprocess.run(
        [python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', str(wheel)], check=True
    )
    # The dependencies lie beside the editable install, which .pth files alone make importable:
    # PYTHONPATH does not read those, so this project comes from the wheel or not at all.
    env = {**os.environ, 'PYTHONPATH': sysconfig.get_path('purelib'), 'OMP_NUM_THREADS': '2'}

    def run(*command):
        program = environment / 'bin' / command[0]
        return subprocess.run(
            [program, *command[1:]], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    where = 'import bids_jointseg, bids_jointseg.workflows as w; print(w.__file__)'
    done = run('python', '-c', where)
    assert done.stdout.startswith(str(environment)), done.stdout + done.stderr
    done = run('jointseg', '--help')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('usage: jointseg')
    done = run('jointseg', '--version')
    assert bids_jointseg.__version__ in done.stdout
    one = ('--participant-label', '03', '--session-label', '1', '--level', 'minimal')
    done = run('jointseg-demo', 'demo', *one)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / 'demo' / 'derivatives' / 'sub-03.html').is_file()
