"""Training samples: windows drawn from cached people, painted where no scan exists.

A sample depends on its number and the seed alone, so it is the same with any number of workers,
and the same after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from bids_jointseg import augment, synth
from bids_jointseg.cache import Person, painted_person
from bids_jointseg.image import Grid, Volume
from bids_jointseg.labels import ALL, CLASSES, INDICES, bits, tells_tissue
from bids_jointseg.recipe import SampleSettings, Source, are_cubes

LESION = bits({'L'})
BACKGROUND = bits({'BG'})
# First and last voxel of the cerebrum in the 1 mm MNI152 space of the masks, whose canonical
# grid is 182 x 218 x 182: measured on nilearn's ICBM152 brain mask, without the brainstem.
MNI_CEREBRUM = np.array([[19.0, 19.0, 28.0], [163.0, 199.0, 154.0]])
MARGIN = 8.0
"""Voxels around the brain that a window over it may show, where it need not show more."""


@dataclass(frozen=True)
class Sample:
    """One training example, or a batch of them.

    Attributes
    ----------
    images
        Modality -> normalised window `(1, X, Y, Z)`.
    target
        Share of each group, `(G, X, Y, Z)`.
    valid
        1 where the annotation tells that share, `(G, X, Y, Z)` or `(1, X, Y, Z)`.
    groups
        What the annotation tells apart.
    again
        The same window as another scanner would give it, of the keys and shapes of `images`, or
        nothing.
    """

    images: dict[str, Tensor]
    target: Tensor
    valid: Tensor
    groups: tuple[frozenset[str], ...]
    again: dict[str, Tensor] = field(default_factory=dict)


def collate(samples: Sequence[Sample]) -> Sample:
    """Return a batch: every tensor of :class:`Sample` gets a first axis."""
    first = samples[0]
    return Sample(
        {name: torch.stack([s.images[name] for s in samples]) for name in first.images},
        torch.stack([s.target for s in samples]),
        torch.stack([s.valid for s in samples]),
        first.groups,
        {name: torch.stack([s.again[name] for s in samples]) for name in first.again},
    )


@dataclass(frozen=True)
class Cohort:
    """The cached people of one dataset of a recipe."""

    source: Source
    people: tuple[Person, ...]

    @cached_property
    def groups(self) -> tuple[frozenset[str], ...]:
        """What the annotation tells apart."""
        return self.source.labels.atoms() if self.source.labels else (ALL,)

    @cached_property
    def exact(self) -> bool:
        """Whether each label is one group, or says nothing."""
        labels = self.source.labels
        if labels is None:
            return True
        return not self.source.loose_edges and set(labels.sets.values()) <= {*self.groups, ALL}

    @cached_property
    def tells_tissue(self) -> bool:
        """Whether the annotation tells tissues apart."""
        return tells_tissue(self.groups)

    @property
    def weight(self) -> float:
        """Weight among the datasets of a stream."""
        return len(self.people) if self.source.share is None else self.source.share


@dataclass(frozen=True)
class _Plan:
    """What the samples of one iteration have in common, so that they are one batch."""

    cohort: Cohort
    people: tuple[Person, ...]
    modalities: tuple[str, ...]
    count: int
    window: tuple[int, int, int]


class Windows(torch.utils.data.Dataset[Sample]):
    """Windows of the people of some datasets.

    Parameters
    ----------
    cohorts
        Datasets of one stream.
    heads
        Painted whole heads, from which skull-stripped people borrow theirs.
    masks
        Lesion masks from :func:`read_mask`.
    settings
        See there.
    in_plane_mm, slice_mm
        Voxel size within a slice, and slice distances, that the model is for.
    again
        Whether each sample is acquired twice.
    seed, batch, length
        Sample `i` depends on `(seed, i)`; what `batch` neighbours have in common on
        `(seed, i // batch)`.
    """

    def __init__(
        self,
        cohorts: Sequence[Cohort],
        *,
        heads: Sequence[Person] = (),
        masks: Sequence[Tensor] = (),
        settings: SampleSettings,
        in_plane_mm: float = 1.0,
        slice_mm: tuple[float, float] = (1.0, 6.0),
        again: bool = False,
        seed: int,
        batch: int = 1,
        length: int,
    ) -> None:
        self.cohorts = tuple(cohort for cohort in cohorts if cohort.people)
        self.heads, self.masks = tuple(heads), tuple(masks)
        self.settings, self.again = settings, again
        self.in_plane_mm, self.slice_mm = in_plane_mm, slice_mm
        self.seed, self.batch, self.length = seed, batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Sample:
        """Return sample `number`."""
        iteration = number // self.batch
        coarse = self.settings.augment and iteration < self.settings.coarse_steps
        plan = self._plan(np.random.default_rng((self.seed, 0, iteration)), coarse=coarse)
        rng = np.random.default_rng((self.seed, 1, number))
        generator = Generator().manual_seed(int(rng.integers(2**62)))
        person = plan.people[int(rng.integers(len(plan.people)))]
        if not self.settings.augment and person.kinds is None:
            return self._cut(person, plan, rng)
        s = self.settings
        # Of a window's voxels in those of the person: what is painted lies on a grid of 1 mm.
        spread = round(self.in_plane_mm / person.spacing_mm[0], 2) * (2 if coarse else 1)
        intact = bool(person.images) and rng.random() < s.intact_share
        # Slices of a scan that has thick ones are kept; of an isotropic one they are made, with
        # up to three points across a slice to show its partial volume.
        count = plan.count if person.isotropic else 1
        dense = min(count, 3)
        fine = (*plan.window[:2], plan.window[2] * dense)
        slicing = str(rng.choice(list(augment.AXES), p=[0.8, 0.1, 0.1]))
        painted = bool(plan.cohort.source.painted) and plan.cohort.source.lesions
        with_lesions = painted and rng.random() < s.lesion_share
        mask = self.masks[rng.integers(len(self.masks))] if self.masks else None
        jitter = self._lesion_jitter(rng)
        low, high = person.box
        lesions = person.lesions
        if rng.random() < s.outside_share:
            # Face and neck: a window may hold no brain at all.
            below = (20, 20, min(110, float(low[2])))
            centre = rng.uniform(low - below, high + np.array((20, 40, 0)))
        elif with_lesions and mask is not None and rng.random() < s.lesion_centre:
            found = mask.nonzero()
            pick = found[int(rng.integers(len(found)))].numpy().astype(float)
            inverse = np.linalg.inv(self._to_lesions(person.box, jitter))
            centre = inverse[:3, :3] @ pick + inverse[:3, 3]
            centre = centre + rng.uniform(-s.dilate_mm, s.dilate_mm, 3) / person.spacing_mm
        elif len(lesions) and rng.random() < s.lesion_centre:
            pick = lesions[int(rng.integers(len(lesions)))].numpy().astype(float)
            centre = pick + rng.uniform(-s.dilate_mm, s.dilate_mm, 3) / person.spacing_mm
        else:
            # As inference places it: over the brain, of which it shows as much as it can. The
            # box of the cerebrum ends above the cerebellum.
            under = 0.0 if person.kinds is None else 40 / person.spacing_mm[2]
            size = np.array((*plan.window[:2], plan.window[2] * count), dtype=float)
            size = size * spread
            half = np.empty(3)
            half[list(augment.AXES[slicing] if person.isotropic else (0, 1, 2))] = size / 2
            ends = np.sort([low - [0, 0, under] - MARGIN + half, high + MARGIN - half], axis=0)
            centre = rng.uniform(*ends)
        if person.isotropic:
            geometry = augment.draw_geometry(
                rng, fine, slicing, centre, count / dense, upright=intact
            )
        else:
            geometry = augment.within_slices(
                augment.draw_geometry(rng, fine, 'axial', centre, 1.0, upright=intact)
            )
        if spread != 1:
            geometry = augment.coarser(geometry, spread, slices=person.isotropic)
        points = augment.coordinates(geometry, generator)
        if not person.isotropic:
            # A bend stays within the slices, too: none is left out, and none is there twice.
            first = points[:, :, 0, 2].mean().round()
            step = float(geometry.matrix[2, 2])
            points[..., 2] = first + step * torch.arange(points.shape[2])
        shown = mask if with_lesions else None
        return self.compose(
            person,
            plan.cohort,
            plan.modalities,
            points,
            dense,
            shown,
            jitter,
            rng,
            generator,
            contrast_spread=s.contrast_spread * min(1, (iteration + 1) / max(1, s.contrast_steps)),
            intact=intact,
        )

    def _plan(self, rng: np.random.Generator, *, coarse: bool) -> _Plan:
        s = self.settings
        weights = np.array([cohort.weight for cohort in self.cohorts])
        cohort = self.cohorts[int(rng.choice(len(self.cohorts), p=weights / weights.sum()))]
        painted = set(cohort.source.painted)
        person = cohort.people[int(rng.integers(len(cohort.people)))]
        available = {*person.images, *painted}
        if cohort.tells_tissue:
            choice = [(names, w) for names, w in s.modalities if available.issuperset(names)]
            choice = choice or [(tuple(sorted(available)), 1.0)]
            share = np.array([w for _, w in choice])
            names = choice[int(rng.choice(len(choice), p=share / share.sum()))][0]
        else:
            # Its tissue is learned from the agreement between all of them and some.
            names = tuple(sorted(available))
        people = tuple(p for p in cohort.people if {*p.images, *painted}.issuperset(names))
        if coarse:
            return _Plan(cohort, people, names, 1, s.coarse_window)
        lowest, highest = (max(1, round(mm)) for mm in self.slice_mm)
        cubes = are_cubes(self.in_plane_mm, self.slice_mm)
        thin = cubes or (lowest < 2 and rng.random() < s.thin_share)
        if thin:
            return _Plan(cohort, people, names, 1, s.thin_window if s.augment else s.window)
        millimetres = int(rng.integers(max(2, lowest), highest + 1))
        # The thicker the slices, the fewer cover a head.
        most = max(16, 8 * round(130 / 8 / millimetres)) if s.augment else s.window[2]
        window = (*s.window[:2], min(s.window[2], most))
        return _Plan(cohort, people, names, max(1, round(millimetres / self.in_plane_mm)), window)

    def _cut(self, person: Person, plan: _Plan, rng: np.random.Generator) -> Sample:
        """Return a window of a scan as it is; what lies outside of the scan is air."""
        s = self.settings
        window, shape = np.array(plan.window), np.array(person.sets.shape)
        lesions = person.lesions
        if len(lesions) and rng.random() < s.lesion_centre:
            pick = lesions[int(rng.integers(len(lesions)))].numpy()
            pick = pick + rng.uniform(-s.dilate_mm, s.dilate_mm, 3) / person.spacing_mm
            start = np.round(pick - window / 2).astype(int)
        else:
            start = rng.integers(np.minimum(shape - window, 0), np.maximum(shape - window, 0) + 1)
        start = np.clip(start, np.minimum(shape - window, 0), np.maximum(shape - window, 0))
        low, high = np.maximum(start, 0), np.minimum(start + window, shape)
        source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        there = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))

        def cut(volume: Tensor, empty: float) -> Tensor:
            result = torch.full(tuple(window.tolist()), empty, dtype=volume.dtype)
            result[there] = volume[source]
            return result

        images = {}
        for modality in plan.modalities:
            mean, std = person.levels[modality]
            images[modality] = ((cut(person.images[modality], 0).float() - mean) / std)[None]
        sets = cut(person.sets, BACKGROUND)
        return Sample(images, *shares(sets, plan.cohort, 1), plan.cohort.groups)

    def compose(
        self,
        person: Person,
        cohort: Cohort,
        modalities: Sequence[str],
        points: Tensor,
        dense: int,
        mask: Tensor | None,
        jitter: np.ndarray,
        rng: np.random.Generator,
        generator: Generator,
        *,
        contrast_spread: float = 1.0,
        intact: bool = False,
    ) -> Sample:
        """Return the images and the target of one window.

        Parameters
        ----------
        person, cohort
            Whose head it is, and of which dataset.
        modalities
            That are wanted.
        points
            Voxel of the person for each point of the window, `(X, Y, Z * dense, 3)`.
        dense
            Points across a slice.
        mask, jitter
            A patient's lesions, or None, and the affine change of them.
        rng, generator
            Sources of all draws.
        contrast_spread
            See :class:`SampleSettings`.
        intact
            Nothing degrades a scan; what is painted beside it is acquired as ever.
        """
        # Outside of the volume there is air, and the warp says 0.
        sets = augment.warp(person.sets, points, 'nearest').to(torch.uint8)
        sets = torch.where(sets == 0, BACKGROUND, sets)
        lesion = (sets == LESION).float()
        kinds = None
        if person.kinds is not None:
            kinds = augment.warp(person.kinds, points, 'nearest').to(torch.uint8)
            white = (kinds == synth.WHITE).float()
            if mask is not None:
                matrix = torch.as_tensor(self._to_lesions(person.box, jitter), dtype=torch.float32)
                placed = augment.warp(mask, points @ matrix[:3, :3].T + matrix[:3, 3])
                lesion = torch.maximum(lesion, placed * white)
                if rng.random() < 0.35:
                    near = synth.blur((kinds == synth.VENTRICLE).float(), 4.0)
                    grown = synth.grow_lesions(white, near, generator, rng)
                    lesion = torch.maximum(lesion, grown)
            sets = torch.where((lesion > 0.5) & (kinds == synth.WHITE), LESION, sets)
        images, again, seen = self._images(
            person,
            modalities,
            kinds,
            points,
            lesion,
            dense,
            rng,
            generator,
            contrast_spread=contrast_spread,
            intact=intact,
        )
        target, valid = shares(sets, cohort, dense)
        return Sample(images, target, valid * seen, cohort.groups, again)

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
        if person.images and self.heads and rng.random() < s.borrow_share:
            head = self.heads[int(rng.integers(len(self.heads)))]
            assert head.kinds is not None  # noqa: S101
            scale = (head.box[1] - head.box[0]) / (person.box[1] - person.box[0])
            shift = torch.as_tensor(head.box[0] - scale * person.box[0], dtype=torch.float32)
            there = points * torch.as_tensor(scale, dtype=torch.float32) + shift
            around = augment.warp(head.kinds, there, 'nearest').to(torch.uint8)
            around = torch.where(torch.isin(around, brain), synth.CSF, around)
            outside = {k: n for k, n in head.counts.items() if k not in synth.BRAIN}
            return torch.where(kinds == synth.AIR, around, kinds), outside | {
                k: n + outside.get(k, 0) for k, n in person.counts.items()
            }
        if not person.images and rng.random() < s.strip_share:
            inside = torch.isin(kinds, brain).float()
            kept = synth.blur(inside, rng.uniform(0.8, 2.5)) > rng.uniform(0.15, 0.6)
            return torch.where(kept, kinds, synth.AIR), {
                k: n for k, n in person.counts.items() if k in synth.BRAIN
            }
        return kinds, person.counts

    def _images(
        self,
        person: Person,
        modalities: Sequence[str],
        kinds: Tensor | None,
        points: Tensor,
        lesion: Tensor,
        dense: int,
        rng: np.random.Generator,
        generator: Generator,
        *,
        contrast_spread: float,
        intact: bool,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Paint, or take from the scan, each modality of a window.

        Returns
        -------
        tuple[dict[str, Tensor], dict[str, Tensor], Tensor]
            Modality -> `(1, X, Y, Z)`, the same acquired again, if it is, and which voxels any
            of them shows, `(X, Y, Z)`.
        """
        scans = {name: augment.warp(person.images[name], points) for name in person.images}
        counts: dict[int, int] = {}
        if kinds is not None:
            kinds, counts = self._surround(person, kinds, points, rng)
            shown = synth.add_distractors(kinds, rng, generator)
            severity = (0.25 * synth.smooth_field(tuple(kinds.shape), 10, generator)).exp()
        images, views, scanners = {}, [], {}
        for modality in modalities:
            scan = scans.get(modality)
            drawn = augment.draw_intensity(rng, self.settings.coil)
            if intact and (scan is not None or not scans):
                drawn = augment.undisturbed(drawn)
            if kinds is None:
                image = scans[modality]
                level = partial(augment.level_after, *person.levels[modality])
            else:
                contrast = synth.draw_contrast(modality, rng, spread=contrast_spread)
                image = synth.paint(shown, lesion, contrast, generator, severity)
                means = contrast.means
                if scan is not None:
                    # The scan itself, with what lesions add to its white matter.
                    change = contrast.lesion * severity * synth.blur(lesion, 0.5)
                    foreign = synth.blur((shown != kinds).float(), 0.6)
                    own = (scan + change).clamp_min(0.02).lerp(image, foreign)
                    image = torch.where(scan > 0, own, image)
                    medians = person.means[modality]
                    means = np.where(np.isnan(medians), means, medians)
                elif 'T1w' in scans:
                    # Sulci and texture that no label map has: fluid is dark in both modalities.
                    seen = scans['T1w']
                    fluid = ((0.55 - seen) / 0.35).clamp(0, 1) * (seen > 0)
                    floor = float(contrast.means[synth.CSF])
                    image = image + rng.uniform(0.3, 1) * fluid * (floor - image).clamp_max(0)
                    grain = (seen - 1).clamp(-0.2, 0.2) * (kinds == synth.WHITE) * (lesion < 0.1)
                    image = image - rng.uniform(-0.2, 0.5) * grain
                image = torch.where(kinds == synth.AIR, torch.zeros(()), image)
                level = partial(synth.painted_level, means, counts)
            shape = (*image.shape[:2], image.shape[2] // dense)
            view = augment.draw_view(rng, shape, self.settings.view_share)
            acquire = partial(_acquired, image, dense, view, level, generator)
            images[modality], inside = acquire(drawn)
            views.append(inside)
            if self.again:
                scanners[modality] = (drawn, acquire)
        # In the end, so that the first acquisitions are the same with or without a second.
        again = {
            modality: acquire(augment.drawn_again(drawn, rng))[0]
            for modality, (drawn, acquire) in scanners.items()
        }
        return images, again, torch.stack(views).any(0).float()


def _acquired(
    image: Tensor,
    dense: int,
    view: augment.View,
    level: Callable[[float], tuple[float, float]],
    generator: Generator,
    drawn: augment.Intensity,
) -> tuple[Tensor, Tensor]:
    """Return what a scanner gives of a window, `(1, X, Y, Z)`, and what of it is seen.

    Parameters
    ----------
    image
        In units of white matter, `(X, Y, Z * dense)`.
    dense
        Points across a slice.
    view
        Of the scan.
    level
        Exponent of the contrast -> mean and SD of the scan.
    generator
        Of the noise and the coil.
    drawn
        The acquisition.
    """
    seen, inside = augment.limit_view(
        augment.slices(augment.acquire(image, drawn, generator), dense), view
    )
    return augment.standardise(seen, *level(drawn.gamma), drawn)[None], inside


def shares(sets: Tensor, cohort: Cohort, dense: int) -> tuple[Tensor, Tensor]:
    """Return the share of each group and where it is known, from the sets of a window.

    Parameters
    ----------
    sets
        `(X, Y, Z * dense)`.
    cohort
        Whose groups these are.
    dense
        Points across a slice.

    Returns
    -------
    tuple[Tensor, Tensor]
        Target `(G, X, Y, Z)` and valid `(G, X, Y, Z)`, or `(1, X, Y, Z)` where all groups are
        known at the same voxels.
    """
    values = torch.arange(256)
    groups = [bits(group) for group in cohort.groups]
    within = torch.stack([(values & ~group) == 0 for group in groups])
    open_ = torch.stack([(values & group) != 0 for group in groups]) & ~within
    index = sets.long()
    if cohort.exact:
        valid = augment.slices((~open_.any(0))[index].float(), dense)[None]
    else:
        valid = torch.stack([augment.slices((~row)[index].float(), dense) for row in open_])
    target = torch.stack([augment.slices(row[index].float(), dense) for row in within])
    return target / valid.clamp_min(1e-3), (valid > 0.5).float()


def whole(person: Person) -> Tensor:
    """Return the points of a window that shows all of a person, `(X, Y, Z, 3)`."""
    axes = [torch.arange(size, dtype=torch.float32) for size in person.sets.shape]
    return torch.stack(torch.meshgrid(*axes, indexing='ij'), -1)


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the subsets of some modalities that are neither empty nor all of them."""
    choices = product((False, True), repeat=len(names))
    found = [tuple(n for n, c in zip(sorted(names), row, strict=True) if c) for row in choices]
    return [names_ for names_ in found if 0 < len(names_) < len(names)]


def paint_head(
    labels: Volume,
    protocol: str,
    masks: Sequence[Tensor],
    *,
    seed: int,
    slice_mm: int = 1,
    contrast_spread: float = 1.0,
    intact: bool = False,
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.uint8], Grid]:
    """Paint a T1w and a FLAIR of a whole head, with the lesions of one mask, if there are any.

    Parameters
    ----------
    labels
        Whole-head label map.
    protocol
        What its labels are.
    masks
        From :func:`read_mask`.
    seed
        Of everything that is drawn.
    slice_mm
        Thickness of the slices.
    contrast_spread
        See :class:`SampleSettings`.
    intact
        Without noise, coil and blur.

    Returns
    -------
    tuple[dict[str, NDArray], NDArray[np.uint8], Grid]
        Modality -> image `(X, Y, Z)`, 0 where it is darkest, in standard deviations of the head;
        what is painted, in the numbers of the protocol `jointseg`, 255 where nothing is known;
        their grid.
    """
    person, grid = painted_person(labels, protocol)
    source = Source('painted', painted=('T1w', 'FLAIR'), annotation='.', protocol=protocol)
    cohort = Cohort(source, (person,))
    settings = SampleSettings(strip_share=0.0, view_share=0.0)
    windows = Windows([cohort], settings=settings, seed=seed, length=1)
    rng = np.random.default_rng((2019, seed))
    generator = Generator().manual_seed(int(rng.integers(2**62)))
    mask = masks[seed % len(masks)] if masks else None
    points = whole(person)
    points = points[:, :, : points.shape[2] // slice_mm * slice_mm]
    sample = windows.compose(
        person,
        cohort,
        source.painted,
        points,
        slice_mm,
        mask,
        np.eye(4),
        rng,
        generator,
        contrast_spread=contrast_spread,
        intact=intact,
    )
    images = {
        modality: (image[0] - image.min()).numpy() for modality, image in sample.images.items()
    }
    single = torch.tensor([CLASSES.index(min(group)) for group in cohort.groups])
    found = INDICES[single[sample.target.argmax(0)].numpy()]
    found = np.where(sample.valid[0].numpy() > 0, found, 255).astype(np.uint8)
    thick = np.diag([1.0, 1.0, slice_mm, 1.0])
    thick[2, 3] = (slice_mm - 1) / 2
    return images, found, Grid(found.shape, grid.affine @ thick)
