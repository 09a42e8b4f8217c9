"""Nipype's plugins for SLURM, so that every way in which a job can end is told.

Nipype's own wait for ever, report success at once, or stop with an error of their own where a
job is cancelled, reaches its time limit, loses its machine, or is refused by the queue. Here one
question to the queue, every few seconds, decides about all jobs; what has no result failed, and
says why; and no job is left behind by a run that ends.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipype.pipeline.plugins.base import GraphPluginBase, SGELikeBatchManagerBase
from nipype.pipeline.plugins.tools import report_crash

from bids_jointseg.config import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

LOGGER = logging.getLogger('bids_jointseg')

ANSWER_LIMIT_S = 600
"""A queue that is silent for longer is given up."""

ENDED = {
    'BOOT_FAIL': 'its machine did not start',
    'CANCELLED': 'cancelled',
    'DEADLINE': 'its deadline passed',
    'FAILED': 'it was killed, most likely because memory ran out',
    'NODE_FAIL': 'its machine failed',
    'OUT_OF_MEMORY': 'memory ran out',
    'PREEMPTED': 'another job took its place',
    'REVOKED': 'cancelled',
    'TIMEOUT': 'it reached its time limit',
}
"""How a job ends without a result: SLURM's word, and ours."""

LOST = 'job {job} gave no result ({reason}): the same command tries it again'


class Queue:
    """What is asked of SLURM.

    Parameters
    ----------
    plugin_args
        Nipype's: ``sbatch_args``, ``max_tries``, ``retry_timeout`` (s); ours: ``poll_s``, the
        time between two questions, and ``answer_limit_s``.
    """

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        self.arguments = shlex.split(str(plugin_args.get('sbatch_args', '')))
        self.tries = 1 + int(plugin_args.get('max_tries', 2))
        self.pause_s = float(plugin_args.get('retry_timeout', 2))
        self.poll_s = float(plugin_args.get('poll_s', 5))
        self.limit_s = float(plugin_args.get('answer_limit_s', ANSWER_LIMIT_S))
        self._reasons: dict[int, str | None] = {}
        self._asked = self._answered = time.monotonic()

    def submit(self, script: Path, node: Any, more: Sequence[str] = ()) -> int:
        """Submit the script of a stage and return the number of its job.

        Raises
        ------
        SettingsError
            One line, if the queue does not take it.
        """
        command = [
            *('sbatch', '--parsable', '-o', str(script.with_name('slurm-%j.out'))),
            # The old copy may live on where its machine is only out of reach, and two would
            # write into one folder.
            *('--no-requeue', '-J', node.fullname, '-c', str(node.n_procs)),
            *self.arguments,  # the last word is the user's
            *more,
            str(script),
        ]
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause_s)
            done = _ask(command)
            if done.returncode == 0:
                job = int(done.stdout.partition(';')[0])
                self._reasons[job] = None
                return job
        raise SettingsError(
            f'the queue does not take jobs ({_said(done)}): mend sbatch_args in the plugin file '
            'if they are the reason; the same command goes on'
        )

    def ended(self, job: int) -> str | None:
        """Return None while a job waits or runs, '' once it is done, else why it failed."""
        return self._reasons[job]

    def look(self) -> None:
        """Ask how all jobs are, unless that was a moment ago."""
        now = time.monotonic()
        if now - self._asked < self.poll_s:
            return
        done = _ask(['squeue', '-h', '-t', 'all', '-u', str(os.getuid()), '-o', '%A %T %r'])
        self._asked = time.monotonic()
        running = [job for job, reason in self._reasons.items() if reason is None]
        if done.returncode == 0:
            self._answered = self._asked
            rows = (line.split(maxsplit=2) for line in done.stdout.splitlines())
            there = {int(job): (state, why) for job, state, why in rows}
            for job in running:
                # What the queue has forgotten ended a while ago; its result tells how.
                state, why = there.get(job, ('COMPLETED', ''))
                if state == 'COMPLETED':
                    self._reasons[job] = ''
                elif state in ENDED or why == 'DependencyNeverSatisfied':
                    self._reasons[job] = ENDED.get(state, ENDED['CANCELLED'])
        elif now - self._answered > self.limit_s:
            silent = f'the queue has not answered for {self.limit_s:g} s: {_said(done)}'
            self._reasons |= dict.fromkeys(running, silent)

    def cancel(self) -> None:
        """Cancel all jobs that have not ended."""
        left = [str(job) for job, reason in self._reasons.items() if reason is None]
        if left and _ask(['scancel', *left]).returncode:
            LOGGER.warning('jobs may be left in the queue: scancel %s', ' '.join(left))


def _ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands; an answer that does not come is a failure like others."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, '', str(error))


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return ' '.join(done.stderr.split()) or f'exit code {done.returncode}'


class Slurm(SGELikeBatchManagerBase):
    """Nipype's SLURM plugin: one job for each stage, submitted once it can run."""

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        super().__init__('#!/bin/bash', plugin_args=plugin_args)
        self.queue = Queue(plugin_args)

    def _submit_batchtask(self, scriptfile: str, node: Any) -> int:
        job = self.queue.submit(Path(scriptfile), node)
        self._pending[job] = node.output_dir()
        return job

    def _is_pending(self, taskid: int) -> bool:
        return self.queue.ended(taskid) is None

    def _get_result(self, taskid: int) -> Any:
        self.queue.look()
        reason = self.queue.ended(taskid)
        if reason is None:
            return None
        if not reason:
            result = super()._get_result(taskid)
            if not isinstance(result['traceback'], str):  # a string is Nipype's, of no result
                return result
            reason = 'see its log in the work folder'
        lost = LOST.format(job=taskid, reason=reason)
        return {'result': None, 'traceback': [f'{lost}\n']}

    def _report_crash(self, node: Any, result: Any = None) -> Any:
        if result is not None and isinstance(result['traceback'], str):
            # Nipype adds lines to it, which it cannot to a string.
            result = result | {'traceback': result['traceback'].splitlines(keepends=True)}
        return super()._report_crash(node, result)

    def close(self) -> None:
        """Cancel what still waits or runs."""
        self.queue.cancel()


class SlurmGraph(GraphPluginBase):
    """Nipype's SLURMGraph plugin: all jobs are submitted at once, and depend on each other."""

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        self._callback = plugin_args.get('status_callback')
        super().__init__({**plugin_args, 'status_callback': None})
        self._template = plugin_args.get('template', '#!/bin/bash')
        if os.path.isfile(self._template):
            self._template = Path(self._template).read_text(encoding='utf-8')
        self.queue = Queue(plugin_args)

    def _submit_graph(
        self, pyfiles: list[str], dependencies: dict[int, list[int]], nodes: list[Any]
    ) -> None:
        jobs: dict[int, int] = {}
        for number, (file, node) in enumerate(zip(pyfiles, nodes, strict=True)):
            before = [str(jobs[index]) for index in dependencies[number] if index in jobs]
            if not before and _is_kept(node):
                self._callback(node, 'end')
                continue
            script = Path(file).with_name(f'batchscript_{Path(file).stem}.sh')
            command = shlex.join([sys.executable, file])
            script.write_text(f'{self._template.rstrip()}\n{command}\n', encoding='utf-8')
            more = ['--dependency=afterok:' + ':'.join(before), '--kill-on-invalid-dep=yes']
            jobs[number] = self.queue.submit(script, node, more if before else ())
            self._callback(node, 'start')
        self._wait(jobs, dependencies, nodes)

    def _wait(
        self, jobs: dict[int, int], dependencies: dict[int, list[int]], nodes: list[Any]
    ) -> None:
        """Wait until all jobs have ended; report those that failed, not what depends on them."""
        running, failed = dict(jobs), set()
        while running:
            time.sleep(min(1.0, self.queue.poll_s))
            self.queue.look()
            for number, job in list(running.items()):
                reason = self.queue.ended(job)
                if reason is None:
                    continue
                del running[number]
                if not reason:
                    self._callback(nodes[number], 'end')
                    continue
                failed.add(number)
                if failed.isdisjoint(dependencies[number]):
                    self._callback(nodes[number], 'exception')
                    _report(nodes[number], LOST.format(job=job, reason=reason))

    def close(self) -> None:
        """Cancel what still waits or runs."""
        self.queue.cancel()


def _is_kept(node: Any) -> bool:
    """Tell whether a stage has nothing to compute; what it needs has been computed."""
    try:
        return node.overwrite is None and node.is_cached() == (True, True)
    except Exception:  # Nipype's, of any kind: it is computed again
        return False


def _report(node: Any, line: str) -> None:
    """Leave a crash report, unless the stage raised and so has left its own."""
    folder = Path(node.config['execution']['crashdump_dir'])
    reports = folder.glob(f'crash-*-{node._id}-*.txt')
    if not any(path.read_text().startswith(f'Node: {node.fullname}\n') for path in reports):
        report_crash(node, [f'{line}\n'])
