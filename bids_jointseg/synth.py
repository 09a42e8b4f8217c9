"""Painted scans: a label map becomes T1w and FLAIR images with lesions and perfect labels.

After SynthSeg (Billot et al., Medical Image Analysis 2023), but each modality keeps to the
contrasts that it has in clinical scans: every kind of tissue draws its intensity around the
value that physics gives it, in units of white matter. Lesions are real ones (expert masks of
patients in MNI space, moved into the person's brain box and clipped to white matter) or grown
from noise; dirty white matter, rims of the ventricles, the choroid plexus and vessels may look
like one on either scan, perivascular spaces on T1w, and none of them is a lesion. The cortex of
the cerebellum has folds, which no label map has.

Every function is pure: it takes a `torch.Generator` for fields and returns new tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr
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
    ('extracerebral CSF', 0.34, 0.16, 0.28, 0.14),
    ('choroid plexus', 0.62, 0.15, 0.95, 0.40),
    ('vessel or chiasm', 0.60, 0.30, 0.80, 0.35),
    ('eye', 0.45, 0.20, 0.40, 0.20),
    ('soft tissue', 0.85, 0.35, 0.70, 0.35),
    ('bone', 0.30, 0.25, 0.25, 0.20),
    ('marrow or fat', 1.00, 0.50, 0.70, 0.40),
    ('dura and muscle', 0.60, 0.25, 0.60, 0.25),
    # A vessel is a void or bright: inflow, contrast agent, slow flow.
    ('vessel', 0.80, 0.60, 0.80, 0.70),
    ('perivascular space', 0.38, 0.15, 0.40, 0.20),
)
NAMES = tuple(kind[0] for kind in KINDS)
KIND = {name: index for index, name in enumerate(NAMES)}
GRAY = tuple(
    KIND[name] for name in ('cortex', 'hippocampus', 'striatum', 'thalamus', 'cerebellar cortex')
)
DEEP = tuple(KIND[name] for name in ('striatum', 'thalamus', 'pallidum'))
WHITE = KIND['white matter']
VENTRICLE = KIND['ventricle']
CSF = KIND['extracerebral CSF']
CEREBRUM = (KIND['white matter'], KIND['cortex'])
PLEXUS = KIND['choroid plexus']
VESSEL = KIND['vessel']
SPACE = KIND['perivascular space']
SPREAD = np.array([{'soft tissue': 0.22, 'marrow or fat': 0.15}.get(name, 0.1) for name in NAMES])
"""Kind -> standard deviation within it in a painted scan, in units of white matter."""
MIXED = 0.12
"""Share of its surroundings in the mean of a kind: measured, like the spread, on painted heads."""
BRAIN = (*range(1, 12), PLEXUS, VESSEL, SPACE)
"""Kinds that a brain mask holds for certain."""


def kinds_of(protocol: str, label_map: np.ndarray) -> np.ndarray:
    """Return the kind of tissue of each voxel of a source label map, uint8.

    Parameters
    ----------
    protocol
        `freesurfer` or `intracranial` (whole heads with extracerebral classes from 500), or
        `neuromorphometrics`.
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
_SOURCES['intracranial'] = _SOURCES['freesurfer']
_OTHER = {
    'freesurfer': KIND['soft tissue'],
    'intracranial': KIND['soft tissue'],
    'neuromorphometrics': CSF,
}


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
    blur
        Of borders, the standard deviation of a Gaussian in voxels: 0.6 is as sharp as labels,
        the walls of real ventricles look like 0.9.
    folia
        Variation within the cortex of the cerebellum, whose folds no label map has, in units of
        white matter: 0.06 to 0.09 in real T1w at 1 mm.
    """

    means: np.ndarray
    lesion: float
    texture: float
    rim: float
    dirt: float
    blur: float
    folia: float


def draw_contrast(
    modality: str, rng: np.random.Generator, *, wild: float = 0.1, spread: float = 1.0
) -> Contrast:
    """Draw the contrast of one painted scan.

    Parameters
    ----------
    modality
        `T1w` or `FLAIR`.
    rng
        Source of all draws.
    wild
        Chance of a scan whose means stray three times as far: sequences nobody told us of.
    spread
        Of the means between scanners: 0 is one scanner with one protocol. Lesions vary as ever.
    """

    def near(low: float, high: float) -> float:
        middle = (low + high) / 2
        return middle + spread * (rng.uniform(low, high) - middle)

    column = 1 if modality == 'T1w' else 3
    values = np.array([kind[column] for kind in KINDS])
    reach = spread * np.array([kind[column + 1] for kind in KINDS])
    stray = 3.0 if rng.random() < wild else 1.0
    means = values + stray * reach * rng.uniform(-1, 1, len(KINDS))
    gray = list(GRAY)
    if modality == 'T1w':
        # From MPRAGE (cortex 0.55) to spin echo (cortex 0.9): the contrast between gray and
        # white shrinks for all gray matter at once, and fluid is the darker the more there is.
        strength = near(0.35, 1.85)
        means[gray] = 1 - (1 - means[gray]) * strength
        means[[VENTRICLE, CSF]] += 0.12 * (1 - strength)
        lesion = -rng.uniform(0.0, 0.9) * (1 - means[VENTRICLE]) * 0.7
        texture, dirt = 0.08, (-0.05, 0.0)
    else:
        means[gray] = 1 + (means[gray] - 1) * near(0.3, 1.4)
        means[CSF] = means[VENTRICLE] * near(0.7, 1.3)
        means[KIND['soft tissue']] *= near(0.3, 1.3)
        lesion = rng.uniform(0.25, 1.1)
        texture, dirt = 0.07, (0.0, 0.3 * lesion)
    return Contrast(
        means=means.clip(0),
        lesion=lesion,
        texture=rng.uniform(0, texture),
        rim=lesion * rng.uniform(0, 0.7),
        dirt=rng.uniform(*dirt),
        blur=rng.uniform(0.5, 1.1),
        folia=rng.uniform(0, 0.12),
    )


def blur(x: Tensor, sigma: float | tuple[float, float, float]) -> Tensor:
    """Return `x` `(X, Y, Z)` smoothed by a Gaussian of `sigma` voxels on each axis."""
    sigmas = (sigma,) * 3 if isinstance(sigma, int | float) else sigma
    kernels = []
    for size, value in zip(x.shape, sigmas, strict=True):
        steps = torch.arange(size, dtype=x.dtype)
        kernel = torch.exp(-0.5 * ((steps[:, None] - steps) / max(value, 0.2)) ** 2)
        kernels.append(kernel / kernel.sum(1, keepdim=True) if value >= 0.2 else None)
    return _mix(x, kernels)


def smooth_field(shape: tuple[int, ...], cell: float, generator: Generator) -> Tensor:
    """Return a Gaussian random field that varies over about `cell` voxels, `(X, Y, Z)`.

    Mean 0 and variance 1 everywhere: a field that is interpolated linearly between its nodes
    varies most on them, and its maxima are crosses on a lattice.
    """
    kernels = []
    nodes = []
    for size, phase in zip(shape, torch.rand(3, generator=generator), strict=True):
        at = torch.arange(size) / cell + phase
        node = torch.arange(int(at[-1]) + 2)
        kernel = torch.exp(-2 * (at[:, None] - node) ** 2)
        kernels.append(kernel / kernel.norm(dim=1, keepdim=True))
        nodes.append(len(node))
    return _mix(torch.randn(nodes, generator=generator), kernels)


def _mix(x: Tensor, kernels: Sequence[Tensor | None]) -> Tensor:
    """Multiply each axis of `x` `(X, Y, Z)` by a matrix; the cost grows with no kernel's width."""
    first, second, third = kernels
    x = x if third is None else x @ third.T
    x = x if second is None else second @ x
    return x if first is None else (first @ x.flatten(1)).unflatten(1, x.shape[1:])


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
    cell = rng.uniform(4.0, 12.0)
    field = smooth_field(tuple(white.shape), cell, generator)
    # Finer noise makes the outline uneven.
    field = field + rng.uniform(0, 0.3) * smooth_field(tuple(white.shape), 3.0, generator)
    field = field + rng.uniform(0, 5) * near
    inside = field[white > 0.5]
    if inside.numel() < 100:
        return torch.zeros_like(white)
    share = float(np.exp(rng.uniform(np.log(0.0005), np.log(0.02))))
    # A sample of the voxels is enough for a threshold.
    level = torch.quantile(inside[:: max(1, inside.numel() // 50000)], 1 - share)
    return torch.sigmoid((field - level) * 8) * white


def add_distractors(kinds: Tensor, rng: np.random.Generator, generator: Generator) -> Tensor:
    """Return the kinds of a window with what looks like a lesion and is none.

    Each of them with some probability: choroid plexus along the wall of the ventricles, small
    vessels through white matter, cortex and fluid, and widened perivascular spaces in white
    matter and basal ganglia. For painting alone: labels stay those of the tissue around.

    Parameters
    ----------
    kinds
        Kind of tissue of each voxel, uint8 `(X, Y, Z)`; not changed.
    rng, generator
        Sources of numbers and places, and of fields.
    """
    plexus, vessels, spaces = rng.random(3) < (0.5, 0.5, 0.4)
    found = kinds.numpy().copy()
    if plexus:
        found[_plexus(kinds == VENTRICLE, rng, generator).numpy()] = PLEXUS
    if vessels:
        count = int(rng.integers(3, 25))
        _draw_tubes(found, VESSEL, (WHITE, KIND['cortex'], CSF), count, rng, radius=(0.5, 1.2),
                    length=(15, 60), turn=0.12, parallel=0.0)  # fmt: skip
    if spaces:
        count = int(np.exp(rng.uniform(np.log(5), np.log(100))))
        _draw_tubes(found, SPACE, (WHITE, *DEEP), count, rng, radius=(0.4, 1.0),
                    length=(3, 15), turn=0.02, parallel=1.5)  # fmt: skip
    return torch.from_numpy(found)


def _plexus(ventricle: Tensor, rng: np.random.Generator, generator: Generator) -> Tensor:
    """Return tufts along part of the ventricles' wall, bool `(X, Y, Z)`."""
    plexus = torch.zeros_like(ventricle)
    spans = [ventricle.any(i).any(j).nonzero().flatten() for i, j in ((2, 1), (2, 0), (1, 0))]
    if not len(spans[0]):
        return plexus
    box = tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans)
    inside = ventricle[box]
    shape = tuple(inside.shape)
    # Tufts where a coarse field is high, rather close to the wall, with the grain of their villi.
    score = smooth_field(shape, 10, generator) + 0.3 * smooth_field(shape, 2.5, generator)
    score = score - rng.uniform(1, 4) * blur(inside.float(), 1.5)
    chosen = score[inside]
    # At most a fifth of the fluid, and no more than people have: 0.2 to 2.5 ml at 1 mm.
    share = min(0.2, rng.uniform(200, 2500) / len(chosen))
    level = torch.quantile(chosen[:: max(1, len(chosen) // 50000)], 1 - share)
    plexus[box] = inside & (score > level)
    return plexus


def _draw_tubes(
    kinds: np.ndarray,
    kind: int,
    through: tuple[int, ...],
    count: int,
    rng: np.random.Generator,
    *,
    radius: tuple[float, float],
    length: tuple[float, float],
    turn: float,
    parallel: float,
) -> None:
    """Write curved tubes into `kinds` where these are among `through`.

    Parameters
    ----------
    kinds
        Uint8 `(X, Y, Z)`, changed in place.
    kind
        What to write.
    through
        Kinds in which tubes begin and which they replace.
    count
        How many tubes at most: none begins where ten tries find no voxel of `through`.
    rng
        Source of all draws.
    radius, length
        Least and greatest, in voxels.
    turn
        Change of direction at each half voxel.
    parallel
        Weight of a direction that all tubes share.
    """
    shape = np.array(kinds.shape)
    open_to = np.isin(np.arange(256), through)
    starts = rng.integers(shape, size=(10 * count, 3))
    starts = starts[open_to[kinds[tuple(starts.T)]]][:count]
    steps = int(2 * length[1])
    course = rng.normal(size=(len(starts), 1, 3)) + parallel * rng.normal(size=3)
    course = course / np.linalg.norm(course, axis=-1, keepdims=True)
    course = course + np.cumsum(turn * rng.normal(size=(len(starts), steps, 3)), 1)
    course = course / np.linalg.norm(course, axis=-1, keepdims=True)
    points = starts[:, None] + np.cumsum(0.5 * course, 1)
    wide = rng.uniform(*radius, (len(starts), 1, 1))
    ends = 2 * rng.uniform(*length, (len(starts), 1, 1))
    around = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 3, indexing='ij'), -1).reshape(-1, 3)
    voxels = points.round().astype(int)[:, :, None] + around
    keep = np.linalg.norm(voxels - points[:, :, None], axis=-1) <= wide
    keep &= np.arange(steps)[:, None] < ends
    keep &= ((voxels >= 0) & (voxels < shape)).all(-1)
    x, y, z = voxels[keep].T
    inside = open_to[kinds[x, y, z]]
    kinds[x[inside], y[inside], z[inside]] = kind


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
    texture = 0.6 * smooth_field(shape, 12, generator) + 0.3 * smooth_field(shape, 3, generator)
    image = image * (1 + contrast.texture * texture)
    # Soft tissue is fat and muscle in layers.
    soft = kinds == KIND['soft tissue']
    image = torch.where(soft, image * (0.25 * smooth_field(shape, 4, generator)).exp(), image)
    image = blur(image, contrast.blur)
    folia = contrast.folia * smooth_field(shape, 2, generator)
    image = image + torch.where(kinds == KIND['cerebellar cortex'], folia, 0)
    white = (kinds == WHITE).float()
    ventricle = (kinds == VENTRICLE).float()
    # A rim is fainter than a lesion, and dirty white matter gathers around the ventricles.
    rim = 2.5 * blur(ventricle, 1.2) * smooth_field(shape, 10, generator).clamp(0, 1)
    haze = (0.3 + 2 * blur(ventricle, 5.0)) * smooth_field(shape, 8, generator).clamp(0, 1)
    return (
        image
        + contrast.rim * rim * white
        + contrast.dirt * (haze + blur(lesion, 3.0)) * white
        + contrast.lesion * severity * blur(lesion, 0.5)
    )


def painted_level(
    means: np.ndarray, counts: Mapping[int, int], gamma: float = 1.0
) -> tuple[float, float]:
    """Return mean and standard deviation over the foreground of a whole painted scan.

    The same rule as :func:`bids_jointseg.image.foreground`, from the number of voxels of each
    kind, so that a window can be painted alone and still be normalised as its scan. Each kind
    is taken to be normally distributed: partial volume, texture, bias and noise spread it.

    Parameters
    ----------
    means
        Kind -> intensity, in units of white matter, `(K,)`.
    counts
        Kind -> voxels in the whole scan.
    gamma
        Exponent that the scan's contrast has on top.
    """
    kinds = np.array([kind for kind in counts if kind != AIR])
    weights = np.array([counts[int(kind)] for kind in kinds], dtype=float)
    centre = means[kinds] ** gamma
    # Partial volume: the layers of a head are few voxels thick.
    centre = centre + MIXED * (np.average(centre, weights=weights) - centre)
    spread = SPREAD[kinds]
    threshold = 0.0
    for _ in range(50):
        # Weight, mean and mean square of what each normal distribution has above the threshold.
        z = (threshold - centre) / spread
        density = spread * np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
        share = ndtr(-z)
        total = weights @ share
        mean = weights @ (centre * share + density) / total
        square = weights @ ((centre**2 + spread**2) * share + (centre + threshold) * density)
        if abs(0.5 * mean - threshold) < 1e-4:
            break
        threshold = 0.5 * mean
    return float(mean), float(np.sqrt(max(square / total - mean**2, 1e-4)))
