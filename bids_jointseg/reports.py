"""Reports: pages that bind figures and tables.

:func:`subject_report` makes the page of one person, :func:`group_tables` and :func:`group_report`
do the same for a cohort. A page is one file: it needs no network and no script, it prints, and the
same results give the same bytes.
"""

from __future__ import annotations

import base64
import csv
import json
import logging
import math
import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from bids_jointseg import __version__, citation
from bids_jointseg.bids import (
    LESION_COLUMNS,
    DataError,
    entities,
    write_json,
    write_table,
    write_text,
)
from bids_jointseg.figures import CHANGES, CLASSES, axis_scale, round_ticks
from bids_jointseg.lesions import ZONES
from bids_jointseg.quality import RULES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

LOGGER = logging.getLogger('bids_jointseg')

# ------------------------------------------------------------------------------------- subject

# What one figure group shows: title, views (name, file, caption), the view shown first.
_WHERE = 'Slices in three planes; positions are scanner coordinates.'
_LINES = 'The light blue lines are those of the T1w in all three pictures: they should fit.'
GROUPS: tuple[tuple[str, int, tuple[tuple[str, tuple[str, str], str], ...]], ...] = (
    (
        'T1w',
        1,
        (
            ('Scan', ('scan', 'T1w'), f'The T1w. {_WHERE}'),
            ('Outlines', ('contours', 'T1w'), 'Outlines of tissues and lesions on the T1w.'),
            ('Labels', ('labels', 'T1w'), 'Tissues and lesions, filled, on the T1w.'),
        ),
    ),
    (
        'FLAIR',
        1,
        (
            ('Scan', ('scan', 'FLAIR'), f'The FLAIR. {_WHERE}'),
            (
                'Lesions',
                ('lesions', 'FLAIR'),
                'Outlines of the lesions on the FLAIR, in the slices with the most lesion.',
            ),
            ('Labels', ('labels', 'FLAIR'), 'Tissues and lesions, filled, on the FLAIR.'),
        ),
    ),
    (
        'Largest lesions',
        0,
        (
            (
                'On the T1w',
                ('closeup', 'T1w'),
                'The largest lesions in the T1w slices where they are largest: bare and outlined.',
            ),
            (
                'On the FLAIR',
                ('closeup', 'FLAIR'),
                'The largest lesions in the FLAIR slices where they are largest: bare and '
                'outlined.',
            ),
        ),
    ),
    (
        'Registration of FLAIR and T1w',
        2,
        (
            ('T1w', ('registrationfixed', 'T1w'), f'The T1w. {_LINES}'),
            (
                'FLAIR before',
                ('registrationbefore', 'FLAIR'),
                f'The FLAIR where its header puts it. {_LINES}',
            ),
            ('FLAIR after', ('registrationafter', 'FLAIR'), f'The FLAIR, registered. {_LINES}'),
        ),
    ),
    (
        'Uncertainty',
        0,
        (
            (
                'Entropy',
                ('entropy', 'probseg'),
                'Entropy of the class probabilities, as a share of its maximum: 0 where the model '
                'is sure, 1/3 where two classes are even. Thin bright lines between tissues are '
                'normal, broad patches are not.',
            ),
        ),
    ),
)
# Entities that name a result, not the scan that it is made from.
_OURS = ('space', 'cohort', 'res', 'den', 'seg', 'label', 'desc', 'from', 'to', 'mode')


def subject_report(out_dir: Path, subject: str, *, provenance: Mapping[str, Any]) -> Path:
    """Write the page of one participant from its figures and tables.

    Parameters
    ----------
    out_dir
        The derivative dataset.
    subject
        Label without ``sub-``.
    provenance
        What the reader needs to get the same numbers again, in the order to be shown: values
        are text, numbers, sequences of these, or further mappings. For example ``{'Software':
        'bids_jointseg 0.1.0', 'Weights': {'Name': ..., 'SHA-256': ..., 'Licence': ...},
        'Command': 'jointseg ...'}``.

    Returns
    -------
    Path
        ``<out_dir>/sub-<subject>.html``. Its bytes depend on nothing but the arguments and the
        files that are read.
    """
    page = _render(
        'report.html.j2',
        subject=subject,
        classes=CLASSES,
        scans=[_scan(out_dir, table) for table in _tables(out_dir, f'sub-{subject}')],
        changes=[change for _, change in _changes(out_dir, f'sub-{subject}')],
        kinds=CHANGES,
        names={'brain': 'Brain'} | {label.abbreviation: label.name for label in CLASSES},
        provenance=provenance,
        notice=citation.NOTICE,
        methods=_methods(out_dir / 'logs' / 'CITATION.md'),
    )
    return write_text(out_dir / f'sub-{subject}.html', page)


def _methods(path: Path) -> Markup:
    """Return the description of the method as HTML, empty where it has not been written."""
    if not path.is_file():
        return Markup()
    prose = path.read_text(encoding='utf-8').removeprefix(citation.NOTICE).strip()
    return Markup(citation.to_html(prose, heading='h3'))  # noqa: S704 - it escapes the prose


def _tables(out_dir: Path, subject: str = 'sub-*') -> list[Path]:
    """Return the table of volumes of every scan, by name."""
    found = [
        path
        for pattern in ('anat', 'ses-*/anat')
        for path in out_dir.glob(f'{subject}/{pattern}/*_seg-jointseg_morph.tsv')
    ]
    return sorted(found, key=lambda path: path.name)


def _scan(out_dir: Path, table: Path) -> dict[str, Any]:
    """Gather what the page says of one scan."""
    stem = table.name.removesuffix('_seg-jointseg_morph.tsv')
    own = _own(table)
    others = ', '.join(f'{key}-{value}' for key, value in own.items() if key != 'sub')
    figures = out_dir / f'sub-{own["sub"]}' / 'figures'
    groups = []
    for title, first, candidates in GROUPS:
        views = []
        for name, (what, suffix), caption in candidates:
            path = figures / f'{stem}_desc-{what}_{suffix}.png'
            if path.is_file():
                image = _image(path, f'{stem}, {title}: {name}')
                views.append({'name': name, 'caption': caption, 'image': image})
        if views:
            groups.append({'title': title, 'first': min(first, len(views) - 1), 'views': views})
    groups += _standard_groups(figures, stem)
    lesions = table.with_name(f'{stem}_desc-lesions_morph.tsv')
    files = [path for path in sorted(table.parent.iterdir()) if _own(path) == own]
    return {
        'stem': stem,
        'title': others or f'sub-{own["sub"]}',
        **_volumes(table),
        'groups': groups,
        'lesions': list(_read(lesions)) if lesions.is_file() else [],
        'files': [
            {'name': path.name, 'href': path.relative_to(out_dir).as_posix()}
            for path in files
            if not path.name.startswith('.')
        ],
    }


def _standard_groups(figures: Path, stem: str) -> list[dict[str, Any]]:
    """Return the figures of a scan in standard spaces: the template, then the scan."""
    groups = []
    lines = 'The outlines are those of the scan in both pictures: they should fit the template.'
    for first in sorted(figures.glob(f'{stem}_space-*_desc-template_T1w.png')):
        space = re.sub(r'_res-0*', ', resolution ', first.name.split('_space-')[1])
        title = 'Standard space ' + space.split('_desc-')[0].replace('_cohort-', ', cohort ')
        views = []
        for name, what in (('Template', 'template'), ('Scan', 'standard')):
            path = first.with_name(first.name.replace('_desc-template_', f'_desc-{what}_'))
            if path.is_file():
                image = _image(path, f'{stem}, {title}: {name}')
                views.append({'name': name, 'caption': lines, 'image': image})
        groups.append({'title': title, 'first': 0, 'views': views})
    return groups


def _changes(out_dir: Path, subject: str = 'sub-*') -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every comparison of two sessions, with the table that it is from, by name."""
    tables = out_dir.glob(f'{subject}/ses-*/anat/*_desc-longitudinal_morph.tsv')
    for table in sorted(tables, key=lambda path: path.name):
        stem = table.name.removesuffix('_desc-longitudinal_morph.tsv')
        try:
            record = json.loads(table.with_suffix('.json').read_text(encoding='utf-8'))
            volumes = list(_read(table))
            lesions = list(_read(table.with_name(f'{stem}_desc-lesionchange_morph.tsv')))
            comparisons = list(record['comparisons'])
        except (OSError, ValueError, KeyError, TypeError) as error:
            LOGGER.warning('%s: left out, it cannot be read (%s)', table, error)
            continue
        own = _own(table)
        for comparison in comparisons:
            since = comparison['since']
            figure = out_dir / f'sub-{own["sub"]}' / 'figures' / comparison['figure']
            words = f'{stem} since {since}'
            yield (
                table,
                {
                    'stem': stem,
                    'since': since,
                    'session': f'ses-{own["ses"]}',
                    'title': ', '.join(
                        [f'{since} to ses-{own["ses"]}']
                        + [f'{k}-{v}' for k, v in own.items() if k not in ('sub', 'ses')]
                    ),
                    'notes': comparison['notes'],
                    'counts': comparison['lesions'],
                    'volumes': [row for row in volumes if row['since'] == since],
                    'lesions': [row for row in lesions if row['since'] == since],
                    'figure': _image(figure, words) if figure.is_file() else None,
                },
            )


def _own(path: Path) -> dict[str, str]:
    """Return the entities of the scan from which a result was made."""
    return {key: value for key, value in entities(path).items() if key not in _OURS}


def _read(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding='utf-8', newline='') as stream:
        yield from csv.DictReader(stream, delimiter='\t')


def _volumes(table: Path) -> dict[str, Any]:
    """Return what the tables say of one scan; what they do not say is 'n/a'."""
    volumes = {row['name']: row for row in _read(table)}
    for label in CLASSES:
        blank = dict.fromkeys(('volume_mm3', 'low_mm3', 'high_mm3', 'percent_of_brain'), 'n/a')
        volumes[label.abbreviation] = blank | volumes.get(label.abbreviation, {})
    sidecar = table.with_suffix('.json')
    record = json.loads(sidecar.read_text(encoding='utf-8')) if sidecar.is_file() else {}
    stem = table.name.removesuffix('_seg-jointseg_morph.tsv')
    flags = list(record.get('flags', []))
    for path in sorted(table.parent.glob(f'{stem}_from-*_to-*_mode-image_xfm.json')):
        flags += json.loads(path.read_text(encoding='utf-8')).get('flags', [])
    return {
        'volumes': volumes,
        'brain_mm3': record.get('brain_volume_mm3', 'n/a'),
        'brain_low_mm3': record.get('brain_low_mm3', 'n/a'),
        'brain_high_mm3': record.get('brain_high_mm3', 'n/a'),
        'intracranial_mm3': record.get('intracranial_volume_mm3', 'n/a'),
        'parenchyma_percent': record.get('parenchyma_percent', 'n/a'),
        'zones': record.get('lesion_zones', {}),
        'verdict': record.get('quality', {}).get('verdict', 'n/a'),
        'measures': _judged(record.get('quality', {}).get('measures', {})),
        'lesion_count': record.get('lesion_count', 'n/a'),
        'lesion_count_3mm': record.get('lesion_count_3mm', 'n/a'),
        'flags': flags,
    }


def _judged(measures: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the rows of the table of quality: each measure against its limits."""
    rows = []
    for rule in RULES:
        if rule.measure in measures:
            value = measures[rule.measure]
            limits = {'check': rule.check, 'fail': rule.fail}
            rows.append(
                {
                    'measure': rule.measure,
                    'value': value,
                    'wrong': 'above' if rule.above else 'below',
                    'verdict': rule.verdict(value),
                    **{name: '' if x is None else f'{x:g}' for name, x in limits.items()},
                }
            )
    known = {rule.measure for rule in RULES}
    blank = dict.fromkeys(('wrong', 'verdict', 'check', 'fail'), '')
    return rows + [
        {'measure': name, 'value': value} | blank
        for name, value in measures.items()
        if name not in known
    ]


def _image(path: Path, words: str) -> dict[str, Any]:
    content = path.read_bytes()
    width, height = (int.from_bytes(content[i : i + 4], 'big') for i in (16, 20))  # PNG's IHDR
    data = base64.b64encode(content).decode()
    return {'data': data, 'width': width, 'height': height, 'alt': words}


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('bids_jointseg', 'data'),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        'number': _number,
        'signed': _signed,
        'signed_ml': lambda mm3: _signed(_float(mm3) / 1000, 2),
        'ml': _ml,
        'percent': _percent,
    }
    return environment.get_template(template).render(values)


def _float(value: object) -> float:
    """Return a table's cell as a number; NaN for 'n/a'."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _known(value: object) -> bool:
    return math.isfinite(_float(value))


def _number(value: object, digits: int = 0) -> str:
    """Write a number with narrow spaces between thousands; 'n/a' if it is none."""
    if not _known(value):
        return 'n/a'
    return f'{_float(value):,.{digits}f}'.replace(',', '\u202f').replace('-', '\u2212')


def _signed(value: object, digits: int = 0) -> str:
    """Write a change: what has no sign by its digits has none."""
    text = _number(value, digits)
    none = not _known(value) or float(f'{_float(value):.{digits}f}') == 0
    return text.lstrip('\u2212') if none else text if text[0] == '\u2212' else f'+{text}'


def _ml(volume_mm3: object, digits: int = 2) -> str:
    return _number(_float(volume_mm3) / 1000, digits)


def _percent(value: object) -> str:
    """Write the length of a bar, as CSS wants it."""
    return f'{min(max(_float(value), 0), 100):.2f}%' if _known(value) else '0'


# --------------------------------------------------------------------------------------- group

LEAST = 5  # scans without which there is no telling what is unusual
SPREAD = 3  # MADs from the median beyond which a value is unusual


def group_tables(out_dir: Path) -> tuple[Path, ...]:
    """Gather the tables of all scans of a derivative dataset, one after the other.

    Parameters
    ----------
    out_dir
        The derivative dataset.

    Returns
    -------
    tuple[Path, ...]
        ``group_volumes.tsv``, ``.csv`` and ``.json`` (one row per scan), ``group_lesions.tsv``
        and ``.csv`` (one row per lesion), and, if sessions were compared, ``group_changes.tsv``
        and ``.csv`` (one row per comparison and class).

    Raises
    ------
    DataError
        If no scan has been processed.
    """
    tables = _tables(out_dir)
    if not tables:
        raise DataError(f'{out_dir}: no *_seg-jointseg_morph.tsv: run the participant level first')
    # Names alone tell which entities there are: the tables need not be held in memory.
    extra = {key: None for path in tables for key in _own(path)}.keys() - {'sub', 'ses'}
    keys = ('participant_id', 'session_id', *sorted(extra), 'scan')
    measures = (
        'quality',
        'brain_mm3',
        'intracranial_mm3',
        'parenchyma_percent',
        *(f'{label.abbreviation}_mm3' for label in CLASSES),
        'lesion_count',
        'lesion_count_3mm',
        *(f'L_{zone}_{name}' for zone in ZONES for name in ('count', 'mm3')),
    )

    def identity(table: Path) -> dict[str, str]:
        own = _own(table)
        return {
            'participant_id': f'sub-{own["sub"]}',
            'session_id': f'ses-{own["ses"]}' if 'ses' in own else 'n/a',
            **{key: own.get(key, 'n/a') for key in extra},
            'scan': table.name.removesuffix('_seg-jointseg_morph.tsv'),
        }

    def volumes() -> Iterator[dict[str, Any]]:
        for table in tables:
            try:
                found = _volumes(table)
            except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
                LOGGER.warning(
                    '%s: left out, it cannot be read (%r): run its participant again', table, error
                )
                continue
            yield identity(table) | {
                'quality': found['verdict'],
                'brain_mm3': found['brain_mm3'],
                'intracranial_mm3': found['intracranial_mm3'],
                'parenchyma_percent': found['parenchyma_percent'],
                **{
                    f'{label.abbreviation}_mm3': found['volumes'][label.abbreviation]['volume_mm3']
                    for label in CLASSES
                },
                'lesion_count': found['lesion_count'],
                'lesion_count_3mm': found['lesion_count_3mm'],
                **{
                    f'L_{zone}_{short}': found['zones'].get(zone, {}).get(name, 'n/a')
                    for zone in ZONES
                    for short, name in (('count', 'count'), ('mm3', 'volume_mm3'))
                },
                'flags': '; '.join(found['flags']) or 'n/a',
            }

    def lesions() -> Iterator[dict[str, Any]]:
        for table in tables:
            own = identity(table)
            path = table.with_name(f'{own["scan"]}_desc-lesions_morph.tsv')
            try:
                rows = list(_read(path)) if path.is_file() else []
            except (OSError, ValueError, csv.Error) as error:
                LOGGER.warning(
                    '%s: left out, it cannot be read (%r): run its participant again', path, error
                )
            else:
                for row in rows:
                    yield own | {name: row.get(name) or 'n/a' for name in LESION_COLUMNS}

    written = []
    for name, columns, rows in (
        ('group_volumes', (*keys, *measures, 'flags'), volumes()),
        ('group_lesions', (*keys, *LESION_COLUMNS), lesions()),
    ):
        tsv = write_table(out_dir / f'{name}.tsv', columns, rows)
        written += [tsv, write_table(tsv.with_suffix('.csv'), columns, _read(tsv))]
    described = {
        'scan': {'Description': 'Start of the names of all results of the scan'},
        'quality': {'Description': 'Verdict of the quality control: pass, check or fail'},
        'brain_mm3': {'Description': 'The six tissues and the lesions', 'Units': 'mm^3'},
        'intracranial_mm3': {'Description': 'What the skull holds', 'Units': 'mm^3'},
        'parenchyma_percent': {
            'Description': 'The brain without its ventricles, of what the skull holds',
            'Units': '%',
        },
        **{
            f'{label.abbreviation}_mm3': {'Description': label.name, 'Units': 'mm^3'}
            for label in CLASSES
        },
        'lesion_count': {'Description': 'Groups of lesion voxels that touch at least by a corner'},
        'lesion_count_3mm': {'Description': 'Those with a diameter of at least 3 mm'},
        **{f'L_{zone}_count': {'Description': f'Lesions that are {zone}'} for zone in ZONES},
        **{
            f'L_{zone}_mm3': {'Description': f'Lesions that are {zone}', 'Units': 'mm^3'}
            for zone in ZONES
        },
        'flags': {'Description': 'Warnings, separated by semicolons'},
    }
    written.insert(2, write_json(out_dir / 'group_volumes.json', described))
    return (*written, *_group_changes(out_dir, identity, keys))


def _group_changes(
    out_dir: Path, identity: Callable[[Path], dict[str, str]], keys: Sequence[str]
) -> list[Path]:
    """Gather the comparisons of all people, or remove what is left of earlier ones."""
    rows = []
    for table, change in _changes(out_dir):
        own = identity(table) | {'scan': change['stem']}
        for row in change['volumes']:
            counts = change['counts'] if row['name'] == 'L' else dict.fromkeys(CHANGES, 'n/a')
            rows.append(own | row | {f'lesions_{name}': counts[name] for name in CHANGES})
    paths = [out_dir / f'group_changes.{extension}' for extension in ('tsv', 'csv')]
    if not rows:
        for path in paths:
            path.unlink(missing_ok=True)
        return []
    columns = list(dict.fromkeys([*keys, *(name for row in rows for name in row)]))
    return [write_table(path, columns, rows) for path in paths]


def group_report(out_dir: Path) -> Path:
    """Write the page of a cohort from ``group_volumes.tsv``, which is gathered if absent.

    Parameters
    ----------
    out_dir
        The derivative dataset.

    Returns
    -------
    Path
        ``<out_dir>/group.html``.

    Raises
    ------
    DataError
        If no scan has been processed.
    """
    table = out_dir / 'group_volumes.tsv'
    if not table.is_file():
        group_tables(out_dir)
    scans = list(_read(table))
    pages = {row['participant_id']: f'{row["participant_id"]}.html' for row in scans}
    columns = {
        'brain_mm3': 'Brain',
        **{f'{label.abbreviation}_mm3': label.name for label in CLASSES},
        'lesion_count': 'Number of lesions',
    }
    # Of scans with their skulls; the table of all scans has no room for them.
    beside = {
        'intracranial_mm3': 'Within the skull',
        'parenchyma_percent': 'Brain without ventricles, of what the skull holds',
    }
    beside = {k: v for k, v in beside.items() if any(_known(row.get(k)) for row in scans)}
    strips, unusual = [], []
    sides: dict[tuple[int, str], str] = {}
    for name, title in (columns | beside).items():
        divisor, digits, unit = _unit(name)
        values = [_float(row[name]) / divisor for row in scans]
        median, low, high = usual_range(values, skewed=name in ('L_mm3', 'lesion_count'))
        marks = [k for k, value in enumerate(values) if value < low or value > high]

        def text(value: float, digits: int = digits, unit: str = unit) -> str:
            return _number(value, digits) + unit

        for k in marks:
            sides[k, name] = 'low' if values[k] < low else 'high'
            unusual.append(
                {
                    'scan': scans[k]['scan'],
                    'href': pages[scans[k]['participant_id']],
                    'measure': title,
                    'value': text(values[k]),
                    'side': sides[k, name],
                    'median': text(median),
                    'range': f'{text(max(low, 0))} to {text(high)}',
                }
            )
        strips.append(_strip(title, values, (median, low, high), text, marks, scans, pages))
    short = ['Brain', *(label.abbreviation for label in CLASSES), 'Number of lesions']
    rows = [
        {
            'scan': row['scan'],
            'href': pages[row['participant_id']],
            'quality': row.get('quality', 'n/a'),
            'flags': '' if row['flags'] == 'n/a' else row['flags'],
            'cells': [
                {
                    'raw': row[name],
                    'text': _number(_float(row[name]) / divisor, digits),
                    'side': sides.get((k, name), ''),
                }
                for name in columns
                for divisor, digits, _ in [_unit(name)]
            ],
        }
        for k, row in enumerate(scans)
    ]
    page = _render(
        'group.html.j2',
        rows=rows,
        columns=short,
        strips=strips,
        unusual=sorted(unusual, key=lambda item: item['scan']),
        participants=len(pages),
        trends=_trends(out_dir),
        maps=_maps(out_dir),
        least=LEAST,
        version=__version__,
    )
    return write_text(out_dir / 'group.html', page)


def _unit(column: str) -> tuple[int, int, str]:
    """Return by what a column of the table is divided on the page, its digits and its unit."""
    if column.endswith('_mm3'):
        return 1000, 2, ' ml'
    return (1, 1, ' %') if column.endswith('_percent') else (1, 0, '')


def _maps(out_dir: Path) -> list[dict[str, Any]]:
    """Return the lesion maps of the cohort: title, picture, and what it was made from."""
    maps = []
    for path in sorted(out_dir.glob('group_space-*_label-L_probseg.png')):
        record = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
        title = path.name.removeprefix('group_space-').removesuffix('_label-L_probseg.png')
        title = title.replace('_', ', ').replace('res-', 'resolution ')
        maps.append(
            {
                'title': title,
                'image': _image(path, f'Lesions in {title}'),
                'href': path.name.replace('.png', '.nii.gz'),
                'participants': record['participants'],
                'scans': record['scans'],
            }
        )
    return maps


def _trends(out_dir: Path) -> list[dict[str, Any]]:
    """Return the plots of volumes over sessions in the template's terms: 540 wide, 140 high."""
    table = out_dir / 'group_changes.tsv'
    rows = list(_read(table)) if table.is_file() else []
    trends = []
    for name, title, unit in (('L', 'Lesions', 'ml'), ('brain', 'Brain', '% of the first')):
        people: dict[tuple[str, ...], dict[str, float]] = {}
        for row in rows:
            if row['name'] == name:
                others = entities(Path(f'{row["scan"]}_T1w'))
                key = tuple(v for k, v in others.items() if k not in ('ses', 'run'))
                line = people.setdefault((row['participant_id'], *key), {})
                line[row['since']] = _float(row['before_mm3'])
                line[row['session_id']] = _float(row['after_mm3'])
        lines = []
        for (person, *_), line in sorted(people.items()):
            volumes = dict(sorted(line.items()))
            base = next(iter(volumes.values())) / 100 if name == 'brain' else 1000
            known = {k: v / base for k, v in volumes.items() if base and math.isfinite(v / base)}
            if len(known) > 1:
                lines.append((person, known))
        sessions = sorted({session for _, known in lines for session in known})
        if not sessions:
            continue
        values = [value for _, known in lines for value in known.values()]
        ticks = round_ticks(min(values), max(values), 3)
        x, y = axis_scale(np.array([0, len(sessions) - 1]), 60, 530), axis_scale(ticks, 130, 10)
        trends.append(
            {
                'title': f'{title}, {unit}',
                'words': f'{title}: {len(lines)} people over {len(sessions)} sessions, from '
                f'{_number(min(values), 2)} to {_number(max(values), 2)} {unit}',
                'ticks': [(round(y(tick), 1), f'{tick:g}') for tick in ticks],
                'sessions': [(round(x(k), 1), session) for k, session in enumerate(sessions)],
                'lines': [
                    {
                        'href': f'{person}.html',
                        'words': f'{person}: '
                        + ', '.join(f'{_number(v, 2)} ({k})' for k, v in known.items()),
                        'd': 'M'
                        + 'L'.join(
                            f'{x(sessions.index(k)):.1f} {y(v):.1f}' for k, v in known.items()
                        ),
                    }
                    for person, known in lines
                ],
            }
        )
    return trends


def usual_range(values: Sequence[float], *, skewed: bool = False) -> tuple[float, float, float]:
    """Return the median and the median -/+ 3 scaled MAD (Leys et al., J Exp Soc Psychol 2013).

    Parameters
    ----------
    values
        NaN is left out.
    skewed
        Take the deviations of `log(1 + x)`, and call no value low.

    Returns
    -------
    tuple[float, float, float]
        Median, lowest and highest usual value. With fewer than :data:`LEAST` values, or where
        half of them are equal, every value is usual.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return math.nan, -math.inf, math.inf
    there, back = (math.log1p, math.expm1) if skewed else (float, float)
    middle = statistics.median(there(value) for value in known)
    mad = 1.4826 * statistics.median(abs(there(value) - middle) for value in known)
    if len(known) < LEAST or mad == 0:
        return back(middle), -math.inf, math.inf
    low = -math.inf if skewed else middle - SPREAD * mad
    return back(middle), low, back(middle + SPREAD * mad)


def _strip(
    title: str,
    values: Sequence[float],
    usual: tuple[float, float, float],
    text: Callable[[float], str],
    marks: Sequence[int],
    scans: Sequence[Mapping[str, str]],
    pages: Mapping[str, str],
) -> dict[str, Any]:
    """Return one strip plot in the template's terms: 540 units wide, 50 high."""
    median, low, high = usual
    known = [value for value in values if math.isfinite(value)]
    least, most = (min(known), max(known)) if known else (0.0, 0.0)

    def x(value: float) -> float:
        inside = min(max(value, least), most)
        return round(10 + 540 * ((inside - least) / (most - least) if most > least else 0.5), 1)

    def y(number: int) -> float:
        return round(16 + 34 * ((number * 0.618034 + 0.5) % 1), 1)  # neighbours lie apart

    dots = ''.join(
        f'M{x(value)} {y(k)}h0'
        for k, value in enumerate(values)
        if math.isfinite(value) and k not in set(marks)
    )
    return {
        'title': title,
        'words': f'{title}: {len(known)} scans from {text(least)} to {text(most)}, median '
        f'{text(median)}, {len(marks)} unusual',
        'dots': dots or 'M0 0',
        'median': x(median) if known else None,
        'band': (x(low), round(x(high) - x(low), 1)) if math.isfinite(high) else None,
        'low': text(least) if known else 'n/a',
        'high': text(most) if known else '',
        'middle': f'median {text(median)}' if known else '',
        'marks': [
            {
                'x': x(values[k]),
                'y': y(k),
                'href': pages[scans[k]['participant_id']],
                'words': f'{scans[k]["scan"]}: {text(values[k])}',
            }
            for k in marks
        ],
    }
