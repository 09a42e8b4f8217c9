"""The label table and the protocols."""

import numpy as np
import pytest

from bids_jointseg.labels import (
    ALL,
    CLASSES,
    IGNORE,
    INDICES,
    PROTOCOLS,
    TISSUES,
    ProtocolError,
    bits,
)


def test_background_is_never_the_basal_ganglia():
    assert dict(zip(CLASSES, INDICES.tolist(), strict=True)) == {
        'BG': 0, 'WM': 2, 'L': 7, 'CGM': 8, 'SGM': 9, 'BS': 10, 'CBM': 11, 'VEN': 12,
    }  # fmt: skip
    assert TISSUES == ('WM', 'CGM', 'SGM', 'BS', 'CBM', 'VEN')


@pytest.mark.parametrize(
    ('protocol', 'source', 'expected'),
    [
        ('neuromorphometrics', 44, {'WM'}),
        ('neuromorphometrics', 207, {'CGM'}),
        ('neuromorphometrics', 62, {'BS'}),
        ('neuromorphometrics', 46, {'BG'}),
        ('freesurfer', 77, {'L'}),
        ('freesurfer', 72, {'VEN'}),
        ('freesurfer', 28, {'BS'}),
        ('freesurfer', 2035, {'CGM'}),
        ('freesurfer', 24, {'BG'}),
        ('freesurfer', 136, IGNORE),
        ('mrbrains18', 5, {'BG'}),
        ('mrbrains18', 9, IGNORE),
        ('wmh2017', 0, ALL - {'L'}),
        ('wmh2017', 2, IGNORE),
        ('binary-lesion', 1, {'L'}),
    ],
)
def test_protocols_say_what_the_source_label_may_be(protocol, source, expected):
    assert PROTOCOLS[protocol].sets[source] == expected


def test_encode_gives_bit_sets():
    encoded = PROTOCOLS['wmh2017'].encode(np.array([[0, 1], [2, 1]]))
    assert encoded.tolist() == [[0b11111011, 0b100], [0b11111111, 0b100]]
    assert bits({'BG', 'L'}) == 0b101


def test_an_unknown_label_is_an_error_and_never_background():
    with pytest.raises(ProtocolError, match=r'\[7, 9\].*binary-lesion'):
        PROTOCOLS['binary-lesion'].encode(np.array([0, 1, 7, 9]))


def test_groups_are_disjoint():
    for protocol in PROTOCOLS.values():
        groups = protocol.groups()
        assert sum(len(group) for group in groups) == len(frozenset().union(*groups))
