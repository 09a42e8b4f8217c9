"""Running a Nipype workflow: quietly, with progress, to the end, and saying what failed.

Nipype's own messages go to a log file in the work folder, its crash reports to the log folder
of the run. The console gets one line per finished stage.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nipype
from nipype.pipeline.plugins import MultiProcPlugin

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nipype.pipeline.engine import Workflow

    from bids_jointseg.config import Settings

LOGGER = logging.getLogger('bids_jointseg')

KILLED = (
    'the process was killed, most likely because memory ran out: give more memory, '
    'a smaller --nprocs, or --fast'
)


@dataclass(frozen=True)
class Failure:
    """A node that failed: its full name, one line that says why, and where the details are."""

    node: str
    reason: str
    details: Path | None


class SurvivingMultiProc(MultiProcPlugin):
    """Nipype's MultiProc, which would wait for ever when a worker process is killed.

    What ran at that moment counts as failed; the rest goes on in new workers.
    """

    def __init__(self, plugin_args: dict[str, Any], initargs: tuple[Any, ...]) -> None:
        super().__init__(plugin_args=plugin_args)
        self.pool.shutdown(wait=False)
        self._initargs = initargs
        self._new_pool()

    def _new_pool(self) -> None:
        import multiprocessing

        # CUDA must not start before a fork; a forkserver never has it, and its workers persist.
        method = self.plugin_args.get('mp_context', 'forkserver')
        self.pool = ProcessPoolExecutor(
            max_workers=self.processors,
            mp_context=multiprocessing.get_context(method),
            initializer=start_worker,
            initargs=self._initargs,
        )

    def _async_callback(self, args: Any) -> None:
        if args.exception() is None and not args.cancelled():
            super()._async_callback(args)

    def _get_result(self, taskid: int) -> Any:
        future = self._task_obj[taskid]
        if future.done() and future.exception() is not None:
            return {'result': None, 'traceback': [f'{KILLED}\n'], 'taskid': taskid}
        return super()._get_result(taskid)

    def _submit_job(self, node: Any, updatehash: bool = False) -> Any:
        try:
            return super()._submit_job(node, updatehash)
        except BrokenProcessPool:
            self._new_pool()
            return super()._submit_job(node, updatehash)

    def close(self) -> None:
        """End what still runs."""
        workers = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()


def start_worker(cwd: str, log_file: str, verbose: int, monitor: bool) -> None:
    """Prepare a worker: quiet, and left alone by Ctrl-C, which the main process answers."""
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    """

    def __init__(self, scans: Mapping[str, str], stages: Mapping[str, str]) -> None:
        self.scans, self.stages = scans, stages
        self.total = len(scans) * len(stages)
        self.done = 0
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
            LOGGER.error('%s  failed: %s', name, self.stages.get(stage, stage))
        elif scan not in self.failed and stage in self.stages:
            self.done += 1
            begun = self.started.get(node.fullname)
            how = 'kept from before' if begun is None else f'{time.monotonic() - begun:.1f} s'
            counter = f'[{self.done:{len(str(self.total))}d}/{self.total}]'
            LOGGER.info('%s %s  %s (%s)', counter, name, self.stages[stage], how)


def run(
    workflow: Workflow,
    settings: Settings,
    *,
    plugin: str,
    plugin_args: Mapping[str, Any],
    log_file: Path,
    crash_folders: Iterable[Path],
    progress: Progress,
) -> list[Failure]:
    """Run a workflow to its end, whatever fails on the way.

    Parameters
    ----------
    workflow
        What to run.
    settings
        Of the run.
    plugin, plugin_args
        Nipype's; ``MultiProc`` gets workers that are quiet and may die.
    log_file
        Takes Nipype's messages.
    crash_folders
        Where the workflow's nodes leave their crash reports.
    progress
        Told when a node starts and ends.

    Returns
    -------
    list[Failure]
        What failed; empty if all is done.
    """
    monitor = settings.resource_monitor
    configure_nipype(log_file, settings.verbose, monitor)
    arguments = dict(plugin_args) | {'status_callback': progress}
    runner: Any = plugin
    if plugin == 'MultiProc':
        initargs = (os.getcwd(), str(log_file), settings.verbose, monitor)
        runner = SurvivingMultiProc(arguments, initargs)
    error: Exception | None = None
    try:
        workflow.run(plugin=runner, plugin_args=arguments)
    except Exception as raised:  # what failed is read from the crash reports
        error = raised
    finally:
        if plugin == 'MultiProc':
            runner.close()
    reports = (path for folder in crash_folders for path in sorted(folder.glob('crash-*.txt')))
    failures = [read_crash(path) for path in reports]
    if error is not None and not failures:
        raise error
    return failures


def read_crash(path: Path) -> Failure:
    """Return what a crash report says, in one line."""
    text = path.read_text(encoding='utf-8', errors='replace')
    node = re.search(r'^Node: (.*)$', text, re.MULTILINE)
    reason = 'see the details'
    if KILLED in text:
        reason = KILLED
    # The last exception of the traceback; ours say all in one line.
    found = re.findall(
        r'^\s*(?:\w+\.)*(\w*(?:Error|Exception|Interrupt|Exit)): (.*)$', text, re.MULTILINE
    )
    if found:
        kind, message = found[-1]
        reason = (
            message if kind in ('ImageError', 'ModelError', 'BidsError') else f'{kind}: {message}'
        )
        if 'MemoryError' in kind:
            reason += ' (give more memory, a smaller --nprocs, or --fast)'
    return Failure(node[1].strip() if node else path.stem, reason, path)
