"""A small dataset of drawn heads, and an untrained model: enough to run everything quickly."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

os.environ['OMP_NUM_THREADS'] = '1'

import nibabel as nib
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runs import Server

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
def server() -> Iterator[Server]:
    """Starts whole runs of the command, each in a process of its own."""
    from runs import Server

    running = Server()
    yield running
    running.close()
