"""The mathematics of the risk, on numbers that can be checked by hand."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from bids_jointseg.labels import ALL, CLASSES, PROTOCOLS, bits
from bids_jointseg.losses import (
    OVERLAPS,
    TISSUE_GROUPS,
    Groups,
    consistency_risk,
    cross_entropy,
    distance,
    group_weights,
    grouped,
    overlap_risk,
    soergel,
    supervised_risk,
    tanimoto,
)
from bids_jointseg.recipe import Source
from bids_jointseg.sampling import Cohort, shares

SINGLE = tuple(frozenset({name}) for name in CLASSES)
LESION = CLASSES.index('L')
SHAPE = (3, 3, 2)

both_overlaps = pytest.mark.parametrize('overlap', OVERLAPS.values(), ids=OVERLAPS)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logits(seed: int = 0, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, len(CLASSES), *SHAPE)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def shares_of_one(seed: int = 1, batch: int = 1) -> Tensor:
    """Return random shares of the classes."""
    return logits(seed, batch).detach().softmax(1)


def everywhere(batch: int = 1) -> Tensor:
    return torch.ones(batch, 1, *SHAPE, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------
# Overlaps


def test_sums_and_distances_on_literals():
    p, g = vector(1, 0.5, 0), vector(1, 1, 0.5)
    assert soergel(p, g) == (1.5, 2.5)
    assert tanimoto(p, g) == (1.5, 1.25 + 2.25 - 1.5)
    assert distance(soergel(p, g), 0) == pytest.approx(1 - 1.5 / 2.5)
    assert distance(tanimoto(p, g), 0) == pytest.approx(1 - 1.5 / 2)
    # The same epsilon above and below: empty against empty is perfect.
    empty = vector(0, 0)
    assert distance(soergel(empty, empty)) == distance(tanimoto(empty, empty)) == 0
    assert distance(soergel(p, g), 1) == pytest.approx(1 - 2.5 / 3.5)
    assert distance(soergel(p, g)) == pytest.approx(1 - 11.5 / 12.5)


@both_overlaps
def test_on_binary_maps_it_is_the_jaccard_distance(overlap):
    sums = overlap(vector(1, 1, 1, 0, 0), vector(0, 1, 1, 1, 0))
    assert sums == (2, 4)
    assert distance(sums, 0) == 0.5


def test_the_papers_loss_breaks_the_triangle_inequality():
    a, b, c = vector(0.25), vector(0.5), vector(1.0)
    assert distance(tanimoto(a, c), 0) == pytest.approx(9 / 13)
    assert distance(tanimoto(a, b), 0) == pytest.approx(1 / 3)
    assert distance(tanimoto(b, c), 0) == pytest.approx(1 / 3)
    assert 9 / 13 > 1 / 3 + 1 / 3
    one, two = distance(soergel(a, b), 0), distance(soergel(b, c), 0)
    assert distance(soergel(a, c), 0) <= one + two


maps = arrays('float64', 5, elements=st.floats(0, 1)).map(lambda x: torch.from_numpy(x.copy()))
epsilons = st.floats(1e-3, 10)


@given(maps, maps, maps, epsilons)
def test_soergel_is_a_metric(a, b, c, epsilon):
    def d(x: Tensor, y: Tensor) -> float:
        return float(distance(soergel(x, y), epsilon))

    assert d(a, a) == pytest.approx(0, abs=1e-12)
    assert d(a, b) == pytest.approx(d(b, a))
    assert d(a, b) >= (a - b).abs().max() / (5 + epsilon) - 1e-12
    assert d(a, c) <= d(a, b) + d(b, c) + 1e-12


@given(maps, maps, maps, epsilons)
def test_tanimoto_obeys_the_triangle_inequality_with_a_factor_of_two(a, b, c, epsilon):
    def d(x: Tensor, y: Tensor) -> float:
        return float(distance(tanimoto(x, y), epsilon))

    assert d(a, c) <= 2 * (d(a, b) + d(b, c)) + 1e-12


def test_the_overlap_is_of_the_whole_batch():
    one = (frozenset({'L'}), ALL - {'L'})
    p = torch.zeros(2, len(CLASSES), 4, 1, 1, dtype=torch.float64)
    target = torch.zeros(2, 2, 4, 1, 1, dtype=torch.float64)
    # A volume with two lesion voxels, one of them found, and one without, with a false one.
    lesion = vector(1, 0, 0, 0), vector(1, 0, 0, 0)
    truth = vector(1, 1, 0, 0), vector(0, 0, 0, 0)
    for volume in range(2):
        p[volume, LESION, :, 0, 0] = lesion[volume]
        p[volume, 0, :, 0, 0] = 1 - lesion[volume]
        target[volume, 0, :, 0, 0] = truth[volume]
        target[volume, 1, :, 0, 0] = 1 - truth[volume]
    valid = torch.ones(2, 1, 4, 1, 1, dtype=torch.float64)
    expected = (1 - (1 + 10) / (3 + 10)) / 2 + (1 - (5 + 10) / (7 + 10)) / 2
    assert overlap_risk(p, target, one, valid) == pytest.approx(expected)
    alone = [overlap_risk(p[k : k + 1], target[k : k + 1], one, valid[:1]) for k in range(2)]
    assert sum(alone) / 2 != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize('risk', [overlap_risk, cross_entropy])
def test_sums_over_processes_are_those_of_one_batch(risk):
    p, target, valid = logits(batch=2).detach().softmax(1), shares_of_one(batch=2), everywhere(2)
    valid[1, ..., 0] = 0
    expected = risk(p, target, SINGLE, valid)
    kept: list[Tensor] = []

    def keep(sums: Tensor) -> Tensor:
        kept.append(sums)
        return sums

    for k in range(2):
        risk(p[k : k + 1], target[k : k + 1], SINGLE, valid[k : k + 1], total=keep)
    first = p[:1], target[:1], SINGLE, valid[:1]
    assert risk(*first, total=lambda sums: sums + kept[1]) == pytest.approx(float(expected))


# ---------------------------------------------------------------------------------------------
# Weights and groups


def test_weights_are_derived_and_sum_to_one():
    weights = dict(zip(CLASSES, group_weights(SINGLE), strict=True))
    assert weights['L'] == 1 / 2
    assert {weights[name] for name in CLASSES if name != 'L'} == {1 / 14}
    for protocol in PROTOCOLS.values():
        assert sum(group_weights(protocol.atoms())) == pytest.approx(1)
    assert group_weights(PROTOCOLS['binary-lesion'].atoms()) == (1 / 2, 1 / 2)
    # Without lesions of their own, the tissues share all of it.
    assert group_weights(TISSUE_GROUPS) == (1 / 7,) * 7


def test_tissue_on_patients_takes_a_lesion_for_white_matter():
    assert frozenset({'WM', 'L'}) in TISSUE_GROUPS
    assert frozenset().union(*TISSUE_GROUPS) == ALL
    for a, b in itertools.combinations(TISSUE_GROUPS, 2):
        assert not a & b


def test_grouped_probabilities_sum_to_one():
    p = logits().detach().softmax(1)
    for groups in (SINGLE, TISSUE_GROUPS, PROTOCOLS['binary-lesion'].atoms()):
        assert torch.allclose(grouped(p, groups).sum(1), torch.ones(()).double())
    assert torch.equal(grouped(p, (frozenset({'WM', 'L'}),))[:, 0], p[:, 1] + p[:, 2])


# ---------------------------------------------------------------------------------------------
# What an annotation does not tell apart, it does not teach


def annotated(folder: Path, says: str | list[str], *tells: str) -> tuple[Tensor, Tensor, Groups]:
    """Return target, valid and groups of a window with each label of a protocol.

    `says` is its name, or the classes that each label of one's own may be.
    """
    if isinstance(says, list):
        lines = ['index\tclasses', *(f'{n}\t{names}' for n, names in enumerate(says))]
        (folder / 'own.tsv').write_text('\n'.join(lines))
        says = str(folder / 'own.tsv')
    source = Source('a', annotation='.', protocol=says, tells=tells)
    groups = source.labels.sets.values()
    values = torch.tensor(list(dict.fromkeys(bits(group) for group in groups)))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    cohort = Cohort(source, ())
    target, valid = shares(values[order % len(values)].reshape(SHAPE), cohort, 1)
    return target[None].double(), valid[None].double(), cohort.groups


# White matter of a patient may be a lesion.
TISSUE = ['BG', 'WM L', 'CGM', 'SGM', 'BS', 'CBM', 'VEN']
# CSF may be a ventricle or outside of the brain, where outside is annotated too.
OVERLAPPING = ['BG VEN', 'BG', 'WM L CGM SGM BS CBM']
OTHERS = [name for name in CLASSES if name != 'L']


@both_overlaps
@pytest.mark.parametrize(
    ('says', 'tells', 'alike'),
    [
        ('binary-lesion', [], OTHERS),
        ('wmh2017', [], OTHERS),
        ('jointseg', ['L'], OTHERS),
        (TISSUE, [], ['WM', 'L']),
        ('jointseg', ['BG', 'CGM', 'VEN'], ['WM', 'L', 'SGM', 'BS', 'CBM']),
    ],
    ids=['lesions only', 'wmh2017', 'tissue hidden', 'tissue only', 'some tissues'],
)
def test_no_gradient_to_a_distinction_that_nobody_annotated(tmp_path, overlap, says, tells, alike):
    target, valid, groups = annotated(tmp_path, says, *tells)
    raw = logits()
    p = raw.softmax(1)
    p.retain_grad()
    supervised_risk(p, target, groups, valid, overlap=overlap).backward()
    channels = [CLASSES.index(name) for name in alike]
    gradient = p.grad[:, channels]
    assert torch.equal(gradient, gradient[:, :1].expand_as(gradient))
    # But the annotation says something: between these classes and the others.
    other = [index for index in range(len(CLASSES)) if index not in channels]
    assert (p.grad[:, other] - gradient[:, :1]).abs().max() > 1e-3


def test_sets_that_overlap_have_the_probability_of_the_set(tmp_path):
    target, valid, groups = annotated(tmp_path, OVERLAPPING)
    assert set(groups) == {frozenset({'BG'}), frozenset({'VEN'}), ALL - {'BG', 'VEN'}}
    p = logits().detach().softmax(1)
    index = {name: CLASSES.index(name) for name in CLASSES}
    sums = {
        'csf': p[0, index['BG']] + p[0, index['VEN']],
        'rest': p[0, index['BG']],
        'white': 1 - p[0, index['BG']] - p[0, index['VEN']],
    }
    # Which label each voxel has, from the targets alone.
    kinds = {'rest': target[0, groups.index(frozenset({'BG'}))] > 0}
    kinds['white'] = target[0, groups.index(ALL - {'BG', 'VEN'})] > 0
    kinds['csf'] = ~(kinds['rest'] | kinds['white'])
    assert {name: int(where.sum()) for name, where in kinds.items()} == dict.fromkeys(kinds, 6)
    expected = -torch.cat([sums[name][where].log() for name, where in kinds.items()]).mean()
    assert cross_entropy(p, target, groups, valid) == pytest.approx(float(expected))


@both_overlaps
def test_sets_that_overlap_send_no_gradient_where_they_leave_it_open(tmp_path, overlap):
    target, valid, groups = annotated(tmp_path, OVERLAPPING)
    raw = logits()
    p = raw.softmax(1)
    p.retain_grad()
    supervised_risk(p, target, groups, valid, overlap=overlap).backward()
    ground, ventricle = p.grad[0, CLASSES.index('BG')], p.grad[0, CLASSES.index('VEN')]
    csf = valid[0, groups.index(frozenset({'VEN'}))] == 0
    assert csf.sum() == 6
    assert torch.equal(ground[csf], ventricle[csf])
    assert (ground[csf] != p.grad[0, 1][csf]).all()
    assert (ground[~csf] != ventricle[~csf]).any()


@both_overlaps
def test_ignored_voxels_send_no_gradient(overlap):
    raw, valid = logits(), everywhere()
    valid[..., 0] = 0
    target = torch.zeros(1, len(CLASSES), *SHAPE, dtype=torch.float64)
    target[:, 1] = 1
    target[..., 0] = 0
    supervised_risk(raw.softmax(1), target, SINGLE, valid, overlap=overlap).backward()
    assert raw.grad[..., 0].abs().max() == 0
    assert raw.grad[..., 1].abs().min() > 0


def test_a_window_that_nobody_annotated_has_no_risk():
    p, nothing = logits().detach().softmax(1), 0 * everywhere()
    target = torch.zeros(1, len(CLASSES), *SHAPE, dtype=torch.float64)
    assert supervised_risk(p, target, SINGLE, nothing) == 0
    assert supervised_risk(p, target, SINGLE, nothing.expand_as(target)) == 0


# ---------------------------------------------------------------------------------------------
# Cross-entropy


def test_cross_entropy_on_literals():
    p = torch.zeros(1, len(CLASSES), 2, 1, 1, dtype=torch.float64)
    p[0, :3, 0, 0, 0] = vector(0.5, 0.25, 0.25)
    p[0, :3, 1, 0, 0] = vector(0.2, 0.2, 0.6)
    target = torch.zeros_like(p)
    target[0, 1, 0, 0, 0] = 1
    target[0, 1:3, 1, 0, 0] = vector(0.5, 0.5)  # partial volume
    valid = torch.ones(1, 1, 2, 1, 1, dtype=torch.float64)
    bits_ = -torch.stack([vector(0.25).log(), (vector(0.2).log() + vector(0.6).log()) / 2])
    assert cross_entropy(p, target, SINGLE, valid) == pytest.approx(float(bits_.mean()))
    valid[:, :, 1] = 0
    assert cross_entropy(p, target, SINGLE, valid) == pytest.approx(float(bits_[0]))
    risk = supervised_risk(p, target, SINGLE, valid, entropy_weight=2.0)
    overlap = overlap_risk(p, target, SINGLE, valid)
    assert risk == pytest.approx(float(overlap + 2 * bits_[0]))
    assert supervised_risk(p, target, SINGLE, valid, entropy_weight=0) == overlap


def test_a_false_lesion_in_an_empty_volume_is_punished():
    raw = logits()
    target = torch.zeros(1, len(CLASSES), *SHAPE, dtype=torch.float64)
    target[:, 1] = 1
    for risk in (overlap_risk, cross_entropy):
        (gradient,) = torch.autograd.grad(risk(raw.softmax(1), target, SINGLE, everywhere()), raw)
        assert (gradient[:, LESION] > 0).all()


# ---------------------------------------------------------------------------------------------
# Agreement


def test_agreement_ignores_the_split_of_white_matter():
    p = logits().detach().softmax(1)
    moved = p.clone()
    moved[:, 1], moved[:, 2] = p[:, 1] + p[:, 2], 0
    assert consistency_risk(p, moved) == pytest.approx(0, abs=1e-9)
    assert consistency_risk(p, shares_of_one()) > 0.01


@both_overlaps
def test_spared_voxels_are_left_out_of_the_agreement(overlap):
    some, other = logits(), logits(1).detach().softmax(1)
    spared = 0 * everywhere()
    spared[:, :, 0] = 1
    risk = consistency_risk(other, some.softmax(1), spared, overlap=overlap)
    risk.backward()
    risk = risk.detach()
    assert some.grad[:, :, 0].abs().max() == 0
    assert some.grad[:, :, 1].abs().max() > 0
    assert consistency_risk(other, some.softmax(1), 1 + 0 * spared) == 0
    p = some.detach().softmax(1)
    assert consistency_risk(other, p) == consistency_risk(other, p, 0 * spared)
    assert float(risk) != pytest.approx(float(consistency_risk(other, p, overlap=overlap)))


def test_a_detached_answer_learns_nothing_and_teaches_the_same():
    both, some = logits(), logits(1)
    consistency_risk(both.softmax(1).detach(), some.softmax(1)).backward()
    assert both.grad is None
    alone = some.grad.clone()
    some.grad = None
    consistency_risk(both.softmax(1), some.softmax(1)).backward()
    assert both.grad.abs().max() > 0
    assert torch.equal(some.grad, alone)


# ---------------------------------------------------------------------------------------------
# Gradients against finite differences


@both_overlaps
@pytest.mark.parametrize('says', ['jointseg', 'binary-lesion', OVERLAPPING])
def test_gradients_of_the_labelled_risk(tmp_path, overlap, says):
    target, valid, groups = annotated(tmp_path, says)
    for entropy_weight in (0.0, 1.0):
        assert torch.autograd.gradcheck(
            lambda raw, weight=entropy_weight: supervised_risk(
                raw.softmax(1), target, groups, valid, overlap=overlap, entropy_weight=weight
            ),
            logits(),
        )


def test_gradients_of_the_cross_entropy_with_partial_volume():
    target, valid = shares_of_one(), everywhere()
    valid[:, :, 0] = 0
    assert torch.autograd.gradcheck(
        lambda raw: cross_entropy(raw.softmax(1), target, SINGLE, valid), logits()
    )


@both_overlaps
def test_gradients_of_the_agreement_to_both_of_its_sides(overlap):
    spared = 0 * everywhere()
    spared[:, :, 0] = 1
    assert torch.autograd.gradcheck(
        lambda a, b: consistency_risk(a.softmax(1), b.softmax(1), spared, overlap=overlap),
        (logits(), logits(1)),
    )
