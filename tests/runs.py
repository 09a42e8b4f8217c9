"""Whole runs of the command, each in a process of its own that starts in a moment.

Importing PyTorch, Nipype and pybids takes seconds, and faults need hundreds of runs. So one server
imports them once and forks a process for every run: a real one, that can be killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMPORTED = (
    'bids.layout', 'bids_jointseg.cli', 'bids_jointseg.citation', 'bids_jointseg.inference',
    'bids_jointseg.longitudinal', 'bids_jointseg.workflows.group',
    'bids_jointseg.workflows.participant', 'PIL.Image', 'SimpleITK', 'scipy.ndimage', 'torch',
)  # fmt: skip


@dataclass
class Run:
    """One run of the command.

    Attributes
    ----------
    pid
        Of its main process, which leads a session of its own.
    out, err
        Files that take what it says.
    """

    server: Server
    pid: int
    out: Path
    err: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code (a signal's as minus its number), or None while it runs."""
        if self.code is None:
            self.code = self.server.ask('poll', self.pid)
        return self.code

    def wait(self, seconds: float = 120.0) -> int:
        """Return the exit code."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill_all()
                raise TimeoutError(f'no end after {seconds:.0f} s: {self.said()}')
            time.sleep(0.02)
        return code

    def said(self) -> str:
        """Return all that was written to the terminal."""
        return self.out.read_text() + self.err.read_text()

    def kill_all(self) -> None:
        """Kill what is left of the run."""
        for pid in (self.pid, *self.others()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def others(self) -> list[int]:
        """Return the other processes of its session: workers, and what started them."""
        return [pid for pid in session(self.pid) if pid != self.pid]


def session(leader: int) -> list[int]:
    """Return the living processes of the session of one that began it, itself included."""
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            fields = (folder / 'stat').read_text().rpartition(')')[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != 'Z':
            found.append(int(folder.name))
    return sorted(found)


class Server:
    """Starts runs; end it with :meth:`close`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {'OMP_NUM_THREADS': '1', 'NO_ET': '1', 'NIPYPE_NO_ET': '1'},
        )
        self.turn = threading.Lock()

    def ask(self, *question: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.turn:
            self.process.stdin.write(json.dumps(question) + '\n')
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def start(
        self, *arguments: str | Path, logs: Path, before: Sequence[tuple[Callable, Any]] = ()
    ) -> Run:
        """Start ``jointseg`` with these arguments.

        Parameters
        ----------
        logs
            Folder of what it says.
        before
            Functions of modules, each with arguments in JSON: called in the new process first.
        """
        logs.mkdir(parents=True, exist_ok=True)
        out, err = logs / 'out.txt', logs / 'err.txt'
        for path in (out, err):
            path.write_text('')
        calls = [(call.__module__, call.__name__, given) for call, given in before]
        pid = self.ask('start', list(map(str, arguments)), str(logs), calls)
        return Run(self, pid, out, err)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Cohort:
    """A dataset and how it is processed; every name has folders of its own."""

    server: Server
    bids: Path
    model: Path
    folder: Path

    def start(
        self,
        name: str,
        *more: object,
        level: str = 'participant',
        before: tuple[tuple[Callable, Any], ...] = (),
        fork: bool = True,
        out: Path | None = None,
        work: Path | None = None,
    ) -> Run:
        """Start a run; workers are forked unless the default way of starting them is wanted."""
        options: list = []
        if level == 'participant':
            options = ['--model', self.model, '--skip-bids-validation', '--nprocs', 2]
            options += ['--omp-nthreads', 1, '--device', 'cpu']
            options += ['-w', work or self.folder / name / 'work']
            options += ['--use-plugin', self.folder / 'fork.yml'] if fork else []
        if fork:
            before = ((draw_small, []), *before)
        command = [self.bids, out or self.out(name), level, *options, *more]
        return self.server.start(*command, logs=self.folder / name / 'logs', before=before)

    def run(self, name: str, *more: object, **options: Any) -> tuple[int, str]:
        """Return the exit code of a run and what it said."""
        run = self.start(name, *more, **options)
        return run.wait(), run.said()

    def out(self, name: str) -> Path:
        return self.folder / name / 'out'


def draw_small() -> None:
    """Draw small figures, for they take most of the time here."""
    from bids_jointseg import figures

    figures.WIDTH = 300


SMALL: dict[str, Any] = {'shape': (24, 28, 24), 'spacing_mm': (8.0, 8.0, 8.0)}
"""Of a scan, in voxels and their size."""


def make_cohort(server: Server, folder: Path) -> Cohort:
    """Return an empty dataset, an untrained network, and a plugin that forks workers."""
    import torch
    from conftest import describe_dataset

    from bids_jointseg.card import ModelCard
    from bids_jointseg.network import build, save_model

    torch.manual_seed(0)
    architecture = {'name': 'unet', 'channels': (2, 4)}
    card = ModelCard(
        'tiny', '0', architecture, in_plane_mm=8.0, slice_mm=(8.0, 8.0), licence='CC0-1.0'
    )
    saved = save_model(build(architecture), card, folder / 'model')
    (folder / 'fork.yml').write_text('plugin: MultiProc\nplugin_args: {mp_context: fork}\n')
    return Cohort(server, describe_dataset(folder / 'bids'), saved.path, folder)


def make_small_cohort(server: Server, folder: Path) -> Cohort:
    """Return one whose sub-1 has T1w and FLAIR, and sub-2 two sessions."""
    from conftest import draw_head, put

    made = make_cohort(server, folder)
    put(draw_head('T1w', **SMALL), made.bids / 'sub-1' / 'anat' / 'sub-1_T1w.nii.gz')
    put(draw_head('FLAIR', **SMALL, seed=1), made.bids / 'sub-1' / 'anat' / 'sub-1_FLAIR.nii.gz')
    for session in (1, 2):
        name = f'ses-{session}/anat/sub-2_ses-{session}_T1w.nii.gz'
        put(draw_head('T1w', **SMALL, seed=1 + session), made.bids / 'sub-2' / name)
    return made


def contents(out: Path) -> dict[str, bytes]:
    """Return the visible files of a dataset, logs aside."""
    found = {}
    for path in out.rglob('*'):
        if path.is_file() and 'log' not in path.parts and not path.name.endswith('.tmp'):
            with suppress(FileNotFoundError):  # a run may be about to write it again
                found[str(path.relative_to(out))] = path.read_bytes()
    return found


def _serve() -> None:
    for name in IMPORTED:
        import_module(name)
    for line in sys.stdin:
        command, *rest = json.loads(line)
        answer = _start(*rest) if command == 'start' else _poll(*rest)
        print(json.dumps(answer), flush=True)


def _start(arguments: list[str], logs: str, before: list[tuple[str, str, list[Any]]]) -> int:
    pid = os.fork()
    if pid:
        return pid

    def prepare() -> None:
        os.setsid()
        os.chdir(logs)
        for number, name in ((1, 'out.txt'), (2, 'err.txt')):
            os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for module, function, given in before:
            getattr(import_module(module), function)(*given)

    os._exit(outcome(arguments, prepare))


def outcome(arguments: list[str], prepare: Callable[[], object]) -> int:
    """Run the command in this process, and return its exit code; nothing is raised."""
    try:
        prepare()
        return int(import_module('bids_jointseg.cli').main(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99  # which the command never gives
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _poll(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


if __name__ == '__main__':
    _serve()
