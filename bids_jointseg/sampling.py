"""Training samples: windows drawn from cached people, painted where no scan exists.

The cache holds one person per file, at 1 mm in canonical orientation (right, anterior,
superior), cropped to the head: the sets of classes that the annotation leaves open, the kind of
tissue for painting, and the T1w if there is one. A sample depends on its number and the seed
alone, so it is the same with any number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from bids_jointseg import augment, synth
from bids_jointseg.image import load_scan, model_grid, normalise, register, resample
from bids_jointseg.labels import CLASSES, PROTOCOLS, bits

LESION = CLASSES.index('L')


@dataclass(frozen=True)
class Person:
    """One cached scan.

    Attributes
    ----------
    name
        Of the file.
    classes
        Channel of each voxel, `len(CLASSES)` where nothing is known, uint8 `(X, Y, Z)`.
    kinds
        Kind of tissue (:mod:`bids_jointseg.synth`), uint8 `(X, Y, Z)`.
    t1w
        In units of white matter, or None where it has to be painted.
    means
        Kind -> median of the T1w, NaN where there is none, `(K,)`.
    counts
        Voxels of each kind in the whole volume.
    box
        First and last voxel of the cerebrum on each axis, `(2, 3)`.
    """

    name: str
    classes: Tensor
    kinds: Tensor
    t1w: Tensor | None
    means: np.ndarray
    counts: dict[int, int]
    box: np.ndarray


STEPS = 110
"""Steps of a cached T1w between air and white matter: finer than its noise, in one byte."""

# First and last voxel of the cerebrum in the 1 mm MNI152 space of the masks, whose canonical
# grid is 182 x 218 x 182: measured on nilearn's ICBM152 brain mask, without the brainstem.
MNI_SHAPE = (182, 218, 182)
MNI_CEREBRUM = np.array([[19.0, 19.0, 28.0], [163.0, 199.0, 154.0]])


def _canonical(path: Path) -> NDArray[np.int64]:
    return np.asanyarray(nib.as_closest_canonical(nib.load(path)).dataobj).astype(np.int64)


def _box(mask: NDArray[np.bool_], margin: int) -> tuple[slice, slice, slice]:
    spans = [np.flatnonzero(mask.any(tuple(j for j in range(3) if j != i))) for i in range(3)]
    low, high = zip(*((max(0, s[0] - margin), s[-1] + 1 + margin) for s in spans), strict=True)
    return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])


def write_person(annotation: Path, protocol: str, scan: Path | None, path: Path) -> None:
    """Cache one annotated person for :func:`read_person`.

    Parameters
    ----------
    annotation
        Label map at 1 mm.
    protocol
        What its labels say.
    scan
        T1w on the same grid, or None where it is to be painted.
    path
        The file to write, `.npz`.
    """
    labels = _canonical(annotation)
    kinds = synth.kinds_of(protocol, labels)
    # Whole heads number their extracerebral tissue from 500: background to every protocol.
    arrays: dict[str, Any] = {
        'sets': PROTOCOLS[protocol].encode(np.where(labels >= 500, 0, labels))
    }
    if scan is not None:
        t1w = _canonical(scan).astype(np.float32)
        kinds[(kinds == synth.AIR) & (t1w > 0)] = synth.CSF
        white = np.median(t1w[kinds == synth.WHITE])
        arrays['t1w'] = (t1w / white * STEPS).round().clip(0, 255).astype(np.uint8)
    arrays['kinds'] = kinds
    box = list(_box(kinds != synth.AIR, 4))
    brain = _box(np.isin(kinds, synth.BRAIN), 0)
    box[2] = slice(max(box[2].start, brain[2].start - 70), box[2].stop)  # no need of shoulders
    arrays = {name: array[tuple(box)] for name, array in arrays.items()}
    np.savez_compressed(path, **arrays)


def write_pair(flair: Path, t1w: Path, path: Path, *, slice_mm: tuple[float, float]) -> None:
    """Cache one unlabelled pair on the FLAIR's slices for :class:`Pairs`."""
    scans = {'FLAIR': load_scan(flair), 'T1w': load_scan(t1w)}
    grid = model_grid(scans['FLAIR'], in_plane_mm=1.0, slice_mm=slice_mm)
    moves = {'FLAIR': np.eye(4), 'T1w': register(scans['FLAIR'], scans['T1w'])}
    arrays: dict[str, Any] = {
        name: normalise(resample(scan, grid, moves[name])).astype(np.float16)
        for name, scan in scans.items()
    }
    np.savez_compressed(path, **arrays)


def write_lesions(masks: Mapping[str, Path], path: Path) -> None:
    """Cache lesion masks in 1 mm MNI152 space for :func:`read_lesions`.

    Raises
    ------
    ValueError
        If a mask is on another grid.
    """
    arrays: dict[str, Any] = {}
    for subject, mask in masks.items():
        array = _canonical(mask) > 0
        if array.shape != MNI_SHAPE:
            raise ValueError(f'{mask}: not on the 1 mm MNI152 grid {MNI_SHAPE}: {array.shape}')
        arrays[subject] = np.packbits(array)
    np.savez_compressed(path, **arrays)


def read_lesions(path: Path, subjects: Sequence[str]) -> list[Tensor]:
    """Return the masks of some subjects, uint8 `(X, Y, Z)`."""
    with np.load(path) as stored:
        return [
            torch.from_numpy(
                np.unpackbits(stored[name], count=int(np.prod(MNI_SHAPE))).reshape(MNI_SHAPE)
            )
            for name in subjects
        ]


def read_person(path: Path) -> Person:
    """Read one file of the cache."""
    with np.load(path) as stored:
        kinds = stored['kinds']
        sets = stored['sets']
        t1w = stored['t1w'].astype(np.float16) / STEPS if 't1w' in stored else None
    table = np.full(256, len(CLASSES), dtype=np.uint8)
    for channel, name in enumerate(CLASSES):
        table[bits({name})] = channel
    cerebrum = np.isin(kinds, synth.CEREBRUM)
    spans = [np.flatnonzero(cerebrum.any(tuple(j for j in range(3) if j != i))) for i in range(3)]
    means = np.full(len(synth.KINDS), np.nan)
    if t1w is not None:
        for kind in np.unique(kinds):
            means[kind] = np.median(t1w[kinds == kind])
    values, counts = np.unique(kinds, return_counts=True)
    return Person(
        path.stem,
        torch.from_numpy(table[sets]),
        torch.from_numpy(kinds),
        None if t1w is None else torch.from_numpy(t1w),
        means,
        dict(zip(values.tolist(), counts.tolist(), strict=True)),
        np.array([[span[0] for span in spans], [span[-1] for span in spans]], dtype=float),
    )


@dataclass(frozen=True)
class Sample:
    """One training example.

    Attributes
    ----------
    images
        Modality -> normalised window `(1, X, Y, Z)`.
    target
        Share of each class, `(C, X, Y, Z)`.
    valid
        1 where the annotation says something, `(1, X, Y, Z)`.
    """

    images: dict[str, Tensor]
    target: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Settings:
    """What a recipe says about samples: see `data/recipes`."""

    thin_window: tuple[int, int, int] = (96, 112, 48)
    thick_window: tuple[int, int, int] = (112, 128, 32)
    thin_share: float = 0.5
    thickest: int = 6
    heads_share: float = 0.5
    lesion_share: float = 0.7
    lesion_centre: float = 0.7
    outside_share: float = 0.2
    strip_share: float = 0.4
    borrow_share: float = 0.4
    modalities: tuple[tuple[tuple[str, ...], float], ...] = (
        (('T1w',), 0.35),
        (('FLAIR',), 0.2),
        (('T1w', 'FLAIR'), 0.45),
    )


class Windows(torch.utils.data.Dataset[Sample]):
    """Windows of real tissue scans and of painted heads.

    Parameters
    ----------
    controls
        People with a T1w and tissue labels.
    heads
        Whole-head label maps.
    lesions
        Lesion masks in MNI space, canonical orientation, `(X, Y, Z)` uint8.
    settings, seed, length
        Sample `i` depends on `(seed, i)` alone.
    """

    def __init__(
        self,
        controls: list[Person],
        heads: list[Person],
        lesions: list[Tensor],
        *,
        settings: Settings,
        seed: int,
        length: int,
    ) -> None:
        self.controls, self.heads, self.lesions = controls, heads, lesions
        self.settings, self.seed, self.length = settings, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Sample:
        """Return sample `number`."""
        rng = np.random.default_rng((self.seed, number))
        generator = Generator().manual_seed(int(rng.integers(2**62)))
        s = self.settings
        thin = rng.random() < s.thin_share
        count = 1 if thin else int(rng.integers(2, s.thickest + 1))
        window = s.thin_window if thin else s.thick_window
        # The thicker the slices, the fewer cover a head.
        depth = window[2] if thin else max(16, min(window[2], 8 * round(12 / count)))
        # Three points across a slice show its partial volume.
        dense = min(count, 3)
        fine = (window[0], window[1], depth * dense)
        slicing = str(rng.choice(list(augment.AXES), p=[0.8, 0.1, 0.1]))
        person = self._person(rng)
        with_lesions = rng.random() < s.lesion_share
        mask = self.lesions[rng.integers(len(self.lesions))] if self.lesions else None
        jitter = self._lesion_jitter(rng)
        low, high = person.box
        if rng.random() < s.outside_share:
            # Face and neck: a window may hold no brain at all.
            centre = rng.uniform(low - (20, 20, 110), high + np.array((20, 40, 0)))
        elif with_lesions and mask is not None and rng.random() < s.lesion_centre:
            found = mask.nonzero()
            pick = found[int(rng.integers(len(found)))].numpy().astype(float)
            inverse = np.linalg.inv(self._to_lesions(person.box, jitter))
            centre = inverse[:3, :3] @ pick + inverse[:3, 3] + rng.uniform(-16, 16, 3)
        else:
            margin = 0.12 * (high - low)
            centre = rng.uniform(low - [0, 0, 30] + margin, high - margin)
        points = augment.coordinates(
            augment.draw_geometry(rng, fine, slicing, centre, count / dense), generator
        )
        shown = mask if with_lesions else None
        return self.compose(person, points, dense, shown, jitter, rng, generator)

    def compose(
        self,
        person: Person,
        points: Tensor,
        dense: int,
        mask: Tensor | None,
        jitter: np.ndarray,
        rng: np.random.Generator,
        generator: Generator,
    ) -> Sample:
        """Return the images and the target of one window.

        Parameters
        ----------
        person
            Whose head it is.
        points
            Voxel of the person for each point of the window, `(X, Y, Z * dense, 3)`.
        dense
            Points across a slice.
        mask, jitter
            A patient's lesions, or None, and the affine change of them.
        rng, generator
            Sources of all draws.
        """
        channels = augment.warp(person.classes, points, 'nearest').to(torch.uint8)
        kinds = augment.warp(person.kinds, points, 'nearest').to(torch.uint8)
        white = ((kinds == synth.WHITE) & (channels != LESION)).float()
        lesion = (channels == LESION).float()
        if mask is not None:
            matrix = torch.as_tensor(self._to_lesions(person.box, jitter), dtype=torch.float32)
            placed = augment.warp(mask, points @ matrix[:3, :3].T + matrix[:3, 3])
            lesion = torch.maximum(lesion, placed * white)
            if rng.random() < 0.35:
                near = synth.blur((kinds == synth.VENTRICLE).float(), 4.0)
                lesion = torch.maximum(lesion, synth.grow_lesions(white, near, generator, rng))
        is_lesion = lesion > 0.5
        channels = torch.where(is_lesion & (kinds == synth.WHITE), LESION, channels)
        images = self._images(person, kinds, points, lesion, dense, rng, generator)
        known = (channels < len(CLASSES)).float()
        target = torch.stack(
            [augment.slices((channels == c).to(torch.float32), dense) for c in range(len(CLASSES))]
        )
        valid = (augment.slices(known, dense) > 0.5).float()[None]
        total = target.sum(0, keepdim=True).clamp_min(1e-3)
        return Sample(images, target / total, valid)

    def _person(self, rng: np.random.Generator) -> Person:
        people = self.controls
        if self.heads and (not self.controls or rng.random() < self.settings.heads_share):
            people = self.heads
        return people[int(rng.integers(len(people)))]

    def _lesion_jitter(self, rng: np.random.Generator) -> np.ndarray:
        """Return a small affine change of a lesion mask, `(4, 4)`, perhaps mirrored."""
        change = np.eye(4)
        change[:3, :3] *= rng.uniform(0.9, 1.1, 3)
        change[:3, 3] = rng.uniform(-4, 4, 3)
        if rng.random() < 0.5:
            middle = MNI_CEREBRUM.mean(0)[0]
            mirror = np.diag([-1.0, 1, 1, 1])
            mirror[0, 3] = 2 * middle
            change = mirror @ change
        return change

    def _to_lesions(self, box: np.ndarray, jitter: np.ndarray) -> np.ndarray:
        """Return the affine from a person's voxels to those of a lesion mask, box to box."""
        scale = (MNI_CEREBRUM[1] - MNI_CEREBRUM[0]) / (box[1] - box[0])
        matrix = np.diag([*scale, 1.0])
        matrix[:3, 3] = MNI_CEREBRUM[0] - scale * box[0]
        return np.asarray(jitter @ matrix)

    def _surround(
        self, person: Person, kinds: Tensor, points: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, dict[int, int]]:
        """Put a brain into a borrowed head, or take a head's brain out of it, or neither.

        Returns
        -------
        tuple[Tensor, dict[int, int]]
            Kinds of the window, and voxels of each kind in the whole volume.
        """
        s = self.settings
        brain = torch.tensor(synth.BRAIN, dtype=torch.uint8)
        if person.t1w is not None and self.heads and rng.random() < s.borrow_share:
            head = self.heads[int(rng.integers(len(self.heads)))]
            scale = (head.box[1] - head.box[0]) / (person.box[1] - person.box[0])
            shift = torch.as_tensor(head.box[0] - scale * person.box[0], dtype=torch.float32)
            there = points * torch.as_tensor(scale, dtype=torch.float32) + shift
            around = augment.warp(head.kinds, there, 'nearest').to(torch.uint8)
            around = torch.where(torch.isin(around, brain), synth.CSF, around)
            outside = {k: n for k, n in head.counts.items() if k not in synth.BRAIN}
            return torch.where(kinds == synth.AIR, around, kinds), outside | {
                k: n + outside.get(k, 0) for k, n in person.counts.items()
            }
        if person.t1w is None and rng.random() < s.strip_share:
            inside = torch.isin(kinds, brain).float()
            kept = synth.blur(inside, rng.uniform(0.8, 2.5)) > rng.uniform(0.15, 0.5)
            return torch.where(kept, kinds, synth.AIR), {
                k: n for k, n in person.counts.items() if k in synth.BRAIN
            }
        return kinds, person.counts

    def _images(
        self,
        person: Person,
        kinds: Tensor,
        points: Tensor,
        lesion: Tensor,
        dense: int,
        rng: np.random.Generator,
        generator: Generator,
    ) -> dict[str, Tensor]:
        """Paint, or take from the scan, each modality of a window: `(1, X, Y, Z)`."""
        kinds, counts = self._surround(person, kinds, points, rng)
        names, weights = zip(*self.settings.modalities, strict=True)
        chosen = names[int(rng.choice(len(names), p=np.array(weights) / sum(weights)))]
        severity = (0.35 * synth.smooth_field(tuple(kinds.shape), 10, generator)).exp()
        scan = None if person.t1w is None else augment.warp(person.t1w, points)
        images = {}
        for modality in chosen:
            contrast = synth.draw_contrast(modality, rng)
            image = synth.paint(kinds, lesion, contrast, generator, severity)
            means = contrast.means
            if scan is not None and modality == 'T1w':
                # The scan itself, with what lesions take out of its white matter.
                darker = contrast.lesion * severity * synth.blur(lesion, 0.5)
                image = torch.where(scan > 0, (scan + darker).clamp_min(0.02), image)
                means = np.where(np.isnan(person.means), means, person.means)
            elif scan is not None:
                # Sulci and texture that no label map has: fluid is dark in both modalities.
                fluid = ((0.55 - scan) / 0.35).clamp(0, 1) * (scan > 0)
                floor = float(contrast.means[synth.CSF])
                image = image + rng.uniform(0.3, 1) * fluid * (floor - image).clamp_max(0)
                grain = (scan - 1).clamp(-0.2, 0.2) * (kinds == synth.WHITE) * (lesion < 0.1)
                image = image - rng.uniform(-0.2, 0.5) * grain
            image = torch.where(kinds == synth.AIR, torch.zeros(()), image)
            level = synth.painted_level(means, counts)
            drawn = augment.draw_intensity(rng)
            image = augment.slices(augment.acquire(image, drawn, generator), dense)
            images[modality] = augment.standardise(image, *level, drawn)[None]
        return images


class Pairs(torch.utils.data.Dataset[Sample]):
    """Windows of real scans of all modalities, without labels: for the unlabelled risk.

    Parameters
    ----------
    paths
        Files with one normalised image `(X, Y, Z)` per modality, on the model's grid.
    window, seed, length
        Sample `i` depends on `(seed, i)` alone.
    """

    def __init__(
        self,
        paths: list[Path],
        *,
        seed: int,
        length: int,
        window: tuple[int, int, int] = Settings.thick_window,
    ) -> None:
        self.scans = [
            {name: torch.from_numpy(image).float() for name, image in np.load(path).items()}
            for path in paths
        ]
        self.window, self.seed, self.length = window, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Sample:
        """Return sample `number`; nothing of it is valid as a label."""
        rng = np.random.default_rng((self.seed, number))
        generator = Generator().manual_seed(int(rng.integers(2**62)))
        scan = self.scans[int(rng.integers(len(self.scans)))]
        shape = next(iter(scan.values())).shape
        size = [min(a, b) for a, b in zip(self.window, shape, strict=True)]
        start = [int(rng.integers(a - b + 1)) for a, b in zip(shape, size, strict=True)]
        part = tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))
        mirror = bool(rng.random() < 0.5)
        images = {}
        for name, image in scan.items():
            drawn = augment.draw_intensity(rng)
            window = image[part].flip(0) if mirror else image[part]
            noise = drawn.noise * torch.randn(window.shape, generator=generator)
            window = augment.standardise(window + noise, 0.0, 1.0, drawn)
            pad = [0] * 6
            for axis, (wanted, have) in enumerate(zip(self.window, size, strict=True)):
                pad[2 * (2 - axis) + 1] = wanted - have
            images[name] = torch.nn.functional.pad(window, pad, value=float(window.min()))[None]
        blank = torch.zeros(1, *self.window)
        return Sample(images, blank.expand(len(CLASSES), -1, -1, -1), blank)
