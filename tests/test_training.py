"""Painting, sampling and the training loop, on people made here."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_jointseg import augment, synth
from bids_jointseg.image import normalise
from bids_jointseg.labels import CLASSES
from bids_jointseg.recipe import RecipeError, read_recipe
from bids_jointseg.sampling import (
    MNI_SHAPE,
    Pairs,
    Settings,
    Windows,
    read_lesions,
    read_person,
    write_lesions,
    write_person,
)
from bids_jointseg.training import Settings as TrainingSettings
from bids_jointseg.training import run

LESION = CLASSES.index('L')


def ball(shape: tuple[int, int, int], radius: float) -> np.ndarray:
    axes = np.ogrid[tuple(slice(-(n // 2), n - n // 2) for n in shape)]
    return np.asarray(sum(axis**2 for axis in axes) < radius**2)


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    """A painted head and a person with a T1w: shells of cortex, white matter and ventricle."""
    folder = tmp_path_factory.mktemp('people')
    shape = (96, 96, 96)
    labels = np.zeros(shape, np.int16)
    for radius, value in ((44, 507), (36, 24), (33, 3), (29, 2), (8, 4)):
        labels[ball(shape, radius)] = value
    nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / 'head.nii.gz')
    write_person(folder / 'head.nii.gz', 'freesurfer', None, folder / 'heads_sub-01.npz')
    labels = np.zeros(shape, np.int16)
    for radius, value in ((33, 100), (29, 44), (8, 51)):
        labels[ball(shape, radius)] = value
    t1w = np.select([labels == 44, labels == 100, labels == 51], [1000, 700, 200])
    t1w = t1w + 20 * np.random.default_rng(0).normal(size=shape) * (labels > 0)
    for name, array in (('labels', labels), ('t1w', t1w.astype(np.int16))):
        # Left-handed on disk: the cache must turn it.
        flipped = nib.Nifti1Image(array[::-1], np.diag([-1, 1, 1, 1]))
        nib.save(flipped, folder / f'{name}.nii.gz')
    write_person(
        folder / 'labels.nii.gz', 'neuromorphometrics', folder / 't1w.nii.gz',
        folder / 'neuro_sub-01.npz',
    )  # fmt: skip
    return read_person(folder / 'heads_sub-01.npz'), read_person(folder / 'neuro_sub-01.npz')


@pytest.fixture(scope='module')
def lesions(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lesions')
    mask = np.zeros(MNI_SHAPE, np.uint8)
    mask[70:80, 100:112, 90:98] = 1
    nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / 'mask.nii.gz')
    write_lesions({'01': folder / 'mask.nii.gz'}, folder / 'lesions.npz')
    (read,) = read_lesions(folder / 'lesions.npz', ['01'])
    assert np.array_equal(read.numpy(), mask)
    return [read]


SMALL = Settings(
    thin_window=(32, 32, 16), thick_window=(32, 32, 16), lesion_centre=1.0, outside_share=0.0
)


def windows(people, lesions, **settings):
    head, control = people
    both = replace(SMALL, modalities=((('T1w', 'FLAIR'), 1.0),), **settings)
    return Windows([control], [head], lesions, settings=both, seed=1, length=100)


def test_the_cache_keeps_labels_scan_and_kinds(people):
    head, control = people
    assert head.t1w is None
    assert int(head.kinds.max()) == synth.KIND['soft tissue']
    assert control.means[synth.WHITE] == pytest.approx(1, abs=0.01)
    assert control.means[synth.KIND['cortex']] == pytest.approx(0.7, abs=0.02)
    assert set(np.unique(control.classes)) == {
        CLASSES.index(n) for n in ('BG', 'WM', 'CGM', 'VEN')
    }
    # Extracerebral kinds are background, whatever their number.
    outside = head.kinds == synth.KIND['soft tissue']
    assert (head.classes[outside] == 0).all()


def test_samples_depend_on_their_number_alone(people, lesions):
    one, two = windows(people, lesions), windows(people, lesions)
    _ = two[3]
    for number in (0, 7):
        a, b = one[number], two[number]
        assert a.images.keys() == b.images.keys() == {'T1w', 'FLAIR'}
        assert torch.equal(a.images['FLAIR'], b.images['FLAIR'])
        assert torch.equal(a.target, b.target)
    assert not torch.equal(one[0].target, one[1].target)


def test_lesions_lie_in_white_matter_bright_on_flair(people, lesions):
    data = windows(people, lesions, lesion_share=1.0, thin_share=1.0)
    brighter = 0
    seen = 0
    for number in range(20):
        sample = data[number]
        assert sample.target.shape == (len(CLASSES), 32, 32, 16)
        assert torch.allclose(sample.target.sum(0), torch.ones(()), atol=1e-3)
        lesion, white = sample.target[LESION] > 0.9, sample.target[1] > 0.9
        if lesion.sum() > 20 and white.sum() > 20:
            flair = sample.images['FLAIR'][0]
            seen += 1
            brighter += bool(flair[lesion].mean() > flair[white].mean())
    assert seen >= 8
    assert brighter >= 0.9 * seen


def test_thick_slices_have_partial_volume(people, lesions):
    data = windows(people, lesions, thin_share=0.0)
    shares = torch.cat([data[number].target.flatten() for number in range(4)])
    assert ((shares > 0.2) & (shares < 0.8)).any()


def test_painted_windows_are_normalised_as_their_scan_would_be(people):
    _, control = people
    z = normalise(control.t1w.numpy().astype(np.float32))
    mean, std = synth.painted_level(np.nan_to_num(control.means), control.counts)
    for kind in (synth.WHITE, synth.KIND['cortex']):
        expected = float(np.median(z[control.kinds.numpy() == kind]))
        assert (control.means[kind] - mean) / std == pytest.approx(expected, abs=0.3)


def test_warp_is_exact_at_voxels():
    volume = torch.arange(60.0).reshape(3, 4, 5)
    points = torch.tensor([[[[0.0, 0, 0], [1, 2, 3], [2, 3, 4], [1, 2.5, 3], [9, 9, 9]]]])
    linear = augment.warp(volume, points).flatten().tolist()
    assert linear == pytest.approx([0, 33, 59, 35.5, 0], abs=1e-4)
    nearest = augment.warp(volume, points, 'nearest').flatten().tolist()
    assert nearest[:3] == [0, 33, 59]


def test_geometry_maps_slices_to_their_axis():
    rng = np.random.default_rng(0)
    drawn = augment.draw_geometry(rng, (8, 8, 4), 'sagittal', np.zeros(3), 3.0)
    # The slice axis of a sagittal window runs along the first anatomical axis, in 3 mm steps.
    assert np.abs(drawn.matrix[:, 2]).argmax() == 0
    assert np.linalg.norm(drawn.matrix[:, 2]) == pytest.approx(3, rel=0.3)


def test_blur_keeps_the_sum_of_a_point():
    point = torch.zeros(31, 31, 31)
    point[15, 15, 15] = 1
    blurred = synth.blur(point, 2.0)
    assert float(blurred.sum()) == pytest.approx(1, abs=0.01)
    assert float(blurred.max()) == pytest.approx((2 * np.pi * 4) ** -1.5, rel=0.02)


def test_a_killed_training_goes_on_to_the_same_weights(people, lesions, tmp_path):
    pair = tmp_path / 'pair.npz'
    rng = np.random.default_rng(0)
    np.savez(pair, **{name: rng.normal(size=(40, 30, 20)) for name in ('T1w', 'FLAIR')})
    data = windows(people, lesions)
    settings = TrainingSettings(
        architecture={'name': 'unet', 'channels': [4, 8]},
        steps=6, consistency_from=1, consistency_every=2, save_every=2,
    )  # fmt: skip

    def train(folder: Path, seconds: float = float('inf')):
        pairs = Pairs([pair], seed=3, length=9, window=(32, 32, 16))
        return run(settings, [data, data], pairs, [data[50]], folder, workers=0, seconds=seconds)

    whole = train(tmp_path / 'whole').state_dict()
    for _ in range(6):
        train(tmp_path / 'parts', seconds=0)  # one step at a time
    parts = train(tmp_path / 'parts').state_dict()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    curve = (tmp_path / 'parts' / 'curve.csv').read_text().splitlines()
    assert len(curve) == 1 + 6
    assert curve[0].startswith('step,seconds_per_step,loss_0')


def test_the_packaged_recipe_keeps_test_people_out():
    recipe = read_recipe('jointseg')
    parts = {source.name: source for source in recipe.datasets}
    assert set(parts['neuromorphometrics'].test) == {'0111', '0117', '0395', '0300', '0331'}
    assert set(parts['heads'].test) == {'17', '18', '19', '20'}
    assert set(parts['openms-mni'].test) == {'26', '27', '28', '29', '30'}
    assert parts['heads'].part('17') == 'test'
    assert parts['heads'].part('15') == 'validation'
    assert parts['heads'].part('01') == 'train'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('name = ', 'not TOML'),
        ('surprise = 1', 'a recipe has'),
        (
            'name="x"\nversion="1"\nlicence=""\n[architecture]\n'
            '[[datasets]]\nname="a"\nrole="tissue"\nprotocol="nobody"',
            "protocol 'nobody'",
        ),
    ],
)
def test_a_broken_recipe_is_named(tmp_path, text, message):
    path = tmp_path / 'broken.toml'
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf'broken\.toml: .*{message}'):
        read_recipe(path)
