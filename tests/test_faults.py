"""Faults: killed processes, full disks, lost files, memory that runs out, a worker that hangs.

Whatever happens: no half-written file is ever visible, what failed is told in one line with the
documented exit code, and the same command completes the results, byte by byte those of a run that
nothing disturbed. ``docs/reliability.md`` has the table; ``tries`` says how often each is tried.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import draw_head, put
from runs import SMALL, Cohort, contents, make_cohort, make_small_cohort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runs import Run


@pytest.fixture(scope='module')
def cohort(server, tmp_path_factory):
    return make_small_cohort(server, tmp_path_factory.mktemp('faults'))


@pytest.fixture(scope='module')
def undisturbed(cohort):
    """What a run writes that nothing disturbs, by whether its workers are forked from it."""
    found = {}
    for fork in (True, False):
        code, said = cohort.run(f'undisturbed-{fork}', fork=fork)
        assert code == 0, said
        found[fork] = contents(cohort.out(f'undisturbed-{fork}'))
    return found


def check_visible(out: Path, undisturbed: dict[str, bytes]) -> None:
    """Assert that every visible file is complete: as it will be, or a page of what there is."""
    for name, content in contents(out).items():
        if name.endswith('.html') and content != undisturbed[name]:
            assert content.rstrip().endswith(b'</html>'), name
        else:
            assert content == undisturbed[name], name


def check_answer(code: int, said: str, *codes: int) -> None:
    """Assert that a run ended with a documented exit code, and without a traceback."""
    assert code in (codes or (0, 1, 2, 3, 65, 70)), said
    assert 'Traceback' not in said
    assert 'internal error' not in said
    if code not in (0, 3):  # what failed: one row, or one line
        assert re.search(r'^(failed +at +why|jointseg: .+)$', said, re.M), said


# --- kill -9 ------------------------------------------------------------------------------------

STAGES = 25
CHAINS = {'a': 12, 'b': 11, 'c': 11, 'd': 11, 'default': 5}
"""Chains of kills on one output folder; the last starts its workers in the default way."""
KILLS = sum(CHAINS.values())
GROUP_KILLS = (0.02, 0.05, 0.1, 0.2, 0.4)


def progress(run: Run) -> int:
    """Return how many stages a run has announced."""
    found = re.findall(r'\[ *(\d+)/', run.err.read_text())
    return int(found[-1]) if found else 0


def reach(run: Run, moment: float, *, fork: bool) -> bool:
    """Wait for a moment in units of stages, also before the first and after the last of them."""
    stage = min(int(moment), STAGES)
    while progress(run) < stage:
        if run.poll() is not None:
            return False
        time.sleep(0.01)
    # Before the first stage the run is planned, after the last the reports are written.
    seconds = 0.4 if 0 < stage < STAGES else 0.6 if fork else 2.0
    time.sleep((moment - stage) * seconds)
    return run.poll() is None


def is_tracker(pid: int) -> bool:
    """Tell Python's own tracker of semaphores from what works, or starts what works."""
    with suppress(OSError):
        return b'multiprocessing.resource_tracker' in Path(f'/proc/{pid}/cmdline').read_bytes()
    return False


def kill_one(run: Run, moment: float, rng: random.Random, *, fork: bool) -> str:
    """Kill the parent or a worker at a moment; return which, or nothing if it had ended before."""
    if not reach(run, moment, fork=fork):
        return ''
    workers = [pid for pid in run.others() if not is_tracker(pid)]
    if workers and rng.random() < 0.6:
        try:
            os.kill(rng.choice(workers), signal.SIGKILL)
        except ProcessLookupError:
            return ''
        return 'worker'
    os.kill(run.pid, signal.SIGKILL)
    return 'parent' if run.wait() == -signal.SIGKILL else ''


def kill_along(cohort: Cohort, name: str, undisturbed: dict[str, bytes]) -> dict[str, int]:
    """Kill a run again and again, and go on each time; return how often what was killed."""
    rng = random.Random(name)
    fork, number = name != 'default', CHAINS[name]
    moments = [(i + rng.random()) * (STAGES + 3) / number for i in range(number)]
    killed = {'parent': 0, 'worker': 0}
    orphans: list[int] = []
    run = cohort.start(name, '-v', fork=fork)  # which tells of stages that are kept as well
    for moment in moments:
        aim = moment
        while not (what := kill_one(run, aim, rng, fork=fork)):
            check_answer(run.wait(), run.said(), 0, 1, 3)
            run = cohort.start(name, '-v', fork=fork)
            aim = max(aim - 0.2, 0.0)  # it ended too soon
        killed[what] += 1
        check_visible(cohort.out(name), undisturbed)
        if what == 'parent':
            orphans += run.others()
            run = cohort.start(name, '-v', fork=fork)  # at once, whatever workers still do
    check_answer(run.wait(), run.said(), 0, 1, 3)
    code, said = cohort.run(name, fork=fork)
    assert code == 0, said
    assert contents(cohort.out(name)) == undisturbed
    assert not list(cohort.out(name).glob('sub-*/**/.*'))
    end = time.monotonic() + 10  # what starts the workers may still be importing libraries
    while any(Path(f'/proc/{pid}').exists() for pid in orphans):
        assert time.monotonic() < end
        time.sleep(0.02)
    return killed


@pytest.mark.slow
@pytest.mark.tries(KILLS + len(GROUP_KILLS))
def test_kill_9_at_any_moment_loses_nothing(cohort, undisturbed):
    """Of the parent, of a worker, or of what starts the workers; the same command goes on."""

    def kill(name: str) -> dict[str, int]:
        return kill_along(cohort, name, undisturbed[name != 'default'])

    with ThreadPoolExecutor(2) as pool:
        killed = list(pool.map(kill, CHAINS))
    parents, workers = (sum(one[what] for one in killed) for what in ('parent', 'worker'))
    assert parents + workers == KILLS == 50
    assert min(parents, workers) >= 15

    # The cohort's tables and report, of which a run takes a second.
    out = cohort.out('a')
    assert cohort.run('a', level='group')[0] == 0
    whole = contents(out)
    for moment in GROUP_KILLS:
        for path in out.glob('group*'):
            path.unlink()
        run = cohort.start('a', level='group')
        time.sleep(moment)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        check_visible(out, whole)
    assert cohort.run('a', level='group')[0] == 0
    assert contents(out) == whole


@pytest.mark.slow
def test_the_tracker_of_semaphores_is_killed(cohort, undisturbed):
    """Python starts another, which wonders at names that it was not told of; results are whole."""
    run = cohort.start('untracked', '-v', fork=False)
    assert reach(run, 5, fork=False)
    (tracker,) = filter(is_tracker, run.others())
    os.kill(tracker, signal.SIGKILL)
    assert run.wait() == 0, run.said()
    assert contents(cohort.out('untracked')) == undisturbed[False]
    assert run.said().count('Traceback') == run.said().count("KeyError: '/mp-"), run.said()


# --- what a disk does ---------------------------------------------------------------------------


@pytest.fixture(scope='module')
def pair(server, tmp_path_factory):
    """Two participants with a T1w each."""
    made = make_cohort(server, tmp_path_factory.mktemp('pair'))
    for subject in '12':
        path = made.bids / f'sub-{subject}' / 'anat' / f'sub-{subject}_T1w.nii.gz'
        put(draw_head('T1w', **SMALL, seed=int(subject)), path)
    return made


@pytest.fixture(scope='module')
def calm(pair):
    """Name -> content of the results of the two participants."""
    code, said = pair.run('calm')
    assert code == 0, said
    return contents(pair.out('calm'))


def goes_on(cohort: Cohort, name: str, calm: dict[str, bytes], **options: Any) -> None:
    """Assert that the same command completes the results."""
    code, said = cohort.run(name, **options)
    assert code == 0, said
    out = options.get('out') or cohort.out(name)
    assert contents(out) == calm
    assert not list(out.glob('sub-*/**/.*'))


@dataclass
class Disk:
    """A small disk of its own."""

    folder: Path

    def mount(self, options: str) -> None:
        self.folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', self.folder], capture_output=True
        )
        if done.returncode:
            pytest.skip('a disk of its own takes root, and the right to mount')

    def change(self, options: str) -> None:
        subprocess.run(['mount', '-o', f'remount,{options}', self.folder], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    yield Disk(tmp_path / 'disk')
    subprocess.run(['umount', '-l', tmp_path / 'disk'], capture_output=True, check=False)


@pytest.mark.parametrize('kilobytes', [4, 16, 80, 150])
@pytest.mark.parametrize('what', ['out', 'work'])
def test_a_full_disk(pair, calm, disk, what, kilobytes):
    """Of the results, or of the unfinished work; it may be full before the first line of a log."""
    size = kilobytes if what == 'out' else 8 * kilobytes
    disk.mount(f'size={size}k')
    name = f'full-{what}-{kilobytes}'
    options = {what: disk.folder / what}
    code, said = pair.run(name, **options)
    check_answer(code, said, 1, 2, 3)
    if code == 2 or 'failed' in said:
        assert re.search('No space left on device|not all of its results', said), said
    check_visible(options.get('out', pair.out(name)), calm)
    disk.change('size=64m')
    goes_on(pair, name, calm, **options)


def limit_files(number: int) -> None:
    """Let no file become larger, as a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


@pytest.mark.parametrize('number', [5_000, 20_000, 60_000, 90_000])
def test_a_quota(pair, calm, number):
    name = f'quota-{number}'
    code, said = pair.run(name, before=((limit_files, [number]),))
    check_answer(code, said, 1, 2, 3)
    assert 'File too large' in said
    check_visible(pair.out(name), calm)
    goes_on(pair, name, calm)


def test_a_disk_that_becomes_read_only(pair, calm, disk):
    """As ext4 does after an error."""
    disk.mount('size=64m')
    options = {'out': disk.folder / 'out'}
    run = pair.start('remounted', **options)
    while progress(run) < 4:
        time.sleep(0.01)
    for _ in range(200):  # not while a file is open there
        with suppress(subprocess.CalledProcessError):
            disk.change('ro')
            break
    check_answer(run.wait(), run.said(), 1)
    assert 'Read-only file system' in run.said()
    check_visible(disk.folder / 'out', calm)
    disk.change('rw')
    goes_on(pair, 'remounted', calm, **options)


@pytest.mark.parametrize('what', ['out', 'work'])
def test_a_read_only_folder(pair, what):
    """/proc takes no folders, not even root's."""
    code, said = pair.run('read-only', **{what: Path('/proc/jointseg')})
    check_answer(code, said, 2)
    assert '/proc/jointseg cannot be written' in said


def stay_in_folders(log: str) -> None:
    """Refuse to rename across folders, as between two file systems; note that it was tried."""

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event in ('os.rename', 'os.link'):
            folders = [os.path.realpath(os.path.dirname(os.path.abspath(p))) for p in given[:2]]
            if folders[0] != folders[1]:
                with open(log, 'a') as stream:
                    stream.write(f'{given}\n')
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), given[0], None, given[1])

    sys.addaudithook(watch)


def test_no_rename_across_folders(pair, calm, tmp_path):
    log = tmp_path / 'renamed.txt'
    goes_on(pair, 'exdev', calm, before=((stay_in_folders, [str(log)]),))
    assert not log.exists()


# --- what a power cut does ----------------------------------------------------------------------


@pytest.fixture
def power_cut(tmp_path) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Mount an ext4 of its own, and return what cuts its power: all in memory is lost.

    Inside the context there is no power: end what still has files open there.
    """
    image, folder = tmp_path / 'image', tmp_path / 'ext4'
    folder.mkdir()
    with image.open('wb') as stream:
        stream.truncate(64 * 2**20)

    def do(*command: str | Path) -> bool:
        with suppress(FileNotFoundError):
            return subprocess.run(command, capture_output=True).returncode == 0
        return False

    # Names go to the disk each second, contents when they must.
    mount = ('mount', '-o', 'loop,commit=1,noauto_da_alloc', image, folder)
    if not (do('mkfs.ext4', '-q', '-F', image) and do(*mount)):
        pytest.skip('a file system of its own takes root, e2fsprogs and a loop device')

    @contextmanager
    def power_cut() -> Iterator[None]:
        number = os.open(folder, os.O_RDONLY)
        # EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH
        fcntl.ioctl(number, 0x8004587D, struct.pack('I', 2))
        os.close(number)
        yield
        # A killed process keeps the file system for a moment, and one that is kept in two places
        # is not the one on the disk.
        deadline = time.monotonic() + 30
        while not do('umount', folder):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert do(*mount)

    yield power_cut
    do('umount', '-l', folder)


CUTS = 3


@pytest.mark.tries(CUTS + 1)
def test_a_power_cut(pair, calm, tmp_path, power_cut):
    """In the middle of a run, and at its end: no name leads to a file that is empty or half."""
    out = tmp_path / 'ext4' / 'out'
    for number in range(CUTS):
        run = pair.start('power', out=out)
        while run.poll() is None and len(contents(out)) < (number + 1) * len(calm) // (CUTS + 1):
            time.sleep(0.05)
        time.sleep(1.1)  # the names are on the disk
        with power_cut():
            run.kill_all()
            run.wait()
        check_visible(out, calm)
    goes_on(pair, 'power', calm, out=out)
    with power_cut():
        pass
    assert contents(out) == calm


def note_disk(log: str) -> None:
    """Note what is renamed, and what has to be on the disk before the program goes on."""
    true = os.fsync

    def fsync(number: int) -> None:
        true(number)
        _note('fsync', os.readlink(f'/proc/self/fd/{number}'))

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event == 'os.rename':
            _note('rename', *map(os.path.abspath, given[:2]))

    def _note(*words: str) -> None:
        with open(log, 'a') as stream:
            stream.write(json.dumps([os.getpid(), *words]) + '\n')

    os.fsync = fsync
    sys.addaudithook(watch)


def test_the_disk_has_a_file_before_its_name(pair, calm, tmp_path):
    """Where no file system can be cut off: content, then name, then folder, for every result."""
    log = tmp_path / 'disk.txt'
    goes_on(pair, 'ordered', calm, before=((note_disk, [str(log)]),))
    out, placed = pair.out('ordered').resolve(), set()
    steps: dict[int, list[list[str]]] = {}
    for pid, *step in map(json.loads, log.read_text().splitlines()):
        steps.setdefault(pid, []).append(step)
    for done in steps.values():
        for number, (what, *names) in enumerate(done):
            if what == 'rename' and Path(names[1]).is_relative_to(out):
                assert done[number - 1] == ['fsync', names[0]]
                assert done[number + 1] == ['fsync', str(Path(names[1]).parent)]
                placed.add(str(Path(names[1]).relative_to(out)))
    assert placed >= calm.keys()


# --- what a clock does --------------------------------------------------------------------------


def jump(seconds: float) -> None:
    """Let the clock jump back and forth at every look."""
    true, sign = time.time, [1]

    def now() -> float:
        sign[0] = -sign[0]
        return true() + sign[0] * seconds

    time.time = now


@pytest.mark.parametrize('when', [0, 4_000_000_000])
def test_a_clock_that_jumps(pair, calm, when):
    """While it runs, and between two runs: files from 1970, and from the future."""
    name = f'clock-{when}'
    code, said = pair.run(name, before=((jump, [86_400.0]),))
    assert code == 0, said
    for folder in (pair.folder / name, pair.bids):
        for path in folder.rglob('*'):
            os.utime(path, (when, when), follow_symlinks=False)
    goes_on(pair, name, calm)
    assert '16 of 16 stages kept' in (pair.folder / name / 'logs' / 'err.txt').read_text()


# --- memory -------------------------------------------------------------------------------------

PLACES = (
    *('image.load_scan', 'image.resample', 'image.label_map', 'locator.predict_brain'),
    *('lesions.measure_lesions', 'quality.measure', 'figures.draw_scan', 'reports.subject_report'),
    *('bids.plan', 'bids.create_dataset'),
)


def fail_at(place: str, kind: str) -> None:
    """Let a function of the package fail."""
    from importlib import import_module

    module, _, function = f'bids_jointseg.{place}'.rpartition('.')

    def fail(*given: object, **named: object) -> None:
        if kind == 'memory':
            raise MemoryError
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't "
                           'allocate memory: you tried to allocate 9999999999 bytes.')  # fmt: skip

    setattr(import_module(module), function, fail)


@pytest.mark.parametrize(
    ('place', 'kind'),
    [*((place, 'memory') for place in PLACES), ('locator.predict_brain', 'torch')],
)
def test_memory_that_runs_out(pair, calm, place, kind):
    name = f'memory-{place}-{kind}'
    code, said = pair.run(name, before=((fail_at, [place, kind]),))
    expected = {'figures.draw_scan': 3, 'reports.subject_report': 3}
    expected |= {'bids.plan': 70, 'bids.create_dataset': 70}
    check_answer(code, said, expected.get(place, 1))
    assert re.search('memory', said, re.I)
    if code == 1:
        assert said.count('give more memory, a smaller --nprocs, or --fast') == 2
    if place in ('image.label_map', 'figures.draw_scan', 'bids.create_dataset'):  # one of a kind
        goes_on(pair, name, calm)


def limit_memory(megabytes: int) -> None:
    """Allow this process, and each worker, only so much more address space."""
    used = int(re.search(r'VmSize:\s+(\d+)', Path('/proc/self/status').read_text())[1])
    limit = used * 1024 + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_workers(megabytes: int) -> None:
    """Allow each worker alone only so much more."""
    os.register_at_fork(after_in_child=lambda: limit_memory(megabytes))


@pytest.mark.parametrize('megabytes', [1, 4, 16])
def test_too_little_memory_to_begin(pair, megabytes):
    name = f'little-{megabytes}'
    code, said = pair.run(name, before=((limit_memory, [megabytes]),))
    assert code == 70
    assert said == 'jointseg: memory ran out: give more, or a smaller --nprocs\n'
    assert not contents(pair.out(name))


@pytest.mark.parametrize('limit', [limit_memory, limit_workers])
@pytest.mark.parametrize('megabytes', [16, 40, 64])
def test_little_memory(pair, calm, limit, megabytes):
    name = f'{limit.__name__}-{megabytes}'
    check_answer(*pair.run(name, before=((limit, [megabytes]),)))
    check_visible(pair.out(name), calm)


@pytest.mark.parametrize('megabytes', [0, 1])
def test_too_little_memory_for_the_workers(pair, calm, megabytes):
    """Whatever is free on the heap that a worker inherits: a library of the network needs more."""
    name = f'workers-{megabytes}'
    code, said = pair.run(name, before=((limit_workers, [megabytes]),))
    check_answer(code, said)
    assert code == 1
    assert 'give more memory' in said
    check_visible(pair.out(name), calm)
    goes_on(pair, name, calm)


def full_gpu() -> None:
    """Pretend that there is a GPU whose memory is full."""
    import torch

    from bids_jointseg import inference

    true = inference._both_ways
    torch.cuda.empty_cache = lambda: None
    inference.choose_device = lambda name: torch.device('cuda')

    def both_ways(*given: Any) -> Any:
        if given[-1].type == 'cuda':
            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB.')
        return true(*given)

    inference._both_ways = both_ways


def test_a_gpu_whose_memory_is_full(pair, calm):
    goes_on(pair, 'gpu', calm, before=((full_gpu, []),))
    assert (
        'has too little free memory for this scan: using the CPU'
        in (pair.folder / 'gpu' / 'logs' / 'err.txt').read_text()
    )


# --- workers that hang, inputs that go ----------------------------------------------------------


def hang_once(mark: str, limit_s: float, stopped: bool) -> None:
    """Let the first scan hang in the network, asleep or stopped."""
    from bids_jointseg import interfaces
    from bids_jointseg.workflows import participant

    participant.STAGE_LIMIT_S = limit_s
    true = interfaces.Segment._run_interface

    def run(self: Any, runtime: Any) -> Any:
        with suppress(FileExistsError):
            Path(mark).touch(exist_ok=False)
            if stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)
        return true(self, runtime)

    interfaces.Segment._run_interface = run


@pytest.mark.parametrize('stopped', [False, True], ids=['asleep', 'stopped'])
def test_a_worker_that_hangs(pair, calm, tmp_path, stopped):
    """It is ended after a time; the other scan is complete, now or after the same command."""
    name = f'hang-{stopped}'
    code, said = pair.run(name, before=((hang_once, [str(tmp_path / 'mark'), 8.0, stopped]),))
    check_answer(code, said, 1)
    assert re.search('segment +took longer than .* hours and was ended: the same command', said)
    check_visible(pair.out(name), calm)
    goes_on(pair, name, calm)


def lose(folder: str, stage: str) -> None:
    """Remove a folder when a stage begins, or once all is planned."""
    from bids_jointseg import bids, interfaces

    owner, function = (bids, 'create_dataset') if stage == 'planned' else (
        getattr(interfaces, stage), '_run_interface')  # fmt: skip
    true = getattr(owner, function)

    def run(*given: Any) -> Any:
        shutil.rmtree(folder, ignore_errors=True)
        return true(*given)

    setattr(owner, function, run)


@pytest.mark.parametrize('stage', ['planned', 'Check', 'Normalise', 'WriteDerivatives'])
def test_a_participant_who_is_removed(pair, calm, tmp_path, stage):
    """Of the input, while it is being processed: it fails by name, the other is complete."""
    name = f'removed-{stage}'
    lost = pair.bids / 'sub-2'
    kept = shutil.copytree(lost, tmp_path / 'sub-2')
    try:
        code, said = pair.run(name, before=((lose, [str(lost), stage]),))
    finally:
        shutil.rmtree(lost, ignore_errors=True)
        shutil.copytree(kept, lost)
    check_answer(code, said, 1)
    (row,) = (line for line in said.splitlines() if re.match(r'sub-\d +\w+ +', line))
    assert re.match(r'sub-2 .*sub-2_T1w.nii.gz', row)
    whole = {key for key in calm if key.startswith('sub-1')}
    found = contents(pair.out(name))
    assert {key: found.get(key) for key in whole} == {key: calm[key] for key in whole}
    check_visible(pair.out(name), calm)
    goes_on(pair, name, calm)


# --- several runs on one folder -----------------------------------------------------------------

EIGHT = [str(number) for number in range(1, 9)]


@pytest.mark.slow
@pytest.mark.tries(len(EIGHT))
def test_eight_runs_write_one_dataset(server, tmp_path):
    """As an array job does, with one work folder as well; each has a participant of its own."""
    made = make_cohort(server, tmp_path)
    for subject in EIGHT:
        path = made.bids / f'sub-{subject}' / 'anat' / f'sub-{subject}_T1w.nii.gz'
        put(draw_head('T1w', **SMALL, seed=int(subject)), path)
    options = {'out': made.out('all'), 'work': tmp_path / 'work'}
    minimal = ('--level', 'minimal', '--participant-label')
    runs = [made.start(f'run-{label}', *minimal, label, **options) for label in EIGHT]
    description = options['out'] / 'dataset_description.json'
    while None in [run.poll() for run in runs]:
        if description.exists():
            assert json.loads(description.read_text())['GeneratedBy'][0]['Name'] == 'bids_jointseg'
        time.sleep(0.05)
    assert [run.wait() for run in runs] == [0] * 8, [run.said() for run in runs]
    assert made.run('all', level='group')[0] == 0
    found = contents(options['out'])

    code, said = made.run('alone', '--level', 'minimal')
    assert code == 0, said
    assert made.run('alone', level='group')[0] == 0
    assert found == contents(made.out('alone'))
    volumes = found['group_volumes.tsv'].decode().splitlines()[1:]
    assert {line.split('\t')[0].removeprefix('sub-') for line in volumes} >= set(EIGHT)
    assert not list(options['out'].glob('**/.*.tmp'))


# --- a damaged work folder ----------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['*.npz', '*.npy', 'result_*.pklz', '_0x*.json', '_inputs.pklz'])
def test_unfinished_work_that_is_damaged(pair, calm, kind):
    """As after a power cut: it is told in one line, or made again; a new work folder helps."""
    name = f'damaged-{re.sub("[^a-z]", "", kind)}'
    assert pair.run(name)[0] == 0
    paths = sorted((pair.folder / name / 'work').rglob(kind))
    assert paths
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for path in pair.out(name).glob('sub-*/anat/*'):
        path.unlink()
    code, said = pair.run(name)
    check_answer(code, said, 0, 1)
    check_visible(pair.out(name), calm)
    if code:
        assert '--clean-workdir' in said
    code, said = pair.run(name, '--clean-workdir')
    assert code == 0, said
    assert contents(pair.out(name)) == calm


def test_seeds_of_the_kills_cover_a_whole_run():
    """The moments are drawn anew only if a chain is renamed: they reach from start to end."""
    moments = np.concatenate([
        [(i + random.Random(name).random()) * (STAGES + 3) / n for i in range(n)]
        for name, n in CHAINS.items()
    ])  # fmt: skip
    counts = np.histogram(moments, bins=7, range=(0, STAGES + 3))[0]
    assert counts.min() >= 3
