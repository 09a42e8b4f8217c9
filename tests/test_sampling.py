"""The cache and the samples drawn from it, on people of a few voxels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_jointseg import augment, synth
from bids_jointseg.cache import (
    MNI_SHAPE,
    NOTHING,
    Person,
    cached_file,
    cached_files,
    loosen,
    painted_grid,
    raw_images,
    read_mask,
    read_person,
    sets_on,
    write_person,
)
from bids_jointseg.image import Grid, Volume, normalise
from bids_jointseg.labels import ALL, CLASSES, INDICES, PROTOCOLS, bits
from bids_jointseg.recipe import SampleSettings, Source
from bids_jointseg.sampling import (
    BACKGROUND,
    LESION,
    Cohort,
    Sample,
    Windows,
    collate,
    paint_head,
    shares,
    subsets,
    whole,
)
from bids_jointseg.training import ALONE, Settings, _stream

WHITE, GRAY, VENTRICLE = (bits({name}) for name in ('WM', 'CGM', 'VEN'))
FULL = Source('a', modalities=('T1w', 'FLAIR'), annotation='.', protocol='jointseg')
PLAIN = SampleSettings(window=(12, 12, 6), augment=False, lesion_centre=0.0)
BENT = SampleSettings(
    window=(16, 16, 8), thin_window=(16, 16, 8), lesion_centre=0.5, outside_share=0.1
)


def ball(shape: tuple[int, ...], radius: float) -> np.ndarray:
    axes = np.ogrid[tuple(slice(-(n // 2), n - n // 2) for n in shape)]
    return np.asarray(sum(axis**2 for axis in axes) < radius**2)


def write(
    path: Path,
    sets: np.ndarray | None,
    *,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    modalities: tuple[str, ...] = ('T1w', 'FLAIR'),
    images: dict[str, np.ndarray] | None = None,
    **more: object,
) -> Path:
    """Cache a person; the scans show a ball that says nothing of the sets."""
    if images is None:
        shape = (24, 20, 16) if sets is None else sets.shape
        noise = np.random.default_rng(0).uniform(80, 120, shape)
        images = {name: ball(shape, 0.45 * min(shape)) * noise for name in modalities}
    grid = Grid(next(iter(images.values())).shape, np.diag([*spacing, 1.0]))
    write_person(
        path, dataset='a', subject='01', name='sub-01', grid=grid, images=images, sets=sets, **more
    )
    return path


def draw_sets(shape: tuple[int, int, int] = (24, 20, 16)) -> np.ndarray:
    sets = np.where(ball(shape, 7), GRAY, BACKGROUND).astype(np.uint8)
    sets[ball(shape, 5)] = WHITE
    sets[ball(shape, 2)] = VENTRICLE
    sets[14:17, 10:12, 8:10] = LESION
    return sets


def windows(
    *people: Person, source: Source = FULL, settings: SampleSettings = BENT, **more
) -> Windows:
    options = {'seed': 5, 'length': 100, 'slice_mm': (1.0, 3.0)} | more
    return Windows([Cohort(source, people)], settings=settings, **options)


def same(a: Sample, b: Sample) -> bool:
    return (
        a.groups == b.groups
        and a.images.keys() == b.images.keys()
        and all(torch.equal(image, b.images[name]) for name, image in a.images.items())
        and torch.equal(a.target, b.target)
        and torch.equal(a.valid, b.valid)
    )


# ---------------------------------------------------------------------------------------------
# The cache


def test_loose_edges_leave_open_what_lies_on_a_border():
    w, g, b, lesion = WHITE, GRAY, BACKGROUND, LESION
    row = np.array([b, b, g, g, g, w, w, lesion, w], np.uint8)[:, None, None]
    expected = [b, b | g, b | g, g, g | w, g | w, w, lesion, w]
    assert loosen(row).ravel().tolist() == expected
    assert loosen(row.swapaxes(0, 2)).ravel().tolist() == expected
    assert row[1] == b  # not changed in place


def test_samples_with_loose_edges_are_told_nothing_at_borders(tmp_path):
    path = write(tmp_path / 'a.npz', draw_sets())
    strict, loose = read_person(path), read_person(path, loose_edges=True)
    told = []
    for person, source in ((strict, FULL), (loose, replace(FULL, loose_edges=True))):
        sample = windows(person, source=source, settings=replace(PLAIN, lesion_centre=1.0))[0]
        known = sample.valid.expand_as(sample.target)
        assert set((sample.target * known).sum(0).unique().tolist()) <= {0, 1}
        told.append((sample.target, known))
    (target, everywhere), (_, inside) = told
    assert everywhere.all()
    open_ = (inside == 0).sum(0)
    assert set(open_.unique().tolist()) <= {0, 2, 3}
    assert (open_ > 0).any()
    # What is open holds the truth, and lesions are never open.
    truth = target.argmax(0)
    assert (torch.gather(inside, 0, truth[None])[0][open_ > 0] == 0).all()
    lesion = FULL.labels.atoms().index({'L'})
    assert target[lesion].any()
    assert inside[lesion].all()


def test_a_cached_scan_is_read_back(tmp_path):
    sets = draw_sets()
    rng = np.random.default_rng(1)
    images = {
        name: ball(sets.shape, 9) * rng.uniform(300, 900, sets.shape) for name in ('T1w', 'FLAIR')
    }
    path = cached_file(tmp_path, 'a', 'sub-01', 'T1w')
    write(path, sets, spacing=(1, 1, 3), images=images)
    assert cached_files(tmp_path, 'a', 'sub-01') == [path] == list(tmp_path.iterdir())
    person = read_person(path)
    assert (person.dataset, person.subject, person.name) == ('a', '01', 'sub-01')
    assert person.spacing_mm == (1, 1, 3)
    assert not person.isotropic
    assert np.array_equal(person.sets, sets)
    assert person.kinds is None
    low, high = np.argwhere(images['T1w'] > 0).min(0), np.argwhere(images['T1w'] > 0).max(0)
    assert person.box.tolist() == [low.tolist(), high.tolist()]
    for name, image in images.items():
        air, head = image == 0, image > 0
        found = person.images[name].numpy().astype(np.float64)
        assert np.abs(found[air]).max() < 1e-6
        assert found[head].mean() == pytest.approx(1, abs=1e-3)
        mean, std = person.levels[name]
        # What inference makes of the scan itself, but for one byte and half precision.
        np.testing.assert_allclose((found - mean) / std, normalise(image), atol=0.02)
        assert raw_images(path)[name].max() == 255


def test_a_person_of_whom_nothing_is_said(tmp_path):
    person = read_person(write(tmp_path / 'a.npz', None))
    assert person.sets.unique().tolist() == [NOTHING]
    cohort = Cohort(Source('a', modalities=('T1w', 'FLAIR')), (person,))
    assert not cohort.tells_tissue
    # One group of all classes: there is nothing to tell apart.
    assert windows(person, source=cohort.source, settings=PLAIN)[0].groups == (ALL,)


def test_a_painted_scan_is_in_units_of_white_matter(tmp_path):
    shape = (48, 48, 48)
    kinds = np.full(shape, synth.AIR, np.uint8)
    for radius, name in ((20, 'cortex'), (16, 'white matter'), (5, 'ventricle')):
        kinds[ball(shape, radius)] = synth.KIND[name]
    levels = np.zeros(len(synth.KINDS))
    levels[[synth.KIND['cortex'], synth.WHITE, synth.VENTRICLE]] = 700, 1000, 300
    noise = np.random.default_rng(0).normal(0, 20, shape)
    image = np.where(kinds > 0, levels[kinds] + noise, 0)
    image[0, 0, :3] = 400  # a scan shows something where the labels end
    path = write(tmp_path / 'a.npz', None, images={'T1w': image}, kinds=kinds)
    person = read_person(path)
    assert person.kinds is not None
    assert person.kinds[0, 0, :4].tolist() == [synth.CSF] * 3 + [synth.AIR]
    means = person.means['T1w']
    assert means[synth.WHITE] == pytest.approx(1, abs=0.01)
    assert means[synth.KIND['cortex']] == pytest.approx(0.7, abs=0.02)
    assert np.isnan(means[synth.KIND['eye']])
    assert person.counts[synth.WHITE] == (kinds == synth.WHITE).sum()
    assert person.box.tolist() == [[5] * 3, [43] * 3]
    # A window that is painted is normalised as the scan would be.
    mean, std = synth.painted_level(np.nan_to_num(means), person.counts)
    scores = normalise(image)
    for kind in (synth.WHITE, synth.KIND['cortex']):
        expected = np.median(scores[kinds == kind])
        assert (means[kind] - mean) / std == pytest.approx(expected, abs=0.3)


def test_landmarks_move_the_intensities(tmp_path):
    path = write(tmp_path / 'a.npz', draw_sets())
    plain = read_person(path)
    bent = read_person(path, {'T1w': [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]})
    assert torch.equal(plain.images['FLAIR'], bent.images['FLAIR'])
    assert not torch.equal(plain.images['T1w'], bent.images['T1w'])


def test_a_lesion_mask_has_to_be_in_its_space(tmp_path):
    mask = np.zeros(MNI_SHAPE, np.uint8)
    mask[60, 100, 90] = 1
    # Left-handed on disk.
    nib.save(nib.Nifti1Image(mask[::-1], np.diag([-1, 1, 1, 1])), tmp_path / 'mask.nii.gz')
    assert np.array_equal(read_mask(tmp_path / 'mask.nii.gz'), mask)
    nib.save(nib.Nifti1Image(mask[:9], np.eye(4)), tmp_path / 'other.nii.gz')
    with pytest.raises(ValueError, match=r'other\.nii\.gz: not on the 1 mm MNI152 grid'):
        read_mask(tmp_path / 'other.nii.gz')


# ---------------------------------------------------------------------------------------------
# Labels on the grid of a scan


def labels_of(*rows: list[int], spacing: float = 1.0) -> Volume:
    """Return a label map whose rows run along the last axis, the same across the others."""
    line = np.array([value for row in rows for value in row])
    data = np.broadcast_to(line, (6, 6, len(line))).astype(np.float32)
    return Volume(data, Grid(data.shape, np.diag([1, 1, spacing, 1.0])))


def test_sets_of_a_flipped_label_map():
    labels = labels_of([2, 2, 8, 0, 255])
    flipped = Volume(labels.data[..., ::-1], Grid(labels.grid.shape, np.diag([1, 1, -1, 1.0])))
    flipped.grid.affine[2, 3] = 4
    expected = [WHITE, WHITE, GRAY, BACKGROUND, NOTHING]
    for volume in (labels, flipped):
        sets = sets_on(labels.grid, volume, PROTOCOLS['jointseg'])
        assert sets[3, 3].tolist() == expected
        assert (sets == sets[:1, :1]).all()


def test_the_largest_share_wins_on_thick_slices():
    labels = labels_of([2, 2, 8], [8, 2, 8], [0, 0, 8], [7, 7, 7])
    affine = np.diag([1, 1, 3, 1.0])
    affine[2, 3] = 1
    sets = sets_on(Grid((6, 6, 5), affine), labels, PROTOCOLS['jointseg'])
    assert sets[3, 3].tolist() == [WHITE, GRAY, BACKGROUND, LESION, NOTHING]


def test_sets_move_with_the_transform():
    labels = labels_of([2, 2, 8, 8, 0])
    matrix = np.eye(4)
    matrix[2, 3] = 2  # what the grid calls 0 mm, the label map calls 2 mm
    sets = sets_on(labels.grid, labels, PROTOCOLS['jointseg'], matrix)
    assert sets[3, 3].tolist() == [GRAY, GRAY, BACKGROUND, NOTHING, NOTHING]


# ---------------------------------------------------------------------------------------------
# Shares


def test_shares_of_exact_sets():
    cohort = Cohort(replace(FULL, protocol='wmh2017'), ())
    assert cohort.exact
    rest = bits(ALL - {'L'})
    sets = torch.tensor([[[LESION, LESION, LESION, rest, NOTHING, LESION, NOTHING, NOTHING]]])
    groups = {group: index for index, group in enumerate(cohort.groups)}
    lesion, other = groups[frozenset({'L'})], groups[ALL - {'L'}]
    target, valid = shares(sets, cohort, 1)
    assert valid.flatten().tolist() == [1, 1, 1, 1, 0, 1, 0, 0]
    assert target[lesion].flatten().tolist() == [1, 1, 1, 0, 0, 1, 0, 0]
    assert target[other].flatten().tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    # Two points across a slice: shares of what is known, where half is not it says nothing.
    target, valid = shares(sets, cohort, 2)
    assert valid.flatten().tolist() == [1, 1, 0, 0]
    assert target[lesion].flatten()[:2].tolist() == [1, 0.5]
    assert target[other].flatten()[:2].tolist() == [0, 0.5]


def test_shares_of_sets_that_overlap(tmp_path):
    (tmp_path / 'own.tsv').write_text('index\tclasses\n0\tBG\n1\tBG VEN\n2\tWM\n3\tignore\n')
    cohort = Cohort(replace(FULL, protocol=str(tmp_path / 'own.tsv')), ())
    assert not cohort.exact
    sets = torch.tensor([[[BACKGROUND, BACKGROUND | VENTRICLE, WHITE, NOTHING]]])
    target, valid = shares(sets, cohort, 1)
    found = {
        min(group): (target[index].flatten().tolist(), valid[index].flatten().tolist())
        for index, group in enumerate(cohort.groups)
    }
    assert found == {
        'BG': ([1, 0, 0, 0], [1, 0, 1, 0]),
        'VEN': ([0, 0, 0, 0], [1, 0, 1, 0]),
        'WM': ([0, 0, 1, 0], [1, 1, 1, 0]),
        'BS': ([0, 0, 0, 0], [1, 1, 1, 0]),  # with the others that no label names
    }


def test_subsets_of_modalities():
    assert subsets(('T1w', 'FLAIR')) == [('T1w',), ('FLAIR',)]
    assert subsets(('T1w',)) == []


# ---------------------------------------------------------------------------------------------
# Samples


@pytest.mark.parametrize('settings', [PLAIN, BENT], ids=['as it is', 'augmented'])
@pytest.mark.parametrize(
    ('tells', 'hidden'),
    [
        (('L',), {'WM', 'CGM', 'VEN', 'BG'}),
        (('BG', 'CGM', 'VEN', 'SGM', 'BS', 'CBM'), {'WM', 'L'}),
    ],
)
def test_what_a_dataset_does_not_tell_reaches_no_sample(tmp_path, settings, tells, hidden):
    """Two label maps that differ by hidden distinctions alone give the very same samples."""
    sets = draw_sets()
    other = sets.copy()
    first, second, *_ = sorted(hidden)
    other[sets == bits({second})] = bits({first})
    assert not np.array_equal(sets, other)
    source = replace(FULL, tells=tells)
    settings = replace(settings, lesion_centre=1.0)
    one, two = (
        windows(
            read_person(write(tmp_path / f'{number}.npz', array), None, tells),
            source=source, settings=settings,
        )
        for number, array in enumerate((sets, other))
    )  # fmt: skip
    assert one.cohorts[0].groups == source.labels.atoms()
    assert all(same(one[number], two[number]) for number in range(12))
    found = torch.stack([one[number].target.amax((1, 2, 3)) for number in range(12)]).amax(0)
    assert (found > 0.5).sum() >= 2


@pytest.fixture
def people(tmp_path):
    """A scan of thin slices and one of thick slices."""
    thin = write(tmp_path / 'thin.npz', draw_sets())
    thick = write(tmp_path / 'thick.npz', draw_sets((24, 20, 12)), spacing=(1, 1, 4))
    return read_person(thin), read_person(thick)


def test_samples_depend_on_their_number_and_the_seed(people):
    one, two, other = windows(*people), windows(*people), windows(*people, seed=6)
    _ = two[3]
    for number in (0, 7):
        assert same(one[number], two[number])
        assert not same(one[number], other[number])
    assert not same(one[0], one[1])


def test_any_number_of_workers_gives_the_same_samples(people):
    data = windows(*people, batch=2)
    settings = Settings(architecture={}, batch=2)

    def stream(first: int, workers: int) -> list[Sample]:
        return list(_stream(data, range(first, 6), settings, workers, ALONE))

    whole = stream(0, 0)
    assert len(whole) == 6
    assert whole[0].target.shape[0] == 2
    assert torch.equal(whole[2].target[1], data[5].target)
    for first, workers in ((4, 0), (3, 1), (0, 2)):
        found = stream(first, workers)
        assert len(found) == 6 - first
        assert all(same(a, b) for a, b in zip(found, whole[first:], strict=True)), workers


def test_neighbours_in_a_batch_share_their_plan(people):
    single = read_person_of(people[0], 'T1w')
    data = windows(*people, single, batch=2, settings=replace(BENT, window=(16, 16, 10)))
    plans = set()
    for number in range(0, 60, 2):
        first, second = data[number], data[number + 1]
        assert first.images.keys() == second.images.keys()
        assert first.target.shape == second.target.shape
        plans.add((tuple(sorted(first.images)), first.target.shape))
    assert {names for names, _ in plans} == {('T1w',), ('FLAIR',), ('FLAIR', 'T1w')}
    # Windows of thin slices and of thick ones.
    assert len({shape for _, shape in plans}) == 2


def test_people_without_any_of_the_wanted_sets_show_what_they_have(people):
    single = read_person_of(people[0], 'T1w')
    both = replace(BENT, modalities=((('T1w', 'FLAIR'), 1.0),))
    assert windows(single, settings=both)[0].images.keys() == {'T1w'}
    assert windows(people[0], settings=both)[0].images.keys() == {'T1w', 'FLAIR'}


def read_person_of(person: Person, modality: str) -> Person:
    """Return a person of whom one modality alone was scanned."""
    return replace(
        person,
        images={modality: person.images[modality]},
        levels={modality: person.levels[modality]},
    )


def test_datasets_are_drawn_by_their_share(people):
    one, two = replace(FULL, protocol='wmh2017'), replace(FULL, share=3.0)
    data = Windows(
        [Cohort(one, people[:1]), Cohort(two, people[:1])], settings=PLAIN, seed=0, length=200
    )
    drawn = [len(data[number].groups) for number in range(200)]
    # By default as many as it has people.
    assert drawn.count(2) == pytest.approx(50, abs=20)
    assert drawn.count(len(CLASSES)) == 200 - drawn.count(2)


# ---------------------------------------------------------------------------------------------
# Windows as they are


def dot(shape: tuple[int, int, int], place: tuple[int, int, int]) -> np.ndarray:
    sets = np.full(shape, WHITE, np.uint8)
    sets[place] = LESION
    return sets


@pytest.mark.parametrize('slice_mm', [1.0, 3.0])
def test_windows_lie_over_the_brain(tmp_path, slice_mm):
    """As at inference: one that is smaller shows little else, one that is larger shows it all."""
    inside = np.zeros((90, 100, 96), bool)
    inside[20:70, 20:80, 16:76] = True
    sets = np.where(inside, WHITE, BACKGROUND).astype(np.uint8)
    scan = {'T1w': inside * np.random.default_rng(0).uniform(80, 120, inside.shape)}
    person = read_person(write(tmp_path / 'a.npz', sets, images=scan))
    white = FULL.labels.atoms().index({'WM'})
    for window, least in (((40, 40, 24), 0.8 * 0.8 * 16 / 24), ((96, 96, 96), None)):
        settings = replace(
            BENT, window=window, thin_window=window, intact_share=1.0, outside_share=0.0,
            view_share=0.0,
        )  # fmt: skip
        for number in range(12):
            drawn = windows(person, settings=settings, slice_mm=(slice_mm, slice_mm))[number]
            share = drawn.target[white].sum()
            if least is None:
                assert share * slice_mm == pytest.approx(inside.sum(), rel=0.02)
            else:
                assert share / drawn.target[white].numel() > 0.95 * least


def test_windows_are_centred_at_dilated_lesions(tmp_path):
    place = (20, 18, 9)
    path = write(tmp_path / 'a.npz', dot((40, 36, 18), place), spacing=(1, 1, 3))
    settings = replace(PLAIN, lesion_centre=1.0, dilate_mm=4.5)
    data = windows(read_person(path), settings=settings)
    channel = data.cohorts[0].groups.index(frozenset({'L'}))
    offsets = []
    for number in range(60):
        (found,) = (data[number].target[channel] > 0).nonzero()
        offsets.append(found - torch.tensor(settings.window) / 2)
    spread = torch.stack(offsets).abs().amax(0).tolist()
    # 4.5 mm are 4.5 voxels within a slice and 1.5 across, give or take rounding.
    assert spread[0] == pytest.approx(4.5, abs=0.5)
    assert spread[1] == pytest.approx(4.5, abs=0.5)
    assert spread[2] == pytest.approx(1.5, abs=0.5)
    # Uniform windows miss so small a lesion more often than not.
    uniform = windows(read_person(path), settings=PLAIN)
    assert sum(bool(uniform[number].target[channel].any()) for number in range(60)) < 30


def test_windows_are_cut_out_of_the_scan(tmp_path):
    shape = (20, 16, 9)
    place = np.arange(np.prod(shape)).reshape(shape)
    images = {'T1w': 1 + place / place.size}
    person = read_person(write(tmp_path / 'a.npz', dot(shape, (0, 0, 0)), images=images))
    mean, std = person.levels['T1w']
    data = windows(person, settings=replace(PLAIN, lesion_centre=0.5, dilate_mm=0.0))
    scores = (person.images['T1w'].float() - mean) / std
    choices = scores.unfold(0, 12, 1).unfold(1, 12, 1).unfold(2, 6, 1)
    corners = set()
    for number in range(30):
        image = data[number].images['T1w'][0]
        ((*corner,),) = (choices == image).all(-1).all(-1).all(-1).nonzero().tolist()
        corners.add(tuple(corner))
    # Half of them at the lesion in the corner, as near as the scan lets them.
    assert (0, 0, 0) in corners
    assert len(corners) > 8


@pytest.mark.parametrize(('spacing', 'slice_mm'), [((1, 1, 1), (1, 1)), ((1, 1, 3), (1, 3))])
def test_an_intact_scan_is_neither_turned_nor_degraded(tmp_path, spacing, slice_mm):
    person = read_person(write(tmp_path / 'a.npz', draw_sets(), spacing=spacing))
    settings = replace(BENT, intact_share=1.0, view_share=0.0, modalities=((('T1w',), 1.0),))
    data = windows(person, settings=settings, slice_mm=slice_mm)
    samples = [data[number] for number in range(12)]
    lesion = FULL.labels.atoms().index({'L'})
    assert max(int(sample.target[lesion].sum()) for sample in samples) == len(person.lesions)
    (mean, std), scan = person.levels['T1w'], person.images['T1w'].double()
    for number in range(4):
        rng, generator = np.random.default_rng(number), torch.Generator().manual_seed(number)
        sample = data.compose(
            person, data.cohorts[0], ['T1w'], whole(person), 1, None, np.eye(4), rng, generator,
            intact=True,
        )  # fmt: skip
        score = ((scan - mean) / std).clamp_min(-6).flatten().numpy()
        inside = score > -5
        image = sample.images['T1w'].flatten().numpy()[inside]
        slope, shift = np.polyfit(score[inside], image, 1)
        assert np.abs(slope * score[inside] + shift - image).max() < 1e-3
        assert 0.95 < slope < 1.05
        assert abs(shift) < 0.06


def test_a_window_can_be_acquired_twice(tmp_path):
    sets = draw_sets()
    values = np.random.default_rng(0).uniform(20, 120, sets.shape)
    scans = {name: ball(sets.shape, 7) * values for name in ('T1w', 'FLAIR')}
    person = read_person(write(tmp_path / 'a.npz', sets, images=scans))
    settings = replace(BENT, intact_share=1.0, view_share=0.0, outside_share=0.0)
    once, both = (windows(person, settings=settings, again=again) for again in (False, True))
    bends = []
    for number in range(20):
        sample = both[number]
        assert same(sample, once[number])
        assert not once[number].again
        assert sample.again.keys() == sample.images.keys()
        for name, first in sample.images.items():
            head = first > first.min() + 0.5
            if head.sum() > 200:
                # The same order of intensities, but for a little noise; another contrast.
                pair = torch.stack([first[head], sample.again[name][head]])
                assert torch.corrcoef(pair)[0, 1] > 0.97
                bends.append(np.polyfit(*pair.numpy(), 2)[0])
    assert np.std(bends) > 0.01
    batch = collate([both[0], both[0]])
    shapes = {name: (2, *image.shape) for name, image in both[0].again.items()}
    assert {name: image.shape for name, image in batch.again.items()} == shapes


def test_a_bare_scan_is_acquired_again_in_a_weak_coil_with_a_little_noise():
    rng = np.random.default_rng(0)
    bare = augment.undisturbed(augment.draw_intensity(rng))
    for _ in range(20):
        again = augment.drawn_again(bare, rng)
        assert 0 < again.bias < 0.05
        assert 0 < again.noise < 0.03
        assert again.thickness == bare.thickness
    strong = replace(bare, bias=0.15, noise=0.05)
    again = augment.drawn_again(strong, rng)
    assert (again.bias, again.noise) == (0.15, 0.05)


def test_level_after_an_exponent():
    scan = torch.normal(1.0, 0.2, (100_000,), generator=torch.Generator().manual_seed(0))
    scan = scan.clamp_min(0)
    for gamma in (0.8, 1.25):
        mean, std = augment.level_after(1.0, 0.2, gamma)
        assert mean == pytest.approx(float((scan**gamma).mean()), abs=0.01)
        assert std == pytest.approx(float((scan**gamma).std()), rel=0.03)


def test_a_scan_smaller_than_the_window_lies_in_air(tmp_path):
    shape = (8, 20, 4)
    images = {'T1w': np.full(shape, 100.0)}
    images['T1w'][0, 0, 0] = 0
    sets = np.full(shape, WHITE, np.uint8)
    person = read_person(write(tmp_path / 'a.npz', sets, images=images))
    data = windows(person, settings=PLAIN)
    places = set()
    for number in range(30):
        sample = data[number]
        white = sample.target[sample.groups.index(frozenset({'WM'}))] > 0
        x, y, z = (torch.unique(axis).tolist() for axis in white.nonzero().T)
        assert (len(x), len(y), len(z)) == (8, 12, 4)
        places.add((x[0], z[0]))
        assert torch.equal(sample.target[sample.groups.index(frozenset({'BG'}))] > 0, ~white)
        assert (sample.valid == 1).all()
        image = sample.images['T1w'][0]
        air = -person.levels['T1w'][0] / person.levels['T1w'][1]
        assert torch.allclose(image[~white], torch.tensor(air), atol=1e-3)
    # Wherever it fits.
    assert {x for x, _ in places} == set(range(5))
    assert {z for _, z in places} == set(range(3))


# ---------------------------------------------------------------------------------------------
# Windows that are bent, and painted ones


def test_thick_slices_are_kept(tmp_path):
    shape = (40, 40, 14)
    sets = np.full(shape, WHITE, np.uint8)
    sets[..., ::2] = GRAY
    person = read_person(write(tmp_path / 'a.npz', sets, spacing=(1, 1, 5)))
    data = windows(person, settings=replace(BENT, lesion_centre=0.0), slice_mm=(1.0, 6.0))
    white, gray = (data.cohorts[0].groups.index(frozenset({name})) for name in ('WM', 'CGM'))
    turned = set()
    for number in range(30):
        target = data[number].target
        assert target.unique().tolist() in ([0, 1], [1], [0])
        seen = torch.stack([target[white].sum((0, 1)) > 0, target[gray].sum((0, 1)) > 0])
        assert (seen.sum(0) <= 1).all()
        # Neighbours stay neighbours.
        inside = (seen.sum(0) == 1).nonzero()[:, 0]
        if len(inside) > 1:
            assert (seen[0, inside[1:]] != seen[0, inside[:-1]]).all()
            turned.add(bool(seen[0, inside[0]]))
    assert turned == {False, True}


@pytest.fixture(scope='module')
def head(tmp_path_factory):
    """A head of shells without a scan."""
    shape = (96, 96, 96)
    labels = np.zeros(shape, np.int16)
    for radius, value in ((44, 507), (36, 24), (33, 3), (29, 2), (8, 4)):
        labels[ball(shape, radius)] = value
    # Left-handed on disk: the cache must turn it.
    affine = np.diag([-1.0, 1, 1, 1])
    volume = Volume(labels[::-1].astype(np.float32), Grid(shape, affine))
    grid, kinds = painted_grid(volume, 'freesurfer')
    sets = sets_on(grid, volume, PROTOCOLS['freesurfer'])
    path = tmp_path_factory.mktemp('heads') / 'head.npz'
    write_person(
        path, dataset='heads', subject='01', name='sub-01', grid=grid, images={}, sets=sets,
        kinds=kinds,
    )  # fmt: skip
    return volume, read_person(path)


@pytest.fixture(scope='module')
def mask():
    """A lesion in MNI152 space, well within the white matter of the shells."""
    mask = torch.zeros(MNI_SHAPE, dtype=torch.uint8)
    mask[58:70, 100:112, 90:98] = 1
    return mask


PAINTED = Source('heads', painted=('T1w', 'FLAIR'), annotation='.', protocol='freesurfer')
AROUND = SampleSettings(
    window=(32, 32, 16), thin_window=(32, 32, 16), lesion_centre=1.0, outside_share=0.0,
    lesion_share=1.0, thin_share=1.0, modalities=((('T1w', 'FLAIR'), 1.0),),
)  # fmt: skip


def test_a_painted_head_is_cached_without_a_scan(head):
    _, person = head
    assert person.images == {}
    assert person.isotropic
    assert person.kinds is not None
    assert int(person.kinds.max()) == synth.KIND['soft tissue']
    # Extracerebral kinds are background, whatever their number.
    assert (person.sets[person.kinds == synth.KIND['soft tissue']] == BACKGROUND).all()
    found = {bits({name}) for name in ('BG', 'WM', 'CGM', 'VEN')}
    assert set(person.sets.unique().tolist()) == found


def test_lesions_are_painted_into_white_matter_bright_on_flair(head, mask):
    data = windows(head[1], source=PAINTED, settings=AROUND, masks=[mask])
    lesion, white = (data.cohorts[0].groups.index(frozenset({name})) for name in ('L', 'WM'))
    seen = brighter = 0
    for number in range(20):
        sample = data[number]
        assert torch.allclose((sample.target * sample.valid).sum(0), sample.valid[0], atol=1e-3)
        found, rest = sample.target[lesion] > 0.9, sample.target[white] > 0.9
        if found.sum() > 20 and rest.sum() > 20:
            flair = sample.images['FLAIR'][0]
            seen += 1
            brighter += bool(flair[found].mean() > flair[rest].mean())
    assert seen >= 8
    assert brighter >= 0.9 * seen
    # And into no other dataset.
    none = windows(head[1], source=replace(PAINTED, lesions=False), settings=AROUND, masks=[mask])
    assert not any((none[number].target[lesion] > 0).any() for number in range(5))


def test_thick_painted_slices_have_partial_volume(head):
    data = windows(
        head[1], source=PAINTED, settings=replace(AROUND, thin_share=0.0), slice_mm=(3.0, 6.0)
    )
    found = torch.cat([data[number].target.flatten() for number in range(4)])
    assert ((found > 0.2) & (found < 0.8)).any()


def test_a_whole_painted_head(head, mask):
    volume, person = head
    images, labels, grid = paint_head(volume, 'freesurfer', [mask], seed=3)
    again, same_labels, _ = paint_head(volume, 'freesurfer', [mask], seed=3)
    assert images.keys() == {'T1w', 'FLAIR'}
    for name, image in images.items():
        assert image.shape == labels.shape == grid.shape
        assert np.array_equal(image, again[name])
        assert image.min() == 0
    assert np.array_equal(labels, same_labels)
    found = dict(zip(CLASSES, [(labels == index).sum() for index in INDICES], strict=True))
    assert found['L'] > 100
    assert found['CBM'] == 0
    truth = int((person.sets == WHITE).sum())
    assert found['WM'] + found['L'] == pytest.approx(truth, rel=0.02)
    lesion, white = labels == 7, labels == 2
    assert images['FLAIR'][lesion].mean() > images['FLAIR'][white].mean()
    assert images['T1w'][white].mean() > images['T1w'][labels == 8].mean()
    assert not (lesion & (person.sets.numpy() != WHITE)).any()


def test_an_intact_painted_head_has_no_noise_in_the_air(head):
    volume, person = head
    air = person.kinds.numpy() == synth.AIR
    spread = []
    for intact in (True, False):
        images, labels, grid = paint_head(volume, 'freesurfer', [], seed=3, intact=intact)
        assert images['T1w'].shape == labels.shape == grid.shape == air.shape
        spread.append(images['T1w'][air].std())
    assert spread[0] == 0
    assert spread[1] > 0.01


def test_a_whole_painted_head_of_thick_slices(head):
    volume, person = head
    images, labels, grid = paint_head(volume, 'freesurfer', [], seed=3, slice_mm=4)
    assert images['T1w'].shape == labels.shape == grid.shape
    assert grid.shape[2] == person.sets.shape[2] // 4
    assert grid.spacing_mm.tolist() == [1, 1, 4]
    thin, _ = painted_grid(volume, 'freesurfer')
    # The first slice is the mean of the first four.
    np.testing.assert_allclose(grid.affine @ [0, 0, 0, 1], (thin.affine @ [0, 0, 1.5, 1]))


def test_contrasts_spread_step_by_step(tmp_path, monkeypatch):
    """The first painted scans are of one scanner, the later ones of any, as without steps."""
    person = read_person(write(tmp_path / 'a.npz', draw_sets()))
    seen: list[float] = []
    compose = Windows.compose

    def look(*given, contrast_spread, **more):
        seen.append(contrast_spread)
        return compose(*given, contrast_spread=contrast_spread, **more)

    monkeypatch.setattr(Windows, 'compose', look)
    for steps, batch in ((0, 1), (4, 1), (4, 2)):
        data = windows(person, settings=replace(BENT, contrast_steps=steps), batch=batch)
        for number in (0, 1, 3, 9):
            data[number]
    assert seen == [1, 1, 1, 1, 0.25, 0.5, 1, 1, 0.25, 0.25, 0.5, 1]


def test_the_first_samples_are_coarse(tmp_path, monkeypatch):
    """Voxels lie twice as far apart for some iterations, then as they would without."""
    person = read_person(write(tmp_path / 'a.npz', draw_sets()))
    steps: list[float] = []
    compose = Windows.compose

    def look(self, person, cohort, modalities, points, *given, **more):
        steps.append(float((points[1:] - points[:-1]).norm(dim=-1).mean()))
        return compose(self, person, cohort, modalities, points, *given, **more)

    monkeypatch.setattr(Windows, 'compose', look)
    plain = windows(person, settings=BENT, slice_mm=(1.0, 1.0))
    settings = replace(BENT, coarse_steps=2, coarse_window=(24, 16, 8))
    coarse = windows(person, settings=settings, slice_mm=(1.0, 1.0))
    for number in range(4):
        fine, sample = plain[number], coarse[number]
        if number < 2:
            assert sample.target.shape[1:] == (24, 16, 8)
            assert steps[-1] == pytest.approx(2 * steps[-2], rel=0.15)  # each is bent otherwise
        else:
            assert torch.equal(sample.target, fine.target)


def test_a_model_of_large_voxels_learns_from_painted_heads(head):
    """They lie on a grid of 1 mm; a window of voxels four times as long shows all of a head."""
    _, person = head
    source = replace(FULL, name='heads', modalities=(), painted=('T1w',), protocol='freesurfer')
    settings = replace(BENT, thin_window=(48, 64, 64), outside_share=0.0, strip_share=0.0)
    large = {'in_plane_mm': 4.0, 'slice_mm': (4.0, 4.0)}
    sample = windows(person, source=source, settings=settings, **large)[0]
    assert sample.images['T1w'].shape == (1, 48, 64, 64)
    brain = float((sample.target[[g != {'BG'} for g in sample.groups]]).sum())
    whole = float((person.sets != BACKGROUND).sum()) / 4**3
    assert brain == pytest.approx(whole, rel=0.5)
