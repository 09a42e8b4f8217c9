"""The training loop, on a problem of a few voxels: it learns, stops, and goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import session
from torch.utils.data import Dataset

from bids_jointseg import inference, training
from bids_jointseg.cache import write_person
from bids_jointseg.card import ModelCard, read_card
from bids_jointseg.image import Grid
from bids_jointseg.inference import probabilities
from bids_jointseg.labels import ALL, CLASSES, PROTOCOLS, bits
from bids_jointseg.losses import alone, grouped
from bids_jointseg.network import build, load_model, save_model
from bids_jointseg.recipe import (
    CHOICES,
    RECIPES,
    Recipe,
    RecipeError,
    SampleSettings,
    Source,
    TrainingSettings,
    read_recipe,
)
from bids_jointseg.sampling import Sample, collate
from bids_jointseg.training import Processes, Settings, Trained, run

LESION = CLASSES.index('L')
SINGLE = tuple(frozenset({name}) for name in CLASSES)
LESIONS = PROTOCOLS['binary-lesion'].atoms()
UNKNOWN = (ALL,)

# --- a tiny problem -----------------------------------------------------------------------------

SHAPE = (12, 12, 6)
LEVELS = {
    # Class -> intensity; a T1w shows lesions badly.
    'T1w': {'BG': -1.5, 'WM': 1.0, 'CGM': 0.0, 'L': 0.6},
    'FLAIR': {'BG': -1.5, 'WM': 0.0, 'CGM': 0.7, 'L': 2.5},
}


class Blocks(Dataset[Sample]):
    """Blocks of background, white and gray matter, with a lesion where the annotation tells it."""

    def __init__(self, modalities: tuple[str, ...], groups: tuple[frozenset[str], ...]) -> None:
        self.modalities, self.groups = modalities, groups

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, number: int) -> Sample:
        rng = np.random.default_rng((len(self.groups), number))
        names = np.full(SHAPE, 'BG', dtype=object)
        names[2:, :, :] = 'CGM'
        names[rng.integers(4, 7) :, 1:, :] = 'WM'
        if 'FLAIR' in self.modalities:
            x, y, z = rng.integers((7, 2, 0), (9, 8, 3))
            names[x : x + 4, y : y + 4, z : z + 4] = 'L'
        images = {
            modality: torch.from_numpy(
                np.vectorize(LEVELS[modality].get)(names) + rng.normal(0, 0.2, SHAPE)
            ).float()[None]
            for modality in self.modalities
        }
        shares = torch.from_numpy(np.stack([names == name for name in CLASSES])).float()
        target = grouped(shares[None], self.groups)[0]
        return Sample(images, target, torch.ones(1, *SHAPE), self.groups)


TISSUE = Blocks(('T1w',), SINGLE)
PATIENTS = Blocks(('T1w', 'FLAIR'), LESIONS)
STRANGERS = Blocks(('T1w', 'FLAIR'), UNKNOWN)
LABELLED = {'tissue': TISSUE, 'lesions': PATIENTS}
HELD_OUT = [Blocks(('T1w', 'FLAIR'), SINGLE)[9_000 + number] for number in range(2)]

SMALL = Settings(
    architecture={'name': 'unet', 'channels': [4, 8]},
    steps=6, rate=1e-2, schedule='constant', consistency_from=1, consistency_every=2,
    validate_every=2,
)  # fmt: skip


def train(folder: Path, settings: Settings = SMALL, **more: object) -> Trained:
    options = {'workers': 0} | more
    return run(settings, LABELLED, STRANGERS, HELD_OUT, folder, **options)


def curve(folder: Path) -> list[dict[str, str]]:
    """Return the curve without the times."""
    with (folder / 'curve.csv').open() as file:
        return [
            {name: value for name, value in row.items() if name != 'seconds_per_step'}
            for row in csv.DictReader(file)
        ]


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / 'checkpoint.pt', weights_only=True)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(SMALL.architecture)


# --- learning -----------------------------------------------------------------------------------


def test_both_annotations_together_teach_what_neither_tells(tmp_path):
    """No patient has tissue labels, no control a FLAIR."""
    network_ = {'name': 'unet', 'channels': [8, 8]}
    settings = replace(
        SMALL, architecture=network_, steps=100, validate_every=20, consistency_from=20
    )
    trained = train(tmp_path, settings)
    assert trained.finished
    assert trained.steps == 100
    first, *_, last = trained.curve
    assert last['loss_tissue'] < 0.5 * first['loss_tissue']
    assert last['loss_lesions'] < 0.5 * first['loss_lesions']
    for name in ('WM', 'CGM', 'L'):
        assert last[f'dice_{name}'] > 80, name
    assert (tmp_path / 'held_out.png').stat().st_size > 0


# --- stopping and going on ----------------------------------------------------------------------


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted training and its folder."""
    folder = tmp_path_factory.mktemp('whole')
    return train(folder), folder


def test_a_training_in_pieces_is_the_same(whole, tmp_path):
    trained, folder = whole
    for step in range(1, 7):
        piece = train(tmp_path, seconds=0)  # one step at a time
        assert piece.steps == step
        assert piece.finished == (step == 6)
    assert same_weights(piece.network, trained.network)
    assert curve(tmp_path) == curve(folder)
    assert [row['step'] for row in curve(folder)] == ['2', '4', '6']
    # All else that a checkpoint holds.
    parts, expected = checkpoint(tmp_path), checkpoint(folder)
    assert parts.keys() == expected.keys()
    for name in ('network', 'best'):
        assert all(torch.equal(parts[name][key], expected[name][key]) for key in parts[name])
    for a, b in zip(
        parts['optimiser']['state'].values(), expected['optimiser']['state'].values(), strict=True
    ):
        assert all(torch.equal(a[key], b[key]) for key in a)
    # Nothing is left to do.
    assert train(tmp_path).steps == 6
    assert curve(tmp_path) == curve(folder)


def slow_training(folder: str) -> None:
    """Train for some seconds, in a process of its own: to be killed."""
    train(Path(folder), replace(SMALL, steps=60), workers=1)


def launch(function: str, *arguments: object) -> subprocess.Popen:
    """Start a function of this module in another process."""
    given = ', '.join(repr(str(argument)) for argument in arguments)
    path = str(Path(__file__).parent)
    code = f'import sys; sys.path.insert(0, {path!r}); import test_training as t; t.{function}'
    command = [sys.executable, '-c', f'{code}({given})']
    return subprocess.Popen(command, start_new_session=True)


def wait_for(folder: Path, looks: int, process: subprocess.Popen) -> None:
    """Wait until a curve has some lines; on a busy machine each may take its time."""
    path, lines, end = folder / 'curve.csv', 0, time.monotonic() + 120
    while lines <= looks:
        assert process.poll() is None, 'it ended by itself'
        assert time.monotonic() < end, 'nothing happens'
        time.sleep(0.005)
        found = len(path.read_text().splitlines()) if path.exists() else 0
        if found > lines:
            lines, end = found, time.monotonic() + 120


def test_kill_9_at_any_moment_leaves_no_trace(tmp_path):
    settings = replace(SMALL, steps=60)
    expected = train(tmp_path / 'whole', settings)
    process = launch('slow_training', tmp_path / 'killed')
    seed = np.random.SeedSequence().entropy
    print(f'seed {seed}')
    rng = np.random.default_rng(seed)
    wait_for(tmp_path / 'killed', int(rng.integers(2, 20)), process)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = checkpoint(tmp_path / 'killed')['step']
    assert 0 < before < 60
    end = time.monotonic() + 60  # what starts the worker may still be importing libraries
    while session(process.pid):
        assert time.monotonic() < end, 'a worker outlives the training'
        time.sleep(0.05)
    found = train(tmp_path / 'killed', settings)
    assert found.finished
    assert same_weights(found.network, expected.network), f'killed after step {before}'
    assert curve(tmp_path / 'killed') == curve(tmp_path / 'whole')


class Interrupted(Blocks):
    """Sends a signal to its own process when it is asked for the fourth sample."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(('T1w',), SINGLE)
        self.number = number

    def __getitem__(self, number: int) -> Sample:
        if number == 3:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(number)


def test_sigterm_stops_resumably(whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    labelled = LABELLED | {'tissue': Interrupted(signal.SIGTERM)}
    stopped = run(SMALL, labelled, STRANGERS, HELD_OUT, tmp_path, workers=0)
    assert (stopped.steps, stopped.finished) == (4, False)
    assert signal.getsignal(signal.SIGTERM) is before
    again = train(tmp_path)
    assert again.finished
    assert same_weights(again.network, whole[0].network)
    assert curve(tmp_path) == curve(whole[1])


def test_an_interrupt_ends_the_iteration_first(whole, tmp_path):
    labelled = LABELLED | {'tissue': Interrupted(signal.SIGINT)}
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, labelled, STRANGERS, HELD_OUT, tmp_path, workers=0)
    assert checkpoint(tmp_path)['step'] == 4
    assert same_weights(train(tmp_path).network, whole[0].network)


def test_a_checkpoint_of_another_training_is_refused(whole, tmp_path):
    train(tmp_path, seconds=0)
    with pytest.raises(RecipeError, match=r'checkpoint\.pt: of a training with other settings'):
        train(tmp_path, replace(SMALL, rate=1e-3))
    # But it may become longer.
    longer = train(tmp_path, replace(SMALL, steps=8, validate_every=4, patience=3))
    assert longer.steps == 8
    assert [row['step'] for row in curve(tmp_path)] == ['4', '8']


# --- the plateau, the average -------------------------------------------------------------------


def test_patience_ends_at_the_plateau_with_the_best_weights(tmp_path, monkeypatch):
    seen = []
    scores = [10, 30, 20, 30, 25, 40]

    def score(averaged, held_out):
        seen.append({name: value.clone() for name, value in averaged.state_dict().items()})
        return {'WM': scores[len(seen) - 1]}

    monkeypatch.setattr(training, 'score', score)
    settings = replace(SMALL, steps=12, patience=3)
    # Stopping in between is no look.
    for _ in range(5):
        train(tmp_path, settings, seconds=0)
    trained = train(tmp_path, settings)
    assert trained.finished
    assert trained.steps == 10
    assert len(seen) == 5
    assert all(
        torch.equal(value, seen[1][name]) for name, value in trained.network.state_dict().items()
    )
    assert train(tmp_path, settings).steps == 10
    # Without patience, the last weights.
    seen.clear()
    endless = train(tmp_path / 'endless', replace(settings, patience=0))
    assert endless.steps == 12
    assert all(
        torch.equal(value, seen[-1][name]) for name, value in endless.network.state_dict().items()
    )


def test_the_average_follows_the_weights(tmp_path):
    settings = replace(SMALL, average=0.3)
    followed = None
    for step in range(4):
        found = train(tmp_path, settings, seconds=0).network.state_dict()
        current = checkpoint(tmp_path)['network']
        if followed is None:
            torch.manual_seed(settings.seed)
            followed = build(settings.architecture).state_dict()
        # It begins fast: of few weights, the last says most.
        decay = min(0.3, (1 + step) / (10 + step))
        for name, value in current.items():
            followed[name] = decay * followed[name] + (1 - decay) * value
            assert torch.allclose(found[name], followed[name], atol=1e-6)
    last = train(tmp_path / 'last', replace(SMALL, average=0.0)).network.state_dict()
    current = checkpoint(tmp_path / 'last')['network']
    assert all(torch.equal(value, current[name]) for name, value in last.items())


# --- the curve ----------------------------------------------------------------------------------


def test_a_term_that_begins_late_has_empty_cells_before(tmp_path):
    train(tmp_path, replace(SMALL, consistency_from=3))
    first, second, third = curve(tmp_path)
    terms = [name for name in first if name.startswith('loss_')]
    assert terms == [
        'loss_tissue', 'loss_lesions',
        'loss_lesions_agreement', 'loss_lesions_subset', 'loss_unlabelled_agreement',
    ]  # fmt: skip
    for row, there in ((first, False), (second, True), (third, True)):
        assert bool(row['loss_unlabelled_agreement']) == there
        assert bool(row['loss_lesions_subset']) == there
        assert float(row['loss_tissue']) > 0
    assert {'dice_WM', 'dice_CGM'} < first.keys()


def test_the_time_of_a_training_is_that_of_its_iterations():
    rows = [{'step': 10, 'seconds_per_step': 1.0}, {'step': 30, 'seconds_per_step': 0.5}]
    assert training.sum_seconds(rows) == 10 + 10
    assert training.sum_seconds([]) == 0


def test_the_rate_rises_and_falls():
    settings = replace(SMALL, steps=1000, schedule='polynomial')
    rates = [training._schedule(settings, step) for step in (0, 49, 500, 999)]
    assert rates == pytest.approx([0.01, 0.5 * 0.951**0.9, 0.5**0.9, 0.001**0.9])
    assert training._schedule(SMALL, 5) == 1


class Fixed(torch.nn.Module):
    """Says white matter where the T1w is above 0, else a lesion."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: dict[str, torch.Tensor]) -> torch.Tensor:
        bright = images['T1w'][:, 0] > 0
        logits = torch.zeros(len(bright), len(CLASSES), *bright.shape[1:])
        logits[:, 1] = 10.0 * bright
        logits[:, LESION] = 10.0 * ~bright
        return logits


def test_the_score_is_the_dice_of_what_is_annotated_where_it_is():
    image = torch.tensor([1.0, 1, 1, -1, -1, -1, 1, -1]).reshape(1, 8, 1, 1)
    truth = torch.tensor([1, 1, 2, 2, 2, 1, 2, 1])
    target = torch.nn.functional.one_hot(truth, len(CLASSES)).T.reshape(-1, 8, 1, 1).float()
    valid = torch.ones(1, 8, 1, 1)
    valid[:, 6:] = 0
    full = Sample({'T1w': image}, target, valid, SINGLE)
    assert training.score(Fixed(), [full]) == {'WM': 66.67, 'L': 66.67}
    # One who tells lesions says nothing of white matter.
    mask = Sample({'T1w': image}, grouped(target[None], LESIONS)[0], valid, LESIONS)
    assert training.score(Fixed(), [mask]) == {'L': 66.67}
    empty = replace(mask, valid=0 * valid)
    assert training.score(Fixed(), [mask, empty]) == {'L': 66.67}
    assert training.score(Fixed(), []) == training.score(Fixed(), [empty]) == {}


def test_tensorboard_has_the_curve_and_a_picture(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, seconds=0)
    train(tmp_path)
    board = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    assert {'loss/tissue', 'loss/lesions_agreement', 'dice/WM'} <= set(board.Tags()['scalars'])
    events = board.Scalars('loss/tissue')
    rows = curve(tmp_path)
    assert [event.step for event in events] == [int(row['step']) for row in rows]
    assert [event.value for event in events] == pytest.approx(
        [float(row['loss_tissue']) for row in rows]
    )
    assert board.Tags()['images'] == ['held out']


# --- fine-tuning --------------------------------------------------------------------------------


def test_fine_tuning_starts_from_a_model(whole, tmp_path):
    card = save_model(whole[0].network, ModelCard('old', '0', SMALL.architecture), tmp_path)
    settings = replace(SMALL, init=str(card.path), steps=0)
    start = train(tmp_path / 'tuned', settings)
    assert same_weights(start.network, load_model(card))
    # From there on it learns.
    assert not same_weights(train(tmp_path / 'tuned', replace(settings, steps=1)).network,
                            load_model(card))  # fmt: skip
    for change in (
        {'architecture': {'name': 'unet', 'channels': [4, 4]}},
        {'modalities': ('T1w',)},
    ):
        with pytest.raises(RecipeError, match=r'old\.json.*not the same network'):
            train(tmp_path / 'other', replace(settings, **change))


# --- the unlabelled term ------------------------------------------------------------------------


def risk(settings: Settings, batch: Sample, step: int = 1, name: str = 'x'):
    """Return the network with the gradients of one batch, and the values of the terms."""
    net = network().train()
    loss, values = training._Risk(settings, 'cpu', alone)(net, collate([batch]), step, name)
    loss.backward()
    return net, values


def moved(module: torch.nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_patients_can_come_more_rarely_than_controls(tmp_path):
    drawn = {'tissue': [], 'lesions': []}

    class Counted(Blocks):
        def __getitem__(self, number: int) -> Sample:
            drawn['tissue' if self.groups == SINGLE else 'lesions'].append(number)
            return super().__getitem__(number)

    labelled = {
        'tissue': Counted(('T1w',), SINGLE),
        'lesions': Counted(('T1w', 'FLAIR'), LESIONS),
    }
    settings = replace(SMALL, steps=7, lesions_every=3)
    run(settings, labelled, None, [], tmp_path / 'both', workers=0)
    assert drawn == {'tissue': [*range(7)], 'lesions': [0, 1, 2]}
    drawn['lesions'].clear()
    del labelled['tissue']
    run(settings, labelled, None, [], tmp_path / 'alone', workers=0)
    assert drawn['lesions'] == [*range(7)], 'an iteration without a batch teaches nothing'


def test_stop_gradient_teaches_the_subset_alone():
    settings = replace(SMALL, subsets=(('T1w',),))
    for stop in (False, True):
        net, values = risk(replace(settings, stop_gradient=stop), STRANGERS[0])
        assert values.keys() == {'x agreement'}
        assert moved(net.branches['T1w'])
        assert moved(net.branches['FLAIR']) is not stop


def test_lesions_are_spared_unless_told_otherwise():
    sample = PATIENTS[0]
    patient = replace(sample, target=torch.zeros_like(sample.target))
    patient.target[LESIONS.index(frozenset({'L'}))] = 1  # nothing else
    for spare in (False, True):
        _, values = risk(replace(SMALL, spare_lesions=spare), patient)
        assert (values['x agreement'] == 0) is spare


def test_where_nobody_drew_lesions_they_are_those_that_the_network_believes_in():
    p = torch.full((1, len(CLASSES), 4, 1, 1), 0.1)
    p[0, LESION, :, 0, 0] = torch.tensor([0.2, 0.4, 0.2, 0.4])
    target = torch.zeros(1, 2, 4, 1, 1)
    target[0, LESIONS.index(frozenset({'L'})), :, 0, 0] = torch.tensor([1.0, 0, 1, 0])
    valid = torch.tensor([1.0, 1, 0, 0]).reshape(1, 1, 4, 1, 1)
    spared = training._Risk(SMALL, 'cpu', alone)._lesions
    drawn = spared(Sample({}, target, valid, LESIONS), p)
    assert drawn.flatten().tolist() == [1, 0, 0, 1]
    nobody = spared(Sample({}, target[:, :1], valid, UNKNOWN), p)
    assert nobody.flatten().tolist() == [0, 1, 0, 1]


def test_terms_follow_from_the_annotation_and_the_settings():
    def terms(batch: Sample, step: int = 1, **changes: object) -> set[str]:
        return set(risk(replace(SMALL, **changes), batch, step)[1])

    assert terms(TISSUE[0]) == {'x'}
    assert terms(PATIENTS[0]) == {'x', 'x agreement', 'x subset'}
    assert terms(PATIENTS[0], supervise_subsets=False) == {'x', 'x agreement'}
    # Warm-up, and every second iteration.
    assert terms(PATIENTS[0], 0) == terms(PATIENTS[0], 2) == {'x'}
    assert terms(PATIENTS[0], 3) == {'x', 'x agreement', 'x subset'}
    # Full annotations need no agreement, one modality has nothing to agree with.
    assert terms(HELD_OUT[0]) == {'x'}
    alone_ = replace(PATIENTS[0], images={'FLAIR': PATIENTS[0].images['FLAIR']})
    assert terms(alone_) == {'x'}
    # What is acquired twice has to get the same answer, and both learn what is annotated.
    assert terms(twice(TISSUE[0])) == {'x', 'x steadiness', 'x again'}
    assert terms(twice(STRANGERS[0]), 2) == {'x steadiness'}
    assert terms(twice(TISSUE[0]), 0) == {'x'}


def twice(sample: Sample) -> Sample:
    """Return a sample that is acquired again, with another contrast."""
    again = {name: 0.7 * image + 0.2 for name, image in sample.images.items()}
    return replace(sample, again=again)


def test_steadiness_is_the_distance_between_two_acquisitions():
    _, once = risk(replace(SMALL, steadiness=1.0), twice(STRANGERS[0]), 2)
    _, thrice = risk(replace(SMALL, steadiness=3.0), twice(STRANGERS[0]), 2)
    assert once['x steadiness'] > 0.01
    assert thrice['x steadiness'] == pytest.approx(3 * once['x steadiness'])
    same = replace(STRANGERS[0], again=STRANGERS[0].images)
    assert risk(replace(SMALL, steadiness=1.0), same, 2)[1] == {'x steadiness': 0}


def test_steadiness_steadies(tmp_path):
    """Two acquisitions agree better with the term than without, and as well with the labels."""

    class Twice(Blocks):
        def __getitem__(self, number: int) -> Sample:
            return twice(super().__getitem__(number))

    data = Twice(('T1w',), SINGLE)
    sample = collate([data[9_500]])
    apart = {}
    for weight in (0.0, 3.0):
        settings = replace(
            SMALL, steadiness=weight, steps=100, validate_every=100, average=0.9,
            modalities=('T1w',),
        )  # fmt: skip
        trained = run(settings, {'tissue': data}, None, [], tmp_path / str(weight), workers=0)
        p, q = (probabilities(trained.network, images) for images in (sample.images, sample.again))
        assert (p.argmax(1) == sample.target.argmax(1)).float().mean() > 0.9
        apart[weight] = float((p - q).abs().mean())
    assert apart[3.0] < 0.7 * apart[0.0]


# --- several processes --------------------------------------------------------------------------

JOINT = replace(SMALL, steps=4, validate_every=1)


def gradients(settings: Settings, together: Processes) -> dict[str, torch.Tensor]:
    """Return the gradient of all terms on the share of one process of two samples of each."""
    net = network().train()
    terms = training._Risk(settings, 'cpu', together.total)
    own = range(2)[together.rank :: together.count]
    for name, data in (LABELLED | {'unlabelled': STRANGERS}).items():
        loss, _ = terms(net, collate([data[number] for number in own]), 1, name)
        loss.backward()
    together.add_gradients(net)
    return {name: value.grad for name, value in net.named_parameters()}


def together(folder: Path) -> None:
    """Train in one of the processes of ``torchrun``."""
    inference.fast_type = lambda device: None  # bfloat16 would hide what differs
    with training.processes('cpu') as (own, device):
        found = gradients(JOINT, own)
        train(folder, JOINT, together=own, device=device)
        if own.rank == 0:
            torch.save(found, folder / 'gradients.pt')


def test_two_processes_are_one_with_twice_the_batch(tmp_path, monkeypatch):
    script = tmp_path / 'script.py'
    script.write_text(
        f'import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(Path(__file__).parent)!r})'
        f'\nfrom test_training import together\ntogether(Path({str(tmp_path / "two")!r}))\n'
    )
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    subprocess.run(
        [sys.executable, *launcher, script], check=True, timeout=300,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    monkeypatch.setattr(inference, 'fast_type', lambda device: None)
    expected = gradients(JOINT, training.ALONE)
    found = torch.load(tmp_path / 'two' / 'gradients.pt')
    # float32 has 7 digits; sums over 2 x 864 voxels in another order keep 5 of the largest.
    for name, value in expected.items():
        close = {'rtol': 1e-4, 'atol': 1e-5 * float(value.abs().max())}
        assert torch.allclose(found[name], value, **close), name
    one = train(tmp_path / 'one', replace(JOINT, batch=2))
    rows = list(zip(curve(tmp_path / 'two'), curve(tmp_path / 'one'), strict=True))
    assert len(rows) == JOINT.steps
    for two, single in rows:
        assert two.keys() == single.keys()
        for name in single:
            if single[name]:
                assert float(two[name]) == pytest.approx(float(single[name]), abs=2e-5), name
    weights = checkpoint(tmp_path / 'two')['average']
    for name, value in one.network.state_dict().items():
        assert torch.allclose(weights[name], value, atol=1e-4), name


# --- recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize('smoke', [False, True])
@pytest.mark.parametrize('name', sorted(path.stem for path in RECIPES.glob('*.toml')))
def test_the_packaged_recipes_fit(name, smoke):
    recipe = read_recipe(name, smoke=smoke)
    settings, samples = Settings.of(recipe), recipe.samples
    net = build(settings.architecture, settings.modalities)
    names = {*recipe.modalities}
    for subset in settings.subsets:
        assert 0 < len(subset) < len(names)
        assert set(subset) < names
    assert any(names.issuperset(chosen) for chosen, _ in samples.modalities)
    for window in (samples.window, samples.thin_window, recipe.window or samples.window):
        assert all(size % step == 0 for size, step in zip(window, net.multiple, strict=True))
    assert settings.optimiser in ('adam', 'adamw')
    assert settings.schedule in ('polynomial', 'constant')
    assert settings.overlap in training.OVERLAPS
    assert training.OVERLAPS.keys() == {*CHOICES['overlap']}


SHARED = {
    'name': 'x',
    'version': '0',
    'licence': '',
    'architecture': SMALL.architecture,
    'landmarks': True,
    'training': TrainingSettings(steps=2, validate_every=2, consistency_from=0, seed=1),
    'samples': SampleSettings(window=(8, 8, 4), augment=False),
}
PEOPLE = Source('a', modalities=('T1w', 'FLAIR'), annotation='.', protocol='jointseg',
                validation=('02',), test=('03',))  # fmt: skip
STREET = Source('b', modalities=('T1w', 'FLAIR'))


def cache(folder: Path, source: Source, subject: str, level: float, *modalities: str) -> Path:
    """Cache a cube of white matter with a lesion."""
    shape = (10, 10, 6)
    ramp = level * np.linspace(1, 2, 600).reshape(shape)
    ramp[:2] = 0
    sets = np.full(shape, bits({'WM'}), np.uint8)
    sets[4:6, 4:6, 2:4] = bits({'L'})
    path = folder / f'{source.name}_{subject}.npz'
    write_person(
        path, dataset=source.name, subject=subject, name=f'sub-{subject}',
        grid=Grid(shape, np.eye(4)), images=dict.fromkeys(modalities, ramp**2),
        sets=sets if source.annotation else None,
    )  # fmt: skip
    return path


def test_nothing_of_test_people_is_looked_at(tmp_path):
    recipe = Recipe(datasets=(PEOPLE,), **SHARED)
    files = [
        cache(tmp_path, PEOPLE, subject, 100, 'T1w', 'FLAIR') for subject in ('01', '02', '03')
    ]
    # All but his name is noise.
    np.savez(files[2], dataset='a', subject='03', image_T1w=np.zeros(3))
    data = training.read_data(recipe, files, {}, 0)
    parts = (('train', '01'), ('validation', '02'), ('test', '03'))
    assert data.names == {part: {'a': [subject]} for part, subject in parts}
    (cohort,) = data.cohorts['train']
    assert [person.subject for person in cohort.people] == ['01']
    # The landmarks are those of the training people alone.
    alone_ = training.read_data(recipe, files[:1], {}, 0)
    assert data.landmarks == alone_.landmarks
    assert data.landmarks.keys() == {'T1w', 'FLAIR'}


def test_a_recipe_is_trained_from_its_cache(tmp_path, caplog):
    """Some people have one modality only: without labels they teach nothing."""
    recipe = Recipe(datasets=(PEOPLE, STREET), **{**SHARED, 'fractions': (1.0, 0.0, 0.0)})
    files = [
        cache(tmp_path, PEOPLE, '01', 100, 'T1w', 'FLAIR'),
        cache(tmp_path, PEOPLE, '02', 90, 'T1w', 'FLAIR'),
        cache(tmp_path, PEOPLE, '04', 90, 'T1w'),
        cache(tmp_path, STREET, '01', 80, 'T1w', 'FLAIR'),
        *(cache(tmp_path, STREET, f'{number:02}', 70, 'T1w') for number in range(2, 12)),
    ]
    card = training.train_recipe(recipe, cache=files, masks={}, folder=tmp_path / 'out', workers=0)
    assert card.training['finished']
    assert card.training['people'] == {'a': ['01', '04']}
    assert card.training['unlabelled'] == {'b': ['01']}
    assert 'b: 10 of 11 scans left out' in caplog.text
    assert card.landmarks is not None
    net = load_model(card)
    image = {'T1w': torch.zeros(1, 1, 8, 8, 4)}
    assert probabilities(net, image).shape == (1, len(CLASSES), 8, 8, 4)


def test_only_what_is_learned_first_is_easy(tmp_path, monkeypatch):
    """Iterations are counted where a stream has a batch; late streams and validation are hard."""
    controls = Source('c', modalities=('T1w',), annotation='.', protocol='neuromorphometrics')
    shared = {
        **SHARED, 'samples': SampleSettings(contrast_steps=8, coarse_steps=4),
        'training': replace(SHARED['training'], lesions_every=2),
    }  # fmt: skip
    recipe = Recipe(datasets=(PEOPLE, STREET, controls), **shared)
    files = [cache(tmp_path, PEOPLE, name, 100, 'T1w', 'FLAIR') for name in ('01', '02')]
    files += [cache(tmp_path, STREET, '01', 80, 'T1w', 'FLAIR')]
    files += [cache(tmp_path, controls, f'1{n}', 80, 'T1w') for n in range(4)]
    made: dict[tuple[str, int], tuple[int, int]] = {}

    class Spy(training.Windows):
        def __init__(self, cohorts, *, settings, **more) -> None:
            super().__init__(cohorts, settings=settings, **more)
            (stream,) = {cohort.source.stream for cohort in self.cohorts}
            made[stream, more['seed'] - 1] = settings.contrast_steps, settings.coarse_steps

    monkeypatch.setattr(training, 'Windows', Spy)
    monkeypatch.setattr(training, 'run', lambda *given, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.train_recipe(recipe, cache=files, masks={}, folder=tmp_path / 'out', workers=0)
    assert made == {
        ('tissue', 1): (8, 4), ('lesions', 2): (4, 2), ('unlabelled', 3): (0, 0),
        ('tissue', 4): (0, 0), ('lesions', 4): (0, 0),
    }  # fmt: skip


RECIPE = """
name = 'x'
version = '0'
licence = ''
architecture = {name = 'unet', channels = [2, 4]}
training = {steps = 4, validate_every = 2, consistency_from = 0}
samples = {window = [8, 8, 4], augment = false}
[[datasets]]
name = 'a'
modalities = ['T1w', 'FLAIR']
annotation = '.'
protocol = 'jointseg'
validation = ['02']
"""


def test_the_node_starts_several_processes(tmp_path):
    from bids_jointseg.interfaces import Train

    (tmp_path / 'x.toml').write_text(RECIPE)
    files = [cache(tmp_path, PEOPLE, name, 100, 'T1w', 'FLAIR') for name in ('01', '02', '03')]
    job = {
        'recipe': str(tmp_path / 'x.toml'), 'smoke': False, 'fold': 0,
        'cache': [str(path) for path in files], 'masks': {}, 'device': 'cpu', 'threads': 1,
        'workers': 0, 'seconds': float('inf'),
    }  # fmt: skip
    node = Train(job=job, name='x', out_dir=str(tmp_path / 'out'), processes=2)
    card = read_card(node.run(cwd=str(tmp_path)).outputs.card)
    assert card.training['finished']
    assert card.training['steps'] == 4
    assert len(curve(tmp_path / 'out')) == 2
    load_model(card)


def test_a_recipe_without_annotated_training_people_is_refused(tmp_path):
    recipe = Recipe(datasets=(PEOPLE,), **SHARED)
    files = [cache(tmp_path, PEOPLE, '03', 100, 'T1w')]
    with pytest.raises(RecipeError, match='x: no annotated person is left for training'):
        training.train_recipe(recipe, cache=files, masks={}, folder=tmp_path / 'out', workers=0)


def test_a_job_says_all(tmp_path, monkeypatch):
    """What ``torchrun -m bids_jointseg.training job.json`` starts."""
    given = {}
    monkeypatch.setattr(
        training, 'train_recipe', lambda recipe, **more: given.update(more, recipe=recipe)
    )
    job = {
        'recipe': 'paper-w', 'smoke': True, 'fold': 0, 'cache': ['a.npz'],
        'masks': {'m': {'01': 'm.nii.gz'}}, 'device': 'cpu', 'threads': 1, 'workers': 2,
        'seconds': float('inf'),
    }  # fmt: skip
    (tmp_path / 'job.json').write_text(json.dumps(job))
    assert training.main([str(tmp_path / 'job.json')]) == 0
    assert given.pop('recipe') == read_recipe('paper-w', smoke=True)
    assert given == {
        'cache': [tmp_path / 'a.npz'], 'masks': {'m': {'01': tmp_path / 'm.nii.gz'}},
        'folder': tmp_path,
        'fold': 0, 'device': 'cpu', 'threads': 1, 'workers': 2, 'seconds': float('inf'),
    }  # fmt: skip
