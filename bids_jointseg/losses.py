r"""The risk of the joint problem, from annotations that each cover a part of it.

Dorent et al. (MIDL 2019): with labels :math:`y = y^t + y^l`, and tissue annotated on control
T1w scans only,

.. math:: R = R^l + R^t \le R^l + R^t_1 + R^t_2, \qquad
    R^t_1 = E_{lesion}[L^t(h(T1, FLAIR), h(T1))], \quad R^t_2 = E_{control}[L^t(h(T1), y^t)]

The bound needs a loss that obeys the triangle inequality. The probabilistic Jaccard of the
paper's equation 6 does not (`a = 1/4, b = 1/2, c = 1` gives `9/13 > 1/3 + 1/3`); it holds with
a factor of two. The Soergel form is a metric and equals it on binary maps: the default here.

Every function takes probabilities `p` `(B, C, X, Y, Z)`. What an annotation says is a tuple of
disjoint *groups* of classes, the share `t` of each `(B, G, X, Y, Z)`, and the voxels at which
it says what share that is: `valid`, `(B, G, X, Y, Z)` or, the same for all groups,
`(B, 1, X, Y, Z)`. A voxel that may be of several groups has `t = 0` and `valid = 0` for these
and `valid = 1` for the others: losses follow from the sets alone.

An overlap is a ratio of sums over the whole batch, so a volume without lesions weighs as little
as it should. Where a batch is spread over processes, `total` adds the sums up first: the mean of
the processes' losses would be another loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bids_jointseg.labels import CLASSES, TISSUES

Groups = Sequence[frozenset[str]]
Overlap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Total = Callable[[Tensor], Tensor]

EPSILON = 10.0
"""Voxels added to the numerator and denominator of an overlap: one more coordinate on which
both agree, so that Soergel stays a metric, empty against empty gives 0, and a false positive of
a few voxels in an empty volume still has a gradient."""

TISSUE_GROUPS: Groups = (
    frozenset({'BG'}),
    frozenset({'WM', 'L'}),
    *(frozenset({name}) for name in TISSUES if name != 'WM'),
)
"""What tissue means on patients: a lesion is white matter."""


def soergel(p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\sum\min(p, g)` and :math:`\sum\max(p, g)`.

    One minus their ratio is a metric on non-negative vectors.

    Parameters
    ----------
    p, g
        `(..., N)`, non-negative.

    Returns
    -------
    tuple[Tensor, Tensor]
        `(...)` each.
    """
    return torch.minimum(p, g).sum(-1), torch.maximum(p, g).sum(-1)


def tanimoto(p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`<p, g>` and :math:`|p|^2 + |g|^2 - <p, g>`, of equation 6 of the paper.

    One minus their ratio is not a metric: the triangle inequality holds with a factor of 2.

    Parameters
    ----------
    p, g
        `(..., N)`, non-negative.

    Returns
    -------
    tuple[Tensor, Tensor]
        `(...)` each.
    """
    both = (p * g).sum(-1)
    return both, (p * p).sum(-1) + (g * g).sum(-1) - both


OVERLAPS: dict[str, Overlap] = {'soergel': soergel, 'tanimoto': tanimoto}


def distance(sums: tuple[Tensor, Tensor], epsilon: float = EPSILON) -> Tensor:
    r"""Return the Jaccard distance :math:`1 - (n + \epsilon) / (d + \epsilon)`, from 0 to 1."""
    numerator, denominator = sums
    return 1 - (numerator + epsilon) / (denominator + epsilon)


def alone(sums: Tensor) -> Tensor:
    """Return the sums of a batch that one process holds: themselves."""
    return sums


def membership(groups: Groups, like: Tensor) -> Tensor:
    """Return `(G, C)`: 1 where class `c` belongs to group `g`."""
    rows = [[float(name in group) for name in CLASSES] for group in groups]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def grouped(p: Tensor, groups: Groups) -> Tensor:
    """Return the summed probability of each group, `(B, G, X, Y, Z)`."""
    if len(groups) == len(CLASSES):
        return p
    return torch.einsum('gc,bc...->bg...', membership(groups, p), p)


def group_weights(groups: Groups) -> tuple[float, ...]:
    """Return the weight of each group in an overlap loss; they sum to one.

    Half for the lesions, half shared by the others (background included). Where only one of the
    two sides is told apart, it takes all of the weight.
    """
    lesion = [group == {'L'} for group in groups]
    sides = len(set(lesion))
    return tuple(1 / sides / lesion.count(kind) for kind in lesion)


def overlap_risk(
    p: Tensor,
    target: Tensor,
    groups: Groups,
    valid: Tensor,
    *,
    overlap: Overlap = soergel,
    total: Total = alone,
) -> Tensor:
    r"""Return :math:`\sum_g w_g d(p_g, t_g)` over the valid voxels of the batch.

    Parameters
    ----------
    p
        Probabilities `(B, C, X, Y, Z)`.
    target
        Share of each group `(B, G, X, Y, Z)`.
    groups
        Disjoint groups of classes.
    valid
        `(B, G, X, Y, Z)` or `(B, 1, X, Y, Z)`: 0 where the annotation does not tell the share.
    overlap
        :func:`soergel` or :func:`tanimoto`.
    total
        Adds sums up over processes.

    Returns
    -------
    Tensor
        Scalar.
    """
    weights = torch.tensor(group_weights(groups), dtype=p.dtype, device=p.device)
    found, truth = ((x * valid).transpose(0, 1).flatten(1) for x in (grouped(p, groups), target))
    numerator, denominator = total(torch.stack(overlap(found, truth)))
    risk: Tensor = (distance((numerator, denominator)) * weights).sum()
    return risk


def cross_entropy(
    p: Tensor, target: Tensor, groups: Groups, valid: Tensor, *, total: Total = alone
) -> Tensor:
    r"""Return the mean over annotated voxels of the cross-entropy between sets of groups.

    .. math:: -\sum_g v_g t_g \log p_g - (1 - \sum_g v_g t_g) \log \sum_g (1 - v_g) p_g

    The second term is for voxels that may be of several groups, those with :math:`v_g = 0`; it
    is zero where nothing or everything is known. The overlap of an empty class has no gradient
    where it is 1; this one always does.
    """
    found = grouped(p, groups)
    valid = valid.expand_as(target)
    known = (target * valid).sum(1)
    open_ = ((1 - valid) * found).sum(1)
    bits = (target * valid * found.clamp_min(1e-6).log()).sum(1)
    # Where all groups are open nothing is said: log 1 = 0, but for rounding.
    some = valid.amax(1)
    bits = bits + (1 - known) * some * torch.where(known < 1, open_, 1).clamp_min(1e-6).log()
    numerator, count = total(torch.stack([-bits.sum(), some.sum()]))
    mean: Tensor = numerator / count.clamp_min(1)
    return mean


def supervised_risk(
    p: Tensor,
    target: Tensor,
    groups: Groups,
    valid: Tensor,
    *,
    overlap: Overlap = soergel,
    entropy_weight: float = 1.0,
    total: Total = alone,
) -> Tensor:
    r"""Return :math:`R^l` or :math:`R^t_2`: overlap loss plus weighted cross-entropy; see both."""
    risk = overlap_risk(p, target, groups, valid, overlap=overlap, total=total)
    if entropy_weight:
        risk = risk + entropy_weight * cross_entropy(p, target, groups, valid, total=total)
    return risk


def consistency_risk(
    p_all: Tensor,
    p_some: Tensor,
    spared: Tensor | None = None,
    *,
    overlap: Overlap = soergel,
    total: Total = alone,
) -> Tensor:
    r"""Return :math:`R^t_1 = L^t(h(T1, FLAIR), h(T1))`, which needs no labels.

    Parameters
    ----------
    p_all, p_some
        Probabilities `(B, C, X, Y, Z)` from all modalities and from a subset of them. Detach
        the first for a risk that teaches the subset only.
    spared
        `(B, 1, X, Y, Z)`, 1 at voxels that are left out: lesions, where the answer from all
        modalities should not be pulled towards a guess without FLAIR. None leaves out nothing.
    overlap, total
        As in :func:`overlap_risk`.

    Returns
    -------
    Tensor
        Scalar.
    """
    target = grouped(p_all, TISSUE_GROUPS)
    valid = torch.ones_like(p_all[:, :1]) if spared is None else 1 - spared
    return overlap_risk(p_some, target, TISSUE_GROUPS, valid, overlap=overlap, total=total)
