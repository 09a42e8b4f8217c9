"""Segmentations against a reference, several models side by side.

What is compared are label sets: a prediction and a reference each say of every voxel which of our
classes it may be (:class:`~bids_jointseg.labels.Protocol`). Two protocols can be compared in the
regions that both tell apart (:func:`regions`): the finest joint coarsening of their distinctions.
Voxels of which the reference cannot tell whether they are in a region are left out of it, and so
are those for which a model has no word, from all models alike.

Traditional tools are read as they write (:func:`find_label_maps`), so that they stand in the same
table. Three parts that know nothing of each other: arrays to rows (:func:`score`), rows to tables
(:func:`write_tables`), and files to both, with figures (:func:`evaluate`). Measures and
statistics are those of :mod:`bids_jointseg.metrics`.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from bids_jointseg import __version__, metrics
from bids_jointseg.bids import BidsError, DataError, write_json, write_table
from bids_jointseg.bids import entities as entities_of
from bids_jointseg.files import write_bytes
from bids_jointseg.image import Grid, ImageError
from bids_jointseg.labels import (
    ALL,
    CLASSES,
    INDICES,
    LABELS,
    PROTOCOLS,
    Protocol,
    ProtocolError,
    bits,
)
from bids_jointseg.labels import protocol as protocol_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

LOGGER = logging.getLogger('bids_jointseg')

Region = frozenset[str]
Row = dict[str, Any]

ORDER = ('CGM', 'WM', 'BS', 'SGM', 'VEN', 'CBM', 'L')
"""Of the rows of a table: that of the paper's Table 1."""

# ------------------------------------------------------------------------------ what is compared


def regions(predicted: Protocol, reference: Protocol) -> tuple[Region, ...]:
    """Return the regions that both protocols tell apart, without the background.

    Parameters
    ----------
    predicted
        Every label of it has to fall into one region whole: what it leaves open, it does not
        tell apart.
    reference
        Its atoms are enough: a voxel whose label leaves a region open is left out of it.

    Returns
    -------
    tuple[frozenset[str], ...]
        The parts of the finest partition of the classes of which the atoms of the reference and
        the labels of the prediction are within parts, those that both have a label for, in the
        order of :data:`ORDER`.
    """
    parts = _merged([*reference.atoms(), *_said(predicted)])
    return tuple(
        part
        for part in sorted(parts, key=_place)
        if _decides(predicted, part) and any(group <= part for group in _said(reference))
    )


def common_regions(
    reference: Protocol, models: Mapping[str, Protocol]
) -> dict[Region, frozenset[str]]:
    """Return the regions of all models, and the classes that are left out of each.

    A coarse region of one model (gray matter, of a tool that does not tell the basal ganglia from
    the cortex) is asked of the others too. A class that a model has no label for (the cerebellum,
    where it knows gray and white matter only) has no right answer from this model: in a region
    that it is compared in, such voxels of the reference are left out for all.

    Returns
    -------
    dict
        In the order of the tables: region -> classes of the reference that are left out.
    """
    found = {part for model in models.values() for part in regions(model, reference)}
    return {
        part: frozenset().union(
            *(_unsaid(model) for model in models.values() if _decides(model, part))
        )
        for part in sorted(found, key=_place)
    }


def region_name(region: Region) -> str:
    """Return a region's name in tables: its classes, as in 'WM+L'."""
    return '+'.join(name for name in CLASSES if name in region)


def _title(name: str) -> str:
    """Return the words for a region's name: 'WM+L' -> 'White matter + lesion'."""
    words = {label.abbreviation: label.name for label in LABELS} | {'CGM': 'Gray matter'}
    first, *more = name.split('+')
    short = {'L': 'lesion', 'CGM': 'cortex'}
    return ' + '.join([words[first], *(short.get(item, words[item].lower()) for item in more)])


def _place(region: Region) -> tuple[int, int, str]:
    """Sort by the paper's order; what is merged comes after its first class alone."""
    first = min((ORDER.index(name) for name in region if name in ORDER), default=len(ORDER))
    return first, len(region), region_name(region)


def _said(protocol: Protocol) -> set[Region]:
    return {group for group in protocol.sets.values() if group != ALL}


def _unsaid(protocol: Protocol) -> Region:
    """Return the classes that a protocol has no label for."""
    return ALL.difference(*_said(protocol))


def _decides(protocol: Protocol, region: Region) -> bool:
    """Tell whether each label is within a foreground region or outside of it, some within."""
    said = _said(protocol)
    return (
        'BG' not in region
        and any(group <= region for group in said)
        and all(group <= region or not group & region for group in said)
    )


def _merged(groups: Iterable[Region]) -> set[Region]:
    """Join what overlaps, until nothing does."""
    parts = {frozenset({name}) for name in CLASSES}
    for group in groups:
        touched = {part for part in parts if part & group}
        parts = parts - touched | {frozenset().union(*touched)}
    return parts


# --------------------------------------------------------------------------------------- scores

MEASURES: Mapping[str, dict[str, str]] = MappingProxyType(
    {
        'dice': {'Description': 'Dice, 2 |A & B| / (|A| + |B|)', 'Units': '%'},
        'jaccard': {'Description': 'Jaccard, |A & B| / |A | B|', 'Units': '%'},
        'hd95_mm': {
            'Description': '95 % Hausdorff distance: the larger of the two directed 95th '
            'percentiles of surface distances',
            'Units': 'mm',
        },
        'asd_mm': {
            'Description': 'Average symmetric surface distance: mean of both directions together',
            'Units': 'mm',
        },
        'avd_percent': {
            'Description': 'Absolute volume difference, relative to the reference',
            'Units': '%',
        },
        'volumetric_similarity': {
            'Description': '1 - |difference| / sum of the volumes, as in MRBrainS; 1 is equal'
        },
        'predicted_mm3': {'Description': 'Predicted volume', 'Units': 'mm^3'},
        'reference_mm3': {'Description': 'Volume of the reference', 'Units': 'mm^3'},
    }
)
LESION_MEASURES = tuple(field.name for field in fields(metrics.LesionWise))
_COMPARED = tuple(name for name in MEASURES if not name.endswith('_mm3'))
_COMPARED_LESIONS = tuple(name for name in LESION_MEASURES if not name.startswith('n_'))


def score(
    found: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    spacing_mm: ArrayLike,
    *,
    predicted: Protocol = PROTOCOLS['jointseg'],
    reference: Protocol = PROTOCOLS['jointseg'],
    among: Mapping[Region, frozenset[str]] | None = None,
    **identity: str,
) -> list[Row]:
    """Compare one segmentation with its reference.

    Parameters
    ----------
    found, truth
        Bit sets of classes (X, Y, Z), as :meth:`.labels.Protocol.encode` returns them, on one
        grid. A predicted voxel that says nothing is in no region.
    spacing_mm
        Of each axis.
    predicted, reference
        What the two were encoded by: they decide which regions can be compared.
    among
        Region -> classes of the reference that are left out of it, from :func:`common_regions`;
        by default the regions of these two protocols.
    **identity
        Go into every row first: `dataset`, `scan`, `model`.

    Returns
    -------
    list[dict]
        One row for each region, with all :data:`MEASURES`; that of the lesions alone also has
        the lesion-wise ones, :data:`LESION_MEASURES`.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if found.shape != truth.shape:
        raise ValueError(f'shapes differ: {found.shape} and {truth.shape}')
    spacing = tuple(np.asarray(spacing_mm, float).tolist())
    if among is None:
        among = common_regions(reference, {'': predicted})
    # No region has the background, so what may be background on both sides is in none.
    box = ndimage.find_objects(((found & truth & bits({'BG'})) == 0).view(np.int8))
    if box:
        found, truth = found[box[0]], truth[box[0]]
    rows = []
    for region, left_out in among.items():
        if not _decides(predicted, region):
            continue
        inside, outside = np.uint8(bits(region)), np.uint8(bits(ALL - region))
        counts = (truth & inside == 0) | (truth & outside == 0)
        if left_out:
            counts &= truth & np.uint8(bits(ALL - left_out)) != 0
        a = counts & (found & outside == 0)
        b = counts & (truth & outside == 0)
        row = {
            **identity,
            'region': region_name(region),
            'dice': metrics.dice_of(a, b),
            'jaccard': metrics.jaccard_of(a, b),
            'hd95_mm': metrics.hausdorff95(a, b, spacing),
            'asd_mm': metrics.average_surface_distance(a, b, spacing),
            'avd_percent': metrics.absolute_volume_difference(a, b),
            'volumetric_similarity': metrics.volumetric_similarity(a, b),
            'predicted_mm3': metrics.volume_mm3(a, spacing),
            'reference_mm3': metrics.volume_mm3(b, spacing),
        }
        if region == {'L'}:
            row |= vars(metrics.lesion_wise(a, b, spacing))
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------- tables


def write_tables(rows: Sequence[Row], folder: Path, *, models: Sequence[str] = ()) -> list[Path]:
    """Write all tables of a comparison.

    Parameters
    ----------
    rows
        Of :func:`score`, with `dataset`, `scan` and `model`. Datasets come in this order, regions
        in that of :data:`ORDER`.
    folder
        Where to.
    models
        The order of models, those that are not named in that of the rows.

    Returns
    -------
    list[Path]
        ``scans.tsv``, ``lesions.tsv`` (where lesions were compared), ``cohort.tsv``,
        ``agreement.tsv``, ``paired.tsv`` (where there are two models), ``table1.tsv`` and
        ``table1.md``.
    """
    written = []

    def write(name: str, columns: Sequence[str], table: Iterable[Row]) -> None:
        shown = [{key: _cell(row.get(key, '')) for key in columns} for row in table]
        written.append(write_table(folder / name, columns, shown))

    keys = ('dataset', 'scan', 'model')
    write('scans.tsv', (*keys, 'region', *MEASURES), rows)
    lesions = [row for row in rows if LESION_MEASURES[0] in row]
    if lesions:
        write('lesions.tsv', (*keys, *LESION_MEASURES), lesions)

    groups = _grouped(rows, models)
    cohort, agreement = [], []
    for (dataset, region, model), scans in groups.items():
        identity = {'dataset': dataset, 'model': model, 'region': region}
        for measure in _measures(scans):
            values = metrics.summary([row[measure] for row in scans.values()])
            cohort.append(identity | {'measure': measure} | _flat(values))
        volumes = [
            [row[key] for row in scans.values()] for key in ('predicted_mm3', 'reference_mm3')
        ]
        found = _flat(metrics.bland_altman(*volumes))
        agreement.append(
            identity
            | {key if key in ('n', 'missing') else f'{key}_mm3': v for key, v in found.items()}
        )
    write('cohort.tsv', tuple(cohort[0]) if cohort else ('dataset',), cohort)
    write('agreement.tsv', tuple(agreement[0]) if agreement else ('dataset',), agreement)
    pairs = _pairs(groups)
    if pairs:
        write('paired.tsv', tuple(pairs[0]), pairs)
    written += _write_table1(groups, folder, [*models, *(row['model'] for row in rows)])
    return written


Groups = dict[tuple[str, str, str], dict[str, Row]]


def _grouped(rows: Sequence[Row], models: Sequence[str] = ()) -> Groups:
    """Return (dataset, region, model) -> scan -> row; all in the order of the tables."""
    datasets = list(dict.fromkeys(row['dataset'] for row in rows))
    order = list(dict.fromkeys([*models, *(row['model'] for row in rows)]))
    groups: Groups = {}
    for row in rows:
        groups.setdefault((row['dataset'], row['region'], row['model']), {})[row['scan']] = row

    def place(key: tuple[str, str, str]) -> tuple[int, tuple[int, int, str], int]:
        dataset, region, model = key
        return datasets.index(dataset), _place(frozenset(region.split('+'))), order.index(model)

    return {key: groups[key] for key in sorted(groups, key=place)}


def _measures(scans: Mapping[str, Row]) -> list[str]:
    """Return what is summarised over scans: the lesion-wise measures where there are any."""
    first = next(iter(scans.values()))
    return [name for name in (*_COMPARED, *_COMPARED_LESIONS) if name in first]


def _flat(statistics: Any) -> Row:
    """Return the fields of a result; an interval becomes two."""
    row: Row = {}
    for name, value in vars(statistics).items():
        if isinstance(value, tuple):
            stem = name.removesuffix('ci')
            row |= {f'{stem}ci95_low': value[0], f'{stem}ci95_high': value[1]}
        else:
            row[name] = value
    return row


def _pairs(groups: Groups) -> list[Row]:
    """Compare every two models on the scans that both have."""
    table = []
    for (dataset, region), items in itertools.groupby(groups, key=lambda key: key[:2]):
        for one, other in itertools.combinations([key[2] for key in items], 2):
            a, b = groups[dataset, region, one], groups[dataset, region, other]
            shared = [scan for scan in a if scan in b]
            for measure in _measures(a):
                test = metrics.paired(
                    [a[scan][measure] for scan in shared], [b[scan][measure] for scan in shared]
                )
                found = _flat(test)
                found['mean_difference'] = found.pop('mean')
                names = {'dataset': dataset, 'region': region, 'measure': measure}
                order = ('n', 'missing', 'mean_difference', 'ci95_low', 'ci95_high', 'p')
                table.append(
                    names | {'model_a': one, 'model_b': other} | {key: found[key] for key in order}
                )
    return table


def _write_table1(groups: Groups, folder: Path, models: Sequence[str]) -> list[Path]:
    """Write the mean Dice of each tissue and model, laid out as the paper's Table 1."""
    datasets = list(dict.fromkeys(dataset for dataset, _, _ in groups))
    there = {(dataset, model) for dataset, _, model in groups}
    columns = [
        column for column in itertools.product(datasets, dict.fromkeys(models)) if column in there
    ]
    names = sorted(
        {region for _, region, _ in groups}, key=lambda name: _place(frozenset(name.split('+')))
    )
    heads = [f'{d}: {m}' if len(datasets) > 1 else m for d, m in columns]
    flat, lines = [], []
    for region in names:
        cells: list[str] = []
        row: Row = {'region': region, 'tissue': _title(region)}
        summaries = {
            column: metrics.summary(
                [item['dice'] for item in groups.get((column[0], region, column[1]), {}).values()]
            )
            for column in columns
        }
        for (dataset, model), head in zip(columns, heads, strict=True):
            found = summaries[dataset, model]
            rivals = [summaries[c].mean for c in columns if c[0] == dataset and summaries[c].n]
            text = '' if not found.n else f'{found.mean:.1f}'
            if text and len(rivals) > 1 and text == f'{max(rivals):.1f}':
                text = f'**{text}**'
            if math.isfinite(found.sd):
                text += f' ({found.sd:.1f})'
            cells.append(text)
            row |= {f'{head} mean': found.mean, f'{head} SD': found.sd, f'{head} n': found.n}
        flat.append({key: _cell(value) for key, value in row.items()})
        lines.append([_title(region), *cells])
    number = {
        column: max(
            (len(scans) for (d, _, m), scans in groups.items() if (d, m) == column), default=0
        )
        for column in columns
    }
    counts = ', '.join(f'{head}: {number[c]}' for c, head in zip(columns, heads, strict=True))
    text = _markdown_table(['Dice, % (SD)', *heads], lines)
    where = f'{datasets[0]}. ' if len(datasets) == 1 else ''
    text += f'\n{where}Mean over scans ({counts}); the best of each dataset is bold; '
    text += 'empty where a model does not tell the region apart.\n'
    tsv = write_table(folder / 'table1.tsv', list(flat[0]) if flat else ['region'], flat)
    return [tsv, write_bytes(folder / 'table1.md', text.encode())]


def _markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [[cell.replace('|', '\\|') for cell in line] for line in (heads, *lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = [
        '| ' + ' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + ' |'
        for line in table
    ]
    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    return '\n'.join([text[0], '| ' + ' | '.join(rule) + ' |', *text[1:]]) + '\n'


def _cell(value: Any) -> Any:
    """Return a number as it is written: BIDS' n/a where there is none."""
    if isinstance(value, float):
        return f'{value:.6g}' if math.isfinite(value) else 'n/a'
    return value


# -------------------------------------------------------------------------------- label maps

_THREE = {'GM': frozenset({'CGM', 'SGM'}), 'WM': frozenset({'WM', 'L'})}
_THREE |= {'CSF': frozenset({'VEN', 'BG'}), 'none': frozenset({'BG'})}


def _three_tissues(name: str, order: Sequence[str]) -> Protocol:
    """Return the protocol of a tool that knows gray matter, white matter and fluid.

    It has no word for cerebellum and brainstem, of which it calls one part gray and another
    white. Its fluid is that of ventricles and sulci together, and the sulci are background here:
    so it cannot be compared. Lesions are white matter, whatever the tool makes of them.
    """
    sets = {index: _THREE[item] for index, item in enumerate(('none', *order))}
    return Protocol(name, MappingProxyType(sets))


@dataclass(frozen=True)
class Tool:
    """What a program writes: which files of a folder, and what their labels mean by default.

    Probabilities become the index of the highest, from 1, where it is higher than what they
    leave to none of them, else 0.
    """

    patterns: tuple[str, ...]
    protocol: Protocol
    probabilities: bool = False


TOOLS: Mapping[str, Tool] = MappingProxyType(
    {
        'bids': Tool(('sub-*/**/*_dseg.nii*',), PROTOCOLS['jointseg']),
        'freesurfer': Tool(('*/mri/aseg.mgz', '*/mri/aparc+aseg.mgz'), PROTOCOLS['freesurfer']),
        'spm': Tool(('**/c1*.nii*',), _three_tissues('spm', ('GM', 'WM', 'CSF')), True),
        'fast': Tool(
            ('**/*_pve_0.nii*', '**/*_pveseg.nii*'),
            _three_tissues('fast', ('CSF', 'GM', 'WM')),
            True,
        ),
        'gif': Tool(('**/*_NeuroMorph_Parcellation.nii*',), PROTOCOLS['gif']),
        'niftyseg': Tool(
            ('**/*_em.nii*', '**/*.nii*'),
            _three_tissues('niftyseg', ('CSF', 'GM', 'WM')),
            True,
        ),
        'mask': Tool(('sub-*/**/*_mask.nii*',), PROTOCOLS['binary-lesion']),
    }
)
"""Tried in this order; only `niftyseg`, whose files have no names of their own, has to be asked
for where they do not end in ``_em``, as Nipype calls them."""

OWN = ('desc', 'label', 'seg', 'atlas', 'res', 'den', 'suffix')
"""Entities that name a segmentation, not the scan that it is of."""


@dataclass(frozen=True)
class LabelMap:
    """One segmentation as a tool left it: one file, or one for each class."""

    tool: str
    paths: tuple[Path, ...]
    entities: Mapping[str, str]

    @property
    def name(self) -> str:
        """The scan: its entities without those that name a segmentation."""
        return '_'.join(f'{key}-{value}' for key, value in self.entities.items() if key not in OWN)


def find_label_maps(
    root: Path,
    tool: str = '',
    *,
    wanted: Mapping[str, str] = MappingProxyType({}),
    participants: Collection[str] = (),
) -> tuple[str, list[LabelMap]]:
    """Find the segmentations in a folder.

    ``sub-`` and ``ses-`` may be in the names of files or of folders above them; a FreeSurfer
    subject without them is taken by its name.

    Parameters
    ----------
    root
        The folder.
    tool
        One of :data:`TOOLS`; by default the first of which there are files.
    wanted
        Entities, with `suffix` as one, that a file has to have.
    participants
        Only these.

    Returns
    -------
    tuple
        The tool and what was found, in the order of names.

    Raises
    ------
    BidsError
        If there is no such folder.
    DataError
        If there is no segmentation in it.
    """
    if not root.is_dir():
        raise BidsError(f'{root}: no such folder: give one with segmentations')
    if wanted.get('suffix') == 'mask':
        tool = tool or 'mask'
    for name in [tool] if tool else TOOLS:
        found: list[LabelMap] = []
        for pattern in TOOLS[name].patterns:
            if name == 'niftyseg' and not tool and pattern == '**/*.nii*':
                break
            if found:  # the first pattern that there are files of
                break
            for path in sorted(root.glob(pattern)):
                item = _label_map(root, path, name)
                if (
                    item is not None
                    and all(item.entities.get(key) == value for key, value in wanted.items())
                    and (not participants or item.entities['sub'] in participants)
                ):
                    found.append(item)
        if found:
            return name, found
    what = TOOLS[tool].patterns[0] if tool else 'sub-*/**/*_dseg.nii.gz, nor files of another tool'
    more = ' '.join(f'{key}={value}' for key, value in wanted.items())
    raise DataError(
        f'{root}: no {what}{f" with {more}" if more else ""}: check the folder and the entities'
    )


def _label_map(root: Path, path: Path, tool: str) -> LabelMap | None:
    """Return what a file belongs to, or None where it is no segmentation of a subject."""
    if path.name.startswith('.') or not re.search(r'\.(nii|nii\.gz|mgz)$', path.name):
        return None
    paths: tuple[Path, ...] = (path,)
    name, folders = path.name, list(path.relative_to(root).parts[:-1])
    if tool == 'spm':
        name = path.name[2:]
        paths = tuple(path.with_name(f'c{number}{name}') for number in (1, 2, 3))
    elif tool == 'fast' and '_pve_0' in name:
        paths = tuple(path.with_name(name.replace('_pve_0', f'_pve_{n}')) for n in range(3))
    elif tool == 'freesurfer':
        folders, name = [], folders[0].split('.')[0] + '_aseg'
    found: dict[str, str] = {}
    for folder in folders:
        found |= dict(re.findall(r'(?:^|_)(sub|ses)-([A-Za-z0-9+]+)', folder))
    found |= entities_of(path.with_name(name))
    if 'sub' not in found:
        if tool != 'freesurfer':
            LOGGER.warning('%s: left out, neither its name nor its folders have sub-', path)
            return None
        found = {'sub': name.removesuffix('_aseg')}
    if tool in ('bids', 'mask'):
        found['suffix'] = name.split('.')[0].rsplit('_', 1)[-1]
    order = [key for key in ('sub', 'ses') if key in found]
    return LabelMap(tool, paths, {key: found[key] for key in dict.fromkeys([*order, *found])})


def read_label_map(item: LabelMap) -> tuple[NDArray[np.integer], Grid]:
    """Read a segmentation as labels.

    Returns
    -------
    tuple
        Labels (X, Y, Z) and where they lie. Probabilities are numbered from 1 in the order of
        the files or volumes; 0 where none of them is the most probable.

    Raises
    ------
    ImageError
        If a file cannot be read or holds something else.
    """
    images = [_open(path) for path in item.paths]
    grid = _grid(images[0])
    if TOOLS[item.tool].probabilities and not item.paths[0].name.split('.')[0].endswith('_pveseg'):
        arrays = [_array(image, path) for image, path in zip(images, item.paths, strict=True)]
        if len(arrays) == 1:
            if arrays[0].ndim != 4:
                raise ImageError(f'{item.paths[0]}: not 4-D: give the probabilities of seg_EM')
            arrays = list(np.moveaxis(arrays[0], -1, 0))
        labels = np.zeros(arrays[0].shape, np.uint8)
        best = 1 - np.sum(arrays, axis=0, dtype=np.float32)
        if best.min() < -0.1:
            raise ImageError(
                f'{item.paths[0]}: these are no probabilities, they add up to '
                f'{1 - best.min():.3g}: give the files as {item.tool} writes them'
            )
        for number, array in enumerate(arrays, start=1):
            # Rounding must not let what is left over win.
            labels[array > best + 1e-6] = number
            best = np.maximum(best, array)
        return labels, grid
    array = _array(images[0], item.paths[0])
    if array.size != math.prod(grid.shape):
        raise ImageError(f'{item.paths[0]}: has the shape {array.shape}: give a 3-D label map')
    array = array.reshape(grid.shape)
    labels = np.rint(array).astype(np.int32)
    if array.dtype.kind == 'f' and not np.array_equal(labels, array):
        raise ImageError(f'{item.paths[0]}: not a label map, it has fractions: give the labels')
    return labels, grid


def _open(path: Path) -> Any:
    try:
        image: Any = nib.load(path)
    except Exception as error:  # nibabel and gzip raise many kinds
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
        raise ImageError(f'{path}: cannot be read ({reason}): copy or write it again') from error
    if len(image.shape) < 3 or any(length != 1 for length in image.shape[4:]):
        raise ImageError(f'{path}: has the shape {image.shape}: give a 3-D label map')
    return image


def _array(image: Any, path: Path) -> NDArray[Any]:
    try:
        return np.asanyarray(image.dataobj)
    except Exception as error:
        raise ImageError(f'{path}: the data cannot be read ({error}): copy it again') from error


def _grid(image: Any) -> Grid:
    return Grid(tuple(image.shape[:3]), np.asarray(image.affine, float))


def _same_grid(a: Grid, b: Grid, tolerance_mm: float = 0.1) -> bool:
    """Tell whether voxels lie alike: the same shape, no corner further apart than that."""
    if a.shape != b.shape:
        return False
    corners = np.array([*itertools.product(*((0, n - 1) for n in a.shape))])
    apart = (a.affine - b.affine)[:3, :3] @ corners.T + (a.affine - b.affine)[:3, 3:]
    return bool(np.linalg.norm(apart, axis=0).max() < tolerance_mm)


def to_grid(labels: NDArray[np.integer], grid: Grid, target: Grid) -> NDArray[np.integer]:
    """Bring labels onto another grid by nearest neighbour, by the headers; 0 outside."""
    step = np.linalg.inv(grid.affine) @ target.affine
    moved = ndimage.affine_transform(
        labels, step[:3, :3], step[:3, 3], target.shape, order=0, mode='constant', cval=0
    )
    return np.asarray(moved)


# ------------------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class Problem:
    """A scan that could not be compared."""

    scan: str
    model: str
    reason: str


@dataclass(frozen=True)
class Model:
    """One column: where its label maps are, and what they mean."""

    name: str
    folder: Path
    tool: str
    protocol: Protocol
    found: tuple[LabelMap, ...]


@dataclass(frozen=True)
class Case:
    """A reference, what each model made of the scan, and where both are."""

    name: str
    reference: LabelMap
    predicted: Mapping[str, LabelMap]


def evaluate(
    models: Mapping[str, Path],
    reference: Path,
    out_dir: Path,
    *,
    protocols: Mapping[str, str] = MappingProxyType({}),
    reference_protocol: str = '',
    entities: Mapping[str, str] = MappingProxyType({}),
    reference_entities: Mapping[str, str] = MappingProxyType({}),
    participants: Collection[str] = (),
    dataset: str = '',
    images: Path | None = None,
    figures: bool = True,
) -> list[Problem]:
    """Compare the segmentations of models with those of a reference; write tables and figures.

    Parameters
    ----------
    models
        Name -> folder.
    reference
        Folder of the reference's label maps.
    out_dir
        For the results.
    protocols
        Model -> one of :data:`TOOLS`, or a protocol by name or TSV; where absent, what the
        folder looks like, and that tool's protocol.
    reference_protocol
        The same of the reference.
    entities, reference_entities
        That the label maps of models and reference have to have (`suffix` is one).
    participants
        Only these, without ``sub-``.
    dataset
        Its name in the tables; by default that of the reference's folder.
    images
        A BIDS dataset with scans on the references' grids, for the background of figures.
    figures
        Whether to draw.

    Returns
    -------
    list[Problem]
        What could not be compared; the rest is complete.

    Raises
    ------
    BidsError, ProtocolError
        If a folder or protocol does not exist, or two references are of one scan.
    DataError
        If nothing could be compared.
    """
    truth = _model('reference', reference, reference_protocol, reference_entities, participants)
    columns = {
        name: _model(name, folder, protocols.get(name, ''), entities, participants)
        for name, folder in models.items()
    }
    among = common_regions(truth.protocol, {name: m.protocol for name, m in columns.items()})
    for model in columns.values():
        mine = [region_name(part) for part in among if _decides(model.protocol, part)]
        LOGGER.info(
            '%s: %d label maps of %s, protocol %s, compared in %s', model.name, len(model.found),
            model.tool, model.protocol.name, ', '.join(mine) or 'nothing',
        )  # fmt: skip
    if not among:
        names = ', '.join(model.protocol.name for model in columns.values())
        raise DataError(
            f'the protocols {names} and {truth.protocol.name} of the reference tell no region '
            'apart alike: check --protocol and --reference-protocol'
        )
    dataset = dataset or _dataset_name(reference)

    cases: list[Case] = []
    problems: list[Problem] = []
    missing: list[dict[str, str]] = []
    rows: list[Row] = []
    taken: dict[tuple[str, Path], str] = {}
    for item in _unique(truth.found):
        matched: dict[str, LabelMap] = {}
        for model in columns.values():
            try:
                suiting = _match(item, model.found)
            except (BidsError, ImageError) as error:
                problems.append(Problem(item.name, model.name, str(error)))
                continue
            if suiting is None:
                missing.append({'scan': item.name, 'model': model.name})
                continue
            other = taken.setdefault((model.name, suiting.paths[0]), item.name)
            if other == item.name:
                matched[model.name] = suiting
            else:
                reason = f'{suiting.paths[0]} is taken for {other}: give it the entities of one'
                problems.append(Problem(item.name, model.name, reason))
        if not matched:
            continue
        case, new, failed = _score_case(item, matched, truth, columns, among, dataset)
        rows += new
        problems += failed
        if case.predicted:
            cases.append(case)
            LOGGER.info('%s: %s', case.name, _brief(new))
    for problem in problems:
        LOGGER.error('%s, %s: %s', problem.scan, problem.model, problem.reason)
    if not rows:
        raise DataError(
            f'{reference}: nothing could be compared'
            + ('' if problems else ': no segmentation has the sub, ses and run of a reference')
        )
    write_tables(rows, out_dir, models=list(columns))
    drawn = _draw(cases, rows, truth, columns, out_dir, dataset, images) if figures else []
    write_json(
        out_dir / 'evaluation.json',
        {
            'GeneratedBy': {'Name': 'jointseg-evaluate', 'Version': __version__},
            'dataset': dataset,
            'reference': _provenance(truth, reference_entities),
            'models': {name: _provenance(model, entities) for name, model in columns.items()},
            'regions': {
                region_name(part): {
                    'Description': _title(region_name(part)),
                    'left_out': sorted(left_out, key=CLASSES.index),
                    'models': [n for n, m in columns.items() if _decides(m.protocol, part)],
                }
                for part, left_out in among.items()
            },
            'scans': [case.name for case in cases],
            'failed': [vars(problem) for problem in problems],
            'missing': missing,
            'figures': [path.relative_to(out_dir).as_posix() for path in drawn],
            'measures': dict(MEASURES),
        },
    )
    return problems


def _provenance(model: Model, wanted: Mapping[str, str]) -> Row:
    return {
        'folder': str(model.folder),
        'tool': model.tool,
        'protocol': model.protocol.name,
        'entities': dict(wanted),
    }


def _brief(rows: Sequence[Row]) -> str:
    """Return the mean Dice of each model on one scan, in words."""
    shared, means = _mean_dice(rows)
    words = ', '.join(f'{model} {mean:.1f}' for model, mean in means.items())
    return f'mean Dice of {", ".join(shared)}: {words}' if shared else 'scored'


def _mean_dice(rows: Sequence[Row]) -> tuple[list[str], dict[str, float]]:
    """Return the regions that all models of a scan are compared in, and each one's mean Dice."""
    dice: dict[str, dict[str, float]] = {}
    for row in rows:
        dice.setdefault(row['model'], {})[row['region']] = row['dice']
    first = next(iter(dice.values()), {})
    shared = [region for region in first if all(region in found for found in dice.values())]
    return shared, {
        model: metrics.summary([found[region] for region in shared]).mean
        for model, found in dice.items()
    }


def _model(
    name: str, folder: Path, protocol: str, wanted: Mapping[str, str], chosen: Collection[str]
) -> Model:
    tool = protocol if protocol in TOOLS and not _is_bids(folder, protocol) else ''
    tool, found = find_label_maps(folder, tool, wanted=wanted, participants=chosen)
    meaning = TOOLS[tool].protocol
    if protocol in TOOLS:
        meaning = TOOLS[protocol].protocol
    elif protocol:
        meaning = protocol_of(protocol)
    return Model(name, folder, tool, meaning, tuple(found))


def _is_bids(folder: Path, protocol: str) -> bool:
    """Tell whether labels of a tool were saved as a BIDS dataset, by fMRIPrep for instance."""
    tool = TOOLS[protocol]
    return not any(any(folder.glob(pattern)) for pattern in tool.patterns)


def _dataset_name(reference: Path) -> str:
    """Return 'X' of .../X/derivatives/Y, else the name of the folder."""
    folder = reference.resolve()
    return folder.parent.parent.name if folder.parent.name == 'derivatives' else folder.name


def _unique(found: Sequence[LabelMap]) -> list[LabelMap]:
    seen: dict[str, LabelMap] = {}
    for item in found:
        if item.name in seen:
            raise BidsError(
                f'{seen[item.name].paths[0]} and {item.paths[0]} are both of {item.name}: choose '
                'with --reference-entities, as in desc=manual'
            )
        seen[item.name] = item
    return list(seen.values())


def _match(reference: LabelMap, found: Sequence[LabelMap]) -> LabelMap | None:
    """Choose the segmentation of a reference's scan.

    No entity that both have may differ, but for those that name a segmentation. Among several,
    the reference's grid decides, then the entities that they share, then the fewest others.

    Raises
    ------
    BidsError
        If several suit alike.
    """
    own = {key: value for key, value in reference.entities.items() if key not in OWN}
    suiting = [
        item
        for item in found
        if all(item.entities.get(key, value) == value for key, value in own.items())
    ]
    if len(suiting) > 1:
        grid = _grid(_open(reference.paths[0]))
        on_it = [item for item in suiting if _same_grid(_grid(_open(item.paths[0])), grid)]
        suiting = on_it or suiting

        def rank(item: LabelMap) -> tuple[int, int]:
            theirs = item.entities.keys() - OWN
            return -len(theirs & own.keys()), len(theirs)

        best = min(map(rank, suiting))
        suiting = [item for item in suiting if rank(item) == best]
    if len(suiting) > 1:
        raise BidsError(
            f'{suiting[0].paths[0]} and {suiting[1].paths[0]} both suit '
            f'{reference.paths[0].name}: choose with --entities, as in desc=preproc or run=1'
        )
    return suiting[0] if suiting else None


def _score_case(
    item: LabelMap,
    matched: Mapping[str, LabelMap],
    truth: Model,
    columns: Mapping[str, Model],
    among: Mapping[Region, frozenset[str]],
    dataset: str,
) -> tuple[Case, list[Row], list[Problem]]:
    """Score all models on one scan; what fails is a problem, and the rest goes on."""
    rows: list[Row] = []
    problems: list[Problem] = []
    scored: dict[str, LabelMap] = {}
    try:
        labels, grid = read_label_map(item)
        wanted = _encode(truth, item, labels)
    except (ImageError, ProtocolError) as error:
        problems = [Problem(item.name, name, str(error)) for name in matched]
        return Case(item.name, item, {}), [], problems
    for name, candidate in matched.items():
        try:
            found = _read_onto(columns[name], candidate, grid, item)
        except (ImageError, ProtocolError) as error:
            problems.append(Problem(item.name, name, str(error)))
            continue
        rows += score(
            found, wanted, grid.spacing_mm, predicted=columns[name].protocol,
            reference=truth.protocol, among=among, dataset=dataset, scan=item.name, model=name,
        )  # fmt: skip
        scored[name] = candidate
    return Case(item.name, item, scored), rows, problems


def _encode(model: Model, item: LabelMap, labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    try:
        return model.protocol.encode(labels)
    except ProtocolError as error:
        raise ProtocolError(f'{item.paths[0]}: {error}') from error


def _read_onto(model: Model, item: LabelMap, grid: Grid, reference: LabelMap) -> NDArray[np.uint8]:
    """Read a segmentation as bit sets on the reference's grid.

    Raises
    ------
    ImageError
        If it lies on another grid, where it should not.
    """
    labels, own = read_label_map(item)
    if item.tool == 'freesurfer':  # conformed by design: 256 x 256 x 256 voxels of 1 mm
        labels = to_grid(labels, own, grid)
    elif not _same_grid(own, grid):
        raise ImageError(
            f'{item.paths[0]} ({_words(own)}) is not on the grid of {reference.paths[0]} '
            f'({_words(grid)}): resample its labels there by nearest neighbour, or give a '
            'reference on its own grid'
        )
    return _encode(model, item, labels)


def _words(grid: Grid) -> str:
    shape = ' x '.join(map(str, grid.shape))
    spacing = ' x '.join(f'{mm:.3g}' for mm in grid.spacing_mm)
    origin = ', '.join(f'{mm:.3g}' for mm in grid.affine[:3, 3])
    return f'{shape} voxels of {spacing} mm from {origin}'


# -------------------------------------------------------------------------------------- figures

_DRAWN = np.zeros(256, np.uint8)
for _set in range(1, 256):
    # A set is drawn as its first class, in channel order: white matter before lesion, cortex
    # before basal ganglia; what may be background is not drawn.
    _DRAWN[_set] = INDICES[(_set & -_set).bit_length() - 1]


def _draw(
    cases: Sequence[Case],
    rows: Sequence[Row],
    truth: Model,
    columns: Mapping[str, Model],
    out_dir: Path,
    dataset: str,
    images: Path | None,
) -> list[Path]:
    """Draw models side by side, where they differ from the reference, and volume agreement."""
    from bids_jointseg import figures

    folder = out_dir / 'figures'
    slug = re.sub(r'[^A-Za-z0-9]+', '', dataset) or 'dataset'
    shown = _representative(cases, rows)
    strips, differing = [], []
    over: dict[str, None] = {}
    for rank, case in shown:
        labels, grid = read_label_map(case.reference)
        sets = _encode(truth, case.reference, labels)
        found = {
            name: _read_onto(columns[name], item, grid, case.reference)
            for name, item in case.predicted.items()
        }
        scan = _background(images, case.reference, grid, 'L' in truth.protocol.sets.values())
        turned = {name: figures.upright(array, grid) for name, array in found.items()}
        wanted, upright = figures.upright(sets, grid)
        scan = None if scan is None else figures.upright(scan, grid)[0]
        lesions = truth.protocol.tells_lesions and not truth.protocol.tells_tissue
        axis = upright.thick_axis
        index = _best_slice(wanted, axis, lesions)
        shared, dice = _mean_dice([row for row in rows if row['scan'] == case.name])
        panels = [figures.Panel(_DRAWN[wanted])]
        panels += [
            figures.Panel(
                _DRAWN[turned[name][0]], words=f'mean Dice {dice[name]:.1f}' if shared else ''
            )
            if name in turned
            else figures.Panel(words='no result')
            for name in columns
        ]
        bare = [] if scan is None else [figures.Panel()]
        title = f'{case.name}   {rank}'.strip()
        strips.append(figures.Strip(title, upright, axis, index, scan, [*bare, *panels]))
        over |= dict.fromkeys(shared)
        if case is not shown[len(shown) // 2][1]:
            continue
        for name, (array, _) in turned.items():
            differs = (array & wanted) == 0
            silent = _unsaid(columns[name].protocol)
            differs &= (wanted & np.uint8(bits(ALL - silent))) != 0
            where = _thickest(differs)
            two = [figures.Panel(_DRAWN[wanted]), figures.Panel(_DRAWN[array])]
            last = figures.Panel(_DRAWN[wanted] if scan is None else None, marked=differs)
            title = f'{case.name}, {name}'
            differing.append(figures.Strip(title, upright, 0, where, scan, [*bare, *two, last]))
    image = ['Image'] if strips and len(strips[0].panels) > len(columns) + 1 else []
    drawn = [
        figures.draw_comparison(
            folder / f'{slug}_models.png', [*image, 'Reference', *columns], strips,
            text=f'{dataset}{"; Dice: mean over " * bool(over)}{", ".join(over)}. ',
        ),
        figures.draw_comparison(
            folder / f'{slug}_differences.png',
            [*image, f'Reference ({truth.protocol.name})', 'Model', 'Where they differ'],
            differing,
            text=f'{dataset}: voxels where model and reference cannot both be right. ',
        ),
    ]  # fmt: skip
    groups = _grouped(rows, list(columns))
    for region in dict.fromkeys(key[1] for key in groups):
        volumes = {
            model: (
                [row['predicted_mm3'] / 1000 for row in scans.values()],
                [row['reference_mm3'] / 1000 for row in scans.values()],
            )
            for (_, name, model), scans in groups.items()
            if name == region
        }
        path = folder / f'{slug}_agreement_{region.replace("+", "-")}.png'
        drawn.append(figures.draw_agreement(path, f'{dataset}: {_title(region)}', volumes))
    return drawn


def _representative(cases: Sequence[Case], rows: Sequence[Row]) -> list[tuple[str, Case]]:
    """Return the scans with the lowest, the median and the highest mean Dice of all models."""
    means = {}
    for case in cases:
        _, dice = _mean_dice([row for row in rows if row['scan'] == case.name])
        means[case.name] = float(np.nan_to_num(metrics.summary(list(dice.values())).mean))
    ranked = sorted(cases, key=lambda case: (means[case.name], case.name))
    last = len(ranked) - 1
    if last < 2:
        return [('', case) for case in ranked]
    chosen = zip(('lowest', 'median', 'highest'), (0, last // 2, last), strict=True)
    return [(f'{words} Dice of {len(ranked)} scans', ranked[place]) for words, place in chosen]


def _best_slice(sets: NDArray[np.uint8], axis: int, lesions: bool) -> int:
    """Return the slice with most lesion, or the one that shows most of every class there is."""
    classes = ('L',) if lesions else CLASSES[1:]
    others = tuple(k for k in range(3) if k != axis)
    total = np.zeros(sets.shape[axis])
    for name in classes:
        area = (_DRAWN[sets] == INDICES[CLASSES.index(name)]).sum(axis=others)
        if area.any():
            total += area / area.max()
    return int(total.argmax())


def _thickest(differs: NDArray[np.bool_]) -> int:
    """Return the sagittal slice with most difference that is no mere rim of one voxel."""
    for mask in (ndimage.binary_erosion(differs), differs):
        area = mask.sum(axis=(1, 2))
        if area.any():
            return int(area.argmax())
    return differs.shape[0] // 2


def _background(
    images: Path | None, reference: LabelMap, grid: Grid, lesions: bool
) -> NDArray[np.float32] | None:
    """Return a scan of the reference's subject on its grid: FLAIR first where lesions are."""
    if images is None:
        return None
    own = {key: value for key, value in reference.entities.items() if key not in (*OWN, 'space')}
    for suffix in ('FLAIR', 'T1w') if lesions else ('T1w', 'FLAIR'):
        for path in sorted(images.glob(f'sub-{own["sub"]}/**/*_{suffix}.nii*')):
            theirs = entities_of(path)
            if all(theirs.get(key, value) == value for key, value in own.items()):
                image = _open(path)
                if _same_grid(_grid(image), grid):
                    data = np.asarray(image.dataobj, np.float32).reshape(grid.shape)
                    return np.nan_to_num(data)
    LOGGER.warning('%s: no scan on its grid in %s: drawn without', reference.name, images)
    return None
