"""The weights in the package: their card is complete, and they do what it says."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_jointseg import image
from bids_jointseg.card import read_card
from bids_jointseg.inference import predict
from bids_jointseg.labels import CLASSES, INDICES, PROTOCOLS, TISSUES, bits
from bids_jointseg.metrics import dice
from bids_jointseg.network import load_model
from bids_jointseg.recipe import read_recipe, tuples

DATA = Path(__file__).parents[2] / 'shared' / 'data' / 'neuromorphometrics'


def test_dice_on_literals():
    found = np.array([2, 2, 7, 0, 8])
    truth = np.array([2, 7, 7, 2, 8])
    scores = dice(found, truth)
    assert scores['WM'] == pytest.approx(50)
    assert scores['L'] == pytest.approx(200 / 3)
    assert scores['CGM'] == 100
    assert np.isnan(scores['VEN'])
    assert dice(found, truth, valid=truth != 2, classes=['WM']) == {'WM': 0}
    with pytest.raises(ValueError, match='shapes differ'):
        dice(found, truth[:3])


LICENCES = {'jointseg': 'CC BY-NC 4.0', 'open': 'CC BY 4.0', 'paper': 'CC BY-NC 4.0'}
WITH_INTERVALS = ('jointseg', 'open')


@pytest.mark.parametrize(('name', 'licence'), LICENCES.items())
def test_the_packaged_cards_are_complete(name, licence):
    card, recipe = read_card(name), read_recipe(name)
    assert card.licence == recipe.licence == licence
    assert card.version == recipe.version
    assert card.training['steps'] > 0
    acquisitions = {
        f'{inputs}, {slices}'
        for inputs in ('T1w', 'FLAIR', 'T1w+FLAIR')
        for slices in ('thin', 'thick')
    }
    assert set(card.repeatability) == (acquisitions if name in WITH_INTERVALS else set())
    for factors in card.repeatability.values():
        assert set(factors) == {*TISSUES, 'L', 'brain'}
    figures = card.accuracy['mean Dice, %']
    assert set(figures['neuromorphometrics_T1w']['dice']) == set(TISSUES)
    assert {'patient_T1w_FLAIR', 'patient_T1w', 'patient_FLAIR'} <= set(figures)
    assert tuples(card.architecture) == recipe.architecture
    assert card.slice_mm == recipe.slice_mm
    datasets = {source.name: source for source in recipe.datasets}
    assert set(card.training['people']) <= set(datasets)
    # The test people are those of the default recipe, of datasets that this one leaves out, too.
    for source in (*recipe.datasets, *read_recipe('jointseg').datasets):
        learned = set(card.training['people'].get(source.name, ()))
        assert not learned & {*source.test, *source.validation}


def test_the_open_model_has_learned_from_no_scan_for_non_commercial_use():
    card = read_card('open')
    assert {*card.training['people'], *card.training['unlabelled']} == {
        'heads', 'openms-mni', 'openms',
    }  # fmt: skip
    assert not read_recipe('open').training.init


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason='needs the shared data')
def test_a_validation_person_is_segmented_as_well_as_the_card_says():
    subject = read_recipe('jointseg').datasets[0].validation[-1]
    name = f'sub-{subject}_ses-1'
    scan = image.load_scan(DATA / f'sub-{subject}' / 'ses-1' / 'anat' / f'{name}_T1w.nii.gz')
    card = read_card()
    grid = image.model_grid(scan, in_plane_mm=card.in_plane_mm, slice_mm=card.slice_mm)
    normalised = image.normalise(image.resample(scan, grid))
    (found,) = predict(
        load_model(card),
        {'T1w': normalised},
        window=card.window,
        device='cpu',
    )
    joint = image.joint_probabilities({'T1w': (found, grid)}, scan.grid, {'T1w': np.eye(4)})
    annotation = DATA / 'derivatives' / 'manual' / f'sub-{subject}' / 'ses-1' / 'anat'
    labels = nib.load(annotation / f'{name}_desc-neuromorphometrics_dseg.nii.gz')
    sets = PROTOCOLS['neuromorphometrics'].encode(np.asanyarray(labels.dataobj).astype(int))
    truth = np.zeros(sets.shape, np.uint8)
    for channel, class_name in enumerate(CLASSES):
        truth[sets == bits({class_name})] = INDICES[channel]
    scores = dice(image.label_map(joint), truth)
    assert np.mean([scores[tissue] for tissue in TISSUES]) > 91
