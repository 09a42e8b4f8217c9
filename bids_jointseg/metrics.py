r"""Agreement of two segmentations, and statistics of it over a cohort.

Every measure of one pair takes ``found`` and ``truth``: masks (X, Y, Z) of one shape, true where
not zero, on one grid. Those of distance take ``spacing_mm`` too. A measure is in the unit of
those who defined it: Dice, Jaccard and the volume difference in per cent, distances in mm, the
rest as fractions. It is NaN where it is undefined, above all where both masks are empty; the
cohort's statistics leave NaNs out and count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import scipy  # whose stats takes a quarter of a second, once it is used
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, spatial

from bids_jointseg.labels import LABELS

# ---------------------------------------------------------------------------------------------
# Overlap


def dice_of(found: NDArray[Any], truth: NDArray[Any]) -> float:
    r"""Return the Dice of two masks, in per cent: :math:`200 |A \cap B| / (|A| + |B|)`.

    NaN where both are empty, 0 where one is. ValueError if the shapes differ. Dice, Ecology
    1945; the WMH and MRBrainS18 challenges give it as a fraction.
    """
    a, b = _masks(found, truth)
    size = _count(a) + _count(b)
    return 200 * _count(a & b) / size if size else nan


def jaccard_of(found: NDArray[Any], truth: NDArray[Any]) -> float:
    r"""Return the Jaccard index of two masks, in per cent: :math:`100 |A \cap B| / |A \cup B|`.

    NaN where both are empty, 0 where one is. ValueError if the shapes differ. Jaccard, New
    Phytologist 1912; with both as fractions :math:`J = D / (2 - D)`.
    """
    a, b = _masks(found, truth)
    size = _count(a | b)
    return 100 * _count(a & b) / size if size else nan


def dice(
    found: NDArray[np.integer],
    truth: NDArray[np.integer],
    *,
    valid: NDArray[np.bool_] | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return the Dice of each class, in per cent; NaN where both are empty.

    Parameters
    ----------
    found, truth
        Label maps with the indices of :mod:`bids_jointseg.labels`, of one shape.
    valid
        Voxels that count; all by default.
    classes
        Abbreviations; every class but the background by default.

    Returns
    -------
    dict[str, float]
        Abbreviation -> Dice, see :func:`dice_of`.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    _same_shape(found, truth)
    if valid is not None:
        found, truth = found[valid], truth[valid]
    return {
        label.abbreviation: dice_of(found == label.index, truth == label.index)
        for label in LABELS[1:]
        if classes is None or label.abbreviation in classes
    }


# ---------------------------------------------------------------------------------------------
# Surfaces


def surface_distances(
    found: NDArray[Any], truth: NDArray[Any], spacing_mm: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return how far each surface voxel of one mask lies from the surface of the other.

    .. math:: d(a, B) = \min_{b \in \partial B} \lVert s \odot (a - b) \rVert_2 ,
              \quad a \in \partial A

    The surface :math:`\partial A` are the voxels of A with a face on the outside of A (the
    outside of the image included, so padding changes nothing). Distances are between voxel
    centres; :math:`s` is the spacing. Each surface voxel counts once, whatever the area of its
    faces. The WMH and MRBrainS18 challenges draw the surface within axial slices only, without
    the voxels whose faces are on the next slice: close to these distances, but not the same.

    Parameters
    ----------
    found, truth
        Masks of one shape.
    spacing_mm
        Of each axis.

    Returns
    -------
    from_found, from_truth
        Distances in mm from the surface of `found` to that of `truth`, and back; one value for
        each surface voxel. Both are empty where either mask is.

    Raises
    ------
    ValueError
        If the shapes differ, or the spacing does not suit them.
    """
    a, b = _cropped(*_masks(found, truth))
    spacing = _spacing(spacing_mm, a.ndim)
    if not (a.any() and b.any()):
        return np.empty(0), np.empty(0)
    points = [np.argwhere(_surface(mask)) * spacing for mask in (a, b)]
    # A tree on a regular grid of points is as quick unbalanced, and built several times faster.
    trees = [spatial.KDTree(p, balanced_tree=False, compact_nodes=False) for p in points]
    from_found, _ = trees[1].query(points[0])
    from_truth, _ = trees[0].query(points[1])
    return np.asarray(from_found), np.asarray(from_truth)


def hausdorff95(found: NDArray[Any], truth: NDArray[Any], spacing_mm: Sequence[float]) -> float:
    r"""Return the 95 % Hausdorff distance in mm.

    .. math:: \max \{ P_{95}[d(a, B)],\ P_{95}[d(b, A)] \}

    The larger of the two directed percentiles (not the percentile of both together), as in the
    WMH (Kuijf et al., IEEE TMI 2019) and MRBrainS18 challenges, with linear interpolation
    between ranks. NaN where either mask is empty. Surfaces and errors of
    :func:`surface_distances`.
    """
    directed = surface_distances(found, truth, spacing_mm)
    return max(float(np.percentile(d, 95)) for d in directed) if len(directed[0]) else nan


def average_surface_distance(
    found: NDArray[Any], truth: NDArray[Any], spacing_mm: Sequence[float]
) -> float:
    r"""Return the average symmetric surface distance in mm.

    .. math:: \Big( \sum_a d(a, B) + \sum_b d(b, A) \Big) /
              \big( |\partial A| + |\partial B| \big)

    Heimann et al., IEEE TMI 2009. NaN where either mask is empty. Surfaces and errors of
    :func:`surface_distances`.
    """
    both = np.concatenate(surface_distances(found, truth, spacing_mm))
    return float(both.mean()) if len(both) else nan


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the voxels of `mask` with a face on its outside, or on that of the image."""
    padded = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(mask.ndim):
        for step in (-1, 1):
            # The padding keeps what wraps around false.
            moved = np.roll(padded, step, axis)
            inside &= moved[(slice(1, -1),) * mask.ndim]
    return mask & ~inside


# ---------------------------------------------------------------------------------------------
# Volumes


def volume_mm3(mask: NDArray[Any], spacing_mm: Sequence[float]) -> float:
    """Return the volume of a mask: the number of voxels that are not zero times that of one."""
    return _count(mask) * float(np.prod(_spacing(spacing_mm, mask.ndim)))


def absolute_volume_difference(found: NDArray[Any], truth: NDArray[Any]) -> float:
    r"""Return the absolute volume difference, in per cent: :math:`100 |V_A - V_B| / V_B`.

    :math:`B` is the truth, so it is not symmetric and has no upper bound. NaN where the truth is
    empty, where the WMH challenge (Kuijf et al., IEEE TMI 2019) divides by zero. ValueError if
    the shapes differ.
    """
    a, b = map(_count, _masks(found, truth))
    return 100 * abs(a - b) / b if b else nan


def volumetric_similarity(found: NDArray[Any], truth: NDArray[Any]) -> float:
    r"""Return the volumetric similarity, 0 to 1: :math:`1 - |V_A - V_B| / (V_A + V_B)`.

    As in MRBrainS18 (and Taha and Hanbury, BMC Medical Imaging 2015). NaN where both are empty,
    0 where one is. ValueError if the shapes differ.
    """
    a, b = map(_count, _masks(found, truth))
    return 1 - abs(a - b) / (a + b) if a + b else nan


# ---------------------------------------------------------------------------------------------
# Lesions


@dataclass(frozen=True)
class LesionWise:
    """How many lesions were found, and how many of those found are lesions; all as fractions.

    Attributes
    ----------
    n_truth, n_found
        Lesions of each side that count.
    recall, precision, f1
        The corrected measures of :func:`lesion_wise`.
    challenge_recall, challenge_precision, challenge_f1
        Those of the WMH challenge's `evaluation.py` as it stands.
    challenge_early_precision, challenge_early_f1
        Those of its first version, which many papers' numbers were made with.
    """

    n_truth: int
    n_found: int
    recall: float
    precision: float
    f1: float
    challenge_recall: float
    challenge_precision: float
    challenge_f1: float
    challenge_early_precision: float
    challenge_early_f1: float


def lesion_wise(
    found: NDArray[Any],
    truth: NDArray[Any],
    spacing_mm: Sequence[float],
    *,
    overlap: float = 0.1,
    minimal_mm3: float = 0.0,
) -> LesionWise:
    r"""Return recall, precision and F1 of the lesions, not of the voxels.

    A lesion is a group of voxels that touch at least at a corner (26-connected, the challenge's
    `SetFullyConnected`). With the lesions :math:`t_i` of the truth T and :math:`f_j` of the
    found mask F, and :math:`[\cdot]` one where true:

    .. math:: R = \frac{1}{n_T} \sum_i [\, |t_i \cap F| \ge o |t_i| \,], \quad
              P = \frac{1}{n_F} \sum_j [\, |f_j \cap T| \ge o |f_j| \,], \quad
              F_1 = \frac{2 R P}{R + P}

    where at least one voxel must be shared whatever the `overlap` :math:`o`. Each side counts
    its own lesions, so all three are within 0 and 1. R is NaN where the truth is empty, P where
    nothing was found; F1 is 0 where one side is empty and NaN where both are. A smallest
    overlap is also what the MSSEG challenge asks for (Commowick et al., Scientific Reports
    2018), beside conditions on how lesions split and merge that are left out here.

    The WMH challenge (Kuijf et al., IEEE TMI 2019; github.com/hjkuijf/wmhchallenge) asks for one
    shared voxel instead:

    - ``challenge_*``: as above with :math:`o = 0`; R is 1 where the truth is empty, P is 1 where
      nothing was found, and F1 is 0 where R + P is. One blob over the whole brain gets 1 in all
      three, and an empty mask a perfect precision.
    - ``challenge_early_*``: its first version divided the *true* lesions that were touched by
      the number *found*. One blob that joins k lesions gets :math:`P = k` and
      :math:`F_1 = 2k / (k + 1)`, above 1, and a lesion found in k pieces :math:`P = 1 / k`. It
      divided by zero where either mask was empty or nothing was touched: NaN here. Its recall
      was ``challenge_recall``.

    Parameters
    ----------
    found, truth
        Masks of one shape. Leave voxels that do not count (the challenge's label 2) out of both.
    spacing_mm
        Of each axis; only `minimal_mm3` depends on it.
    overlap
        Fraction of a lesion that the other side must share.
    minimal_mm3
        A smaller lesion does not count on its own side, though it may confirm one of the other.
        The challenge's measures count all.

    Raises
    ------
    ValueError
        If the shapes differ, or the spacing does not suit them.
    """
    a, b = _cropped(*_masks(found, truth))
    voxel_mm3 = float(np.prod(_spacing(spacing_mm, a.ndim)))
    found_size, found_shared = _components(a, b)
    truth_size, truth_shared = _components(b, a)

    found_counts = found_size * voxel_mm3 >= minimal_mm3
    truth_counts = truth_size * voxel_mm3 >= minimal_mm3
    found_hit = (found_shared > 0) & (found_shared >= overlap * found_size)
    truth_hit = (truth_shared > 0) & (truth_shared >= overlap * truth_size)
    recall = _fraction(truth_hit[truth_counts])
    precision = _fraction(found_hit[found_counts])
    if np.isnan(recall) and np.isnan(precision):
        f1 = nan
    else:
        f1 = _harmonic(float(np.nan_to_num(recall)), float(np.nan_to_num(precision)))

    challenge_recall = _fraction(truth_shared > 0, empty=1.0)
    challenge_precision = _fraction(found_shared > 0, empty=1.0)
    touched = _count(truth_shared)
    early_precision = touched / len(found_size) if len(found_size) and len(truth_size) else nan
    return LesionWise(
        n_truth=int(truth_counts.sum()),
        n_found=int(found_counts.sum()),
        recall=recall,
        precision=precision,
        f1=f1,
        challenge_recall=challenge_recall,
        challenge_precision=challenge_precision,
        challenge_f1=_harmonic(challenge_recall, challenge_precision),
        challenge_early_precision=early_precision,
        challenge_early_f1=_harmonic(challenge_recall, early_precision) if touched else nan,
    )


def _components(
    mask: NDArray[np.bool_], other: NDArray[np.bool_]
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Return the voxels of each 26-connected component, and how many of them lie in `other`."""
    parts, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    size = np.bincount(parts[mask], minlength=count + 1)[1:]
    return size, np.bincount(parts[mask & other], minlength=count + 1)[1:]


def _fraction(hits: NDArray[np.bool_], empty: float = nan) -> float:
    return float(hits.mean()) if len(hits) else empty


def _harmonic(recall: float, precision: float) -> float:
    total = recall + precision
    return 2 * recall * precision / total if total else 0.0


# ---------------------------------------------------------------------------------------------
# Statistics

Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """A sample without its NaNs: their number, and those left; `ci` is 95 % of the mean."""

    n: int
    missing: int
    mean: float
    sd: float
    median: float
    ci: Interval


def summary(values: ArrayLike) -> Summary:
    r"""Return mean, SD, median and the mean's 95 % confidence interval; NaNs are left out.

    .. math:: \bar x \pm t_{0.975,\, n-1}\, s / \sqrt n , \quad
              s^2 = \sum_i (x_i - \bar x)^2 / (n - 1)

    Mean and median are NaN for n = 0, SD and interval (Student's t) for n < 2.
    """
    given = np.asarray(values, dtype=float).ravel()
    x = given[~np.isnan(given)]
    n = len(x)
    mean, median = (float(x.mean()), float(np.median(x))) if n else (nan, nan)
    sd = float(x.std(ddof=1)) if n > 1 else nan
    return Summary(n, len(given) - n, mean, sd, median, _student(mean, sd / max(n, 1) ** 0.5, n))


@dataclass(frozen=True)
class BlandAltman:
    """Bias of a against b, and the limits that hold 95 % of the differences; each with 95 % CI."""

    n: int
    missing: int
    bias: float
    sd: float
    lower: float
    upper: float
    bias_ci: Interval
    lower_ci: Interval
    upper_ci: Interval


def bland_altman(a: ArrayLike, b: ArrayLike) -> BlandAltman:
    r"""Return bias and limits of agreement of two ways to measure one thing, with intervals.

    .. math:: d = a - b, \quad \bar d \pm 1.96 s, \quad
              \mathrm{SE}(\bar d)^2 = \frac{s^2}{n}, \quad
              \mathrm{SE}(\bar d \pm 1.96 s)^2 =
              \Big( \frac 1 n + \frac{1.96^2}{2 (n - 1)} \Big) s^2

    and the 95 % intervals by Student's t with n - 1 degrees of freedom (Bland and Altman,
    Statistical Methods in Medical Research 1999, 8:135-160). The bias is positive where a is the
    larger. Pairs with a NaN are left out. All but the bias is NaN for n < 2.

    Raises
    ------
    ValueError
        If the samples do not have one length.
    """
    difference = summary(_differences(a, b))
    n, bias, sd = difference.n, difference.mean, difference.sd
    lower, upper = bias - 1.96 * sd, bias + 1.96 * sd
    error = sd * (1 / n + 1.96**2 / (2 * (n - 1))) ** 0.5 if n > 1 else nan
    return BlandAltman(
        n=n,
        missing=difference.missing,
        bias=bias,
        sd=sd,
        lower=lower,
        upper=upper,
        bias_ci=difference.ci,
        lower_ci=_student(lower, error, n),
        upper_ci=_student(upper, error, n),
    )


@dataclass(frozen=True)
class Paired:
    """Mean of a - b over the pairs, its 95 % CI, and the two-sided Wilcoxon signed-rank p."""

    n: int
    missing: int
    mean: float
    ci: Interval
    p: float


EXACT = 50
"""Up to so many differences the Wilcoxon p is exact: 2^n still counts exactly in a float."""


def paired(a: ArrayLike, b: ArrayLike) -> Paired:
    r"""Return the mean difference of two paired samples, its interval and Wilcoxon's p.

    The mean of :math:`d = a - b` (positive where a is the larger) with its interval by Student's
    t, as :func:`summary`; the two-sided p of Wilcoxon's signed-rank test (Biometrics Bulletin
    1945), differences of zero left out, exact for up to :data:`EXACT` of the others (the
    distribution of the sum of the ranks, ties at their mean rank, over all :math:`2^n` signs),
    by the normal approximation above. Pairs with a NaN are left out. Interval and p are NaN for
    n < 2; p is 1 where all differences are zero.

    Raises
    ------
    ValueError
        If the samples do not have one length.
    """
    d = _differences(a, b)
    mean = summary(d)
    p = _wilcoxon(d[~np.isnan(d) & (d != 0)]) if mean.n > 1 else nan
    return Paired(mean.n, mean.missing, mean.mean, mean.ci, p)


def _wilcoxon(d: NDArray[np.float64]) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test; no difference may be zero."""
    if len(d) > EXACT:
        return float(scipy.stats.wilcoxon(d).pvalue)
    # Mean ranks of ties are halves: doubled, they count whole.
    ranks = np.rint(2 * scipy.stats.rankdata(np.abs(d))).astype(int)
    ways = np.zeros(ranks.sum() + 1)
    ways[0] = 1
    for rank in ranks:
        ways[rank:] += ways[:-rank].copy()
    positive = ranks[d > 0].sum()
    tail = min(positive, ranks.sum() - positive)
    return min(1.0, float(2 * ways[: tail + 1].sum() / ways.sum()))


def _student(centre: float, error: float, n: int) -> Interval:
    """Return the 95 % interval around an estimate with n - 1 degrees of freedom."""
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * error if n > 1 else nan
    return centre - half, centre + half


def _differences(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(a, dtype=np.float64).ravel()
    y = np.asarray(b, dtype=np.float64).ravel()
    if len(x) != len(y):
        raise ValueError(f'pairs need as many values on both sides: {len(x)} and {len(y)}')
    return np.subtract(x, y)


# ---------------------------------------------------------------------------------------------
# Masks


def _count(mask: NDArray[Any]) -> int:
    return int(np.count_nonzero(mask))


def _same_shape(found: NDArray[Any], truth: NDArray[Any]) -> None:
    if found.shape != truth.shape:
        raise ValueError(f'shapes differ: {found.shape} and {truth.shape}')


def _masks(
    found: NDArray[Any], truth: NDArray[Any]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    _same_shape(found, truth)
    return np.asarray(found, dtype=bool), np.asarray(truth, dtype=bool)


def _cropped(
    a: NDArray[np.bool_], b: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return both on the smallest box that holds both: a lesion is small in a head."""
    box = ndimage.find_objects((a | b).view(np.int8))
    return (a[box[0]], b[box[0]]) if box else (a, b)


def _spacing(spacing_mm: Sequence[float], ndim: int) -> NDArray[np.float64]:
    spacing = np.asarray(spacing_mm, dtype=float)
    if spacing.shape != (ndim,) or not (spacing > 0).all():
        raise ValueError(f'spacing {spacing_mm} does not suit {ndim} axes')
    return spacing
