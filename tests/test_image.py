"""Geometry, intensities and files, in RAS, LAS and an oblique frame, whatever the thick axis."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from bids_jointseg import image
from bids_jointseg.image import Grid, ImageError, Volume
from bids_jointseg.labels import CLASSES, INDICES

WM, L, CGM = (CLASSES.index(name) for name in ('WM', 'L', 'CGM'))


def rotation(*degrees: float) -> np.ndarray:
    transform = sitk.Euler3DTransform((0, 0, 0), *np.deg2rad(degrees).tolist())
    return np.array(transform.GetMatrix()).reshape(3, 3)


FRAMES = {
    'RAS': np.eye(3),
    'LAS': np.diag([-1.0, 1.0, 1.0]),
    'oblique': rotation(8, -12, 20),
    'PSR': np.array([[0.0, 0, 1], [-1, 0, 0], [0, 1, 0]]),  # axes back, up, right
}


def rigid(degrees=(0, 0, 0), shift_mm=(0, 0, 0)) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation(*degrees), shift_mm
    return matrix


def make_grid(frame='RAS', spacing_mm=(2.0, 2.0, 2.0), extent_mm=200.0) -> Grid:
    shape = tuple(int(extent_mm / step) for step in spacing_mm)
    affine = np.eye(4)
    affine[:3, :3] = FRAMES[frame] * np.array(spacing_mm)
    affine[:3, 3] = (10, -20, 30) - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return Grid(shape, affine)


def points(grid: Grid) -> np.ndarray:
    voxels = np.moveaxis(np.indices(grid.shape), 0, -1)
    return voxels @ grid.affine[:3, :3].T + grid.affine[:3, 3]


def ball(grid: Grid, centre=(0, 0, 0), radii=(70, 85, 75)) -> np.ndarray:
    return np.linalg.norm((points(grid) - (10, -20, 30) - centre) / radii, axis=-1) < 1


def head(grid: Grid, seed=0) -> Volume:
    """Nested, lopsided ellipsoids in weak noise."""
    data = np.abs(np.random.default_rng(seed).normal(0, 3, grid.shape))
    for level, centre, radii in (
        (200, (0, 0, 0), (70, 85, 75)),
        (600, (0, 0, 0), (62, 76, 66)),
        (800, (4, -6, 5), (50, 60, 50)),
        (100, (-5, 8, 6), (12, 24, 14)),
        (400, (25, -30, -25), (14, 10, 12)),
    ):
        data[ball(grid, centre, radii)] += level - data[ball(grid, centre, radii)].mean()
    return Volume(data.astype(np.float32), grid)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# --------------------------------------------------------------------------------- grids


@pytest.mark.parametrize(
    ('frame', 'spacing_mm', 'axis'),
    [
        ('RAS', (1, 1, 3), 2),
        ('RAS', (3, 1, 1), 0),
        ('RAS', (1, 1, 1.4), 2),
        ('RAS', (1.4, 1, 1), 2),
        ('RAS', (0.5, 1, 1), 2),
        ('PSR', (1, 1, 1), 1),
        ('PSR', (1, 1, 4), 2),
        ('oblique', (1, 1, 1), 2),
    ],
)
def test_thick_axis(frame, spacing_mm, axis):
    grid = make_grid(frame, spacing_mm)
    assert grid.thick_axis == axis
    assert grid.slice_mm == pytest.approx(spacing_mm[axis])
    np.testing.assert_allclose(grid.spacing_mm, spacing_mm)


@pytest.mark.parametrize('frame', FRAMES)
@pytest.mark.parametrize('thick', [0, 1, 2])
def test_model_grid_keeps_the_slices(frame, thick):
    spacing = np.full(3, 1.7)
    spacing[thick] = 5.0
    scan = head(make_grid(frame, spacing))
    grid = image.model_grid(scan, in_plane_mm=2.0, slice_mm=(3.0, 6.0))
    np.testing.assert_allclose(grid.spacing_mm, (2, 2, 5))
    assert grid.thick_axis == 2
    # Rows point right, anterior, superior; the axis across slices comes last.
    names = ''.join(nib.aff2axcodes(grid.affine))
    across = nib.aff2axcodes(scan.grid.affine)[thick]
    last = {'L': 'R', 'R': 'R', 'A': 'A', 'P': 'A', 'I': 'S', 'S': 'S'}[across]
    assert names == 'RAS'.replace(last, '') + last
    # The scan's own axes, and along the thick one the scan's own slices.
    turn = np.linalg.inv(scan.grid.affine) @ grid.affine
    assert np.count_nonzero(np.abs(turn[:3, :3]) > 1e-9) == 3
    slices = turn[thick, 3] + turn[thick, 2] * np.arange(grid.shape[2])
    np.testing.assert_allclose(slices, np.rint(slices), atol=1e-9)
    # The head and a margin, little more.
    there = image.resample(scan, grid)
    assert (there > 150).sum() * 20 == pytest.approx(
        (scan.data > 150).sum() * spacing.prod(), rel=0.02
    )
    extent = np.array(grid.shape) * grid.spacing_mm
    assert (extent < 190).all()


def test_model_grid_of_a_matching_scan_interpolates_nothing():
    scan = head(make_grid('LAS', (2.0005, 2, 3)))
    grid = image.model_grid(scan, in_plane_mm=2.0, slice_mm=(1.0, 6.0))
    first = np.rint(np.linalg.inv(scan.grid.affine) @ grid.affine[:, 3])[:3].astype(int)
    crop = scan.data[::-1][len(scan.data) - 1 - first[0] :, first[1] :, first[2] :][
        tuple(map(slice, grid.shape))
    ]
    np.testing.assert_allclose(image.resample(scan, grid), crop, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(('slice_mm', 'expected'), [((1, 4), 3), ((4, 6), 4), ((1, 2.5), 2.5)])
def test_model_grid_takes_the_nearer_bound(slice_mm, expected):
    scan = head(make_grid('RAS', (2, 2, 3)))
    grid = image.model_grid(scan, in_plane_mm=3.0, slice_mm=slice_mm)
    np.testing.assert_allclose(grid.spacing_mm, (3, 3, expected))


def test_model_grid_ignores_specks_and_padding():
    scan = head(make_grid())
    grid = image.model_grid(scan, in_plane_mm=2.0, slice_mm=(1, 4))
    spots = scan.data.copy()
    spots[2, 3, 4] = spots[-2, -3, -4] = 900
    spotted = image.model_grid(Volume(spots, scan.grid), in_plane_mm=2.0, slice_mm=(1, 4))
    assert spotted.shape == grid.shape
    shifted = scan.grid.affine.copy()
    shifted[:3, 3] -= 2.0 * np.array([11, 3, 20])
    padded = np.pad(scan.data, ((11, 9), (3, 4), (20, 1)))
    wide = Volume(padded, Grid(padded.shape, shifted))
    other = image.model_grid(wide, in_plane_mm=2.0, slice_mm=(1, 4))
    assert other.shape == grid.shape
    np.testing.assert_allclose(other.affine, grid.affine)
    np.testing.assert_allclose(
        image.normalise(image.resample(wide, other)),
        image.normalise(image.resample(scan, grid)),
        atol=1e-4,
    )


# --------------------------------------------------------------------------- intensities


def test_foreground_is_the_fixed_point():
    # 0.5 * mean(1, 1, 1, 9) = 1.5, then 0.5 * mean(9) = 4.5, which stands.
    assert image.foreground(np.array([0, -3, np.nan, 1, 1, 1, 9.0])) == 4.5
    assert image.foreground(np.zeros((3, 3))) == 0


@pytest.mark.parametrize('frame', ['RAS', 'oblique'])
@pytest.mark.parametrize('stored', [4095.0, 1.0])
def test_the_bright_air_of_a_uniform_image_is_set_to_zero(tmp_path, frame, stored, caplog):
    """Whether it is stored as 0 to 4095 or as -0.5 to 0.5, where the head is negative, too."""
    rng = np.random.default_rng(0)
    grid = make_grid(frame, (1.5, 1.5, 2), 220.0)
    scan, inside = head(grid).data, ball(grid)
    ratio = np.where(inside, scan / 1000, rng.uniform(0, 1, grid.shape)) + rng.normal(
        0, 0.02, grid.shape
    )
    least = 0.0 if stored > 1 else -0.5
    path = tmp_path / 'sub-1_UNIT1.nii.gz'
    image.save(path, (ratio.clip(0, 1) * stored + least), grid, dtype='float32')
    with caplog.at_level(logging.WARNING, 'bids_jointseg'):
        found = image.load_scan(path).data
    assert [f'{path}: the air is noise' in record.getMessage() for record in caplog.records] == [1]
    away = points(grid) - (10, -20, 30)
    air = np.linalg.norm(away / (76, 91, 81), axis=-1) > 1
    brain = ball(grid, radii=(64, 79, 69))
    assert (found[air] != 0).mean() < 1e-5
    np.testing.assert_allclose(found[brain], ratio.clip(0, 1)[brain] * stored, rtol=1e-5)
    assert np.corrcoef(found.ravel(), np.where(inside, scan, 0).ravel())[0, 1] > 0.99


@pytest.mark.parametrize('strength', [0, 20, 100])
def test_the_dark_air_of_other_scans_is_left_alone(tmp_path, strength, caplog):
    rng = np.random.default_rng(0)
    scan = head(make_grid(spacing_mm=(2, 2, 2)))
    noisy = np.hypot(scan.data + rng.normal(0, strength, scan.data.shape),
                     rng.normal(0, strength, scan.data.shape)).astype(np.float32)  # fmt: skip
    for name, data in (('noisy', noisy), ('inverted', noisy.max() - noisy), ('below', noisy - 50)):
        image.save(tmp_path / f'{name}.nii', data, scan.grid, dtype='float32')
        np.testing.assert_array_equal(image.load_scan(tmp_path / f'{name}.nii').data, data)
    assert not caplog.records


def test_noise_up_to_the_limits_of_float32_stays_finite(tmp_path):
    numbers = np.random.default_rng(0).uniform(-3e38, 3e38, (20, 20, 20)).astype(np.float32)
    numbers[5:15, 5:15, 5:15] = 1e38
    grid = make_grid(spacing_mm=(8, 8, 8), extent_mm=160)
    image.save(tmp_path / 'a.nii', numbers, grid, dtype='float32')
    np.testing.assert_array_equal(image.load_scan(tmp_path / 'a.nii').data, numbers)


def test_normalise_is_over_the_head_whatever_the_padding():
    scan = head(make_grid(spacing_mm=(3, 3, 3))).data
    result = image.normalise(scan)
    inside = scan > image.foreground(scan)
    assert result.dtype == np.float32
    assert abs(result[inside].mean()) < 1e-5
    assert result[inside].std() == pytest.approx(1, abs=1e-5)
    padding = ((10, 0), (7, 30), (0, 5))
    padded = image.normalise(np.pad(scan, padding))
    np.testing.assert_array_equal(padded[10:, 7:-30, :-5], result)

    noise = np.abs(np.random.default_rng(1).normal(0, 3, np.add(scan.shape, (10, 37, 5))))
    noise[10:, 7:-30, :-5] = scan
    np.testing.assert_allclose(image.normalise(noise)[10:, 7:-30, :-5], result, atol=0.02)


def test_normalise_clips_spikes_and_negative_values():
    rng = np.random.default_rng(0)
    data = rng.normal(100, 10, (20, 20, 20)).astype(np.float32)
    spiked = data.copy()
    spiked[:2, 0, 0] = 1e4
    spiked[2, 0, 0] = -1e4
    result = image.normalise(spiked)
    # Eight voxels of 8000 lie above the limit, so two spikes are cut to the tail of the others.
    assert result.max() < 4
    assert result.min() == pytest.approx(-10, abs=1)
    assert not image.normalise(np.zeros((4, 4, 4), np.float32)).any()


def test_landmarks_undo_a_change_of_contrast():
    rng = np.random.default_rng(0)
    inside = ball(make_grid(spacing_mm=(5, 5, 5)))
    scans = [inside * rng.triangular(450, 600, 900, inside.shape) for _ in range(3)]
    landmarks = image.train_landmarks(scans)
    assert len(landmarks) == len(image.PERCENTILES) == 11
    assert landmarks[0] == pytest.approx(0)
    assert landmarks[-1] == pytest.approx(100)
    assert (np.diff(landmarks) >= 0).all()
    plain = [image.normalise(scan, landmarks) for scan in (scans[0], 3 * scans[0])]
    np.testing.assert_allclose(*plain, atol=1e-3)
    bent = [scans[0], scans[0] ** 1.5]
    without, with_them = (
        np.abs(np.subtract(*(image.normalise(scan, marks)[inside] for scan in bent))).mean()
        for marks in (None, landmarks)
    )
    assert with_them < without / 3


# ---------------------------------------------------------------------------- resampling


@pytest.mark.parametrize('source', FRAMES)
@pytest.mark.parametrize('order', [1, 3])
@pytest.mark.parametrize('step', [(1.5, 1.5, 4), (5, 2.5, 2.5)])
def test_resample_knows_where_it_is(source, order, step):
    """A linear function of position stays one, also through the anti-alias filter."""
    slope, matrix = np.array([2.0, -3.0, 5.0]), rigid((5, -10, 15), (4, -3, 8))
    grid = make_grid(source, (2, 2.5, 3), 170)
    volume = Volume((points(grid) @ slope + 1000).astype(np.float32), grid)
    target = make_grid('oblique', step, 80)
    there = points(target) @ matrix[:3, :3].T + matrix[:3, 3]
    found = image.resample(volume, target, matrix, order=order)
    assert found.shape == target.shape
    np.testing.assert_allclose(found, there @ slope + 1000, atol=0.02)


def test_resample_in_other_ways():
    volume = head(make_grid('LAS', (3, 3, 5)))
    for order in (0, 1):
        same = image.resample(volume, volume.grid, order=order)
        np.testing.assert_allclose(same, volume.data, atol=1e-3)
    away = image.resample(volume, volume.grid, rigid(shift_mm=(500, 0, 0)))
    assert not away.any()
    half = image.resample(volume, volume.grid, rigid(shift_mm=(90, 0, 0)))
    assert not half[:25].any()
    assert half[35:].any()
    args = (volume, make_grid('oblique'), rigid((3, 4, 5)))
    np.testing.assert_array_equal(*(image.resample(*args, threads=n) for n in (1, 2)))


@pytest.mark.parametrize('order', [0, 1, 3])
@pytest.mark.parametrize('step', [(1.5, 1.5, 4), (5, 2.5, 2.5)])
def test_resample_passes_over_zeros(order, step):
    """The same numbers as where next to nothing keeps it from passing over anything."""
    grid, target = make_grid('LAS', (2, 2.5, 3), 120), make_grid('oblique', step, 130)
    data = np.zeros(grid.shape, np.float32)
    data[20:31, 9:12, 22:25] = np.random.default_rng(1).random((11, 3, 3))
    filled = data.copy()
    filled[[0, -1], [0, -1], [0, -1]] = 1e-12
    found, whole = (
        image.resample(Volume(each, grid), target, rigid((3, 4, 5)), order=order)
        for each in (data, filled)
    )
    assert found.max() > 0.2
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_resample_onto_a_coarse_grid_averages():
    grid = make_grid(spacing_mm=(1, 1, 1), extent_mm=80)
    noise = np.random.default_rng(0).normal(100, 10, grid.shape).astype(np.float32)
    coarse = make_grid(spacing_mm=(4, 1, 1), extent_mm=60)
    spread = image.resample(Volume(noise, grid), coarse).std()
    # Linear interpolation alone leaves at least 10 / sqrt(8); a mean of four leaves 10 / 2 / ...
    other = image.resample(Volume(noise, grid), make_grid(extent_mm=60, spacing_mm=(1, 1, 1)))
    assert spread < 0.7 * other.std()
    nearest = image.resample(Volume(noise, grid), coarse, order=0)
    assert np.isin(nearest, noise).all()


def test_resample_takes_sheared_affines():
    grid = make_grid(spacing_mm=(2, 2, 2))
    grid.affine[0, 1] = 0.4
    volume = Volume(points(grid)[..., 0].astype(np.float32), grid)
    target = make_grid(spacing_mm=(3, 3, 3), extent_mm=60)
    np.testing.assert_allclose(image.resample(volume, target), points(target)[..., 0], atol=1e-3)


# -------------------------------------------------------- from the model's grid to the scan


def painted(grid: Grid) -> np.ndarray:
    """Channel numbers: a label map of blobs, with small lesions."""
    labels = np.zeros(grid.shape, dtype=int)
    labels[ball(grid, radii=(62, 76, 66))] = CGM
    labels[ball(grid, (4, -6, 5), (50, 60, 50))] = WM
    labels[ball(grid, (-5, 8, 6), (18, 28, 18))] = CLASSES.index('VEN')
    labels[ball(grid, (25, -30, 20), (12, 12, 12))] = L
    return labels


def one_hot(labels: np.ndarray) -> np.ndarray:
    return (labels == np.arange(len(CLASSES)).reshape(-1, 1, 1, 1)).astype(np.float32)


@pytest.mark.parametrize('frame', ['RAS', 'LAS', 'oblique'])
@pytest.mark.parametrize('thick', [0, 1, 2])
def test_round_trip_through_the_model_grid(frame, thick):
    spacing = np.full(3, 1.3)
    spacing[thick] = 4.0
    scan = head(make_grid(frame, spacing, 180))
    labels = painted(scan.grid)
    grid = image.model_grid(scan, in_plane_mm=1.5, slice_mm=(3, 6))
    onto = [image.resample(Volume(part, scan.grid), grid) for part in one_hot(labels)]
    back = image.joint_probabilities(
        {'T1w': (np.stack(onto), grid)}, scan.grid, {'T1w': np.eye(4)}
    )
    assert back.dtype == np.float32
    np.testing.assert_allclose(back.sum(axis=0), 1, atol=1e-5)
    found = image.label_map(back)
    assert found.shape == scan.grid.shape
    assert found.dtype == np.uint8
    for channel, least in ((WM, 0.99), (CGM, 0.98), (CLASSES.index('VEN'), 0.98), (L, 0.97)):
        assert dice(found == INDICES[channel], labels == channel) > least


def test_two_passes_are_joined():
    flair_grid, t1w_grid = make_grid('oblique', (2, 2, 5), 180), make_grid('LAS', (3, 3, 3), 180)
    matrix = rigid((2, 3, -4), (3, -2, 1))  # FLAIR -> T1w
    truth = painted(t1w_grid)
    tissue = one_hot(np.where(truth == L, CGM, truth))  # the T1w pass sees no lesion ...
    tissue[:, ball(t1w_grid, (-25, -30, 20), (12, 12, 12))] = one_hot(np.array([[[L]]]))[:, 0, 0]
    there = painted(t1w_grid)  # ... but one that is none
    lesions = one_hot(np.where(there == L, L, 0))
    on_flair = np.stack(
        [image.resample(Volume(part, t1w_grid), flair_grid, matrix) for part in lesions]
    )
    on_flair[0] = 1 - on_flair[1:].sum(axis=0)
    passes = {'FLAIR': (on_flair, flair_grid), 'T1w': (tissue, t1w_grid)}
    for target, to in (
        (t1w_grid, {'T1w': np.eye(4), 'FLAIR': np.linalg.inv(matrix)}),
        (flair_grid, {'T1w': matrix, 'FLAIR': np.eye(4)}),
    ):
        joint = image.joint_probabilities(passes, target, to)
        np.testing.assert_allclose(joint.sum(axis=0), 1, atol=1e-4)
        assert joint.min() >= 0
        found = image.label_map(joint)
        expected = image.resample(
            Volume(truth.astype(np.float32), t1w_grid), target, to['T1w'], order=0
        )
        # At 5 mm slices a ball of 24 mm loses its rim.
        assert dice(found == 7, expected == L) > 0.85
        white = ((expected == WM) & (found == 2)).sum() / (expected == WM).sum()
        assert white > 0.95


@pytest.mark.parametrize('frame', ['RAS', 'LAS', 'oblique', 'PSR'])
def test_what_the_passes_cover_is_all_that_is_needed(frame):
    scan = make_grid(frame, (2, 3, 2), 200)
    whole = make_grid('oblique', (2, 2, 4), 180)
    looked_at = {
        'T1w': whole.part((slice(20, 70), slice(15, 80), slice(8, 40))),
        'FLAIR': whole.part((slice(30, 60), slice(5, 60), slice(4, 30))),
    }
    to = {'T1w': rigid((4, -3, 6), (5, 2, -3)), 'FLAIR': np.eye(4)}
    passes = {name: (one_hot(painted(grid)), grid) for name, grid in looked_at.items()}
    part = image.covered(scan, looked_at, to)
    everywhere = image.joint_probabilities(passes, scan, to)
    there = image.joint_probabilities(passes, scan.part(part), to)
    assert there.size < 0.7 * everywhere.size
    nothing = np.reshape([1, *np.zeros(len(CLASSES) - 1)], (-1, 1, 1, 1))
    spread = image.spread(there, part, scan.shape, outside=nothing)
    np.testing.assert_allclose(spread, everywhere, atol=1e-6)
    labels = image.label_map(there)
    np.testing.assert_array_equal(
        image.spread(labels, part, scan.shape), image.label_map(everywhere)
    )


def test_what_lies_beside_a_grid_covers_nothing_of_it():
    grid = make_grid(spacing_mm=(4, 4, 4))
    part = image.covered(grid, {'T1w': grid}, {'T1w': rigid(shift_mm=(500, 0, 0))})
    assert 0 in grid.part(part).shape
    labels = image.label_map(np.zeros((len(CLASSES), *grid.part(part).shape), np.float32))
    assert not image.spread(labels, part, grid.shape).any()


def test_where_the_model_looks():
    clinical = {mm: make_grid('oblique', (1, 1, mm)) for mm in (2, 3, 4, 5)}
    fine = make_grid('LAS', (1, 1, 1))
    sagittal = make_grid('RAS', (4, 1, 1))
    plan = image.plan_passes
    assert plan(fine, None) == ('T1w',)
    assert plan(None, clinical[3]) == ('FLAIR',)
    assert plan(None, None) == ()
    assert plan(fine, fine) == ('FLAIR',)
    assert plan(clinical[3], clinical[4]) == ('FLAIR',)
    assert plan(clinical[2], clinical[3]) == ('FLAIR',)
    assert plan(clinical[3], clinical[5]) == ('FLAIR', 'T1w')
    assert plan(fine, clinical[3]) == ('FLAIR', 'T1w')
    assert plan(clinical[4], fine) == ('FLAIR',)
    assert plan(sagittal, clinical[4]) == ('FLAIR', 'T1w')
    # The same slices, but the T1w's header is turned: the transform knows.
    turned = Grid(clinical[4].shape, rigid((90, 0, 0)) @ clinical[4].affine)
    assert plan(turned, clinical[4]) == ('FLAIR', 'T1w')
    assert plan(turned, clinical[4], rigid((90, 0, 0))) == ('FLAIR',)


# ------------------------------------------------------------------------------- measures


def test_volumes():
    grid = make_grid('oblique', (2, 2, 3))
    labels = np.zeros(grid.shape, np.uint8)
    labels[10:12, 10:13, 10], labels[0, 0, :2] = 7, 12
    volumes = image.volumes_mm3(labels, grid)
    assert list(volumes) == list(CLASSES[1:])
    assert volumes['L'] == pytest.approx(72)
    assert volumes['VEN'] == pytest.approx(24)
    assert volumes['WM'] == 0


def test_the_volume_in_doubt_is_what_the_probabilities_call_wrong():
    grid = Grid((3, 1, 1), np.diag([1.0, 2, 1, 1]))
    p = np.zeros((len(CLASSES), *grid.shape), np.float32)
    p[[0, WM], 0, 0, 0] = 0.25, 0.75
    p[[0, WM], 1, 0, 0] = 0.6, 0.4
    p[[WM, L], 2, 0, 0] = 0.3, 0.7
    doubt = image.doubt_mm3(p, image.label_map(p), grid)
    assert doubt['WM'] == pytest.approx(2 * (0.25 + 0.4 + 0.3))
    assert doubt['L'] == pytest.approx(2 * 0.3)
    assert doubt['CGM'] == 0
    assert doubt['brain'] == pytest.approx(2 * (0.25 + 0.4))


# ---------------------------------------------------------------------------------- files


def write(path: Path, data=None, affine=None, **header) -> Path:
    grid = make_grid(spacing_mm=(8, 8, 8), extent_mm=160)
    data = head(grid).data if data is None else data
    nifti = nib.Nifti1Image(data, grid.affine if affine is None else affine)
    for field, value in header.items():
        nifti.header[field] = value
    nib.save(nifti, path)
    return path


def patch(path: Path, **fields) -> Path:
    """Change header fields of a file as it lies on disk."""
    opened = gzip.open if path.suffix == '.gz' else open
    with opened(path, 'rb') as stream:
        content = bytearray(stream.read())
    header = np.frombuffer(content, nib.nifti1.header_dtype, count=1).copy()
    for field, value in fields.items():
        header[field] = value
    content[:348] = header.tobytes()
    with opened(path, 'wb') as stream:
        stream.write(content)
    return path


@pytest.mark.parametrize('frame', ['RAS', 'LAS', 'oblique'])
@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_load_scan_keeps_the_frame(tmp_path, frame, suffix, caplog):
    volume = head(make_grid(frame, (4, 4, 6)))
    path = tmp_path / f'scan{suffix}'
    image.save(path, volume.data, volume.grid, dtype=np.int16, slope=0.5)
    loaded = image.load_scan(path)
    assert loaded.data.dtype == np.float32
    assert loaded.grid.shape == volume.grid.shape
    np.testing.assert_allclose(loaded.data, volume.data, atol=0.26)
    np.testing.assert_allclose(loaded.grid.affine, volume.grid.affine, atol=1e-4)
    np.testing.assert_array_equal(image.load_grid(path).affine, loaded.grid.affine)
    assert not caplog.records


def singular(tmp_path):
    return patch(write(tmp_path / 'a.nii'), srow_x=0, srow_y=0, srow_z=0)


def unreadable(tmp_path):
    path = write(tmp_path / 'a.nii')
    path.chmod(0)
    return path


def truncated(tmp_path, name='a.nii.gz'):
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def text(tmp_path, name='a.nii.gz', content=b'not a scan'):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def analyze(tmp_path):
    data = head(make_grid(spacing_mm=(8, 8, 8))).data
    nib.save(nib.Spm2AnalyzeImage(data, np.eye(4)), tmp_path / 'a.img')
    return tmp_path / 'a.img'


SMALL = np.ones((20, 20, 20), np.float32) * np.arange(20, dtype=np.float32)


@pytest.mark.parametrize(
    ('make', 'says'),
    [
        (lambda d: d / 'a.nii.gz', 'no such file'),
        (lambda d: text(d), 'not a readable NIfTI'),
        (lambda d: text(d, content=b''), 'not a readable NIfTI'),
        (lambda d: text(d, 'a.nii', b'\0' * 400), 'NIfTI'),
        (lambda d: truncated(d), 'truncated'),
        (lambda d: truncated(d, 'a.nii'), 'truncated'),
        (analyze, 'not a NIfTI file'),
        (lambda d: write(d / 'a.nii', np.stack([SMALL, SMALL], -1), np.diag([8, 8, 8, 1])), '4 d'),
        (lambda d: write(d / 'a.nii', SMALL[0], np.diag([8, 8, 8, 1])), '2 dimensions'),
        (lambda d: write(d / 'a.nii', SMALL.astype(complex)), 'complex128'),
        (
            lambda d: write(
                d / 'a.nii', np.zeros((20, 20, 20), [('R', 'u1'), ('G', 'u1'), ('B', 'u1')])
            ),
            'RGB',
        ),
        (lambda d: write(d / 'a.nii', SMALL * np.nan), 'finite'),
        (lambda d: write(d / 'a.nii', SMALL * 0 + 7), 'every voxel is 7'),
        (lambda d: write(d / 'a.nii', -SMALL), 'above zero'),
        (singular, 'affine'),
        (lambda d: patch(write(d / 'a.nii'), srow_x=np.nan), 'affine'),
        (lambda d: write(d / 'a.nii', affine=np.diag([0.008, 0.008, 0.008, 1])), 'units'),
        (lambda d: write(d / 'a.nii', affine=np.diag([80, 8, 8, 1])), '80 x 8 x 8 mm'),
        (lambda d: write(d / 'a.nii', affine=np.diag([2, 8, 8, 1])), 'do not cover'),
        (lambda d: write(d / 'a.nii', SMALL[:7], np.diag([10, 8, 8, 1])), 'do not cover'),
        (lambda d: patch(write(d / 'a.nii'), scl_slope=1, scl_inter=np.nan), 'NIfTI'),
    ],
)
def test_a_bad_scan_is_one_clear_line(tmp_path, make, says):
    path = make(tmp_path)
    with pytest.raises(ImageError, match=says) as caught:
        image.load_scan(path)
    message = str(caught.value)
    assert message.startswith(f'{path}: ')
    assert '\n' not in message
    assert ': ' in message.removeprefix(f'{path}: ')  # what is wrong: what to do


@pytest.mark.skipif('__import__("os").geteuid() == 0', reason='root may read everything')
def test_a_scan_without_permission(tmp_path):
    with pytest.raises(ImageError, match='permissions'):
        image.load_scan(unreadable(tmp_path))


SHEARED = np.array([[8, 0.5, 0, -80], [0, 8, 0, -80], [0, 0, 8, -80], [0, 0, 0, 1.0]])


@pytest.mark.parametrize(
    ('make', 'says'),
    [
        (lambda p: write(p, SMALL[..., None], np.diag([8, 8, 8, 1])), 'one volume'),
        (lambda p: write(p, np.where(SMALL == 3, np.nan, SMALL)), '400 voxels are not finite'),
        (lambda p: write(p, np.where(SMALL == 3, 1e300, SMALL.astype(float))), '400 voxels'),
        (lambda p: write(p, affine=SHEARED), 'not orthogonal'),
        (lambda p: patch(write(p), sform_code=0, qform_code=0), 'states no orientation'),
        (lambda p: patch(write(p), qform_code=1, qoffset_x=50), 'disagree by up to 1'),
        (lambda p: patch(write(p), qform_code=1, quatern_b=9), 'not a rotation'),
    ],
)
def test_a_questionable_scan_is_read_with_a_warning(tmp_path, make, says, caplog):
    path = make(tmp_path / 'a.nii')
    with caplog.at_level(logging.WARNING, 'bids_jointseg'):
        volume = image.load_scan(path)
    (record,) = caplog.records
    assert record.getMessage().startswith(f'{path}: ')
    assert says in record.getMessage()
    assert volume.data.shape == volume.grid.shape
    assert np.isfinite(volume.data).all()


def test_the_sform_wins_and_a_slope_of_nan_is_none(tmp_path):
    path = patch(write(tmp_path / 'a.nii'), qform_code=1, qoffset_x=50, scl_slope=np.nan)
    volume = image.load_scan(path)
    np.testing.assert_allclose(
        volume.grid.affine, make_grid(spacing_mm=(8, 8, 8), extent_mm=160).affine, atol=1e-4
    )
    assert volume.data.max() < 1000


def test_save_writes_what_other_programs_expect(tmp_path):
    grid = make_grid('oblique', (6, 6, 8))
    values = np.linspace(0, 1, np.prod(grid.shape)).reshape(grid.shape)
    one, two = tmp_path / 'one.nii.gz', tmp_path / 'two.nii.gz'
    for path in (one, two):
        image.save(path, values, grid, dtype=np.uint8, slope=1 / 255)
    assert one.read_bytes() == two.read_bytes()
    raw = gzip.decompress(one.read_bytes())
    header = np.frombuffer(raw, nib.nifti1.header_dtype, count=1)[0]
    assert header['magic'] == b'n+1'
    assert header['scl_slope'] == np.float32(1 / 255)
    assert header['scl_inter'] == 0
    assert header['sform_code'] == header['qform_code'] == 1
    assert len(raw) == 352 + values.size
    loaded = nib.load(one)
    assert loaded.get_data_dtype() == np.uint8
    assert loaded.header.get_xyzt_units()[0] == 'mm'
    np.testing.assert_allclose(loaded.get_fdata(), values, atol=0.5001 / 255)
    np.testing.assert_allclose(loaded.get_qform(), grid.affine, atol=1e-4)
    mask = tmp_path / 'mask.nii'
    image.save(mask, values > 0.5, grid, dtype=np.uint8)
    header = np.frombuffer(mask.read_bytes(), nib.nifti1.header_dtype, count=1)[0]
    assert (header['scl_slope'], header['scl_inter']) == (1, 0)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(mask)).T, values > 0.5)
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        'mask.nii',
        'one.nii.gz',
        'two.nii.gz',
    ]


def test_save_clips_and_rounds_integers(tmp_path):
    grid = make_grid(spacing_mm=(10, 10, 10), extent_mm=80)
    values = np.full(grid.shape, 254.6)
    values[0], values[1] = -3, 300
    image.save(tmp_path / 'a.nii', values, grid, dtype=np.uint8)
    stored = np.asarray(nib.load(tmp_path / 'a.nii').dataobj)
    assert (stored[0].max(), stored[1].min(), stored[2].min()) == (0, 255, 255)


def test_save_takes_numbers_of_the_file_as_they_are(tmp_path):
    grid = make_grid(spacing_mm=(10, 10, 10), extent_mm=80)
    stored = np.arange(np.prod(grid.shape), dtype=np.uint8).reshape(grid.shape)
    values = stored / np.float32(255)
    for name, data in (('stored', stored), ('values', values)):
        image.save(tmp_path / f'{name}.nii', data, grid, dtype=np.uint8, slope=1 / 255)
    assert (tmp_path / 'stored.nii').read_bytes() == (tmp_path / 'values.nii').read_bytes()
    np.testing.assert_allclose(nib.load(tmp_path / 'stored.nii').get_fdata(), values, atol=1e-6)


@pytest.mark.parametrize('codes', [(0, 1), (1, 0), (2, 4)])
def test_save_like_a_scan_has_its_very_frame(tmp_path, codes):
    sheared = make_grid('oblique', (8, 8, 9))
    sheared.affine[0, 1] += 0.2
    path = tmp_path / 'scan.nii.gz'
    nifti = nib.Nifti1Image(head(sheared).data, None)
    nifti.set_sform(sheared.affine, code=codes[0])
    nifti.set_qform(sheared.affine, code=codes[1])
    nib.save(nifti, path)
    scan = image.load_scan(path)
    image.save(tmp_path / 'mask.nii.gz', scan.data > 300, scan.grid, dtype=np.uint8, like=path)
    mask, source = nib.load(tmp_path / 'mask.nii.gz'), nib.load(path)
    np.testing.assert_array_equal(mask.affine, source.affine)
    np.testing.assert_array_equal(mask.get_qform(), source.get_qform())
    np.testing.assert_array_equal(mask.header.get_zooms(), source.header.get_zooms())
    assert (mask.header['sform_code'], mask.header['qform_code']) == codes


def test_save_leaves_nothing_half_done(tmp_path, monkeypatch):
    grid = make_grid(spacing_mm=(10, 10, 10), extent_mm=80)
    path = tmp_path / 'a.nii.gz'
    path.write_bytes(b'the one before')

    def full(*_args, **_options):
        raise OSError('disk full')

    monkeypatch.setattr(nib.Nifti1Header, 'write_to', full)
    with pytest.raises(OSError, match='disk full'):
        image.save(path, np.zeros(grid.shape), grid, dtype=np.uint8)
    assert [item.name for item in tmp_path.iterdir()] == ['a.nii.gz']
    assert path.read_bytes() == b'the one before'
    with pytest.raises(ImageError, match='do not fit'):
        image.save(path, np.zeros((2, 2, 2)), grid, dtype=np.uint8)


def test_itk_transforms_mean_what_itk_means(tmp_path):
    matrix = rigid((5, -10, 20), (3, -4, 5))
    path = tmp_path / 'a.txt'
    image.save_itk(matrix, path)
    np.testing.assert_allclose(image.load_itk(path), matrix, atol=1e-12)
    transform = sitk.ReadTransform(str(path))
    point = np.array([10.0, 20.0, 30.0])
    lps = np.array([-1, -1, 1])
    np.testing.assert_allclose(
        lps * transform.TransformPoint(lps * point), matrix[:3, :3] @ point + matrix[:3, 3]
    )
    # ANTs turns about a centre.
    centred = sitk.AffineTransform(transform.GetMatrix(), (1.0, 2, 3), (7.0, 8, 9))
    centred.WriteTransform(str(path))
    np.testing.assert_allclose(
        lps * centred.TransformPoint(lps * point),
        (image.load_itk(path) @ [*point, 1])[:3],
    )


@pytest.mark.parametrize('content', ['', 'nonsense', 'Transform: Euler3DTransform_double_3_3\n'])
def test_a_bad_transform_is_one_clear_line(tmp_path, content):
    path = tmp_path / 'a.txt'
    path.write_text(content)
    with pytest.raises(ImageError, match=f'{path}: not an ITK affine'):
        image.load_itk(path)
    with pytest.raises(ImageError, match='absent'):
        image.load_itk(tmp_path / 'absent.txt')


@pytest.mark.parametrize('spacing', [(1.0, 1.0, 1.0), (1.0, 1.0, 3.0)])
def test_what_lies_apart_from_the_brain_is_background(spacing):
    """A ball is the brain; a smaller one hangs on it by a bridge two voxels thick.

    All around may be white matter, a bit: near the ball it stays so.
    """
    axes = np.ogrid[:40, :60, :40]
    brain = sum((x - c) ** 2 for x, c in zip(axes, (20, 18, 20), strict=True)) < 14**2
    neck = sum((x - c) ** 2 for x, c in zip(axes, (20, 48, 20), strict=True)) < 9**2
    mask = brain | neck
    mask[19:21, 25:45, 19:21] = True
    probabilities = np.zeros((8, 40, 60, 40), np.float32)
    probabilities[1] = 0.1 + 0.7 * mask
    probabilities[0] = 1 - probabilities[1]
    grid = Grid(mask.shape, np.diag([*spacing, 1]))
    kept = image.keep_brain(probabilities, grid)
    assert (kept[1] > 0.5)[brain].mean() > 0.995
    assert not (kept[1] > 0)[neck].any()
    np.testing.assert_allclose(kept.sum(0), 1)
    far = ndimage.distance_transform_edt(~brain, sampling=spacing)
    faint = kept[1] == np.float32(0.1)
    assert faint[(far > 0) & (far < 5) & ~mask].all()
    assert not faint[far > np.sqrt(3) * 7].any()  # to the corner of a box, rounded to slices
    alone = np.where(brain, probabilities, np.eye(8, dtype=np.float32)[0][:, None, None, None])
    np.testing.assert_array_equal(image.keep_brain(alone, grid), alone)
