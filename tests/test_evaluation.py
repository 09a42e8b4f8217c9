"""Predicted against reference: regions, pairing, tools' files, tables and exit codes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from bids_jointseg import cli, evaluation
from bids_jointseg.bids import BidsError, DataError
from bids_jointseg.image import Grid, ImageError
from bids_jointseg.labels import ALL, IGNORE, PROTOCOLS, Protocol, bits

JOINT = PROTOCOLS['jointseg']
NEURO = PROTOCOLS['neuromorphometrics']
SPM = evaluation.TOOLS['spm'].protocol
AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
WM, L, CGM, SGM, BS, CBM, VEN = 2, 7, 8, 9, 10, 11, 12


def save(path, data, affine=AFFINE, slope=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.mgz':
        nib.save(nib.MGHImage(np.asarray(data, np.int32), affine), path)
        return path
    image = nib.Nifti1Image(data, affine)
    if slope:
        image.header.set_slope_inter(slope, 0)
    nib.save(image, path)
    return path


def brain(shift=0):
    """Return blocks of every class, 4 x 4 x 3 voxels each, in a row; the lesion in the WM."""
    labels = np.zeros((32, 6, 5), np.uint8)
    for number, index in enumerate((CGM, WM, BS, SGM, VEN, CBM)):
        labels[1 + 5 * number : 5 + 5 * number, 1:5, 1:4] = index
    labels[7:9, 2, 2] = L
    return np.roll(labels, shift, axis=0)


def dataset(root, **scans):
    """Write label maps: sub01=array -> sub-01/anat/sub-01_desc-x_dseg.nii.gz."""
    for name, data in scans.items():
        sub = f'sub-{name[3:]}'
        save(root / sub / 'anat' / f'{sub}_desc-x_dseg.nii.gz', data)
    return root


def read(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file, delimiter='\t'))


def row_of(path, **where):
    (row,) = [r for r in read(path) if all(r[key] == value for key, value in where.items())]
    return row


# ------------------------------------------------------------------------- what is compared


def names(predicted, reference):
    return [evaluation.region_name(r) for r in evaluation.regions(predicted, reference)]


def test_regions_are_what_both_tell_apart():
    every = ['CGM', 'WM', 'BS', 'SGM', 'VEN', 'CBM', 'L']  # the paper's order
    assert names(JOINT, JOINT) == every
    assert names(JOINT, NEURO) == every[:-1]
    assert names(JOINT, PROTOCOLS['wmh2017']) == ['L']
    assert names(PROTOCOLS['binary-lesion'], JOINT) == ['L']
    assert names(PROTOCOLS['binary-lesion'], NEURO) == []
    patients = Protocol('patients', {0: frozenset({'BG'}), 1: frozenset({'WM', 'L'})})
    assert names(JOINT, patients) == ['WM+L']
    assert names(PROTOCOLS['wmh2017'], patients) == []


def test_three_tissues_leave_fluid_cerebellum_and_brainstem_out():
    """SPM's fluid is that of ventricles and sulci together, and these are background here."""
    assert names(SPM, JOINT) == ['CGM+SGM', 'WM+L']
    among = evaluation.common_regions(JOINT, {'joint': JOINT, 'spm': SPM})
    assert list(map(evaluation.region_name, among)) == [
        'CGM', 'CGM+SGM', 'WM', 'WM+L', 'BS', 'SGM', 'VEN', 'CBM', 'L'
    ]  # fmt: skip
    assert among[frozenset({'CGM', 'SGM'})] == {'CBM', 'BS'}
    assert among[frozenset({'CGM'})] == frozenset()


def test_a_union_is_scored_from_literal_bits():
    c = {name: bits({name}) for name in ALL}
    gray, white = bits({'CGM', 'SGM'}), bits({'WM', 'L'})
    truth = [c['CGM'], c['SGM'], c['WM'], c['L'], c['CBM'], c['BS'], c['BG'], bits(IGNORE)]
    found = [gray, white, white, white, gray, white, gray, gray]
    rows = evaluation.score(
        np.array(found, np.uint8).reshape(8, 1, 1),
        np.array(truth, np.uint8).reshape(8, 1, 1),
        (1.0, 2.0, 3.0),
        predicted=SPM,
        scan='s',
    )
    by_region = {row['region']: row for row in rows}
    assert list(by_region) == ['CGM+SGM', 'WM+L']
    assert all(row['scan'] == 's' for row in rows)
    gm, wm = by_region['CGM+SGM'], by_region['WM+L']
    # Cerebellum, brainstem and what is ignored do not count; gray in the background does.
    assert (gm['predicted_mm3'], gm['reference_mm3']) == (12.0, 12.0)
    assert gm['dice'] == pytest.approx(50.0)
    assert (wm['predicted_mm3'], wm['reference_mm3']) == (18.0, 12.0)
    assert wm['dice'] == pytest.approx(80.0)
    assert wm['jaccard'] == pytest.approx(200 / 3)
    assert wm['avd_percent'] == pytest.approx(50.0)
    assert wm['volumetric_similarity'] == pytest.approx(0.8)


def test_a_reference_that_leaves_a_region_open_does_not_count_there():
    white = Protocol('x', {0: frozenset({'BG'}), 1: frozenset({'WM', 'L'}), 2: frozenset({'L'})})
    found = JOINT.encode(np.array([[[L, L, WM, 0]]]))
    truth = white.encode(np.array([[[2, 1, 2, 0]]]))
    (row,) = evaluation.score(found, truth, (1, 1, 1), reference=white)
    assert row['region'] == 'L'
    assert (row['predicted_mm3'], row['reference_mm3']) == (1, 2)
    assert row['n_truth'] == 2


def test_a_prediction_that_says_nothing_is_in_no_region():
    found = PROTOCOLS['mrbrains18'].encode(np.array([[[9, 3]]]))
    truth = JOINT.encode(np.array([[[WM, WM]]]))
    rows = evaluation.score(found, truth, (1, 1, 1), predicted=PROTOCOLS['mrbrains18'])
    white = next(row for row in rows if row['region'] == 'WM')
    assert white['predicted_mm3'] == 1
    assert white['reference_mm3'] == 2


def test_nothing_at_all_is_not_a_number():
    empty = np.ones((3, 3, 3), np.uint8)
    rows = evaluation.score(empty, empty, (1, 1, 1))
    assert len(rows) == 7
    assert all(np.isnan(row['dice']) and row['reference_mm3'] == 0 for row in rows)


def test_shapes_have_to_agree():
    with pytest.raises(ValueError, match='shapes differ'):
        evaluation.score(np.ones((2, 2, 2), np.uint8), np.ones((2, 2, 3), np.uint8), (1, 1, 1))


# ---------------------------------------------------------------------------------- tables


def rows_of(dice, model, dataset='D', region='WM'):
    return [
        dict.fromkeys(evaluation.MEASURES, 1.0)
        | {'dataset': dataset, 'scan': f's{k}', 'model': model, 'region': region, 'dice': value,
           'predicted_mm3': 1000.0 + 10 * k, 'reference_mm3': 1000.0}
        for k, value in enumerate(dice)
    ]  # fmt: skip


def test_tables_hold_the_numbers(tmp_path):
    rows = rows_of([80, 82, 84], 'W+N') + rows_of([70, 76, 73], 'N')
    rows += rows_of([50.0], 'W+N', 'E', 'CGM') + rows_of([float('nan')], 'N', 'E', 'L')
    written = evaluation.write_tables(rows, tmp_path)
    assert sorted(path.name for path in written) == [
        'agreement.tsv', 'cohort.tsv', 'paired.tsv', 'scans.tsv', 'table1.md', 'table1.tsv'
    ]  # fmt: skip
    cohort = row_of(tmp_path / 'cohort.tsv', model='W+N', region='WM', measure='dice')
    assert (cohort['n'], cohort['mean'], cohort['sd'], cohort['median']) == ('3', '82', '2', '82')
    # 82 -/+ t(0.975, 2) 2 / sqrt(3), t = 4.302653
    assert float(cohort['ci95_low']) == pytest.approx(77.0317, abs=1e-3)
    assert float(cohort['ci95_high']) == pytest.approx(86.9683, abs=1e-3)
    agreement = row_of(tmp_path / 'agreement.tsv', model='N', region='WM')
    assert (agreement['bias_mm3'], agreement['sd_mm3']) == ('10', '10')
    assert (agreement['lower_mm3'], agreement['upper_mm3']) == ('-9.6', '29.6')
    pair = row_of(tmp_path / 'paired.tsv', region='WM', measure='dice')
    assert (pair['model_a'], pair['model_b'], pair['n']) == ('W+N', 'N', '3')
    assert float(pair['mean_difference']) == 9
    assert float(pair['p']) == 0.25  # the least that three pairs can give
    empty = row_of(tmp_path / 'scans.tsv', dataset='E', region='L')
    assert empty['dice'] == 'n/a'


def test_table1_is_laid_out_as_the_papers(tmp_path):
    rows = rows_of([91.25, 91.35], 'N', region='CGM') + rows_of([70, 76, 73], 'N')
    rows += rows_of([80, 82, 84], 'W+N') + rows_of([60.0], 'N', 'E', 'L')
    evaluation.write_tables(rows, tmp_path, models=['W+N'])
    lines = (tmp_path / 'table1.md').read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[:5]]
    assert cells[0] == ['Dice, % (SD)', 'D: W+N', 'D: N', 'E: N']
    assert cells[2] == ['Gray matter', '', '91.3 (0.1)', '']
    assert cells[3] == ['White matter', '**82.0** (2.0)', '73.0 (3.0)', '']
    assert cells[4] == ['White-matter lesion', '', '', '60.0']
    flat = read(tmp_path / 'table1.tsv')
    assert [row['region'] for row in flat] == ['CGM', 'WM', 'L']
    assert flat[1]['D: N mean'] == '73'
    assert flat[1]['E: N mean'] == 'n/a'
    assert flat[1]['E: N n'] == '0'


# ----------------------------------------------------------------------------- label maps


def probabilities(tool):
    """Return gray, white, fluid: 0.5 0.3 0.1, then 0.2 0.6 0, 0 0.1 0.9, 0.3 0.2 0.1 (none)."""
    gray, white, fluid = np.array([[0.5, 0.2, 0, 0.3], [0.3, 0.6, 0.1, 0.2], [0.1, 0, 0.9, 0.1]])
    order = {'spm': (gray, white, fluid)}.get(tool, (fluid, gray, white))
    return [np.rint(np.reshape(p, (4, 1, 1)) * 250).astype(np.uint8) for p in order]


def test_spm(tmp_path):
    for number, data in enumerate(probabilities('spm'), start=1):
        save(tmp_path / 'out' / f'c{number}sub-01_ses-2_T1w.nii', data, slope=1 / 250)
        save(tmp_path / 'out' / f'wc{number}sub-01_ses-2_T1w.nii', data, slope=1 / 250)
    tool, (item,) = evaluation.find_label_maps(tmp_path)
    assert (tool, item.name) == ('spm', 'sub-01_ses-2')
    labels, _ = evaluation.read_label_map(item)
    assert labels.ravel().tolist() == [1, 2, 3, 0]
    said = [SPM.sets[int(value)] for value in labels.ravel()]
    assert said == [{'CGM', 'SGM'}, {'WM', 'L'}, {'VEN', 'BG'}, {'BG'}]


def test_fast(tmp_path):
    for number, data in enumerate(probabilities('fast')):
        save(tmp_path / 'sub-01' / f't1_pve_{number}.nii.gz', data / np.float32(250))
    tool, (item,) = evaluation.find_label_maps(tmp_path)
    assert (tool, item.name) == ('fast', 'sub-01')
    assert evaluation.read_label_map(item)[0].ravel().tolist() == [2, 3, 1, 0]
    protocol = evaluation.TOOLS['fast'].protocol
    assert [protocol.sets[k] for k in (1, 2)] == [{'VEN', 'BG'}, {'CGM', 'SGM'}]


def test_fast_without_fractions(tmp_path):
    hard = np.array([2, 3, 1, 0], np.uint8).reshape(4, 1, 1)
    save(tmp_path / 'sub-01_T1w_brain_pveseg.nii.gz', hard)
    _, (item,) = evaluation.find_label_maps(tmp_path)
    assert evaluation.read_label_map(item)[0].ravel().tolist() == [2, 3, 1, 0]


def test_niftyseg(tmp_path):
    volumes = np.stack(probabilities('niftyseg'), axis=-1) / np.float32(250)
    save(tmp_path / 'sub-01_T1w_em.nii.gz', volumes)
    tool, (item,) = evaluation.find_label_maps(tmp_path)
    assert tool == 'niftyseg'
    assert evaluation.read_label_map(item)[0].ravel().tolist() == [2, 3, 1, 0]


def test_gif(tmp_path):
    labels = np.array([0, 45, 60, 5], np.uint8).reshape(4, 1, 1)
    save(tmp_path / 'sub-01_T1w_NeuroMorph_Parcellation.nii.gz', labels)
    tool, (item,) = evaluation.find_label_maps(tmp_path)
    assert tool == 'gif'
    assert evaluation.read_label_map(item)[0].ravel().tolist() == [0, 45, 60, 5]


def test_freesurfer_is_brought_to_the_references_grid(tmp_path):
    """Its grid is its own, with other axes; 77 is a lesion."""
    conformed = np.zeros((6, 6, 6), np.int32)
    conformed[1, 2, 3], conformed[4, 2, 3] = 77, 3
    # FreeSurfer's axes: left, inferior, anterior.
    affine = np.array([[-1.0, 0, 0, 3], [0, 0, 1, -2], [0, -1, 0, 2], [0, 0, 0, 1]])
    save(tmp_path / 'fs' / 'sub-01' / 'mri' / 'aseg.mgz', conformed, affine)
    save(tmp_path / 'fs' / 'fsaverage' / 'mri' / 'aseg.mgz', conformed, affine)
    tool, found = evaluation.find_label_maps(tmp_path / 'fs')
    assert (tool, [item.name for item in found]) == ('freesurfer', ['sub-fsaverage', 'sub-01'])
    labels, grid = evaluation.read_label_map(found[1])
    shifted = np.array([[1.0, 0, 0, -2], [0, 1, 0, -1], [0, 0, 1, -2], [0, 0, 0, 1]])
    moved = evaluation.to_grid(labels, grid, Grid((6, 4, 3), shifted))
    # Voxel 1, 2, 3 lies at 2, 1, 0 mm, and 4, 2, 3 at -1, 1, 0.
    assert np.argwhere(moved).tolist() == [[1, 2, 2], [4, 2, 2]]
    assert (moved[4, 2, 2], moved[1, 2, 2]) == (77, 3)


def test_what_is_no_label_map_is_named(tmp_path):
    save(tmp_path / 'sub-01' / 'sub-01_dseg.nii.gz', np.full((3, 3, 3), 0.5, np.float32))
    _, (item,) = evaluation.find_label_maps(tmp_path)
    with pytest.raises(ImageError, match=r'sub-01_dseg.*fractions'):
        evaluation.read_label_map(item)
    for number in (1, 2, 3):
        save(tmp_path / 'spm' / f'c{number}sub-01_T1w.nii', np.full((3, 3, 3), 90, np.uint8))
    _, (item,) = evaluation.find_label_maps(tmp_path / 'spm')
    with pytest.raises(ImageError, match=r'c1sub-01.*add up to 270'):
        evaluation.read_label_map(item)


def test_nothing_there(tmp_path):
    with pytest.raises(BidsError, match='no such folder'):
        evaluation.find_label_maps(tmp_path / 'x')
    with pytest.raises(DataError, match=r'dseg\.nii'):
        evaluation.find_label_maps(tmp_path)
    with pytest.raises(DataError, match=r'c1\*'):
        evaluation.find_label_maps(tmp_path, 'spm')


# --------------------------------------------------------------------------- whole folders


@pytest.fixture
def folders(tmp_path):
    """A reference of three scans; A is perfect, B is a voxel off and lacks one scan."""
    perfect = {f'sub0{number}': brain() for number in (1, 2, 3)}
    truth = dataset(tmp_path / 'ds' / 'derivatives' / 'manual', **perfect)
    a = dataset(tmp_path / 'A', **perfect)
    b = dataset(tmp_path / 'B', sub01=brain(1), sub02=brain(1))
    return truth, a, b


def test_folders_become_tables_and_figures(folders, tmp_path):
    truth, a, b = folders
    out = tmp_path / 'out'
    assert evaluation.evaluate({'A': a, 'B': b}, truth, out) == []
    best = row_of(out / 'cohort.tsv', model='A', region='CGM', measure='dice')
    assert (best['n'], best['mean']) == ('3', '100')
    # Three of four columns of voxels overlap; the same is 75 % of each.
    off = row_of(out / 'cohort.tsv', model='B', region='CGM', measure='dice')
    assert (off['n'], off['mean'], off['sd']) == ('2', '75', '0')
    scan = row_of(out / 'scans.tsv', scan='sub-01', model='B', region='CGM')
    assert scan['dataset'] == 'ds'
    assert float(scan['reference_mm3']) == 48 * 24
    assert float(scan['hd95_mm']) == 2.0  # one voxel along the first axis
    lesion = row_of(out / 'lesions.tsv', scan='sub-01', model='B')
    assert (lesion['n_truth'], lesion['recall'], lesion['challenge_f1']) == ('1', '1', '1')
    pair = row_of(out / 'paired.tsv', region='CGM', measure='dice')
    assert (pair['n'], pair['mean_difference']) == ('2', '25')
    record = json.loads((out / 'evaluation.json').read_text())
    assert record['missing'] == [{'scan': 'sub-03', 'model': 'B'}]
    assert record['models']['A'] == {
        'folder': str(a), 'tool': 'bids', 'protocol': 'jointseg', 'entities': {}
    }  # fmt: skip
    assert record['scans'] == ['sub-01', 'sub-02', 'sub-03']
    drawn = sorted(path.name for path in (out / 'figures').iterdir())
    assert drawn == sorted(path.removeprefix('figures/') for path in record['figures'])
    assert {'ds_models.png', 'ds_differences.png', 'ds_agreement_L.png'} <= set(drawn)
    picture = np.asarray(Image.open(out / 'figures' / 'ds_models.png').convert('RGB')).astype(int)
    blue = np.abs(picture[:-60] - (0x00, 0x72, 0xB2)).max(axis=-1) < 10
    assert blue.any(axis=0).sum() > 3 * 10  # cortex in every column, not in the legend alone


def test_the_same_input_gives_the_same_bytes(folders, tmp_path):
    truth, a, b = folders
    for name in ('one', 'two'):
        evaluation.evaluate({'A': a, 'B': b}, truth, tmp_path / name)
    for path in sorted((tmp_path / 'one').rglob('*.*')):
        other = tmp_path / 'two' / path.relative_to(tmp_path / 'one')
        assert path.read_bytes() == other.read_bytes(), path.name


def test_other_grids_are_a_line_each_and_the_rest_goes_on(folders, tmp_path):
    truth, a, _ = folders
    moved = AFFINE.copy()
    moved[0, 3] = 1
    save(a / 'sub-02' / 'anat' / 'sub-02_desc-x_dseg.nii.gz', brain(), moved)
    save(a / 'sub-03' / 'anat' / 'sub-03_desc-x_dseg.nii.gz', brain()[:-1])
    problems = evaluation.evaluate({'A': a}, truth, tmp_path / 'out', figures=False)
    assert [problem.scan for problem in problems] == ['sub-02', 'sub-03']
    for problem in problems:
        assert problem.reason.count('_desc-x_dseg.nii.gz') == 2
        assert 'resample' in problem.reason
        assert '\n' not in problem.reason
    assert {row['scan'] for row in read(tmp_path / 'out' / 'scans.tsv')} == {'sub-01'}


def test_unknown_labels_name_the_file(folders, tmp_path):
    truth, a, _ = folders
    odd = brain()
    odd[0, 0, 0] = 99
    dataset(a, sub02=odd)
    (problem,) = evaluation.evaluate({'A': a}, truth, tmp_path / 'out', figures=False)
    assert 'sub-02_desc-x_dseg.nii.gz' in problem.reason
    assert '[99]' in problem.reason


def test_tools_stand_in_the_same_table(folders, tmp_path):
    truth, a, _ = folders
    labels = brain()
    for sub in ('01', '02'):
        gray = np.isin(labels, (CGM, SGM, CBM)) * np.float32(0.9)
        white = np.isin(labels, (WM, L, BS)) * np.float32(0.9)
        for number, data in enumerate((gray, white, 0 * gray), start=1):
            save(tmp_path / 'spm' / f'c{number}sub-{sub}_T1w.nii', data)
    out = tmp_path / 'out'
    assert evaluation.evaluate({'A': a, 'SPM': tmp_path / 'spm'}, truth, out, figures=False) == []
    spm = {row['region'] for row in read(out / 'scans.tsv') if row['model'] == 'SPM'}
    assert spm == {'CGM+SGM', 'WM+L'}
    scan = row_of(out / 'scans.tsv', scan='sub-01', model='SPM', region='CGM+SGM')
    assert scan['dice'] == '100'  # though it calls the cerebellum gray
    assert '| Gray matter + basal ganglia |' in (out / 'table1.md').read_text()


def test_labels_of_a_tool_in_a_bids_dataset(tmp_path):
    """As fMRIPrep writes FreeSurfer's, on the scan's grid, beside others."""
    truth = dataset(tmp_path / 'ref', sub01=brain())
    aseg = np.zeros((32, 6, 5), np.int16)
    for index, label in {WM: 41, L: 77, CGM: 42, SGM: 10, BS: 16, CBM: 8, VEN: 43}.items():
        aseg[brain() == index] = label
    anat = tmp_path / 'fmriprep' / 'sub-01' / 'anat'
    save(anat / 'sub-01_desc-aseg_dseg.nii.gz', aseg)
    save(anat / 'sub-01_dseg.nii.gz', (aseg > 0).astype(np.uint8))
    arguments = [tmp_path / 'fmriprep', truth, tmp_path / 'out', '--no-figures']
    arguments += ['--protocol', 'freesurfer', '--entities', 'desc=aseg']
    assert cli.evaluate([*map(str, arguments)]) == 0
    rows = read(tmp_path / 'out' / 'scans.tsv')
    assert [row['dice'] for row in rows] == ['100'] * 7


def test_lesion_masks(tmp_path):
    other = (brain(1) == L).astype(np.uint8)
    for root, data in (('ref', brain() == L), ('W', other)):
        path = tmp_path / root / 'sub-01' / 'anat' / 'sub-01_label-lesion_mask.nii.gz'
        save(path, data.astype(np.uint8))
    truth, found = tmp_path / 'ref', tmp_path / 'W'
    assert evaluation.evaluate({'W': found}, truth, tmp_path / 'out') == []
    (row,) = read(tmp_path / 'out' / 'scans.tsv')
    assert (row['region'], row['dice'], row['predicted_mm3']) == ('L', '50', '48')


def test_pairs_by_entities(tmp_path):
    def item(name, **entities):
        return evaluation.LabelMap('bids', (tmp_path / name,), entities)

    save(tmp_path / 'ref.nii.gz', brain())
    save(tmp_path / 'one.nii.gz', brain())
    save(tmp_path / 'two.nii.gz', brain()[1:])
    reference = item('ref.nii.gz', sub='1', ses='2', desc='manual')
    one = item('one.nii.gz', sub='1', ses='2', seg='jointseg')
    two = item('two.nii.gz', sub='1', ses='2', space='FLAIR', seg='jointseg')
    match = evaluation._match
    assert match(reference, [one, two]) is one
    assert match(reference, [item('one.nii.gz', sub='2', ses='2')]) is None
    assert match(reference, [item('one.nii.gz', sub='1', ses='1')]) is None
    assert match(item('ref.nii.gz', sub='1', space='FLAIR'), [one, two]) is one  # by its grid
    assert match(item('ref.nii.gz', sub='1', space='FLAIR'), [two]) is two
    assert match(item('ref.nii.gz', sub='1', space='T1w'), [two]) is None
    runs = [item('one.nii.gz', sub='1', run=str(run)) for run in (1, 2)]
    with pytest.raises(BidsError, match=r'both suit ref\.nii\.gz.*--entities'):
        match(item('ref.nii.gz', sub='1'), runs)
    assert match(item('ref.nii.gz', sub='1', run='2'), runs) is runs[1]


def test_two_references_of_one_scan(folders, tmp_path):
    truth, a, _ = folders
    save(truth / 'sub-01' / 'anat' / 'sub-01_desc-y_dseg.nii.gz', brain(1))
    with pytest.raises(BidsError, match='--reference-entities'):
        evaluation.evaluate({'A': a}, truth, tmp_path / 'out')
    evaluation.evaluate(
        {'A': a}, truth, tmp_path / 'out', reference_entities={'desc': 'y'}, figures=False
    )
    assert {row['scan'] for row in read(tmp_path / 'out' / 'scans.tsv')} == {'sub-01'}


def test_one_result_is_not_taken_for_two_sessions(tmp_path):
    for session in ('1', '2'):
        name = f'sub-1/ses-{session}/anat/sub-1_ses-{session}_dseg.nii.gz'
        save(tmp_path / 'ref' / name, brain())
    save(tmp_path / 'A' / 'sub-1' / 'anat' / 'sub-1_dseg.nii.gz', brain())
    (problem,) = evaluation.evaluate(
        {'A': tmp_path / 'A'}, tmp_path / 'ref', tmp_path / 'out', figures=False
    )
    assert (problem.scan, 'taken for sub-1_ses-1' in problem.reason) == ('sub-1_ses-2', True)


def test_images_are_drawn_below(folders, tmp_path):
    truth, a, _ = folders
    scan = np.where(brain() > 0, 100 + brain(), 0).astype(np.int16)
    for sub in ('01', '02', '03'):
        save(tmp_path / 'raw' / f'sub-{sub}' / 'anat' / f'sub-{sub}_T1w.nii.gz', scan)
    shown = {}
    for name, images in (('bare', None), ('scan', tmp_path / 'raw')):
        evaluation.evaluate({'A': a}, truth, tmp_path / name, images=images)
        path = tmp_path / name / 'figures' / 'ds_models.png'
        shown[name] = np.asarray(Image.open(path).convert('RGB'))
    assert shown['bare'].shape == shown['scan'].shape
    assert not np.array_equal(shown['bare'], shown['scan'])


# --------------------------------------------------------------------------------- command


def test_command(folders, tmp_path, capsys):
    truth, a, b = folders
    out = tmp_path / 'out'
    arguments = [f'first={a}', truth, out, '--and', f'B={b}', '--no-figures', '--dataset', 'X']
    arguments += ['--entities', 'desc=x', '--participant_label', 'sub-01', '02']
    assert cli.evaluate([*map(str, arguments)]) == 0
    assert '| Dice, % (SD)' in capsys.readouterr().out
    rows = read(out / 'scans.tsv')
    assert {row['model'] for row in rows} == {'first', 'B'}
    assert {row['scan'] for row in rows} == {'sub-01', 'sub-02'}
    assert {row['dataset'] for row in rows} == {'X'}
    assert not (out / 'figures').exists()


def test_command_reads_protocols(folders, tmp_path):
    truth, a, _ = folders
    table = tmp_path / 'mine.tsv'
    table.write_text(
        'index\tclasses\n0\tBG\n2\tWM\n7\tWM L\n8\tCGM\n9\tSGM\n10\tignore\n11\tCBM\n12\tVEN\n'
    )
    arguments = [a, truth, tmp_path / 'out', '--no-figures', '--protocol', f'A={table}']
    assert cli.evaluate([*map(str, arguments)]) == 0
    record = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())
    assert record['models']['A']['protocol'] == 'mine'
    assert list(record['regions']) == ['CGM', 'WM+L', 'SGM', 'VEN', 'CBM']


def test_exit_codes(folders, tmp_path, capsys):
    truth, a, _ = folders
    out = tmp_path / 'out'

    def run(*arguments):
        try:
            return cli.evaluate([*map(str, arguments), '--no-figures'])
        except SystemExit as error:
            return error.code

    save(a / 'sub-02' / 'anat' / 'sub-02_desc-x_dseg.nii.gz', brain()[1:])
    assert run(a, truth, out) == 1
    for arguments in (
        (a, tmp_path / 'none', out),
        (a, truth, out, '--and', 'nameless'),
        (a, truth, out, '--and', f'A={a}'),
        (a, truth, out, '--protocol', 'unheard-of'),
        (a, truth, out, '--protocol', 'X=jointseg'),
        (a, truth, out, '--entities', 'desc'),
        (a, truth, out, '--images', tmp_path / 'none'),
    ):
        capsys.readouterr()
        assert run(*arguments) == 2, arguments
        assert capsys.readouterr().err.count('\n') == 1
    (tmp_path / 'empty').mkdir()
    assert run(tmp_path / 'empty', truth, out) == 65
    lesions = ('--protocol', 'binary-lesion', '--reference-protocol', 'neuromorphometrics')
    assert run(a, truth, out, *lesions) == 65
    assert run(dataset(tmp_path / 'C', sub99=brain()), truth, out) == 65


def test_internal_errors_have_a_code(folders, tmp_path, monkeypatch, capsys):
    truth, a, _ = folders

    def fail(*_, **__):
        raise RuntimeError('boom')

    monkeypatch.setattr(evaluation, 'score', fail)
    assert cli.evaluate([str(a), str(truth), str(tmp_path / 'out')]) == 70
    assert 'boom' in capsys.readouterr().err


def test_help_is_light():
    code = 'import sys\nfrom bids_jointseg.cli import evaluate\ntry:\n    evaluate(["--help"])\n'
    code += 'except SystemExit:\n    print(sorted(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for module in ('numpy', 'nibabel', 'torch', 'scipy', 'nipype', 'PIL'):
        assert f"'{module}'" not in done.stdout
    for option in ('--and', '--reference-protocol', '--images', 'exit codes'):
        assert option in done.stdout
    code = 'import sys, bids_jointseg.evaluation; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)
