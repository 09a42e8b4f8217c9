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
    Protocol,
    ProtocolError,
    bits,
    protocol,
    read_protocol,
)


def test_background_is_never_the_basal_ganglia():
    assert dict(zip(CLASSES, INDICES.tolist(), strict=True)) == {
        'BG': 0, 'WM': 2, 'L': 7, 'CGM': 8, 'SGM': 9, 'BS': 10, 'CBM': 11, 'VEN': 12,
    }  # fmt: skip
    assert TISSUES == ('WM', 'CGM', 'SGM', 'BS', 'CBM', 'VEN')


@pytest.mark.parametrize(
    ('name', 'source', 'expected'),
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
        ('freesurfer', 31, IGNORE),
        ('gif', 4, {'BG'}),
        ('gif', 70, {'BG'}),
        ('gif', 24, {'SGM'}),
        ('gif', 61, {'SGM'}),
        ('gif', 77, {'SGM'}),
        ('gif', 35, {'BS'}),
        ('gif', 63, {'BS'}),
        ('gif', 74, {'CBM'}),
        ('gif', 33, {'CGM'}),
        ('gif', 49, {'CGM'}),
        ('gif', 208, {'CGM'}),
        ('gif', 87, {'WM'}),
        ('gif', 94, {'WM'}),
        ('gif', 47, {'VEN'}),
        ('gif', 53, {'VEN'}),
        ('gif', 64, IGNORE),
        ('gif', 97, IGNORE),
        ('mrbrains18', 5, {'BG'}),
        ('mrbrains18', 9, IGNORE),
        ('wmh2017', 0, ALL - {'L'}),
        ('wmh2017', 2, IGNORE),
        ('binary-lesion', 1, {'L'}),
    ],
)
def test_protocols_say_what_the_source_label_may_be(name, source, expected):
    assert PROTOCOLS[name].sets[source] == expected


def test_gif_is_neuromorphometrics_plus_one_but_for_what_it_adds():
    gif, manual = PROTOCOLS['gif'].sets, PROTOCOLS['neuromorphometrics'].sets
    differ = {value for value in gif if value - 1 in manual and gif[value] != manual[value - 1]}
    # cerebral exterior, third ventricle, lesion, vessel, lining; parcelled white matter, claustrum
    white = {*range(81, 88), *range(89, 95)}
    assert differ == {35, 43, 44, 47, 54, 55, 64, 65, 66, 67, 96, 97} | white


def test_encode_gives_bit_sets():
    encoded = PROTOCOLS['wmh2017'].encode(np.array([[0, 1], [2, 1]]))
    assert encoded.tolist() == [[0b11111011, 0b100], [0b11111111, 0b100]]
    assert bits({'BG', 'L'}) == 0b101


def test_an_unknown_label_is_an_error_and_never_background():
    with pytest.raises(ProtocolError, match=r'\[7, 9\].*binary-lesion'):
        PROTOCOLS['binary-lesion'].encode(np.array([0, 1, 7, 9]))


def sets(*groups: str) -> list[set[str]]:
    """Write sets of classes short: 'WM L' is {'WM', 'L'}."""
    return [set(group.split()) for group in groups]


def of(table: dict[int, str]) -> Protocol:
    return Protocol('x', {value: frozenset(names.split()) for value, names in table.items()})


SINGLE = ('BG', 'WM', 'L', 'CGM', 'SGM', 'BS', 'CBM', 'VEN')


@pytest.mark.parametrize(
    ('given', 'atoms', 'lesions', 'tissue'),
    [
        (PROTOCOLS['jointseg'], SINGLE, True, True),
        (PROTOCOLS['mrbrains18'], SINGLE, True, True),
        # nobody says that there are no lesions: L is in no set, so alone
        (PROTOCOLS['neuromorphometrics'], SINGLE, False, True),
        (PROTOCOLS['wmh2017'], ('BG WM CGM SGM BS CBM VEN', 'L'), True, False),
        (PROTOCOLS['binary-lesion'], ('BG WM CGM SGM BS CBM VEN', 'L'), True, False),
        # overlapping sets: {WM, L} and {L} tell WM and L apart, {CGM, SGM} stays together
        (
            of({0: 'BG BS CBM VEN', 1: 'WM L', 2: 'CGM SGM', 3: 'L'}),
            ('BG BS CBM VEN', 'WM', 'L', 'CGM SGM'),
            True,
            True,
        ),
        # tissue drawn on patients
        (
            of({0: 'BG BS CBM VEN', 1: 'WM L', 2: 'CGM SGM'}),
            ('BG BS CBM VEN', 'WM L', 'CGM SGM'),
            False,
            True,
        ),
        # the classes in no set are one atom
        (of({1: 'WM', 2: 'CGM'}), ('BG L SGM BS CBM VEN', 'WM', 'CGM'), False, True),
        (Protocol('x', {0: IGNORE}), (' '.join(SINGLE),), False, False),
    ],
)
def test_atoms_are_what_an_annotation_tells_apart(given, atoms, lesions, tissue):
    assert list(given.atoms()) == sets(*atoms)
    assert (given.tells_lesions, given.tells_tissue) == (lesions, tissue)
    assert set().union(*given.atoms()) == ALL
    for group in set(given.sets.values()) - {IGNORE}:
        assert all(atom <= group or not atom & group for atom in given.atoms())


def test_a_restricted_protocol_tells_nothing_else():
    full = PROTOCOLS['mrbrains18']
    lesions = full.restricted(['L'])
    assert set(lesions.sets.values()) == {frozenset('L'), ALL - {'L'}, IGNORE}
    assert lesions.sets[9] == IGNORE
    assert lesions.encode(np.array([3, 4])).tolist() == [0b11111011, 0b100]
    tissue = full.restricted(['BG', 'CGM', 'SGM', 'BS', 'CBM', 'VEN'])
    assert tissue.sets[3] == tissue.sets[4] == {'WM', 'L'}
    assert tissue.sets[1] == {'CGM'}
    assert (tissue.tells_lesions, tissue.tells_tissue) == (False, True)
    assert full.restricted(CLASSES).sets == full.sets
    with pytest.raises(ProtocolError, match=r"no such class: 'GM'; choose from BG, WM, L"):
        full.restricted(['GM'])
    with pytest.raises(ProtocolError, match='all classes but L tell L apart'):
        full.restricted(set(CLASSES) - {'L'})


def test_a_protocol_of_ones_own(tmp_path):
    path = tmp_path / 'mine.tsv'
    path.write_text(
        'index\tname\tclasses\n0\tRest\tBG\n3\tWhite\tWM L\n7\tUnsure\tignore\n', 'utf-8'
    )
    found = protocol('mine.tsv', tmp_path)
    assert found.name == 'mine'
    assert dict(found.sets) == {0: {'BG'}, 3: {'WM', 'L'}, 7: IGNORE}
    assert protocol('wmh2017', tmp_path) is PROTOCOLS['wmh2017']
    assert dict(protocol(path).sets) == dict(found.sets)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('index\tlabel\n1\tWM\n', 'no column classes'),
        ('index,classes\n1,WM\n', 'no column index and no classes.*with tabs'),
        ('', 'no column index'),
        ('index\tclasses\n', 'no label is listed'),
        ('index\tclasses\n1\tWM\n2\tGM\n', r"line 3: no such class: 'GM'; choose from BG, WM"),
        ('index\tclasses\n1\tWM ignore\n', "line 2: no such class: 'ignore'.*ignore alone"),
        ('index\tclasses\n1\tWM\n1\tBG\n', 'line 3: label 1 is there twice'),
        ('index\tclasses\n1\t\n', 'line 2: label 1 has no classes'),
        ('index\tclasses\n1\n', 'line 2: label 1 has no classes'),
        ('index\tclasses\n1.5\tWM\n', r"line 2: index is '1\.5'"),
        ('index\tclasses\n-1\tWM\n', "line 2: index is '-1'"),
    ],
)
def test_a_bad_protocol_is_named(tmp_path, text, message):
    path = tmp_path / 'mine.tsv'
    path.write_text(text, 'utf-8')
    with pytest.raises(ProtocolError, match=rf'mine\.tsv\S* ?.*{message}') as caught:
        read_protocol(path)
    assert '\n' not in str(caught.value)


def test_a_missing_protocol_is_named(tmp_path):
    with pytest.raises(ProtocolError, match=r"no protocol 'aal': choose from jointseg,.*\.tsv"):
        protocol('aal')
    with pytest.raises(ProtocolError, match=r'none\.tsv: cannot read the protocol \(No such'):
        protocol('none.tsv', tmp_path)
