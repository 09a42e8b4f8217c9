"""The command ``jointseg``: options, exit codes, and what is said on the console.

Nothing heavy is imported before it is needed, so ``--help`` answers at once and ``--dry-run``
needs neither PyTorch nor Nipype.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import logging
import mmap
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
import traceback
from contextlib import ExitStack, suppress
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bids_jointseg import __version__
from bids_jointseg.config import ANALYSES, LEVELS, Settings, SettingsError, available_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from bids_jointseg.bids import Scan, Skipped
    from bids_jointseg.card import ModelCard

LOGGER = logging.getLogger('bids_jointseg')

EPILOG = """\
exit codes: 0 all done; 1 some scans failed (the others are complete, a table says which and
why); 2 wrong usage, or a folder or disk that cannot be used; 3 only a report or a comparison of
sessions failed; 65 nothing usable in the data; 70 internal error, or too little memory. Where
several apply: 70, 65, 1, 3. Options may be written with underscores as well.
"""


class Exit(IntEnum):
    """Exit codes of the command."""

    DONE = 0
    SCANS_FAILED = 1
    USAGE = 2
    REPORT_FAILED = 3
    NO_DATA = 65
    INTERNAL = 70


MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ESTALE, errno.ENODEV, errno.EMFILE, errno.ENFILE),
)
"""Errors of the file system, which are no fault of the program: full, read-only, gone ..."""


SPARE = 32 * 2**20
"""Bytes without which nothing is begun: Python can wait for ever where no thread can start."""


class _Parser(argparse.ArgumentParser):
    """A parser that answers a wrong command with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.USAGE, f'{self.prog}: {message} (see {self.prog} --help)\n')


def parser() -> argparse.ArgumentParser:
    """Return the parser; an option that is not given leaves no trace, so a file may set it."""
    main = _Parser(
        prog='jointseg',
        description='Segment brain tissue and white-matter lesions together, from T1w and FLAIR '
        'scans or either alone, each on its own native grid.',
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    main.add_argument('bids_dir', type=_path, help='root of the BIDS dataset')
    main.add_argument('output_dir', type=_path, help='folder of the results, itself BIDS')
    main.add_argument(
        'analysis_level',
        choices=ANALYSES,
        metavar='{participant,group}',
        help='participant: segment every scan; group: gather what was segmented into tables',
    )
    main.add_argument('--version', action='version', version=f'jointseg {__version__}')

    data = main.add_argument_group('which scans')
    data.add_argument(
        '--participant-label', nargs='+', metavar='LABEL', help='only these (sub- is optional)'
    )
    data.add_argument(
        '--session-label', nargs='+', metavar='LABEL', help='only these (ses- is optional)'
    )
    data.add_argument(
        '--bids-filter-file',
        type=_path,
        metavar='JSON',
        help="select files by entities, in fMRIPrep's format with the keys t1w and flair",
    )
    data.add_argument('--ignore', nargs='+', metavar='flair', help='leave the FLAIR scans out')
    data.add_argument(
        '--derivatives',
        nargs='+',
        metavar='PKG=PATH',
        help='precomputed derivatives: a transform between FLAIR and T1w found there is used',
    )
    data.add_argument(
        '--bids-database-dir', type=_path, metavar='PATH', help='keep the index of the dataset'
    )
    data.add_argument(
        '--skip-bids-validation',
        action='store_true',
        help='do not run the validator (its errors are only warnings)',
    )
    data.add_argument(
        '--dry-run',
        action='store_true',
        help='print which T1w goes with which FLAIR and what is left out, and stop',
    )

    method = main.add_argument_group('what is computed')
    method.add_argument('--model', metavar='NAME_OR_PATH', help='network (default: jointseg)')
    method.add_argument(
        '--fast',
        action='store_true',
        help='one pass of the network per scan, without its mirror image',
    )
    method.add_argument(
        '--level',
        choices=LEVELS,
        metavar='{minimal,full}',
        help='minimal: labels, lesion masks, tables, report; full (default): also probabilities, '
        'uncertainty, brain mask, preprocessed scans, transforms',
    )
    method.add_argument(
        '--output-spaces',
        nargs='+',
        metavar='SPACE',
        help='beside the native grids: templates in TEMPLATEFLOW_HOME, as '
        'MNI152NLin2009cAsym:res-2; nothing is downloaded',
    )
    method.add_argument('--random-seed', type=int, metavar='N', help='default: 0')

    machine = main.add_argument_group('how it runs')
    machine.add_argument(
        '-w', '--work-dir', type=_path, metavar='PATH', help='intermediate results (default: work)'
    )
    machine.add_argument(
        '--clean-workdir', action='store_true', help="remove this app's old work folders first"
    )
    machine.add_argument(
        '--nprocs', '--nthreads', '--n-cpus', type=int, metavar='N', help='processors to use'
    )
    machine.add_argument('--omp-nthreads', type=int, metavar='N', help='most threads of one task')
    machine.add_argument(
        '--mem',
        '--mem-gb',
        type=_gigabytes,
        metavar='GB',
        help='memory to use (16, 16GB, 16000MB)',
    )
    machine.add_argument('--device', metavar='{auto,cpu,cuda,cuda:N}', help='default: auto')
    machine.add_argument(
        '--n-gpu-procs', type=int, metavar='N', help='scans on the GPU at once (default: 1)'
    )
    machine.add_argument(
        '--use-plugin',
        '--nipype-plugin-file',
        type=_path,
        metavar='FILE',
        help='YAML or TOML with plugin and plugin_args of Nipype',
    )
    machine.add_argument(
        '--config-file',
        type=_path,
        metavar='TOML',
        help='settings of an earlier run (config.toml in its logs); options given here win',
    )
    machine.add_argument(
        '--reports-only', action='store_true', help='make the reports of what is there, and stop'
    )
    machine.add_argument(
        '--boilerplate-only', action='store_true', help='write the description of the method only'
    )
    machine.add_argument(
        '--stop-on-first-crash', action='store_true', help='do not go on with the other scans'
    )
    machine.add_argument('--write-graph', action='store_true', help='draw the workflow')
    machine.add_argument(
        '--resource-monitor', action='store_true', help='log the memory and time of every task'
    )
    machine.add_argument(
        '-v', '--verbose', action='count', help='say more; -vv shows what Nipype does'
    )
    machine.add_argument(
        '--notrack', action='store_true', help='accepted for compatibility: nothing is tracked'
    )
    return main


def _path(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text)))


def _gigabytes(text: str) -> float:
    match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*(|[gmGM][bB]?)', text)
    if match is None:
        raise argparse.ArgumentTypeError(f'{text!r} is not an amount of memory such as 16 or 16GB')
    return float(match[1]) / (1000 if match[2][:1] in ('m', 'M') else 1)


def read_arguments(argv: Sequence[str]) -> Settings:
    """Return the settings of a command line.

    Raises
    ------
    SettingsError
        If a value does not fit; argparse itself ends the program on a wrong option.
    """
    # fMRIPrep spells most options both ways.
    spelled = [re.sub(r'^--[A-Za-z_-]+', lambda name: name[0].replace('_', '-'), a) for a in argv]
    given: dict[str, Any] = vars(parser().parse_args(spelled))
    for name, prefix in (('participant_label', 'sub-'), ('session_label', 'ses-')):
        if name in given:
            given[name] = tuple(dict.fromkeys(item.removeprefix(prefix) for item in given[name]))
    for name in ('ignore', 'output_spaces'):
        if name in given:
            given[name] = tuple(given[name])
    if 'derivatives' in given:
        given['derivatives'] = dict(map(_named_folder, given['derivatives']))
    model = given.get('model', '')
    if '/' in model or model.endswith(('.json', '.safetensors')):
        given['model'] = str(_path(model))  # nodes run in folders of their own
    config_file = given.pop('config_file', None)
    if config_file is None:
        return Settings(**given)
    try:
        return Settings.from_toml(config_file.read_text(encoding='utf-8'), **given)
    except OSError as error:
        raise SettingsError(f'{config_file}: cannot be read ({error.strerror})') from error
    except (SettingsError, UnicodeDecodeError) as error:
        raise SettingsError(f'{config_file}: {error}') from error


def _named_folder(text: str) -> tuple[str, Path]:
    name, found, folder = text.partition('=')
    if not (found and name and folder):
        raise SettingsError(f'--derivatives {text}: write NAME=PATH')
    return name, _path(folder)


def check_folders(settings: Settings) -> None:
    """Refuse folders that cannot be read or written, or that would mix input with output.

    Raises
    ------
    SettingsError
        One line that names the folder and the remedy.
    """
    bids_dir, out_dir = settings.bids_dir, settings.output_dir
    if not os.path.isdir(bids_dir):  # also where a name is too long to ask for
        raise SettingsError(f'{bids_dir} is not a folder: give the root of a BIDS dataset')
    for name, folder in settings.derivatives.items():
        if not os.path.isdir(folder):
            raise SettingsError(f'--derivatives {name}={folder}: no such folder')
    source, target = bids_dir.resolve(), out_dir.resolve()
    if target == source:
        raise SettingsError(f'{out_dir} is the input: give another folder for the results')
    if target.is_relative_to(source) and target.parent != source / 'derivatives':
        raise SettingsError(
            f'{out_dir} is inside the input: only {bids_dir}/derivatives/NAME may be'
        )
    if settings.analysis_level == 'participant' and not settings.dry_run:
        work = settings.work_dir.resolve()
        if work.is_relative_to(source):
            raise SettingsError(f'{settings.work_dir} is inside the input: choose another -w')
        for folder in (out_dir, settings.work_dir)[: 1 if settings.reports_only else 2]:
            _check_writable(folder)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingsError(f'{folder} cannot be written ({error.strerror})') from error


def pairing_table(scans: Sequence[Scan], skipped: Sequence[Skipped], bids_dir: Path) -> str:
    """Return which T1w goes with which FLAIR, and what is left out and why, as text."""
    rows = [('result', 'T1w', 'FLAIR', 'notes')]
    rows += [
        (
            scan.stem,
            scan.t1w.name if scan.t1w else '-',
            scan.flair.name if scan.flair else '-',
            '; '.join(scan.notes),
        )
        for scan in scans
    ]
    text = _align(rows)
    if skipped:
        left = [('left out', 'why')]
        left += [(str(item.path.relative_to(bids_dir)), item.reason) for item in skipped]
        text += '\n' + _align(left)
    return text


UNSEEN = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], '\N{REPLACEMENT CHARACTER}')
"""Names of files may hold characters that command a terminal: they are not sent to it."""


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(UNSEEN)


def _align(rows: Sequence[Sequence[str]]) -> str:
    rows = [[' '.join(cell.splitlines()).translate(UNSEEN) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return ''.join(line.rstrip() + '\n' for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``jointseg`` and return its exit code; never raises but for ``--help`` and typing."""

    def run() -> int:
        settings = read_arguments(sys.argv[1:] if argv is None else argv)
        if settings.verbose:
            LOGGER.setLevel(logging.DEBUG)
        check_folders(settings)
        return _group(settings) if settings.analysis_level == 'group' else _participant(settings)

    return _answer('jointseg', run)


def _answer(program: str, run: Callable[[], int]) -> int:
    """Run one of the commands; answer what is wrong in one line, and by the exit code."""
    from bids_jointseg.bids import BidsError, DataError
    from bids_jointseg.card import ModelError
    from bids_jointseg.labels import ProtocolError
    from bids_jointseg.recipe import RecipeError

    def stop(code: int, message: object) -> int:
        sys.stderr.write(f'{program}: {message}'.translate(UNSEEN) + '\n')
        return int(code)

    console = logging.StreamHandler()
    console.setFormatter(_Formatter('%(asctime)s %(message)s', datefmt='%H:%M:%S'))
    logging.basicConfig(handlers=[console])
    LOGGER.setLevel(logging.INFO)
    try:
        mmap.mmap(-1, SPARE).close()
        return int(run())
    except (SettingsError, BidsError, ModelError, RecipeError, ProtocolError) as error:
        return stop(Exit.USAGE, error)
    except DataError as error:
        return stop(Exit.NO_DATA, error)
    except KeyboardInterrupt:
        return stop(130, 'interrupted; the same command goes on')
    except Exception as error:
        short = isinstance(error, OSError) and error.errno == errno.ENOMEM
        if short or isinstance(error, MemoryError) or "can't start new thread" in str(error):
            return stop(Exit.INTERNAL, 'memory ran out: give more, or a smaller --nprocs')
        if isinstance(error, OSError) and error.errno in MACHINE:
            where = f'{error.filename}: ' if error.filename else ''
            return stop(Exit.USAGE, f'{where}{error.strerror}: mend it and run the same command')
        details = Path(tempfile.gettempdir()) / f'{program}-{os.getpid()}.txt'
        with suppress(OSError):
            details.write_text(traceback.format_exc(), encoding='utf-8')
        return stop(Exit.INTERNAL, f'internal error, {error!r}; please report {details}')


def _read_card(model: str) -> ModelCard:
    """Return the card of a model that segments."""
    from bids_jointseg.card import FIRST_LOOKS, ModelError, read_card

    card = read_card(model)
    if card.name in FIRST_LOOKS:
        raise ModelError(
            f'model {model!r} only tells where to look: give one that segments, such as jointseg'
        )
    return card


def _participant(settings: Settings) -> int:
    from bids_jointseg import bids
    from bids_jointseg.card import read_weights

    if settings.reports_only:
        card = _read_card(settings.model)
        subjects = finished_subjects(settings)
        if not subjects:
            raise bids.DataError(f'{settings.output_dir}: no results to report: run it first')
        return max(write_comparisons(settings, subjects), write_reports(settings, card, subjects))

    if settings.standard_spaces:
        from bids_jointseg.standard import find_template

        for space in settings.standard_spaces:
            find_template(space)  # before hours of work, not after
    _prepare_environment(settings)
    if settings.use_plugin is None and not (settings.dry_run or settings.boilerplate_only):
        _start_forkserver()
    scans, skipped = bids.plan(settings)
    if settings.dry_run:
        sys.stdout.write(pairing_table(scans, skipped, settings.bids_dir))
        return Exit.DONE
    card = _read_card(settings.model)
    read_weights(card)  # before hours of work, not after
    plugin = read_plugin(settings)
    check_device(settings)
    bids.create_dataset(settings, card)
    for item in skipped:
        level = logging.WARNING if item.failed else logging.DEBUG
        LOGGER.log(level, '%s: %s', item.path.name, item.reason)
    for scan in scans:
        for note in scan.notes:
            LOGGER.info('%s: %s', scan.stem, note)
    if not (settings.skip_bids_validation or settings.boilerplate_only):
        _warn_of_validation(settings)
    LOGGER.info('model %s %s, licence of the weights: %s', card.name, card.version, card.licence)

    if settings.resource_monitor and importlib.util.find_spec('psutil') is None:
        LOGGER.warning('--resource-monitor does nothing without psutil: pip install psutil')

    # Nipype is imported here, after what it reads of the environment has been set.
    from bids_jointseg.citation import write_citation
    from bids_jointseg.workflows import participant

    workflow = participant.init_participant_wf(scans=scans, settings=settings, card=card)
    write_citation(settings.output_dir, workflow.__desc__)
    if settings.boilerplate_only:
        return Exit.DONE
    if settings.clean_workdir:
        for folder in settings.work_dir.glob('jointseg-*'):
            shutil.rmtree(folder, ignore_errors=True)
    begun = time.monotonic()
    failures = participant.run(workflow, scans, settings, *plugin)
    finished = finished_subjects(settings, {scan.subject for scan in scans})
    code = max(write_comparisons(settings, finished), write_reports(settings, card, finished))

    rows = [(item.scan, item.stage, item.reason) for item in failures]
    rows += [(item.path.name, 'plan', item.reason) for item in skipped if item.failed]
    if rows:
        sys.stdout.write(_align([('failed', 'at', 'why'), *rows]))
    if failures:
        sys.stdout.write(f'details: {settings.output_dir}/sub-*/log/{settings.run_id}\n')
    incomplete = {scan for scan, stage, _ in rows if stage != 'figures'}
    LOGGER.info(
        '%d of %d scans complete in %.0f s: %s',
        sum(scan.stem not in incomplete for scan in scans),
        len(scans),
        time.monotonic() - begun,
        settings.output_dir,
    )
    if incomplete:
        return Exit.SCANS_FAILED
    return Exit.REPORT_FAILED if rows else code


def finished_subjects(settings: Settings, chosen: Collection[str] = ()) -> list[str]:
    """Return the participants who have complete results, of those that were chosen."""
    labels = chosen or settings.participant_label
    found = {
        path.relative_to(settings.output_dir).parts[0].removeprefix('sub-')
        for path in settings.output_dir.glob('sub-*/**/anat/*_seg-jointseg_morph.json')
    }
    return sorted(label for label in found if not labels or label in labels)


def write_comparisons(settings: Settings, subjects: Sequence[str]) -> Exit:
    """Compare the sessions of some participants, from what is in the output folder."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from bids_jointseg.longitudinal import compare_sessions
    from bids_jointseg.processes import end_with_parent

    out_dir, bids_dir = settings.output_dir, settings.bids_dir
    several = sum(len(list(out_dir.glob(f'sub-{label}/ses-*'))) > 1 for label in subjects)
    processes = min(settings.nprocs, several)
    jobs: dict[str, Callable[[], list[Path]]]
    with ExitStack() as stack:
        if processes > 1:
            pool = stack.enter_context(
                ProcessPoolExecutor(
                    processes, get_context('forkserver'), initializer=end_with_parent
                )
            )
            jobs = {
                label: pool.submit(compare_sessions, out_dir, bids_dir, label).result
                for label in subjects
            }
        else:
            jobs = {
                label: partial(compare_sessions, out_dir, bids_dir, label) for label in subjects
            }
        code = Exit.DONE
        for label, job in jobs.items():
            try:
                paths = job()
            except Exception as error:  # the results of each session are complete all the same
                LOGGER.error('sub-%s: sessions were not compared: %s', label, error)
                LOGGER.debug('', exc_info=True)
                code = Exit.REPORT_FAILED
            else:
                if paths:
                    LOGGER.info('sub-%s: sessions compared', label)
    return code


def write_reports(settings: Settings, card: ModelCard, subjects: Sequence[str]) -> Exit:
    """Write the reports of some participants from what is in the output folder."""
    from bids_jointseg.reports import subject_report

    provenance = {
        'bids_jointseg': __version__,
        'Model': f'{card.name} {card.version}',
        'Weights (SHA-256)': card.sha256,
        'Licence of the weights': card.licence,
        'Input': str(settings.bids_dir),
    }
    code = Exit.DONE
    for subject in subjects:
        try:
            path = subject_report(settings.output_dir, subject, provenance=provenance)
        except Exception as error:  # results are complete; only the page about them is missing
            LOGGER.error('sub-%s: the report failed (%r)', subject, error)
            LOGGER.debug('', exc_info=True)
            code = Exit.REPORT_FAILED
        else:
            LOGGER.info('report %s', path)
    return code


def _group(settings: Settings) -> int:
    from bids_jointseg.workflows.group import gather

    for path in gather(settings.output_dir):
        LOGGER.info('wrote %s', path)
    return Exit.DONE


def read_plugin(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Return the name of Nipype's plugin and its arguments.

    Raises
    ------
    SettingsError
        If the plugin file cannot be read.
    """
    arguments: dict[str, Any] = {
        'n_procs': settings.nprocs,
        'n_gpu_procs': settings.n_gpu_procs,
        'raise_insufficient': False,
        'mp_context': 'forkserver',
    }
    if settings.mem is not None:
        arguments['memory_gb'] = settings.mem
    path = settings.use_plugin
    if path is None:
        return 'MultiProc', arguments
    try:
        text = path.read_text(encoding='utf-8')
        if path.suffix == '.toml':
            record = tomllib.loads(text)
        else:
            import yaml

            record = yaml.safe_load(text)
        name, more = str(record['plugin']), dict(record.get('plugin_args') or {})
    except OSError as error:
        raise SettingsError(f'{path}: cannot be read ({error.strerror})') from error
    except MemoryError:
        raise
    except Exception as error:  # the parsers have exceptions of their own
        raise SettingsError(
            f'{path}: not a plugin file ({" ".join(str(error).split())})'
        ) from error
    from nipype.pipeline import plugins

    if not hasattr(plugins, f'{name}Plugin'):
        raise SettingsError(f'{path}: Nipype has no plugin {name!r}: try MultiProc or Linear')
    for key in ('n_procs', 'n_gpu_procs', 'memory_gb'):
        amount = more.get(key, 1)
        if name == 'MultiProc' and not (type(amount) in (int, float) and amount > 0):
            raise SettingsError(f'{path}: {key} is {amount!r}: give a number above zero')
    return name, arguments | more if name == 'MultiProc' else more


def check_device(settings: Settings) -> None:
    """Refuse a GPU that this machine lacks, where the work is done on this machine.

    Raises
    ------
    SettingsError
        One line that says how many there are.
    """
    if not settings.device.startswith('cuda') or settings.use_plugin is not None:
        return
    import torch

    there = torch.cuda.device_count()  # asks the driver, and does not start CUDA
    if int(settings.device.partition(':')[2] or 0) >= there:
        raise SettingsError(
            f'device is {settings.device!r}: PyTorch sees {there} GPUs here: choose auto or cpu'
        )


def _prepare_environment(settings: Settings) -> None:
    """Set what libraries read when they are imported, here and in worker processes."""
    os.environ['NIPYPE_NO_ET'] = os.environ['NO_ET'] = '1'  # nothing is tracked
    threads = str(min(settings.omp_nthreads, settings.nprocs))
    for library in ('OMP_NUM_THREADS', 'ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS'):
        os.environ.setdefault(library, threads)
    _spare_processors()


def _spare_processors() -> None:
    """Set what makes numbers no different, only faster: docs/performance.md says by how much."""
    # NumPy's products are small here: a second thread would only spin, while others need it.
    os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
    # glibc keeps freed memory, instead of getting each array's anew from the system, page by page.
    os.environ.setdefault('MALLOC_MMAP_MAX_', '0')
    os.environ.setdefault('MALLOC_TRIM_THRESHOLD_', str(2**29))


def _start_forkserver() -> None:
    """Let the process that workers are forked from import what they need, while this one plans."""
    from multiprocessing import forkserver, set_forkserver_preload

    set_forkserver_preload(['__main__', 'bids_jointseg.interfaces', 'bids_jointseg.inference'])
    forkserver.ensure_running()


def _warn_of_validation(settings: Settings) -> None:
    from bids_jointseg.bids import validation_errors

    errors = validation_errors(settings)
    for error in errors[:3]:
        LOGGER.warning('bids-validator: %s', error)
    if len(errors) > 3:
        LOGGER.warning('bids-validator: and %d more; going on all the same', len(errors) - 3)


def train(argv: Sequence[str] | None = None) -> int:
    """Run ``jointseg-train`` and return its exit code."""
    training = _Parser(
        prog='jointseg-train',
        description='Train the joint model from datasets that are each annotated for one task. '
        'The same command goes on where it stopped.',
        epilog='exit codes: 0 done; 1 some scans or folds failed; 2 wrong usage; 70 internal '
        'error.',
    )
    training.add_argument('recipe', help='a TOML file, or the name of a recipe in the package')
    training.add_argument('output_dir', type=_path, help='for models, curves and tables')
    training.add_argument(
        '--data', type=_path, help="folder with the datasets (default: the recipe's)"
    )
    training.add_argument(
        '--smoke',
        action='store_true',
        help="a trial: the recipe's small size, scored on one test scan of each dataset",
    )
    training.add_argument(
        '--fold', type=int, nargs='+', default=(), metavar='N', help='only these (from 0)'
    )
    training.add_argument('-w', '--work-dir', type=_path, help='default: OUTPUT_DIR/work')
    training.add_argument('--device', default='auto', metavar='{auto,cpu,cuda,cuda:N}')
    training.add_argument(
        '--processes', type=int, default=1, metavar='N', help='that share an iteration (GPUs)'
    )
    training.add_argument(
        '--nprocs', type=int, default=available_cpus(), metavar='N', help='processors to use'
    )
    training.add_argument(
        '--omp-nthreads', type=int, metavar='N', help='threads of the network (half of nprocs)'
    )
    training.add_argument(
        '--workers',
        type=int,
        metavar='N',
        help='processes that draw samples, for tissue and for lesions each (a quarter of nprocs)',
    )
    training.add_argument(
        '--hours', type=float, default=float('inf'), help='stop after this time, to go on later'
    )
    training.add_argument('-v', '--verbose', action='count', default=0)
    training.add_argument('--version', action='version', version=f'jointseg {__version__}')
    arguments = training.parse_args(argv)

    def run() -> int:
        from bids_jointseg.workflows.training import Options
        from bids_jointseg.workflows.training import run as train_recipe

        if arguments.verbose:
            LOGGER.setLevel(logging.DEBUG)
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        named = '/' in arguments.recipe or arguments.recipe.endswith('.toml')
        failures = train_recipe(
            Options(
                # Nodes run in folders of their own.
                recipe=str(_path(arguments.recipe)) if named else arguments.recipe,
                out_dir=arguments.output_dir,
                data=arguments.data,
                work_dir=arguments.work_dir,
                smoke=arguments.smoke,
                folds=tuple(arguments.fold),
                device=arguments.device,
                processes=arguments.processes,
                nprocs=arguments.nprocs,
                threads=arguments.omp_nthreads or max(1, arguments.nprocs // 2),
                workers=max(1, arguments.nprocs // 4)
                if arguments.workers is None
                else arguments.workers,
                seconds=arguments.hours * 3600,
                verbose=arguments.verbose,
            )
        )
        if not failures:
            return Exit.DONE
        rows = [(item.scan, item.stage, item.reason) for item in failures]
        sys.stdout.write(_align([('failed', 'at', 'why'), *rows]))
        return Exit.SCANS_FAILED

    os.environ['NIPYPE_NO_ET'] = os.environ['NO_ET'] = '1'  # nothing is tracked
    os.environ.setdefault('ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS', '1')  # as its stages ask for
    _spare_processors()
    return _answer('jointseg-train', run)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Run ``jointseg-evaluate`` and return its exit code."""
    parser = _Parser(
        prog='jointseg-evaluate',
        description='Compare segmentations with a reference: tables, statistics, figures. Reads '
        'BIDS label maps and masks, and what FreeSurfer, SPM12, FSL FAST, GIF and NiftySeg write.',
        epilog='exit codes: 0 all compared; 1 some scans were not (the others are complete, '
        'evaluation.json says why); 2 wrong usage; 65 nothing could be compared; 70 internal '
        'error.',
        allow_abbrev=False,
    )
    parser.add_argument(
        'predicted', metavar='[NAME=]PREDICTED', help='folder of segmentations, with a name for it'
    )
    parser.add_argument('reference', type=_path, metavar='REFERENCE', help='folder of label maps')
    parser.add_argument('output_dir', type=_path, metavar='OUT', help='folder of the results')
    parser.add_argument(
        '--and',
        dest='more',
        action='append',
        default=[],
        metavar='NAME=PATH',
        help='one more model; may be given several times',
    )
    parser.add_argument(
        '--protocol',
        action='append',
        default=[],
        metavar='[NAME=]PROTOCOL',
        help="what a model's labels mean: the name of a protocol, a table (.tsv) of one's own, or "
        'the tool that wrote them (freesurfer, spm, fast, gif, niftyseg); by default what the '
        'folder looks like, and jointseg for BIDS label maps',
    )
    parser.add_argument(
        '--reference-protocol', default='', metavar='PROTOCOL', help='the same of the reference'
    )
    parser.add_argument(
        '--entities',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='which label maps of the models, as in desc=aseg or suffix=mask',
    )
    parser.add_argument(
        '--reference-entities',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='which label maps of the reference, as in desc=manual',
    )
    parser.add_argument(
        '--participant-label',
        nargs='+',
        default=[],
        metavar='LABEL',
        help='only these (sub- is optional)',
    )
    parser.add_argument(
        '--images',
        type=_path,
        metavar='BIDS_DIR',
        help="scans on the references' grids, for the background of the figures",
    )
    parser.add_argument('--dataset', default='', metavar='NAME', help='its name in the tables')
    parser.add_argument('--no-figures', action='store_true', help='only the tables')
    parser.add_argument('--version', action='version', version=f'jointseg {__version__}')
    given = sys.argv[1:] if argv is None else argv
    spelled = [re.sub(r'^--[A-Za-z_-]+', lambda name: name[0].replace('_', '-'), a) for a in given]
    arguments = parser.parse_args(spelled)

    models: dict[str, Path] = {}
    for number, text in enumerate([arguments.predicted, *arguments.more]):
        name, found, folder = text.partition('=')
        if not found or '/' in name or Path(text).exists():
            if number:
                parser.error(f'--and {text}: write NAME=PATH')
            folder = text
            name = _path(text).name
        if name in models:
            parser.error(f'two models are called {name}: write NAME=PATH with another name')
        models[name] = _path(folder)
    protocols: dict[str, str] = {}
    for text in arguments.protocol:
        name, found, protocol = text.rpartition('=')
        if not found:
            protocols |= {model: protocols.get(model, protocol) for model in models}
        elif name in models:
            protocols[name] = protocol
        else:
            parser.error(f'--protocol {text}: no model is called {name}')
    entities: dict[str, dict[str, str]] = {}
    for option in ('entities', 'reference_entities'):
        pairs = [text.partition('=') for text in getattr(arguments, option)]
        if not all(key and value for key, _, value in pairs):
            parser.error(f'--{option.replace("_", "-")}: write KEY=VALUE, as in desc=manual')
        entities[option] = {key: value for key, _, value in pairs}
    if arguments.images is not None and not arguments.images.is_dir():
        parser.error(f'--images {arguments.images}: no such folder')

    def run() -> int:
        from bids_jointseg.evaluation import evaluate as compare

        problems = compare(
            models,
            arguments.reference,
            arguments.output_dir,
            protocols=protocols,
            reference_protocol=arguments.reference_protocol,
            participants=[label.removeprefix('sub-') for label in arguments.participant_label],
            dataset=arguments.dataset,
            images=arguments.images,
            figures=not arguments.no_figures,
            **entities,
        )
        sys.stdout.write((arguments.output_dir / 'table1.md').read_text(encoding='utf-8'))
        return Exit.SCANS_FAILED if problems else Exit.DONE

    return _answer('jointseg-evaluate', run)


if __name__ == '__main__':
    sys.exit(main())
