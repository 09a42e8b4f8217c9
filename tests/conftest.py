"""A small dataset of drawn heads, and an untrained model: enough to run everything quickly."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ['OMP_NUM_THREADS'] = '1'

import nibabel as nib
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runs import Server

    from bids_jointseg.image import Grid, Volume

SHIFT_MM = np.array([4.0, 2.0, -3.0])
"""Of the head, from the T1w of sub-01 to its FLAIR."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Leave PyTorch's threads to the next test as they were: its sums depend on their number."""
    yield
    if torch := sys.modules.get('torch'):
        torch.set_num_threads(1)


@pytest.fixture(params=['float32', 'bfloat16'])
def numbers(request, monkeypatch) -> str:
    """What the network computes in: float32 everywhere, bfloat16 where the processor has it."""
    import torch

    from bids_jointseg import inference

    if request.param == 'float32':
        monkeypatch.setattr(inference, 'fast_type', lambda device: None)
    elif inference.fast_type(torch.device('cpu')) != getattr(torch, request.param):
        pytest.skip(f'this processor has no {request.param}')
    return request.param


def draw_head(
    suffix: str,
    *,
    shape: tuple[int, int, int] = (48, 56, 48),
    spacing_mm: tuple[float, float, float] = (4.0, 4.0, 4.0),
    shift_mm: np.ndarray | tuple[float, ...] = (0.0, 0.0, 0.0),
    axes: np.ndarray | None = None,
    seed: int = 0,
) -> nib.Nifti1Image:
    """Draw nested ellipsoids (scalp, skull, gray and white matter, ventricles) and one lesion."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if axes is None else axes) * spacing_mm
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), -1)
    points = voxels @ affine[:3, :3].T + affine[:3, 3] - shift_mm
    levels = {'T1w': (300, 100, 600, 800, 200, 500), 'FLAIR': (250, 80, 700, 500, 100, 1000)}
    data = np.zeros(shape)
    radii = ((80, 95, 85), (74, 88, 78), (68, 82, 70), (56, 70, 58), (15, 25, 15))
    for radius, level in zip(radii, levels[suffix], strict=False):
        data[np.linalg.norm(points / radius, axis=-1) < 1] = level
    data[np.linalg.norm(points - (30, 20, 20), axis=-1) < 9] = levels[suffix][-1]
    data += np.abs(np.random.default_rng(seed).normal(0, 15, shape))
    return nib.Nifti1Image(data.astype(np.int16), affine)


def grid_of(shape: tuple[int, ...], spacing: tuple[float, ...] = (4, 4, 4)) -> Grid:
    """Return an upright grid (RAS) whose middle is the origin."""
    from bids_jointseg.image import Grid

    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(shape) * spacing / 2
    return Grid(tuple(shape), affine)


def labelled_head(
    shape: tuple[int, ...] = (40, 48, 36), spacing: tuple[float, ...] = (4, 4, 4)
) -> tuple[Volume, np.ndarray]:
    """Return a T1w and its labels, RAS: an ellipsoid with a lesion at left, front and top."""
    from bids_jointseg.image import Volume

    grid = grid_of(shape, spacing)
    x, y, z = np.meshgrid(
        *(np.arange(n) * s - n * s / 2 for n, s in zip(shape, spacing, strict=True)), indexing='ij'
    )
    radius = np.sqrt((x / 62) ** 2 + (y / 76) ** 2 + (z / 54) ** 2)
    labels = np.zeros(shape, np.uint8)
    labels[radius < 1] = 8
    labels[radius < 0.8] = 2
    labels[radius < 0.3] = 9
    labels[(radius < 1) & (z < -25) & (y < 0)] = 11
    labels[(radius < 1) & (z < -20) & (np.abs(x) < 12) & (np.abs(y) < 12)] = 10
    labels[(np.abs(np.abs(x) - 14) < 6) & (np.abs(y) < 24) & (np.abs(z) < 10)] = 12
    labels[(np.abs(x + 30) < 7) & (np.abs(y - 30) < 7) & (np.abs(z - 20) < 7)] = 7
    means = np.zeros(13, np.float32)
    means[[2, 7, 8, 9, 10, 11, 12]] = 100, 60, 70, 85, 90, 75, 20
    noise = np.random.default_rng(0).normal(0, 2, shape)
    data = np.where(labels, means[labels] + noise, np.where(radius < 1.2, 40, 0))
    return Volume(data.astype(np.float32), grid), labels


def put(image: nib.Nifti1Image, path: Path) -> Path:
    """Save an image, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def describe_dataset(root: Path) -> Path:
    """Make an empty BIDS dataset."""
    root.mkdir(parents=True, exist_ok=True)
    record = {'Name': 'Drawn heads', 'BIDSVersion': '1.10.0'}
    (root / 'dataset_description.json').write_text(json.dumps(record))
    (root / 'README').write_text('Drawn heads.\n')
    return root


@pytest.fixture(scope='session')
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sub-01 has T1w and FLAIR, sub-02 a left-handed T1w, sub-03 an oblique FLAIR in a session."""
    root = describe_dataset(tmp_path_factory.mktemp('data') / 'bids')
    anat = root / 'sub-01' / 'anat'
    put(draw_head('T1w'), anat / 'sub-01_T1w.nii.gz')
    flair = draw_head('FLAIR', shape=(48, 56, 32), spacing_mm=(4, 4, 6), shift_mm=SHIFT_MM, seed=1)
    put(flair, anat / 'sub-01_FLAIR.nii.gz')
    mirrored = draw_head('T1w', axes=np.diag([-1, 1, 1]), seed=2)
    put(mirrored, root / 'sub-02' / 'anat' / 'sub-02_T1w.nii.gz')
    turn = np.deg2rad(20)
    oblique = np.array(
        [[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]]
    )
    anat = root / 'sub-03' / 'ses-1' / 'anat'
    put(draw_head('FLAIR', axes=oblique, seed=3), anat / 'sub-03_ses-1_FLAIR.nii.gz')
    return root


@pytest.fixture(scope='session')
def transforms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Precomputed derivatives: how sub-01's FLAIR lies, so that nothing has to be registered."""
    from bids_jointseg import image

    root = tmp_path_factory.mktemp('transforms')
    matrix = np.eye(4)
    matrix[:3, 3] = SHIFT_MM
    path = root / 'sub-01' / 'anat' / 'sub-01_from-FLAIR_to-T1w_mode-image_xfm.txt'
    path.parent.mkdir(parents=True)
    image.save_itk(matrix, path)
    return root


@pytest.fixture(scope='session')
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Card of an untrained network with a few weights; its answers mean nothing."""
    import torch

    from bids_jointseg.card import ModelCard
    from bids_jointseg.network import build, save_model

    torch.manual_seed(0)
    architecture = {'name': 'unet', 'channels': (2, 4)}
    card = ModelCard(
        'tiny',
        '0',
        architecture,
        in_plane_mm=4.0,
        slice_mm=(4.0, 6.0),
        bias={'T1w': {'L': 0.1}},
        temperature=0.8,
        repeatability={
            f'{inputs}, {slices}': {'WM': k * factor}
            for inputs, k in (('T1w', 1.5), ('FLAIR', 2.0), ('T1w+FLAIR', 1.5))
            for slices, factor in (('thin', 3), ('thick', 1))
        },
        licence='CC0-1.0',
    )
    saved = save_model(build(architecture), card, tmp_path_factory.mktemp('model'))
    assert saved.path is not None
    return saved.path


@pytest.fixture(scope='session')
def drawn_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Path]]:
    """All figures of a T1w with a FLAIR."""
    from bids_jointseg import figures

    t1w, labels = labelled_head()
    flair, flair_labels = labelled_head((54, 64, 24), (3, 3, 6))
    entropy = np.where(np.gradient(labels.astype(float))[0] != 0, 0.33, 0)
    arguments = {
        't1w': t1w,
        'flair': flair,
        't1w_labels': labels,
        'flair_labels': flair_labels,
        'flair_on_t1w': 130 - t1w.data,
        'flair_on_t1w_before': np.roll(130 - t1w.data, 3, 1),
        'entropy': entropy,
    }
    out = tmp_path_factory.mktemp('pair')
    return arguments, figures.draw_scan(out, 'sub-01', **arguments)


@pytest.fixture(scope='session')
def server() -> Iterator[Server]:
    """Starts whole runs of the command, each in a process of its own."""
    from runs import Server

    running = Server()
    yield running
    running.close()
