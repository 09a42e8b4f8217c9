"""The classes, and what the labels of each annotation protocol say about them.

Labels ``y = y^t + y^l`` split into six tissue classes and one lesion class, disjoint, with
background 0 (Dorent et al., MIDL 2019). No dataset annotates all of them, so a protocol maps
every source label to a *set* of our classes: a lesion mask's 0 says 'anything but a lesion',
a tissue-only protocol's white matter on a patient says 'white matter or lesion'. The losses
follow from the sets alone.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Label:
    """One class: its value in a segmentation, its BIDS names, and its place in BIDS' `mapping`."""

    index: int
    abbreviation: str
    name: str
    color: str
    mapping: int


# BIDS' common indices, plus one (7). Colours keep their order of lightness in gray scale and
# stay apart under the common colour-vision deficiencies (after Okabe and Ito, 2008).
LABELS = (
    Label(0, 'BG', 'Background', '#000000', 0),
    Label(2, 'WM', 'White matter', '#f0e6c8', 2),
    Label(7, 'L', 'White-matter lesion', '#d55e00', 7),
    Label(8, 'CGM', 'Cortical gray matter', '#0072b2', 8),
    Label(9, 'SGM', 'Basal ganglia', '#009e73', 9),
    Label(10, 'BS', 'Brainstem', '#cc79a7', 10),
    Label(11, 'CBM', 'Cerebellum', '#56b4e9', 11),
    Label(12, 'VEN', 'Ventricles', '#f0e442', 3),
)

CLASSES = tuple(label.abbreviation for label in LABELS)
"""Channel order of every array of probabilities."""

INDICES = np.array([label.index for label in LABELS], dtype=np.uint8)
"""Value in a segmentation of each channel."""

TISSUES = tuple(name for name in CLASSES if name not in ('BG', 'L'))

ALL = frozenset(CLASSES)
"""The set of all classes: a label that maps to it says nothing, it is ignored."""

IGNORE = ALL


class ProtocolError(ValueError):
    """A protocol cannot be used, or a label map does not follow it; one line that says where."""


@dataclass(frozen=True)
class Protocol:
    """What each source label of an annotation says: the set of classes that it may be.

    Attributes
    ----------
    name
        The protocol's name, as a recipe gives it.
    sets
        Source label -> set of classes; :data:`IGNORE` says nothing.
    """

    name: str
    sets: Mapping[int, frozenset[str]]

    def atoms(self) -> tuple[frozenset[str], ...]:
        """Return the finest distinctions that the annotation makes.

        The coarsest partition of :data:`CLASSES` of which every set of the protocol is a union
        of parts: classes that appear in the same sets are one atom, and so are those that appear
        in none. What is ignored makes no distinction. In channel order of their first members.
        """
        found = [group for group in set(self.sets.values()) if group != IGNORE]
        atoms: dict[frozenset[frozenset[str]], list[str]] = {}
        for name in CLASSES:
            atoms.setdefault(frozenset(group for group in found if name in group), []).append(name)
        return tuple(map(frozenset, atoms.values()))

    @property
    def tells_lesions(self) -> bool:
        """Whether a label says 'lesion' and nothing else."""
        return frozenset({'L'}) in self.sets.values()

    @property
    def tells_tissue(self) -> bool:
        """Whether the annotation tells classes apart beside the lesions."""
        return tells_tissue(self.atoms())

    def restricted(self, tells: Iterable[str]) -> Protocol:
        """Return the protocol of someone who is told nothing but some of the classes apart.

        With the hidden classes ``H = CLASSES - tells``, a set `S` that meets `H` becomes
        ``S | H``. So `tells = {'L'}` makes a lesion mask of a full annotation, and to hide the
        lesions is to name neither 'L' nor what they lie in, 'WM': one class alone is told apart
        by all the others.

        Raises
        ------
        ProtocolError
            If there is no such class, or a single class would be hidden.
        """
        told = frozenset(tells)
        if told - ALL:
            raise ProtocolError(_unknown_classes(told - ALL))
        hidden = ALL - told
        if len(hidden) == 1:
            (name,) = hidden
            raise ProtocolError(
                f'all classes but {name} tell {name} apart as well: '
                'leave out another that it is to be confused with'
            )
        sets = {
            value: group | hidden if group & hidden else group
            for value, group in self.sets.items()
        }
        return Protocol(self.name, MappingProxyType(sets))

    def encode(self, label_map: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Replace source labels by the bit set of classes that each may be.

        Parameters
        ----------
        label_map
            Source labels, any shape.

        Returns
        -------
        NDArray[np.uint8]
            Same shape; bit `c` is set where the voxel may be of class ``CLASSES[c]``.

        Raises
        ------
        ProtocolError
            If a label is not listed: an unknown label is never silently background.
        """
        present = np.unique(label_map)
        unknown = [int(value) for value in present if int(value) not in self.sets]
        if unknown:
            raise ProtocolError(
                f'labels {unknown} are not in the protocol {self.name!r}: '
                'list them, as a set of classes or as ignore'
            )
        table = np.array([bits(self.sets[int(value)]) for value in present], dtype=np.uint8)
        return np.asarray(table[np.searchsorted(present, label_map)], dtype=np.uint8)


def tells_tissue(groups: Iterable[frozenset[str]]) -> bool:
    """Return whether some groups tell more apart than lesions from the rest."""
    return sum(group != {'L'} for group in groups) > 1


def bits(group: Iterable[str]) -> int:
    """Return the bit set of some classes: bit `c` stands for ``CLASSES[c]``."""
    return sum(1 << CLASSES.index(name) for name in group)


def _unknown_classes(names: Iterable[str]) -> str:
    unknown = ', '.join(map(repr, sorted(names)))
    return f'no such class: {unknown}; choose from {", ".join(CLASSES)}'


def _sets(
    table: Mapping[str, Iterable[int]], ignore: Iterable[int] = ()
) -> Mapping[int, frozenset[str]]:
    """Return source label -> set, from class -> source labels."""
    sets = {value: frozenset({name}) for name, values in table.items() for value in values}
    sets.update(dict.fromkeys(ignore, IGNORE))
    return MappingProxyType(dict(sorted(sets.items())))


_NEUROMORPHOMETRICS = {
    'WM': (44, 45),
    'CGM': (31, 32, 47, 48, *range(100, 208)),
    'SGM': (23, 30, 36, 37, *range(55, 61), 75, 76),
    'BS': (35, 61, 62),
    'CBM': (*range(38, 42), 71, 72, 73),
    'VEN': (4, 11, 15, 49, 50, 51, 52),
}

_FREESURFER = {
    'WM': (2, 41, *range(251, 256)),
    'L': (25, 57, 77, 78, 79),
    'CGM': (3, 42, 17, 18, 53, 54, *range(1000, 1036), *range(2000, 2036)),
    'SGM': (10, 11, 12, 13, 26, 49, 50, 51, 52, 58),
    'BS': (16, 28, 60),
    'CBM': (7, 8, 46, 47),
    'VEN': (4, 5, 14, 15, 43, 44, 72),
}

# All that the skull holds: the fluid around the brain, vessels and chiasm are fluid as well.
_INTRACRANIAL = _FREESURFER | {'VEN': (*_FREESURFER['VEN'], 24, 30, 62, 85)}

# NiftySeg's Geodesical Information Flows (Cardoso et al., 2015), version 3 as NiftyWeb writes it
# (labels_v3.xml; checked against two transcriptions of it). Most numbers are Neuromorphometrics'
# plus one; the pons (35) and the posterior part of the third ventricle (47) have their own, and
# white matter is parcelled (81-94; whole in version 2: 45, 46). Claustrum, lining of the
# ventricles, perivascular spaces ('vessel'), 'lesion' and 'cerebral exterior' have no class that
# they are for certain, so they say nothing.
_GIF = {
    'BG': (0, 1, 2, 3, 4, 70),
    'WM': (45, 46, *range(81, 88), *range(89, 95)),
    'CGM': (32, 33, 48, 49, *range(101, 209)),
    'SGM': (24, 31, 37, 38, *range(56, 62), 76, 77),
    'BS': (35, 36, 62, 63),
    'CBM': (*range(39, 43), 72, 73, 74),
    'VEN': (5, 12, 16, 47, 50, 51, 52, 53),
}
_GIF_IGNORED = (43, 44, 54, 55, 64, 65, 66, 67, 96, 97)


def _with_background(table: dict[str, tuple[int, ...]], last: int) -> dict[str, tuple[int, ...]]:
    taken = {value for values in table.values() for value in values}
    return table | {'BG': tuple(value for value in range(last + 1) if value not in taken)}


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            # Our own; 255 where a reference says nothing.
            Protocol(
                'jointseg',
                _sets({label.abbreviation: (label.index,) for label in LABELS}, ignore=(255,)),
            ),
            # Tissue of lesion-free controls: white matter is white matter.
            Protocol('neuromorphometrics', _sets(_with_background(_NEUROMORPHOMETRICS, 207))),
            # 136, 137, 163 and 164 are choroid plexus or hidden tissue beside the ventricles, 31
            # and 63 choroid plexus within them, 80-82 dark spots in gray matter: what they should
            # be called is unsettled, but it is not background, so they say nothing.
            *(
                Protocol(
                    name,
                    _sets(
                        _with_background(table, 2035),
                        ignore=(31, 63, 80, 81, 82, 136, 137, 163, 164),
                    ),
                )
                for name, table in (('freesurfer', _FREESURFER), ('intracranial', _INTRACRANIAL))
            ),
            Protocol('gif', _sets(_GIF, ignore=_GIF_IGNORED)),
            Protocol(
                'mrbrains18',
                _sets(
                    {
                        'BG': (0, 5),
                        'CGM': (1,),
                        'SGM': (2,),
                        'WM': (3,),
                        'L': (4,),
                        'VEN': (6,),
                        'CBM': (7,),
                        'BS': (8,),
                    },
                    ignore=(9, 10),
                ),
            ),
            Protocol('wmh2017', MappingProxyType({0: ALL - {'L'}, 1: frozenset('L'), 2: IGNORE})),
            Protocol('binary-lesion', MappingProxyType({0: ALL - {'L'}, 1: frozenset('L')})),
        )
    }
)


def read_protocol(path: str | Path) -> Protocol:
    """Read a protocol of one's own.

    Parameters
    ----------
    path
        Tab-separated, with a heading. `index` is the source label; `classes` the classes that it
        may be, separated by spaces ('WM', 'WM L'), or 'ignore'. Other columns are for the
        reader.

    Raises
    ------
    ProtocolError
        If it cannot be read, lacks a column, or has a line that says no such thing.
    """
    path = Path(path)
    try:
        with path.open(encoding='utf-8-sig', newline='') as file:
            reader = csv.DictReader(file, delimiter='\t')
            columns = reader.fieldnames or ()
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise ProtocolError(f'{path}: cannot read the protocol ({error.strerror})') from error
    except (ValueError, csv.Error) as error:
        raise ProtocolError(f'{path}: not a tab-separated table ({error})') from error
    missing = [name for name in ('index', 'classes') if name not in columns]
    if missing:
        raise ProtocolError(
            f'{path}: no column {" and no ".join(missing)}: the heading has to name index and '
            'classes, with tabs between the columns'
        )
    sets: dict[int, frozenset[str]] = {}
    for line, row in rows:
        value, names = (row['index'] or '').strip(), (row['classes'] or '').split()
        where = f'{path}, line {line}'
        if not value.isdecimal():
            raise ProtocolError(f'{where}: index is {value!r}: give a whole number from 0')
        if int(value) in sets:
            raise ProtocolError(f'{where}: label {value} is there twice: keep one of the lines')
        if not names:
            raise ProtocolError(f'{where}: label {value} has no classes: name them, or ignore')
        if names != ['ignore'] and set(names) - ALL:
            unknown = _unknown_classes(set(names) - ALL)
            raise ProtocolError(f'{where}: {unknown}, or give ignore alone')
        sets[int(value)] = IGNORE if names == ['ignore'] else frozenset(names)
    if not sets:
        raise ProtocolError(f'{path}: no label is listed')
    return Protocol(path.name.split('.', maxsplit=1)[0], MappingProxyType(sets))


def protocol(name_or_path: str | Path, folder: Path | None = None) -> Protocol:
    """Return a protocol by its name in :data:`PROTOCOLS`, or from a table of one's own.

    Parameters
    ----------
    name_or_path
        A name, or a file for :func:`read_protocol`.
    folder
        What relative paths start from, by default the current folder.

    Raises
    ------
    ProtocolError
        If there is neither such a name nor such a file.
    """
    if str(name_or_path) in PROTOCOLS:
        return PROTOCOLS[str(name_or_path)]
    if not str(name_or_path).endswith('.tsv'):
        known = ', '.join(PROTOCOLS)
        raise ProtocolError(
            f'no protocol {str(name_or_path)!r}: choose from {known}, or give a table (.tsv)'
        )
    return read_protocol((folder or Path()) / name_or_path)
