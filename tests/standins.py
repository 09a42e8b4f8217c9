"""What stands on the PATH of ``test_docs.py`` in place of programs that a test cannot run.

Each is as thin as can be: it takes the options that the documents use and no others, sees to it
that the files which they name exist, and runs the command inside, for real. Called as
``python standins.py PROGRAM ARGUMENTS``; ``SANDBOX`` is where the documents' folders are.

With ``ONLY_PARSED`` set, a command of ours stops where its own parser is done.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

from runs import IMPORTED, outcome

SANDBOX = Path(os.environ.get('SANDBOX', '.'))
ONLY_PARSED = bool(os.environ.get('ONLY_PARSED'))
SCRIPTS = Path(sysconfig.get_path('scripts'))
MODEL = SANDBOX / 'model' / 'tiny.json'
DOOR = 'door'


def run(*command: str | Path, **environment: str) -> None:
    """Run a command and end with its exit code, if that is not 0."""
    done = subprocess.run([str(part) for part in command], env=os.environ | environment)
    if done.returncode:
        raise SystemExit(done.returncode)


def there(*paths: str | Path) -> None:
    """Refuse files and folders that do not exist."""
    missing = [str(path) for path in paths if not Path(path).exists()]
    if missing:
        raise SystemExit(f'no such file: {", ".join(missing)}')


def stop_after_parsing() -> None:
    """Let every parser of this process check its arguments, and end."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise SystemExit(0)

    argparse.ArgumentParser.parse_args = parse_and_stop  # type: ignore[method-assign]


# --- our own commands: the real ones, with a network that is small ------------------------------


def jointseg(arguments: list[str]) -> None:
    """Run the real command, by an untrained network of a few weights unless a model is named.

    Each start imports PyTorch and Nipype anew, for seconds; so all runs but those with ``REAL``
    set are forks of one process, :func:`serve`, that call the function behind the command.
    """
    if '--model' not in arguments and not {'--version', '--help'} & {*arguments}:
        arguments = [*arguments, '--model', str(MODEL), '--skip-bids-validation']
    # Where a GPU is asked for, all but the device is checked.
    arguments += ['--dry-run'] if ONLY_PARSED else []
    if os.environ.get('REAL') or 'participant' not in arguments:
        run(SCRIPTS / 'jointseg', *arguments)
        return
    arguments += ['--use-plugin', str(SANDBOX / 'linear.yml')]
    request = {'arguments': arguments, 'cwd': os.getcwd(), 'environment': dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as call:
        call.connect(str(SANDBOX / DOOR))
        socket.send_fds(call, [json.dumps(request).encode()], [1, 2])
        call.shutdown(socket.SHUT_WR)
        code = int(call.recv(16) or 70)
    if code:
        raise SystemExit(code)


def serve() -> None:
    """Answer calls of jointseg by forks of this process, each in its caller's place."""
    for name in IMPORTED:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(DOOR)
        door.listen()
        print('open', flush=True)
        while True:
            call, _ = door.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(call)
            call.close()


def _answer(call: socket.socket) -> None:
    """Run one command, say its exit code, and end."""
    text, outputs, _, _ = socket.recv_fds(call, 1 << 20, 2)
    request = json.loads(text)

    def prepare() -> None:
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
        os.chdir(request['cwd'])
        os.environ.clear()
        os.environ.update(request['environment'])

    call.sendall(str(outcome(request['arguments'], prepare)).encode())
    os._exit(0)


def jointseg_train(arguments: list[str]) -> None:
    """Run the real command; one that is only parsed leaves the untrained network as its model."""
    if not ONLY_PARSED:
        run(SCRIPTS / 'jointseg-train', *arguments, '--workers', '0', '--device', 'cpu')
        return
    from bids_jointseg.cli import train
    from bids_jointseg.recipe import read_recipe

    stop_after_parsing()
    try:
        train(arguments)
    except SystemExit as stop:
        if stop.code:
            raise
    recipe = arguments[0]
    name = read_recipe(Path(recipe) if recipe.endswith('.toml') else recipe).name
    for suffix in ('.json', '.safetensors'):
        Path(arguments[1]).mkdir(parents=True, exist_ok=True)
        shutil.copy(MODEL.with_suffix(suffix), Path(arguments[1], name).with_suffix(suffix))


def jointseg_demo(arguments: list[str]) -> None:
    """Put the small dataset where the demonstration would be, and segment it as that does."""
    parser = argparse.ArgumentParser()
    parser.add_argument('out_dir', type=Path)
    parser.add_argument('--only-data', action='store_true')
    options = parser.parse_args(arguments)
    bids = options.out_dir / 'bids'
    shutil.copytree(SANDBOX / 'small', bids)
    if options.only_data:
        return
    work = str(options.out_dir / 'work')
    for level in ('participant', 'group'):
        jointseg([str(bids), str(options.out_dir / 'derivatives'), level, '-w', work])


# --- containers ---------------------------------------------------------------------------------


def docker(arguments: list[str]) -> None:
    """`run` runs jointseg with the folders mapped; `build` and `save` look at what they name."""
    parser = argparse.ArgumentParser(prog='docker')
    actions = parser.add_subparsers(dest='action', required=True)
    build = actions.add_parser('build')
    build.add_argument('-t', '--tag', required=True)
    build.add_argument('-f', '--file')
    build.add_argument('--target')
    build.add_argument('--build-arg', action='append', default=[])
    build.add_argument('context')
    save = actions.add_parser('save')
    save.add_argument('image')
    save.add_argument('-o', '--output', required=True)
    start = actions.add_parser('run')
    for flag in ('--rm', '--read-only', '-i', '-t', '--init'):
        start.add_argument(flag, action='store_true')
    for name in ('--user', '--gpus', '--network', '--tmpfs', '--memory', '--cpus', '--cap-drop'):
        start.add_argument(*([name] if name != '--user' else ['-u', name]))
    start.add_argument('-v', '--volume', action='append', default=[])
    start.add_argument('-e', '--env', action='append', default=[])
    start.add_argument('image')
    start.add_argument('inner', nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if options.action == 'build':
        file = Path(options.file or Path(options.context) / 'Dockerfile')
        there(file, options.context)
        known = set(re.findall(r'^ARG (\w+)', file.read_text(), re.MULTILINE))
        unknown = {item.partition('=')[0] for item in options.build_arg} - known
        if unknown:
            raise SystemExit(f'{file} has no ARG {unknown}')
        (SANDBOX / f'image-{options.tag}').touch()
        return
    there(SANDBOX / f'image-{options.image}')
    if options.action == 'save':
        Path(options.output).touch()
    else:
        _inside(options.volume, options.env, options.inner)


def apptainer(arguments: list[str]) -> None:
    """`run` runs jointseg with the folders mapped; `build` looks at what it names."""
    parser = argparse.ArgumentParser(prog='apptainer')
    actions = parser.add_subparsers(dest='action', required=True)
    build = actions.add_parser('build')
    build.add_argument('image')
    build.add_argument('source')
    start = actions.add_parser('run')
    for flag in ('--containall', '--cleanenv', '--nv', '--contain', '--no-home'):
        start.add_argument(flag, action='store_true')
    start.add_argument('-B', '--bind', action='append', default=[])
    start.add_argument('--env', action='append', default=[])
    start.add_argument('image')
    start.add_argument('inner', nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if options.action == 'build':
        kind, _, source = options.source.partition(':')
        there(source if kind in ('docker-archive', 'oci-archive') else options.source)
        Path(options.image).touch()
        return
    there(options.image)
    binds = [item for text in options.bind for item in text.split(',')]
    _inside(binds, options.env, options.inner)


def _inside(volumes: list[str], environment: list[str], inner: list[str]) -> None:
    """Run jointseg where the folders of a container are those of this machine."""
    places = {}
    for text in volumes:
        host, place, *_ = [*text.split(':'), '']
        there(host)
        places[place or host] = os.path.abspath(host)

    def outside(text: str) -> str:
        for place in sorted(places, key=len, reverse=True):
            text = re.sub(rf'(?<![\w./-]){re.escape(place)}(?=/|$)', places[place], text)
        if re.match('/(bids|out|work|data|templateflow)', text):
            raise SystemExit(f'{text} is not bound')
        return text

    for text in environment:
        name, _, value = text.partition('=')
        os.environ[name] = outside(value)
    jointseg([outside(text) for text in inner])


# --- a cluster ----------------------------------------------------------------------------------


def sbatch(arguments: list[str]) -> None:
    """Run every task of an array, one after the other, with the variables that SLURM sets."""
    parser = argparse.ArgumentParser(prog='sbatch')
    parser.add_argument('-a', '--array', default='')
    parser.add_argument('-c', '--cpus-per-task', default='1')
    for name in ('time', 'mem', 'gpus', 'gres', 'signal', 'partition', 'job-name', 'output',
                 'error', 'dependency', 'export', 'constraint', 'ntasks', 'nodes'):  # fmt: skip
        parser.add_argument(f'--{name}')
    for flag in ('--parsable', '--wait', '--requeue'):
        parser.add_argument(flag, action='store_true')
    parser.add_argument('--wrap')
    parser.add_argument('script', nargs='?')
    parser.add_argument('rest', nargs='*')
    options = parser.parse_args(arguments)
    if (options.wrap is None) == (options.script is None):
        raise SystemExit('sbatch: a script or --wrap')
    if options.script:
        lines = re.findall(r'^#SBATCH (.*?)(?: #.*)?$', Path(options.script).read_text(), re.M)
        words = [word for line in lines for word in line.split()]
        parser.parse_args([*words, *arguments], namespace=options)
    command = ['-c', options.wrap] if options.wrap else [options.script, *options.rest]
    tasks = ['']
    if options.array:
        first, _, last = options.array.partition('%')[0].partition('-')
        tasks = [str(task) for task in range(int(first), int(last or first) + 1)]
    for task in tasks:
        variables = {'SLURM_CPUS_PER_TASK': options.cpus_per_task, 'SLURM_JOB_ID': '1'}
        if task:
            variables |= {'SLURM_ARRAY_TASK_ID': task, 'SLURM_ARRAY_JOB_ID': '1'}
        run('bash', '-e', *command, **variables)
    print(1 if options.parsable else 'Submitted batch job 1')


def torchrun(arguments: list[str]) -> None:
    """Parse the launcher's options by its own parser: two hosts are not there."""
    from torch.distributed.run import parse_args

    options = parse_args(arguments)
    assert options.module
    import importlib.util

    assert importlib.util.find_spec(options.training_script), options.training_script


# --- the machine --------------------------------------------------------------------------------


def pip(arguments: list[str]) -> None:
    """Install or build nothing but this package, without network, and into nowhere."""
    action, *rest = arguments
    offline = ['--no-index', '--no-deps', '--no-build-isolation', '--disable-pip-version-check']
    if action == 'install':
        offline.append('--dry-run')
    # An index of the documents is of no use without a network.
    rest = [word for word in rest if not word.startswith(('https:', '--extra-index-url'))]
    run(sys.executable, '-m', 'pip', action, '-q', *offline, *rest)


def python(arguments: list[str]) -> None:
    """Run Python; a benchmark, whose data no test has, stops when its own parser is done."""
    if arguments[:2] == ['-m', 'venv']:
        folder = Path(arguments[2]) / 'bin'
        folder.mkdir(parents=True)
        (folder / 'activate').touch()  # a real one would hide what stands here
    elif arguments[0].startswith('benchmarks/'):
        if not ONLY_PARSED:
            raise SystemExit('a benchmark needs data that no test has: list it as only parsed')
        stop_after_parsing()
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).parent.absolute())
        runpy.run_path(arguments[0], run_name='__main__')
        raise AssertionError('the parser was not asked')
    else:
        run(sys.executable, *arguments)


def make(arguments: list[str]) -> None:
    """Say what would be made; it ends as make does where there is no such target."""
    run(shutil.which('make', path=os.defpath) or 'make', '-n', *arguments)


def xdg_open(arguments: list[str]) -> None:
    """See to it that what would be opened is a page."""
    for name in arguments:
        text = Path(name).read_text(encoding='utf-8')
        if not text.lstrip().lower().startswith('<!doctype html'):
            raise SystemExit(f'{name} is no page')


PROGRAMS = {
    'apptainer': apptainer,
    'docker': docker,
    'jointseg': jointseg,
    'jointseg-demo': jointseg_demo,
    'jointseg-train': jointseg_train,
    'make': make,
    'pip': pip,
    'python': python,
    'python3': python,
    'sbatch': sbatch,
    'torchrun': torchrun,
    'xdg-open': xdg_open,
}

if __name__ == '__main__':
    if sys.argv[1] == 'serve':
        serve()
    PROGRAMS[sys.argv[1]](sys.argv[2:])
