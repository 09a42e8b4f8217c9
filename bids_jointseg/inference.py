"""From normalised images to probabilities: arrays in, arrays out.

A network whose normalisation depends on what it sees is used on windows of the size that it was
trained on, others on as many slices as memory allows. Windows overlap by half or more, and their
answers are blended by weights that fall off linearly towards a window's border.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bids_jointseg.labels import CLASSES, TISSUES

LOGGER = logging.getLogger('bids_jointseg')

LARGEST = 3_000_000
"""Voxels that go through the network at once: about 1.5 GB at 16 channels."""


def choose_device(device: str = 'auto') -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` stands for on this machine."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    return torch.device(device)


def fast_type(device: torch.device) -> torch.dtype | None:
    """Return the type in which convolutions are fastest and good enough; None for float32.

    bfloat16 where it is native (emulated, a CPU is ten times slower), else float16 on a GPU.
    """
    if device.type == 'cuda':
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return None


def probabilities(network: nn.Module, images: Mapping[str, Tensor]) -> Tensor:
    """Return softmax probabilities `(B, C, X, Y, Z)` in float32; see :func:`fast_type`.

    Logits are biased first, if the network is that of a card (:func:`.network.load_model`).
    """
    device = next(iter(images.values())).device
    fast = fast_type(device)
    with torch.autocast(device.type, fast) if fast else nullcontext():
        logits = network(images)
    # One class after the other: the softmax is twice as fast as where channels lie last.
    logits = logits.contiguous().float()
    bias_for = getattr(network, 'bias_for', None)
    bias = bias_for(images) if bias_for else ()
    if any(bias):
        logits += torch.tensor(bias, device=device)[:, None, None, None]
    return logits.softmax(1)


@torch.inference_mode()
def predict(
    network: nn.Module,
    images: Mapping[str, NDArray[np.float32]],
    *,
    window: Sequence[int] | None = None,
    mirror: int | None = None,
    device: str = 'auto',
    threads: int | None = None,
) -> list[NDArray[np.float32]]:
    """Return the probability of each class at each voxel, as each member of the ensemble sees it.

    The members are one network that looks at the images and, if asked, at their mirror images.

    Parameters
    ----------
    network
        From :func:`bids_jointseg.network.load_model`.
    images
        Modality -> normalised image on the model's grid, `(X, Y, Z)`, all of one shape.
    window
        Largest window in voxels, for a network whose normalisation depends on its size; by
        default as many slices as memory allows.
    mirror
        Left-right axis, for a second member. None takes half of the time.
    device
        `auto` takes a GPU if there is one. A GPU that runs out of memory hands over to the CPU.
    threads
        Of the CPU; PyTorch's default if None.

    Returns
    -------
    list[NDArray[np.float32]]
        `(C, X, Y, Z)` of each member; :func:`combine` makes one answer of them.
    """
    if threads:
        torch.set_num_threads(threads)
    target = choose_device(device)
    try:
        return _both_ways(network, images, window, mirror, target)
    except torch.cuda.OutOfMemoryError:
        LOGGER.warning('%s has too little free memory for this scan: using the CPU', target)
        torch.cuda.empty_cache()
        return _both_ways(network, images, window, mirror, torch.device('cpu'))


def _both_ways(
    network: nn.Module,
    images: Mapping[str, NDArray[np.float32]],
    window: Sequence[int] | None,
    mirror: int | None,
    device: torch.device,
) -> list[NDArray[np.float32]]:
    """Return the answers for the images and, if asked, for their mirror images."""
    members = [_predict(network, images, window, device)]
    if mirror is not None:
        mirrored = {name: np.flip(image, mirror) for name, image in images.items()}
        members.append(np.flip(_predict(network, mirrored, window, device), mirror + 1))
    return members


def combine(
    members: Sequence[NDArray[np.float32]], temperature: float = 1.0
) -> NDArray[np.float32]:
    r"""Return the mean of the members, calibrated: :math:`p^{1/T}`, normalised again.

    Scaling the temperature (Guo et al., ICML 2017) changes how sure an answer is, and no label.

    Parameters
    ----------
    members
        `(C, X, Y, Z)` each.
    temperature
        :math:`T`, of the model's card.

    Returns
    -------
    NDArray[np.float32]
        `(C, X, Y, Z)`.
    """
    mean = np.asarray(sum(members[1:], members[0]) / np.float32(len(members)))
    if temperature != 1.0:
        mean **= np.float32(1 / temperature)
        mean /= mean.sum(axis=0)
    return mean


def consensus(members: Sequence[NDArray[np.float32]]) -> float:
    """Return the mean Dice of the tissues between the first member and the others, 0 to 1.

    A tissue that neither has counts for nothing; one member agrees with itself.
    """
    first, *others = (member.argmax(axis=0) for member in members)
    scores = []
    for other in others:
        for name in TISSUES:
            a, b = first == CLASSES.index(name), other == CLASSES.index(name)
            if a.any() or b.any():
                scores.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return float(np.mean(scores)) if scores else 1.0


def agreement(members: Sequence[NDArray[np.float32]], name: str) -> NDArray[np.float32]:
    """Return the share of the members that call a voxel `name`, `(X, Y, Z)`."""
    channel = CLASSES.index(name)
    votes = [member.argmax(axis=0) == channel for member in members]
    return np.mean(votes, axis=0, dtype=np.float32)


def _predict(
    network: nn.Module,
    images: Mapping[str, NDArray[np.float32]],
    window: Sequence[int] | None,
    device: torch.device,
) -> NDArray[np.float32]:
    network = network.to(device)
    shape = next(iter(images.values())).shape
    if window is None:
        window = (*shape[:2], max(32, LARGEST // (shape[0] * shape[1])))
    axes = [_starts(size, width) for size, width in zip(shape, window, strict=True)]
    total, weight = torch.zeros((len(CLASSES), *shape)), torch.zeros(shape)
    for corner in itertools.product(*axes):
        part = tuple(
            slice(start, min(start + width, size))
            for start, width, size in zip(corner, window, shape, strict=True)
        )
        seen = {name: image[part] for name, image in images.items()}
        found = _one(network, seen, device)
        ramp = _ramp(found.shape[1:], [len(starts) > 1 for starts in axes])
        total[:, *part].addcmul_(found, ramp)
        weight[part] += ramp
    return total.div_(weight).numpy()


def _one(
    network: nn.Module,
    images: Mapping[str, NDArray[np.float32]],
    device: torch.device,
) -> Tensor:
    """Return the probabilities of one window, `(C, X, Y, Z)`."""
    multiple: Sequence[int] = getattr(network, 'multiple', (1, 1, 1))
    shape = next(iter(images.values())).shape
    pad = [0] * 6
    for axis, (size, step) in enumerate(zip(shape, multiple, strict=True)):
        pad[2 * (2 - axis) + 1] = -size % step
    tensors = {
        # What lies outside of the volume is air, as it was in training.
        name: F.pad(torch.from_numpy(np.ascontiguousarray(image)), pad, value=float(image.min()))
        [None, None]
        .to(device, memory_format=torch.channels_last_3d)
        for name, image in images.items()
    }  # fmt: skip
    found = probabilities(network, tensors)[0]
    return found[:, : shape[0], : shape[1], : shape[2]].cpu()


def _starts(size: int, width: int) -> list[int]:
    """Return the first voxels of windows that cover an axis and overlap by half or more.

    One of them then shows a voxel's surroundings to a quarter of its width, but where the axis
    ends: volumes depend less on where windows lie (docs/experiments.md).
    """
    if size <= width:
        return [0]
    count = int(np.ceil((size - width) / (width / 2))) + 1
    return np.linspace(0, size - width, count).round().astype(int).tolist()


def _ramp(shape: Sequence[int], blend: Sequence[bool]) -> Tensor:
    """Return weights that fall off linearly towards the borders of the axes that are blended."""
    ramp = torch.ones(tuple(shape))
    for axis, (size, wanted) in enumerate(zip(shape, blend, strict=True)):
        if wanted:
            steps = torch.arange(size, dtype=torch.float32) + 1
            profile = torch.minimum(steps, steps.flip(0))
            ramp = ramp * profile.reshape([-1 if i == axis else 1 for i in range(3)])
    return ramp
