"""The joint networks: a branch per modality, the mean of their features, a shared rest.

Both networks take a dictionary with any non-empty subset of their modalities, so the missing
ones are absent and never imagined (HeMIS, Havaei et al., MICCAI 2016), and return logits of the
same spatial size:

- :class:`HighResNet`, the network of Dorent et al. (MIDL 2019, Figure 2), after Li et al.
  (IPMI 2017): dilated residual blocks, no pooling;
- :class:`UNet`, far lighter: most of a volume's cost is at full resolution, so it has few
  channels there. The first pooling is within the slices only.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from bids_jointseg.card import MODALITIES, ModelCard, ModelError, read_weights
from bids_jointseg.files import write_bytes
from bids_jointseg.labels import CLASSES

Images = Mapping[str, Tensor]
"""Modality -> `(B, 1, X, Y, Z)`."""


def _mean_of_branches(branches: nn.ModuleDict, images: Images) -> Tensor:
    """Return the mean over the given modalities of their features, `(B, C, X, Y, Z)`."""
    # Sorted, so that the order of the dictionary cannot change the sum's rounding.
    features = [branches[name](images[name]) for name in sorted(images)]
    if not features:
        raise ValueError('give at least one modality')
    # Stacking them would lose that channels lie last, on which the speed of the rest depends.
    total: Tensor = functools.reduce(torch.add, features)
    return total.div_(len(features)) if len(features) > 1 else total


def _lattices(x: Tensor, step: int) -> Tensor:
    """Return the lattices of every `step`-th voxel, between which a dilated kernel never mixes.

    Those of the first two axes become images of a batch; those of the last one lie one after
    another, a plane of zeros behind each, so that rows stay long.

    Returns
    -------
    Tensor
        `(B * step**2, C, X / step, Y / step, step * (Z / step + 1))`, quotients rounded up.
    """
    batch, channels, *sizes = x.shape
    counts = [-(-size // step) for size in sizes]
    missing = [end for n, size in zip(counts, sizes, strict=True) for end in (n * step - size, 0)]
    x = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, *missing[::-1]))
    x = x.reshape(batch, counts[0], step, counts[1], step, counts[2], step, channels)
    x = F.pad(x.permute(0, 2, 4, 1, 3, 6, 5, 7), (0, 0, 0, 1))
    x = x.reshape(batch * step**2, counts[0], counts[1], step * (counts[2] + 1), channels)
    return x.permute(0, 4, 1, 2, 3)


class _Dilated(torch.autograd.Function):
    """A dilated convolution whose weights get their gradient from plain ones of its lattices.

    The kernel is 3x3x3, without bias, padded by its dilation. oneDNN has no kernel for the
    gradient of dilated weights, and its substitute takes two to six times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        wide = [dilation] * 3
        return torch.mkldnn_convolution(x, weight, None, wide, [1] * 3, wide, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        plain, wide = [1] * 3, [ctx.dilation] * 3
        back = functools.partial(
            torch.ops.aten.convolution_backward,
            bias_sizes=None, stride=plain, transposed=False, output_padding=[0] * 3, groups=1,
        )  # fmt: skip
        of_x, _, _ = back(
            gradient, x, weight, padding=wide, dilation=wide, output_mask=[True, False, False]
        )
        _, of_weight, _ = back(
            _lattices(gradient, ctx.dilation), _lattices(x, ctx.dilation), weight,
            padding=plain, dilation=plain, output_mask=[False, True, False],
        )  # fmt: skip
        return of_x, of_weight, None


LARGE_PLANES = 20480
"""Numbers of an image's last plane, over all channels, from which PyTorch asks oneDNN."""


class _Small(torch.autograd.Function):
    """A convolution of an image with small planes whose gradients oneDNN computes.

    The kernel has an odd size, no bias, and is padded by half of it. PyTorch asks oneDNN for the
    gradients of one image only where its planes are large: it would unfold this one, which takes
    five to ten times as long. That of the image is a convolution itself; that of the weights is
    one of two images, the halves of this one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mkldnn_convolution(
            x, weight, None, [size // 2 for size in weight.shape[2:]], [1] * 3, [1] * 3, 1
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        pad = [size // 2 for size in weight.shape[2:]]
        turned = weight.flip(2, 3, 4).transpose(0, 1)
        of_x = torch.mkldnn_convolution(gradient, turned, None, pad, [1] * 3, [1] * 3, 1)
        half = -(-x.shape[2] // 2)
        missing = 2 * half - x.shape[2]
        x = F.pad(x, (0, 0, 0, 0, pad[0], pad[0] + missing))
        gradient = F.pad(gradient, (0, 0, 0, 0, 0, missing))
        _, of_weight, _ = torch.ops.aten.convolution_backward(
            torch.cat([gradient[:, :, :half], gradient[:, :, half:]]),
            torch.cat([x[:, :, : half + 2 * pad[0]], x[:, :, half:]]),
            weight, None, [1] * 3, [0, *pad[1:]], [1] * 3, False, [0] * 3, 1,
            [False, True, False],
        )  # fmt: skip
        return of_x, of_weight


class Convolution(nn.Conv3d):
    """A convolution that is always computed by oneDNN on a CPU.

    PyTorch unfolds the image instead where a plane is small or the kernel 1 x 1 x 1, which takes
    three to ten times as long and loses that channels lie last.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, outputs, X, Y, Z)`."""
        there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        mixed = torch.is_autocast_enabled('cpu')
        kind = torch.get_autocast_dtype('cpu') if mixed else x.dtype
        padding = cast(tuple[int, ...], self.padding)
        if there and x.device.type == 'cpu' and kind in (torch.float32, torch.bfloat16):
            same = padding == self.dilation and self.bias is None
            if self.dilation[0] > 1 and same and torch.is_grad_enabled():
                dilated = cast(Callable[[Tensor, Tensor, int], Tensor], _Dilated.apply)
                return dilated(x.to(kind), self.weight.to(kind), self.dilation[0])
            if kind == torch.float32 and not mixed:
                small = len(x) == 1 and x[..., 0].numel() <= LARGE_PLANES
                if small and same and torch.is_grad_enabled():
                    convolved = cast(Callable[[Tensor, Tensor], Tensor], _Small.apply)
                    return convolved(x, self.weight)
                return torch.mkldnn_convolution(
                    x, self.weight, self.bias, padding, self.stride, self.dilation, self.groups
                )
        return super().forward(x)


class InstanceNorm(nn.Module):
    """Zero mean and unit variance per image and channel, then a learned scale and shift.

    One image at a time is the statistics of a batch of one, which PyTorch computes twice as fast
    where channels lie last.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x`, `(B, C, X, Y, Z)`."""
        parts = [
            F.batch_norm(image, None, None, self.weight, self.bias, training=True)
            for image in torch.split(x, 1)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions, each after normalisation and ReLU, and the input added.

    Where the number of channels grows, the input is padded with zero channels (Li et al., 2017).
    """

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.extra = outputs - inputs
        self.body = nn.Sequential(
            InstanceNorm(inputs),
            nn.ReLU(inplace=True),
            Convolution(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False),
            InstanceNorm(outputs),
            nn.ReLU(inplace=True),
            Convolution(outputs, outputs, 3, padding=dilation, dilation=dilation, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, outputs, X, Y, Z)`."""
        identity = F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.extra)) if self.extra else x
        return cast(Tensor, self.body(x)) + identity


class HighResNet(nn.Module):
    """The network of Dorent et al. (MIDL 2019), Figure 2.

    Parameters
    ----------
    modalities
        Names of the branches.
    classes
        Number of output channels.
    channels
        Of the branches (dilation 1), and of the shared blocks with dilation 2 and 4.
    blocks
        Residual blocks of each.
    """

    multiple = (1, 1, 1)
    """What each spatial size has to be a multiple of."""

    def __init__(
        self,
        modalities: Sequence[str] = MODALITIES,
        classes: int = len(CLASSES),
        channels: Sequence[int] = (16, 32, 64),
        blocks: int = 3,
    ) -> None:
        super().__init__()
        first, second, third = channels
        self.branches = nn.ModuleDict(
            {
                name: nn.Sequential(
                    Convolution(1, first, 3, padding=1, bias=False),
                    *(ResidualBlock(first, first, 1) for _ in range(blocks)),
                )
                for name in modalities
            }
        )
        trunk: list[nn.Module] = []
        width = first
        for size, dilation in ((second, 2), (third, 4)):
            for _ in range(blocks):
                trunk.append(ResidualBlock(width, size, dilation))
                width = size
        self.trunk = nn.Sequential(*trunk)
        self.head = nn.Sequential(
            InstanceNorm(width), nn.ReLU(inplace=True), Convolution(width, classes, 1)
        )
        _initialise(self)

    def forward(self, images: Images) -> Tensor:
        """Return logits `(B, classes, X, Y, Z)`."""
        x = _mean_of_branches(self.branches, images)
        return cast(Tensor, self.head(self.trunk(x)))


def _convolutions(inputs: int, outputs: int, count: int = 1) -> nn.Sequential:
    """Return `count` times: 3x3x3 convolution, instance normalisation, ReLU."""
    layers: list[nn.Module] = []
    for width in (inputs, *[outputs] * (count - 1)):
        layers += [
            Convolution(width, outputs, 3, padding=1, bias=False),
            InstanceNorm(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def _pooled(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Return the maxima of blocks, in the precision of `x`.

    Autocast would copy `x` to float32 and back on a CPU, though a maximum is exact in any.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.max_pool3d(x, size)


class UNet(nn.Module):
    """A U-Net with one first block per modality, the mean of their features, additive skips.

    Instance normalisation depends on what a window holds, so a model of this network is used on
    windows of the size that it was trained on (the card's `window`). On whole volumes it lost 4
    Dice points of white matter and 9 of brainstem; statistics that were frozen, or renormalised
    batches (Ioffe, 2017), trained worse.

    Parameters
    ----------
    modalities
        Names of the branches.
    classes
        Number of output channels.
    channels
        Of each level. The first pooling is 2 x 2 x 1, the others 2 x 2 x 2.
    """

    def __init__(
        self,
        modalities: Sequence[str] = MODALITIES,
        classes: int = len(CLASSES),
        channels: Sequence[int] = (16, 32, 64, 128, 128),
    ) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.multiple = (2 ** len(pairs), 2 ** len(pairs), 2 ** max(0, len(pairs) - 1))
        self.branches = nn.ModuleDict(
            {name: _convolutions(1, channels[0], 2) for name in modalities}
        )
        self.down = nn.ModuleList(
            [_convolutions(channels[0], channels[0])] + [_convolutions(a, b, 2) for a, b in pairs]
        )
        self.widen = nn.ModuleList(Convolution(b, a, 1) for a, b in pairs)
        self.up = nn.ModuleList(_convolutions(a, a) for a, _ in pairs)
        self.head = Convolution(channels[0], classes, 1)
        _initialise(self)

    def forward(self, images: Images) -> Tensor:
        """Return logits `(B, classes, X, Y, Z)`; sizes must be multiples of `multiple`."""
        x = self.down[0](_mean_of_branches(self.branches, images))
        skips = []
        for level, block in enumerate(self.down[1:]):
            skips.append(x)
            x = block(_pooled(x, (2, 2, 2) if level else (2, 2, 1)))
        for skip, widen, block in zip(
            skips[::-1], reversed(self.widen), reversed(self.up), strict=True
        ):
            x = block(F.interpolate(widen(x), size=skip.shape[2:]) + skip)
        return cast(Tensor, self.head(x))


def _initialise(network: nn.Module) -> None:
    """Draw the weights as He et al. (ICCV 2015) advise; normalisation has scale 1, shift 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def build(architecture: Mapping[str, object], modalities: Sequence[str] = MODALITIES) -> nn.Module:
    """Return an untrained network from a card's `architecture`.

    Raises
    ------
    ModelError
        If the architecture is unknown or its arguments do not fit.
    """
    arguments = dict(architecture)
    kinds = {'unet': UNet, 'highresnet': HighResNet}
    name = arguments.pop('name', None)
    if name not in tuple(kinds):
        raise ModelError(f'architecture {name!r} is not one of {", ".join(kinds)}')
    try:
        network = kinds[cast(str, name)](modalities=modalities, **arguments)  # type: ignore[arg-type]
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        reason = ' '.join(str(error).split())
        raise ModelError(f'architecture {name!r}: {reason}') from error
    return cast(nn.Module, network.to(memory_format=torch.channels_last_3d))


def begin_with(network: nn.Module, start: nn.Module) -> None:
    """Give a network the weights of another one of its kind, which may have fewer channels.

    A U-Net that is wider answers what the other one answers: its own further channels keep
    their random weights, and none of the others listens to them yet (after Chen et al.,
    Net2Net, ICLR 2016).

    Raises
    ------
    ModelError
        If the networks differ in more than that.
    """
    own, given = network.state_dict(), start.state_dict()
    same = own.keys() == given.keys()
    shapes = [(own[name].shape, given[name].shape) for name in own] if same else []
    equal = same and all(a == b for a, b in shapes)
    wider = isinstance(network, UNet) and all(
        m >= n for a, b in shapes for m, n in zip(a, b, strict=True)
    )
    if not (equal or (same and wider)):
        raise ModelError('not the same network, nor a narrower U-Net')
    with torch.no_grad():
        for name, weights in own.items():
            old = given[name]
            corner = tuple(slice(size) for size in old.shape)
            if old.dim() > 1:
                weights[: old.shape[0], old.shape[1] :] = 0
            weights[corner] = old


def load_model(card: ModelCard) -> nn.Module:
    """Return the network of a card with its weights, ready for inference.

    Its `bias_for` is the card's, which :func:`.inference.probabilities` asks for.

    Raises
    ------
    ModelError
        If the weights cannot be read, are not the ones that the card names, or do not fit.
    """
    content = read_weights(card)
    try:
        widths = [width for width in card.architecture.get('channels', ()) if type(width) is int]
        if sum(27 * width**2 for width in widths) > len(content):  # before memory is asked for
            raise RuntimeError(f'{widths} channels have more than {len(content)} weights')
        network = build(card.architecture, card.modalities)
        tensors = {name: tensor.float() for name, tensor in load_tensors(content).items()}
        network.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, TypeError) as error:
        reason = ' '.join(str(error).split())[:300]
        raise ModelError(f'{card.weights}: the weights do not fit the card: {reason}') from error
    except ModelError as error:
        raise ModelError(f'{card.path}: {error}') from error
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ModelError(f'{card.weights}: some weights are not finite numbers: train it again')
    cast(Any, network).bias_for = card.bias_for
    return network.eval()


def save_model(network: nn.Module, card: ModelCard, folder: Path) -> ModelCard:
    """Write ``NAME.safetensors`` and ``NAME.json``; the card is complete when it appears.

    Weights are stored in half precision where they are floating point: the difference is far
    below what training resolves, and the file is half as large.

    Returns
    -------
    ModelCard
        The card with the SHA-256 of the weights and its path.
    """
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in network.state_dict().items()
    }
    content = save_tensors(tensors)
    card = replace(
        card, sha256=hashlib.sha256(content).hexdigest(), path=folder / f'{card.name}.json'
    )
    for path, data in ((card.weights, content), (card.path, card.to_json().encode())):
        write_bytes(cast(Path, path), data)
    return card
