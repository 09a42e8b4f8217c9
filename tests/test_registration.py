"""Rigid registration: of simple heads, and of real patients.

The transforms that were published for the patients are affine although a head is rigid, so they
are compared through their best rigid fit over the brain.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from test_image import ball, head, make_grid, points, rigid

from bids_jointseg import image, registration
from bids_jointseg.image import Grid, ImageError, Volume

OPENMS = Path(__file__).parents[2] / 'shared' / 'data' / 'openms'
VISITS = ('sub-01/ses-1', 'sub-01/ses-2', 'sub-04/ses-1', 'sub-12/ses-1', 'sub-12/ses-2')


def other_contrast(volume: Volume, grid: Grid, matrix: np.ndarray) -> Volume:
    """The head as a scan with other contrast on another grid sees it, `matrix`: grid -> head."""
    data = image.resample(volume, grid, matrix)
    levels = [0, 200, 600, 800, 1000], [0, 150, 700, 450, 300]
    noise = np.random.default_rng(5).normal(0, 5, grid.shape)
    return Volume(np.abs(np.interp(data, *levels) + noise).astype(np.float32), grid)


def test_register_finds_the_way_back():
    t1w = head(make_grid('LAS', (4, 4, 4)))
    truth = rigid((9, -6, 12), (12, -18, 10))
    flair = other_contrast(t1w, make_grid('oblique', (3, 3, 6)), truth)
    found = registration.register(flair, t1w)
    brain = points(t1w.grid)[ball(t1w.grid)][::50]
    there = (brain - truth[:3, 3]) @ truth[:3, :3]  # the FLAIR's points
    error = there @ found[:3, :3].T + found[:3, 3] - brain
    assert np.linalg.norm(error, axis=1).mean() < 0.5
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.linalg.det(found) == pytest.approx(1)


def test_register_needs_no_help_from_the_headers_and_repeats_itself(caplog):
    t1w = head(make_grid('RAS', (6, 6, 6)))
    flair = other_contrast(t1w, make_grid('RAS', (6, 6, 7)), np.eye(4))
    far = rigid((5, 0, 0), (300, -100, 50))
    moved = Volume(flair.data, Grid(flair.grid.shape, far @ flair.grid.affine))
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    found = [registration.register(moved, t1w)]
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1 if threads > 1 else 2)
    found.append(registration.register(moved, t1w))
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    np.testing.assert_array_equal(*found)  # whatever the machine
    assert '321 mm apart' in caplog.text
    brain = points(t1w.grid)[ball(t1w.grid)][::50]
    both = found[0] @ far
    error = brain @ both[:3, :3].T + both[:3, 3] - brain
    assert np.linalg.norm(error, axis=1).mean() < 1.5


@pytest.mark.parametrize(
    'size', [(169, 202, 223), (84, 223, 202), (156, 149, 150), (338, 202, 223), (40, 83, 118)]
)
def test_samples_of_a_registration_fill_the_volume(size):
    """Every 169th voxel of rows of 169 is one plane, which showed no head."""
    for samples in (20_000, 45_000, 60_000):
        step = int(np.ceil(1 / registration._share(size, samples)))
        taken = np.unravel_index(np.arange(0, np.prod(size), step), size, order='F')
        assert 0.6 < len(taken[0]) / samples < 1.6
        for axis, length in zip(taken, size, strict=True):
            share = np.bincount(4 * axis // length, minlength=4) / len(axis)
            assert share.min() > 0.15, (samples, step)


def test_register_refuses_what_shows_no_head():
    t1w = head(make_grid('RAS', (8, 8, 8)))
    noise = np.random.default_rng(0).normal(100, 10, t1w.data.shape).astype(np.float32)
    with pytest.raises(ImageError, match='cannot be aligned'):
        registration.register(t1w, Volume(noise, t1w.grid))


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def brain_points(scan: Volume) -> np.ndarray:
    """Points (n, 3) of the head, RAS mm, in an ellipsoid of a brain's size below its top."""
    voxels = np.argwhere(scan.data > image.foreground(scan.data))[::97]
    points = apply(scan.grid.affine, voxels)
    centre = np.median(points, axis=0)
    centre[2] = np.percentile(points[:, 2], 99.9) - 65
    return points[np.linalg.norm((points - centre) / (62, 78, 58), axis=1) < 1]


def rigid_fit(points: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return the rigid matrix that brings `points` nearest to `there` (Kabsch, 1976)."""
    a, b = points.mean(axis=0), there.mean(axis=0)
    left, _, right = np.linalg.svd((points - a).T @ (there - b))
    flip = np.diag([1, 1, np.linalg.det(left @ right)])
    matrix = np.eye(4)
    matrix[:3, :3] = (left @ flip @ right).T
    matrix[:3, 3] = b - matrix[:3, :3] @ a
    return matrix


@pytest.mark.slow
@pytest.mark.skipif(not OPENMS.is_dir(), reason='the example scans are not here')
@pytest.mark.parametrize('moved', [False, True])
@pytest.mark.parametrize('visit', VISITS)
def test_against_published_transforms(visit, moved):
    stem = visit.replace('/', '_')
    anat = OPENMS / visit / 'anat'
    flair = image.load_scan(anat / f'{stem}_FLAIR.nii.gz')
    t1w = image.load_scan(anat / f'{stem}_T1w.nii.gz')
    # It says from T1w to FLAIR, of images; so it maps the FLAIR's points to the T1w's.
    published = image.load_itk(
        OPENMS
        / 'derivatives/reference'
        / visit
        / 'anat'
        / f'{stem}_from-T1w_to-FLAIR_mode-image_xfm.txt'
    )
    brain = brain_points(flair)
    assert len(brain) > 1000
    truth = rigid_fit(brain, apply(published, brain))
    away = np.eye(4)
    if moved:  # turned and shifted by some 25 mm
        angle = np.deg2rad(9)
        away[:3, :3] = [
            [np.cos(angle), -np.sin(angle), 0],
            [np.sin(angle), np.cos(angle), 0],
            [0, 0, 1],
        ]
        away[:3, 3] = (15, -12, 18)
        flair = Volume(flair.data, Grid(flair.grid.shape, away @ flair.grid.affine))
    # As the workflow does it: the T1w stands still.
    found = np.linalg.inv(registration.register(t1w, flair)) @ away
    error = np.linalg.norm(apply(found, brain) - apply(truth, brain), axis=1)
    assert error.mean() < 1.0  # measured: 0.25 to 0.7; 1.5 is the promise
