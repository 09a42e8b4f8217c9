"""Quality control: undamaged scans pass, scans damaged on purpose do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_image import ball, make_grid, points, rigid

from bids_jointseg import image, quality
from bids_jointseg.image import Grid, Volume
from bids_jointseg.labels import LABELS

INDEX = {label.abbreviation: label.index for label in LABELS}
LEVELS = {
    # BG, WM, L, CGM, SGM, BS, CBM, VEN
    'T1w': (0, 800, 600, 560, 650, 780, 600, 180),
    'FLAIR': (0, 400, 800, 430, 420, 400, 430, 60),
}
IDENTITY = {(a, b): np.eye(4) for a in LEVELS for b in LEVELS}


@pytest.fixture(scope='module')
def truth() -> tuple[np.ndarray, image.Grid]:
    """Draw a brain of nested shapes: nearly symmetric, as brains are."""
    grid = make_grid(spacing_mm=(2, 2, 2), extent_mm=220)
    labels = np.zeros(grid.shape, np.uint8)
    folds = 9 * np.sin(points(grid) / 6).prod(axis=-1)
    radius = np.linalg.norm((points(grid) - (10, -20, 30)) / (62, 78, 62), axis=-1) + folds / 60
    labels[radius < 1] = INDEX['CGM']
    labels[radius < 0.86] = INDEX['WM']
    labels[ball(grid, (0, -38, -58), (38, 26, 20))] = INDEX['CBM']
    labels[ball(grid, (0, -12, -64), (12, 12, 26))] = INDEX['BS']
    for side in (-1, 1):
        labels[ball(grid, (side * 16, 5, 5), (7, 26, 12))] = INDEX['VEN']
        labels[ball(grid, (side * 26, 6, -6), (8, 14, 10))] = INDEX['SGM']
    labels[ball(grid, (38, 20, 12), (9, 6, 6))] = INDEX['L']
    labels[ball(grid, (30, -40, 20), (5, 5, 6))] = INDEX['L']
    return labels, grid


def scan(name: str, truth: tuple[np.ndarray, image.Grid], noise: float = 0.02) -> Volume:
    """Return a scan of it within a head, with noise in the air, too."""
    labels, grid = truth
    rng = np.random.default_rng(len(name))
    data = np.zeros(grid.shape)
    for value, label in zip(LEVELS[name], LABELS, strict=True):
        data[labels == label.index] = value
    scalp = ball(grid, (0, 0, 0), (82, 97, 84)) & ~ball(grid, (0, 0, 0), (76, 91, 78))
    data[scalp & (labels == 0)] = 0.6 * LEVELS[name][1]
    sigma = noise * LEVELS[name][1]
    noisy = np.hypot(data + rng.normal(0, sigma, data.shape), rng.normal(0, sigma, data.shape))
    return Volume(noisy.astype(np.float32), grid)


def judged(volumes, labels, *, between=IDENTITY, **more) -> tuple[str, str, dict[str, float]]:
    measures = quality.measure(volumes, labels, between=between, doubt_mm3={}, **more)
    verdict, reasons = quality.judge(measures)
    return verdict, '; '.join(reasons), measures


def test_what_is_sound_passes(truth):
    volumes = {name: scan(name, truth, 0.01) for name in ('T1w', 'FLAIR')}
    verdict, reasons, measures = judged(volumes, truth[0], agreement=0.95)
    assert (verdict, reasons) == ('pass', '')
    assert {rule.measure for rule in quality.RULES} <= set(measures)
    assert measures['misalignment_mm'] == 0
    assert measures['mirrored_ratio'] < 0.9
    assert measures['gray_to_white_T1w'] == pytest.approx(0.7, abs=0.01)
    assert measures['contrast_to_noise_T1w'] == pytest.approx(240 / 8, rel=0.1)


def test_common_noise_in_the_air_passes(truth):
    volumes = {name: scan(name, truth, 0.03) for name in ('T1w', 'FLAIR')}
    verdict, reasons, measures = judged(volumes, truth[0], agreement=0.95)
    assert (verdict, reasons) == ('pass', '')
    # The median of Rayleigh's distribution.
    assert measures['air_percent_T1w'] == pytest.approx(100 * 0.03 * 1.18, rel=0.05)


def test_a_scalp_as_dark_as_where_fat_is_saturated_is_no_air(truth):
    labels, grid = truth
    dark = scan('FLAIR', truth, 0.01)
    face = ball(grid, (0, 70, -60), (50, 38, 40)) & (labels == 0)
    dark.data[face] += 0.3 * LEVELS['FLAIR'][1]
    verdict, reasons, _ = judged({'FLAIR': dark}, labels)
    assert (verdict, reasons) == ('pass', '')


def test_a_scan_without_noise_has_no_contrast_to_noise(truth):
    """Rounded to few levels, as some programs write scans, most neighbours are equal."""
    smooth = scan('T1w', truth, 1e-4)
    rounded = Volume(np.round(smooth.data / 100) * 100, smooth.grid)
    verdict, _, measures = judged({'T1w': rounded}, truth[0])
    assert verdict == 'pass'
    assert 'contrast_to_noise_T1w' not in measures


@pytest.mark.parametrize(('noise', 'verdict'), [(0.08, 'check'), (0.25, 'fail')])
def test_noise_is_seen(truth, noise, verdict):
    found, reasons, _ = judged({'T1w': scan('T1w', truth, noise)}, truth[0])
    assert found == verdict
    assert 'the T1w is noisy' in reasons


@pytest.mark.parametrize('name', ['T1w', 'FLAIR'])
@pytest.mark.parametrize('axis', [0, 1])
def test_motion_is_seen_in_its_ghosts(truth, name, axis):
    clean = scan(name, truth, 0.01)
    size = clean.data.shape[axis]
    lines = np.moveaxis(np.fft.fftn(clean.data), axis, 0)
    shift = np.exp(-2j * np.pi * np.fft.fftfreq(size) * 6)[:, None, None]
    moved = np.isin(np.arange(size) % 4, (1, 2)) & (np.abs(np.fft.fftfreq(size)) > 0.01)
    lines[moved] *= shift[moved]
    data = np.abs(np.fft.ifftn(np.moveaxis(lines, 0, axis))).astype(np.float32)
    _, reasons, measures = judged({name: clean}, truth[0])
    assert 'motion' not in reasons
    assert measures[f'ghost_percent_{name}'] < 0.2
    _, reasons, _ = judged({name: Volume(data, clean.grid)}, truth[0])
    assert f'on two sides of the {name}: motion' in reasons


@pytest.mark.parametrize('name', ['T1w', 'FLAIR'])
@pytest.mark.parametrize(('spread', 'verdict'), [(0.1, 'pass'), (0.4, 'check')])
def test_a_strong_coil_is_seen(truth, name, spread, verdict):
    labels, grid = truth
    dark = points(grid)[..., 2]
    dark = dark * spread / dark[labels > 0].std()
    bent = scan(name, truth, 0.01)
    bent = Volume((bent.data * np.exp(dark)).astype(np.float32), grid)
    found, reasons, measures = judged({name: bent}, labels)
    assert found == verdict
    assert ('very unevenly' in reasons) == (verdict == 'check')
    assert measures[f'coil_percent_{name}'] == pytest.approx(100 * spread, rel=0.3)


def test_a_cut_field_of_view_is_seen(truth):
    labels, grid = truth
    whole, top = scan('T1w', truth), 65
    affine = grid.affine
    part = Volume(whole.data[:, :, :top], image.Grid((*grid.shape[:2], top), affine))
    verdict, reasons, measures = judged({'T1w': part}, labels[:, :, :top])
    assert verdict == 'fail'
    assert 'edge of the scan' in reasons
    assert measures['cut_mm2'] == (labels[:, :, top - 1] > 0).sum() * 4


def test_a_wrong_contrast_is_seen(truth):
    verdict, reasons, _ = judged({'T1w': scan('FLAIR', truth, 0.01)}, truth[0])
    assert verdict == 'fail'
    assert 'the T1w does not look like one' in reasons
    verdict, reasons, _ = judged({'FLAIR': scan('T1w', truth, 0.01)}, truth[0])
    assert verdict == 'fail'
    assert 'the FLAIR does not look like one' in reasons


@pytest.mark.parametrize('shift_mm', [(20, 0, 0), (0, 20, 0), (0, 0, -20)])
def test_an_error_of_registration_is_seen(truth, shift_mm):
    volumes = {name: scan(name, truth, 0.01) for name in ('T1w', 'FLAIR')}
    matrix = rigid(shift_mm=shift_mm)
    between = IDENTITY | {('T1w', 'FLAIR'): matrix, ('FLAIR', 'T1w'): np.linalg.inv(matrix)}
    verdict, reasons, _ = judged(volumes, truth[0], between=between)
    assert verdict == 'fail'
    assert 'look at the registration' in reasons


def test_a_mirrored_scan_is_seen(truth):
    flair = scan('FLAIR', truth, 0.01)
    flair = Volume(np.ascontiguousarray(flair.data[::-1]), flair.grid)
    verdict, reasons, _ = judged({'T1w': scan('T1w', truth, 0.01), 'FLAIR': flair}, truth[0])
    assert verdict == 'fail'
    assert 'may be mirrored' in reasons


def test_what_only_one_half_of_the_brain_has_is_seen(truth):
    labels, grid = truth
    lost = labels.copy()
    lost[(points(grid)[..., 0] > 40) & (labels != INDEX['CBM'])] = 0
    verdict, reasons, _ = judged({'T1w': scan('T1w', truth, 0.01)}, lost)
    assert verdict != 'pass'
    assert 'left and right differ' in reasons


def test_lesions_in_impossible_places_are_seen(truth):
    labels = truth[0].copy()
    labels[5:9, 5:9, 5:9] = INDEX['L']
    verdict, reasons, measures = judged({'T1w': scan('T1w', truth, 0.01)}, labels)
    assert verdict == 'check'
    assert '512 mm3 of lesion' in reasons
    assert measures['stray_lesions_mm3'] == 512


def test_a_brain_that_is_not_there_fails_without_an_error(truth):
    volumes = {name: scan(name, truth) for name in ('T1w', 'FLAIR')}
    verdict, reasons, measures = judged(volumes, np.zeros_like(truth[0]))
    assert verdict == 'fail'
    assert 'very small' in reasons
    assert set(measures) == {'brain_ml', 'cut_mm2'}


@pytest.mark.parametrize('frame', ['RAS', 'PSR'])
def test_what_the_skull_holds_down_to_the_cerebellum(frame):
    """Half a ball of which the cubes on its border are half full; a canal goes on below."""
    grid = make_grid(frame, (2, 2, 2), 220)
    cubes = make_grid('RAS', (4, 4, 4), 260)
    x, y, z = np.moveaxis(points(cubes) - (10, -20, 30), -1, 0)
    radius = np.sqrt(x**2 + y**2 + z**2)
    inside = ((70 - radius) / 4 + 0.5).clip(0, 1)
    inside[(np.hypot(x, y) < 12) & (z < 0)] = 1
    inside = Volume(inside.astype(np.float32), cubes)
    labels = np.zeros(grid.shape, np.uint8)
    cerebellum = ball(grid, (0, -40, 20), (30, 20, 20))
    labels[ball(grid, (0, 0, 10), (60, 60, 50))] = INDEX['CGM']
    labels[cerebellum] = INDEX['CBM']
    scan = Volume(np.where(ball(grid, radii=(100, 100, 100)), 100, 0).astype(np.float32), grid)
    heights = np.arange(np.percentile(points(grid)[cerebellum][:, 2] - 30, 0.1), 71, 0.1)
    expected = (np.pi * (70**2 - heights**2).clip(0)).sum() * 0.1 / 1000
    assert quality.intracranial_ml(inside, labels, scan) == pytest.approx(expected, rel=0.01)

    bare = Volume(np.where(labels > 0, scan.data, 0), grid)
    assert quality.intracranial_ml(inside, labels, bare) is None
    half = (slice(grid.shape[0] // 2, None), slice(None), slice(None))
    cut = Volume(scan.data[half], grid.part(half))
    assert quality.intracranial_ml(inside, labels[half], cut) is None
    assert quality.intracranial_ml(inside, np.where(cerebellum, 0, labels), scan) is None

    white = np.where(labels == INDEX['CGM'], INDEX['WM'], labels).astype(np.uint8)
    for spread, told in ((0.1, True), (0.4, False)):
        dark = np.exp(spread * points(grid)[..., 2] / points(grid)[labels > 0][:, 2].std())
        bent = Volume((scan.data * dark).astype(np.float32), grid)
        assert (quality.intracranial_ml(inside, white, bent) is not None) == told


def test_a_verdict_follows_from_the_limits():
    rule = quality.Rule('x', '', 1, 2, True, '')
    assert [rule.verdict(x) for x in (1, 1.5, 2.5, math.nan)] == ['pass', 'check', 'fail', 'pass']
    rule = quality.Rule('x', '', 2, None, False, '')
    assert [rule.verdict(x) for x in (2, 1, math.nan)] == ['pass', 'check', 'pass']
    assert quality.judge({}) == ('pass', [])


@pytest.mark.parametrize('frame', ['RAS', 'LAS', 'oblique'])
@pytest.mark.parametrize(('yaw', 'roll'), [(0, 0), (9, -12), (-12, -9)])
def test_the_plane_of_symmetry_is_found_in_any_frame(frame, yaw, roll):
    """Also of a head that is turned, in which the search has other minima."""
    y, r = np.deg2rad((yaw, roll))
    about_z = np.array([[np.cos(y), -np.sin(y), 0], [np.sin(y), np.cos(y), 0], [0, 0, 1]])
    about_y = np.array([[np.cos(r), 0, np.sin(r)], [0, 1, 0], [-np.sin(r), 0, np.cos(r)]])
    turn = np.eye(4)
    turn[:3, :3] = about_z @ about_y
    upright = make_grid(frame, (3, 3, 3))
    labels = np.where(ball(upright, radii=(60, 76, 60)), INDEX['CGM'], 0)
    labels[ball(upright, radii=(52, 68, 52))] = INDEX['WM']
    for side in (-1, 1):
        labels[ball(upright, (side * 20, 10, 5), (10, 20, 12))] = INDEX['VEN']
    labels[ball(upright, (0, -40, -30), (34, 22, 18))] = INDEX['CBM']
    grid = Grid(upright.shape, turn @ upright.affine)
    mirror = quality.mirror_plane(labels, grid)
    right, left = (turn[:3, :3] @ (x, -20, 30) for x in (40, -20))
    there = mirror[:3, :3] @ right + mirror[:3, 3]
    np.testing.assert_allclose(there, left, atol=1.5)


@pytest.mark.filterwarnings('error')
def test_without_structure_the_plane_of_symmetry_is_upright():
    """One class is like any mirror image of it: nothing is said, nothing is turned."""
    grid = make_grid('RAS', (3, 3, 3))
    labels = np.where(ball(grid, radii=(60, 76, 60)), INDEX['WM'], 0)
    mirror = quality.mirror_plane(labels, grid)
    np.testing.assert_allclose(mirror[:3, :3], np.diag([-1, 1, 1]), atol=0.02)
