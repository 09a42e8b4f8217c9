"""Change between sessions: what was made to change is found, and noise is not called change."""

import csv
import json
import math
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from conftest import describe_dataset
from PIL import Image
from scipy import ndimage

from bids_jointseg import bids, cli, figures, longitudinal, reports
from bids_jointseg.config import Settings
from bids_jointseg.image import Grid, ImageError, Volume
from bids_jointseg.longitudinal import Segmentation, compare_lesions, compare_volumes

IDENTITY = np.eye(4)
LESIONS = {'a': ((-25, 20, 18), 6.0), 'b': ((24, -18, 16), 5.0), 'c': ((-22, -30, 10), 3.0)}
"""Centres (RAS mm) and radii (mm)."""


def rigid(degrees=(0, 0, 0), shift=(0, 0, 0)):
    """Turn about x, then y, then z, and shift."""
    matrix = np.eye(4)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        first, second = [other for other in range(3) if other != axis]
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix[:3, :3] = turn @ matrix[:3, :3]
    matrix[:3, 3] = shift
    return matrix


MOVED = rigid((4, -3, 6), (3.3, -2.4, 4.7))
"""From where the head is at first to where it is then, RAS mm."""


def grid_of(code='RAS', spacing=(2.0, 2.0, 2.0), turn=IDENTITY, size=(150, 180, 140)):
    """Return a grid around the origin with these axes."""
    signs = {'R': 1, 'A': 1, 'S': 1, 'L': -1, 'P': -1, 'I': -1}
    axes = np.diag([signs[letter] for letter in code])
    shape = tuple(int(length // step) for length, step in zip(size, spacing, strict=True))
    affine = np.eye(4)
    affine[:3, :3] = turn[:3, :3] @ axes * spacing
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return Grid(shape, affine)


def head(grid, lesions=LESIONS, *, place=IDENTITY, seed=0, noise=4.0):
    """Return a FLAIR, its labels and the probability of lesion; `place` moves the head."""
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing='ij'), -1)
    points = voxels @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    back = np.linalg.inv(place)
    points = points @ back[:3, :3].T + back[:3, 3]
    x, y, z = np.moveaxis(points, -1, 0)

    def inside(radii, centre=(0, 0, 0)):
        return np.linalg.norm((points - centre) / radii, axis=-1)

    labels = np.zeros(grid.shape, np.uint8)
    labels[inside((58, 74, 54)) < 1] = 8
    labels[inside((50, 65, 46)) < 1] = 2
    labels[inside((15, 12, 10), (0, 8, 0)) < 1] = 9
    labels[(inside((22, 26, 12), (0, -8, 6)) < 1) & (np.abs(x) > 3)] = 12
    labels[(inside((40, 28, 20), (0, -40, -32)) < 1) & (labels > 0)] = 11
    labels[(np.hypot(x, y + 18) < 9) & (z < -20) & (labels > 0)] = 10
    probability = np.zeros(grid.shape, np.float32)
    for centre, radius in lesions.values():
        distance = np.linalg.norm(points - centre, axis=-1)
        soft = np.clip(0.5 + (radius - distance) / 4, 0, 1).astype(np.float32)
        probability = np.maximum(probability, soft)
    labels[(probability > 0.5) & (labels > 0)] = 7
    means = np.zeros(13, np.float32)
    means[[0, 2, 7, 8, 9, 10, 11, 12]] = 20, 100, 180, 130, 120, 95, 125, 30
    data = means[labels]
    data[(labels == 0) & (inside((70, 86, 66)) < 1) & (inside((64, 80, 60)) > 1)] = 90
    data = data + np.random.default_rng(seed).normal(0, noise, grid.shape)
    return Volume(np.abs(data).astype(np.float32), grid), labels, probability


def found(lesions, **options):
    grid = options.pop('grid', grid_of(spacing=(1.0, 1.0, 1.0), size=(80, 80, 44)))
    scan, labels, probability = head(grid, lesions, **options)
    return Segmentation(labels, grid, probability, scan.data)


def classes(rows):
    return sorted(row['change'] for row in rows)


# --- volumes ------------------------------------------------------------------------------------


def test_the_interval_of_a_change_is_in_quadrature():
    change = longitudinal.change_interval((100, 97, 103), (110, 106, 114))
    assert change == (10, 5, 15)
    uneven = longitudinal.change_interval((100, 97, 103), (110, 106, 122))
    assert uneven == pytest.approx((10, 5, 10 + math.hypot(12, 3)))


def test_what_changed_and_what_is_not_known():
    unknown = (50.0, math.nan, math.nan)
    before = {'WM': (100.0, 97.0, 103.0), 'L': (0.0, 0.0, 2.0), 'VEN': unknown, 'BS': (9, 8, 10)}
    after = {'WM': (104.0, 101.0, 107.0), 'L': (9.0, 7.0, 11.0), 'VEN': unknown}
    rows = {row['name']: row for row in compare_volumes(before, after)}
    assert {name: row['changed'] for name, row in rows.items()} == {
        'WM': 'no',
        'L': 'yes',
        'VEN': 'n/a',
    }
    assert rows['VEN']['change_mm3'] == 0
    assert rows['VEN']['low_mm3'] == rows['L']['change_percent'] == 'n/a'
    assert rows['WM']['change_percent'] == 4
    unlike = compare_volumes(before, after, alike=False)
    assert {row['changed'] for row in unlike} == {'n/a'}
    assert set(unlike[0]) == set(longitudinal.VOLUME_COLUMNS) - {'since'}


# --- lesions ------------------------------------------------------------------------------------


def test_nothing_changes_between_a_scan_and_itself():
    one = found(LESIONS)
    rows = compare_lesions(one, one, IDENTITY)
    assert classes(rows) == ['stable'] * 3
    assert {row['change_mm3'] for row in rows} == {0}
    assert [row['before_lesions'] for row in rows] == ['1', '2', '3']


CHANGED = [
    ({'d': ((30, 25, 10), 3.0)}, {}, 'new'),
    ({}, {'d': ((30, 25, 10), 3.0)}, 'resolved'),
    ({'d': ((30, 25, 10), 6.0)}, {'d': ((30, 25, 10), 4.0)}, 'enlarged'),
    ({'d': ((30, 25, 10), 4.0)}, {'d': ((30, 25, 10), 6.0)}, 'shrunk'),
    # A quarter of a voxel all around is nothing.
    ({'d': ((30, 25, 10), 5.25)}, {'d': ((30, 25, 10), 5.0)}, 'stable'),
    # Beside an old lesion there is growth, not a new lesion.
    ({'d': ((30, 25, 10), 4.0), 'e': ((30, 33, 10), 4.0)}, {'d': ((30, 25, 10), 4.0)}, 'enlarged'),
    # Smaller than a ball of 3 mm.
    ({'d': ((30.5, 25.5, 10.5), 1.3)}, {}, 'unclear'),
    ({}, {'d': ((30.5, 25.5, 10.5), 1.3)}, 'unclear'),
]


@pytest.mark.parametrize(('after', 'before', 'change'), CHANGED)
def test_what_was_made_to_change_is_found(after, before, change):
    earlier, later = found(LESIONS | before), found(LESIONS | after)
    rows = compare_lesions(earlier, later, IDENTITY)
    assert classes(rows) == sorted([change, 'stable', 'stable', 'stable'])
    row = next(row for row in rows if row['x_mm'] > 26)
    assert row['change'] == change
    assert (row['x_mm'], row['z_mm']) == pytest.approx((30, 10), abs=1)
    assert row['change_mm3'] == pytest.approx(row['after_mm3'] - row['before_mm3'])


OPPOSITE = {'new': 'resolved', 'resolved': 'new', 'enlarged': 'shrunk', 'shrunk': 'enlarged'}


@pytest.mark.parametrize(('after', 'before', 'change'), CHANGED)
def test_the_order_of_the_scans_does_not_matter(after, before, change):
    earlier, later = found(LESIONS | before), found(LESIONS | after)
    there = compare_lesions(earlier, later, MOVED)
    back = compare_lesions(later, earlier, np.linalg.inv(MOVED))
    assert classes(there) == sorted(OPPOSITE.get(name, name) for name in classes(back))


@pytest.mark.parametrize('code', ['RAS', 'LAS', 'LPI'])
@pytest.mark.parametrize('oblique', [False, True])
def test_a_moved_head_on_another_grid_has_not_changed(code, oblique):
    turn = rigid((12, 5, -8)) if oblique else IDENTITY
    grid = grid_of(code, (0.9, 0.9, 1.5), turn, size=(90, 100, 70))
    earlier, later = found(LESIONS), found(LESIONS, grid=grid, place=MOVED)
    rows = compare_lesions(earlier, later, np.linalg.inv(MOVED))
    assert classes(rows) == ['stable'] * 3
    centres = [MOVED @ (*centre, 1) for centre, _ in LESIONS.values()]
    for row in rows:
        own = np.array([row['x_mm'], row['y_mm'], row['z_mm']])
        assert min(np.linalg.norm(own - centre[:3]) for centre in centres) < 0.5


@pytest.mark.parametrize('seed', range(3))
def test_a_noisy_copy_has_not_changed(seed):
    """Smooth noise moves boundaries by half a voxel, and makes specks that come and go."""
    random = np.random.default_rng(seed)
    copies = []
    for place in (IDENTITY, MOVED):
        grid = grid_of(spacing=(1.0, 1.0, 1.5), size=(90, 100, 70))
        clean = found(LESIONS, grid=grid, place=place)
        noise = ndimage.gaussian_filter(random.normal(size=grid.shape), 1.0)
        probability = np.clip(clean.probability + 0.13 * noise / noise.std(), 0, 1)
        labels = np.where(clean.labels == 7, 2, clean.labels)
        labels[(probability > 0.5) & (labels == 2)] = 7
        copies.append(Segmentation(labels, grid, probability))
    assert (copies[0].labels == 7).sum() != (copies[1].labels == 7).sum()
    rows = compare_lesions(*copies, np.linalg.inv(MOVED))
    assert set(classes(rows)) <= {'stable', 'unclear'}
    assert classes(rows).count('stable') == 3


def test_a_registration_that_is_a_millimetre_wrong_is_no_change():
    one = found(LESIONS)
    wrong = rigid(shift=(0.6, -0.6, 0.5))
    assert classes(compare_lesions(one, one, wrong)) == ['stable'] * 3


def test_lesions_that_merge_or_fall_apart_are_one():
    parts = {'d': ((28, 20, 10), 4.0), 'e': ((28, 30, 10), 4.0)}
    whole = parts | {'bridge': ((28, 25, 10), 2.5)}
    rows = compare_lesions(found(parts), found(whole), IDENTITY)
    assert [row['change'] for row in rows] == ['stable']
    assert (rows[0]['before_lesions'], rows[0]['after_lesions']) == ('1 2', '1')


def test_a_lesion_that_was_nearly_one_before_is_not_new():
    with_it, without = found(LESIONS | {'d': ((30, 25, 10), 3.0)}), found(LESIONS)
    doubtful = without.probability + 0.45 * with_it.probability * (without.probability < 0.1)
    before = Segmentation(without.labels, without.grid, doubtful)
    assert classes(compare_lesions(before, with_it, IDENTITY))[-1] == 'unclear'
    assert 'new' in classes(compare_lesions(without, with_it, IDENTITY))
    # Without probabilities, the labels alone decide.
    bare = Segmentation(without.labels, without.grid), Segmentation(with_it.labels, with_it.grid)
    assert 'new' in classes(compare_lesions(*bare, IDENTITY))


def test_what_the_flair_showed_before_is_not_new():
    """A coil lets the network see one scan's lesion and miss the other's: the scans are alike."""
    both = LESIONS | {'d': ((30, 25, 10), 4.0)}
    later, scan = found(both), found(both, seed=1)
    x = np.linspace(-1, 1, scan.labels.shape[0])[:, None, None]
    missed = found(LESIONS)
    for flair, change in (
        (None, 'new'),
        (missed.flair, 'new'),
        (scan.flair * np.exp(0.5 * x), 'unclear'),
        (3 * missed.flair * np.exp(0.5 * x), 'new'),
    ):
        before = replace(missed, flair=flair)
        expected = sorted(['stable'] * 3 + [change])
        assert classes(compare_lesions(before, later, IDENTITY)) == expected
        expected = sorted(['stable'] * 3 + [OPPOSITE.get(change, change)])
        assert classes(compare_lesions(later, before, IDENTITY)) == expected


def test_a_growth_that_the_flair_does_not_show_is_none():
    large, small = (found({'d': ((30, 25, 10), radius)}) for radius in (7.0, 4.0))
    assert classes(compare_lesions(small, large, IDENTITY)) == ['enlarged']
    same = replace(small, flair=large.flair)
    assert classes(compare_lesions(same, large, IDENTITY)) == ['stable']


def test_a_lesion_without_white_matter_around_is_judged_without_its_flair():
    later = found({'d': ((30, 25, 10), 4.0)})
    labels = np.where(later.labels == longitudinal.WHITE, 8, later.labels)
    before = replace(later, labels=np.where(labels == longitudinal.LESION, 8, labels),
                     probability=np.zeros_like(later.probability))  # fmt: skip
    assert classes(compare_lesions(before, replace(later, labels=labels), IDENTITY)) == ['new']


THICK = (1.0, 1.0, 3.0)


def test_a_lesion_that_thick_slices_cut_elsewhere_has_not_changed():
    """One slice more than before is the slice, two are the lesion."""
    grid = grid_of(spacing=THICK, size=(80, 80, 60))

    def of(slices):
        probability = np.zeros(grid.shape, np.float32)
        probability[60:65, 60:65, slices] = 0.9
        labels = np.where(probability > 0.5, 7, 2).astype(np.uint8)
        return Segmentation(labels, grid, probability)

    two = of(slice(8, 10))
    for more, change in ((slice(8, 11), 'stable'), (slice(7, 12), 'enlarged')):
        assert classes(compare_lesions(two, of(more), IDENTITY)) == [change]
        assert classes(compare_lesions(of(more), two, IDENTITY)) == [OPPOSITE.get(change, change)]


@pytest.mark.parametrize(('spacing', 'small'), [(THICK, 'unclear'), ((1.0, 1.0, 1.0), 'new')])
def test_small_lesions_are_not_new_in_thick_slices_that_are_tilted(spacing, small):
    grid = grid_of(spacing=spacing, size=(80, 80, 60))
    tilt = rigid((6, 0, 0))
    for radius, change in ((2.5, small), (6.0, 'new')):
        with_it = {'d': ((30.0, 25.0, 11.0), radius)}
        earlier = found(LESIONS, grid=grid)
        later = found(LESIONS | with_it, grid=grid, place=tilt)
        rows = compare_lesions(earlier, later, np.linalg.inv(tilt))
        assert classes(rows) == sorted(['stable'] * 3 + [change])
        level = found(LESIONS | with_it, grid=grid)
        assert 'new' in classes(compare_lesions(earlier, level, IDENTITY))


def test_what_the_other_scan_does_not_show_is_not_new():
    later = found(LESIONS | {'d': ((30, 25, 10), 3.0)})
    earlier = found(LESIONS)
    labels = earlier.labels.copy()
    labels[65:] = 0
    cut = Segmentation(labels, earlier.grid, earlier.probability)
    assert 'new' not in classes(compare_lesions(cut, later, IDENTITY))


def test_without_a_flair_nothing_is_called_change():
    rows = compare_lesions(found({}), found(LESIONS), IDENTITY, judged=False)
    assert classes(rows) == ['unclear'] * 3
    assert compare_lesions(found({}), found({}), IDENTITY) == []


# --- space --------------------------------------------------------------------------------------


def test_halfway_twice_is_all_the_way():
    half = longitudinal.halfway(MOVED)
    assert half @ half == pytest.approx(MOVED)
    assert half[:3, :3] @ half[:3, :3].T == pytest.approx(np.eye(3))
    assert longitudinal.halfway(np.linalg.inv(MOVED)) == pytest.approx(np.linalg.inv(half))


def test_both_scans_are_as_near_to_the_grid_in_between():
    one, other = grid_of('LPI'), grid_of('RAS', (1.5, 1.5, 3.0), rigid((10, 0, 5)))
    brains = np.ones(one.shape, bool), np.ones(other.shape, bool)
    there = longitudinal.midway_grid(one, other, MOVED, brains)
    back = longitudinal.midway_grid(other, one, np.linalg.inv(MOVED), brains[::-1])
    assert there[0].shape == back[0].shape
    assert there[0].affine == pytest.approx(back[0].affine)
    assert there[0].spacing_mm == pytest.approx(np.sqrt((3, 3, 6)))
    assert there[1] == pytest.approx(back[2])
    assert np.linalg.inv(there[2]) @ there[1] != pytest.approx(np.eye(4))
    assert there[1] @ np.linalg.inv(there[2]) == pytest.approx(MOVED)


# --- a dataset ----------------------------------------------------------------------------------

CONFIGURATION = {'model': 'made', 'level': 'full'}


def add_session(root, session, lesions=LESIONS, *, low_high=True, flair=True, **options):
    """Write a raw scan and its results, as the app would."""
    raw, out = root / 'bids', root / 'out'
    grid = options.pop('grid', grid_of())
    scan, labels, probability = head(grid, lesions, **options)
    suffix = 'FLAIR' if flair else 'T1w'
    stem = f'sub-01_ses-{session}'
    path = raw / 'sub-01' / f'ses-{session}' / 'anat' / f'{stem}_{suffix}.nii.gz'
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(scan.data.astype(np.int16), grid.affine), path)
    unit = bids.Scan('01', session, None if flair else path, path if flair else None, stem)
    for name, array in (
        ('seg-jointseg_dseg.nii.gz', labels),
        ('seg-jointseg_label-L_probseg.nii.gz', probability.astype(np.float32)),
    ):
        image = bids.derivative(out, unit, name)
        image.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, grid.affine), image)
        record = {'SpatialReference': bids.raw_uri(path, raw)}
        bids.write_json(image.with_name(image.name.split('.')[0] + '.json'), record)
    voxel = float(grid.spacing_mm.prod())
    volumes = {
        label.abbreviation: float((labels == label.index).sum()) * voxel
        for label in figures.CLASSES
    }
    widths = {name: (0.97 * v, 1.03 * v) if low_high else None for name, v in volumes.items()}
    brain = sum(volumes.values())
    bids.write_tables(
        out,
        unit,
        raw,
        volumes=volumes,
        intervals=widths | {'brain': (0.99 * brain, 1.01 * brain) if low_high else None},
        lesions=[],
        flags=[],
        quality={},
        configuration=CONFIGURATION,
    )
    return unit


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(figures, 'WIDTH', 600)


@pytest.fixture(scope='module')
def person(tmp_path_factory):
    """Two sessions: the head moved, and there is a new lesion, and one that is gone."""
    root = tmp_path_factory.mktemp('person')
    describe_dataset(root / 'bids')
    add_session(root, '1', LESIONS, seed=1)
    lesions = {name: LESIONS[name] for name in 'ab'} | {'d': ((30, 5, 25), 5.0)}
    add_session(root, '2', lesions, place=MOVED, seed=2, grid=grid_of('LAS'))
    return root


@pytest.fixture(scope='module')
def compared(person):
    paths = longitudinal.compare_sessions(person / 'out', person / 'bids', '01')
    return {path.name: path for path in paths}


def rows_of(path):
    delimiter = ',' if path.suffix == '.csv' else '\t'
    with path.open(newline='') as stream:
        return list(csv.DictReader(stream, delimiter=delimiter))


def test_a_person_with_change(compared, person):
    stem = 'sub-01_ses-2_desc'
    lesions = rows_of(compared[f'{stem}-lesionchange_morph.tsv'])
    assert classes(lesions) == ['new', 'resolved', 'stable', 'stable']
    centre = [float(lesions[0][f'{axis}_mm']) for axis in 'xyz']
    assert centre == pytest.approx((MOVED @ (30, 5, 25, 1))[:3], abs=1.5)
    volumes = rows_of(compared[f'{stem}-longitudinal_morph.tsv'])
    assert {row['name']: row['changed'] for row in volumes}['WM'] == 'no'
    for name in ('lesionchange', 'longitudinal'):
        path = compared[f'{stem}-{name}_morph.tsv']
        assert rows_of(path) == rows_of(path.with_suffix('.csv'))
        columns = json.loads(path.with_suffix('.json').read_text())['columns']
        assert list(rows_of(path)[0]) == list(columns)
    record = json.loads(compared[f'{stem}-longitudinal_morph.json'].read_text())
    (comparison,) = record['comparisons']
    assert comparison['lesions'] | {'new': 1, 'resolved': 1, 'stable': 2} == comparison['lesions']
    assert comparison['registration_disagreement_mm'] < 1
    matrix = np.array(comparison['later_to_earlier'])
    corners = np.array([[40, 50, 30, 1], [-40, -50, 0, 1], [0, 0, 30, 1]]).T
    assert np.abs(matrix @ MOVED @ corners - corners).max() < 1
    assert comparison['notes'] == []
    assert 'bids:raw:sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz' in record['Sources']
    assert record['rules'] == longitudinal.RULES
    assert not list((person / 'out').rglob('.*tmp'))


def test_the_figure_shows_both_scans_and_what_changed(compared):
    picture = Image.open(compared['sub-01_ses-2_desc-longitudinal_FLAIR.png'])
    assert picture.width == figures.WIDTH
    pixels = np.asarray(picture.convert('RGB')).astype(int)[:-56]
    for change in ('new', 'resolved', 'stable'):
        color = figures.CHANGES[change][0]
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=-1) < 40).any(), change


def test_work_that_is_done_is_not_done_again(compared, person, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    before = {path: path.read_bytes() for path in compared.values()}
    monkeypatch.setattr(longitudinal.registration, 'register', refuse)
    again = longitudinal.compare_sessions(person / 'out', person / 'bids', '01')
    assert {path: path.read_bytes() for path in again} == before
    monkeypatch.setitem(longitudinal.RULES, 'relative', 0.5)
    with pytest.raises(AssertionError):
        longitudinal.compare_sessions(person / 'out', person / 'bids', '01')
    # As if it had never been interrupted.
    for path, content in before.items():
        path.write_bytes(content)


def test_the_reports_show_it(compared, person):
    out = person / 'out'
    page = reports.subject_report(out, '01', provenance={}).read_text()
    section = page.split('id="changes"')[1].split('</section>')[0]
    assert 'ses-1 to ses-2' in section
    assert section.count('<img') == 1
    for words in ('new', 'resolved', 'White matter', '95 % interval'):
        assert words in section
    written = {path.name: path for path in reports.group_tables(out)}
    rows = rows_of(written['group_changes.tsv'])
    assert rows == rows_of(written['group_changes.csv'])
    lesions = next(row for row in rows if row['name'] == 'L')
    assert (lesions['participant_id'], lesions['session_id']) == ('sub-01', 'ses-2')
    assert (lesions['since'], lesions['lesions_new']) == ('ses-1', '1')
    group = reports.group_report(out).read_text()
    assert group.split('id="changes"')[1].split('</section>')[0].count('class="line"') == 2


def test_three_sessions_and_what_is_left_when_one_goes(small, tmp_path, monkeypatch):
    for session in '123':
        add_session(tmp_path, session)
    monkeypatch.setattr(longitudinal, 'align', lambda *_: (IDENTITY, 0.0))
    out = tmp_path / 'out'
    longitudinal.compare_sessions(out, tmp_path / 'bids', '01')
    last = out / 'sub-01' / 'ses-3' / 'anat' / 'sub-01_ses-3_desc-longitudinal_morph.tsv'
    assert [row['since'] for row in rows_of(last) if row['name'] == 'L'] == ['ses-2', 'ses-1']
    assert len(list(out.glob('sub-01/figures/*longitudinal*'))) == 3
    shutil.rmtree(out / 'sub-01' / 'ses-2')
    longitudinal.compare_sessions(out, tmp_path / 'bids', '01')
    assert [row['since'] for row in rows_of(last) if row['name'] == 'L'] == ['ses-1']
    assert len(list(out.glob('sub-01/figures/*longitudinal*'))) == 1
    shutil.rmtree(out / 'sub-01' / 'ses-1')
    assert longitudinal.compare_sessions(out, tmp_path / 'bids', '01') == []
    assert not list(out.glob('sub-01/**/*longitudinal*'))
    assert (last.parent / 'sub-01_ses-3_desc-lesions_morph.tsv').is_file()


def test_scans_of_different_kinds(small, tmp_path, monkeypatch):
    monkeypatch.setattr(longitudinal, 'align', lambda *_: (IDENTITY, 0.0))
    for session, strength in (('1', 1.5), ('2', 3)):
        scan = add_session(tmp_path, session, flair=False)
        sidecar = scan.t1w.with_name(scan.t1w.name.replace('.nii.gz', '.json'))
        sidecar.write_text(json.dumps({'MagneticFieldStrength': strength}))
    add_session(tmp_path, '3')  # a FLAIR is not compared with a T1w
    paths = longitudinal.compare_sessions(tmp_path / 'out', tmp_path / 'bids', '01')
    assert {path.name[:12] for path in paths} == {'sub-01_ses-2'}
    (comparison,) = json.loads(paths[5].read_text())['comparisons']
    assert 'MagneticFieldStrength (1.5 and 3)' in comparison['notes'][0]
    assert 'no FLAIR' in comparison['notes'][1]
    assert {row['changed'] for row in rows_of(paths[3])} == {'n/a'}


def test_a_broken_session_is_one_line_and_costs_nothing_else(small, tmp_path, caplog):
    for session in '12':
        add_session(tmp_path, session)
    scan = tmp_path / 'bids' / 'sub-01' / 'ses-2' / 'anat' / 'sub-01_ses-2_FLAIR.nii.gz'
    scan.write_bytes(scan.read_bytes()[:3000])
    settings = Settings(bids_dir=tmp_path / 'bids', output_dir=tmp_path / 'out')
    assert cli.write_comparisons(settings, ['01', '02']) == cli.Exit.REPORT_FAILED
    (message,) = [record.message for record in caplog.records if record.levelname == 'ERROR']
    assert scan.name in message
    assert '\n' not in message
    out = tmp_path / 'out'
    assert not list(out.rglob('*longitudinal*'))
    assert len(list(out.rglob('*_seg-jointseg_morph.tsv'))) == 2
    scan.unlink()
    with pytest.raises(ImageError, match='ses-2'):
        longitudinal.compare_sessions(out, tmp_path / 'bids', '01')
    # Results that are incomplete are not compared.
    next(out.rglob('*ses-2*_seg-jointseg_morph.json')).unlink()
    assert longitudinal.compare_sessions(out, tmp_path / 'bids', '01') == []


def test_lesions_of_one_voxel_are_matched():
    grid = grid_of(spacing=(1.0, 1.0, 3.0), size=(60, 60, 60))
    labels = np.full(grid.shape, 2, np.uint8)
    labels[30, 30, 10] = 7
    earlier = Segmentation(labels, grid)
    later = Segmentation(ndimage.shift(labels, (1, 0, 1), order=0, cval=2), grid)
    rows = compare_lesions(earlier, later, IDENTITY)
    assert [row['change'] for row in rows] == ['stable']


@pytest.mark.parametrize(
    ('spacing', 'axis', 'expected'),
    [((1.0, 1.0, 3.0), 0, 6.0), ((1.0, 1.0, 3.0), 2, 0.0), ((1.0, 1.0, 1.0), 0, 0.0)],
    ids=['across thick slices', 'within them', 'thin slices'],
)
def test_thick_slices_that_are_tilted_are_told(spacing, axis, expected):
    """They cut small lesions otherwise (docs/longitudinal.md)."""
    angle = math.radians(6)
    i, j = (other for other in range(3) if other != axis)
    turn = np.eye(4)
    turn[[i, j], [i, j]] = math.cos(angle)
    turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
    grid = grid_of(spacing=spacing, size=(60, 60, 60))
    assert longitudinal.slice_tilt(grid, grid, turn) == pytest.approx(expected, abs=1e-6)
    # The same slices, found again in a scan whose header is turned with the head.
    moved = Grid(grid.shape, np.linalg.inv(turn) @ grid.affine)
    assert longitudinal.slice_tilt(grid, moved, turn) == pytest.approx(0, abs=1e-4)
