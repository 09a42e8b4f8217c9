"""How unevenly a coil brightens a scan is found in its white matter, and undone."""

from __future__ import annotations

import numpy as np
import pytest
from test_image import ball, make_grid, points

from bids_jointseg import coil
from bids_jointseg.image import Grid, Volume


def through_a_coil(grid: Grid, spread: float) -> tuple[Volume, np.ndarray, np.ndarray]:
    """Return a scan that a coil has made uneven by so much, its white matter and its brain.

    White matter and cortex lie in waves: no place in the brain is far from either.
    """
    x, y, z = np.moveaxis(points(grid) - (10, -20, 30), -1, 0)
    brain = ball(grid, radii=(66, 80, 66))
    white = brain & (np.sin(x / 5) + np.sin(y / 6) + np.sin(z / 7) > 0)
    field = x / 70 + np.cos(y / 40) - (z / 90) ** 2
    field *= spread / field[brain].std()
    data = np.where(white, 800.0, np.where(brain, 500, 0)) * np.exp(field)
    noise = np.random.default_rng(0).normal(0, 20, grid.shape)
    head = ball(grid, radii=(85, 100, 85))
    data = np.where(head & ~brain, 300, data) + np.where(head, noise, 0)
    return Volume(data.astype(np.float32).clip(0), grid), white, brain


@pytest.mark.parametrize('spread', [0.0, 0.1, 0.3])
@pytest.mark.parametrize(
    ('frame', 'spacing_mm'), [('RAS', (2, 2, 2)), ('PSR', (2, 2, 2)), ('LAS', (1.5, 1.5, 5))]
)
def test_a_coil_is_measured_and_undone(frame, spacing_mm, spread):
    scan, white, brain = through_a_coil(make_grid(frame, spacing_mm, 220), spread)
    assert coil.unevenness(scan, white, brain) == pytest.approx(spread, rel=0.25, abs=0.005)
    evened = coil.evened(scan, white)
    assert np.log(evened[white]).std() < 0.25 * spread + 0.04
    assert np.median(evened[white]) == pytest.approx(np.median(scan.data[white]), rel=0.05)
    again = Volume(evened, scan.grid)
    assert coil.unevenness(again, white, brain) < 0.3 * spread + 0.005


def test_it_is_the_coil_that_is_undone_not_the_anatomy():
    """Contrast between neighbours stays, and so does what lies far from any white matter."""
    scan, white, brain = through_a_coil(make_grid('RAS', (2, 2, 2), 220), 0.3)
    evened = coil.evened(scan, white)
    gray = brain & ~white
    assert np.median(evened[gray]) / np.median(evened[white]) == pytest.approx(5 / 8, rel=0.03)
    changed = evened[scan.data > 0] / scan.data[scan.data > 0]
    assert changed.min() > 0.2
    assert changed.max() < 5
    assert (evened[scan.data == 0] == 0).all()


def test_without_white_matter_nothing_is_said_or_changed():
    scan, white, brain = through_a_coil(make_grid('RAS', (3, 3, 3), 200), 0.3)
    none = np.zeros_like(white)
    assert coil.unevenness(scan, none, brain) == 0
    np.testing.assert_array_equal(coil.evened(scan, none), scan.data)
    assert coil.unevenness(scan, white, none) == 0
    dark = Volume(np.zeros_like(scan.data), scan.grid)
    assert coil.unevenness(dark, white, brain) == 0
