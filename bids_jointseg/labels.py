"""The classes, and what the labels of each annotation protocol say about them.

Labels ``y = y^t + y^l`` split into six tissue classes and one lesion class, disjoint, with
background 0 (Dorent et al., MIDL 2019). No dataset annotates all of them, so a protocol maps
every source label to a *set* of our classes: a lesion mask's 0 says 'anything but a lesion',
a tissue-only protocol's white matter on a patient says 'white matter or lesion'. The losses
follow from the sets alone.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """A label map does not follow its protocol; one line that names the labels."""


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

    def groups(self) -> tuple[frozenset[str], ...]:
        """Return the distinct sets that are not ignored, in channel order of their members."""
        found = {group for group in self.sets.values() if group != IGNORE}
        return tuple(sorted(found, key=lambda group: sorted(map(CLASSES.index, group))))

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


def bits(group: Iterable[str]) -> int:
    """Return the bit set of some classes: bit `c` stands for ``CLASSES[c]``."""
    return sum(1 << CLASSES.index(name) for name in group)


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


def _with_background(table: dict[str, tuple[int, ...]], last: int) -> dict[str, tuple[int, ...]]:
    taken = {value for values in table.values() for value in values}
    return table | {'BG': tuple(value for value in range(last + 1) if value not in taken)}


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol('jointseg', _sets({label.abbreviation: (label.index,) for label in LABELS})),
            # Tissue of lesion-free controls: white matter is white matter.
            Protocol('neuromorphometrics', _sets(_with_background(_NEUROMORPHOMETRICS, 207))),
            # 136, 137, 163 and 164 are choroid plexus or hidden tissue beside the ventricles:
            # what they should be called is unsettled, so they say nothing.
            Protocol(
                'freesurfer',
                MappingProxyType(
                    dict(_sets(_with_background(_FREESURFER, 2035)))
                    | dict.fromkeys((136, 137, 163, 164), IGNORE)
                ),
            ),
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
