"""Painted scans: a label map becomes T1w and FLAIR images with lesions and perfect labels.

After SynthSeg (Billot et al., Medical Image Analysis 2023), but each modality keeps to the
contrasts that it has in clinical scans: every kind of tissue draws its intensity around the
value that physics gives it, in units of white matter. Lesions are real ones (expert masks of
patients in MNI space, moved into the person's brain box and clipped to white matter) or grown
from noise; dirty white matter, caps and rims of the ventricles, and the choroid plexus are
bright on FLAIR as well and are not lesions.

Every function is pure: it takes a `torch.Generator` for fields and returns new tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# Kind of tissue -> mean intensity on T1w and FLAIR in units of white matter, and the spread of
# that mean between scanners. Clinical spin-echo T1w has little contrast, MPRAGE much: `gray`
# below moves all gray matter together.
AIR = 0
KINDS: tuple[tuple[str, float, float, float, float], ...] = (
    # name             T1w   +-    FLAIR  +-
    ('air', 0.00, 0.00, 0.00, 0.00),
    ('white matter', 1.00, 0.00, 1.00, 0.00),
    ('cortex', 0.74, 0.03, 1.25, 0.08),
    ('hippocampus', 0.76, 0.04, 1.32, 0.10),
    ('striatum', 0.80, 0.04, 1.20, 0.08),
    ('thalamus', 0.87, 0.04, 1.13, 0.08),
    ('pallidum', 0.94, 0.04, 0.98, 0.12),
    ('brainstem', 0.94, 0.04, 1.08, 0.09),
    ('ventral DC', 0.92, 0.04, 1.08, 0.09),
    ('cerebellar cortex', 0.75, 0.04, 1.20, 0.10),
    ('cerebellar white matter', 0.97, 0.04, 1.04, 0.08),
    ('ventricle', 0.28, 0.10, 0.28, 0.13),
    ('extracerebral CSF', 0.30, 0.10, 0.28, 0.14),
    ('choroid plexus', 0.62, 0.15, 0.85, 0.25),
    ('vessel or chiasm', 0.60, 0.30, 0.80, 0.35),
    ('eye', 0.45, 0.20, 0.40, 0.20),
    ('soft tissue', 0.85, 0.35, 0.70, 0.35),
    ('bone', 0.30, 0.25, 0.25, 0.20),
    ('marrow or fat', 1.00, 0.50, 0.70, 0.40),
    ('dura and muscle', 0.60, 0.25, 0.60, 0.25),
)
NAMES = tuple(kind[0] for kind in KINDS)
KIND = {name: index for index, name in enumerate(NAMES)}
GRAY = tuple(
    KIND[name] for name in ('cortex', 'hippocampus', 'striatum', 'thalamus', 'cerebellar cortex')
)
WHITE = KIND['white matter']
VENTRICLE = KIND['ventricle']
CSF = KIND['extracerebral CSF']
CEREBRUM = (KIND['white matter'], KIND['cortex'])
BRAIN = (*range(1, 12), KIND['choroid plexus'])
"""Kinds that a brain mask holds for certain."""


def kinds_of(protocol: str, label_map: np.ndarray) -> np.ndarray:
    """Return the kind of tissue of each voxel of a source label map, uint8.

    Parameters
    ----------
    protocol
        `freesurfer` (whole heads with extracerebral classes from 500) or `neuromorphometrics`.
    label_map
        Source labels.
    """
    table = {KIND[name]: values for name, values in _SOURCES[protocol].items()}
    lookup = np.full(int(label_map.max()) + 1, _OTHER[protocol], dtype=np.uint8)
    lookup[0] = AIR
    for kind, values in table.items():
        lookup[[value for value in values if value < len(lookup)]] = kind
    return lookup[label_map]


_SOURCES: dict[str, dict[str, tuple[int, ...]]] = {
    'freesurfer': {
        'white matter': (2, 41, 25, 57, 77, 78, 79, *range(251, 256)),
        'cortex': (3, 42),
        'hippocampus': (17, 18, 53, 54),
        'striatum': (11, 12, 26, 50, 51, 58),
        'thalamus': (10, 49),
        'pallidum': (13, 52),
        'brainstem': (16,),
        'ventral DC': (28, 60),
        'cerebellar cortex': (8, 47),
        'cerebellar white matter': (7, 46),
        'ventricle': (4, 5, 14, 15, 43, 44, 72),
        'extracerebral CSF': (24,),
        'choroid plexus': (136, 137, 163, 164),
        'vessel or chiasm': (30, 62, 85),
        'eye': (502, 506, 508),
        'soft tissue': (507, 512, 514),
        'bone': (515,),
        'marrow or fat': (516, 530),
        'dura and muscle': (509, 511),
    },
    'neuromorphometrics': {
        'white matter': (44, 45),
        'cortex': tuple(range(100, 208)),
        'hippocampus': (31, 32, 47, 48),
        'striatum': (23, 30, 36, 37, 57, 58, 75, 76),
        'thalamus': (59, 60),
        'pallidum': (55, 56),
        'brainstem': (35,),
        'ventral DC': (61, 62),
        'cerebellar cortex': (38, 39, 71, 72, 73),
        'cerebellar white matter': (40, 41),
        'ventricle': (4, 11, 15, 49, 50, 51, 52),
        'extracerebral CSF': (46,),
        'vessel or chiasm': (63, 64, 69),
    },
}
_OTHER = {'freesurfer': KIND['soft tissue'], 'neuromorphometrics': CSF}


@dataclass(frozen=True)
class Contrast:
    """What one painted scan draws once.

    Attributes
    ----------
    means
        Kind -> intensity, in units of white matter, `(K,)`.
    lesion
        What a lesion adds to white matter, in the same units (negative on T1w).
    texture
        Smooth variation within a kind, relative.
    rim, dirt
        What the border of the ventricles and dirty white matter add.
    """

    means: np.ndarray
    lesion: float
    texture: float
    rim: float
    dirt: float


def draw_contrast(modality: str, rng: np.random.Generator, wild: float = 0.1) -> Contrast:
    """Draw the contrast of one painted scan.

    Parameters
    ----------
    modality
        `T1w` or `FLAIR`.
    rng
        Source of all draws.
    wild
        Chance of a scan whose means stray three times as far: sequences nobody told us of.
    """
    column = 1 if modality == 'T1w' else 3
    values = np.array([kind[column] for kind in KINDS])
    spread = np.array([kind[column + 1] for kind in KINDS])
    stray = 3.0 if rng.random() < wild else 1.0
    means = values + stray * spread * rng.uniform(-1, 1, len(KINDS))
    gray = list(GRAY)
    if modality == 'T1w':
        # From MPRAGE (cortex 0.65) to spin echo (cortex 0.9): the contrast between gray and
        # white shrinks for all gray matter at once.
        means[gray] = 1 - (1 - means[gray]) * rng.uniform(0.35, 1.35)
        lesion = -rng.uniform(0.0, 0.9) * (1 - means[VENTRICLE]) * 0.7
        return Contrast(means.clip(0), lesion, rng.uniform(0, 0.04), 0.0, rng.uniform(-0.05, 0))
    means[gray] = 1 + (means[gray] - 1) * rng.uniform(0.3, 1.4)
    means[CSF] = means[VENTRICLE] * rng.uniform(0.7, 1.3)
    means[KIND['soft tissue']] *= rng.uniform(0.3, 1.3)
    lesion = rng.uniform(0.25, 1.1)
    return Contrast(
        means.clip(0),
        lesion,
        rng.uniform(0, 0.07),
        lesion * rng.uniform(0, 0.7),
        lesion * rng.uniform(0, 0.3),
    )


def blur(x: Tensor, sigma: float | tuple[float, float, float]) -> Tensor:
    """Return `x` `(X, Y, Z)` smoothed by a Gaussian of `sigma` voxels on each axis."""
    sigmas = (sigma,) * 3 if isinstance(sigma, int | float) else sigma
    for axis, value in enumerate(sigmas):
        if value < 0.2:
            continue
        # One matrix product per axis: its cost does not grow with sigma.
        steps = torch.arange(x.shape[axis], dtype=x.dtype)
        kernel = torch.exp(-0.5 * ((steps[:, None] - steps) / value) ** 2)
        kernel = kernel / kernel.sum(1, keepdim=True)
        x = torch.tensordot(kernel, x, ([1], [axis])).movedim(0, axis)
    return x.contiguous()


def smooth_field(shape: tuple[int, ...], cell: float, generator: Generator) -> Tensor:
    """Return standard normal noise that varies over about `cell` voxels, `(X, Y, Z)`."""
    coarse = [max(2, round(size / cell) + 1) for size in shape]
    noise = torch.randn(1, 1, *coarse, generator=generator)
    return F.interpolate(noise, size=shape, mode='trilinear', align_corners=True)[0, 0]


def grow_lesions(
    white: Tensor, near: Tensor, generator: Generator, rng: np.random.Generator
) -> Tensor:
    """Return lesions grown from noise, `(X, Y, Z)` between 0 and 1.

    Parameters
    ----------
    white
        1 in white matter.
    near
        Blurred ventricles: lesions gather where it is high.
    generator, rng
        Sources of the field and of its scale.
    """
    cell = rng.uniform(2.5, 6.0)
    field = smooth_field(tuple(white.shape), cell, generator)
    field = field + rng.uniform(0, 3) * near
    inside = field[white > 0.5]
    if inside.numel() < 100:
        return torch.zeros_like(white)
    share = float(np.exp(rng.uniform(np.log(0.0005), np.log(0.02))))
    # A sample of the voxels is enough for a threshold.
    level = torch.quantile(inside[:: max(1, inside.numel() // 50000)], 1 - share)
    return torch.sigmoid((field - level) * 8) * white


def paint(
    kinds: Tensor,
    lesion: Tensor,
    contrast: Contrast,
    generator: Generator,
    severity: Tensor,
) -> Tensor:
    """Return a painted image `(X, Y, Z)`, in units of white matter, without noise.

    Parameters
    ----------
    kinds
        Kind of tissue of each voxel, `(X, Y, Z)`.
    lesion
        Share of lesion, 0 to 1.
    contrast
        See :func:`draw_contrast`.
    generator
        Source of the fields.
    severity
        Smooth field around 1 that makes some lesions fainter; shared by the modalities.
    """
    shape = tuple(kinds.shape)
    index = kinds.long()
    image = torch.as_tensor(contrast.means, dtype=torch.float32)[index]
    texture = smooth_field(shape, 12, generator) + 0.5 * smooth_field(shape, 3, generator)
    image = image * (1 + contrast.texture * texture)
    # Soft tissue is fat and muscle in layers.
    soft = kinds == KIND['soft tissue']
    image = torch.where(soft, image * (0.35 * smooth_field(shape, 4, generator)).exp(), image)
    image = blur(image, 0.6)
    white = (kinds == WHITE).float()
    edge = 4 * blur((kinds == VENTRICLE).float(), 1.2) * white
    where = smooth_field(shape, 10, generator).clamp(0, 2)
    haze = blur(lesion, 3.0) * white + 0.5 * smooth_field(shape, 8, generator).clamp(0, 2) * white
    return (
        image
        + contrast.rim * edge * where
        + contrast.dirt * haze
        + contrast.lesion * severity * blur(lesion, 0.5)
    )


def painted_level(means: np.ndarray, counts: Mapping[int, int]) -> tuple[float, float]:
    """Return mean and standard deviation over the foreground of a whole painted scan.

    The same rule as :func:`bids_jointseg.image.foreground`, from the number of voxels of each
    kind, so that a window can be painted alone and still be normalised as its scan.
    """
    kinds = np.array([kind for kind in counts if kind != AIR])
    weights = np.array([counts[int(kind)] for kind in kinds], dtype=float)
    values = means[kinds]
    threshold = 0.0
    for _ in range(50):
        keep = values > threshold
        new = 0.5 * float(np.average(values[keep], weights=weights[keep]))
        if abs(new - threshold) < 1e-4:
            break
        threshold = new
    keep = values > threshold
    mean = float(np.average(values[keep], weights=weights[keep]))
    variance = float(np.average((values[keep] - mean) ** 2, weights=weights[keep]))
    return mean, float(np.sqrt(variance + 0.1**2))
