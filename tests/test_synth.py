"""Painting and the transforms of training samples, on literal cases and a head of shells."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from bids_jointseg import augment, synth
from bids_jointseg.image import foreground, normalise

SHELLS = (
    (44, 'soft tissue'), (40, 'bone'), (37, 'extracerebral CSF'), (34, 'cortex'),
    (30, 'white matter'), (14, 'striatum'), (11, 'ventricle'),
)  # fmt: skip
PLAIN = augment.Intensity(
    bias=0.0, gamma=1.0, noise=0.0, thickness=(0.0, 0.0, 0.0), clean_air=True, level=0.0, scale=1.0
)


def seeded(seed: int) -> tuple[np.random.Generator, Generator]:
    return np.random.default_rng(seed), Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def head() -> Tensor:
    """Kinds of a head of concentric shells, `(96, 96, 96)`."""
    axis = torch.arange(96.0) - 47.5
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    kinds = torch.zeros(96, 96, 96, dtype=torch.uint8)
    for size, name in SHELLS:
        kinds[radius < size] = synth.KIND[name]
    return kinds


def counts(kinds: Tensor) -> dict[int, int]:
    values, numbers = np.unique(kinds.numpy(), return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist(), strict=True))


def near(kinds: Tensor) -> Tensor:
    return synth.blur((kinds == synth.VENTRICLE).float(), 4.0)


def grown(kinds: Tensor, seed: int) -> Tensor:
    rng, generator = seeded(seed)
    white = (kinds == synth.WHITE).float()
    return synth.grow_lesions(white, near(kinds), generator, rng)


def painted(kinds: Tensor, modality: str, seed: int, lesion: Tensor | None = None) -> Tensor:
    rng, generator = seeded(seed)
    contrast = synth.draw_contrast(modality, rng, wild=0.0)
    lesion = torch.zeros(kinds.shape) if lesion is None else lesion
    image = synth.paint(kinds, lesion, contrast, generator, torch.ones(kinds.shape))
    return torch.where(kinds == synth.AIR, torch.zeros(()), image)


# ---------------------------------------------------------------------------------------------
# Everything depends on the seed alone


@pytest.mark.parametrize(
    'make',
    [
        lambda kinds, seed: synth.smooth_field((9, 8, 7), 3, seeded(seed)[1]),
        grown,
        lambda kinds, seed: synth.add_distractors(kinds, *seeded(seed)),
        lambda kinds, seed: painted(kinds, 'FLAIR', seed),
        lambda kinds, seed: augment.acquire(
            painted(kinds, 'T1w', 0), augment.draw_intensity(seeded(seed)[0]), seeded(seed)[1]
        ),
        lambda kinds, seed: augment.coordinates(
            replace(
                augment.draw_geometry(seeded(seed)[0], (9, 8, 7), 'axial', np.ones(3), 1), bend=1.0
            ),
            seeded(seed)[1],
        ),
    ],
    ids=['field', 'lesions', 'distractors', 'paint', 'acquire', 'coordinates'],
)
def test_one_seed_gives_one_result(head, make: Callable[[Tensor, int], Tensor]):
    first = make(head, 5)
    assert torch.equal(first, make(head, 5))
    assert not torch.equal(first, make(head, 6))


# ---------------------------------------------------------------------------------------------
# Fields and blur


def test_a_field_has_variance_one_everywhere_and_its_own_scale():
    generator = Generator().manual_seed(0)
    fields = torch.stack([synth.smooth_field((12, 12, 12), 4, generator) for _ in range(600)])
    spread = fields.std(0)
    assert fields.mean(0).abs().max() < 0.25
    # No lattice: the standard deviation is that of a point, not of a node or a gap.
    assert spread.min() > 0.85
    assert spread.max() < 1.15
    neighbours = (fields[:, :-1] * fields[:, 1:]).mean()
    far = (fields[:, :1] * fields[:, 11:]).mean()
    assert neighbours > 0.8
    assert abs(far) < 0.1


def test_blur_keeps_the_sum_of_a_point_and_any_constant():
    point = torch.zeros(31, 31, 31)
    point[15, 15, 15] = 1
    blurred = synth.blur(point, 2.0)
    assert float(blurred.sum()) == pytest.approx(1, abs=0.01)
    assert float(blurred.max()) == pytest.approx((2 * np.pi * 4) ** -1.5, rel=0.02)
    assert torch.allclose(synth.blur(torch.full((5, 6, 7), 3.0), 2.0), torch.tensor(3.0))


def test_blur_acts_on_the_axes_that_it_is_told():
    point = torch.zeros(9, 9, 9)
    point[4, 4, 4] = 1
    blurred = synth.blur(point, (0.0, 1.0, 0.0))
    assert torch.equal(blurred.nonzero()[:, (0, 2)], torch.full((9, 2), 4))
    weights = np.exp(-0.5 * np.arange(-4, 5) ** 2)
    assert blurred[4, :, 4].numpy() == pytest.approx(weights / weights.sum(), abs=1e-3)
    assert torch.equal(synth.blur(point, 0.1), point)


# ---------------------------------------------------------------------------------------------
# Lesions and distractors


def test_lesions_grow_in_white_matter_alone(head):
    white = head == synth.WHITE
    for seed in range(5):
        lesion = grown(head, seed)
        assert lesion.min() >= 0
        assert lesion.max() <= 1
        assert not lesion[~white].any()
        share = float((lesion[white] > 0.5).float().mean())
        assert 0.0004 < share < 0.021


def test_lesions_are_round_and_not_sticks_along_an_axis(head):
    lesion = torch.stack([grown(head, seed) for seed in range(6)]) > 0.5
    counted = lesion.sum()
    # A diagonal neighbour of a lesion's voxel is in the lesion nearly as often as a direct one.
    direct = torch.stack([(lesion & lesion.roll(1, axis)).sum() for axis in (1, 2, 3)]) / counted
    diagonal = (lesion & lesion.roll((1, 1), (1, 2))).sum() / counted
    assert direct.min() > 0.6
    assert diagonal > 0.7 * direct.mean()


def test_no_white_matter_no_lesions():
    nothing = torch.zeros(20, 20, 20)
    rng, generator = seeded(0)
    assert not synth.grow_lesions(nothing, nothing, generator, rng).any()


def test_distractors_stay_in_the_tissue_where_they_may_be(head):
    may_be = {
        'choroid plexus': ('ventricle',),
        'vessel': ('white matter', 'cortex', 'extracerebral CSF'),
        'perivascular space': ('white matter', 'striatum', 'thalamus', 'pallidum'),
    }
    before = head.clone()
    seen = set()
    untouched = 0
    for seed in range(16):
        shown = synth.add_distractors(head, *seeded(seed))
        assert torch.equal(head, before)
        assert shown.dtype == torch.uint8
        changed = shown != head
        untouched += not changed.any()
        assert float(changed.float().mean()) < 0.02
        for kind in shown[changed].unique().tolist():
            name = synth.NAMES[kind]
            seen.add(name)
            under = {synth.NAMES[k] for k in head[changed & (shown == kind)].unique().tolist()}
            assert under <= set(may_be[name])
    assert seen == set(may_be)
    assert 0 < untouched < 10  # each of the three is drawn or not


def test_plexus_lies_in_a_few_tufts_of_the_ventricle(head):
    ventricle = head == synth.VENTRICLE
    for seed in range(12):
        plexus = synth.add_distractors(head, *seeded(seed)) == synth.PLEXUS
        if plexus.any():
            assert plexus[ventricle].float().mean() <= 0.21
            alone = plexus & ~synth.blur(plexus.float(), 0.8).gt(0.15)
            assert alone.sum() < 0.1 * plexus.sum()
            break
    else:
        pytest.fail('no plexus in twelve draws')


def test_windows_without_brain_have_no_distractors():
    for kind in ('air', 'soft tissue', 'bone'):
        kinds = torch.full((12, 10, 8), synth.KIND[kind], dtype=torch.uint8)
        for seed in range(4):
            assert torch.equal(synth.add_distractors(kinds, *seeded(seed)), kinds)


def test_kinds_keep_their_indices():
    # Caches on disk hold these: new kinds come last.
    assert synth.NAMES.index('dura and muscle') == 19
    assert synth.NAMES[20:] == ('vessel', 'perivascular space')
    assert {synth.PLEXUS, synth.VESSEL, synth.SPACE} <= set(synth.BRAIN)


# ---------------------------------------------------------------------------------------------
# Contrast


@pytest.mark.parametrize('seed', range(4))
def test_painted_scans_have_the_contrast_of_their_modality(head, seed):
    lesion = torch.zeros(head.shape)
    lesion[65:70, 44:52, 44:52] = 1
    assert (head[lesion > 0] == synth.WHITE).all()
    level = {}
    for modality in ('T1w', 'FLAIR'):
        image = painted(head, modality, seed, lesion)
        level[modality] = {
            name: float(image[(head == synth.KIND[name]) & (lesion == 0)].median())
            for _, name in SHELLS
        } | {'lesion': float(image[lesion > 0].median())}
    t1w, flair = level['T1w'], level['FLAIR']
    assert t1w['ventricle'] < t1w['cortex'] < t1w['white matter']
    assert t1w['extracerebral CSF'] < t1w['cortex']
    assert t1w['white matter'] == pytest.approx(1, abs=0.1)
    assert t1w['lesion'] < t1w['white matter'] + 0.02
    assert flair['ventricle'] < 0.6 < flair['white matter'] < flair['lesion'] - 0.1
    assert flair['extracerebral CSF'] < flair['white matter']


@pytest.mark.parametrize('modality', ['T1w', 'FLAIR'])
def test_one_scanner_has_one_contrast(modality):
    means = [synth.draw_contrast(modality, seeded(n)[0], spread=0).means for n in range(5)]
    assert np.ptp(means, axis=0).max() == 0
    free = [synth.draw_contrast(modality, seeded(n)[0]).means for n in range(5)]
    assert np.ptp(free, axis=0)[synth.KIND['cortex']] > 0.05


@pytest.mark.parametrize('modality', ['T1w', 'FLAIR'])
def test_the_cortex_of_the_cerebellum_has_folds_as_in_real_scans(modality):
    kinds = torch.full((40, 40, 40), synth.KIND['cerebellar cortex'], dtype=torch.uint8)
    kinds[20:] = synth.KIND['cortex']
    rng, generator = seeded(0)
    contrast = replace(synth.draw_contrast(modality, rng), texture=0.0, folia=0.08)
    nothing = torch.zeros(kinds.shape)
    image = synth.paint(kinds, nothing, contrast, generator, nothing)
    folds, plain = image[3:17] - image[3:17].mean(), image[23:]
    assert float(folds.std()) == pytest.approx(0.08, rel=0.1)
    assert float(plain.std()) < 1e-5
    # As in 19 people at 1 mm: 0.66 to 0.77 one voxel apart, 0.15 to 0.39 two, nothing three.
    together = [float((folds[:, k:] * folds[:, :-k]).mean() / folds.var()) for k in (1, 2, 3)]
    assert together == pytest.approx([0.75, 0.3, 0.1], abs=0.1)


@pytest.mark.parametrize('modality', ['T1w', 'FLAIR'])
def test_walls_of_ventricles_may_look_like_a_faint_lesion(head, modality):
    rng, _ = seeded(3)
    drawn = [synth.draw_contrast(modality, rng) for _ in range(50)]
    assert all(0 <= contrast.rim / contrast.lesion <= 0.7 for contrast in drawn)
    contrast = max(drawn, key=lambda contrast: contrast.rim / contrast.lesion)
    kinds = torch.where(head == synth.KIND['striatum'], synth.WHITE, head)
    nothing = torch.zeros(kinds.shape)
    with_rim, without = (
        synth.paint(kinds, nothing, shown, seeded(4)[1], nothing)
        for shown in (contrast, replace(contrast, rim=0.0))
    )
    change = (with_rim - without) / contrast.lesion
    wall = (kinds == synth.WHITE) & (synth.blur((kinds == synth.VENTRICLE).float(), 1.0) > 0.1)
    assert float(change[wall].mean()) > 0.05
    assert float(change.max()) < 1
    assert not change[kinds != synth.WHITE].any()


def test_the_stronger_the_contrast_of_a_t1w_the_darker_its_fluid():
    rng, _ = seeded(0)
    means = np.array([synth.draw_contrast('T1w', rng, wild=0.0).means for _ in range(500)])
    gray, fluid = means[:, synth.KIND['cortex']], means[:, synth.VENTRICLE]
    assert np.corrcoef(gray, fluid)[0, 1] > 0.5
    # A real one, of MPRAGE: cortex 0.6 and ventricles 0.15 of white matter.
    assert (np.hypot(gray - 0.6, fluid - 0.15) < 0.05).mean() > 0.02


def test_perivascular_spaces_are_darker_than_white_matter(head):
    line = head.clone()
    line[40:56, 70, 47:49] = synth.SPACE
    assert (head[40:56, 70, 47:49] == synth.WHITE).all()
    where = (slice(40, 56), 70, slice(47, 49))
    for modality in ('T1w', 'FLAIR'):
        with_it, without = painted(line, modality, 3), painted(head, modality, 3)
        assert with_it[where].mean() < without[where].mean() - 0.1


@pytest.mark.parametrize('modality', ['T1w', 'FLAIR'])
def test_the_level_of_a_painted_scan_is_that_of_its_foreground(head, modality):
    means, ratios, errors = [], [], []
    for seed in range(5):
        rng, generator = seeded(seed)
        contrast = synth.draw_contrast(modality, rng, wild=0.0)
        quiet = torch.ones(head.shape)
        image = synth.paint(head, torch.zeros(head.shape), contrast, generator, quiet)
        image = torch.where(head == synth.AIR, torch.zeros(()), image)
        image = augment.acquire(image, replace(PLAIN, noise=0.02), generator)
        mean, std = synth.painted_level(contrast.means, counts(head))
        inside = image[image > foreground(image.numpy())]
        means.append(mean - float(inside.mean()))
        ratios.append(std / float(inside.std()))
        expected = torch.from_numpy(normalise(image.numpy()))
        scores = augment.standardise(image, mean, std, PLAIN)
        for name in ('white matter', 'cortex'):
            tissue = head == synth.KIND[name]
            errors.append(float(scores[tissue].median() - expected[tissue].median()))
    # Single scans may stray (layers whose mean is near the threshold); the rule must not.
    assert abs(np.mean(means)) < 0.03
    assert np.mean(ratios) == pytest.approx(1, abs=0.1)
    assert abs(np.mean(errors)) < 0.12
    assert np.abs(errors).max() < 0.5


def test_the_level_of_one_kind_is_its_mean_and_spread():
    means = np.zeros(len(synth.KINDS))
    means[synth.WHITE] = 1.0
    mean, std = synth.painted_level(means, {synth.AIR: 999, synth.WHITE: 10})
    assert mean == pytest.approx(1.0, abs=1e-3)
    assert std == pytest.approx(0.1, abs=1e-3)


# ---------------------------------------------------------------------------------------------
# Geometry


def moved(volume: Tensor, matrix: np.ndarray, mode: str = 'bilinear', shift: float = 0) -> Tensor:
    shape = (volume.shape[0], volume.shape[1], volume.shape[2])
    centre = (np.array(shape) - 1) / 2 + shift
    geometry = augment.Geometry(matrix, centre, shape, bend=0.0)
    return augment.warp(volume, augment.coordinates(geometry, Generator()), mode)


def test_a_flip_is_a_flip():
    volume = torch.arange(60.0).reshape(3, 4, 5)
    assert torch.allclose(moved(volume, np.diag([-1.0, 1, 1])), volume.flip(0), atol=1e-4)
    assert torch.allclose(moved(volume, np.eye(3)), volume, atol=1e-4)


def test_a_known_affine_moves_a_known_voxel():
    volume = torch.zeros(7, 7, 7)
    volume[5, 3, 3] = 1  # two to the right of the middle
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # window's -y looks to the right
    assert moved(volume, turn, 'nearest').nonzero().tolist() == [[3, 1, 3]]
    # Each voxel of the window looks at the source voxel one further on every axis.
    assert moved(volume, np.eye(3), 'nearest', shift=1).nonzero().tolist() == [[4, 2, 2]]
    half = moved(volume, np.eye(3), shift=0.5)
    assert half[4:6, 2:4, 2:4].flatten().tolist() == pytest.approx([0.125] * 8, abs=1e-4)


def test_warp_is_exact_at_voxels_and_zero_outside():
    volume = torch.arange(60.0).reshape(3, 4, 5)
    points = torch.tensor([[[[0.0, 0, 0], [1, 2, 3], [2, 3, 4], [1, 2.5, 3], [9, 9, 9]]]])
    linear = augment.warp(volume, points).flatten().tolist()
    assert linear == pytest.approx([0, 33, 59, 35.5, 0], abs=1e-4)
    nearest = augment.warp(volume, points, 'nearest').flatten().tolist()
    assert nearest == [0, 33, 59, nearest[3], 0]


def test_geometry_maps_slices_to_their_axis():
    for slicing, axis in (('axial', 2), ('coronal', 1), ('sagittal', 0)):
        drawn = augment.draw_geometry(seeded(0)[0], (8, 8, 4), slicing, np.zeros(3), 3.0)
        assert np.abs(drawn.matrix[:, 2]).argmax() == axis
        assert np.linalg.norm(drawn.matrix[:, 2]) == pytest.approx(3, rel=0.3)


@pytest.mark.parametrize('slicing', list(augment.AXES))
def test_an_upright_window_is_the_source_itself_or_its_mirror_image(slicing):
    volume = torch.arange(9.0 * 8 * 7).reshape(9, 8, 7)
    mirrored = set()
    for seed in range(8):
        drawn = augment.draw_geometry(
            seeded(seed)[0], (4, 3, 2), slicing, np.array([4.3, 3.9, 2.6]), 1.0, upright=True
        )
        assert drawn.bend == 0
        points = augment.coordinates(drawn, Generator())
        assert torch.equal(points, points.round())
        x, y, z = points.long().unbind(-1)
        assert torch.allclose(augment.warp(volume, points), volume[x, y, z], atol=1e-3)
        mirrored.add(float(np.sign(drawn.matrix[0].sum())))
        assert drawn.matrix[1:].min() >= 0
    assert mirrored == {-1.0, 1.0}


def test_thick_slices_stay_slices():
    matrix = np.array([[0.9, 0.1, 0.2], [-0.1, 0.9, 0.2], [0.3, 0.3, -1.1]])
    kept = augment.within_slices(augment.Geometry(matrix, np.zeros(3), (8, 8, 4), 1.0))
    assert kept.matrix.tolist() == [[0.9, 0.1, 0], [-0.1, 0.9, 0], [0, 0, -1]]
    assert matrix[2, 0] == 0.3


def test_geometry_mirrors_half_of_the_windows_and_never_collapses():
    rng = np.random.default_rng(0)
    drawn = [
        np.linalg.det(augment.draw_geometry(rng, (8, 8, 4), 'axial', np.zeros(3), 1.0).matrix)
        for _ in range(200)
    ]
    assert 70 < sum(value < 0 for value in drawn) < 130
    assert np.abs(drawn).min() > 0.85**3 * 0.8
    assert np.abs(drawn).max() < 1.15**3 * 1.25


def test_elastic_points_stray_by_the_bend_and_do_not_fold():
    geometry = augment.Geometry(np.eye(3), np.full(3, 23.5), (48, 48, 48), bend=1.6)
    straight = augment.coordinates(replace(geometry, bend=0.0), Generator())
    points = augment.coordinates(geometry, Generator().manual_seed(1))
    assert 0.8 < float((points - straight).std()) < 2.4
    for axis in range(3):
        assert float(points[..., axis].diff(dim=axis).min()) > 0.3


# ---------------------------------------------------------------------------------------------
# Scanners


def test_slices_are_means_of_neighbours():
    fine = torch.tensor([[1.0, 2, 3, 10, 20, 30]])
    assert augment.slices(fine, 3).tolist() == [[2, 20]]
    assert augment.slices(fine, 1) is fine


def test_thick_slices_have_partial_volume_along_their_axis_alone():
    image = torch.ones(12, 12, 12)
    image[:, :, 6:] = 3
    thick = augment.acquire(image, replace(PLAIN, thickness=(0.0, 0.0, 2.0)), Generator())
    assert torch.allclose(thick[0, 0], thick[5, 7])
    assert 1.3 < float(thick[6, 6, 5]) < 2 < float(thick[6, 6, 6]) < 2.7
    across = augment.acquire(image, replace(PLAIN, thickness=(2.0, 2.0, 0.0)), Generator())
    assert torch.allclose(across, image, atol=1e-4)


def test_nothing_drawn_changes_nothing():
    image = torch.rand(6, 6, 6)
    assert torch.allclose(augment.acquire(image, PLAIN, Generator()), image)


def test_gamma_is_a_power():
    image = torch.tensor([0.25, 0.5, 1.0]).reshape(3, 1, 1)
    drawn = replace(PLAIN, gamma=2.0)
    changed = augment.acquire(image, drawn, Generator()).flatten().tolist()
    assert changed == pytest.approx([0.0625, 0.25, 1.0])


def test_bias_varies_slowly_about_one():
    generator = Generator().manual_seed(0)
    drawn = replace(PLAIN, bias=0.15)
    fields = torch.stack(
        [augment.acquire(torch.ones(64, 64, 48), drawn, generator) for _ in range(20)]
    )
    assert float(fields.mean()) == pytest.approx(1, abs=0.06)
    assert 0.08 < float(fields.std()) < 0.2
    assert float(fields.diff(dim=1).abs().max()) < 0.05


def test_noise_in_air_is_rayleigh_and_in_tissue_gaussian():
    image = torch.ones(40, 40, 40)
    image[:20] = 0
    drawn = replace(PLAIN, noise=0.05, clean_air=False)
    noisy = augment.acquire(image, drawn, Generator().manual_seed(0))
    air, tissue = noisy[:20], noisy[20:]
    assert air.min() > 0
    assert float(air.mean()) == pytest.approx(0.05 * np.sqrt(np.pi / 2), rel=0.02)
    assert float(tissue.mean()) == pytest.approx(1 + 0.05**2 / 2, abs=0.002)
    assert float(tissue.std()) == pytest.approx(0.05, rel=0.03)
    clean = augment.acquire(image, replace(drawn, clean_air=True), Generator().manual_seed(0))
    assert not clean[:20].any()
    assert torch.equal(clean[20:], tissue)


def test_standardise_is_a_score_with_a_known_error():
    image = torch.tensor([0.5, 1.0, 99.0])
    scores = augment.standardise(image, 0.5, 0.25, PLAIN)
    assert scores.tolist() == [0, 2, 8]  # what is far out is cut off
    drawn = replace(PLAIN, level=0.1, scale=2.0)
    assert augment.standardise(image, 0.5, 0.25, drawn).tolist() == pytest.approx([0.1, 1.1, 8])


# ---------------------------------------------------------------------------------------------
# Field of view


def test_outside_of_a_view_is_air():
    image = torch.ones(2, 4, 5, 6)
    limited, inside = augment.limit_view(image, augment.View((1, 0, 2), (4, 5, 5)))
    assert inside.shape == (4, 5, 6)
    assert inside.sum() == 3 * 5 * 3
    assert not inside[0].any()
    assert not inside[..., 5].any()
    assert torch.equal(limited, inside.float().expand(2, 4, 5, 6))
    assert image.all()


def test_views_end_on_at_most_two_sides_as_often_as_told():
    rng = np.random.default_rng(0)
    shape = (50, 60, 40)
    views = [augment.draw_view(rng, shape, chance=0.3) for _ in range(400)]
    sides = np.array(
        [
            sum(np.array(view.low) > 0) + sum(np.array(view.high) < np.array(shape))
            for view in views
        ]
    )
    assert 80 < (sides > 0).sum() < 160
    assert set(sides) == {0, 1, 2}
    for view in views:
        kept = np.array(view.high) - np.array(view.low)
        assert (kept >= 0.19 * np.array(shape)).all()
    along = sum(view.low[2] > 0 or view.high[2] < 40 for view in views)
    across = sum(view.low[0] > 0 or view.high[0] < 50 for view in views)
    assert along > across
    whole = augment.View((0, 0, 0), shape)
    assert all(augment.draw_view(rng, shape, chance=0.0) == whole for _ in range(5))
