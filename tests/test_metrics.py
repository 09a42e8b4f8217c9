"""Agreement of two segmentations, on arrays small enough to count by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bids_jointseg import metrics

MM = (1.0, 1.0, 1.0)
THICK = (1.0, 2.0, 3.0)

MASKS = arrays(bool, (3, 4, 2), elements=st.booleans())
SPARSE = arrays(bool, (6, 3, 2), elements=st.sampled_from([False, False, False, True]))


def line(*values: int) -> np.ndarray:
    """Return a mask along x, one voxel wide."""
    return np.array(values, dtype=bool)[:, None, None]


def box(shape: tuple[int, ...], *bounds: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*bound) for bound in bounds)] = True
    return mask


EMPTY, FULL = line(0, 0, 0), line(1, 1, 1)


# ---------------------------------------------------------------------------------------------
# Overlap


def test_overlap_counts_shared_voxels():
    a, b = line(1, 1, 1, 0, 0), line(0, 1, 1, 1, 1)  # 3 and 4 voxels, 2 shared, 5 together
    assert metrics.dice_of(a, b) == pytest.approx(400 / 7)
    assert metrics.jaccard_of(a, b) == pytest.approx(40)
    assert metrics.dice_of(a, a) == metrics.jaccard_of(a, a) == 100
    # What is not zero is inside, whatever the dtype.
    assert metrics.dice_of(3 * a.astype(np.uint8), b.astype(float)) == pytest.approx(400 / 7)


@given(MASKS, MASKS)
def test_jaccard_follows_from_dice(a, b):
    dice, jaccard = metrics.dice_of(a, b) / 100, metrics.jaccard_of(a, b) / 100
    assert jaccard == pytest.approx(dice / (2 - dice), nan_ok=True)


def test_dice_of_a_label_map_goes_class_by_class():
    found = np.array([0, 2, 2, 7, 8, 8])
    truth = np.array([0, 2, 7, 7, 8, 2])
    scores = metrics.dice(found, truth)
    assert scores == pytest.approx(
        {'WM': 50, 'L': 200 / 3, 'CGM': 200 / 3, 'SGM': math.nan, 'BS': math.nan,
         'CBM': math.nan, 'VEN': math.nan}, nan_ok=True,
    )  # fmt: skip
    valid = np.array([1, 1, 0, 1, 1, 0], dtype=bool)
    assert metrics.dice(found, truth, valid=valid, classes=['L', 'WM']) == {'WM': 100, 'L': 100}
    with pytest.raises(ValueError, match='shapes differ'):
        metrics.dice(found, truth[1:], valid=valid)


# ---------------------------------------------------------------------------------------------
# Surfaces


def test_the_surface_leaves_out_what_is_enclosed():
    cube = box((7, 7, 7), (1, 6), (1, 6), (1, 6))
    from_cube, from_core = metrics.surface_distances(
        cube, box((7, 7, 7), (3, 4), (3, 4), (3, 4)), MM
    )
    assert len(from_cube) == 5**3 - 3**3
    assert len(from_core) == 1
    assert from_core[0] == 2  # to the middle of a face
    assert from_cube.max() == pytest.approx(12**0.5)  # from a corner


def test_the_outside_of_the_image_is_outside():
    # A mask that fills its image has a surface all around; only the centre is enclosed.
    found, truth = metrics.surface_distances(np.ones((3, 3, 3)), np.ones((3, 3, 3)), MM)
    assert len(found) == len(truth) == 26


def test_distances_are_in_mm():
    a, b = box((4, 4, 4), (0, 1), (0, 1), (0, 1)), box((4, 4, 4), (2, 3), (3, 4), (1, 2))
    # 2, 3 and 1 voxels of 1, 2 and 3 mm: the root of 4 + 36 + 9.
    for measure in (metrics.hausdorff95, metrics.average_surface_distance):
        assert measure(a, b, THICK) == pytest.approx(7)
        assert measure(a, b, MM) == pytest.approx(14**0.5)


def test_the_average_is_over_both_surfaces_together():
    a, b = line(1, 0, 0, 0, 0), line(1, 0, 0, 1, 1)
    from_a, from_b = metrics.surface_distances(a, b, (2.0, 1.0, 1.0))
    assert list(from_a) == [0]
    assert list(from_b) == [0, 6, 8]
    # Over four surface voxels; the mean of the two means would be 7/3.
    assert metrics.average_surface_distance(a, b, (2.0, 1.0, 1.0)) == pytest.approx(3.5)


def test_hausdorff95_is_the_larger_of_two_percentiles():
    a, b = line(1, 0, 0, 0, 0), line(1, 0, 0, 1, 1)
    # Of 0, 3, 4: rank 0.95 x 2 = 1.9, so 3 + 0.9; all four together would give 3.85.
    assert metrics.hausdorff95(a, b, MM) == pytest.approx(3.9)
    assert metrics.hausdorff95(b, a, MM) == pytest.approx(3.9)


@pytest.mark.parametrize('measure', [metrics.hausdorff95, metrics.average_surface_distance])
def test_there_is_no_distance_to_nothing(measure):
    assert math.isnan(measure(EMPTY, EMPTY, MM))
    assert math.isnan(measure(FULL, EMPTY, MM))
    assert math.isnan(measure(EMPTY, FULL, MM))
    assert measure(FULL, FULL, MM) == 0


@given(MASKS, MASKS)
@settings(max_examples=50)
def test_distances_are_those_of_every_pair(a, b):
    def surface(mask):
        at = set(map(tuple, np.argwhere(mask)))
        steps = [*np.eye(3, dtype=int), *-np.eye(3, dtype=int)]
        return [p for p in at if any(tuple(np.add(p, step)) not in at for step in steps)]

    points = [np.array(sorted(surface(mask))).reshape(-1, 3) * THICK for mask in (a, b)]
    gaps = np.linalg.norm(points[0][:, None] - points[1], axis=-1)
    found, truth = metrics.surface_distances(a, b, THICK)
    if gaps.size:
        np.testing.assert_allclose(found, gaps.min(1), atol=1e-12)
        np.testing.assert_allclose(truth, gaps.min(0), atol=1e-12)
    else:
        assert len(found) == len(truth) == 0


@pytest.mark.parametrize('spacing', [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), 1.0])
def test_a_spacing_must_suit_the_mask(spacing):
    with pytest.raises(ValueError, match='does not suit 3 axes'):
        metrics.surface_distances(FULL, FULL, spacing)


# ---------------------------------------------------------------------------------------------
# Volumes


def test_volumes():
    a, b = line(1, 1, 1, 0, 0), line(0, 1, 0, 0, 0)
    assert metrics.volume_mm3(a, THICK) == 18
    assert metrics.absolute_volume_difference(a, b) == 200
    assert metrics.absolute_volume_difference(b, a) == pytest.approx(200 / 3)
    assert metrics.volumetric_similarity(a, b) == 0.5
    # Volume alone: where the voxels lie does not matter.
    assert metrics.volumetric_similarity(line(1, 0), line(0, 1)) == 1
    assert metrics.absolute_volume_difference(line(1, 0), line(0, 1)) == 0


def test_volumes_of_nothing():
    assert metrics.volume_mm3(EMPTY, THICK) == 0
    assert metrics.absolute_volume_difference(EMPTY, FULL) == 100
    assert math.isnan(metrics.absolute_volume_difference(FULL, EMPTY))
    assert math.isnan(metrics.absolute_volume_difference(EMPTY, EMPTY))
    assert metrics.volumetric_similarity(EMPTY, FULL) == 0
    assert metrics.volumetric_similarity(FULL, EMPTY) == 0
    assert math.isnan(metrics.volumetric_similarity(EMPTY, EMPTY))


# ---------------------------------------------------------------------------------------------
# Every pair measure

PAIR = {
    'dice_of': metrics.dice_of,
    'jaccard_of': metrics.jaccard_of,
    'hausdorff95': lambda a, b: metrics.hausdorff95(a, b, THICK),
    'average_surface_distance': lambda a, b: metrics.average_surface_distance(a, b, THICK),
    'volumetric_similarity': metrics.volumetric_similarity,
    'absolute_volume_difference': metrics.absolute_volume_difference,
    'lesion_wise': lambda a, b: list(asdict(metrics.lesion_wise(a, b, THICK)).values()),
}


@pytest.mark.parametrize('name', PAIR)
@given(a=MASKS, b=MASKS, pad=st.tuples(*[st.tuples(*[st.integers(0, 2)] * 2)] * 3))
@settings(max_examples=25)
def test_padding_changes_nothing(name, a, b, pad):
    before, after = PAIR[name](a, b), PAIR[name](np.pad(a, pad), np.pad(b, pad))
    assert before == pytest.approx(after, nan_ok=True)


@pytest.mark.parametrize('name', list(PAIR)[:5])
@given(a=MASKS, b=MASKS)
@settings(max_examples=25)
def test_found_and_truth_may_change_places(name, a, b):
    assert PAIR[name](a, b) == pytest.approx(PAIR[name](b, a), nan_ok=True)


@pytest.mark.parametrize('name', PAIR)
def test_masks_must_have_one_shape(name):
    with pytest.raises(ValueError, match=r'shapes differ: \(3, 1, 1\) and \(1, 1, 1\)'):
        PAIR[name](FULL, line(1))


# ---------------------------------------------------------------------------------------------
# Lesions


def test_lesions_are_counted_on_their_own_side():
    truth = line(1, 1, 0, 1, 1, 0, 1, 0, 0, 0)  # three lesions
    found = line(1, 1, 0, 0, 1, 0, 0, 0, 1, 0)  # two of them, and one that is none
    result = metrics.lesion_wise(found, truth, MM)
    assert (result.n_truth, result.n_found) == (3, 3)
    assert result.recall == pytest.approx(2 / 3)
    assert result.precision == pytest.approx(2 / 3)
    assert result.f1 == pytest.approx(2 / 3)
    assert result.challenge_recall == result.challenge_precision == pytest.approx(2 / 3)
    assert result.challenge_f1 == result.challenge_early_f1 == pytest.approx(2 / 3)


def test_corners_connect():
    diagonal = np.zeros((2, 2, 2), dtype=bool)
    diagonal[0, 0, 0] = diagonal[1, 1, 1] = True
    result = metrics.lesion_wise(diagonal, np.ones((2, 2, 2)), MM)
    assert result.n_found == 1


def test_the_early_challenge_exceeds_one():
    truth = line(1, 0, 1, 0, 1, 0)
    blob = line(1, 1, 1, 1, 1, 0)  # joins three lesions: three found by one
    result = metrics.lesion_wise(blob, truth, MM)
    assert result.challenge_early_precision == 3
    assert result.challenge_early_f1 == pytest.approx(1.5)  # 2 x 3 x 1 / (3 + 1)
    assert result.recall == result.precision == result.f1 == 1
    # And the other way round: a lesion found whole, but in three pieces.
    result = metrics.lesion_wise(truth, blob, MM)
    assert result.challenge_early_precision == pytest.approx(1 / 3)
    assert result.challenge_early_f1 == pytest.approx(0.5)
    assert result.recall == result.precision == result.f1 == 1


def test_one_shared_voxel_is_not_a_lesion_found():
    truth, everything = line(1, *[0] * 19), np.ones((20, 1, 1), dtype=bool)
    result = metrics.lesion_wise(everything, truth, MM)
    assert result.challenge_recall == result.challenge_precision == result.challenge_f1 == 1
    assert (result.recall, result.precision, result.f1) == (1, 0, 0)  # a twentieth is shared
    assert metrics.lesion_wise(everything, truth, MM, overlap=0.05).precision == 1
    assert metrics.lesion_wise(everything, truth, MM, overlap=0).precision == 1
    result = metrics.lesion_wise(truth, everything, MM)
    assert (result.recall, result.precision, result.f1) == (0, 1, 0)


def test_nothing_shared_is_nothing_found_whatever_the_overlap():
    result = metrics.lesion_wise(line(1, 0, 0), line(0, 0, 1), MM, overlap=0)
    assert result.recall == result.precision == result.f1 == 0
    assert result.challenge_f1 == result.challenge_early_precision == 0
    assert math.isnan(result.challenge_early_f1)  # zero by zero


@pytest.mark.parametrize(
    ('found', 'truth', 'corrected', 'challenge'),
    [
        (EMPTY, EMPTY, (math.nan, math.nan, math.nan), (1, 1, 1)),
        (FULL, EMPTY, (math.nan, 0, 0), (1, 0, 0)),
        (EMPTY, FULL, (0, math.nan, 0), (0, 1, 0)),
    ],
)
def test_lesions_of_an_empty_mask(found, truth, corrected, challenge):
    r = metrics.lesion_wise(found, truth, MM)
    assert (r.recall, r.precision, r.f1) == pytest.approx(corrected, nan_ok=True)
    assert (r.challenge_recall, r.challenge_precision, r.challenge_f1) == challenge
    assert math.isnan(r.challenge_early_precision)
    assert math.isnan(r.challenge_early_f1)


def test_a_small_lesion_does_not_count_but_confirms():
    truth = line(1, 0, 1, 1, 0, 0, 0)
    found = line(1, 1, 0, 0, 0, 0, 1)
    result = metrics.lesion_wise(found, truth, (0.5, 2.0, 3.0), minimal_mm3=6)  # two voxels
    assert (result.n_truth, result.n_found) == (1, 1)
    assert (result.recall, result.precision, result.f1) == (0, 1, 0)
    every = metrics.lesion_wise(found, truth, (0.5, 2.0, 3.0))
    assert (every.recall, every.precision) == (0.5, 0.5)
    assert result.challenge_f1 == every.challenge_f1 == 0.5


def lesions(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Return the 26-connected components, voxel by voxel."""
    left, parts = set(map(tuple, np.argwhere(mask))), []
    while left:
        part = set()
        fringe = {left.pop()}
        while fringe:
            part |= fringe
            fringe = {q for q in left for p in fringe if np.abs(np.subtract(p, q)).max() == 1}
            left -= fringe
        parts.append(part)
    return parts


@given(SPARSE, SPARSE, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@settings(max_examples=200)
def test_lesion_wise_is_its_definition(found, truth, overlap):
    all_found, all_true = set(map(tuple, np.argwhere(found))), set(map(tuple, np.argwhere(truth)))
    f, t = lesions(found), lesions(truth)
    hit = {
        o: (
            [len(part & all_true) >= max(1, o * len(part)) for part in f],
            [len(part & all_found) >= max(1, o * len(part)) for part in t],
        )
        for o in (0.0, overlap)
    }
    r = metrics.lesion_wise(found, truth, MM, overlap=overlap)
    assert (r.n_found, r.n_truth) == (len(f), len(t))
    for o, recall, precision, f1, empty in (
        (overlap, r.recall, r.precision, r.f1, math.nan),
        (0.0, r.challenge_recall, r.challenge_precision, r.challenge_f1, 1),
    ):
        real, seen = hit[o]
        assert precision == pytest.approx(np.mean(real) if f else empty, nan_ok=True)
        assert recall == pytest.approx(np.mean(seen) if t else empty, nan_ok=True)
        # F1 is twice the inverse of the mean of the inverses; 0 where one is 0 or missing.
        if not f and not t:
            assert f1 == pytest.approx(empty, nan_ok=True)
        elif not any(real) or not any(seen):
            assert f1 == 0
        else:
            assert f1 == pytest.approx(2 / (1 / np.mean(real) + 1 / np.mean(seen)))
            assert 0 < f1 <= 1
    seen = hit[0.0][1]
    if f and t:
        assert r.challenge_early_precision == pytest.approx(sum(seen) / len(f))
    if any(seen):
        harmonic = 2 / (len(f) / sum(seen) + len(t) / sum(seen))
        assert r.challenge_early_f1 == pytest.approx(harmonic)
    # Found and true change places with recall and precision.
    back = metrics.lesion_wise(truth, found, MM, overlap=overlap)
    assert (back.recall, back.precision, back.f1) == pytest.approx(
        (r.precision, r.recall, r.f1), nan_ok=True
    )


# ---------------------------------------------------------------------------------------------
# Statistics


def test_summary():
    result = metrics.summary([1, math.nan, 2, 6])
    assert (result.n, result.missing, result.mean, result.median) == (3, 1, 3, 2)
    assert result.sd == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    half = 4.3026527 * (7 / 3) ** 0.5  # Student's t at 97.5 % with two degrees of freedom
    assert result.ci == pytest.approx((3 - half, 3 + half))


def test_summary_of_too_few():
    one, none = metrics.summary([4.0]), metrics.summary([math.nan])
    assert (one.n, one.mean, one.median) == (1, 4, 4)
    assert all(map(math.isnan, (one.sd, *one.ci)))
    assert (none.n, none.missing) == (0, 1)
    assert all(map(math.isnan, (none.mean, none.median, none.sd, *none.ci)))
    assert metrics.summary([]).n == 0
    assert metrics.summary([5, 5, 5]).ci == (5, 5)


def test_bland_altman():
    # Differences 1, 3, 5 and -1: mean 2, variance (1 + 1 + 9 + 9) / 3.
    result = metrics.bland_altman([11, 13, 15, 9, 7], [10, 10, 10, 10, math.nan])
    sd = (20 / 3) ** 0.5
    t = 3.1824463  # at 97.5 % with three degrees of freedom
    assert (result.n, result.missing, result.bias) == (4, 1, 2)
    assert result.sd == pytest.approx(sd)
    assert (result.lower, result.upper) == pytest.approx((2 - 1.96 * sd, 2 + 1.96 * sd))
    assert result.bias_ci == pytest.approx((2 - t * sd / 2, 2 + t * sd / 2))
    wide = t * sd * (1 / 4 + 1.96**2 / 6) ** 0.5
    assert result.lower_ci == pytest.approx((result.lower - wide, result.lower + wide))
    assert result.upper_ci == pytest.approx((result.upper - wide, result.upper + wide))


def test_bland_altman_agrees_with_its_paper():
    # Bland and Altman 1999, section 2: 85 people, bias -16.29 mmHg, SD 19.61; limits -54.7 and
    # 22.1, their intervals -61.9 to -47.5 and 14.9 to 29.3.
    d = np.random.default_rng(0).normal(size=85)
    d = (d - d.mean()) / d.std(ddof=1) * 19.61 - 16.29
    result = metrics.bland_altman(d, np.zeros(85))
    assert (result.lower, result.upper) == pytest.approx((-54.7, 22.1), abs=0.06)
    assert result.lower_ci == pytest.approx((-61.9, -47.5), abs=0.15)
    assert result.upper_ci == pytest.approx((14.9, 29.3), abs=0.15)


def test_bland_altman_changes_sign_with_the_order():
    a, b = [1.0, 5.0, 3.0], [2.0, 2.0, 2.5]
    ab, ba = metrics.bland_altman(a, b), metrics.bland_altman(b, a)
    assert ab.bias == pytest.approx(-ba.bias)
    assert (ab.lower, ab.upper) == pytest.approx((-ba.upper, -ba.lower))
    assert ab.lower_ci == pytest.approx((-ba.upper_ci[1], -ba.upper_ci[0]))


def test_bland_altman_of_one_pair():
    result = metrics.bland_altman([3], [1])
    assert (result.n, result.bias) == (1, 2)
    rest = (result.sd, result.lower, result.upper)
    assert all(map(math.isnan, (*rest, *result.bias_ci, *result.lower_ci, *result.upper_ci)))


def test_paired():
    # Differences 3, 1, -2, 4, (0): ranks 3, 1, -2, 4. Sums of 2 or less: {}, {1}, {2}: 3 of 16.
    result = metrics.paired([4, 2, 1, 5, 7, 1], [1, 1, 3, 1, 7, math.nan])
    assert (result.n, result.missing) == (5, 1)
    assert result.mean == pytest.approx(6 / 5)
    sd = ((9 + 1 + 4 + 16 - 5 * 1.2**2) / 4) ** 0.5
    half = 2.7764451 * sd / 5**0.5
    assert result.ci == pytest.approx((1.2 - half, 1.2 + half))
    assert result.p == 2 * 3 / 16


def test_paired_is_exact_with_ties():
    # |d| = 1, 1, 2: ranks 1.5, 1.5, 3, all positive: the extreme of 8 sign patterns.
    assert metrics.paired([1, 1, 2], [0, 0, 0]).p == 2 / 8
    # One of the tied is negative: sums of 1.5 or less are {}, {1.5}, {1.5}: 3 of 8.
    assert metrics.paired([1, -1, 2], [0, 0, 0]).p == 6 / 8


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=8))
def test_wilcoxon_is_the_share_of_sign_patterns(d):
    size = np.abs([value for value in d if value])
    ranks = [np.mean(np.flatnonzero(np.sort(size) == s) + 1) for s in size]
    observed = sum(r for r, value in zip(ranks, filter(None, d), strict=True) if value > 0)
    middle = sum(ranks) / 2
    sums = [np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=len(ranks))]
    extreme = np.mean([abs(s - middle) >= abs(observed - middle) - 1e-9 for s in sums])
    assert metrics.paired(d, np.zeros(len(d))).p == pytest.approx(extreme)


def test_wilcoxon_of_many_meets_the_exact_one():
    d = np.random.default_rng(3).normal(0.3, 1, metrics.EXACT + 1)
    below, above = metrics.paired(d[:-1], 0 * d[:-1]), metrics.paired(d, 0 * d)
    assert below.p == pytest.approx(above.p, abs=0.02)
    assert 0 < above.p < 0.2


def test_paired_of_too_few():
    one, none = metrics.paired([3], [1]), metrics.paired([], [])
    assert (one.n, one.mean, none.n) == (1, 2, 0)
    assert all(map(math.isnan, (*one.ci, one.p, none.mean, *none.ci, none.p)))
    assert metrics.paired([1, 2], [1, 2]).p == 1


def test_paired_changes_sign_with_the_order():
    a, b = [1.0, 5.0, 3.0], [2.0, 2.0, 2.5]
    ab, ba = metrics.paired(a, b), metrics.paired(b, a)
    assert ab.mean == pytest.approx(5 / 6)
    assert replace(ab, mean=-ab.mean, ci=(-ab.ci[1], -ab.ci[0])) == ba


@pytest.mark.parametrize('compare', [metrics.bland_altman, metrics.paired])
def test_pairs_need_partners(compare):
    with pytest.raises(ValueError, match='pairs need as many values on both sides: 2 and 1'):
        compare([1, 2], [1])
