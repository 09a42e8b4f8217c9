r"""The training loop: cached people in, a model file out.

Each iteration draws a sample of every stream that the recipe's datasets form, those that tell
lesions and those that tell tissue alone, and adds the unlabelled term on samples whose tissue
nobody annotated: :math:`R^l + R^t_2 + R^t_1` (:mod:`bids_jointseg.losses`).

A checkpoint appears whole or not at all and holds everything; a killed run goes on from it to
the same curve. Under ``torchrun``, processes share an iteration: they add up the sums of every
loss and of every gradient, so that two processes do what one does with twice the batch.

    torchrun --nproc-per-node 2 -m bids_jointseg.training OUT/fold-0/job.json
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bids_jointseg.cache import modalities_of, raw_images, read_mask, read_person
from bids_jointseg.card import MODALITIES, ModelCard, ModelError, read_card
from bids_jointseg.files import replacing, write_bytes
from bids_jointseg.image import train_landmarks
from bids_jointseg.inference import choose_device, fast_type, probabilities
from bids_jointseg.labels import CLASSES, LABELS, TISSUES, tells_tissue
from bids_jointseg.losses import OVERLAPS, Total, alone, consistency_risk, supervised_risk
from bids_jointseg.network import begin_with, build, load_model, save_model
from bids_jointseg.processes import end_with_parent
from bids_jointseg.recipe import Recipe, RecipeError, TrainingSettings, read_recipe
from bids_jointseg.sampling import Cohort, Sample, Windows, collate, subsets

LOGGER = logging.getLogger('bids_jointseg')
LESION = CLASSES.index('L')
BELIEVED = 0.3
"""Probability from which an unlabelled voxel is taken for a lesion."""


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """What a training does, and with which network.

    Attributes
    ----------
    architecture, modalities
        See :class:`bids_jointseg.card.ModelCard`.
    """

    architecture: dict[str, Any]
    modalities: tuple[str, ...] = MODALITIES

    @classmethod
    def of(cls, recipe: Recipe) -> Settings:
        """Return what a recipe says."""
        return cls(
            architecture=recipe.architecture,
            modalities=recipe.modalities,
            **vars(recipe.training),
        )


# --- processes ----------------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """The sum over processes. Every process has the same loss of it, so the gradient is plain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class Processes:
    """The processes that share an iteration; one, unless ``torchrun`` started more."""

    rank: int = 0
    count: int = 1

    @property
    def total(self) -> Total:
        """Adds the sums of a loss up over the processes."""
        return alone if self.count == 1 else _Sum.apply

    def add_gradients(self, network: nn.Module) -> None:
        """Replace every gradient by its sum over the processes."""
        if self.count == 1:
            return
        for parameter in network.parameters():
            if parameter.grad is None:  # a modality that this process did not see
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def agree(self, value: bool) -> bool:
        """Return what the first process says."""
        if self.count == 1:
            return value
        told = torch.tensor([int(value)], device=_collective_device())
        dist.broadcast(told, 0)
        return bool(told.item())


ALONE = Processes()


def _collective_device() -> str:
    return 'cuda' if dist.get_backend() == 'nccl' else 'cpu'


@contextmanager
def processes(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes of ``torchrun``, if it started this one, each with a GPU of its own."""
    count = int(os.environ.get('WORLD_SIZE', '1'))
    if count == 1:
        yield Processes(), device
        return
    cuda = device.startswith('cuda')
    if cuda:
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if cuda else 'gloo')
    try:
        yield Processes(dist.get_rank(), count), device
    finally:
        dist.destroy_process_group()


# --- the loop -----------------------------------------------------------------------------------


@dataclass
class _State:
    """All that a checkpoint holds."""

    network: nn.Module
    average: nn.Module
    best: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    identity: str
    step: int = 0
    best_score: float = float('-inf')
    stale: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    recent: list[dict[str, float]] = field(default_factory=list)

    _parts = ('network', 'average', 'best', 'optimiser', 'scaler')
    _values = ('step', 'best_score', 'stale', 'curve', 'recent', 'identity')

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {name: getattr(self, name).state_dict() for name in self._parts}
        state |= {name: getattr(self, name) for name in self._values}
        state['random'] = torch.get_rng_state()
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path, device: str) -> bool:
        """Go back to a checkpoint; return whether it is of this training."""
        state = torch.load(path, map_location=device, weights_only=True)
        if state['identity'] != self.identity:
            return False
        for name in self._parts:
            getattr(self, name).load_state_dict(state[name])
        for name in self._values:
            setattr(self, name, state[name])
        torch.set_rng_state(state['random'].cpu())
        return True


@dataclass(frozen=True)
class Trained:
    """What a training, finished or stopped, has reached."""

    network: nn.Module
    steps: int
    finished: bool
    curve: list[dict[str, float]]


def run(
    settings: Settings,
    labelled: Mapping[str, Dataset[Sample]],
    unlabelled: Dataset[Sample] | None,
    held_out: Sequence[Sample],
    folder: Path,
    *,
    device: str = 'cpu',
    workers: int = 1,
    seconds: float = float('inf'),
    together: Processes = ALONE,
) -> Trained:
    """Train, or go on training.

    Parameters
    ----------
    settings
        See there.
    labelled
        Name -> dataset that gives a batch to every iteration.
    unlabelled
        Samples for the unlabelled term alone, or None.
    held_out
        Samples of people who are in none of the others: the curve's validation score.
    folder
        Where checkpoint, log and sample pictures are.
    device
        Of PyTorch.
    workers
        Processes that draw samples for each dataset.
    seconds
        Stop, resumable, after this time.
    together
        From :func:`processes`.

    Returns
    -------
    Trained
        With the averaged network, or the best one where `patience` ends the training.
    """
    torch.manual_seed(settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob('.*.tmp'):  # by a run that was killed while it wrote
        left.unlink(missing_ok=True)
    state = _begin(settings, device)
    checkpoint = folder / 'checkpoint.pt'
    if checkpoint.is_file():
        if not state.load(checkpoint, device):
            raise RecipeError(
                f'{checkpoint}: of a training with other settings: remove it, or choose another '
                'output folder'
            )
        LOGGER.info('%s: going on from step %d', checkpoint, state.step)
    first = state.step
    data = labelled if unlabelled is None else {**labelled, 'unlabelled': unlabelled}
    turns = {name: _Turns(settings, name, alone=len(labelled) == 1) for name in data}
    streams = {
        name: _stream(data[name], turns[name].numbers(first), settings, workers, together)
        for name in data
    }
    risk = _Risk(settings, device, together.total)
    finished = state.step >= settings.steps or _stale(settings, state)
    begun = time.monotonic()
    with _Log(folder, settings, first, together) as log, _signals() as stopped:
        while not finished:
            values: dict[str, float] = {}
            state.network.train()
            for group in state.optimiser.param_groups:
                group['lr'] = settings.rate * _schedule(settings, state.step)
            batches = {
                name: next(stream)
                for name, stream in streams.items()
                if turns[name].number(state.step) is not None
            }
            for name, batch in batches.items():
                loss, parts = risk(state.network, batch, state.step, name)
                state.scaler.scale(loss).backward()
                values |= parts
            together.add_gradients(state.network)
            state.scaler.unscale_(state.optimiser)
            nn.utils.clip_grad_norm_(state.network.parameters(), settings.clip)
            state.scaler.step(state.optimiser)
            state.scaler.update()
            state.optimiser.zero_grad(set_to_none=True)
            step = state.step
            _follow(state.average, state.network, min(settings.average, (1 + step) / (10 + step)))
            state.step += 1
            state.recent.append(values)
            log.tick(values)
            late = together.agree(bool(stopped) or time.monotonic() - begun > seconds)
            due = state.step % settings.validate_every == 0 or state.step == settings.steps
            if due and together.rank == 0:
                found = score(state.average, held_out)
                _judge(state, found)
                log.write(state, found, held_out)
            if due:
                state.recent = []
            if (due or late) and together.rank == 0:
                state.save(checkpoint)
            if due:
                finished = together.agree(state.step == settings.steps or _stale(settings, state))
            if late:
                break
    if signal.SIGINT in stopped:
        raise KeyboardInterrupt
    network = state.best if settings.patience and held_out else state.average
    return Trained(network.eval(), state.step, finished, state.curve)


def first_network(settings: Settings) -> nn.Module:
    """Return the network that a training begins with.

    Raises
    ------
    ModelError
        If it cannot be built, or the model `init` cannot be read.
    RecipeError
        If it cannot begin with the weights of `init`.
    """
    network = build(settings.architecture, settings.modalities)
    if settings.init:
        start = load_model(read_card(settings.init))
        try:
            begin_with(network, start)
        except ModelError as error:
            raise RecipeError(
                f'init = {settings.init!r}: {error}: give the architecture and the modalities of '
                'its card, or a U-Net with more channels'
            ) from error
    return network


def _begin(settings: Settings, device: str) -> _State:
    network = first_network(settings).to(device)
    average = deepcopy(network).requires_grad_(False)
    kind = {'adam': torch.optim.Adam, 'adamw': torch.optim.AdamW}[settings.optimiser]
    optimiser = kind(
        network.parameters(), settings.rate, betas=settings.betas, weight_decay=settings.decay
    )
    half = fast_type(torch.device(device)) == torch.float16
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=half)
    # What may change when a training goes on is how long it lasts.
    lasting = replace(settings, steps=0, validate_every=0, patience=0)
    identity = json.dumps(asdict(lasting), sort_keys=True)
    return _State(network, average, deepcopy(average), optimiser, scaler, identity)


class _Risk:
    """The risk of one batch, as its annotation and modalities make it."""

    def __init__(self, settings: Settings, device: str, total: Total) -> None:
        self.settings, self.device = settings, device
        self.agreement = _Turns(settings, 'unlabelled')
        self.options: dict[str, Any] = {'overlap': OVERLAPS[settings.overlap], 'total': total}

    def __call__(
        self, network: nn.Module, batch: Sample, step: int, name: str
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss, with a gradient, and the value of each of its terms."""
        s = self.settings
        batch = _to(batch, self.device)
        told = len(batch.groups) > 1
        everything = probabilities(network, batch.images)
        risks = {}

        def supervised(p: Tensor) -> Tensor:
            return supervised_risk(
                p,
                batch.target,
                batch.groups,
                batch.valid,
                entropy_weight=s.entropy_weight,
                **self.options,
            )

        def agreement(p: Tensor, q: Tensor) -> Tensor:
            spared = self._lesions(batch, everything) if s.spare_lesions else None
            return consistency_risk(p, q, spared, **self.options)

        if told:
            risks[name] = supervised(everything)
        if batch.again and step >= s.consistency_from:
            again = probabilities(network, batch.again)
            risks[f'{name} steadiness'] = s.steadiness * agreement(everything, again)
            if told:
                risks[f'{name} again'] = supervised(again)
        agree = len(batch.images) > 1 and self.agreement.number(step) is not None
        if agree and not tells_tissue(batch.groups):
            choices = s.subsets or subsets(tuple(batch.images))
            chosen = choices[int(np.random.default_rng((s.seed, 9, step)).integers(len(choices)))]
            some = probabilities(network, {name: batch.images[name] for name in chosen})
            target = everything.detach() if s.stop_gradient else everything
            risks[f'{name} agreement'] = agreement(target, some)
            if told and s.supervise_subsets:
                risks[f'{name} subset'] = supervised(some)
        values = {name: float(risk.detach()) for name, risk in risks.items()}
        return torch.stack(list(risks.values())).sum(), values

    def _lesions(self, batch: Sample, p: Tensor) -> Tensor:
        """Return where a lesion is annotated, or believed where nothing is, `(B, 1, ...)`."""
        believed = (p.detach()[:, LESION : LESION + 1] > BELIEVED).float()
        if frozenset('L') not in batch.groups:
            return believed
        index = batch.groups.index(frozenset('L'))
        known = batch.valid.expand_as(batch.target)[:, index : index + 1]
        drawn = (batch.target[:, index : index + 1] > 0.5).float()
        return torch.where(known > 0, drawn, believed)


class _Turns:
    """In which iterations a stream gives a batch, and which of its batches that is."""

    def __init__(self, settings: Settings, name: str, *, alone: bool = False) -> None:
        self.steps, self.start, self.every = settings.steps, 0, 1
        if name == 'unlabelled':
            self.start, self.every = settings.consistency_from, settings.consistency_every
        elif name == 'lesions' and not alone:
            self.every = settings.lesions_every

    def number(self, step: int) -> int | None:
        """Return the number of the batch of an iteration, or None if it has none."""
        turn, rest = divmod(step - self.start, self.every)
        return turn if turn >= 0 and rest == 0 else None

    def numbers(self, first: int) -> list[int]:
        """Return the numbers of the batches from iteration `first` on."""
        found = (self.number(step) for step in range(first, self.steps))
        return [number for number in found if number is not None]


def _stale(settings: Settings, state: _State) -> bool:
    return bool(settings.patience) and state.stale >= settings.patience


def _judge(state: _State, found: Mapping[str, float]) -> None:
    """Keep the best weights so far, by the mean of the validation's Dice."""
    mean = float(np.mean([*found.values()])) if found else float('nan')
    if mean > state.best_score:
        state.best_score, state.stale = mean, 0
        state.best.load_state_dict(state.average.state_dict())
    elif found:
        state.stale += 1


def _stream(
    data: Dataset[Sample],
    iterations: Sequence[int],
    settings: Settings,
    workers: int,
    together: Processes,
) -> Iterator[Sample]:
    """Return an iterator over the batches of some iterations, drawn by worker processes."""
    size = settings.batch
    numbers = [
        [(i * together.count + together.rank) * size + k for k in range(size)] for i in iterations
    ]
    loader = DataLoader(
        data,
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
        multiprocessing_context='forkserver' if workers else None,
    )
    return iter(loader)


def _start_worker(_: int) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    os.nice(2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect what asks for an end: Ctrl-C, and SIGTERM, with which schedulers announce theirs.

    The first of them stops the run, resumable, after the iteration; a second one stops it now.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, stop)
    except ValueError:  # not the main thread
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to(sample: Sample, device: str) -> Sample:
    images, again = (
        {
            name: image.to(device, memory_format=torch.channels_last_3d)
            for name, image in of.items()
        }
        for of in (sample.images, sample.again)
    )
    return Sample(images, sample.target.to(device), sample.valid.to(device), sample.groups, again)


def _schedule(settings: Settings, step: int) -> float:
    """Return the factor on the learning rate."""
    if settings.schedule == 'constant':
        return 1.0
    return min(1.0, (step + 1) / 100) * (1 - step / settings.steps) ** 0.9


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the current ones; statistics are copied."""
    for mean, value in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for kept, current in zip(average.buffers(), network.buffers(), strict=True):
        kept.copy_(current)


@torch.no_grad()
def score(network: nn.Module, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the Dice of each class over all held-out windows together, in per cent.

    Only of the classes that are annotated somewhere, where the annotation tells them.
    """
    network.eval()
    both, sizes, true = (np.zeros(len(CLASSES)) for _ in range(3))
    device = str(next(network.parameters()).device)
    for sample in samples:
        batch = _to(collate([sample]), device)
        found = probabilities(network, batch.images).argmax(1)
        valid = batch.valid.expand_as(batch.target)
        for index, group in enumerate(batch.groups):
            if len(group) > 1 or group == {'BG'}:
                continue
            channel = CLASSES.index(min(group))
            known = valid[:, index] > 0
            a, b = (found == channel) & known, (batch.target[:, index] > 0.5) & known
            both[channel] += float((a & b).sum())
            sizes[channel] += float(a.sum() + b.sum())
            true[channel] += float(b.sum())
    return {
        name: round(float(200 * both[channel] / sizes[channel]), 2)
        for channel, name in enumerate(CLASSES)
        if true[channel]
    }


def _means(recent: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for values in recent for name in values)
    return {
        name: float(np.mean([values[name] for values in recent if name in values]))
        for name in names
    }


# --- the log ------------------------------------------------------------------------------------


class _Log:
    """Progress bar, console, ``curve.csv``, TensorBoard and pictures of one training."""

    def __init__(self, folder: Path, settings: Settings, first: int, together: Processes) -> None:
        self.folder, self.steps, self.first = folder, settings.steps, first
        self.quiet = together.rank > 0
        self.board: Any = None

    def __enter__(self) -> _Log:
        self.begun = time.monotonic()
        terminal = sys.stderr.isatty() and not self.quiet
        self.bar = tqdm(
            total=self.steps, initial=self.first, unit='step', disable=not terminal, leave=False
        )
        self.redirect = logging_redirect_tqdm([LOGGER]) if terminal else nullcontext()
        self.redirect.__enter__()
        if not self.quiet:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                LOGGER.info("no TensorBoard: pip install 'bids_jointseg[tensorboard]'")
            else:
                self.board = SummaryWriter(str(self.folder / 'tensorboard'), purge_step=self.first)
        return self

    def __exit__(self, *details: Any) -> None:
        self.redirect.__exit__(None, None, None)
        self.bar.close()
        if self.board:
            self.board.close()

    def tick(self, values: Mapping[str, float]) -> None:
        """Move the progress bar, which knows the remaining time."""
        self.bar.update()
        self.bar.set_postfix({name: f'{value:.3f}' for name, value in values.items()})

    def write(self, state: _State, dice: Mapping[str, float], held_out: Sequence[Sample]) -> None:
        """Add a line to the curve and show it; draw what the network now makes of a sample."""
        losses = _means(state.recent)
        rate = (time.monotonic() - self.begun) / max(1, state.step - self.first)
        row = {
            'step': state.step,
            'seconds_per_step': round(rate, 3),
            **{f'loss_{"_".join(n.split())}': round(value, 5) for n, value in losses.items()},
            **{f'dice_{name}': value for name, value in dice.items()},
        }
        state.curve.append(row)
        write_curve(state.curve, self.folder / 'curve.csv')
        if self.board:
            for name, value in row.items():
                if name != 'step':
                    self.board.add_scalar(name.replace('_', '/', 1), value, state.step)
        if held_out:
            # The one that shows most.
            shown = max(held_out, key=lambda sample: float(sample.target[1:].sum()))
            picture = draw_sample(state.average, shown)
            self._picture(picture)
            if self.board:
                self.board.add_image('held out', picture, state.step, dataformats='HWC')
        tissue = [dice[name] for name in TISSUES if name in dice]
        LOGGER.info(
            'step %d of %d, %.2f s each, %s left: loss %s%s%s',
            state.step,
            self.steps,
            rate,
            _duration(rate * (self.steps - state.step)),
            ' '.join(f'{name} {value:.3f}' for name, value in losses.items()),
            f', tissue Dice {np.mean(tissue):.1f}' if tissue else '',
            f', lesion Dice {dice["L"]:.1f}' if 'L' in dice else '',
        )

    def _picture(self, picture: np.ndarray) -> None:
        from PIL import Image

        with replacing(self.folder / 'held_out.png') as temporary:
            Image.fromarray(picture).save(temporary, 'PNG')


def write_curve(curve: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write all lines of a curve; a term that began late has empty cells before."""
    names = dict.fromkeys(name for row in curve for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(curve)
    write_bytes(path, text.getvalue().encode())


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f'{minutes // 60} h {minutes % 60:02d} min' if minutes >= 60 else f'{minutes} min'


@torch.no_grad()
def draw_sample(network: nn.Module, sample: Sample) -> np.ndarray:
    """Return a picture of a sample: its images, what is annotated, what the network says.

    Returns
    -------
    np.ndarray
        `(rows, columns, 3)`, uint8: the slice with the most foreground, anterior upwards.
    """
    network.eval()
    device = str(next(network.parameters()).device)
    batch = _to(collate([sample]), device)
    found = probabilities(network, batch.images)[0].argmax(0).cpu()
    colours = torch.tensor(
        [[int(label.color[i : i + 2], 16) for i in (1, 3, 5)] for label in LABELS]
        + [[90, 90, 90]],
        dtype=torch.uint8,
    )
    truth = torch.full(found.shape, len(LABELS))
    for index, group in enumerate(sample.groups):
        valid = sample.valid.expand_as(sample.target)[index] > 0
        if len(group) == 1:
            truth[(sample.target[index] > 0.5) & valid] = CLASSES.index(min(group))
    z = int((found > 0).sum((0, 1)).argmax())
    panels = []
    for name in sorted(sample.images):
        image = sample.images[name][0, :, :, z]
        low, high = torch.quantile(image, torch.tensor([0.01, 0.995]))
        gray = ((image - low) / (high - low).clamp_min(1e-3) * 255).clamp(0, 255)
        panels.append(gray.to(torch.uint8)[..., None].expand(-1, -1, 3))
    panels += [colours[truth[:, :, z]], colours[found[:, :, z]]]
    return torch.cat([panel.flip(1).transpose(0, 1) for panel in panels], 1).numpy()


# --- recipes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The people of one fold of a recipe.

    Attributes
    ----------
    cohorts
        Part (`train`, `validation`) -> datasets with their people.
    masks
        Part -> lesion masks.
    landmarks
        Modality -> landmarks, learned from the training people, or None.
    names
        Part -> dataset -> subjects.
    """

    cohorts: dict[str, list[Cohort]]
    masks: dict[str, list[Tensor]]
    landmarks: dict[str, list[float]] | None
    names: dict[str, dict[str, list[str]]]


def read_data(
    recipe: Recipe, cache: Sequence[Path], masks: Mapping[str, Mapping[str, Path]], fold: int
) -> Data:
    """Read the cached people of one fold; nothing of its test people is looked at.

    Parameters
    ----------
    recipe
        Whose split it is.
    cache
        Files of :func:`bids_jointseg.cache.write_person`.
    masks
        Dataset -> subject -> lesion mask in MNI152 space.
    fold
        From 0.
    """
    files: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted(cache):
        with np.load(path) as stored:
            files.setdefault(str(stored['dataset']), []).append((str(stored['subject']), path))
    people = {name: [subject for subject, _ in found] for name, found in files.items()}
    split = recipe.split(people | {name: list(found) for name, found in masks.items()}, fold)
    for source in recipe.datasets:
        if source.stream == 'unlabelled' and source.name in files:
            # One modality alone has none to agree with.
            several = [f for f in files[source.name] if len(modalities_of(f[1])) > 1]
            if len(several) < len(files[source.name]):
                LOGGER.warning(
                    '%s: %d of %d scans left out: without labels, one modality teaches nothing',
                    source.name, len(files[source.name]) - len(several), len(files[source.name]),
                )  # fmt: skip
            files[source.name] = several
            kept = {subject for subject, _ in several}
            split[source.name] = {s: p for s, p in split[source.name].items() if s in kept}
    parts = ('train', 'validation')
    chosen: dict[str, dict[str, list[Path]]] = {part: {} for part in parts}
    names: dict[str, dict[str, list[str]]] = {part: {} for part in (*parts, 'test')}
    drawn: dict[str, list[Tensor]] = {part: [] for part in parts}
    for name, of_subject in split.items():
        for subject, part in of_subject.items():
            names[part].setdefault(name, []).append(subject)
            if name in masks and part in parts:
                drawn[part].append(read_mask(masks[name][subject]))
        for subject, path in files.get(name, ()):
            if of_subject[subject] in parts:
                chosen[of_subject[subject]].setdefault(name, []).append(path)
    landmarks = None
    if recipe.landmarks:
        scans: dict[str, list[Any]] = {}
        for paths in chosen['train'].values():
            for path in paths:
                for modality, image in raw_images(path).items():
                    scans.setdefault(modality, []).append(image)
        landmarks = {name: list(train_landmarks(images)) for name, images in scans.items()}
    cohorts = {
        part: [
            Cohort(
                source,
                tuple(
                    read_person(path, landmarks, source.tells, loose_edges=source.loose_edges)
                    for path in chosen[part][source.name]
                ),
            )
            for source in recipe.datasets
            if source.name in chosen[part]
        ]
        for part in parts
    }
    return Data(cohorts, drawn, landmarks, names)


def train_recipe(
    recipe: Recipe,
    *,
    cache: Sequence[Path],
    masks: Mapping[str, Mapping[str, Path]],
    folder: Path,
    fold: int = 0,
    device: str = 'auto',
    threads: int = 1,
    workers: int = 1,
    seconds: float = float('inf'),
) -> ModelCard:
    """Train one fold of a recipe from cached people and write the model to `folder`.

    Parameters
    ----------
    recipe
        From :func:`bids_jointseg.recipe.read_recipe`.
    cache, masks, fold
        See :func:`read_data`.
    folder
        Checkpoint, curve and model.
    device, threads, workers, seconds
        See :func:`run`.

    Returns
    -------
    ModelCard
        With its path.

    Raises
    ------
    RecipeError
        If nothing is left to learn from.
    """
    torch.set_num_threads(threads)
    settings, samples = Settings.of(recipe), recipe.samples
    data = read_data(recipe, cache, masks, fold)
    heads = [
        person
        for cohort in data.cohorts['train']
        if not cohort.source.modalities
        for person in cohort.people
    ]

    told = {cohort.source.stream for cohort in data.cohorts['train']}

    def windows(part: str, stream: str, number: int, length: int, batch: int) -> Windows:
        cohorts = [c for c in data.cohorts[part] if c.source.stream == stream]
        every = _Turns(settings, stream, alone='tissue' not in told).every
        # Validation, and what comes late, is never as easy as the beginning.
        share = 0 if part != 'train' or stream == 'unlabelled' else 1
        eased = replace(
            samples,
            contrast_steps=share * samples.contrast_steps // every,
            coarse_steps=share * samples.coarse_steps // every,
        )
        return Windows(
            cohorts,
            heads=heads,
            masks=data.masks[part],
            settings=eased,
            in_plane_mm=recipe.in_plane_mm,
            slice_mm=recipe.slice_mm,
            again=part == 'train' and settings.steadiness > 0,
            seed=settings.seed + number,
            batch=batch,
            length=length,
        )

    chosen = str(choose_device(device))
    with processes(chosen) as (together, own):
        shared = settings.batch * together.count
        streams = {
            name: windows('train', name, number, settings.steps * shared, shared)
            for number, name in enumerate(('tissue', 'lesions', 'unlabelled'), start=1)
        }
        labelled = {n: streams[n] for n in ('tissue', 'lesions') if streams[n].cohorts}
        if not labelled:
            raise RecipeError(f'{recipe.name}: no annotated person is left for training')
        held_out = [
            data_[number]
            for data_ in (windows('validation', name, 4, 6, 1) for name in ('tissue', 'lesions'))
            if data_.cohorts
            for number in range(len(data_))
        ]
        trained = run(
            settings,
            labelled,
            streams['unlabelled'] if streams['unlabelled'].cohorts else None,
            held_out,
            folder,
            device=own,
            workers=workers,
            seconds=seconds,
            together=together,
        )
        card = ModelCard(
            name=recipe.name,
            version=recipe.version,
            architecture=recipe.architecture,
            modalities=recipe.modalities,
            in_plane_mm=recipe.in_plane_mm,
            slice_mm=recipe.slice_mm,
            window=recipe.window,
            landmarks=data.landmarks,
            licence=recipe.licence,
            training={
                'steps': trained.steps,
                'finished': trained.finished,
                'fold': fold,
                'settings': asdict(settings) | {'samples': asdict(samples)},
                'seconds': round(sum_seconds(trained.curve)),
                'people': {n: p for n, p in data.names['train'].items() if _told(recipe, n)},
                'unlabelled': {
                    n: p for n, p in data.names['train'].items() if not _told(recipe, n)
                },
                'validation': data.names['validation'],
                'test': data.names['test'],
            },
        )
        if together.rank:
            return replace(card, path=folder / f'{card.name}.json')
        return save_model(trained.network, card, folder)


def _told(recipe: Recipe, name: str) -> bool:
    """Return whether a dataset is annotated."""
    (source,) = (source for source in recipe.datasets if source.name == name)
    return source.stream != 'unlabelled'


def sum_seconds(curve: Sequence[Mapping[str, float]]) -> float:
    """Return the time that the iterations of a curve took, restarts left out."""
    steps = np.diff([0, *(row['step'] for row in curve)])
    return float(np.dot(steps, [row['seconds_per_step'] for row in curve]))


def main(argv: Sequence[str] | None = None) -> int:
    """Train one fold from a cache: what ``torchrun`` starts, once for each process."""
    parser = argparse.ArgumentParser('python -m bids_jointseg.training', description=main.__doc__)
    parser.add_argument('job', type=Path, help='job.json, which jointseg-train writes')
    arguments = parser.parse_args(argv)
    job = json.loads(arguments.job.read_text(encoding='utf-8'))
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S')
    LOGGER.setLevel(logging.INFO if os.environ.get('RANK', '0') == '0' else logging.WARNING)
    train_job(job, arguments.job.parent)
    return 0


def train_job(job: Mapping[str, Any], folder: Path) -> ModelCard:
    """Train what a job in `folder` says: recipe, smoke, and the arguments of a training."""
    recipe = job['recipe']
    return train_recipe(
        read_recipe(folder / recipe if recipe.endswith('.toml') else recipe, smoke=job['smoke']),
        cache=[folder / path for path in job['cache']],
        masks={
            name: {subject: folder / path for subject, path in found.items()}
            for name, found in job['masks'].items()
        },
        folder=folder,
        fold=job['fold'],
        device=job['device'],
        threads=job['threads'],
        workers=job['workers'],
        seconds=job['seconds'],
    )


if __name__ == '__main__':
    sys.exit(main())
