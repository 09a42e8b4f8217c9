"""The mathematics of the risk, on numbers that can be checked by hand."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bids_jointseg.labels import CLASSES, PROTOCOLS
from bids_jointseg.losses import (
    TISSUE_GROUPS,
    consistency_risk,
    cross_entropy,
    group_weights,
    grouped,
    overlap_risk,
    soergel,
    supervised_risk,
    tanimoto,
)

GROUPS = tuple(frozenset({name}) for name in CLASSES)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_papers_loss_breaks_the_triangle_inequality():
    a, b, c = vector(0.25), vector(0.5), vector(1.0)
    assert tanimoto(a, c, 0) == pytest.approx(9 / 13)
    assert tanimoto(a, b, 0) == pytest.approx(1 / 3)
    assert tanimoto(b, c, 0) == pytest.approx(1 / 3)
    assert tanimoto(a, c, 0) > tanimoto(a, b, 0) + tanimoto(b, c, 0)


def test_soergel_and_tanimoto_on_literals():
    p, g = vector(1, 0.5, 0), vector(1, 1, 0.5)
    assert soergel(p, g, 0) == pytest.approx(1 - 1.5 / 2.5)
    assert tanimoto(p, g, 0) == pytest.approx(1 - 1.5 / (1.25 + 2.25 - 1.5))
    # The same epsilon above and below: empty against empty is perfect.
    assert soergel(vector(0, 0), vector(0, 0), 1) == 0
    assert soergel(p, g, 1) == pytest.approx(1 - 2.5 / 3.5)


def test_both_are_the_jaccard_distance_of_binary_maps():
    p, g = vector(1, 1, 1, 0, 0), vector(0, 1, 1, 1, 0)
    assert soergel(p, g, 0) == tanimoto(p, g, 0) == pytest.approx(0.5)


probabilities = arrays('float64', 5, elements=st.floats(0, 1))


@given(probabilities, probabilities, probabilities, st.floats(1e-3, 10))
def test_soergel_is_a_metric(a, b, c, epsilon):
    a, b, c = (torch.from_numpy(x.copy()) for x in (a, b, c))
    assert soergel(a, a, epsilon) == pytest.approx(0, abs=1e-12)
    assert soergel(a, b, epsilon) == pytest.approx(float(soergel(b, a, epsilon)))
    assert soergel(a, c, epsilon) <= soergel(a, b, epsilon) + soergel(b, c, epsilon) + 1e-12


@given(probabilities, probabilities, probabilities, st.floats(1e-3, 10))
def test_tanimoto_obeys_the_triangle_inequality_with_a_factor_of_two(a, b, c, epsilon):
    a, b, c = (torch.from_numpy(x.copy()) for x in (a, b, c))
    bound = 2 * (tanimoto(a, b, epsilon) + tanimoto(b, c, epsilon))
    assert tanimoto(a, c, epsilon) <= bound + 1e-12


def test_weights_are_derived_and_sum_to_one():
    weights = dict(zip(CLASSES, group_weights(GROUPS), strict=True))
    assert weights['L'] == 1 / 2
    assert {weights[name] for name in CLASSES if name != 'L'} == {1 / 14}
    for protocol in PROTOCOLS.values():
        assert sum(group_weights(protocol.groups())) == pytest.approx(1)
    assert group_weights(PROTOCOLS['binary-lesion'].groups()) == (1 / 2, 1 / 2)
    assert sum(group_weights(TISSUE_GROUPS)) == pytest.approx(1)


def logits(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(1, len(CLASSES), 3, 3, 2, generator=generator, dtype=torch.float64)
    return draw.requires_grad_()


def test_an_annotation_of_lesions_alone_does_not_tell_tissues_apart():
    groups = PROTOCOLS['binary-lesion'].groups()
    raw = logits()
    p = raw.softmax(1)
    lesion = (torch.rand(1, 1, 3, 3, 2, dtype=torch.float64) > 0.5).double()
    target = torch.cat([lesion if group == {'L'} else 1 - lesion for group in groups], dim=1)
    supervised_risk(p, target, groups, torch.ones_like(lesion)).backward()
    # Moving probability between two tissues must not change the risk: their gradients with
    # respect to the probabilities are equal, so those of the logits are proportional to p.
    tissue = [i for i, name in enumerate(CLASSES) if name != 'L']
    ratio = (raw.grad / p.detach())[:, tissue]
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))
    assert ratio.abs().max() > 0


def test_ignored_voxels_send_no_gradient():
    raw = logits()
    target = torch.zeros(1, len(CLASSES), 3, 3, 2, dtype=torch.float64)
    target[:, 1] = 1
    valid = torch.ones(1, 1, 3, 3, 2, dtype=torch.float64)
    valid[..., 0] = 0
    supervised_risk(raw.softmax(1), target, GROUPS, valid).backward()
    assert raw.grad[..., 0].abs().max() == 0
    assert raw.grad[..., 1].abs().min() > 0


def test_a_false_lesion_in_an_empty_volume_is_punished():
    raw = logits()
    target = torch.zeros(1, len(CLASSES), 3, 3, 2, dtype=torch.float64)
    target[:, 1] = 1
    valid = torch.ones(1, 1, 3, 3, 2, dtype=torch.float64)
    cross_entropy(raw.softmax(1), target, GROUPS, valid).backward()
    assert (raw.grad[:, CLASSES.index('L')] > 0).all()


@pytest.mark.parametrize('overlap', [soergel, tanimoto])
def test_gradients_agree_with_differences(overlap):
    target = torch.softmax(logits(1).detach(), 1)
    valid = torch.ones(1, 1, 3, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda raw: overlap_risk(raw.softmax(1), target, GROUPS, valid, overlap), logits()
    )


def test_agreement_ignores_lesion_voxels_and_the_split_of_white_matter():
    p = logits().detach().softmax(1)
    none = torch.zeros(1, 1, 3, 3, 2, dtype=torch.float64)
    moved = p.clone()
    moved[:, 1], moved[:, 2] = p[:, 1] + p[:, 2], 0
    assert consistency_risk(p, moved, none) == pytest.approx(0, abs=1e-9)
    other = logits(1).detach().softmax(1)
    assert consistency_risk(p, other, none) > 0
    assert consistency_risk(p, other, none + 1) == pytest.approx(0, abs=1e-9)


def test_grouped_probabilities_sum_to_one():
    p = logits().softmax(1)
    for groups in (GROUPS, TISSUE_GROUPS):
        assert torch.allclose(grouped(p, groups).sum(1), torch.ones(1, 3, 3, 2).double())
    for a, b in itertools.combinations(TISSUE_GROUPS, 2):
        assert not a & b
