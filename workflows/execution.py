"""Running a Nipype workflow: quietly, with progress, to the end, and saying what failed.

Nipype's own messages go to a log file in the work folder, its crash reports to the log folder
of the run. The console gets one line per finished stage.
"""

from __future__ import annotations

import gc
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nipype
import numpy as np
from nipype.pipeline.plugins import MultiProcPlugin

from bids_jointseg.config import SettingsError
from bids_jointseg.processes import end_with_parent
from bids_jointseg.workflows.slurm import Slurm, SlurmGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nipype.pipeline.engine import Workflow

LOGGER = logging.getLogger('bids_jointseg')

KILLED = (
    'the process was killed, most likely because memory ran out: give more memory, '
    'a smaller --nprocs, or --fast'
)

NO_MEMORY = re.compile(r"can't allocate memory|could not create a primitive|failed to map segment")
"""What PyTorch says, oneDNN within it, and the loader of a library."""

HUNG = 'took longer than {hours:g} hours and was ended: the same command tries it again'
BESIDE = 'was ended because another stage hung: the same command goes on'

INTERRUPTED = 'interrupted'
"""The reason of what Ctrl-C ended: Nipype makes a crash of it."""


@dataclass(frozen=True)
class Failure:
    """A stage of a scan that failed, one line that says why, and where the details are."""

    scan: str
    stage: str
    reason: str
    details: Path


class ScanByScan(MultiProcPlugin):
    """Nipype's MultiProc, with some changes for long runs.

    It finishes scans that have begun before it begins many others, so that results are complete
    early, and goes on the moment a stage ends. Where Nipype waits for ever once a worker process
    is killed or hangs, here what ran at that moment counts as failed, and the rest goes on in new
    workers. And a failure is not lost where its report cannot be written, as on a full disk.
    """

    def __init__(
        self, plugin_args: dict[str, Any], initargs: tuple[Any, ...], limit_s: float
    ) -> None:
        super().__init__(plugin_args=plugin_args)
        self.pool.shutdown(wait=False)
        self._initargs = initargs
        self._limit_s = limit_s
        self._begun: dict[int, float] = {}
        self._hung: set[int] = set()
        self._hung_at = -math.inf
        self.other_crashes: list[Path] = []
        # The pool's own threads need memory too: where one ends for want of it, the task fails.
        self._excepthook, threading.excepthook = threading.excepthook, _log_thread
        self._new_pool()

    def _new_pool(self) -> None:
        # CUDA must not start before a fork; a forkserver never has it, and its workers persist.
        method = self.plugin_args.get('mp_context', 'forkserver')
        self.pool = ProcessPoolExecutor(
            max_workers=self.processors,
            mp_context=multiprocessing.get_context(method),
            initializer=start_worker,
            initargs=self._initargs,
        )

    def _prerun_check(self, graph: Any) -> None:
        super()._prerun_check(graph)
        # Nipype collects garbage whenever it looks for work; the graph need not be looked at.
        gc.freeze()

    def run(self, graph: Any, config: dict[str, Any], updatehash: bool = False) -> None:
        """Run the graph; Nipype calls this."""
        execution = config['execution']
        self._pause_s = float(execution['poll_sleep_duration'])
        # The pause ends with the stage that it waits for, which Nipype's own does not.
        execution = execution | {'poll_sleep_duration': '0.01'}
        super().run(graph, config | {'execution': execution}, updatehash=updatehash)

    def _send_procs_to_workers(self, updatehash: bool = False, graph: Any = None) -> None:
        super()._send_procs_to_workers(updatehash, graph)
        running = [self._task_obj[task] for task, _ in self.pending_tasks]
        wait(running, timeout=self._pause_s, return_when=FIRST_COMPLETED)

    def _generate_dependency_list(self, graph: Any) -> None:
        super()._generate_dependency_list(graph)
        names = [node.fullname.rpartition('.')[0] for node in self.procs]
        self._scan_of = np.unique(names, return_inverse=True)[1]

    def _sort_jobs(self, jobids: Any, scheduler: str = 'tsort') -> list[int]:
        """Return the jobs to try in this round, those of scans that have begun first."""
        scans = self._scan_of
        unfinished = scans[~self.proc_done | self.proc_pending]
        begun = set(np.intersect1d(scans[self.proc_done], unfinished))
        free = self._check_resources(self.pending_tasks)[1]
        chosen: list[int] = []
        waiting = False
        for job in sorted(jobids, key=lambda job: (scans[job] not in begun, scans[job])):
            if scans[job] not in begun and waiting and len(begun) > self.processors:
                break  # small jobs of ever more scans would keep a large one from its turn
            waiting |= self.procs[job].n_procs > free
            free -= min(self.procs[job].n_procs, free)
            chosen.append(job)
        return chosen

    def _async_callback(self, args: Any) -> None:
        if args.exception() is None and not args.cancelled():
            super()._async_callback(args)

    def _get_result(self, taskid: int) -> Any:
        future = self._task_obj[taskid]
        if future.done() and future.exception() is not None:
            if taskid in self._hung:
                reason = HUNG.format(hours=self._limit_s / 3600)
            elif not isinstance(future.exception(), BrokenProcessPool):
                # Nipype failed over a failure: the first of the two says why.
                reason = str(future.exception().__cause__).split('\nDuring handling of')[0]
            else:
                reason = BESIDE if self._begun[taskid] < self._hung_at else KILLED
            return {'result': None, 'traceback': [f'{reason}\n'], 'taskid': taskid}
        result = super()._get_result(taskid)
        manager = self.pool._executor_manager_thread
        if not (future.done() or manager is None or manager.is_alive()):
            # It could not start a thread, and nothing would ever come.
            return {'result': None, 'traceback': [f'{KILLED}\n'], 'taskid': taskid}
        if result is None and time.monotonic() - self._begun[taskid] > self._limit_s:
            self._hung.add(taskid)
            self._hung_at = time.monotonic()
            for worker in self._workers():  # which of them has this task, the pool does not say
                worker.kill()
        return result

    def _local_hash_check(self, jobid: int, graph: Any) -> Any:
        folder = Path(self.procs[jobid].output_dir())
        try:
            _ = self.procs[jobid].result
        except FileNotFoundError:
            pass
        except Exception:  # cut off by a power cut, say: made again
            LOGGER.debug('%s: damaged, made again', folder, exc_info=True)
            shutil.rmtree(folder, ignore_errors=True)
        return super()._local_hash_check(jobid, graph)

    def _submit_job(self, node: Any, updatehash: bool = False) -> Any:
        try:
            taskid = super()._submit_job(node, updatehash)
        except BrokenProcessPool:
            self._new_pool()
            taskid = super()._submit_job(node, updatehash)
        self._begun[taskid] = time.monotonic()
        return taskid

    def _report_crash(self, node: Any, result: Any = None) -> Any:
        folder = Path(node.config['execution']['crashdump_dir'])
        before = set(folder.glob('crash-*'))
        try:
            return super()._report_crash(node, result)
        except OSError:
            for path in set(folder.glob('crash-*')) - before:
                path.unlink(missing_ok=True)  # a part of it
            node.config['execution']['crashdump_dir'] = tempfile.mkdtemp(prefix='jointseg-crash-')
            path = super()._report_crash(node, result)
            self.other_crashes.append(Path(path))
            return path

    def _workers(self) -> list[Any]:
        return list((self.pool._processes or {}).values())

    def close(self) -> None:
        """End what still runs."""
        gc.unfreeze()
        threading.excepthook = self._excepthook
        workers = self._workers()
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()


def node_name(name: str) -> str:
    """Return a name as Nipype takes it for a node or a workflow."""
    return re.sub(r'\W', '_', name)


def _log_thread(ended: Any) -> None:
    LOGGER.debug('a thread ended: %r', ended.exc_value)


def start_worker(cwd: str, log_file: str, verbose: int, monitor: bool) -> None:
    """Prepare a worker: quiet, and left alone by Ctrl-C, which the main process answers."""
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(RuntimeError):  # memory may be too short for a thread
        end_with_parent()
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S')
    configure_nipype(Path(log_file), verbose, monitor)


def configure_nipype(log_file: Path, verbose: int, monitor: bool) -> None:
    """Send Nipype's messages to a file (and, when asked twice to be verbose, to the console)."""
    logger = logging.getLogger('nipype')
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(log_file, delay=True)
    handler.setFormatter(logging.Formatter('%(asctime)s %(process)d %(message)s'))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk
    logger.addHandler(handler)
    logger.propagate = verbose > 1
    nipype.config.set('monitoring', 'enabled', str(monitor).lower())
    nipype.config.resource_monitor = monitor


class Progress:
    """Writes a line for every stage that ends.

    Parameters
    ----------
    scans
        Name of a scan's workflow -> what to call the scan.
    stages
        Name of a node -> what to say when it is done.
    total
        Number of stages of all scans.
    """

    def __init__(self, scans: Mapping[str, str], stages: Mapping[str, str], *, total: int) -> None:
        self.scans, self.stages, self.total = scans, stages, total
        self.done = 0
        self.kept = 0
        self.started: dict[str, float] = {}
        self.failed: set[str] = set()

    def __call__(self, node: Any, status: str) -> None:
        """Receive Nipype's ``status_callback``."""
        *_, scan, stage = node.fullname.split('.')
        name = self.scans.get(scan, scan)
        if status == 'start':
            self.started[node.fullname] = time.monotonic()
        elif status == 'exception':
            self.failed.add(scan)
            LOGGER.error('%s  failed (%s)', name, stage)
        elif scan not in self.failed and stage in self.stages:
            self.done += 1
            begun = self.started.get(node.fullname)
            self.kept += begun is None
            counter = f'[{self.done:{len(str(self.total))}d}/{self.total}]'
            if begun is None:
                LOGGER.debug('%s %s  %s (kept)', counter, name, self.stages[stage])
            else:
                seconds = time.monotonic() - begun
                LOGGER.info('%s %s  %s (%.1f s)', counter, name, self.stages[stage], seconds)


def run(
    workflow: Workflow,
    *,
    plugin: str,
    plugin_args: Mapping[str, Any],
    log_file: Path,
    crash_folders: Iterable[Path],
    progress: Progress,
    verbose: int = 0,
    monitor: bool = False,
    limit_s: float = math.inf,
) -> list[Failure]:
    """Run a workflow to its end, whatever fails on the way.

    Parameters
    ----------
    workflow
        What to run.
    plugin, plugin_args
        Nipype's; ``MultiProc`` gets workers that are quiet and may die, ``SLURM`` and
        ``SLURMGraph`` jobs that may.
    log_file
        Takes Nipype's messages.
    crash_folders
        Where the workflow's nodes leave their crash reports.
    progress
        Told when a node starts and ends; knows what the scans are called.
    verbose
        Above 1, Nipype's messages go to the console as well.
    monitor
        Log the memory and time of every node.
    limit_s
        A node of ``MultiProc`` that takes longer hangs: it is ended and counts as failed.

    Returns
    -------
    list[Failure]
        What failed; empty if all is done.
    """
    configure_nipype(log_file, verbose, monitor)
    arguments = dict(plugin_args) | {'status_callback': progress}
    runner: Any = plugin
    if plugin == 'MultiProc':
        initargs = (os.getcwd(), str(log_file), verbose, monitor)
        runner = ScanByScan(arguments, initargs, limit_s)
    elif plugin in ('SLURM', 'SLURMGraph'):
        runner = Slurm(arguments) if plugin == 'SLURM' else SlurmGraph(arguments)
        # The time limit of a head job: what it submitted must not go on without it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    error: Exception | None = None
    try:
        workflow.run(plugin=runner, plugin_args=arguments)
    except SettingsError:
        raise
    except Exception as raised:  # what failed is read from the crash reports
        error = raised
    finally:
        if runner is not plugin:
            runner.close()
    if progress.kept:
        LOGGER.info('%d of %d stages kept from before', progress.kept, progress.total)
    reports = [path for folder in crash_folders for path in sorted(folder.glob('crash-*.txt'))]
    reports += getattr(runner, 'other_crashes', [])
    if error is not None and not reports:
        raise error
    return [read_crash(path, progress.scans) for path in reports]


def read_crash(path: Path, scans: Mapping[str, str]) -> Failure:
    """Return what a crash report says, in one line.

    Parameters
    ----------
    path
        Nipype's report, as text.
    scans
        Name of a scan's workflow -> what to call the scan.
    """
    text = path.read_text(encoding='utf-8', errors='replace')
    *_, scan, stage = ('', '', *text.partition('\n')[0].removeprefix('Node: ').split('.'))
    # The last exception of the traceback; ours say all in one line.
    found = re.findall(r'^\s*(?:\w+\.)*(\w*(?:Error|Exception|Exit))(?:: (.*))?$', text, re.M)
    kind, message = found[-1] if found else ('', 'see the details')
    ended = re.search(
        r'^(the process was killed|took longer than|was ended|job \d+ gave no result).*$',
        text,
        re.M,
    )
    if ended:
        reason = ended[0]
    elif 'KeyboardInterrupt' in text:
        reason = INTERRUPTED
    elif kind in ('ImageError', 'ModelError', 'BidsError', 'RecipeError', 'ProtocolError', ''):
        reason = message
    else:
        reason = f'{kind}: {message}'
    if 'MemoryError' in kind or NO_MEMORY.search(message):
        reason += ' (give more memory, a smaller --nprocs, or --fast)'
    return Failure(scans.get(scan, scan), stage, reason, path)
