"""What makes it fast changes no result, and what a cohort costs grows no faster than it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import describe_dataset
from torch import nn

from bids_jointseg import bids
from bids_jointseg.card import read_card
from bids_jointseg.config import Settings
from bids_jointseg.inference import _ramp, _starts, predict
from bids_jointseg.network import Convolution, HighResNet, InstanceNorm, build, load_model
from bids_jointseg.quality import _information

TOLERANCES = {'float32': 5e-3, 'bfloat16': 0.05}
"""Of a probability, in float32 and where the processor has bfloat16: sums in another order and,
there, few digits, amplified by normalisation over few voxels (measured: 0.041)."""

# --- inference, the straightforward way ---------------------------------------------------------


def plain(network: nn.Module) -> nn.Module:
    """Return the network with PyTorch's own layers, one modality after the other in memory."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Convolution):
                layer: nn.Module = nn.Conv3d(
                    child.in_channels, child.out_channels, child.kernel_size,
                    padding=child.padding, dilation=child.dilation, bias=child.bias is not None,
                )  # fmt: skip
            elif isinstance(child, InstanceNorm):
                layer = nn.InstanceNorm3d(len(child.weight), affine=True)
            elif isinstance(child, nn.ReLU):
                layer = nn.ReLU()
            else:
                continue
            if child.state_dict():
                layer.load_state_dict(child.state_dict())
            setattr(parent, name, layer)
    return network.to(memory_format=torch.contiguous_format)


@torch.inference_mode()
def straightforward(network: nn.Module, images: dict, window: tuple[int, int, int]) -> np.ndarray:
    """Return what :func:`predict` does, in double precision and without regard to memory."""
    bias = torch.tensor(network.bias_for(images), dtype=torch.double).reshape(-1, 1, 1, 1)
    network = plain(network).double()
    shape = next(iter(images.values())).shape
    axes = [_starts(size, width) for size, width in zip(shape, window, strict=True)]
    total, weight = np.zeros((8, *shape)), np.zeros(shape)
    for corner in itertools.product(*axes):
        part = tuple(
            slice(start, min(start + width, size))
            for start, width, size in zip(corner, window, shape, strict=True)
        )
        inputs, extra = {}, []
        for name, image in images.items():
            tensor = torch.from_numpy(image[part].copy()).double()
            extra = [-s % m for s, m in zip(tensor.shape, network.multiple, strict=True)]
            padding = [side for size in extra[::-1] for side in (0, size)]
            inputs[name] = F.pad(tensor, padding, value=float(tensor.min()))[None, None]
        p = (network(inputs) + bias).softmax(1)[0].numpy()
        kept = tuple(slice(0, part_.stop - part_.start) for part_ in part)
        ramp = _ramp(total[(0, *part)].shape, [len(starts) > 1 for starts in axes]).numpy()
        total[(slice(None), *part)] += p[(slice(None), *kept)] * ramp
        weight[part] += ramp
    return total / weight


def ellipsoid(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Draw a head of three tissues with noise, normalised."""
    axes = np.meshgrid(*(np.linspace(-1.1, 1.1, size) for size in shape), indexing='ij')
    radius = np.sqrt(sum(axis**2 for axis in axes))
    levels = np.select([radius < 0.3, radius < 0.6, radius < 0.9], [-0.5, 1.5, 0.7], -1.0)
    noise = np.random.default_rng(seed).normal(0, 0.2, shape)
    return (levels + noise).astype(np.float32)


@pytest.mark.parametrize('modalities', [('T1w', 'FLAIR'), ('FLAIR',)])
def test_the_fast_inference_of_the_default_model_equals_the_straightforward_one(
    modalities, numbers
):
    tolerance = TOLERANCES[numbers]
    card = read_card('jointseg')
    images = {name: ellipsoid((70, 53, 30), seed) for seed, name in enumerate(modalities)}
    window = (48, 64, 32)
    (found,) = predict(load_model(card), images, window=window, device='cpu')
    expected = straightforward(load_model(card), images, window)
    assert np.abs(found - expected).max() < tolerance
    assert np.abs(found - expected).mean() < tolerance / 100
    same = found.argmax(axis=0) == expected.argmax(axis=0)
    first, second = np.sort(expected, axis=0)[-2:]
    assert ((second - first)[~same] < 2 * tolerance).all(), 'a label changed that was no tie'
    assert same.mean() > 1 - max(1e-3, tolerance / 20)


@pytest.mark.parametrize(
    'architecture', [{'name': 'highresnet', 'channels': [4, 8, 16]}, {'name': 'unet'}]
)
def test_networks_learn_the_same_gradients(architecture):
    torch.manual_seed(0)
    network = build(architecture)
    copy = build(architecture)
    copy.load_state_dict(network.state_dict())
    copy = plain(copy).double()
    images = {
        name: torch.from_numpy(ellipsoid((32, 32, 16), seed))[None, None]
        for seed, name in enumerate(('T1w', 'FLAIR'))
    }
    network(images).square().mean().backward()
    copy({name: image.double() for name, image in images.items()}).square().mean().backward()
    for (name, ours), theirs in zip(network.named_parameters(), copy.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        error = float((ours.grad - theirs.grad).abs().max())
        # Single precision, with ReLUs that fall to the other side: far below what a bug makes.
        assert error < 2e-2 * scale + 1e-6, name


@pytest.mark.parametrize(('count', 'dilation'), [(1, 1), (2, 1), (2, 2), (2, 4)])
@pytest.mark.parametrize('shape', [(13, 10, 7), (16, 8, 16), (1, 4, 4)])
def test_weights_learn_from_convolutions_that_are_fast(shape, count, dilation):
    """Of one image with small planes, whose halves make two, and of dilated kernels."""
    draw = torch.Generator().manual_seed(dilation)
    layer = Convolution(5, 6, 3, padding=dilation, dilation=dilation, bias=False)
    x = torch.randn(count, 5, *shape, generator=draw).requires_grad_()
    above = torch.randn(count, 6, *shape, generator=draw)
    found = torch.autograd.grad(layer(x), (x, layer.weight), above)
    expected = F.conv3d(x.double(), layer.weight.double(), None, 1, dilation, dilation)
    for ours, theirs in zip(
        found, torch.autograd.grad(expected, (x, layer.weight), above.double()), strict=True
    ):
        assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize('network', [HighResNet(channels=(4, 8, 8)), build({'name': 'unet'})])
def test_channels_stay_last_in_memory(network):
    """Where they do not, every convolution copies its input first."""
    lost = []

    def look(layer: nn.Module, _: object, found: torch.Tensor) -> None:
        if not found.is_contiguous(memory_format=torch.channels_last_3d):
            lost.append(layer)

    for layer in network.modules():
        if isinstance(layer, Convolution | InstanceNorm):
            layer.register_forward_hook(look)
    network = network.to(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        network({name: torch.randn(1, 1, 32, 32, 16) for name in ('T1w', 'FLAIR')})
    assert not lost


def test_the_joint_histogram_counts_every_pair():
    draw = np.random.default_rng(0)
    a = draw.random(5000).astype(np.float32)
    b = np.clip(a + draw.normal(0, 0.1, a.size), 0, 1)
    a[:66], b[:66] = np.repeat(np.arange(33) / 32, 2), 1  # on the edges of the bins
    joint, _, _ = np.histogram2d(a, b, 32, range=[[0, 1], [0, 1]])
    joint /= joint.sum()
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    expected = (joint[there] * np.log(joint[there] / apart[there])).sum()
    assert _information(a, b) == pytest.approx(expected, rel=1e-12)


# --- the cohort ---------------------------------------------------------------------------------


def cohort(root: Path, subjects: int) -> Path:
    describe_dataset(root)
    for number in range(subjects):
        anat = root / f'sub-{number:04d}' / 'anat'
        anat.mkdir(parents=True)
        for suffix in ('T1w', 'FLAIR'):
            (anat / f'sub-{number:04d}_{suffix}.nii.gz').touch()
    return root


def seconds(settings: Settings) -> float:
    """Return the processor time of planning, the least of two."""
    spent = []
    for _ in range(2):
        begun = time.process_time()
        bids.plan(settings)
        spent.append(time.process_time() - begun)
    return min(spent)


def test_planning_a_cohort_takes_time_in_proportion(tmp_path):
    some, many = (cohort(tmp_path / str(n), n) for n in (100, 800))
    bids.plan(Settings(some, tmp_path / 'out'))  # what is imported once
    few = seconds(Settings(some, tmp_path / 'out'))
    # In proportion it is 8 times, with each against each 64 times.
    assert seconds(Settings(many, tmp_path / 'out')) < 16 * few


def test_planning_one_participant_looks_at_no_other(tmp_path, monkeypatch):
    many = cohort(tmp_path / 'bids', 300)
    listed = []
    monkeypatch.setattr('os.listdir', _counting(listed, 'os', 'listdir'))
    monkeypatch.setattr('os.scandir', _counting(listed, 'os', 'scandir'))
    scans, _ = bids.plan(Settings(many, tmp_path / 'out', participant_label=('0007',)))
    assert [scan.subject for scan in scans] == ['0007']
    inside = {part for path in listed for part in Path(path).parts if part.startswith('sub-')}
    assert inside == {'sub-0007'}


def _counting(calls: list[str], module: str, name: str):
    import importlib

    original = getattr(importlib.import_module(module), name)

    def call(path: object = '.', *rest: object) -> object:
        calls.append(str(path))
        return original(path, *rest)

    return call
