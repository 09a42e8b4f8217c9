"""How far the probabilities of a model are to be trusted, and how far its volumes.

    python benchmarks/calibration.py DATA OUT [--model NAME_OR_CARD] [--recipe NAME] [--write]

On the recipe's validation people, never on its test people:

- the temperature that makes the probabilities of real T1w (skull-stripped, manual labels) most
  likely, each scan counting once (Guo et al., ICML 2017), or those of painted heads if the recipe
  has no real ones, and the expected calibration error before and after: of the label of each voxel
  within the brain of these scans, and, in painted heads, of lesions within 8 mm of true ones;
- the repeatability, of thin slices (1 mm) and thick ones, of a T1w, a FLAIR and both: the real
  scans, also cut into slices of 4 mm, and the raw ones of `openms`, which nobody labelled and
  which are thick, are "acquired" three times, as other days would give them: in another position,
  with another contrast, calibration and noise, and a coil that changes with the position. Painted
  heads stand in for the kinds of scans of which there is no real one. Half of a volume's 95 %
  interval is `k` times the volume that the probabilities leave in doubt,
  `k = t rms(dV / sqrt(d1^2 + d2^2))` over the pairs of acquisitions that show any of it, with
  Student's t for as many degrees of freedom as there are visits among them, since these are few.
  Each kind of scans borrows four visits from the mean of all kinds. Visits and acquisitions that
  quality control does not pass are left out: of these the app warns. So are those whose two scans
  the app refuses to align. `held` says how many of the pairs lie within intervals that were fitted
  without their visit.

Writes OUT/calibration.json; `--write` also puts both results into the model's card. What is
measured of the visits as they are, and of all acquisitions, goes line by line to OUT/known-*.jsonl
and OUT/again-*.jsonl, named after the weights: a run that was cut off goes on. Other settings
need another OUT.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import INPUTS, Case, paint_heads, resliced, tissue_scans
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import t

from bids_jointseg import image, quality, registration
from bids_jointseg.augment import smooth_field
from bids_jointseg.bids import annotated_scans
from bids_jointseg.card import ModelCard, read_card
from bids_jointseg.image import Grid, Volume
from bids_jointseg.inference import combine, consensus
from bids_jointseg.interfaces import acquisition
from bids_jointseg.labels import CLASSES, PROTOCOLS, bits
from bids_jointseg.locator import predict_brain
from bids_jointseg.network import load_model
from bids_jointseg.recipe import Source, read_recipe

TEMPERATURES = np.round(np.arange(0.4, 2.45, 0.1), 1)
PAINTINGS = (0, 100, 200, 300)
"""Seeds: each validation head is painted so many times, as nothing but tissue and contrast."""
COIL, MOVED_COIL = 0.1, 0.02
"""SD of the logarithm of a painted head's coil, and of what changes where the head lies elsewhere:
`benchmarks/visits.py` measures that on real visits."""
TURNED_DEGREES, MOVED_MM, STRETCHED = 3.0, 4.0, 0.003
"""How far a head lies from the middle of its places at most, about and along each axis, and by
which share gradients stretch an axis at most. `benchmarks/visits.py` says how far two such places
lie apart, and how far two visits do."""
SLICE_MM = 4.0
DRAWS = 3
BORROWED = 4
"""Visits that each kind of scans borrows: about as many as the rarest kind has."""
Ratios = dict[str, dict[str, list[list[float]]]]
"""Acquisition -> label -> for each visit, what its pairs say."""
NAMES = (*CLASSES[1:], 'brain')


def scanned_again(scans: Mapping[str, Volume], *seed: int) -> dict[str, Volume]:
    """Return a visit's scans as another visit would give them.

    The head lies elsewhere in all of them, and so in the coil; noise and contrast are each scan's
    own. Gradients are calibrated to a few tenths of a per cent, so each axis is stretched, too.
    """
    rng = np.random.default_rng((7, *seed))
    move = draw_place(rng)
    middle = next(iter(scans.values())).grid.middle
    move[:3, 3] += middle - move[:3, :3] @ middle
    return {modality: _acquired(scan, move, rng) for modality, scan in scans.items()}


def draw_place(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return where a head lies (4, 4), mm: turned, stretched and moved."""
    angles = np.deg2rad(rng.uniform(-TURNED_DEGREES, TURNED_DEGREES, 3))
    shift = rng.uniform(-MOVED_MM, MOVED_MM, 3)
    move = np.eye(4)
    for axis, angle in enumerate(angles):
        i, j = (other for other in range(3) if other != axis)
        turn = np.eye(4)
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        move = move @ turn
    move[:3, :3] *= rng.uniform(1 - STRETCHED, 1 + STRETCHED, 3)
    move[:3, 3] = shift
    return move


def _acquired(scan: Volume, move: NDArray[np.float64], rng: np.random.Generator) -> Volume:
    """Return a scan of a moved head, with other noise, coil and contrast."""
    data = image.resample(scan, scan.grid, move)
    level = head_level(data)
    coil = draw_coil(data.shape, MOVED_COIL, rng)
    noise = rng.normal(0, 0.03 * level, (2, *data.shape))
    contrast = with_contrast(data, level, np.exp(rng.normal(0, 0.05)))
    again = np.hypot(contrast * coil + noise[0], noise[1])
    # Air that was zero stays so: brains without skull have been extracted.
    return Volume(np.where(data > 1e-3 * level, again, data).astype(np.float32), scan.grid)


def head_level(data: NDArray[np.float32]) -> float:
    """Return the median brightness of a head."""
    return float(np.median(data[data > image.foreground(data)]))


def with_contrast(data: NDArray[Any], level: float, exponent: float) -> NDArray[Any]:
    """Return a scan in which the brightness `level` stays, and all other is bent around it."""
    return np.asarray(np.maximum(data / level, 0) ** exponent * level)


def draw_coil(
    shape: tuple[int, ...], amount: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return what a coil multiplies a scan by."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return np.exp(np.float32(amount) * smooth_field(shape, 50, generator).numpy())


@dataclass(frozen=True)
class Visit:
    """Scans of one person, with their labels where there are any."""

    images: dict[str, Path]
    case: Case | None = None
    painted: bool = False
    sliced: bool = False

    @property
    def kind(self) -> str:
        """What a card calls its scans."""
        return acquisition(
            {
                name: SLICE_MM if self.sliced else image.load_grid(path).slice_mm
                for name, path in self.images.items()
            }
        )

    def scans(self, seed: tuple[int, int] | None) -> dict[str, Volume]:
        """Return the scans as they are (painted ones acquired where they lie), or again."""
        scans = {name: image.load_scan(path) for name, path in self.images.items()}
        rng = np.random.default_rng(7)
        if self.painted:
            scans = {
                name: Volume(scan.data * draw_coil(scan.data.shape, COIL, rng), scan.grid)
                for name, scan in scans.items()
            }
        if seed:
            scans = scanned_again(scans, *seed)
        elif self.painted:
            scans = {name: _acquired(scan, np.eye(4), rng) for name, scan in scans.items()}
        return resliced(scans, SLICE_MM) if self.sliced else scans


def visits_of(
    images: Mapping[str, Path], case: Case | None = None, *, painted: bool = False
) -> list[Visit]:
    """Return what can be asked of a person's scans: both, and each alone."""
    return [
        Visit({name: images[name] for name in inputs}, case, painted)
        for inputs in INPUTS
        if set(inputs) <= set(images)
    ]


def _painted(sources: Mapping[str, Source], data: Path, out: Path, seed: int) -> list[Case]:
    """Return the validation heads as one seed paints them."""
    heads = paint_heads(
        sources['heads'],
        sources['openms-mni'],
        data,
        'validation',
        out / f'heads{seed}',
        seed=seed,
        intact=True,
    )
    return list(heads.values())


Job = tuple[str, Visit, tuple[int, int] | None, float]
"""Model, visit, seed of an acquisition or None, and temperature."""


def measure(job: Job) -> dict[str, Any] | None:
    """Segment a visit as the app does, judge it, and compare it with its labels.

    A seed acquires it again; its labels are then elsewhere. None where it cannot be aligned.
    """
    model, visit, seed, temperature = job
    torch.set_num_threads(1)
    card = read_card(model)
    network = load_model(card)
    scans = visit.scans(seed)
    reference, *_ = scans.values()
    try:
        between = image.transforms(
            registration.register(scans['T1w'], scans['FLAIR']) if len(scans) > 1 else np.eye(4)
        )
    except image.ImageError as error:
        print(f'{", ".join(map(str, visit.images.values()))}, {seed}: {error}', flush=True)
        return None
    joint, agreement = segment(network, card, scans, between, temperature=temperature)
    slices = {modality: scan.grid.slice_mm for modality, scan in scans.items()}
    result: dict[str, Any] = {'acquisition': acquisition(slices)}
    labels = image.label_map(joint)
    result['doubt'] = image.doubt_mm3(joint, labels, reference.grid)
    result['verdict'], _ = quality.judge(
        quality.measure(
            scans,
            labels,
            between=between,
            doubt_mm3=result['doubt'],
            agreement=agreement,
        )
    )
    result['volumes'] = image.volumes_mm3(labels, reference.grid)
    result['volumes']['brain'] = sum(result['volumes'].values())
    if seed or not visit.case:
        return result
    # At other temperatures, this one being 1; the air around adds nothing at any.
    open_ = joint[0] < 0.99999
    known, near, lesion = (array[open_] for array in truth_of(visit.case, reference.grid))
    region = (known >= 0) & ((known > 0) | (joint[0][open_] < 0.99))
    flat = np.log(np.maximum(joint[:, open_], 1e-7))
    result['nll'], result['bins'] = [], []
    for other in TEMPERATURES:
        p = np.exp(flat / np.float32(other))
        p /= p.sum(axis=0)
        chosen = np.take_along_axis(p, np.maximum(known, 0)[None], axis=0)[0]
        result['nll'].append(float(-np.log(chosen[region]).mean()))
        top = p.argmax(axis=0)
        result['bins'].append(
            {
                'labels': _bins(p.max(axis=0)[region], (top == known)[region]),
                'lesions': _bins(p[CLASSES.index('L')][near], lesion[near]),
            }
        )
    return result


def measured(pool: Executor, jobs: Sequence[Job], path: Path) -> list[dict[str, Any] | None]:
    """Return what :func:`measure` says of each job; those of which a file tells are not repeated.

    Parameters
    ----------
    pool
        Does several at once.
    jobs
        What to measure.
    path
        A line of JSON for each job, in order; those that are missing are added.
    """
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    lines = [line for line in lines if line.endswith('\n')]
    found = [json.loads(line) for line in lines]
    with path.open('a') as file:
        file.truncate(sum(map(len, lines)))
        for result in pool.map(measure, jobs[len(found) :]):
            file.write(json.dumps(result) + '\n')
            file.flush()
            found.append(result)
            print(f'{path.name}: {len(found)} of {len(jobs)}', flush=True)
    return found


def segment(
    network: torch.nn.Module,
    card: ModelCard,
    scans: Mapping[str, Volume],
    between: Mapping[tuple[str, str], NDArray[np.float64]],
    *,
    temperature: float = 1.0,
    mirror: bool = True,
) -> tuple[NDArray[np.float32], float]:
    """Return the probabilities on the grid of the first scan, and how well the members agree."""
    passes, agreed = {}, []
    for look, (images, grid) in image.to_model_grids(
        scans, between, in_plane_mm=card.in_plane_mm, slice_mm=card.slice_mm
    ).items():
        members, part = predict_brain(
            network,
            {modality: image.normalise(data) for modality, data in images.items()},
            grid,
            window=card.window,
            mirror=mirror,
            device='cpu',
        )
        agreed.append(consensus(members))
        passes[look] = (image.keep_brain(combine(members, temperature), part), part)
    first, reference = next(iter(scans.items()))
    to = {look: between[first, look] for look in passes}
    return image.joint_probabilities(passes, reference.grid, to), min(agreed)


def truth_of(case: Case, grid: Grid) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the channel of each voxel (-1: not known), what lies near lesions, and lesions."""
    labels = image.load_labels(case.annotation)
    sets = PROTOCOLS[case.protocol].encode(labels.data.astype(np.int64))
    known = np.full(sets.shape, -1, np.int64)
    for channel, name in enumerate(CLASSES):
        known[sets == bits({name})] = channel
    lesion = known == CLASSES.index('L')
    near = np.zeros_like(lesion)
    if lesion.any():
        near = ndimage.distance_transform_edt(~lesion, sampling=grid.spacing_mm) <= 8
    return known, near & (known >= 0), lesion


def _bins(p: NDArray[Any], right: NDArray[Any], count: int = 10) -> list[list[float]]:
    """Return voxels, summed probability and hits of each bin of probability, `(3, count)`."""
    which = np.minimum((p * count).astype(int), count - 1)
    return [np.bincount(which, weights, count).tolist() for weights in (None, p, right)]


def _calibration_error(bins: Sequence[Sequence[float]]) -> float:
    """Return the mean over bins of the distance between how sure and how often right."""
    voxels, sure, hits = np.array(bins)
    return float(np.abs(sure - hits).sum() / voxels.sum()) if voxels.any() else float('nan')


def _diagram(bins: NDArray[np.float64]) -> list[dict[str, float]]:
    """Return the reliability diagram: how sure, how often right, and in how many voxels."""
    return [
        {
            'probability': round(sure / voxels, 3),
            'right': round(hits / voxels, 3),
            'voxels': int(voxels),
        }
        for voxels, sure, hits in bins.T
        if voxels
    ]


def factors(ratios: Ratios) -> dict[str, dict[str, float]]:
    """Return `k` of each kind of scans and label.

    A kind has few visits, so each borrows :data:`BORROWED` from all kinds: that many with their
    mean square.
    """
    squares = {
        kind: {
            name: [np.mean(np.square(pairs)) for pairs in visits]
            for name, visits in labels.items()
        }
        for kind, labels in ratios.items()
    }
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for kind, labels in squares.items():
        for name, own in labels.items():
            every = [square for of in squares.values() for square in of.get(name, ())]
            count = len(own) + BORROWED
            square = (sum(own) + BORROWED * np.mean(every)) / count
            found[kind][name] = round(float(t.ppf(0.975, count) * np.sqrt(square)), 4)
    return dict(found)


def held(ratios: Ratios) -> dict[str, list[int]]:
    """Return kind -> how many pairs lie in intervals fitted without their visit, and of how many.

    Lesions are left out: many visits have hardly any.
    """
    found = {}
    for kind, labels in ratios.items():
        inside = []
        for name in labels.keys() - {'L'}:
            visits = labels[name]
            for number, pairs in enumerate(visits):
                others = visits[:number] + visits[number + 1 :]
                k = factors(ratios | {kind: {name: others}})[kind][name]
                inside += [bool(abs(pair) < k) for pair in pairs]
        found[kind] = [sum(inside), len(inside)]
    return found


def fit_temperature(
    real: Sequence[Mapping[str, Any]], painted: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the temperature that makes labels most likely, and how far it calibrates.

    Takes what :func:`measure` says of real visits with labels, and of painted ones, which decide
    only where there are no others: the model errs more often in them, and would be called too sure
    of real ones. Lesions are known of painted ones alone.
    """
    decisive = real or painted
    likelihood = np.mean([r['nll'] for r in decisive], axis=0)
    bins = {
        'labels': [[one['labels'] for one in r['bins']] for r in decisive],
        'lesions': [[one['lesions'] for one in r['bins']] for r in painted],
    }
    best = int(likelihood.argmin())
    both = {'at 1': int(np.flatnonzero(TEMPERATURES == 1)[0]), 'calibrated': best}
    return {
        'temperature': float(TEMPERATURES[best]),
        'negative log-likelihood': {
            name: round(float(likelihood[number]), 4) for name, number in both.items()
        },
        'expected calibration error': {
            what: {
                name: round(float(np.nanmean([_calibration_error(one[n]) for one in found])), 4)
                for name, n in both.items()
            }
            for what, found in bins.items()
        },
        'reliability diagram': {
            what: _diagram(sum(np.array(one[best]) for one in found))
            for what, found in bins.items()
        },
    }


def fit_repeatability(again: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Return `k` of each kind of scans and label, how many pairs it holds, and the pairs.

    Takes what :func:`measure` says of :data:`DRAWS` acquisitions of each visit, one visit after
    the other.
    """
    ratios: Ratios = defaultdict(lambda: defaultdict(list))
    for first in range(0, len(again), DRAWS):
        every = again[first : first + DRAWS]
        drawn = [r for r in every if r and r['verdict'] == 'pass']
        for name in NAMES:
            pairs = [
                (a['volumes'][name] - b['volumes'][name])
                / np.hypot(*(r['doubt'][name] for r in (a, b)))
                for a, b in combinations(drawn, 2)
                if a['volumes'][name] + b['volumes'][name] > 0
            ]
            if pairs:
                ratios[drawn[0]['acquisition']][name].append(pairs)
    return {'repeatability': factors(ratios), 'held': held(ratios), 'pairs': ratios}


def main() -> None:
    """Calibrate a model."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--model', default='jointseg')
    parser.add_argument('--recipe', default='jointseg', help='whose data may be looked at')
    parser.add_argument('--nprocs', type=int, default=2)
    parser.add_argument('--write', action='store_true', help='into the card')
    options = parser.parse_args()
    card = read_card(options.model)
    sources = {source.name: source for source in read_recipe(options.recipe).datasets}
    real: list[Visit] = []
    if 'neuromorphometrics' in sources:
        cases = tissue_scans(sources['neuromorphometrics'], options.data, 'validation')
        real = [visit for case in cases.values() for visit in visits_of(case.images, case)]
    pool = ProcessPoolExecutor(options.nprocs, get_context('spawn'))
    painted = [
        visit
        for heads in pool.map(partial(_painted, sources, options.data, options.out), PAINTINGS)
        for case in heads
        for visit in visits_of(case.images, case, painted=True)
    ]
    raw = annotated_scans(sources['openms'], options.data / sources['openms'].root)
    clinical = [
        visit
        for item in raw
        for visit in visits_of({'T1w': item.scan.t1w, 'FLAIR': item.scan.flair})
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    weights = f'{card.sha256[:8]}.jsonl'
    told = [*real, *painted]
    jobs: list[Job] = [(options.model, visit, None, 1.0) for visit in told]
    found = measured(pool, jobs, options.out / f'known-{weights}')
    parts = found[: len(real)], found[len(real) :]
    likeliest = fit_temperature(*([r for r in part if r] for part in parts))
    sound = [v for v, r in zip(told, found, strict=True) if r and r['verdict'] == 'pass']
    print(f'{len(sound)} of {len(told)} visits pass quality control', flush=True)
    sound += [replace(visit, sliced=True) for visit in sound]
    visits = [*(visit for visit in sound if not visit.painted), *clinical]
    known = {visit.kind for visit in visits}
    visits += [visit for visit in sound if visit.kind not in known]
    jobs = [
        (options.model, visit, (number, draw), likeliest['temperature'])
        for number, visit in enumerate(visits)
        for draw in range(DRAWS)
    ]
    again = measured(pool, jobs, options.out / f'again-{weights}')
    pool.shutdown()

    record = (
        {'command': 'python benchmarks/calibration.py DATA OUT', 'weights': card.sha256}
        | likeliest
        | fit_repeatability(again)
    )
    text = json.dumps(record, indent=2) + '\n'
    (options.out / 'calibration.json').write_text(text)
    print(text)
    if options.write and card.path is not None:
        content = json.loads(card.path.read_text(encoding='utf-8'))
        del record['pairs']
        content |= {name: record[name] for name in ('temperature', 'repeatability')}
        content['accuracy']['calibration'] = record
        card.path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n')


if __name__ == '__main__':
    main()
