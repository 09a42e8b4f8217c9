"""Where the brain is, and what the skull holds: a first look at the whole head, in cubes of 4 mm.

A model looks closely at part of a head at a time, where a muscle of the neck may look like a
cerebellum. The locator, a small network in the package that has seen nothing but whole heads,
says where to look. What is far from the brain that it finds is background, and so is what a
model takes for brain and connects with it only by a detour, such as muscle below the skull. Where
the coil has made parts of the brain much darker than others, the scan is evened out and looked at
once more. A second one, as small, tells what lies within the skull.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial

import numpy as np
import torch
from nibabel.orientations import io_orientation
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from bids_jointseg import coil
from bids_jointseg.card import ModelCard, read_card
from bids_jointseg.image import (
    Grid,
    Volume,
    call_background,
    cropped,
    keep_brain,
    normalise,
    resample,
)
from bids_jointseg.inference import combine, predict
from bids_jointseg.labels import CLASSES
from bids_jointseg.network import load_model

SUSPECTED = 0.2
"""Probability from which a voxel of the locator may be brain."""
NEAR_MM = 12.0
"""How far from these a model may find brain, as a straight line and along what it calls brain."""
SHOWN_MM = 16.0
"""How far around these a model is shown the head."""
LEAST_ML = 200.0
"""A smaller brain is none: the whole scan is looked at."""


@cache
def _model(name: str) -> tuple[nn.Module, ModelCard]:
    card = read_card(name)
    return load_model(card), card


def predict_brain(
    network: nn.Module,
    images: Mapping[str, NDArray[np.float32]],
    grid: Grid,
    *,
    window: Sequence[int] | None = None,
    mirror: bool = True,
    device: str = 'auto',
    threads: int | None = None,
) -> tuple[list[NDArray[np.float32]], Grid]:
    """Return what a network makes of the brain in some images, as each member sees it.

    Images that a coil made uneven (:data:`.coil.UNEVEN`), by the white matter that is found, are
    evened out and looked at once more.

    Parameters
    ----------
    network, window, device, threads
        See :func:`.inference.predict`.
    images
        Modality -> normalised image `(X, Y, Z)` of the head.
    grid
        Theirs.
    mirror
        Whether there is a second member, which sees the mirror images.

    Returns
    -------
    tuple[list[NDArray[np.float32]], Grid]
        `(C, X', Y', Z')` of each member, on a part of the grid, outside of which all is
        background; so it is within the part what lies far from the brain, or what only a detour
        connects with it (:data:`NEAR_MM`).
    """
    look = partial(
        _look, network, grid=grid, window=window, mirror=mirror, device=device, threads=threads
    )
    part, members = look(images)
    uneven = _evened(images, grid, part, members)
    if uneven:
        part, members = look({**images, **uneven})
    return members, grid.part(part)


def _look(
    network: nn.Module,
    images: Mapping[str, NDArray[np.float32]],
    *,
    grid: Grid,
    window: Sequence[int] | None,
    mirror: bool,
    device: str,
    threads: int | None,
) -> tuple[tuple[slice, slice, slice], list[NDArray[np.float32]]]:
    """Return a part of some images, and what each member makes of it."""
    part, brain, near = find_brain(images, grid, device=device, threads=threads)
    members = predict(
        network,
        {name: image[part] for name, image in images.items()},
        window=window,
        mirror=grid.lateral_axis if mirror else None,
        device=device,
        threads=threads,
    )
    found = near & (np.mean([member[0] for member in members], axis=0) < 0.5)
    steps = round(NEAR_MM / grid.spacing_mm.min())
    reached = ndimage.binary_dilation(brain & found, iterations=steps, mask=found)
    elsewhere = ~near | (found & ~reached)
    for member in members:
        call_background(member, elsewhere)
    return part, members


def _evened(
    images: Mapping[str, NDArray[np.float32]],
    grid: Grid,
    part: tuple[slice, slice, slice],
    members: Sequence[NDArray[np.float32]],
) -> dict[str, NDArray[np.float32]]:
    """Return those images, evened out, that the coil made uneven, by what the members see."""
    brain, white = np.zeros((2, *grid.shape), bool)
    brain[part] = np.mean([member[0] for member in members], axis=0) < 0.5
    white[part] = np.mean([member[CLASSES.index('WM')] for member in members], axis=0) > 0.5
    white = ndimage.binary_erosion(white, np.ones((3, 3, 1), bool))  # slices lie last
    scans = {name: Volume(image - image.min(), grid) for name, image in images.items()}
    return {
        name: normalise(coil.evened(scan, white))
        for name, scan in scans.items()
        if coil.unevenness(scan, white, brain) > coil.UNEVEN
    }


def find_brain(
    images: Mapping[str, NDArray[np.float32]],
    grid: Grid,
    *,
    device: str = 'auto',
    threads: int | None = None,
) -> tuple[tuple[slice, slice, slice], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which part of some images to look at, and where in it the brain is and may be.

    Parameters
    ----------
    images
        Modality -> normalised image `(X, Y, Z)` of the head.
    grid
        Theirs.
    device
        See :func:`.inference.predict`.
    threads
        Of the resampling, whose result they do not change.

    Returns
    -------
    tuple[tuple[slice, slice, slice], NDArray[np.bool_], NDArray[np.bool_]]
        The part, and two masks of its shape: the brain by the locator, and all that is near it.
        Of images that show no brain all three are the whole of them.
    """
    background, cubes = _first_look('locator', images, grid, device=device, threads=threads)
    # Fluid within is part of it, however large the ventricles are.
    brain = ndimage.binary_fill_holes(background < 1 - SUSPECTED)
    if brain.sum() * cubes.spacing_mm.prod() < 1000 * LEAST_ML:
        x, y, z = (slice(0, size) for size in grid.shape)
        return (x, y, z), np.ones(grid.shape, bool), np.ones(grid.shape, bool)
    around = (
        ndimage.binary_dilation(brain, iterations=round(millimetres / cubes.spacing_mm[0]))
        for millimetres in (NEAR_MM, SHOWN_MM)
    )
    brain, near, shown = (
        resample(Volume(mask.astype(np.float32), cubes), grid, threads=threads) > 0.5
        for mask in (brain, *around)
    )
    ((x, y, z),) = ndimage.find_objects(shown.view(np.uint8))
    return (x, y, z), brain[x, y, z], near[x, y, z]


def find_inside(t1w: Volume, *, device: str = 'auto', threads: int | None = None) -> Volume:
    """Return which share of each cube of 4 mm the skull holds, with the canal of the spine.

    Parameters
    ----------
    t1w
        Of a head, with its skull.
    device, threads
        See :func:`find_brain`.
    """
    head = cropped(t1w, margin_mm=6.0)
    seen = {'T1w': normalise(head.data)}
    outside, cubes = _first_look('intracranial', seen, head.grid, device=device, threads=threads)
    return Volume(1 - outside, cubes)


def _first_look(
    name: str,
    images: Mapping[str, NDArray[np.float32]],
    grid: Grid,
    *,
    device: str,
    threads: int | None,
) -> tuple[NDArray[np.float32], Grid]:
    """Return the probability that cubes over the head are background, and their grid."""
    network, card = _model(name)
    assert card.window is not None  # noqa: S101
    cubes = head_grid(grid, card.in_plane_mm, card.window)
    seen = {}
    for modality, image in images.items():
        air = image.min()
        seen[modality] = resample(Volume(image - air, grid), cubes, threads=threads) + air
    members = _alike(network, seen, card.window, device)
    return keep_brain(combine(members), cubes)[0], cubes


def _alike(
    network: nn.Module,
    images: Mapping[str, NDArray[np.float32]],
    window: Sequence[int],
    device: str,
) -> list[NDArray[np.float32]]:
    """Return the members' answers by one thread: their number must not move what is looked at."""
    before = torch.get_num_threads()
    try:
        return predict(network, images, window=window, mirror=0, device=device, threads=1)
    finally:
        torch.set_num_threads(before)


def head_grid(grid: Grid, millimetres: float, window: tuple[int, int, int]) -> Grid:
    """Return cubes over the head whose axes point right, anterior and superior, nearly.

    Parameters
    ----------
    grid
        Of images of the head, in any order of its axes.
    millimetres
        Size of a cube.
    window
        How many there are, at least. No more of them lie one above the other: they begin at the
        top, and leave out the neck.
    """
    orientation = io_orientation(grid.affine)
    order = np.argsort(orientation[:, 0])
    directions = grid.affine[:3, :3] / grid.spacing_mm * orientation[:, 1]
    size = (np.array(grid.shape) * grid.spacing_mm)[order]
    shape = np.maximum(window, np.ceil(size / millimetres).astype(int))
    shape[2] = window[2]
    affine = np.eye(4)
    affine[:3, :3] = directions[:, order] * millimetres
    centre = grid.middle + directions[:, order[2]] * (size[2] - shape[2] * millimetres) / 2
    affine[:3, 3] = centre - affine[:3, :3] @ ((shape - 1) / 2)
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)
