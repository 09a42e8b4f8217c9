"""Reports: upright figures whatever the native axes, pages that need nothing but themselves."""

import csv
import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from bids_jointseg import citation, reports
from bids_jointseg.bids import LESION_COLUMNS, DataError, write_json, write_table
from bids_jointseg.image import Grid, Volume
from bids_jointseg.labels import LABELS, PROTOCOLS
from bids_jointseg.lesions import ZONES

SHARED = Path(__file__).parents[2] / 'shared' / 'data'
ORANGE = np.array([0xD5, 0x5E, 0x00])
CODES = [
    ''.join(signs)
    for axes in itertools.permutations(('LR', 'PA', 'IS'))
    for signs in itertools.product(*axes)
]


def grid_of(shape, spacing=(4, 4, 4)):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(shape) * spacing / 2
    return Grid(tuple(shape), affine)


def head(shape=(40, 48, 36), spacing=(4, 4, 4)):
    """Return a T1w and its labels, RAS: an ellipsoid with a lesion at left, front and top."""
    grid = grid_of(shape, spacing)
    x, y, z = np.meshgrid(
        *(np.arange(n) * s - n * s / 2 for n, s in zip(shape, spacing, strict=True)), indexing='ij'
    )
    radius = np.sqrt((x / 62) ** 2 + (y / 76) ** 2 + (z / 54) ** 2)
    labels = np.zeros(shape, np.uint8)
    labels[radius < 1] = 8
    labels[radius < 0.8] = 2
    labels[radius < 0.3] = 9
    labels[(radius < 1) & (z < -25) & (y < 0)] = 11
    labels[(radius < 1) & (z < -20) & (np.abs(x) < 12) & (np.abs(y) < 12)] = 10
    labels[(np.abs(np.abs(x) - 14) < 6) & (np.abs(y) < 24) & (np.abs(z) < 10)] = 12
    labels[(np.abs(x + 30) < 7) & (np.abs(y - 30) < 7) & (np.abs(z - 20) < 7)] = 7
    means = np.zeros(13, np.float32)
    means[[2, 7, 8, 9, 10, 11, 12]] = 100, 60, 70, 85, 90, 75, 20
    noise = np.random.default_rng(0).normal(0, 2, shape)
    data = np.where(labels, means[labels] + noise, np.where(radius < 1.2, 40, 0))
    return Volume(data.astype(np.float32), grid), labels


def reoriented(array, grid, code):
    """Store the same scan with other voxel axes."""
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt('RAS'), nib.orientations.axcodes2ornt(code)
    )
    turned = nib.orientations.apply_orientation(array, turn)
    return turned, Grid(
        turned.shape, grid.affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
    )


def pixels(path):
    return np.asarray(Image.open(path).convert('RGB')).astype(int)


def orange(path):
    """Return where a figure has the colour of lesions, legend left out."""
    return np.abs(pixels(path)[:-60] - ORANGE).max(axis=-1) < 40


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """All figures of a T1w with a FLAIR."""
    t1w, labels = head()
    flair, flair_labels = head((54, 64, 24), (3, 3, 6))
    entropy = np.where(np.gradient(labels.astype(float))[0] != 0, 0.33, 0)
    arguments = {
        't1w': t1w,
        'flair': flair,
        't1w_labels': labels,
        'flair_labels': flair_labels,
        'flair_on_t1w': 130 - t1w.data,
        'flair_on_t1w_before': np.roll(130 - t1w.data, 3, 1),
        'entropy': entropy,
    }
    figures = tmp_path_factory.mktemp('pair')
    return arguments, reports.draw_scan(figures, 'sub-01', **arguments)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(reports, 'WIDTH', 400)  # the same pictures, faster


# --- figures ------------------------------------------------------------------------------------


def test_a_pair_gets_every_figure(pair):
    _, paths = pair
    expected = [
        f'sub-01_desc-{what}_{suffix}.png'
        for what, suffix in reports.FIGURES
        if (what, suffix) != ('closeup', 'T1w')
    ]
    assert [path.name for path in paths] == expected
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(expected)
    for path in paths:
        assert Image.open(path).width == 1200


def test_pictures_that_are_flipped_have_one_size_and_one_background(pair):
    _, paths = pair
    by_name = {path.name.split('_desc-')[1]: pixels(path) for path in paths}
    for names in (
        ('scan_T1w.png', 'contours_T1w.png'),
        ('scan_FLAIR.png', 'lesions_FLAIR.png'),
    ):
        bare, lined = (by_name[name] for name in names)
        rows = bare.shape[0] - 28  # the caption
        same = np.abs(bare[:rows] - lined[:rows]).max(axis=-1) <= 8
        assert 0.5 < same.mean() < 1
    shapes = {by_name[f'registration{name}.png'].shape for name in ('fixed_T1w', 'after_FLAIR')}
    assert len(shapes) == 1


def test_equal_input_gives_equal_bytes(small, pair, tmp_path):
    arguments, _ = pair
    first, second = (
        [path.read_bytes() for path in reports.draw_scan(tmp_path / name, 'sub-01', **arguments)]
        for name in 'ab'
    )
    assert first == second


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        ('T1w', ['scan_T1w', 'contours_T1w', 'labels_T1w', 'closeup_T1w', 'entropy_probseg']),
        (
            'FLAIR',
            ['scan_FLAIR', 'lesions_FLAIR', 'labels_FLAIR', 'closeup_FLAIR', 'entropy_probseg'],
        ),
    ],
)
def test_one_modality(small, tmp_path, given, expected):
    volume, labels = head()
    name = given.lower()
    arguments = {name: volume, f'{name}_labels': labels, 'entropy': 0.1 * (labels > 0)}
    paths = reports.draw_scan(tmp_path / 'new' / 'figures', 'sub-1', **arguments)
    assert [path.name for path in paths] == [f'sub-1_desc-{end}.png' for end in expected]


@pytest.mark.parametrize(
    ('code', 'spacing'),
    [
        ('LAS', (4, 4, 4)),
        ('ILP', (4, 4, 4)),
        ('LPS', (4, 4, 8)),
        ('ASL', (8, 4, 4)),
        ('PSR', (8, 4, 4)),
        ('RSP', (4, 8, 4)),
    ],
)
def test_native_axes_do_not_change_a_figure(small, tmp_path, code, spacing):
    volume, labels = head(tuple(160 // step for step in spacing), spacing)
    drawn = []
    for name in ('RAS', code):
        data, grid = reoriented(volume.data, volume.grid, name)
        turned, _ = reoriented(labels, volume.grid, name)
        paths = reports.draw_scan(
            tmp_path / name, 'sub-01', t1w=Volume(data, grid), t1w_labels=turned
        )
        drawn.append([path.read_bytes() for path in paths])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize('code', CODES)
def test_upright_puts_every_orientation_in_ras(code):
    volume, labels = head()
    turned, grid = reoriented(labels, volume.grid, code)
    back, ras = reports.upright(turned, grid)
    np.testing.assert_array_equal(back, labels)
    np.testing.assert_allclose(ras.affine, volume.grid.affine)


@pytest.mark.parametrize('degrees', [0, 20, -35])
def test_left_is_left_and_up_is_up(degrees):
    """Find the lesion (left, anterior, superior) in each plane, in straight and oblique grids."""
    volume, labels = head()
    turn = np.eye(4)
    turn[:2, :2] = [
        [np.cos(np.radians(degrees)), -np.sin(np.radians(degrees))],
        [np.sin(np.radians(degrees)), np.cos(np.radians(degrees))],
    ]
    data, grid = reoriented(volume.data, Grid(volume.grid.shape, turn @ volume.grid.affine), 'LPS')
    native, _ = reoriented(labels, volume.grid, 'LPS')
    ras, ras_grid = reports.upright(native, grid)
    volume = Volume(reports.upright(data, grid)[0], ras_grid)
    mosaic = reports.plan_mosaic(volume, ras, follow_lesions=True)
    lesion = mosaic.memberships(ras)[reports.CHANNEL['L']]
    found = set()
    for tile in mosaic.tiles:
        rows, columns = np.nonzero(lesion[tile.place] > 0.5)
        if rows.size:
            found.add(tile.axis)
            middle = np.array(tile.size) / 2
            assert rows.mean() < middle[0]  # anterior in axial slices, superior in the others
            assert (columns.mean() < middle[1]) == (tile.axis != 0)  # sagittal: nose to the right
    assert found == {0, 1, 2}


def test_slices_keep_their_proportions_and_their_positions():
    """A ball of 30 mm radius is round in all planes of a scan of 0.72 x 0.72 x 3 mm."""
    shape, spacing = (130, 130, 32), np.array([0.72, 0.72, 3.0])
    grid = grid_of(shape, spacing)
    world = np.moveaxis(np.indices(shape), 0, -1) * spacing + grid.affine[:3, 3]
    ball = (np.linalg.norm(world - (5, -3, 2), axis=-1) < 30).astype(np.uint8) * 2
    volume = Volume(ball.astype(np.float32), grid)
    mosaic = reports.plan_mosaic(volume, ball)
    picture = mosaic.cut(volume.data, kernel='linear') > 0.5
    assert [tile.axis for tile in mosaic.tiles] == [2] * 10 + [1] * 5 + [0] * 4
    for axis, centre in enumerate((5, -3, 2)):
        tile = min(
            (tile for tile in mosaic.tiles if tile.axis == axis),
            key=lambda tile: abs(mosaic.position_mm(tile) - centre),
        )
        off = mosaic.position_mm(tile) - centre
        expected = 2 * np.sqrt(30**2 - off**2) * mosaic.scale
        rows, columns = np.nonzero(picture[tile.place])
        assert np.ptp(rows) + 1 == pytest.approx(expected, abs=3.2 * mosaic.scale)
        assert np.ptp(columns) + 1 == pytest.approx(expected, abs=1.6 * mosaic.scale)


def test_the_plane_of_acquisition_comes_first_with_more_slices():
    for spacing, own, count in (((4, 4, 8), 2, 10), ((4, 8, 4), 1, 10), ((8, 4, 4), 0, 8)):
        volume, labels = head(tuple(160 // step for step in spacing), spacing)
        tiles = reports.plan_mosaic(volume, labels).tiles
        assert [tile.axis for tile in tiles[:count]] == [own] * count
        assert tiles[count].axis != own


def test_slices_with_lesion_are_taken():
    volume, labels = head()
    labels[labels == 7] = 2
    labels[20, 25, 30] = 7  # one voxel, near the top
    chosen = {
        tile.index
        for tile in reports.plan_mosaic(volume, labels, follow_lesions=True).tiles
        if tile.axis == 2
    }
    assert 30 in chosen
    assert len(chosen) == 10


def test_a_lesion_of_one_voxel_is_drawn(tmp_path):
    volume, labels = head((60, 72, 54), (2.5, 2.5, 2.5))
    labels[labels == 7] = 2
    reports.draw_scan(tmp_path, 'none', flair=volume, flair_labels=labels)
    assert not (tmp_path / 'none_desc-closeup_FLAIR.png').exists()
    assert not orange(tmp_path / 'none_desc-lesions_FLAIR.png').any()
    labels[20, 40, 33] = 7
    reports.draw_scan(tmp_path, 'one', flair=volume, flair_labels=labels)
    assert orange(tmp_path / 'one_desc-lesions_FLAIR.png').sum() >= 12  # three planes
    assert orange(tmp_path / 'one_desc-closeup_FLAIR.png').sum() >= 20


def test_the_legend_has_the_colours_of_the_label_table(pair):
    _, paths = pair
    path = next(path for path in paths if path.name.endswith('desc-labels_T1w.png'))
    legend = pixels(path)[-60:].reshape(-1, 3)
    for label in LABELS[1:]:
        color = [int(label.color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(legend - color).max(axis=-1) <= 4).sum() > 100


def test_poor_scans_are_drawn(small, tmp_path):
    volume, labels = head()
    nothing = np.zeros_like(labels)
    broken = volume.data.copy()
    broken[10:20] = np.nan
    for number, (data, drawn) in enumerate(
        [
            (volume.data, nothing),
            (broken, labels),
            (np.zeros_like(volume.data), nothing),
            (np.full_like(volume.data, 7), labels),
            (-volume.data, None),
            (volume.data[:, :, 15:16], labels[:, :, 15:16]),
        ]
    ):
        scan = Volume(data, Grid(data.shape, volume.grid.affine))
        paths = reports.draw_scan(tmp_path, f'sub-{number}', t1w=scan, t1w_labels=drawn)
        assert all(path.stat().st_size > 500 for path in paths)


def test_wrong_input_is_named(tmp_path):
    volume, labels = head()
    with pytest.raises(ValueError, match='sub-1: nothing to draw'):
        reports.draw_scan(tmp_path, 'sub-1')
    with pytest.raises(ValueError, match='sub-1: t1w_labels does not have the shape'):
        reports.draw_scan(tmp_path, 'sub-1', t1w=volume, t1w_labels=labels[1:])
    with pytest.raises(ValueError, match='sub-1: flair_labels does not have the shape'):
        reports.draw_scan(tmp_path, 'sub-1', t1w=volume, flair_labels=labels)
    assert not list(tmp_path.iterdir())


def test_real_scan(tmp_path):
    anat = SHARED / 'neuromorphometrics' / 'sub-0040' / 'ses-1' / 'anat'
    if not anat.is_dir():
        pytest.skip('no example data')
    from bids_jointseg.image import load_scan

    name = 'sub-0040_ses-1'
    manual = SHARED / 'neuromorphometrics' / 'derivatives' / 'manual' / 'sub-0040' / 'ses-1'
    codes = np.asarray(
        nib.load(manual / 'anat' / f'{name}_desc-neuromorphometrics_dseg.nii.gz').dataobj
    )
    bits = PROTOCOLS['neuromorphometrics'].encode(codes.astype(int))
    labels = np.zeros(codes.shape, np.uint8)
    for channel, label in enumerate(LABELS):
        labels[bits == 1 << channel] = label.index
    t1w = load_scan(anat / f'{name}_T1w.nii.gz')
    paths = reports.draw_scan(tmp_path, name, t1w=t1w, t1w_labels=labels)
    assert len(paths) == 3
    assert sum(path.stat().st_size for path in paths) < 2e6


# --- pages --------------------------------------------------------------------------------------


def write_scan(out, stem, volumes=None, lesions=(), flags=()):
    """Write the tables of one scan, as the app does."""
    parts = dict(part.split('-', 1) for part in stem.split('_'))
    anat = out / f'sub-{parts["sub"]}'
    anat = (anat / f'ses-{parts["ses"]}' if 'ses' in parts else anat) / 'anat'
    anat.mkdir(parents=True, exist_ok=True)
    volumes = volumes or {
        **{'WM': 5e5, 'L': 2e3, 'CGM': 6e5, 'SGM': 4e4},
        **{'BS': 3e4, 'CBM': 1.4e5, 'VEN': 2e4},
    }
    brain = sum(volumes.values())
    write_table(
        anat / f'{stem}_seg-jointseg_morph.tsv',
        ('index', 'name', 'volume_mm3', 'percent_of_brain'),
        (
            {
                'index': label.index,
                'name': label.abbreviation,
                'volume_mm3': volumes[label.abbreviation],
                'percent_of_brain': 100 * volumes[label.abbreviation] / brain,
            }
            for label in LABELS[1:]
        ),
    )
    write_table(
        anat / f'{stem}_desc-lesions_morph.tsv',
        tuple(LESION_COLUMNS),
        (
            dict(zip(LESION_COLUMNS, (n, v, 4.5, 'deep', 0.75, 1, -1.5, 2, 3, 9), strict=True))
            for n, v in enumerate(lesions, 1)
        ),
    )
    zones = {zone: {'count': 0, 'volume_mm3': 0} for zone in ZONES}
    zones['deep'] = {'count': len(lesions), 'volume_mm3': sum(lesions)}
    record = {
        'brain_volume_mm3': brain,
        'lesion_count': len(lesions),
        'lesion_zones': zones,
        'quality': {'verdict': 'check', 'measures': {'brain_ml': 5.5, 'agreement': 0.9}},
        'flags': list(flags),
    }
    write_json(anat / f'{stem}_seg-jointseg_morph.json', record)
    return anat


class Page(HTMLParser):
    """What a page refers to, its ids, and whether its tags are balanced."""

    VOID = frozenset(('meta', 'img', 'input', 'br', 'hr', 'link', 'rect', 'path'))

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.loaded, self.links = [], [], [], [], []
        self.feed(text)
        assert not self.open
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if 'id' in attributes:
            self.ids.append(attributes['id'])
        for name in ('src', 'srcset', 'poster', 'data', 'action', 'background', 'xlink:href'):
            if name in attributes:
                self.loaded.append(attributes[name])
        if 'href' in attributes:
            (self.loaded if tag in ('link', 'use', 'image', 'base') else self.links).append(
                attributes['href']
            )
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_self_contained(text):
    page = Page(text)
    assert all(target.startswith('data:image/png;base64,') for target in page.loaded)
    assert not re.search(r'@import|url\(|<link|<iframe|<object', text)
    assert not re.search(r'\b20\d\d-\d\d-\d\d\b', text)  # no date
    return page


PROVENANCE = {
    'Software': 'bids_jointseg 0.1.0',
    'Weights': {'Name': 'jointseg', 'SHA-256': 'ab' * 32, 'Licence': 'CC BY-NC 4.0'},
    'Command': 'jointseg in out participant --participant-label <01>',
    'Threads': 2,
    'Inputs': ['a', 'b'],
}


@pytest.fixture
def results(pair, tmp_path):
    """A participant with a paired scan in one session and a scan without figures in another."""
    _, paths = pair
    flags = ['FLAIR & T1w: <script>alert("moved")</script>', 'no <contrast>']
    anat = write_scan(tmp_path, 'sub-01_ses-1', lesions=range(400, 150, -10), flags=flags)
    write_scan(tmp_path, 'sub-01_ses-2_run-1')
    for end in ('seg-jointseg_dseg.nii.gz', 'space-FLAIR_label-L_mask.nii.gz'):
        (anat / f'sub-01_ses-1_{end}').touch()
    (anat / 'sub-01_ses-1_run-2_seg-jointseg_dseg.nii.gz').touch()
    (anat / '.sub-01_ses-1_desc-brain_mask.nii.gz.tmp').touch()
    figures = tmp_path / 'sub-01' / 'figures'
    figures.mkdir()
    for path in paths:
        shutil.copy(path, figures / path.name.replace('sub-01_', 'sub-01_ses-1_'))
    (tmp_path / 'logs').mkdir()
    (tmp_path / 'logs' / 'CITATION.md').write_text(
        f'{citation.NOTICE}\n\nMade with *jointseg* <b>1</b> (`x < y`), after @jointseg.\n\n'
        'A BIDS App [@bids; @bidsapps], mail to a@nobody, [@nobody].\n'
    )
    return tmp_path


def test_subject_page(results):
    path = reports.subject_report(results, '01', provenance=PROVENANCE)
    assert path == results / 'sub-01.html'
    text = path.read_text(encoding='utf-8')
    page = check_self_contained(text)
    tags = [tag for tag, _ in page.tags]

    assert 'script' not in tags
    assert tags.count('img') == len(reports.FIGURES) - 1
    for tag, attributes in page.tags:
        if tag == 'img':
            assert attributes['alt']
            assert attributes['width'] == '1200'
    words = html.unescape(re.sub(r'<[^>]+>', ' ', text))
    assert 'FLAIR & T1w: <script>alert("moved")</script>' in words
    assert '1 332' in re.sub('\u202f', ' ', words)  # ml of brain
    assert 'The other 5 lesions' in words
    assert 'ab' * 32 in words
    assert '--participant-label <01>' in words
    assert 'There are no figures of this scan' in words
    assert 'No lesion was found' in words
    assert '<em>jointseg</em> &lt;b&gt;1&lt;/b&gt; (<code>x &lt; y</code>)' in text
    prose = html.unescape(re.sub(r'<[^>]+>', '', text))
    assert 'after Dorent et al. (2019).' in prose
    assert 'App (Gorgolewski et al. 2016; Gorgolewski et al. 2017), mail' in prose
    assert 'mail to a@nobody, [@nobody].' in prose
    assert 'Calhoun, Vince D. et al. (2016). The brain imaging data structure' in prose
    assert 'href="https://doi.org/10.1038/sdata.2016.44"' in text
    assert words.count('released under the CC0 licence') == 1

    local = [link for link in page.links if not link.startswith(('#', 'https:'))]
    assert sorted(Path(link).name for link in local if 'ses-1' in link) == [
        'sub-01_ses-1_desc-lesions_morph.tsv',
        'sub-01_ses-1_seg-jointseg_dseg.nii.gz',
        'sub-01_ses-1_seg-jointseg_morph.json',
        'sub-01_ses-1_seg-jointseg_morph.tsv',
        'sub-01_ses-1_space-FLAIR_label-L_mask.nii.gz',
    ]
    assert all((results / link).is_file() for link in local)
    assert {link[1:] for link in page.links if link.startswith('#')} <= set(page.ids)
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r'h\d', tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_subject_page_is_a_pure_function_of_the_folder(results):
    first = reports.subject_report(results, '01', provenance=PROVENANCE).read_bytes()
    second = reports.subject_report(results, '01', provenance=PROVENANCE).read_bytes()
    assert first == second
    assert not [path for path in results.iterdir() if 'tmp' in path.name]


def test_subject_page_without_figures_sidecars_or_methods(tmp_path):
    anat = write_scan(tmp_path, 'sub-02')
    (anat / 'sub-02_seg-jointseg_morph.json').unlink()
    (anat / 'sub-02_desc-lesions_morph.tsv').unlink()
    text = reports.subject_report(tmp_path, '02', provenance={}).read_text(encoding='utf-8')
    check_self_contained(text)
    assert 'n/a' in text
    empty = reports.subject_report(tmp_path, '99', provenance={}).read_text(encoding='utf-8')
    assert 'no results of this participant' in empty


def cohort(out, count=12):
    for number in range(count):
        volumes = dict.fromkeys((label.abbreviation for label in LABELS[1:]), 1e5 + 1e3 * number)
        if number == 3:
            volumes['VEN'] = 9e5
        if number == 4:
            volumes['CBM'] = 10
        volumes['L'] = 0 if number % 2 else 100.0 * number
        run = '_run-1' if number == 5 else ''
        flags = ['thick; <slices>'] if number == 6 else []
        write_scan(out, f'sub-{number:02d}_ses-a{run}', volumes, lesions=[5] * number, flags=flags)
    return out


def read(path, delimiter='\t'):
    with path.open(newline='') as stream:
        return list(csv.DictReader(stream, delimiter=delimiter))


def test_group_tables(tmp_path, caplog):
    cohort(tmp_path)
    write_scan(tmp_path, 'sub-zz')
    broken = write_scan(tmp_path, 'sub-yy') / 'sub-yy_seg-jointseg_morph.json'
    broken.write_text('{')
    paths = reports.group_tables(tmp_path)
    assert [path.name for path in paths] == [
        'group_volumes.tsv',
        'group_volumes.csv',
        'group_volumes.json',
        'group_lesions.tsv',
        'group_lesions.csv',
    ]
    rows = read(paths[0])
    assert list(rows[0]) == [
        *('participant_id', 'session_id', 'run', 'scan', 'quality', 'brain_mm3'),
        *(f'{label.abbreviation}_mm3' for label in LABELS[1:]),
        'lesion_count',
        *(f'L_{zone}_{name}' for zone in ZONES for name in ('count', 'mm3')),
        'flags',
    ]
    assert len(rows) == 13
    assert 'sub-yy_seg-jointseg_morph.tsv: left out' in caplog.text
    assert rows[5]['run'] == '1'
    assert rows[6]['flags'] == 'thick; <slices>'
    assert rows[5]['L_deep_count'] == '5'
    assert rows[5]['L_infratentorial_mm3'] == '0'
    assert rows[12]['session_id'] == 'n/a'
    assert float(rows[3]['VEN_mm3']) == 9e5
    assert read(paths[1], ',') == rows
    assert set(json.loads(paths[2].read_text())) <= set(rows[0])
    lesions = read(paths[3])
    assert len(lesions) == sum(range(12))
    assert lesions[0] == {
        **{'participant_id': 'sub-01', 'session_id': 'ses-a', 'run': 'n/a'},
        **{'scan': 'sub-01_ses-a', 'lesion': '1', 'volume_mm3': '5'},
        **{'diameter_mm': '4.5', 'zone': 'deep', 'probability': '0.75', 'agreement': '1'},
        **{'x_mm': '-1.5', 'y_mm': '2', 'z_mm': '3', 'voxels': '9'},
    }
    assert read(paths[4], ',') == lesions


def test_group_page(tmp_path):
    cohort(tmp_path)
    path = reports.group_report(tmp_path)
    assert path == tmp_path / 'group.html'
    text = path.read_text(encoding='utf-8')
    page = check_self_contained(text)
    unusual = text[text.index('id="outliers"') : text.index('id="scans"')]
    named = re.findall(r'>(sub-[\w-]+)</a></th><td class="text">([^<]+)<.*?>(high|low)<', unusual)
    assert {('sub-03_ses-a', 'Ventricles', 'high'), ('sub-04_ses-a', 'Cerebellum', 'low')} <= set(
        named
    )
    assert 'thick; &lt;slices&gt;' in text
    assert {f'sub-{number:02d}.html' for number in range(12)} <= set(page.links)
    assert text.count('<svg') == 9
    assert reports.group_report(tmp_path).read_text(encoding='utf-8') == text


@pytest.mark.parametrize('count', [1, 2])
def test_small_cohorts_name_nobody(tmp_path, count):
    cohort(tmp_path, count)
    text = reports.group_report(tmp_path).read_text(encoding='utf-8')
    check_self_contained(text)
    assert 'No value lies beyond' in text


def test_no_results_is_an_error(tmp_path):
    with pytest.raises(DataError, match='run the participant level first'):
        reports.group_tables(tmp_path)


def test_usual_range():
    median, low, high = reports.usual_range([1, 2, 3, 4, 100, float('nan')])
    assert (median, low, high) == pytest.approx((3, 3 - 3 * 1.4826, 3 + 3 * 1.4826))
    assert reports.usual_range([1, 2, 3, 100]) == (2.5, -np.inf, np.inf)  # too few
    assert reports.usual_range([5, 5, 5, 5, 9]) == (5, -np.inf, np.inf)  # no spread
    median, low, high = reports.usual_range([0, 1, 3, 7, 15], skewed=True)
    assert (median, low) == (pytest.approx(3), -np.inf)
    assert high == pytest.approx(4 * 2 ** (3 * 1.4826) - 1)
    assert np.isnan(reports.usual_range([float('nan')])[0])


# --- in a browser -------------------------------------------------------------------------------

PROBE = """<!DOCTYPE html><title>probe</title>
<iframe id="page" src="{name}" width="{width}" height="900"></iframe><pre id="found"></pre><script>
addEventListener('load', () => {{
  const page = document.getElementById('page').contentDocument;
  const seen = (node) => node.getBoundingClientRect().height > 0;
  const images = [...page.images];
  const groups = [...page.querySelectorAll('fieldset.flip')].map((group) =>
    [...group.querySelectorAll('input')].map((input) => {{
      input.click();
      return [...group.querySelectorAll('figure')].map(seen);
    }}));
  const sort = page.querySelectorAll('table.sortable button')[1];
  if (sort) sort.click();
  document.getElementById('found').textContent = JSON.stringify({{
    loaded: images.every((image) => image.naturalWidth === 1200),
    overflow: page.documentElement.scrollWidth > {width},
    groups,
    requests: page.defaultView.performance.getEntriesByType('resource')
      .map((entry) => entry.name).filter((name) => !name.startsWith('data:')),
    first: sort ? page.querySelector('table.sortable tbody th').textContent : null,
  }});
}});
</script>"""


def browse(folder, name, width=1280):
    """Open a page in headless Chromium and return what the probe found in it."""
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if not chromium:
        pytest.skip('chromium is not installed')
    probe = folder / 'probe.html'
    probe.write_text(PROBE.format(name=name, width=width))
    flags = (
        '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run '
        '--disable-background-networking --disable-component-update --disable-sync '
        '--allow-file-access-from-files --virtual-time-budget=5000 --dump-dom'
    )
    done = subprocess.run(
        [
            chromium,
            *flags.split(),
            '--host-resolver-rules=MAP * ~NOTFOUND',
            f'--user-data-dir={folder / "profile"}',
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def test_subject_page_in_a_browser(results):
    reports.subject_report(results, '01', provenance=PROVENANCE)
    found = browse(results, 'sub-01.html')
    assert found['loaded']
    assert not found['overflow']
    assert not found['requests']
    # Each control shows its own picture and hides the others, by style sheet alone.
    identity = np.eye(3, dtype=bool).tolist()
    assert found['groups'] == [identity] * 3


def test_group_page_in_a_browser(tmp_path):
    cohort(tmp_path)
    reports.group_report(tmp_path)
    found = browse(tmp_path, 'group.html')
    assert not found['overflow']
    assert not found['requests']
    assert found['first'] == 'sub-04_ses-a'  # the smallest brain, once sorted by it


def test_group_page_fits_on_paper(tmp_path):
    cohort(tmp_path)
    page = reports.group_report(tmp_path)
    text = page.read_text(encoding='utf-8')
    words = 'the brain reaches the edge of the scan (3902 mm²): volumes may be too small; ' * 2
    text = text.replace('<td class="words"></td>', f'<td class="words">{words}</td>')
    assert words in text
    printed = page.with_name('printed.html')
    printed.write_text(text.replace('@media print', '@media all'), encoding='utf-8')
    paper_px = round((297 - 2 * 14) / 25.4 * 96)  # landscape A4 within its margins
    assert not browse(tmp_path, printed.name, paper_px)['overflow']
