"""Lesions one by one, and a T1w without them."""

from __future__ import annotations

import numpy as np
import pytest
from test_image import FRAMES, ball, make_grid, points

from bids_jointseg.labels import LABELS
from bids_jointseg.lesions import (
    LONG_MM,
    ZONES,
    count_long,
    fill_lesions,
    measure_lesions,
    zone_volumes,
)

BG, WM, L, CGM, BS, CBM, VEN = (
    next(label.index for label in LABELS if label.abbreviation == name)
    for name in ('BG', 'WM', 'L', 'CGM', 'BS', 'CBM', 'VEN')
)


@pytest.mark.parametrize('frame', FRAMES)
def test_every_lesion_is_measured(frame):
    grid = make_grid(frame, (2, 2, 3))
    labels = np.full(grid.shape, WM, np.uint8)
    labels[10:12, 10:12, 10] = L
    labels[12, 12, 11] = L  # touches at a corner
    labels[30, 30, 30] = L
    probability = np.where(labels == L, 0.8, 0.0)
    probability[30, 30, 30] = 0.6
    agreement = np.where(labels == L, 1.0, 0.0)
    agreement[12, 12, 11] = 0.5
    first, second = measure_lesions(labels, grid, probability=probability, agreement=agreement)
    assert (first['lesion'], first['voxels'], second['lesion'], second['voxels']) == (1, 5, 2, 1)
    assert first['volume_mm3'] == pytest.approx(60)
    centre = points(grid)[labels == L][:-1].mean(axis=0)
    np.testing.assert_allclose([first[f'{axis}_mm'] for axis in 'xyz'], centre)
    # From a corner of the first voxel to the opposite one of the last: 3 x 3 x 2 voxels.
    assert first['diameter_mm'] == pytest.approx(np.sqrt(6**2 + 6**2 + 6**2))
    assert second['diameter_mm'] == pytest.approx(np.sqrt(2**2 + 2**2 + 3**2))
    assert first['probability'] == pytest.approx(0.8)
    assert first['agreement'] == pytest.approx(0.9)
    assert second['probability'] == pytest.approx(0.6)


def test_without_lesions_there_is_nothing_to_measure_or_to_fill():
    grid = make_grid()
    labels = np.full(grid.shape, WM, np.uint8)
    data = np.random.default_rng(0).random(grid.shape)
    assert measure_lesions(labels, grid) == []
    assert zone_volumes([]) == {zone: {'count': 0, 'volume_mm3': 0} for zone in ZONES}
    np.testing.assert_array_equal(fill_lesions(data, labels, grid), data.astype(np.float32))
    labels[:] = L  # nothing is left to fill it with
    np.testing.assert_array_equal(fill_lesions(data, labels, grid), data.astype(np.float32))


@pytest.mark.parametrize(('voxels', 'long'), [(1, 0), (2, 0), (3, 1)])
def test_single_voxels_are_not_counted_as_long_lesions(voxels, long):
    """In a row of voxels of 1 mm, from corner to corner: 1.7, 2.4 and 3.3 mm."""
    grid = make_grid(spacing_mm=(1, 1, 1), extent_mm=12)
    labels = np.full(grid.shape, WM, np.uint8)
    labels[4 : 4 + voxels, 6, 6] = L
    rows = measure_lesions(labels, grid)
    assert (len(rows), count_long(rows)) == (1, long)
    assert count_long([{'diameter_mm': LONG_MM}]) == 1


@pytest.mark.parametrize(
    ('place', 'zone'),
    [
        ((22, 20, 20), 'periventricular'),  # touches the ventricle, which ends at 20
        ((23, 20, 20), 'periventricular'),  # one voxel of white matter between
        ((25, 20, 20), 'deep'),
        ((20, 41, 20), 'juxtacortical'),  # cortex begins at 42
        ((20, 40, 20), 'deep'),
        ((20, 20, 3), 'infratentorial'),  # within the brainstem
        ((20, 20, 8), 'deep'),  # white matter above it
    ],
)
def test_zones_follow_from_the_labels_around(place, zone):
    grid = make_grid(spacing_mm=(1, 1, 1), extent_mm=48)
    labels = np.full(grid.shape, WM, np.uint8)
    labels[14:21, 14:26, 14:26] = VEN
    labels[:, 42:] = CGM
    labels[:, :, :6] = BS
    labels[place] = L
    (row,) = measure_lesions(labels, grid)
    assert row['zone'] == zone
    assert row['probability'] is row['agreement'] is None
    assert zone_volumes([row])[zone] == {'count': 1, 'volume_mm3': 1}


@pytest.mark.parametrize('frame', ['RAS', 'LAS', 'oblique'])
def test_a_filled_lesion_looks_like_the_white_matter_around_it(frame):
    grid = make_grid(frame, (2, 2, 2), 120)
    rng = np.random.default_rng(1)
    brain, lesion = ball(grid, radii=(50, 50, 50)), ball(grid, (10, 5, 0), (14, 9, 9))
    # A bright side and a dark one: what fills a lesion is local.
    shade = 800 + 2 * (points(grid)[..., 0] - 10)
    truth = np.where(brain, shade, 20) + rng.normal(0, 20, grid.shape)
    data = np.where(lesion, 450, truth)
    labels = np.where(lesion, L, np.where(brain, WM, BG)).astype(np.uint8)
    filled = fill_lesions(data, labels, grid)
    error = (filled - shade)[lesion]
    assert abs(error.mean()) < 5
    assert 14 < error.std() < 26
    rim = ball(grid, (10, 5, 0), (17, 12, 12))
    np.testing.assert_array_equal(filled[~rim], data[~rim].astype(np.float32))
    np.testing.assert_array_equal(filled, fill_lesions(data, labels, grid))


@pytest.mark.slow
def test_lesions_put_in_and_filled_leave_the_volumes_unchanged():
    """Of the ICBM152 average brain, as the released model sees it, within 1 %."""
    from nilearn.datasets import load_mni152_template
    from scipy import ndimage

    from bids_jointseg import image
    from bids_jointseg.card import read_card
    from bids_jointseg.inference import combine, predict
    from bids_jointseg.network import load_model

    template = load_mni152_template(resolution=1)
    scan = image.Volume(
        np.asarray(template.dataobj, np.float32),
        image.Grid(template.shape, np.asarray(template.affine)),
    )
    card = read_card()
    network = load_model(card)
    grid = image.model_grid(scan, in_plane_mm=1.0, slice_mm=(3.0, 3.0))

    def segment(array: np.ndarray) -> np.ndarray:
        members = predict(
            network,
            {'T1w': image.normalise(array)},
            window=card.window,
            device='cpu',
        )
        return image.label_map(combine(members))

    data = image.resample(scan, grid)
    before = segment(data)
    inside = ndimage.distance_transform_edt(before == WM, sampling=grid.spacing_mm) > 4
    rng = np.random.default_rng(3)
    seeds = rng.permutation(np.argwhere(inside))[:25]
    lesion = np.zeros(grid.shape, bool)
    for seed in seeds:
        offset = (np.moveaxis(np.indices(grid.shape), 0, -1) - seed) * grid.spacing_mm
        lesion |= np.linalg.norm(offset, axis=-1) < rng.uniform(2.5, 5)
    lesion &= before == WM
    assert lesion.sum() * 3 > 3000, 'mm^3 of lesions'
    injured = np.where(lesion, 0.62 * data, data).astype(np.float32)
    labels = np.where(lesion, np.uint8(L), before)
    filled = fill_lesions(injured, labels, grid)
    known = image.volumes_mm3(before, grid)

    after, hurt = segment(filled), segment(injured)
    found = image.volumes_mm3(after, grid)
    for name in ('WM', 'CGM', 'SGM', 'BS', 'CBM', 'VEN'):
        assert found[name] == pytest.approx(known[name], rel=0.01), name
    # Left as they are, most of the lesions are taken for something else.
    assert (after[lesion] == WM).mean() > 0.95
    assert (hurt[lesion] == WM).mean() < 0.5
