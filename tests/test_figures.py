"""Figures: upright whatever the native axes are."""

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import grid_of, labelled_head
from PIL import Image

from bids_jointseg import figures
from bids_jointseg.image import Grid, Volume
from bids_jointseg.labels import LABELS, PROTOCOLS

SHARED = Path(__file__).parents[2] / 'shared' / 'data'
ORANGE = np.array([0xD5, 0x5E, 0x00])
CODES = [
    ''.join(signs)
    for axes in itertools.permutations(('LR', 'PA', 'IS'))
    for signs in itertools.product(*axes)
]


def reoriented(array, grid, code):
    """Store the same scan with other voxel axes."""
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt('RAS'), nib.orientations.axcodes2ornt(code)
    )
    turned = nib.orientations.apply_orientation(array, turn)
    return turned, Grid(
        turned.shape, grid.affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
    )


def pixels(path):
    return np.asarray(Image.open(path).convert('RGB')).astype(int)


def orange(path):
    """Return where a figure has the colour of lesions, legend left out."""
    return np.abs(pixels(path)[:-60] - ORANGE).max(axis=-1) < 40


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(figures, 'WIDTH', 400)  # the same pictures, faster


def test_a_pair_gets_every_figure(drawn_pair):
    _, paths = drawn_pair
    expected = [
        f'sub-01_desc-{what}_{suffix}.png'
        for what, suffix in figures.FIGURES
        if (what, suffix) != ('closeup', 'T1w')
    ]
    assert [path.name for path in paths] == expected
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(expected)
    for path in paths:
        assert Image.open(path).width == 1200


def test_pictures_that_are_flipped_have_one_size_and_one_background(drawn_pair):
    _, paths = drawn_pair
    by_name = {path.name.split('_desc-')[1]: pixels(path) for path in paths}
    for names in (
        ('scan_T1w.png', 'contours_T1w.png'),
        ('scan_FLAIR.png', 'lesions_FLAIR.png'),
    ):
        bare, lined = (by_name[name] for name in names)
        rows = bare.shape[0] - 28  # the caption
        same = np.abs(bare[:rows] - lined[:rows]).max(axis=-1) <= 8
        assert 0.5 < same.mean() < 1
    shapes = {by_name[f'registration{name}.png'].shape for name in ('fixed_T1w', 'after_FLAIR')}
    assert len(shapes) == 1


def test_equal_input_gives_equal_bytes(small, drawn_pair, tmp_path):
    arguments, _ = drawn_pair
    first, second = (
        [path.read_bytes() for path in figures.draw_scan(tmp_path / name, 'sub-01', **arguments)]
        for name in 'ab'
    )
    assert first == second


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        ('T1w', ['scan_T1w', 'contours_T1w', 'labels_T1w', 'closeup_T1w', 'entropy_probseg']),
        (
            'FLAIR',
            ['scan_FLAIR', 'lesions_FLAIR', 'labels_FLAIR', 'closeup_FLAIR', 'entropy_probseg'],
        ),
    ],
)
def test_one_modality(small, tmp_path, given, expected):
    volume, labels = labelled_head()
    name = given.lower()
    arguments = {name: volume, f'{name}_labels': labels, 'entropy': 0.1 * (labels > 0)}
    paths = figures.draw_scan(tmp_path / 'new' / 'figures', 'sub-1', **arguments)
    assert [path.name for path in paths] == [f'sub-1_desc-{end}.png' for end in expected]


@pytest.mark.parametrize(
    ('code', 'spacing'),
    [
        ('LAS', (4, 4, 4)),
        ('ILP', (4, 4, 4)),
        ('LPS', (4, 4, 8)),
        ('ASL', (8, 4, 4)),
        ('PSR', (8, 4, 4)),
        ('RSP', (4, 8, 4)),
    ],
)
def test_native_axes_do_not_change_a_figure(small, tmp_path, code, spacing):
    volume, labels = labelled_head(tuple(160 // step for step in spacing), spacing)
    drawn = []
    for name in ('RAS', code):
        data, grid = reoriented(volume.data, volume.grid, name)
        turned, _ = reoriented(labels, volume.grid, name)
        paths = figures.draw_scan(
            tmp_path / name, 'sub-01', t1w=Volume(data, grid), t1w_labels=turned
        )
        drawn.append([path.read_bytes() for path in paths])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize('code', CODES)
def test_upright_puts_every_orientation_in_ras(code):
    volume, labels = labelled_head()
    turned, grid = reoriented(labels, volume.grid, code)
    back, ras = figures.upright(turned, grid)
    np.testing.assert_array_equal(back, labels)
    np.testing.assert_allclose(ras.affine, volume.grid.affine)


@pytest.mark.parametrize('degrees', [0, 20, -35])
def test_left_is_left_and_up_is_up(degrees):
    """Find the lesion (left, anterior, superior) in each plane, in straight and oblique grids."""
    volume, labels = labelled_head()
    turn = np.eye(4)
    turn[:2, :2] = [
        [np.cos(np.radians(degrees)), -np.sin(np.radians(degrees))],
        [np.sin(np.radians(degrees)), np.cos(np.radians(degrees))],
    ]
    data, grid = reoriented(volume.data, Grid(volume.grid.shape, turn @ volume.grid.affine), 'LPS')
    native, _ = reoriented(labels, volume.grid, 'LPS')
    ras, ras_grid = figures.upright(native, grid)
    volume = Volume(figures.upright(data, grid)[0], ras_grid)
    mosaic = figures.plan_mosaic(volume, ras, follow_lesions=True)
    lesion = mosaic.memberships(ras)[figures.CHANNEL['L']]
    found = set()
    for tile in mosaic.tiles:
        rows, columns = np.nonzero(lesion[tile.place] > 0.5)
        if rows.size:
            found.add(tile.axis)
            middle = np.array(tile.size) / 2
            assert rows.mean() < middle[0]  # anterior in axial slices, superior in the others
            assert (columns.mean() < middle[1]) == (tile.axis != 0)  # sagittal: nose to the right
    assert found == {0, 1, 2}


def test_slices_keep_their_proportions_and_their_positions():
    """A ball of 30 mm radius is round in all planes of a scan of 0.72 x 0.72 x 3 mm."""
    shape, spacing = (130, 130, 32), np.array([0.72, 0.72, 3.0])
    grid = grid_of(shape, spacing)
    world = np.moveaxis(np.indices(shape), 0, -1) * spacing + grid.affine[:3, 3]
    ball = (np.linalg.norm(world - (5, -3, 2), axis=-1) < 30).astype(np.uint8) * 2
    volume = Volume(ball.astype(np.float32), grid)
    mosaic = figures.plan_mosaic(volume, ball)
    picture = mosaic.cut(volume.data, kernel='linear') > 0.5
    assert [tile.axis for tile in mosaic.tiles] == [2] * 10 + [1] * 5 + [0] * 4
    for axis, centre in enumerate((5, -3, 2)):
        tile = min(
            (tile for tile in mosaic.tiles if tile.axis == axis),
            key=lambda tile: abs(mosaic.position_mm(tile) - centre),
        )
        off = mosaic.position_mm(tile) - centre
        expected = 2 * np.sqrt(30**2 - off**2) * mosaic.scale
        rows, columns = np.nonzero(picture[tile.place])
        assert np.ptp(rows) + 1 == pytest.approx(expected, abs=3.2 * mosaic.scale)
        assert np.ptp(columns) + 1 == pytest.approx(expected, abs=1.6 * mosaic.scale)


def test_the_plane_of_acquisition_comes_first_with_more_slices():
    for spacing, own, count in (((4, 4, 8), 2, 10), ((4, 8, 4), 1, 10), ((8, 4, 4), 0, 8)):
        volume, labels = labelled_head(tuple(160 // step for step in spacing), spacing)
        tiles = figures.plan_mosaic(volume, labels).tiles
        assert [tile.axis for tile in tiles[:count]] == [own] * count
        assert tiles[count].axis != own


def test_slices_with_lesion_are_taken():
    volume, labels = labelled_head()
    labels[labels == 7] = 2
    labels[20, 25, 30] = 7  # one voxel, near the top
    chosen = {
        tile.index
        for tile in figures.plan_mosaic(volume, labels, follow_lesions=True).tiles
        if tile.axis == 2
    }
    assert 30 in chosen
    assert len(chosen) == 10


def test_a_lesion_of_one_voxel_is_drawn(tmp_path):
    volume, labels = labelled_head((60, 72, 54), (2.5, 2.5, 2.5))
    labels[labels == 7] = 2
    figures.draw_scan(tmp_path, 'none', flair=volume, flair_labels=labels)
    assert not (tmp_path / 'none_desc-closeup_FLAIR.png').exists()
    assert not orange(tmp_path / 'none_desc-lesions_FLAIR.png').any()
    labels[20, 40, 33] = 7
    figures.draw_scan(tmp_path, 'one', flair=volume, flair_labels=labels)
    assert orange(tmp_path / 'one_desc-lesions_FLAIR.png').sum() >= 12  # three planes
    assert orange(tmp_path / 'one_desc-closeup_FLAIR.png').sum() >= 20


def test_the_legend_has_the_colours_of_the_label_table(drawn_pair):
    _, paths = drawn_pair
    path = next(path for path in paths if path.name.endswith('desc-labels_T1w.png'))
    legend = pixels(path)[-60:].reshape(-1, 3)
    for label in LABELS[1:]:
        color = [int(label.color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(legend - color).max(axis=-1) <= 4).sum() > 100


def test_poor_scans_are_drawn(small, tmp_path):
    volume, labels = labelled_head()
    nothing = np.zeros_like(labels)
    broken = volume.data.copy()
    broken[10:20] = np.nan
    for number, (data, drawn) in enumerate(
        [
            (volume.data, nothing),
            (broken, labels),
            (np.zeros_like(volume.data), nothing),
            (np.full_like(volume.data, 7), labels),
            (-volume.data, None),
            (volume.data[:, :, 15:16], labels[:, :, 15:16]),
        ]
    ):
        scan = Volume(data, Grid(data.shape, volume.grid.affine))
        paths = figures.draw_scan(tmp_path, f'sub-{number}', t1w=scan, t1w_labels=drawn)
        assert all(path.stat().st_size > 500 for path in paths)


def test_wrong_input_is_named(tmp_path):
    volume, labels = labelled_head()
    with pytest.raises(ValueError, match='sub-1: nothing to draw'):
        figures.draw_scan(tmp_path, 'sub-1')
    with pytest.raises(ValueError, match='sub-1: t1w_labels does not have the shape'):
        figures.draw_scan(tmp_path, 'sub-1', t1w=volume, t1w_labels=labels[1:])
    with pytest.raises(ValueError, match='sub-1: flair_labels does not have the shape'):
        figures.draw_scan(tmp_path, 'sub-1', t1w=volume, flair_labels=labels)
    assert not list(tmp_path.iterdir())


def test_real_scan(tmp_path):
    anat = SHARED / 'neuromorphometrics' / 'sub-0040' / 'ses-1' / 'anat'
    if not anat.is_dir():
        pytest.skip('no example data')
    from bids_jointseg.image import load_scan

    name = 'sub-0040_ses-1'
    manual = SHARED / 'neuromorphometrics' / 'derivatives' / 'manual' / 'sub-0040' / 'ses-1'
    codes = np.asarray(
        nib.load(manual / 'anat' / f'{name}_desc-neuromorphometrics_dseg.nii.gz').dataobj
    )
    bits = PROTOCOLS['neuromorphometrics'].encode(codes.astype(int))
    labels = np.zeros(codes.shape, np.uint8)
    for channel, label in enumerate(LABELS):
        labels[bits == 1 << channel] = label.index
    t1w = load_scan(anat / f'{name}_T1w.nii.gz')
    paths = figures.draw_scan(tmp_path, name, t1w=t1w, t1w_labels=labels)
    assert len(paths) == 3
    assert sum(path.stat().st_size for path in paths) < 2e6
