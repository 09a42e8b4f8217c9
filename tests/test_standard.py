"""Standard space: templates that are found or not, a known warp recovered, the cohort's map."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import describe_dataset, put
from scipy import ndimage

from bids_jointseg import bids, cli, image, reports, standard
from bids_jointseg.bids import BidsError, Scan
from bids_jointseg.config import Settings, SettingsError, StandardSpace
from bids_jointseg.image import Grid, ImageError, Volume
from bids_jointseg.labels import LABELS

MNI = 'MNI152NLin2009cAsym'
INDEX = {label.abbreviation: label.index for label in LABELS}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No address is looked up, nothing is connected to, and TemplateFlow is not imported."""

    def refuse(*arguments, **options):
        raise AssertionError('the network was asked')

    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != getattr(socket, 'AF_UNIX', None):
            refuse()
        return connect(self, address)

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(socket.socket, 'connect', local_only)
    monkeypatch.setitem(sys.modules, 'templateflow', None)


def template_name(resolution: int, what: str) -> str:
    return f'tpl-{MNI}_res-{resolution:02d}_{what}.nii.gz'


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    """A home of TemplateFlow with the ICBM152 brain that nilearn ships, in 4 and 6 mm."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    folder = tmp_path_factory.mktemp('templateflow') / f'tpl-{MNI}'
    for resolution, mm in ((1, 4), (2, 6)):
        scan, mask = load_mni152_template(resolution=mm), load_mni152_brain_mask(resolution=mm)
        scan = nib.Nifti1Image(np.rint(scan.get_fdata() * 1000).astype(np.int16), scan.affine)
        put(scan, folder / template_name(resolution, 'T1w'))
        mask = nib.Nifti1Image(mask.get_fdata().astype(np.uint8), mask.affine)
        put(mask, folder / template_name(resolution, 'desc-brain_mask'))
    return folder.parent


@pytest.fixture
def seeded(home, monkeypatch):
    monkeypatch.setenv('TEMPLATEFLOW_HOME', str(home))
    return home


@pytest.fixture(scope='session')
def template(home):
    folder = home / f'tpl-{MNI}'
    names = (template_name(1, what) for what in ('T1w', 'desc-brain_mask'))
    return standard.load_template(*(folder / name for name in names))


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'space'),
    [
        (MNI, StandardSpace(MNI)),
        (f'{MNI}:res-2', StandardSpace(MNI, 2)),
        (f'{MNI}:res-02', StandardSpace(MNI, 2)),
        ('MNIPediatricAsym:cohort-3:res-1', StandardSpace('MNIPediatricAsym', 1, 3)),
        ('MNIPediatricAsym:res-1:cohort-3', StandardSpace('MNIPediatricAsym', 1, 3)),
    ],
)
def test_spaces_are_written_as_in_fmriprep(text, space):
    assert StandardSpace.parse(text) == space
    assert StandardSpace.parse(str(space)) == space


@pytest.mark.parametrize('text', ['', 'a b', ':res-2', f'{MNI}:res', f'{MNI}:res-native',
                                  f'{MNI}:2', f'{MNI}:res-1:res-2', '../x'])  # fmt: skip
def test_what_is_no_space_is_named(text):
    with pytest.raises(SettingsError, match='NAME') as caught:
        Settings(Path('/in'), Path('/out'), output_spaces=('T1w', text))
    assert '\n' not in str(caught.value)


def test_settings_keep_each_space_once(tmp_path):
    spaces = ('T1w', MNI, f'{MNI}:res-2', 'FLAIR', f'{MNI}:res-02')
    settings = Settings(tmp_path, tmp_path / 'out', output_spaces=spaces)
    assert settings.standard_spaces == (StandardSpace(MNI), StandardSpace(MNI, 2))
    assert Settings.from_toml(settings.to_toml()).standard_spaces == settings.standard_spaces
    assert Settings(tmp_path, tmp_path / 'out').standard_spaces == ()


def test_entities_are_in_the_standards_order():
    space = StandardSpace(MNI, 2)
    assert bids.in_space(space, 'seg-jointseg_label-L_probseg') == (
        f'space-{MNI}_seg-jointseg_res-2_label-L_probseg'
    )
    assert bids.in_space(space, 'label-L_mask') == f'space-{MNI}_res-2_label-L_mask'
    assert bids.in_space(StandardSpace('A', None, 3), 'desc-preproc_T1w') == (
        'space-A_cohort-3_desc-preproc_T1w'
    )
    scan = Scan('1', None, None, Path('FLAIR'), 'sub-1')
    assert bids.transform_to(StandardSpace('A', 1, 3), scan) == 'from-FLAIR_to-A+3_mode-image_xfm'


# --- templates ----------------------------------------------------------------------------------


def test_a_template_is_found(seeded):
    found = standard.find_template(StandardSpace(MNI, 2))
    folder = seeded / f'tpl-{MNI}'
    assert found.image == folder / template_name(2, 'T1w')
    assert found.mask == folder / template_name(2, 'desc-brain_mask')
    # One transform for all resolutions: the one nearest to 2 mm.
    assert found.target_image == folder / template_name(1, 'T1w')
    assert standard.find_template(StandardSpace(MNI)).image == folder / template_name(1, 'T1w')
    uri = standard.template_uri(found.image)
    assert uri == f'bids:templateflow:tpl-{MNI}/{template_name(2, "T1w")}'


def test_cohorts_and_templates_without_a_resolution(seeded, tmp_path, monkeypatch):
    source = seeded / f'tpl-{MNI}'
    folder = tmp_path / 'tpl-Young' / 'cohort-2'
    folder.mkdir(parents=True)
    for what in ('T1w', 'desc-brain_mask'):
        shutil.copy(source / template_name(1, what), folder / f'tpl-Young_cohort-2_{what}.nii.gz')
    monkeypatch.setenv('TEMPLATEFLOW_HOME', str(tmp_path))
    found = standard.find_template(StandardSpace('Young', None, 2))
    assert standard.template_uri(found.mask) == (
        'bids:templateflow:tpl-Young/cohort-2/tpl-Young_cohort-2_desc-brain_mask.nii.gz'
    )
    with pytest.raises(BidsError, match=r"get\('Young', cohort=1, resolution=1, suffix='T1w'"):
        standard.find_template(StandardSpace('Young', None, 1))


def empty(path: Path) -> None:
    path.unlink()
    path.touch()


def damaged(path: Path) -> None:
    path.write_bytes(b'no image at all, and long enough for one: ' * 100)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to('../.git/annex/objects/nowhere')


@pytest.mark.parametrize(
    ('spoil', 'reason'),
    [
        (lambda path: shutil.rmtree(path.parents[1]), ''),
        (lambda path: shutil.rmtree(path.parent), ''),
        (empty, 'T1w.nii.gz is an empty placeholder'),
        (damaged, 'T1w.nii.gz is damaged'),
        (truncated, 'T1w.nii.gz is damaged'),
        (dangling, 'T1w.nii.gz is a link to nothing'),
        (lambda path: path.unlink(), 'no T1w beside it'),
        (lambda path: path.with_name(template_name(2, 'desc-brain_mask')).unlink(),
         'no brain mask beside it'),
    ],
)  # fmt: skip
def test_a_template_that_is_not_there_is_one_line(
    home, tmp_path, monkeypatch, capfd, spoil, reason
):
    mine = tmp_path / 'templateflow'
    shutil.copytree(home, mine)
    spoil(mine / f'tpl-{MNI}' / template_name(2, 'T1w'))
    monkeypatch.setenv('TEMPLATEFLOW_HOME', str(mine))
    root = describe_dataset(tmp_path / 'bids')
    scan = nib.Nifti1Image(np.ones((8, 8, 8), np.uint8), np.diag([8, 8, 8, 1]))
    put(scan, root / 'sub-1' / 'anat' / 'sub-1_T1w.nii.gz')
    out = tmp_path / 'out'
    before = mine.exists()
    command = [root, out, 'participant', '-w', tmp_path / 'work', '--output-spaces', 'T1w']
    assert cli.main([str(item) for item in (*command, f'{MNI}:res-2')]) == cli.Exit.USAGE
    (line,) = capfd.readouterr().err.splitlines()
    assert f'--output-spaces {MNI}:res-2: TEMPLATEFLOW_HOME {mine} has no template {MNI}' in line
    assert 'at resolution 2' in line
    assert reason in line
    assert (
        f"python -c \"from templateflow.api import get; get('{MNI}', resolution=2, suffix='T1w', "
        f"desc=None, extension='nii.gz'); get('{MNI}', resolution=2, suffix='mask', desc='brain', "
        "extension='nii.gz')\""
    ) in line
    assert list(out.iterdir()) == []
    assert mine.exists() == before  # nor was a home made


def test_the_home_is_templateflows_own(monkeypatch, tmp_path):
    monkeypatch.setenv('TEMPLATEFLOW_HOME', str(tmp_path))
    assert standard.template_home() == tmp_path
    monkeypatch.delenv('TEMPLATEFLOW_HOME')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert standard.template_home().name == 'templateflow'


# --- numbers ------------------------------------------------------------------------------------


def slope_of(function, at: np.ndarray, where: tuple, step: float = 1e-4) -> float:
    ends = []
    for sign in (1, -1):
        moved = at.copy()
        moved[where] += sign * step
        ends.append(function(moved))
    return (ends[0] - ends[1]) / (2 * step)


def test_the_gradient_of_the_bending_energy():
    control = np.random.default_rng(0).normal(size=(3, 5, 6, 7))
    _, gradient = standard.bending(control)
    for where in ((0, 0, 0, 0), (1, 2, 3, 4), (2, 4, 5, 6)):
        found = slope_of(lambda x: standard.bending(x)[0], control, where)
        assert gradient[where] == pytest.approx(found, rel=1e-6, abs=1e-12)


def test_an_affine_does_not_bend():
    points = np.stack(np.meshgrid(*map(np.arange, (5, 6, 7)), indexing='ij')).astype(float)
    calm, _ = standard.bending(np.ones_like(points))
    tilted, _ = standard.bending(points)
    assert calm == 0
    # A gradient of 1/8 mm per mm along three axes, but for the last of each.
    assert 0 < tilted <= standard.CALM * 3 / standard.CONTROL_MM**2


def test_the_gradient_of_mutual_information():
    rng = np.random.default_rng(0)
    fixed = rng.uniform(size=2000)
    moving = np.clip(0.5 * fixed + 0.2 * rng.uniform(size=2000), 0.01, 0.99)
    rows = np.rint(standard._bin(fixed)).astype(int)
    seen = rng.uniform(size=2000) > 0.2

    def information(values):
        return standard._information(rows, standard._bin(values), seen)[0]

    _, change = standard._information(rows, standard._bin(moving), seen)
    assert (change[~seen] == 0).all()
    for where in np.flatnonzero(seen)[:5]:
        found = slope_of(information, moving, (where,), 1e-3)
        assert change[where] == pytest.approx(found, rel=2e-3, abs=1e-7)
    assert information(fixed) > information(moving) > information(rng.permutation(fixed)) > 0


def test_gaps_are_closed():
    grid = Grid((40, 30, 30), np.diag([2.0, 2.0, 2.0, 1.0]))
    mask = np.zeros(grid.shape, bool)
    mask[5:35, 5:25, 5:25] = True
    whole = mask.copy()
    mask[18:21] = False  # 6 mm
    filled = standard.closed(mask, grid)
    assert filled[18:21, 8:22, 8:22].all()  # the mouths of the gap stay rounded
    assert not (filled & ~whole).any()
    assert filled[mask].all()
    mask[14:25] = False  # 22 mm
    assert not standard.closed(mask, grid)[19].any()


# --- registration -------------------------------------------------------------------------------

AFFINE = np.array([[1.08, 0.05, 0, 4], [-0.03, 0.95, 0.12, -9], [0, -0.08, 1.04, 6], [0, 0, 0, 1]])
"""RAS mm of the made scan -> RAS mm of the template, but for the warp."""


def warp(points: np.ndarray) -> np.ndarray:
    """Map points (..., 3) of the made scan to the template: an affine and waves of 4 mm."""
    waves = 4 * np.sin(points[..., [1, 2, 0]] / 25)
    return (points + waves) @ AFFINE[:3, :3].T + AFFINE[:3, 3]


def frame(name: str) -> np.ndarray:
    """Return voxel axes (columns) of a scan."""
    turn = np.deg2rad(20)
    cosine, sine = np.cos(turn), np.sin(turn)
    return {
        'RAS': np.eye(3),
        'LAS': np.diag([-1.0, 1, 1]),
        'oblique': np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])[:, [2, 0, 1]],
    }[name]


def make_scan(template: tuple[Volume, np.ndarray], name: str) -> tuple[Volume, np.ndarray]:
    """Warp the template into a scan with a skull, 60 x 60 x 60 voxels of 3.5 mm, and its brain."""
    volume, brain = template
    affine = np.eye(4)
    affine[:3, :3] = frame(name) * 3.5
    affine[:3, 3] = -affine[:3, :3] @ np.full(3, 29.5) + (0, -18, 18)
    grid = Grid((60, 60, 60), affine)
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing='ij'), -1)
    there = warp(voxels @ affine[:3, :3].T + affine[:3, 3])
    inverse = np.linalg.inv(volume.grid.affine)
    at = np.moveaxis(there @ inverse[:3, :3].T + inverse[:3, 3], -1, 0)
    data = ndimage.map_coordinates(volume.data, at, order=1)
    mask = ndimage.map_coordinates(brain.astype(np.float32), at, order=1) > 0.5
    skull = ndimage.binary_dilation(mask, iterations=4) & ~ndimage.binary_dilation(
        mask, iterations=2
    )
    noise = np.random.default_rng(0).normal(0, 20, grid.shape)
    data = np.maximum(data + 900 * skull + noise, 0)
    return Volume(data.astype(np.float32), grid), mask


def error_mm(transform, template: tuple[Volume, np.ndarray]) -> np.ndarray:
    """Return how far the way to the scan and back leads astray, for the brain's voxels."""
    volume, brain = template
    there = np.moveaxis(standard.map_grid(transform, volume.grid), 0, -1)[brain]
    affine = volume.grid.affine
    home = np.argwhere(brain) @ affine[:3, :3].T + affine[:3, 3]
    return np.linalg.norm(warp(there) - home, axis=-1)


@pytest.fixture(scope='module')
def registered(template):
    """The made scan in three frames: scan, brain, transform."""
    made = {}
    for name in ('RAS', 'LAS', 'oblique'):
        scan, mask = make_scan(template, name)
        made[name] = (scan, mask, standard.register(*template, scan, mask))
    return made


@pytest.mark.parametrize('name', ['RAS', 'LAS', 'oblique'])
def test_a_known_warp_is_recovered(template, registered, name):
    scan, mask, transform = registered[name]
    error = error_mm(transform, template)
    assert np.median(error) < 1.0  # a quarter of a voxel of the template
    assert np.percentile(error, 95) < 2.5
    fit = standard.measure_fit(transform, template[0].grid, template[1], scan.grid, mask)
    assert fit['brain_dice'] > 0.97
    assert fit['flags'] == []
    assert 0 < fit['volume_ratio'][0] < 1 < fit['volume_ratio'][2]


def test_the_affine_alone_does_not_recover_it(template, registered):
    affine = sitk.CompositeTransform([registered['RAS'][2].GetNthTransform(0)])
    assert np.median(error_mm(affine, template)) > 2.0


def test_other_contrasts_register_too(template):
    scan, mask = make_scan(template, 'RAS')
    other = Volume(np.where(mask, 1200 - scan.data, scan.data).astype(np.float32), scan.grid)
    error = error_mm(standard.register(*template, other, mask), template)
    assert np.median(error) < 1.5


def test_lesions_do_not_matter(template, registered):
    scan, mask, clean = registered['RAS']
    centre = np.argwhere(mask).mean(axis=0) + np.array([7, 2, 4])
    distance = np.linalg.norm(np.indices(scan.grid.shape).T - centre, axis=-1).T
    lesion = distance < 5  # a ball of 3.5 cm
    spoilt = Volume(np.where(lesion, 0, scan.data).astype(np.float32), scan.grid)
    ball = np.argwhere(lesion) @ scan.grid.affine[:3, :3].T + scan.grid.affine[:3, 3]
    inverse = np.linalg.inv(template[0].grid.affine)
    voxels = np.rint(warp(ball) @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)

    def moved(transform) -> float:
        """How far the lesion's surroundings moved because of it."""
        there = [standard.map_grid(t, template[0].grid)[(slice(None), *voxels.T)]
                 for t in (clean, transform)]  # fmt: skip
        return float(np.linalg.norm(there[0] - there[1], axis=0).mean())

    without = moved(standard.register(*template, spoilt, mask, lesion))
    within = moved(standard.register(*template, spoilt, mask))
    assert without < 3  # the middle of a hole of 35 mm
    assert without < 0.5 * within


def test_the_same_images_give_the_same_file(template, registered, tmp_path):
    scan, mask, transform = registered['RAS']
    first = standard.save_transform(transform, tmp_path / 'a.txt').read_bytes()
    again = standard.register(*template, scan, mask)
    assert standard.save_transform(again, tmp_path / 'b.txt').read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.txt', 'b.txt']


def test_files_are_read_by_simpleitk(registered, tmp_path):
    transform = registered['oblique'][2]
    path = standard.save_transform(transform, tmp_path / 'x.txt')
    read = standard.load_transform(path)
    plain = sitk.ReadTransform(str(path))
    for point in ((0.0, 0.0, 0.0), (-40.0, 30.0, 20.0)):
        assert read.TransformPoint(point) == transform.TransformPoint(point)
        assert plain.TransformPoint(point) == transform.TransformPoint(point)


def test_the_map_is_that_of_the_transform(template, registered):
    transform = registered['RAS'][2]
    grid = template[0].grid
    points = standard.map_grid(transform, grid)
    for voxel in ((10, 20, 20), (24, 29, 23)):
        x, y, z = (grid.affine @ (*voxel, 1))[:3]
        x, y, z = transform.TransformPoint((-x, -y, z))
        np.testing.assert_allclose(points[(slice(None), *voxel)], (-x, -y, z), atol=1e-3)


def test_the_lattice_is_that_of_itk(template):
    """What the optimiser computes by separable products is what ITK makes of the file."""
    grid = template[0].grid
    lattice = standard.Lattice.over(grid)
    control = np.random.default_rng(0).normal(0, 3, (3, *lattice.shape))
    transform = standard._to_itk(np.eye(4), lattice, control)
    points = standard.map_grid(transform, grid)
    plain = standard.map_grid(sitk.CompositeTransform([sitk.AffineTransform(3)]), grid)
    for axis in range(3):
        moved = standard._separable(lattice.basis(grid), control[axis])
        np.testing.assert_allclose(points[axis] - plain[axis], moved, atol=2e-3)


def test_probabilities_stay_probabilities(template, registered):
    scan, mask, transform = registered['LAS']
    pull = standard.Puller(transform, template[0].grid, scan.grid)
    parts = np.zeros((8, *scan.grid.shape), np.float32)
    parts[1] = mask
    parts[0] = 1 - parts[1]
    joint = standard.bring_probabilities(pull, parts)
    np.testing.assert_allclose(joint.sum(axis=0), 1, atol=1e-6)
    labels = image.label_map(joint)
    assert set(np.unique(labels)) == {0, INDEX['WM']}
    overlap = 2 * ((labels > 0) & template[1]).sum() / ((labels > 0).sum() + template[1].sum())
    assert overlap > 0.96


def test_what_cannot_be_registered_is_named(template):
    scan, mask = make_scan(template, 'RAS')
    with pytest.raises(ImageError, match='no brain'):
        standard.register(*template, scan, np.zeros_like(mask))
    with pytest.raises(ImageError, match='nothing bright'):
        standard.register(*template, Volume(np.zeros_like(scan.data), scan.grid), mask)


def test_a_brain_that_does_not_fit_is_flagged(template, registered):
    scan, mask, transform = registered['RAS']
    half = mask.copy()
    half[: half.shape[0] // 2] = False
    fit = standard.measure_fit(transform, template[0].grid, template[1], scan.grid, half)
    assert fit['brain_dice'] < standard.GOOD_DICE
    assert 'does not fit the template' in fit['flags'][0]


# --- the app ------------------------------------------------------------------------------------


def jointseg(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def moments(out: Path) -> dict[str, int]:
    files = (path for path in out.rglob('*.nii.gz') if path.is_file())
    return {path.name: path.stat().st_mtime_ns for path in files}


@pytest.fixture
def guess(monkeypatch):
    """In place of the networks: what is not bright is background, the rest are three classes."""
    from bids_jointseg import locator

    calls = []

    def predict(network, images, **options):
        calls.append(1)
        data = next(iter(images.values()))
        level = data > -2.5
        brain = ndimage.binary_opening(level)
        found = np.full((8, *data.shape), 0.01, np.float32)
        found[0] = ~brain
        found[1] = brain & (data > 0.4)
        found[3] = brain & (data <= 0.4)
        inside = np.argwhere(brain).mean(axis=0)
        lesion = np.linalg.norm(np.indices(data.shape).T - inside, axis=-1).T < 2
        found[2] = 3 * lesion
        return [found / found.sum(axis=0)]

    monkeypatch.setattr(locator, 'predict', predict)
    return calls


@pytest.fixture
def command(template, tmp_path, model, seeded):
    """The app on one made scan without its skull, all in this process."""
    root = describe_dataset(tmp_path / 'bids')
    scan, mask = make_scan(template, 'LAS')
    made = nib.Nifti1Image((scan.data * mask).astype(np.int16), scan.grid.affine)
    put(made, root / 'sub-1' / 'anat' / 'sub-1_T1w.nii.gz')
    plugin = tmp_path / 'plugin.yml'
    plugin.write_text('plugin: Linear\n')
    given = [root, tmp_path / 'out', 'participant', '--model', model, '-w', tmp_path / 'work']
    return [*given, '--use-plugin', plugin, '--skip-bids-validation', '--omp-nthreads', 1]


def test_the_app_writes_standard_spaces(command, guess, tmp_path, monkeypatch):
    monkeypatch.setattr(standard, 'LEVELS', ((8.0, 20),))
    out = tmp_path / 'out'
    assert jointseg(*command, '--output-spaces', 'T1w', f'{MNI}:res-2') == 0
    scan = Scan('1', None, Path('T1w'), None, 'sub-1')
    coarse, fine = StandardSpace(MNI, 2), StandardSpace(MNI)
    folder = out / 'sub-1' / 'anat'
    found = {path.name.removeprefix('sub-1_') for path in folder.iterdir()}
    assert found == set(bids.expected(scan, 'full', [coarse]))
    configuration = json.loads((folder / 'sub-1_seg-jointseg_morph.json').read_text())[
        'configuration'
    ]
    assert bids.is_complete(out, scan, 'full', configuration, [coarse])
    assert not bids.is_complete(out, scan, 'full', configuration, [coarse, fine])
    assert not bids.is_complete(out, scan, 'full', {}, [coarse])

    # On the template's grid, and where the template is.
    home = standard.find_template(coarse)
    asked = nib.load(home.image)
    dseg = nib.load(folder / f'sub-1_space-{MNI}_seg-jointseg_res-2_dseg.nii.gz')
    assert dseg.shape == asked.shape
    np.testing.assert_allclose(dseg.affine, asked.affine)
    labels = np.asarray(dseg.dataobj)
    lesions = np.asarray(nib.load(folder / f'sub-1_space-{MNI}_res-2_label-L_mask.nii.gz').dataobj)
    np.testing.assert_array_equal(lesions, labels == INDEX['L'])
    probability = nib.load(
        folder / f'sub-1_space-{MNI}_seg-jointseg_res-2_label-L_probseg.nii.gz'
    ).get_fdata()
    assert probability[lesions > 0].min() > 1 / 8
    inside = np.asarray(nib.load(home.mask).dataobj) > 0
    t1w = nib.load(folder / f'sub-1_space-{MNI}_res-2_desc-preproc_T1w.nii.gz').get_fdata()
    assert np.corrcoef(t1w[inside], asked.get_fdata()[inside])[0, 1] > 0.8

    # What they were made from.
    record = json.loads((folder / f'sub-1_space-{MNI}_res-2_desc-preproc_T1w.json').read_text())
    assert record['SpatialReference'] == standard.template_uri(home.image)
    assert record['Resolution'] == '6 x 6 x 6 mm'
    name = f'sub-1_from-T1w_to-{MNI}_mode-image_xfm'
    assert f'bids::sub-1/anat/{name}.txt' in record['Sources']
    assert record['SkullStripped'] is True
    fit = json.loads((folder / f'{name}.json').read_text())
    assert fit['brain_dice'] > 0.9
    description = json.loads((out / 'dataset_description.json').read_text())
    assert 'templateflow' in description['DatasetLinks']
    assert 'TemplateFlow' in (out / 'logs' / 'CITATION.md').read_text()
    report = bids.validator(out)
    if report is not None:
        assert [i for i in report['issues']['issues'] if i['severity'] == 'error'] == []

    page = (out / 'sub-1.html').read_text()
    assert f'Standard space {MNI}, resolution 2' in page

    # Another space: only what is missing is made.
    before, runs = moments(out), len(guess)
    assert jointseg(*command, '--output-spaces', MNI, f'{MNI}:res-2') == 0
    after = moments(out)
    assert {name: after[name] for name in before} == before
    new = {name.removeprefix('sub-1_') for name in after.keys() - before.keys()}
    assert new == {n for n in bids.expected_in(fine, scan, 'full') if n.endswith('.nii.gz')}
    assert len(guess) == runs
    assert bids.is_complete(out, scan, 'full', configuration, [coarse, fine])

    # What was removed is written again, and nothing else.
    gone = folder / f'sub-1_space-{MNI}_label-L_mask.nii.gz'
    gone.unlink()
    before = moments(out)
    assert jointseg(*command, '--output-spaces', MNI) == 0
    assert gone.exists()
    changed = {name for name, time in moments(out).items() if before.get(name) != time}
    assert changed == {name for name in after if f'space-{MNI}_' in name and 'res-2' not in name}
    description = json.loads((out / 'dataset_description.json').read_text())
    assert jointseg(*command) == 0
    assert json.loads((out / 'dataset_description.json').read_text()) == description

    # And the cohort.
    assert jointseg(command[0], out, 'group') == 0
    for space in (f'space-{MNI}', f'space-{MNI}_res-2'):
        assert (out / f'group_{space}_label-L_probseg.nii.gz').exists()
    assert (out / 'group.html').read_text().count('Lesions in MNI152') == 2


def test_minimal_results_have_a_standard_space_too(command, guess, tmp_path, monkeypatch):
    monkeypatch.setattr(standard, 'LEVELS', ((8.0, 2),))
    out = tmp_path / 'out'
    assert jointseg(*command, '--level', 'minimal', '--output-spaces', f'{MNI}:res-2') == 0
    scan = Scan('1', None, Path('T1w'), None, 'sub-1')
    found = {p.name.removeprefix('sub-1_') for p in (out / 'sub-1' / 'anat').iterdir()}
    assert found == set(bids.expected(scan, 'minimal', [StandardSpace(MNI, 2)]))
    assert len(found) == len(bids.expected(scan, 'minimal')) + 6


# --- the cohort ---------------------------------------------------------------------------------


def put_mask(out: Path, stem: str, mask: np.ndarray, *, space: str = f'space-{MNI}_res-2') -> None:
    own = bids.entities(Path(f'{stem}_mask'))
    folder = out / f'sub-{own["sub"]}' / (f'ses-{own["ses"]}' if 'ses' in own else '') / 'anat'
    made = nib.Nifti1Image(mask.astype(np.uint8), np.diag([6.0, 6, 6, 1]))
    path = put(made, folder / f'{stem}_{space}_label-L_mask.nii.gz')
    record = {'SpatialReference': 'bids:x:y', 'Resolution': '6 mm'}
    path.with_name(f'{stem}_{space}_label-L_mask.json').write_text(json.dumps(record))


def test_the_map_of_the_cohort_is_the_mean_over_people(tmp_path, caplog):
    rng = np.random.default_rng(0)
    masks = {
        'sub-1_ses-1': rng.uniform(size=(20, 22, 18)) > 0.7,
        'sub-1_ses-2': rng.uniform(size=(20, 22, 18)) > 0.7,
        'sub-2_ses-1': rng.uniform(size=(20, 22, 18)) > 0.7,
        'sub-3': rng.uniform(size=(20, 22, 18)) > 0.7,
    }
    for stem, mask in masks.items():
        put_mask(tmp_path, stem, mask)
        put_mask(tmp_path, stem, mask, space='space-FLAIR')  # native
    put_mask(tmp_path, 'sub-4', np.ones((12, 12, 12)))  # of another template
    written = standard.lesion_maps(tmp_path)
    stem = f'group_space-{MNI}_res-2_label-L_probseg'
    assert [path.name for path in written] == [f'{stem}.nii.gz', f'{stem}.json', f'{stem}.png']
    both = (masks['sub-1_ses-1'].astype(float) + masks['sub-1_ses-2']) / 2
    expected = (both + masks['sub-2_ses-1'] + masks['sub-3']) / 3
    found = nib.load(written[0])
    np.testing.assert_allclose(found.get_fdata(), expected, atol=1e-6)
    assert found.get_data_dtype() == np.float32
    record = json.loads(written[1].read_text())
    assert (record['participants'], record['scans']) == (3, 4)
    assert len(record['Sources']) == 4
    assert record['Sources'][0] == (
        f'bids::sub-1/ses-1/anat/sub-1_ses-1_space-{MNI}_res-2_label-L_mask.nii.gz'
    )
    assert record['Resolution'] == '6 mm'
    assert 'its grid is another one' in caplog.text

    # It does not outlive its sources.
    for path in tmp_path.glob(f'sub-*/**/*_space-{MNI}_*'):
        path.unlink()
    assert standard.lesion_maps(tmp_path) == []
    assert list(tmp_path.glob('group_space-*')) == []


def test_without_standard_space_there_is_no_map(tmp_path):
    assert standard.lesion_maps(tmp_path) == []
    assert reports._maps(tmp_path) == []


def test_flags_of_the_registration_reach_the_reports(tmp_path):
    table = tmp_path / 'sub-1_seg-jointseg_morph.tsv'
    table.write_text('index\tname\tvolume_mm3\n')
    table.with_suffix('.json').write_text(json.dumps({'flags': ['one']}))
    fit = tmp_path / f'sub-1_from-T1w_to-{MNI}_mode-image_xfm.json'
    fit.write_text(json.dumps({'flags': ['two']}))
    (tmp_path / f'sub-11_from-T1w_to-{MNI}_mode-image_xfm.json').write_text('not read')
    assert reports._volumes(table)['flags'] == ['one', 'two']
