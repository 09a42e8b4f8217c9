"""Style, types, and the direction of imports."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(tool, *arguments, cwd=ROOT):
    program = shutil.which(tool, path=sysconfig.get_path('scripts'))
    if not program:
        pytest.skip(f'{tool} is not installed')
    done = subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_style():
    run('ruff', 'check', '--no-cache', '.')
    run('ruff', 'format', '--check', '--no-cache', '.')


def test_types(tmp_path):
    run('mypy', '--cache-dir', str(tmp_path))


def test_imports_run_one_way(tmp_path):
    """Look at the tree as it installs: workflows/ is part of the package there, and only there."""
    ignore = shutil.ignore_patterns('__pycache__', 'data')
    shutil.copytree(ROOT / 'bids_jointseg', tmp_path / 'bids_jointseg', ignore=ignore)
    shutil.copytree(ROOT / 'workflows', tmp_path / 'bids_jointseg' / 'workflows', ignore=ignore)
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    run('lint-imports', '--no-cache', cwd=tmp_path)
