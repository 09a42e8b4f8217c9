"""Where the brain is, and what the skull holds: found in a whole head, whatever its axes."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from bids_jointseg import image, locator
from bids_jointseg.card import read_card
from bids_jointseg.image import Grid, Volume
from bids_jointseg.labels import CLASSES
from bids_jointseg.locator import find_brain, find_inside, head_grid, predict_brain
from bids_jointseg.recipe import read_recipe, tuples

MM = 3.0


@pytest.fixture(scope='module')
def head() -> tuple[np.ndarray, np.ndarray, Grid]:
    """A T1w with a brain, a skull, a scalp and a neck as bright as the brain; the brain; RAS."""
    from nilearn.datasets import load_mni152_template

    template = load_mni152_template(resolution=1)
    brain = Volume(
        np.asarray(template.dataobj, np.float32),
        Grid(template.shape, np.asarray(template.affine)),
    )
    grid = Grid(
        (66, 80, 92),
        np.array([[MM, 0, 0, -98], [0, MM, 0, -136], [0, 0, MM, -176.0], [0, 0, 0, 1]]),
    )
    data = image.resample(brain, grid)
    data /= data.max()
    inside = ndimage.binary_fill_holes(data > 0.1)
    far = ndimage.distance_transform_edt(~inside, sampling=grid.spacing_mm)
    x, y, z = (MM * v + grid.affine[i, 3] for i, v in enumerate(np.indices(grid.shape)))
    draw = np.random.default_rng(0)
    muscle = 0.55 + 0.1 * ndimage.gaussian_filter(draw.normal(size=grid.shape), 1) * 5
    data = np.where(far > 4, 0.1, np.where(inside, data, 0.25))
    data = np.where(far > 9, 0.9, data)
    outside = far > 15
    data[outside] = 0
    neck = ((x / 62) ** 2 + ((y + 30) / 70) ** 2 < 1) & (z < -50) & (far > 9)
    data = np.where(neck, muscle, data)
    return (data + 0.02 * draw.normal(size=grid.shape)).astype(np.float32).clip(0), inside, grid


def turned(axes: str, grid: Grid, *arrays: np.ndarray) -> tuple:
    """Return the grid and the arrays on it, which are in RAS, with other axes."""
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt('RAS'), nib.orientations.axcodes2ornt(axes)
    )
    affine = grid.affine @ nib.orientations.inv_ornt_aff(turn, grid.shape)
    found = [nib.orientations.apply_orientation(array, turn) for array in arrays]
    return Grid(found[0].shape, affine), *found


@pytest.mark.parametrize('name', ['locator', 'intracranial'])
def test_the_packaged_locator_is_of_its_recipe(name):
    card, recipe = read_card(name), read_recipe(name)
    assert card.licence == recipe.licence == 'CC BY 4.0'
    assert tuples(card.architecture) == recipe.architecture
    assert (card.in_plane_mm, card.slice_mm) == (recipe.in_plane_mm, recipe.slice_mm)
    assert card.window == recipe.window
    for source in recipe.datasets:
        assert not {*card.training['people'][source.name]} & {*source.test, *source.validation}


@pytest.mark.parametrize('axes', ['RAS', 'LIA', 'SRA'])
def test_the_brain_is_found_and_the_neck_left_out(head, axes):
    data, inside, grid = head
    grid, data, inside = turned(axes, grid, data, inside)
    part, brain, near = find_brain({'T1w': image.normalise(data)}, grid, device='cpu')
    assert brain.shape == near.shape == grid.part(part).shape
    assert near[brain].all()
    assert (brain & inside[part]).sum() > 0.9 * brain.sum()
    found = np.zeros(data.shape, bool)
    found[part] = near
    assert found[inside].mean() > 0.99
    far = ndimage.distance_transform_edt(~inside, sampling=grid.spacing_mm)
    assert found[far > 20].mean() < 0.01
    assert (data[found] > 0).mean() > 0.5
    (shown,) = ndimage.find_objects(found.view(np.uint8))
    assert all(a.start <= b.start and b.stop <= a.stop for a, b in zip(part, shown, strict=True))


@pytest.mark.parametrize('axes', ['RAS', 'LIA', 'SRA'])
def test_what_the_skull_holds_is_found(head, axes):
    """The brain, its fluid, and no more; whichever way the axes point."""
    data, inside, grid = head
    held = ndimage.distance_transform_edt(~inside, sampling=grid.spacing_mm) <= 4
    found = find_inside(Volume(data, grid), device='cpu')
    assert found.grid.spacing_mm == pytest.approx([4, 4, 4])
    there = image.resample(found, grid)
    assert 2 * np.minimum(there, held).sum() > 0.9 * (there.sum() + held.sum())
    grid, data = turned(axes, grid, data)
    again = find_inside(Volume(data, grid), device='cpu')
    assert again.data.sum() == pytest.approx(found.data.sum(), rel=1e-3)


def test_threads_do_not_move_what_is_looked_at(head):
    data, _, grid = head
    answers = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        seen = {'T1w': image.normalise(data)}
        answers.append(find_brain(seen, grid, device='cpu', threads=number))
        assert torch.get_num_threads() == number
    (part, *masks), *others = answers
    for other, *there in others:
        assert other == part
        np.testing.assert_array_equal(there, masks)


def test_what_cannot_hold_a_brain_is_looked_at_as_a_whole():
    noise = np.random.default_rng(0).normal(size=(12, 14, 10)).astype(np.float32)
    grid = Grid(noise.shape, np.diag([4.0, 4, 4, 1]))
    part, _, near = find_brain({'FLAIR': noise}, grid, device='cpu')
    assert near.all()
    assert noise[part].shape == near.shape == noise.shape


def test_where_no_brain_is_found_all_is_looked_at(monkeypatch):
    grid = Grid((60, 70, 50), np.diag([4.0, 4, 4, 1]))

    def empty(*_, **__):
        p = np.zeros((len(CLASSES), 60, 70, 64), np.float32)
        p[0] = 1
        return [p]

    monkeypatch.setattr(locator, 'predict', empty)
    noise = np.random.default_rng(0).normal(size=grid.shape).astype(np.float32)
    part, brain, near = find_brain({'FLAIR': noise}, grid, device='cpu')
    assert noise[part].shape == brain.shape == near.shape == grid.shape
    assert brain.all()
    assert near.all()


def test_large_ventricles_are_within_the_brain(monkeypatch):
    grid = Grid((192, 256, 256), np.diag([1.0, 1, 1, 1]))
    far = np.linalg.norm(np.moveaxis(np.indices((48, 64, 64)), 0, -1) - (24, 32, 32), axis=-1)
    shell = (far < 18) & (far > 8)

    def hollow(*_, **__):
        p = np.zeros((len(CLASSES), *shell.shape), np.float32)
        p[CLASSES.index('CGM')], p[0] = shell, ~shell
        return [p]

    monkeypatch.setattr(locator, 'predict', hollow)
    part, brain, near = find_brain({'T1w': np.zeros(grid.shape, np.float32)}, grid, device='cpu')
    middle = tuple(n // 2 - span.start for n, span in zip(grid.shape, part, strict=True))
    assert brain[middle]
    assert near[middle]
    assert not near[0, 0, 0]


class Brainy(torch.nn.Module):
    """Calls everything cortex."""

    def forward(self, images):
        x = next(iter(images.values()))
        return torch.cat([torch.full_like(x, 9.0 * (name == 'CGM')) for name in CLASSES], dim=1)


@pytest.mark.parametrize('mirror', [False, True])
def test_far_from_the_brain_all_is_background(head, mirror):
    data, inside, grid = head
    seen = {'T1w': image.normalise(data)}
    members, part = predict_brain(Brainy(), seen, grid, mirror=mirror, device='cpu')
    assert len(members) == 1 + mirror
    joint = image.joint_probabilities({'T1w': (members[-1], part)}, grid, {'T1w': np.eye(4)})
    np.testing.assert_allclose(joint.sum(axis=0), 1, atol=1e-5)
    far = ndimage.distance_transform_edt(~inside, sampling=grid.spacing_mm)
    cortex = joint[CLASSES.index('CGM')]
    assert cortex[inside].mean() > 0.98
    assert cortex[far > 20].mean() < 0.01


def test_what_a_detour_alone_connects_with_the_brain_is_background(monkeypatch):
    """A strip runs beside the brain, 6 mm away, and a bridge joins them at one end."""
    grid = Grid((50, 60, 40), np.diag([1.0, 1, 1, 1]))
    brain = np.zeros(grid.shape, bool)
    brain[10:30, 10:50, 10:30] = True
    strip, bridge = np.zeros((2, *grid.shape), bool)
    strip[36:40, 10:50, 10:30] = True
    bridge[30:36, 10:14, 10:30] = True
    rim = np.zeros_like(brain)
    rim[9, 10:50, 10:30] = True  # the locator is coarse: what touches its brain stays
    part = tuple(map(slice, grid.shape))
    p = np.zeros((len(CLASSES), *grid.shape), np.float32)
    p[CLASSES.index('CBM')] = 0.9 * (brain | strip | bridge | rim)
    p[0] = 1 - p.sum(axis=0)
    everywhere = np.ones_like(brain)
    monkeypatch.setattr(locator, 'find_brain', lambda *_, **__: (part, brain, everywhere))
    monkeypatch.setattr(locator, 'predict', lambda *_, **__: [p.copy()])
    (found,), _ = predict_brain(Brainy(), {'T1w': np.zeros(grid.shape)}, grid)
    tissue = found[0] < 0.5
    assert tissue[brain | rim | bridge].all()
    reached = np.flatnonzero(tissue[36:40].any(axis=(0, 2)))
    assert (reached.min(), reached.max()) == (10, 13 + 12 - 7)
    np.testing.assert_allclose(found.sum(axis=0), 1)


@pytest.mark.parametrize(('spread', 'looks'), [(0.05, 1), (0.2, 2)])
def test_an_uneven_scan_is_evened_out_and_looked_at_again(head, monkeypatch, spread, looks):
    """By the white matter of the first look; the other scan, which is even, stays as it is."""
    data, inside, grid = head
    white = ndimage.binary_erosion(inside, iterations=3)
    p = np.zeros((len(CLASSES), *grid.shape), np.float32)
    p[CLASSES.index('WM')], p[0] = white, ~white
    part = tuple(map(slice, grid.shape))
    seen = []

    def remember(_, images, **__):
        seen.append(images)
        return [p.copy()]

    monkeypatch.setattr(locator, 'find_brain', lambda *_, **__: (part, inside, inside))
    monkeypatch.setattr(locator, 'predict', remember)
    field = np.indices(grid.shape)[1] / 10.0
    field *= spread / field[white].std()
    even = image.normalise(data)
    uneven = image.normalise(data * np.exp(field))
    predict_brain(Brainy(), {'T1w': even, 'FLAIR': uneven}, grid)
    assert len(seen) == looks
    np.testing.assert_array_equal(seen[0]['FLAIR'], uneven)
    np.testing.assert_array_equal(seen[-1]['T1w'], even)
    if looks > 1:
        after, before = (
            np.polyfit(field[white], images['FLAIR'][white], 1)[0] for images in seen[::-1]
        )
        assert abs(after) < 0.2 * abs(before)


def test_cubes_over_the_head_begin_at_its_top():
    affine = np.array([[0, 0, -2.0, 90], [0, 1.5, 0, -80], [-1.0, 0, 0, 120], [0, 0, 0, 1]])
    grid = Grid((300, 120, 90), affine)  # inferior, anterior, left
    cubes = head_grid(grid, 4.0, (40, 40, 60))
    assert cubes.shape == (45, 45, 60)  # 180 mm wide, and 240 of 300 mm from the top
    np.testing.assert_allclose(cubes.affine[:3, :3], np.diag([4.0, 4, 4]))
    assert cubes.affine[2, 3] + 4 * 59.5 == pytest.approx(120.5)
    np.testing.assert_allclose(cubes.middle[:2], grid.middle[:2])
