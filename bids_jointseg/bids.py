"""What is read from a BIDS dataset, and the names and metadata of what is written.

One result per T1w; a FLAIR of the same session goes with it, and a FLAIR that no T1w takes is
processed alone (:func:`pair`). The uniform image of MP2RAGE (`UNIT1`) is the T1w of a session that
has no other. Results form a BIDS derivative dataset. A file appears whole or not at all, so
several processes may write to one dataset.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_jointseg import __version__
from bids_jointseg.config import Settings
from bids_jointseg.files import write_bytes
from bids_jointseg.labels import CLASSES, LABELS
from bids_jointseg.recipe import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from bids_jointseg.card import ModelCard
    from bids_jointseg.config import StandardSpace
    from bids_jointseg.recipe import Source

LOGGER = logging.getLogger('bids_jointseg')

NAME = 'bids_jointseg'
EXTENSIONS = ('.nii', '.nii.gz')
QUERIES = {
    't1w': {'datatype': 'anat', 'suffix': ['T1w', 'UNIT1'], 'extension': list(EXTENSIONS)},
    'flair': {'datatype': 'anat', 'suffix': 'FLAIR', 'extension': list(EXTENSIONS)},
}
# What somebody may have meant to be a scan, and what is one.
_ALIKE = re.compile(
    r'(?is)(?!\.)(?:.*[_-])?(t1w?|unit1|flair)\.(?:nii|nii\.gz|hdr|img|mgz|mgh|nrrd)'
)
# Values of entities become names of files, and are shown in reports: letters and digits only.
_VALUE = r'[^\W_](?:[^\W_]|[.+-])*'
_NAME = re.compile(rf'sub-{_VALUE}_(?:[^\W_]+(?:-{_VALUE})?_)*(?:T1w|UNIT1|FLAIR)\.nii(?:\.gz)?')
UNIFORM = 'its session has a T1w: a filter for t1w with the suffix UNIT1 takes this one instead'
MISNAMED = 'is no scan by its name: call it sub-<label>[...]_T1w.nii.gz or _FLAIR'
# Entities that our own names set, so a scan's own cannot stay in them. Raw scans have none.
OURS = ('space', 'cohort', 'res', 'den', 'seg', 'label', 'desc')
TEMPLATEFLOW = 'https://github.com/templateflow/templateflow'
# What the standard has no name for; a folder is named without a slash.
BIDSIGNORE = '*_morph.*\n*_xfm.*\n*_cohort-*\ngroup_*\n*.html\nlogs\nlog\nfigures\n'
README = """\
# Joint segmentation of brain tissue and white-matter lesions

Made by bids_jointseg. Every scan has its results beside its own name, on its own grid:
`_seg-jointseg_dseg` holds the labels (named in `seg-jointseg_dseg.tsv`), `_label-L_mask` the
lesions, `_seg-jointseg_morph` the volumes, `_desc-lesions_morph` one row per lesion. Start with
`sub-*.html`, and with `group.html` for the cohort. `logs/CITATION.md` describes the method.

These results are for research; they are not a diagnosis.
"""


class BidsError(ValueError):
    """The command does not fit the datasets; one line that names the file and the remedy."""


class DataError(ValueError):
    """A dataset holds nothing that can be processed; one line that says what was looked for."""


@dataclass(frozen=True)
class Scan:
    """One unit of work: a T1w, a FLAIR, or both.

    Attributes
    ----------
    subject, session
        Without ``sub-`` and ``ses-``.
    t1w, flair
        Files; at least one of them. The T1w may be a uniform image.
    stem
        Start of the names of all results: the reference scan's name without its suffix.
    notes
        What a reader should know of how the files were chosen.
    """

    subject: str
    session: str | None
    t1w: Path | None
    flair: Path | None
    stem: str
    notes: tuple[str, ...] = ()

    @property
    def reference(self) -> Path:
        """The scan on whose grid the result is: the T1w if there is one, else the FLAIR."""
        path = self.t1w or self.flair
        if path is None:
            raise ValueError(f'{self.stem}: neither T1w nor FLAIR')
        return path


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is not processed, and why.

    `failed` says that it should have been: the run must not count as complete.
    """

    path: Path
    reason: str
    failed: bool = False


# --- reading ------------------------------------------------------------------------------------


def entities(path: Path) -> dict[str, str]:
    """Return the entities of a BIDS name in their order: 'sub-1_run-2_T1w' -> sub, run."""
    parts = path.name.split('.')[0].split('_')[:-1]
    return dict(part.split('-', 1) for part in parts if '-' in part)


def plan(settings: Settings) -> tuple[list[Scan], list[Skipped]]:
    """Decide which scans go together.

    Returns
    -------
    tuple
        The units of work in the order of their names, and what is left out.

    Raises
    ------
    BidsError
        If a chosen participant or filter does not exist, or two results would share a name.
    DataError
        If there is nothing to process.
    """
    root = settings.bids_dir
    subjects = sorted(path.name[4:] for path in root.glob('sub-*') if path.is_dir())
    if not subjects:
        raise DataError(f'{root}: no folder sub-*: give the root of a BIDS dataset')
    unknown = sorted(set(settings.participant_label) - set(subjects))
    if unknown:
        raise BidsError(f'{root}: no participant {", ".join(unknown)}: check --participant-label')
    # A dictionary keeps their order, and finds one of thousands at once.
    chosen = dict.fromkeys(sorted(settings.participant_label) or subjects)
    filters = read_filters(settings.bids_filter_file)
    layout = _index(settings)
    restricted = bool(settings.session_label or any(filters.values()))

    found: dict[str, dict[str, list[Path]]] = {kind: {} for kind in QUERIES}
    skipped: list[Skipped] = []
    for kind, query in QUERIES.items():
        query = dict(query)
        if settings.session_label:
            query['session'] = list(settings.session_label)
        for path in _query(layout, root, query | filters[kind], kind):
            if path.relative_to(root).parts[0].removeprefix('sub-') not in chosen:
                continue
            part = entities(path).get('part', 'mag')
            misplaced = _misplaced(path.relative_to(root))
            if not _NAME.fullmatch(path.name):
                if restricted:  # otherwise all such names are looked for
                    skipped.append(Skipped(path, MISNAMED, failed=True))
            elif misplaced:
                skipped.append(Skipped(path, misplaced, failed=True))
            elif part != 'mag':
                skipped.append(Skipped(path, f'part-{part} is not a magnitude image'))
            elif kind in settings.ignore:
                skipped.append(Skipped(path, f'--ignore {kind}'))
            else:
                found[kind].setdefault(entities(path)['sub'], []).append(path)

    scans: list[Scan] = []
    for subject in chosen:
        t1ws, flairs = (found[kind].get(subject, []) for kind in QUERIES)
        beside = _beside_a_t1w(t1ws)
        skipped += [Skipped(path, UNIFORM) for path in beside]
        scans += pair([path for path in t1ws if path not in beside], flairs)
        if not (t1ws or flairs):
            where = ' with these sessions and filters' if restricted else ''
            reason = f'no T1w and no FLAIR{where}'
            skipped.append(Skipped(root / f'sub-{subject}', reason, failed=not restricted))
        if not restricted:
            skipped += _misnamed(root / f'sub-{subject}')
    skipped.sort(key=lambda item: item.path)

    if not scans:
        raise DataError(
            f'{root}: no T1w and no FLAIR that could be processed: see jointseg --dry-run'
        )
    _refuse_shared_names(scans)
    return scans, skipped


def _beside_a_t1w(t1ws: Iterable[Path]) -> list[Path]:
    """Return the uniform images whose session has a T1w: one image of a session is enough."""
    uniform = {path: '_UNIT1.' in path.name for path in t1ws}
    sessions = {entities(path).get('ses') for path in t1ws if not uniform[path]}
    return [path for path in t1ws if uniform[path] and entities(path).get('ses') in sessions]


def _misplaced(path: Path) -> str:
    """Return what contradicts a scan's name in where it lies in its dataset, or ''."""
    place = dict(part.split('-', 1) for part in path.parts[:-1] if '-' in part)
    own = entities(path)
    for name in ('sub', 'ses'):
        if name in place and own.get(name) != place[name]:
            return f'lies in {name}-{place[name]}, but its name does not say so: rename or move it'
    return ''


def _misnamed(folder: Path) -> list[Skipped]:
    """Return what looks like a scan of a participant, but is not called or not stored as one.

    Where another one of its modality lies beside it, nothing is missing.
    """
    found = []
    for anat in (folder / 'anat', *sorted(folder.glob('ses-*/anat'))):
        names = sorted(os.listdir(anat)) if anat.is_dir() else []
        alike = {
            name: match[1].lower() == 'flair'
            for name in names
            if (match := _ALIKE.fullmatch(name))
        }
        good = {name for name in alike if _NAME.fullmatch(name) and not (anat / name).is_dir()}
        for name in alike.keys() - good:
            missing = alike[name] not in {alike[other] for other in good}
            reason = 'is a folder: put the image there'
            if not (anat / name).is_dir():
                reason = MISNAMED
            found.append(Skipped(anat / name, reason, failed=missing))
    return found


def pair(
    t1ws: Iterable[Path],
    flairs: Iterable[Path],
    voxel_mm3: Callable[[Path], float] | None = None,
) -> list[Scan]:
    """Give every T1w of one participant the FLAIR of its session that suits it best.

    Best is: no contrast agent before one, then the same ``acq`` and ``run``, then the finest
    voxels; ties are broken by the other entities and then by name, and noted.

    Parameters
    ----------
    t1ws, flairs
        Files of one participant.
    voxel_mm3
        Size of a file's voxels; by default from its header.
    """
    voxel_mm3 = voxel_mm3 or _voxel_mm3
    t1ws = sorted(t1ws, key=lambda path: path.name)
    flairs = sorted(flairs, key=lambda path: path.name)
    scans = []
    taken = set()
    sessions = {entities(t1w).get('ses') for t1w in t1ws}
    of_session: dict[str | None, list[Path]] = {}
    for path in flairs:
        of_session.setdefault(entities(path).get('ses'), []).append(path)
    for t1w in t1ws:
        own = entities(t1w)
        candidates = of_session.get(own.get('ses'), [])
        notes: list[str] = []
        flair = None
        if candidates:
            ranks = {path: _rank(own, path, voxel_mm3, len(candidates)) for path in candidates}
            flair = min(candidates, key=lambda path: (*ranks[path], path.name))
            taken.add(flair)
            if 'ce' in entities(flair) and 'ce' not in own:
                notes.append(f'{flair.name} has a contrast agent, the T1w has none')
            tied = [path.name for path in candidates if ranks[path][:3] == ranks[flair][:3]]
            if len(tied) > 1:
                notes.append(f'{flair.name} taken of {len(tied)} that suit equally well')
        scans.append(Scan(own['sub'], own.get('ses'), t1w, flair, _stem(t1w), tuple(notes)))
    for flair in flairs:
        if flair not in taken:
            own = entities(flair)
            beside = own.get('ses') in sessions
            note = ('another FLAIR suits the T1w of this session better',) if beside else ()
            scans.append(Scan(own['sub'], own.get('ses'), None, flair, _stem(flair), note))
    return sorted(scans, key=lambda scan: scan.stem)


def _rank(
    own: dict[str, str], path: Path, voxel_mm3: Callable[[Path], float], candidates: int
) -> tuple[bool, int, float, int]:
    other = entities(path)
    differ = {name for name in own.keys() | other.keys() if own.get(name) != other.get(name)}
    # The header is opened only where there is a choice.
    size = round(voxel_mm3(path), 3) if candidates > 1 else 0.0
    return 'ce' in other, len(differ & {'acq', 'run'}), size, len(differ)


def _voxel_mm3(path: Path) -> float:
    import nibabel
    import numpy as np

    try:
        header: Any = nibabel.load(path).header
        zooms = header.get_zooms()[:3]
    except Exception:  # an unreadable file is reported by name when its scan is processed
        return float('inf')
    return float(np.prod(zooms))


def _stem(path: Path) -> str:
    return '_'.join(
        f'{name}-{value}' for name, value in entities(path).items() if name not in OURS
    )


def _refuse_shared_names(scans: Iterable[Scan]) -> None:
    seen: dict[str, Path] = {}
    for scan in scans:
        if scan.stem in seen:
            raise BidsError(
                f'{seen[scan.stem]} and {scan.reference.name} would give results of one name '
                f'({scan.stem}): leave one out with --bids-filter-file'
            )
        seen[scan.stem] = scan.reference


def read_filters(path: Path | None) -> dict[str, dict[str, Any]]:
    """Read a filter file in fMRIPrep's format: ``{"t1w": {"session": "1"}, "flair": {...}}``.

    A value of null or ``"Query.NONE"`` asks for files without the entity, ``"*"`` or
    ``"Query.ANY"`` for files with it. Keys of other modalities are let be, so that one file
    serves several pipelines.
    """
    filters: dict[str, dict[str, Any]] = {kind: {} for kind in QUERIES}
    if path is None:
        return filters
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        for kind in QUERIES:
            for name, value in record.get(kind, {}).items():
                values = value if isinstance(value, list) else [value]
                if not all(isinstance(item, str | int | float | None) for item in values):
                    raise ValueError(f'{kind}: {name}: give a word, a number, null or a list')
                values = [_special(item) for item in values]
                filters[kind][name] = values if isinstance(value, list) else values[0]
    except OSError as error:
        raise BidsError(f'{path}: cannot read the filters ({error.strerror})') from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise BidsError(f'{path}: not filters in JSON ({error})') from error
    return filters


def _special(value: object) -> object:
    from bids.layout import Query

    special = {None: Query.NONE, '*': Query.ANY}
    special |= {f'Query.{name}': query for name, query in Query.__members__.items()}
    return special.get(value, value) if isinstance(value, str | None) else value


def _index(settings: Settings) -> Any:
    """Return a pybids layout of the chosen participants, or of all where it is kept on disk."""
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    # An entry is looked at for every file of the dataset: leave out what is never asked for,
    # and what a link that leads back would show again.
    ignore = [
        r'^(?!/sub-[^/]+(/ses-[^/]+)?(/anat(/[^/]+)?)?$)',
        r'/\.',
        r'\.(json|tsv|tsv\.gz)$',
    ]
    chosen = settings.participant_label
    if chosen and settings.bids_database_dir is None:
        ignore.append(rf'^/sub-(?!({"|".join(map(re.escape, chosen))})(/|$))')
    indexer = BIDSLayoutIndexer(
        validate=False, index_metadata=False, ignore=[re.compile(item) for item in ignore]
    )
    try:
        return BIDSLayout(
            settings.bids_dir,
            validate=False,
            database_path=settings.bids_database_dir,
            indexer=indexer,
        )
    except MemoryError:
        raise
    except Exception as error:  # pybids and its database raise many kinds
        raise BidsError(
            f'{settings.bids_dir}: cannot be indexed ({_one_line(error)}): check its '
            'dataset_description.json'
        ) from error


def _query(layout: Any, root: Path, query: dict[str, Any], kind: str) -> list[Path]:
    try:
        found = [Path(path) for path in layout.get(return_type='filename', **query)]
    except (ValueError, TypeError) as error:
        raise BidsError(f'--bids-filter-file: {kind}: {_one_line(error)}') from error
    foreign = [path for path in found if not path.is_relative_to(root)]
    if foreign:
        raise BidsError(
            f'--bids-database-dir holds another dataset ({foreign[0]}): give an empty folder'
        )
    return found


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())


# --- training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotated:
    """A scan of a training dataset and its label map; one of them may be missing.

    Attributes
    ----------
    subject
        Without ``sub-``.
    name
        Unique in its dataset: 'sub-01_ses-1'.
    scan
        The files that are read; None where the images are painted from the label map.
    annotation
        None where there are no labels.
    """

    subject: str
    name: str
    scan: Scan | None
    annotation: Path | None


def annotated_scans(source: Source, root: Path) -> list[Annotated]:
    """Find what a recipe says of a dataset.

    The scans are planned as the participant workflow does. A label map goes with the scan of its
    subject and session, unless another entity of it (``acq``, ``run`` ...) contradicts the scan's.

    Parameters
    ----------
    source
        One dataset of a recipe.
    root
        The folder of this dataset.

    Returns
    -------
    list[Annotated]
        In the order of their names. A scan that lacks the label map which the source promises is
        left out with a warning.

    Raises
    ------
    RecipeError
        If nothing is found, or two label maps suit one scan.
    """
    if not root.is_dir():
        raise RecipeError(f'{root}: no such folder: the dataset {source.name!r} is expected there')
    label_maps = _label_maps(source, root)
    if not source.modalities:
        found = [Annotated(entities(path)['sub'], _stem(path), None, path) for path in label_maps]
        for first, second in pairwise(sorted(found, key=lambda item: item.name)):
            if first.name == second.name:
                raise _ambiguous(source, first.name, [first.annotation, second.annotation])
        return sorted(found, key=lambda item: item.name)
    found = []
    missing: list[str] = []
    owners: dict[Path, str] = {}
    for scan in _training_scans(source, root):
        suiting = [path for path in label_maps if _suits(path, scan)]
        if len(suiting) > 1:
            raise _ambiguous(source, scan.stem, suiting)
        if source.annotation and not suiting:
            missing.append(scan.stem)
        elif suiting and suiting[0] in owners:
            LOGGER.warning(
                '%s: %s left out: %s is taken for the labels of %s; if it is of both, give them '
                'a copy each, with the entities of the scan',
                source.name, scan.stem, suiting[0].name, owners[suiting[0]],
            )  # fmt: skip
        else:
            owners |= dict.fromkeys(suiting, scan.stem)
            found.append(Annotated(scan.subject, scan.stem, scan, next(iter(suiting), None)))
    if not found:
        raise RecipeError(
            f'{root / source.annotation}: no label map goes with a scan of {root}, as '
            f'{missing[0]}: see to it that their names begin as those of the scans'
        )
    if missing:
        LOGGER.warning(
            '%s: left out, without a label map: %s', source.name, ', '.join(sorted(missing))
        )
    return sorted(found, key=lambda item: item.name)


def _training_scans(source: Source, root: Path) -> list[Scan]:
    """Plan the scans of a dataset, those with most of its modalities first."""
    ignore = () if 'FLAIR' in source.modalities else ('flair',)
    try:
        scans, _ = plan(Settings(root, root, ignore=ignore))
    except (BidsError, DataError) as error:
        raise RecipeError(f'the dataset {source.name!r}: {error}') from error
    if 'T1w' not in source.modalities:
        flairs = {scan.flair: scan for scan in scans if scan.flair is not None}
        scans = [
            replace(scan, t1w=None, stem=_stem(path), notes=()) for path, scan in flairs.items()
        ]
    wanted = {key: value for key, value in source.entities.items() if key not in OURS}
    scans = [
        scan
        for scan in scans
        if all(entities(scan.reference).get(key, value) == value for key, value in wanted.items())
    ]
    if not scans:
        modalities = ' and no '.join(source.modalities)
        raise RecipeError(f'{root}: no {modalities}: the dataset {source.name!r} promises them')
    return sorted(scans, key=lambda scan: (scan.t1w is None or scan.flair is None, scan.stem))


def _label_maps(source: Source, root: Path) -> list[Path]:
    """Find the label maps of a dataset; those in a template's space only where asked for."""
    if not source.annotation:
        return []
    folder = root / source.annotation
    own = ('T1w', 'FLAIR', 'orig', 'native', None)
    found = [
        path
        for extension in EXTENSIONS
        for path in folder.glob(f'sub-*/**/*_{source.suffix}{extension}')
        if not path.name.startswith('.')
        and all(entities(path).get(key, '') == value for key, value in source.entities.items())
        and (
            not source.modalities
            or 'space' in source.entities
            or entities(path).get('space') in own
        )
    ]
    if not found:
        extra = ''.join(f'_{key}-{value}' for key, value in source.entities.items() if value)
        raise RecipeError(
            f'{folder}: no label map sub-*{extra}_{source.suffix}.nii.gz: put those of the '
            f'dataset {source.name!r} there, or correct its annotation in the recipe'
        )
    return sorted(found)


def _suits(label_map: Path, scan: Scan) -> bool:
    """Tell whether nothing in the name of a label map contradicts that of a scan."""
    files = [entities(path) for path in (scan.t1w, scan.flair) if path is not None]
    named = entities(label_map)
    return (named['sub'], named.get('ses')) == (scan.subject, scan.session) and all(
        any(file.get(key) == value for file in files)
        for key, value in named.items()
        if key not in ('sub', 'ses', *OURS)
    )


def _ambiguous(source: Source, name: str, paths: Iterable[Path | None]) -> RecipeError:
    both = ' and '.join(str(path) for path in paths)
    return RecipeError(
        f'{both} could both be the labels of {name}: tell them apart by `entities` of the dataset '
        f'{source.name!r} in the recipe'
    )


def validator(*arguments: str | Path) -> dict[str, Any] | None:
    """Run bids-validator-deno and return its report, or None where it is not installed."""
    beside = Path(sys.executable).with_name('bids-validator-deno')
    program = shutil.which('bids-validator-deno') or (str(beside) if beside.exists() else None)
    if program is None:
        return None
    command = [program, *map(str, arguments), '--format', 'json']
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        report = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return report if isinstance(report, dict) else None


def validation_errors(settings: Settings) -> list[str]:
    """Return the validator's errors about the dataset and its chosen participants, one line each.

    They are a warning: a dataset is seldom perfect, and what we need of it (names and readable
    images) is checked scan by scan.
    """
    root = settings.bids_dir
    report = validator(root, '--prune', '--ignoreNiftiHeaders', '--ignoreWarnings')
    if report is None:
        missing = not (root / 'dataset_description.json').is_file()
        return ['/dataset_description.json: MISSING_DATASET_DESCRIPTION'] if missing else []
    errors = []
    for issue in report['issues']['issues']:
        where = issue.get('location') or ', '.join(issue.get('affects') or ['?'])
        subject = re.match(r'/sub-([^/]+)', where)
        chosen = settings.participant_label
        if issue['severity'] == 'error' and not (subject and chosen and subject[1] not in chosen):
            errors.append(f'{where}: {issue["code"]}')
    return sorted(set(errors))


# --- writing ------------------------------------------------------------------------------------


def remove_unfinished(out_dir: Path, subjects: Iterable[str]) -> None:
    """Remove what a killed run had begun to write of these participants, whom no other run has.

    Of the files of the whole dataset, other runs may be writing some now.
    """
    for subject in subjects:
        for pattern in (f'.sub-{subject}.html.*.tmp', f'sub-{subject}/**/.*.tmp*'):
            for path in out_dir.glob(pattern):
                path.unlink(missing_ok=True)
    for path in (*out_dir.glob('.*.tmp'), *out_dir.glob('logs/.*.tmp')):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - 3600:
                path.unlink()


def write_text(path: Path, text: str) -> Path:
    """Write a text so that it appears whole or not at all."""
    return write_bytes(path, text.encode())


def write_json(path: Path, record: dict[str, Any]) -> Path:
    """Write a JSON object so that it appears whole or not at all."""
    return write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + '\n')


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows, tab-separated or, where the name ends on .csv, comma-separated."""
    buffer = io.StringIO()
    delimiter = ',' if path.suffix == '.csv' else '\t'
    writer = csv.DictWriter(buffer, columns, delimiter=delimiter, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return write_text(path, buffer.getvalue())


def derivative(out_dir: Path, scan: Scan, suffix: str) -> Path:
    """Return where a result of a scan goes: 'label-L_mask.nii.gz' -> .../<stem>_label-L_mask..."""
    folder = out_dir / f'sub-{scan.subject}'
    if scan.session is not None:
        folder = folder / f'ses-{scan.session}'
    return folder / 'anat' / f'{scan.stem}_{suffix}'


def expected(scan: Scan, level: str, spaces: Iterable[StandardSpace] = ()) -> tuple[str, ...]:
    """Return the suffixes of all results of a scan, in the order of writing."""
    native = _expected_natively(scan, level)
    return (*native, *(name for space in spaces for name in expected_in(space, scan, level)))


def _expected_natively(scan: Scan, level: str) -> tuple[str, ...]:
    paired = scan.t1w is not None and scan.flair is not None
    reference = 'T1w' if scan.t1w else 'FLAIR'
    images = ['seg-jointseg_dseg', 'label-L_mask']
    if paired:
        images += ['space-FLAIR_seg-jointseg_dseg', 'space-FLAIR_label-L_mask']
    transforms: list[str] = []
    if level == 'full':
        images += ['desc-brain_mask', 'seg-jointseg_desc-entropy_probseg']
        images += [f'seg-jointseg_label-{name}_probseg' for name in CLASSES[1:]]
        images += [f'desc-preproc_{reference}']
        if scan.t1w is not None:
            images += ['desc-lesionfilled_T1w']
        if paired:
            images += ['space-T1w_desc-preproc_FLAIR']
            transforms += [
                'from-FLAIR_to-T1w_mode-image_xfm.txt',
                'from-T1w_to-FLAIR_mode-image_xfm.txt',
            ]
    tables = ('desc-lesions_morph', 'seg-jointseg_morph')
    return (
        *(name + extension for name in images for extension in ('.nii.gz', '.json')),
        *transforms,
        *(name + extension for name in tables for extension in ('.tsv', '.csv', '.json')),
    )


def in_space(space: StandardSpace, name: str) -> str:
    """Return the suffix of a result in standard space, its entities in the standard's order.

    'seg-jointseg_dseg' -> 'space-MNI152NLin2009cAsym_seg-jointseg_res-2_dseg'.
    """
    cohort = '' if space.cohort is None else f'_cohort-{space.cohort}'
    resolution = '' if space.resolution is None else f'res-{space.resolution}_'
    seg, rest = re.fullmatch(r'(seg-[^_]+_)?(.*)', name).groups()  # type: ignore[union-attr]
    return f'space-{space.name}{cohort}_{seg or ""}{resolution}{rest}'


def transform_to(space: StandardSpace, scan: Scan) -> str:
    """Return the suffix of the transform to a template, without extension."""
    reference = 'T1w' if scan.t1w else 'FLAIR'
    cohort = '' if space.cohort is None else f'+{space.cohort}'
    return f'from-{reference}_to-{space.name}{cohort}_mode-image_xfm'


def expected_in(space: StandardSpace, scan: Scan, level: str) -> tuple[str, ...]:
    """Return the suffixes of all results of a scan in one standard space, as they are written."""
    names = ['label-L_mask']
    if level == 'full':
        names += ['desc-brain_mask', f'desc-preproc_{"T1w" if scan.t1w else "FLAIR"}']
        names += [f'seg-jointseg_label-{name}_probseg' for name in CLASSES[1:]]
    transform = transform_to(space, scan)
    return (
        f'{transform}.txt',
        f'{transform}.json',
        *(
            in_space(space, name) + extension
            for name in (*names, 'seg-jointseg_dseg')  # whose sidecar says that all are there
            for extension in ('.nii.gz', '.json')
        ),
    )


DESCRIPTIONS = {
    'desc-brain_mask': 'Brain: the six tissues and the lesions together',
    'label-L_mask': 'White-matter lesions',
    'seg-jointseg_dseg': 'Most probable class of each voxel; values are in seg-jointseg_dseg.tsv',
    'seg-jointseg_desc-entropy_probseg': (
        'Uncertainty: entropy of the class probabilities, -sum(p log p) / log(8); '
        '0 is certain, 1 is all eight classes alike'
    ),
    'desc-preproc_T1w': 'T1w as it was segmented, on its own grid, original intensities',
    'desc-preproc_FLAIR': 'FLAIR as it was segmented, original intensities',
    'desc-lesionfilled_T1w': (
        'T1w whose lesions have the intensities of the white matter around them'
    ),
} | {
    f'seg-jointseg_label-{label.abbreviation}_probseg': f'Probability of: {label.name}'
    for label in LABELS[1:]
}


def sidecar(scan: Scan, suffix: str, bids_dir: Path) -> dict[str, Any]:
    """Return the metadata of an image: what it was made from, and what the standard asks for."""
    space, name = re.fullmatch(r'(?:space-(T1w|FLAIR)_)?(.*?)(?:\..*)?', suffix).groups()  # type: ignore[union-attr]
    target = {'T1w': scan.t1w, 'FLAIR': scan.flair}.get(space) or scan.reference
    sources = [path for path in (scan.t1w, scan.flair) if path is not None]
    record: dict[str, Any] = {
        'Description': DESCRIPTIONS[name],
        'Sources': [raw_uri(path, bids_dir) for path in sources],
        'SpatialReference': raw_uri(target, bids_dir),
    }
    if name.endswith('_mask'):
        record['Type'] = 'Brain' if name.startswith('desc-brain') else 'Lesion'
    return record


def sidecar_in(
    space: StandardSpace, scan: Scan, name: str, bids_dir: Path, *, template: str, grid: str
) -> dict[str, Any]:
    """Return the metadata of an image in standard space.

    Parameters
    ----------
    space, scan, name
        Which image: 'label-L_mask', without extension.
    bids_dir
        The input dataset.
    template
        URI of the template.
    grid
        What its voxels are, in words.
    """
    record = sidecar(scan, name, bids_dir)
    own = derivative(Path(), scan, f'{transform_to(space, scan)}.txt')
    record['Description'] = record['Description'].split(', on its own grid')[0] + ', in the space '
    record['Description'] += f'of the template {space.name}'
    record['Sources'] += [f'bids::{own.as_posix()}', template]
    record['SpatialReference'] = template
    if space.resolution is not None:
        record['Resolution'] = grid
    return record


VOLUME_COLUMNS = {
    'index': {'Description': 'Value of the class in the segmentation'},
    'name': {'Description': 'Abbreviation of the class, as in seg-jointseg_dseg.tsv'},
    'volume_mm3': {'Description': 'Volume of the voxels with this label', 'Units': 'mm^3'},
    'low_mm3': {
        'Description': 'Lower end of the interval in which 95 % of repeated scans would lie',
        'Units': 'mm^3',
    },
    'high_mm3': {'Description': 'Upper end of that interval', 'Units': 'mm^3'},
    'percent_of_brain': {
        'Description': 'Volume relative to that of all classes together',
        'Units': '%',
    },
}
LESION_COLUMNS = {
    'lesion': {'Description': 'Number of the lesion, the largest first'},
    'volume_mm3': {'Description': 'Volume', 'Units': 'mm^3'},
    'diameter_mm': {'Description': 'Longest diameter', 'Units': 'mm'},
    'zone': {
        'Description': 'Where it lies, by the labels around it',
        'Levels': {
            'periventricular': 'at most 3 mm from a ventricle',
            'juxtacortical': 'touches the cortex, and no ventricle',
            'infratentorial': 'most of what it touches is brainstem or cerebellum',
            'deep': 'none of these',
        },
    },
    'probability': {'Description': 'Mean over its voxels of the probability of lesion'},
    'agreement': {
        'Description': 'Mean over its voxels of the share of the members of the ensemble that '
        'call them lesion'
    },
    'x_mm': {'Description': 'Centroid, towards the right of the patient', 'Units': 'mm'},
    'y_mm': {'Description': 'Centroid, towards the front', 'Units': 'mm'},
    'z_mm': {'Description': 'Centroid, upwards', 'Units': 'mm'},
    'voxels': {'Description': 'Number of voxels, joined where they touch at least at a corner'},
}


def write_tables(
    out_dir: Path,
    scan: Scan,
    bids_dir: Path,
    *,
    volumes: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float] | None],
    lesions: Sequence[Mapping[str, Any]],
    flags: Sequence[str],
    quality: Mapping[str, Any],
    configuration: Mapping[str, Any],
) -> None:
    """Write the tables of one scan; the summary comes last, so it says that all is there.

    Parameters
    ----------
    volumes
        Abbreviation -> mm^3.
    intervals
        Abbreviation or `brain` -> low and high end in mm^3, or None where nothing is known.
    lesions
        Rows of :func:`.lesions.measure_lesions`.
    flags
        What a reader should look at.
    quality
        Verdict, reasons and measures of :mod:`.quality`.
    configuration
        What decided the result beside the scans.
    """
    # SciPy, which --help can do without:
    from bids_jointseg.lesions import count_long, zone_volumes

    sources = [raw_uri(path, bids_dir) for path in (scan.t1w, scan.flair) if path is not None]
    table = derivative(out_dir, scan, 'desc-lesions_morph.json')
    rows = [
        {
            key: 'n/a' if value is None else round(value, 3) if isinstance(value, float) else value
            for key, value in row.items()
        }
        for row in lesions
    ]
    for suffix in ('.tsv', '.csv'):
        write_table(table.with_suffix(suffix), tuple(LESION_COLUMNS), rows)
    write_json(table, {'Sources': sources, 'columns': LESION_COLUMNS})

    brain = sum(volumes.values())
    held = quality.get('measures', {}).get('intracranial_ml')
    table = derivative(out_dir, scan, 'seg-jointseg_morph.json')
    classes = [
        {
            'index': label.index,
            'name': label.abbreviation,
            'volume_mm3': round(volumes[label.abbreviation], 2),
            **_ends(intervals[label.abbreviation]),
            'percent_of_brain': round(100 * volumes[label.abbreviation] / brain, 4)
            if brain
            else 0.0,
        }
        for label in LABELS[1:]
    ]
    for suffix in ('.tsv', '.csv'):
        write_table(table.with_suffix(suffix), tuple(VOLUME_COLUMNS), classes)
    record = {
        'Sources': sources,
        'brain_volume_mm3': round(brain, 2),
        **{f'brain_{name}': value for name, value in _ends(intervals['brain']).items()},
        'intracranial_volume_mm3': 'n/a' if held is None else round(1000 * held, 2),
        'parenchyma_percent': 'n/a'
        if held is None
        else round((brain - volumes['VEN']) / (10 * held), 4),
        'lesion_count': len(lesions),
        'lesion_count_3mm': count_long(lesions),
        'lesion_zones': zone_volumes(lesions),
        'quality': dict(quality),
        'flags': list(flags),
        'configuration': dict(configuration),
        'columns': VOLUME_COLUMNS,
    }
    write_json(table, record)


def _ends(interval: tuple[float, float] | None) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {
        name: 'n/a' if value is None else round(value, 2)
        for name, value in (('low_mm3', low), ('high_mm3', high))
    }


def is_complete_in(
    space: StandardSpace,
    out_dir: Path,
    scan: Scan,
    level: str,
    configuration: Mapping[str, Any],
) -> bool:
    """Tell whether all results in a standard space are there and by this configuration."""
    names = expected_in(space, scan, level)
    return _are_there(out_dir, scan, names, names[-1], configuration)


def is_complete(
    out_dir: Path,
    scan: Scan,
    level: str,
    configuration: Mapping[str, Any],
    spaces: Iterable[StandardSpace] = (),
) -> bool:
    """Tell whether all results of a scan are there and were made by this configuration."""
    names = _expected_natively(scan, level)
    summary = 'seg-jointseg_morph.json'
    return _are_there(out_dir, scan, names, summary, configuration) and all(
        is_complete_in(space, out_dir, scan, level, configuration) for space in spaces
    )


def _are_there(
    out_dir: Path, scan: Scan, names: Iterable[str], last: str, configuration: Mapping[str, Any]
) -> bool:
    if not all(derivative(out_dir, scan, suffix).exists() for suffix in names):
        return False
    try:
        record = json.loads(derivative(out_dir, scan, last).read_text(encoding='utf-8'))
        return bool(record.get('configuration') == dict(configuration))
    except (OSError, ValueError, AttributeError):
        return False


def raw_uri(path: Path, bids_dir: Path) -> str:
    """Return the BIDS URI of a file of the input dataset."""
    return f'bids:raw:{path.relative_to(bids_dir).as_posix()}'


def raw_path(uri: str, bids_dir: Path) -> Path:
    """Return the file of the input dataset that a BIDS URI names.

    Raises
    ------
    ValueError
        If it names none, or leads out of the dataset.
    """
    place = Path(uri.removeprefix('bids:raw:'))
    if not uri.startswith('bids:raw:') or place.is_absolute() or '..' in place.parts:
        raise ValueError(f'{uri}: not a file of the input dataset')
    return bids_dir / place


def create_dataset(settings: Settings, card: ModelCard) -> None:
    """Write what describes the output dataset as a whole.

    Raises
    ------
    BidsError
        If the folder holds the results of another pipeline.
    """
    out_dir = settings.output_dir
    target = out_dir / 'dataset_description.json'
    record = _description(settings, card)
    if target.exists():
        try:
            before = json.loads(target.read_text(encoding='utf-8'))
            known = before.get('GeneratedBy', [])
            if 'templateflow' in before.get('DatasetLinks', {}):  # its results still point there
                record['DatasetLinks']['templateflow'] = TEMPLATEFLOW
            names = [entry.get('Name') for entry in known]
        except (ValueError, AttributeError, TypeError):
            known, names = [], []
        if names and NAME not in names:
            raise BidsError(f'{out_dir} holds the results of {names[0]}: give another folder')
        if names and known != record['GeneratedBy']:
            LOGGER.warning(
                '%s holds results of another version or model; dataset_description.json now names '
                'the present one',
                out_dir,
            )
    write_json(target, record)
    write_text(out_dir / '.bidsignore', BIDSIGNORE)
    write_text(out_dir / 'README.md', README)
    write_table(
        out_dir / 'seg-jointseg_dseg.tsv',
        ('index', 'name', 'abbreviation', 'color', 'mapping'),
        (vars(label) for label in LABELS),
    )


def _description(settings: Settings, card: ModelCard) -> dict[str, Any]:
    bids_dir, out_dir = settings.bids_dir, settings.output_dir
    if out_dir.parent == bids_dir / 'derivatives':
        raw = '../..'
    else:
        raw = bids_dir.as_uri()
    app: dict[str, Any] = {'Name': NAME, 'Version': __version__}
    container = _container()
    if container:
        app['Container'] = container
    weights = {
        'Name': f'{card.name} (network weights)',
        'Version': card.version,
        'Description': f'SHA-256 {card.sha256}; licence: {card.licence}',
    }
    source: dict[str, str] = {'URL': raw}
    try:
        original = json.loads((bids_dir / 'dataset_description.json').read_text(encoding='utf-8'))
        if original.get('DatasetDOI'):
            source['DOI'] = original['DatasetDOI']
    except (OSError, ValueError, AttributeError):
        original = {}
    return {
        'Name': 'Joint segmentation of brain tissue and white-matter lesions',
        'BIDSVersion': '1.10.0',
        'DatasetType': 'derivative',
        'GeneratedBy': [app, weights],
        'SourceDatasets': [source],
        'DatasetLinks': {'raw': raw}
        | {name: path.as_uri() for name, path in settings.derivatives.items()}
        | ({'templateflow': TEMPLATEFLOW} if settings.standard_spaces else {}),
    }


def _container() -> dict[str, str] | None:
    """Return what the image says of itself, as the Dockerfile and Apptainer set it."""
    tag = os.environ.get('JOINTSEG_CONTAINER')
    image = os.environ.get('APPTAINER_CONTAINER') or os.environ.get('SINGULARITY_CONTAINER')
    if image:
        return {'Type': 'apptainer', 'Tag': tag or Path(image).name}
    return {'Type': 'docker', 'Tag': tag} if tag else None
