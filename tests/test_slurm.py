"""The app on a real SLURM: two nodes on this machine, jobs that are lost, reruns that mend it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import describe_dataset, draw_head, put

pytestmark = pytest.mark.slow

NODES = ('n1', 'n2')
SUBJECTS = ('01', '02', '03')
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=2
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ReturnToService=2
SlurmdTimeout=10
KillWait=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 DefaultTime=30 State=UP LLN=YES
"""
PLUGIN = """
plugin: {plugin}
plugin_args:
  sbatch_args: {sbatch_args}
  poll_s: 0.5
  answer_limit_s: 5
"""


@dataclass
class Cluster:
    """A SLURM of this test run alone.

    Attributes
    ----------
    folder
        Of its configuration, state and logs.
    daemons
        Name -> process.
    """

    folder: Path
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        # Nothing that a job needs is in HOME, and a cluster's node may know no LOGNAME.
        kept = {key: value for key, value in os.environ.items() if key not in ('LOGNAME', 'USER')}
        return kept | {'SLURM_CONF': str(self.folder / 'slurm.conf'), 'OMP_NUM_THREADS': '1'}

    def start(self, name: str, *command: str | Path) -> None:
        with (self.folder / f'{name}.out').open('w') as out:
            self.daemons[name] = subprocess.Popen(
                list(map(str, command)), env=self.environment, stdout=out, stderr=out
            )

    def start_controller(self) -> None:
        self.start('slurmctld', 'slurmctld', '-D')
        self.wait(lambda: self.ask('sinfo', '-h', '-N', '-o', '%N') != '')

    def start_nodes(self, *nodes: str) -> None:
        for node in nodes:
            self.start(node, 'slurmd', '-D', '-N', node)
        self.wait(lambda: self.idle() == sorted(NODES), 60)

    def idle(self) -> list[str]:
        rows = map(str.split, self.ask('sinfo', '-h', '-N', '-o', '%N %T').splitlines())
        return sorted(row[0] for row in rows if row[1] in ('idle', 'mixed', 'allocated'))

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ''

    def jobs(self) -> dict[str, tuple[str, str, str]]:
        """Return number -> (name, state, node) of the jobs that have not ended."""
        # With its header, an empty queue differs from one that does not answer.
        _, *rows = self.wait(lambda: self.ask('squeue', '-r', '-o', '%A|%j|%T|%N')).splitlines()
        return {row.split('|')[0]: tuple(row.split('|')[1:]) for row in rows}

    def running(self, name: str = '', node: str = '') -> tuple[str, str] | None:
        """Return the number and the node of a job that runs."""
        for job, (job_name, state, where) in self.jobs().items():
            if state == 'RUNNING' and name in job_name and node in where:
                return job, where
        return None

    def wait(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        """Return what the condition returns, once that is something."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, self.logs()
            time.sleep(0.2)
        return found

    def logs(self) -> str:
        return '\n'.join(
            f'{path.name}: {path.read_text()[-1500:]}' for path in self.folder.glob('*.log')
        )

    def kill(self, name: str) -> None:
        """Kill a daemon and, as when a machine fails, all that it started."""
        jobs = [job for job, (_, _, node) in self.jobs().items() if node == name]
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()
        # First the keeper of each job, which would tell how the job ended.
        for mark in ('slurmstepd: [{}.', 'SLURM_JOB_ID={}\0'):
            for pid in processes(*(mark.format(job).encode() for job in jobs)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def freeze(self, job: str) -> None:
        """Let the processes of a job do nothing."""
        for pid in processes(f'SLURM_JOB_ID={job}\0'.encode()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def stop(self) -> None:
        subprocess.run(['scancel', '-u', str(os.getuid())], env=self.environment, timeout=60)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def processes(*marks: bytes) -> list[int]:
    """Return the processes whose command or environment has one of these."""
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        with suppress(OSError):
            text = (folder / 'cmdline').read_bytes() + (folder / 'environ').read_bytes()
            if any(mark in text for mark in marks):
                found.append(int(folder.name))
    return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@pytest.fixture(scope='module')
def cluster() -> Iterator[Cluster]:
    needed = ('slurmctld', 'slurmd', 'sbatch', 'munged', 'setpriv')
    if missing := [program for program in needed if shutil.which(program) is None]:
        pytest.skip(f'not installed: {", ".join(missing)}')
    if os.getuid() != 0:
        pytest.skip('a cluster is started by root')
    # Not in pytest's folder: a socket's path must be short, and munge's and SLURM's own users
    # read there.
    folder = Path(f'/tmp/slurm-{os.getpid()}')
    folder.mkdir(mode=0o755)
    cluster = Cluster(folder)
    text = CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=_free_ports(3))
    (folder / 'slurm.conf').write_text(text)
    for name, mode, user in (('munge', 0o755, 'munge'), ('state', 0o700, 'root')):
        (folder / name).mkdir(mode=mode)
        shutil.chown(folder / name, user, user)
    key = folder / 'munge' / 'key'
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    shutil.chown(key, 'munge', 'munge')
    with (folder / 'slurm.conf').open('a') as file:
        file.write('SlurmUser=root\n')
    try:
        cluster.start(
            'munged',
            *('setpriv', '--reuid=munge', '--regid=munge', '--clear-groups'),
            *('munged', '--foreground', f'--socket={folder}/munge/socket', f'--key-file={key}'),
            *(f'--pid-file={folder}/munge/pid', f'--log-file={folder}/munge/log'),
            f'--seed-file={folder}/munge/seed',
        )
        cluster.wait((folder / 'munge' / 'socket').exists, 20)
        cluster.start_controller()
        cluster.start_nodes(*NODES)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope='module')
def bids_dir(tmp_path_factory) -> Path:
    root = describe_dataset(tmp_path_factory.mktemp('slurm') / 'bids')
    for seed, subject in enumerate(SUBJECTS):
        head = draw_head('T1w', shape=(24, 28, 24), spacing_mm=(8.0, 8.0, 8.0), seed=seed)
        put(head, root / f'sub-{subject}' / 'anat' / f'sub-{subject}_T1w.nii.gz')
    return root


@dataclass
class App:
    """One command of the app, and the folders that it writes."""

    cluster: Cluster
    out: Path
    command: list[str]
    process: subprocess.Popen | None = None

    def start(self) -> App:
        self.process = subprocess.Popen(
            self.command,
            env=self.cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self

    def end(self, seconds: float = 600) -> tuple[int, str]:
        """Return the exit code and what was said; no job is left behind."""
        assert self.process is not None
        said = self.process.communicate(timeout=seconds)[0]
        assert 'Traceback' not in said
        return self.process.returncode, said

    def run(self) -> tuple[int, str]:
        return self.start().end()


@pytest.fixture
def app(cluster, bids_dir, model, tmp_path) -> Callable[..., App]:
    """Return what makes a command: with a plugin, for some subjects."""

    def make(
        plugin: str | None, *subjects: str, sbatch_args: str = '--time=5', work: str = 'work'
    ) -> App:
        out = tmp_path / 'out'
        program = Path(sys.executable).with_name('jointseg')
        command = [program, bids_dir, out, 'participant', '-w', tmp_path / work]
        command += ['--model', model, '--skip-bids-validation', '--nprocs', '1']
        if plugin is not None:
            file = tmp_path / 'plugin.yaml'
            file.write_text(PLUGIN.format(plugin=plugin, sbatch_args=sbatch_args))
            command += ['--use-plugin', file]
        command += ['--participant-label', *subjects]
        return App(cluster, out, list(map(str, command)))

    return make


@pytest.fixture(scope='module')
def undisturbed(bids_dir, model, tmp_path_factory) -> dict[str, bytes]:
    """Return what a run without a cluster writes."""
    from bids_jointseg import cli

    folder = tmp_path_factory.mktemp('undisturbed')
    command = [bids_dir, folder / 'out', 'participant', '-w', folder / 'work', '--model', model]
    assert cli.main([*map(str, command), '--skip-bids-validation', '--nprocs', '1']) == 0
    return contents(folder / 'out')


def contents(out: Path, *subjects: str) -> dict[str, bytes]:
    """Return name -> bytes of all results but logs, or of those of some subjects."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob('*')
        if path.is_file()
        and 'log' not in path.parts
        and (not subjects or any(f'sub-{label}' in str(path) for label in subjects))
    }


def only(results: dict[str, bytes], *subjects: str) -> dict[str, bytes]:
    return {
        name: content
        for name, content in results.items()
        if any(f'sub-{label}' in name for label in subjects)
    }


def stages_of(work: Path) -> list[str]:
    """Return the stages that were given to the queue, as 'sub_01_wf.segment'."""
    scripts = work.rglob('batchscript_*.sh')
    return sorted(path.stem.partition('jointseg_wf.')[2] for path in scripts)


def test_the_plugin_gives_the_results_of_one_machine(app, cluster, undisturbed, tmp_path):
    """From a head job, as on a cluster whose login node runs nothing."""
    head = app('SLURM', '01', '02')
    log = tmp_path / 'head.txt'
    wrapped = shlex.join(head.command)
    submitted = ['sbatch', '--wait', '-J', 'head', '-o', str(log), '--wrap', wrapped]
    done = subprocess.run(submitted, env=cluster.environment, capture_output=True, timeout=600)
    assert done.returncode == 0, log.read_text()
    assert '2 of 2 scans complete' in log.read_text()
    assert contents(head.out, '01', '02') == only(undisturbed, '01', '02')
    assert not cluster.jobs()


def test_the_graph_is_waited_for_and_lost_jobs_are_told(app, cluster, undisturbed, tmp_path):
    """One job is cancelled, one reaches its time limit; the third scan is complete."""
    run = app('SLURMGraph', *SUBJECTS).start()
    cancelled, _ = cluster.wait(lambda: cluster.running('sub_01_wf.'))
    cluster.ask('scancel', cancelled)
    late, _ = cluster.wait(lambda: cluster.running('sub_02_wf.'))
    cluster.freeze(late)  # SLURM looks at limits every half minute
    cluster.ask('scontrol', 'update', f'JobId={late}', 'EndTime=now')
    code, said = run.end()
    assert code == 1, said
    rows = {line.split()[0]: line for line in said.splitlines() if line.startswith('sub-')}
    assert f'job {cancelled} gave no result (cancelled)' in rows['sub-01']
    assert f'job {late} gave no result (it reached its time limit)' in rows['sub-02']
    assert '1 of 3 scans complete' in said
    assert contents(run.out, '03') == only(undisturbed, '03')
    assert not cluster.jobs()

    shutil.rmtree(next((tmp_path / 'work').rglob('batch')))
    code, said = run.run()
    assert code == 0, said
    assert '3 of 3 scans complete' in said
    assert contents(run.out) == undisturbed
    assert not [stage for stage in stages_of(tmp_path / 'work') if stage.startswith('sub_03')]


def test_a_node_that_dies_costs_one_scan_until_the_rerun(app, cluster, undisturbed):
    run = app('SLURM', '01', '02').start()
    job, node = cluster.wait(lambda: cluster.running(node='n2'))
    cluster.kill(node)
    code, said = run.end()
    assert code == 1, said
    assert f'job {job} gave no result (its machine failed)' in said
    # On the machine that is left.
    code, said = run.run()
    assert code == 0, said
    assert contents(run.out, '01', '02') == only(undisturbed, '01', '02')
    cluster.start_nodes(node)


def test_array_jobs_share_one_folder_and_mend_what_is_missing(app, cluster, undisturbed, tmp_path):
    """One subject for each task; one task is cancelled, one requeued, all run again."""
    out = app(None).out
    script = tmp_path / 'array.sh'
    lines = ['#!/bin/bash', 'case $SLURM_ARRAY_TASK_ID in']
    for number, subject in enumerate(SUBJECTS):
        task = app(None, subject, work=f'work-{subject}').command
        lines.append(f'{number}) {shlex.join(task)} ;;')
    script.write_text('\n'.join([*lines, 'esac\n']))
    command = ['sbatch', '--wait', '--array=0-2', '--requeue', '-J', 'array']
    command += ['-o', f'{tmp_path}/array-%a.txt', str(script)]

    first = subprocess.Popen(command, env=cluster.environment, stdout=subprocess.DEVNULL)
    cluster.wait(lambda: len([job for job in cluster.jobs().values() if job[1] == 'RUNNING']) == 3)
    tasks = cluster.ask('squeue', '-h', '-r', '-o', '%K %i').split()
    numbers = dict(zip(tasks[::2], tasks[1::2], strict=True))
    time.sleep(2)
    cluster.ask('scancel', numbers['0'])
    cluster.ask('scontrol', 'requeue', numbers['1'])
    state = ('squeue', '-h', '-j', numbers['1'], '-o', '%T')
    cluster.wait(lambda: cluster.ask(*state) == 'PENDING\n')
    # A requeued job waits for two minutes, because a node that has just ended a job starts it
    # again only in a later second.
    cluster.ask('scontrol', 'update', f'JobId={numbers["1"]}', 'StartTime=now+5')
    assert first.wait(600) != 0
    # --wait does not count the second start, and no answer of the queue is no end of a job.
    said = tmp_path / 'array-1.txt'
    cluster.wait(lambda: 'scans complete' in said.read_text(), 200)
    cluster.wait(lambda: not cluster.jobs())
    assert contents(out, '02', '03') == only(undisturbed, '02', '03')

    assert subprocess.run(command, env=cluster.environment, timeout=600).returncode == 0
    found = contents(out)
    assert found == undisturbed
    for number in range(3):
        said = (tmp_path / f'array-{number}.txt').read_text()
        assert 'Traceback' not in said
        assert '1 of 1 scans complete' in said


@pytest.mark.parametrize('plugin', ['SLURM', 'SLURMGraph'])
def test_a_queue_that_refuses_is_told_in_one_line(app, plugin):
    code, said = app(plugin, '01', sbatch_args='--partition=nowhere').run()
    assert code == 2
    assert 'the queue does not take jobs (sbatch: error:' in said
    assert 'invalid partition' in said


def test_no_job_outlives_its_head(app, cluster):
    run = app('SLURMGraph', '01').start()
    cluster.wait(cluster.running)
    run.process.terminate()
    code, said = run.end()
    assert code == 130
    assert 'interrupted; the same command goes on' in said
    cluster.wait(lambda: not cluster.jobs(), 20)


def test_a_silent_controller_ends_the_run(app, cluster):
    run = app('SLURM', '01').start()
    cluster.wait(cluster.running)
    cluster.kill('slurmctld')
    code, said = run.end()
    cluster.start_controller()
    assert code == 1
    assert 'the queue has not answered for 5 s' in said
