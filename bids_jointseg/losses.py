r"""The risk of the joint problem, from annotations that each cover a part of it.

Dorent et al. (MIDL 2019): with labels :math:`y = y^t + y^l`, and tissue annotated on control
T1w scans only,

.. math:: R = R^l + R^t \le R^l + R^t_1 + R^t_2, \qquad
    R^t_1 = E_{lesion}[L^t(h(T1, FLAIR), h(T1))], \quad R^t_2 = E_{control}[L^t(h(T1), y^t)]

The bound needs a loss that obeys the triangle inequality. The probabilistic Jaccard of the
paper's equation 6 does not (`a = 1/4, b = 1/2, c = 1` gives `9/13 > 1/3 + 1/3`); it holds with
a factor of two. The Soergel form is a metric and equals it on binary maps: the default here.

Every function takes probabilities `(B, C, X, Y, Z)`; what an annotation says is a tuple of
disjoint *groups* of classes and the share of each, `(B, G, X, Y, Z)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bids_jointseg.labels import CLASSES, TISSUES

Groups = Sequence[frozenset[str]]
Overlap = Callable[[Tensor, Tensor], Tensor]

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


def soergel(p: Tensor, g: Tensor, epsilon: float = EPSILON) -> Tensor:
    r"""Return :math:`1 - \sum\min(p, g) / \sum\max(p, g)`, a metric on non-negative vectors.

    Parameters
    ----------
    p, g
        `(..., N)`, non-negative.

    Returns
    -------
    Tensor
        `(...)`, between 0 and 1.
    """
    low = torch.minimum(p, g).sum(-1)
    high = torch.maximum(p, g).sum(-1)
    return 1 - (low + epsilon) / (high + epsilon)


def tanimoto(p: Tensor, g: Tensor, epsilon: float = EPSILON) -> Tensor:
    r"""Return :math:`1 - <p, g> / (|p|^2 + |g|^2 - <p, g>)`, equation 6 of the paper.

    Not a metric: it obeys the triangle inequality with a factor of 2.

    Parameters
    ----------
    p, g
        `(..., N)`, non-negative.

    Returns
    -------
    Tensor
        `(...)`, between 0 and 1.
    """
    both = (p * g).sum(-1)
    return 1 - (both + epsilon) / ((p * p).sum(-1) + (g * g).sum(-1) - both + epsilon)


def membership(groups: Groups, like: Tensor) -> Tensor:
    """Return `(G, C)`: 1 where class `c` belongs to group `g`."""
    rows = [[float(name in group) for name in CLASSES] for group in groups]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def grouped(p: Tensor, groups: Groups) -> Tensor:
    """Return the summed probability of each group, `(B, G, X, Y, Z)`."""
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
    p: Tensor, target: Tensor, groups: Groups, valid: Tensor, overlap: Overlap = soergel
) -> Tensor:
    """Return the weighted overlap loss over the groups.

    Parameters
    ----------
    p
        Probabilities `(B, C, X, Y, Z)`.
    target
        Share of each group `(B, G, X, Y, Z)`.
    groups
        Disjoint groups of classes.
    valid
        `(B, 1, X, Y, Z)`: 0 where the annotation says nothing.
    overlap
        :func:`soergel` or :func:`tanimoto`.

    Returns
    -------
    Tensor
        Scalar.
    """
    weights = torch.tensor(group_weights(groups), device=p.device)
    value = overlap((grouped(p, groups) * valid).flatten(2), (target * valid).flatten(2))
    return (value * weights).sum(1).mean()


def cross_entropy(p: Tensor, target: Tensor, groups: Groups, valid: Tensor) -> Tensor:
    """Return the mean over annotated voxels of the cross-entropy between groups.

    The overlap of an empty class has no gradient where it is 1; this one always does.
    """
    likelihood = grouped(p, groups).clamp_min(1e-6).log()
    return -(target * likelihood * valid).sum() / valid.sum().clamp_min(1)


def supervised_risk(
    p: Tensor, target: Tensor, groups: Groups, valid: Tensor, overlap: Overlap = soergel
) -> Tensor:
    r"""Return :math:`R^l` or :math:`R^t_2`: overlap loss plus cross-entropy; see both."""
    return overlap_risk(p, target, groups, valid, overlap) + cross_entropy(
        p, target, groups, valid
    )


def consistency_risk(
    p_all: Tensor, p_some: Tensor, lesion: Tensor, overlap: Overlap = soergel
) -> Tensor:
    r"""Return :math:`R^t_1 = L^t(h(T1, FLAIR), h(T1))`, which needs no labels.

    Lesion voxels are left out: the bound is about tissue, and there the answer from all
    modalities should not be pulled towards a guess without FLAIR.

    Parameters
    ----------
    p_all, p_some
        Probabilities `(B, C, X, Y, Z)` from all modalities and from a subset of them.
    lesion
        `(B, 1, X, Y, Z)`: 1 where a lesion is annotated, or believed where nothing is.

    Returns
    -------
    Tensor
        Scalar.
    """
    target = grouped(p_all, TISSUE_GROUPS)
    return overlap_risk(p_some, target, TISSUE_GROUPS, 1 - lesion, overlap)
