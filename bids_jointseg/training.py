"""The training loop: cached people in, a model file out.

Each iteration draws one sample of a control with its own T1w and one of a painted head, and adds
the unlabelled term of the risk on pairs of real T1w and FLAIR (:mod:`bids_jointseg.losses`).

A checkpoint appears whole or not at all and holds everything; a killed run goes on from it.
"""

from __future__ import annotations

import csv
import logging
import os
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bids_jointseg.card import ModelCard, read_card
from bids_jointseg.inference import choose_device, probabilities
from bids_jointseg.labels import CLASSES, TISSUES
from bids_jointseg.losses import consistency_risk, supervised_risk
from bids_jointseg.network import build, load_model, save_model
from bids_jointseg.recipe import Recipe, tuples
from bids_jointseg.sampling import (
    Pairs,
    Person,
    Sample,
    Windows,
    read_lesions,
    read_person,
    write_lesions,
)
from bids_jointseg.sampling import Settings as SampleSettings

LOGGER = logging.getLogger('bids_jointseg')
GROUPS = tuple(frozenset({name}) for name in CLASSES)
LESION = CLASSES.index('L')


@dataclass(frozen=True)
class Settings:
    """What a recipe says about the optimisation.

    Attributes
    ----------
    architecture
        See :class:`bids_jointseg.card.ModelCard`.
    steps
        Iterations; the learning rate falls to zero over them (polynomial, power 0.9).
    rate, decay
        Of AdamW.
    consistency_from, consistency_every
        Warm-up of the unlabelled term, and the iterations between two of them.
    average
        Decay of the moving average of the weights, which is what is exported.
    seed
        Of weights and samples.
    init
        Name or card of a model to start from, or '' to start from random weights.
    """

    architecture: dict[str, Any]
    steps: int = 5000
    rate: float = 3e-3
    decay: float = 1e-4
    consistency_from: int = 800
    consistency_every: int = 8
    average: float = 0.997
    seed: int = 2019
    init: str = ''
    save_every: int = 100


def run(
    settings: Settings,
    labelled: Sequence[Dataset[Sample]],
    unlabelled: Dataset[Sample] | None,
    held_out: Sequence[Sample],
    folder: Path,
    *,
    device: str = 'cpu',
    workers: int = 1,
    seconds: float = float('inf'),
) -> nn.Module:
    """Train, or go on training, and return the averaged network.

    Parameters
    ----------
    settings
        See there.
    labelled
        Datasets that each give one sample to every iteration.
    unlabelled
        Pairs of modalities without labels, or None.
    held_out
        Samples of people who are in none of the others: the curve's validation score.
    folder
        Where checkpoint and log are.
    device
        Of PyTorch.
    workers
        Processes that draw samples.
    seconds
        Stop, resumable, after this time.
    """
    torch.manual_seed(settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    network = build(settings.architecture)
    if settings.init:
        network.load_state_dict(load_model(read_card(settings.init)).state_dict())
    network = network.to(device)
    average = deepcopy(network).requires_grad_(False)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=settings.rate, weight_decay=settings.decay
    )
    first = 0
    checkpoint = folder / 'checkpoint.pt'
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(state['network'])
        average.load_state_dict(state['average'])
        optimiser.load_state_dict(state['optimiser'])
        first = int(state['step'])
        LOGGER.info('%s: going on from step %d', checkpoint, first)
    streams = [_stream(data, first, settings.steps, workers) for data in labelled]
    pairs = None
    if unlabelled is not None:
        done = -(-max(0, first - settings.consistency_from) // settings.consistency_every)
        pairs = _stream(unlabelled, done, settings.steps, workers)
    started, recent = time.monotonic(), []
    for step in range(first, settings.steps):
        network.train()
        for group in optimiser.param_groups:
            group['lr'] = settings.rate * _schedule(step, settings.steps)
        values = []
        for stream in streams:
            sample = _to(next(stream), device)
            loss = supervised_risk(
                probabilities(network, sample.images), sample.target, GROUPS, sample.valid
            )
            loss.backward()
            values.append(float(loss.detach()))
        turn, rest = divmod(step - settings.consistency_from, settings.consistency_every)
        if pairs is not None and turn >= 0 and rest == 0:
            loss = _agreement(network, _to(next(pairs), device), turn)
            loss.backward()
            values.append(float(loss.detach()))
        else:
            values.append(float('nan'))
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        _follow(average, network, min(settings.average, (1 + step) / (10 + step)))
        recent.append(values)
        stop = time.monotonic() - started > seconds
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps or stop:
            _save(
                checkpoint,
                {
                    'network': network.state_dict(),
                    'average': average.state_dict(),
                    'optimiser': optimiser.state_dict(),
                    'step': step + 1,
                },
            )
            _log(folder / 'curve.csv', step + 1, recent, score(average, held_out), started, first)
            recent = []
        if stop:
            break
    return average.eval()


def _stream(data: Dataset[Sample], start: int, stop: int, workers: int) -> Any:
    """Return an iterator over samples `start` to `stop`, drawn by worker processes."""
    loader = DataLoader(
        data,
        batch_size=1,
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_collate,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread,
        multiprocessing_context='forkserver' if workers else None,
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    os.nice(2)


def _collate(samples: list[Sample]) -> Sample:
    """Return the only sample of a batch with a batch axis."""
    (sample,) = samples
    return Sample(
        {name: image[None] for name, image in sample.images.items()},
        sample.target[None],
        sample.valid[None],
    )


def _to(sample: Sample, device: str) -> Sample:
    return Sample(
        {
            name: image.to(device, memory_format=torch.channels_last_3d)
            for name, image in sample.images.items()
        },
        sample.target.to(device),
        sample.valid.to(device),
    )


def _agreement(network: nn.Module, sample: Sample, turn: int) -> Tensor:
    """Return the unlabelled term between all modalities and one of them, by turns."""
    names = sorted(sample.images)
    everything = probabilities(network, sample.images)
    one = names[turn % len(names)]
    some = probabilities(network, {one: sample.images[one]})
    believed = (everything[:, LESION : LESION + 1] > 0.3).float()
    return consistency_risk(everything, some, believed)


def _schedule(step: int, steps: int) -> float:
    """Return the factor on the learning rate: a short warm-up, then polynomial decay."""
    return min(1.0, (step + 1) / 100) * (1 - step / steps) ** 0.9


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the current ones; statistics are copied."""
    for mean, value in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for kept, current in zip(average.buffers(), network.buffers(), strict=True):
        kept.copy_(current)


@torch.no_grad()
def score(network: nn.Module, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the Dice of each class over all held-out windows together, in per cent."""
    network.eval()
    both, sizes = np.zeros(len(CLASSES)), np.zeros(len(CLASSES))
    device = str(next(network.parameters()).device)
    for sample in samples:
        sample = _to(_collate([sample]), device)
        found = probabilities(network, sample.images).argmax(1)
        truth = sample.target.argmax(1)
        known = sample.valid[:, 0] > 0
        for channel in range(len(CLASSES)):
            a, b = (found == channel) & known, (truth == channel) & known
            both[channel] += float((a & b).sum())
            sizes[channel] += float(a.sum() + b.sum())
    dice = 200 * both / np.maximum(sizes, 1)
    return dict(zip(CLASSES, dice.round(2).tolist(), strict=True))


def _save(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix('.tmp')
    torch.save(state, temporary)
    temporary.replace(path)


def _log(
    path: Path,
    step: int,
    recent: list[list[float]],
    dice: dict[str, float],
    started: float,
    first: int,
) -> None:
    """Add a line to the curve and show it."""
    rate = (time.monotonic() - started) / max(1, step - first)
    row = {
        'step': step,
        'seconds_per_step': round(rate, 3),
        **{f'loss_{i}': round(float(value), 4) for i, value in enumerate(_means(recent))},
        **dice,
    }
    new = not path.is_file()
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    tissue = np.mean([dice[name] for name in TISSUES])
    LOGGER.info(
        'step %d, %.2f s each: loss %s, tissue %.1f, lesion %.1f',
        step, rate, ' '.join(f'{value:.3f}' for value in _means(recent)), tissue, dice['L'],
    )  # fmt: skip


def _means(recent: list[list[float]]) -> list[float]:
    columns = np.array(recent, dtype=float).T
    return [float(np.nanmean(c)) if np.isfinite(c).any() else float('nan') for c in columns]


def train_recipe(
    recipe: Recipe,
    *,
    people: Sequence[Path],
    pairs: Sequence[Path],
    lesions: Mapping[str, Path],
    folder: Path,
    device: str = 'auto',
    threads: int = 1,
    workers: int = 1,
    seconds: float = float('inf'),
) -> ModelCard:
    """Train what a recipe says from cached people and write the model to `folder`.

    Parameters
    ----------
    recipe
        From :func:`bids_jointseg.recipe.read_recipe`.
    people
        Files of :func:`bids_jointseg.sampling.write_person`, named `DATASET_sub-SUBJECT.npz`.
    pairs
        Files of :func:`bids_jointseg.sampling.write_pair`.
    lesions
        Subject -> mask in MNI space.
    folder
        Checkpoint, curve and model.
    device, threads, workers, seconds
        See :func:`run`.

    Returns
    -------
    ModelCard
        With its path.
    """
    torch.set_num_threads(threads)
    sources = {source.name: source for source in recipe.datasets}
    split: dict[str, dict[str, list[Person]]] = {
        part: {'scans': [], 'heads': []} for part in ('train', 'validation')
    }
    names: dict[str, dict[str, list[str]]] = {'train': {}, 'validation': {}}
    for path in people:
        dataset, subject = path.stem.rsplit('_sub-', 1)
        part = sources[dataset].part(subject)
        if part != 'test':
            person = read_person(path)
            split[part]['heads' if person.t1w is None else 'scans'].append(person)
            names[part].setdefault(dataset, []).append(subject)
    masks: dict[str, list[Tensor]] = {}
    (lesion_source,) = (source for source in recipe.datasets if source.role == 'lesions')
    cached = folder / 'lesions.npz'
    folder.mkdir(parents=True, exist_ok=True)
    write_lesions(lesions, cached)
    for part in split:
        chosen = [subject for subject in lesions if lesion_source.part(subject) == part]
        masks[part] = read_lesions(cached, chosen)
        names[part][lesion_source.name] = chosen
    settings = Settings(architecture=recipe.architecture, **recipe.training)
    samples = SampleSettings(**tuples(recipe.samples))

    def windows(part: str, heads_share: float, number: int, length: int) -> Windows:
        return Windows(
            split[part]['scans'],
            split[part]['heads'],
            masks[part],
            settings=replace(samples, heads_share=heads_share),
            seed=settings.seed + number,
            length=length,
        )

    held_out = windows('validation', 0.5, 3, 12)
    network = run(
        settings,
        [windows('train', 0.0, 1, settings.steps), windows('train', 1.0, 2, settings.steps)],
        Pairs(sorted(pairs), seed=settings.seed + 4, length=settings.steps) if pairs else None,
        [held_out[number] for number in range(len(held_out))],
        folder,
        device=str(choose_device(device)),
        workers=workers,
        seconds=seconds,
    )
    card = ModelCard(
        name=recipe.name,
        version=recipe.version,
        architecture=recipe.architecture,
        modalities=recipe.modalities,
        in_plane_mm=recipe.in_plane_mm,
        slice_mm=recipe.slice_mm,
        window=recipe.window,
        licence=recipe.licence,
        training={
            'steps': settings.steps,
            'people': names['train'],
            'validation': names['validation'],
            'unlabelled': [path.stem for path in sorted(pairs)],
            'test': {source.name: list(source.test) for source in recipe.datasets if source.test},
        },
    )
    return save_model(network, card, folder)
