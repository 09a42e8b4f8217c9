"""Reports: pages that need nothing but themselves."""

import csv
import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bids_jointseg import citation, figures, reports
from bids_jointseg.bids import LESION_COLUMNS, DataError, write_json, write_table
from bids_jointseg.labels import LABELS
from bids_jointseg.lesions import ZONES


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
        'intracranial_volume_mm3': 1.25 * brain if lesions else 'n/a',
        'parenchyma_percent': 78.9 if lesions else 'n/a',
        'lesion_count': len(lesions),
        'lesion_count_3mm': len(lesions) // 2,
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
def results(drawn_pair, tmp_path):
    """A participant with a paired scan in one session and a scan without figures in another."""
    _, paths = drawn_pair
    flags = ['FLAIR & T1w: <script>alert("moved")</script>', 'no <contrast>']
    anat = write_scan(tmp_path, 'sub-01_ses-1', lesions=range(400, 150, -10), flags=flags)
    write_scan(tmp_path, 'sub-01_ses-2_run-1')
    for end in ('seg-jointseg_dseg.nii.gz', 'space-FLAIR_label-L_mask.nii.gz'):
        (anat / f'sub-01_ses-1_{end}').touch()
    (anat / 'sub-01_ses-1_run-2_seg-jointseg_dseg.nii.gz').touch()
    (anat / '.sub-01_ses-1_desc-brain_mask.nii.gz.tmp').touch()
    folder = tmp_path / 'sub-01' / 'figures'
    folder.mkdir()
    for path in paths:
        shutil.copy(path, folder / path.name.replace('sub-01_', 'sub-01_ses-1_'))
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
    assert tags.count('img') == len(figures.FIGURES) - 1
    for tag, attributes in page.tags:
        if tag == 'img':
            assert attributes['alt']
            assert attributes['width'] == '1200'
    words = html.unescape(re.sub(r'<[^>]+>', ' ', text))
    assert 'FLAIR & T1w: <script>alert("moved")</script>' in words
    numbers = re.sub('\u202f', ' ', words)
    assert '1 332' in numbers  # ml of brain
    assert re.findall(r'Within the skull +([\d ]+\d)', numbers) == ['1 665']  # of one scan
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
        *('intracranial_mm3', 'parenchyma_percent'),
        *(f'{label.abbreviation}_mm3' for label in LABELS[1:]),
        *('lesion_count', 'lesion_count_3mm'),
        *(f'L_{zone}_{name}' for zone in ZONES for name in ('count', 'mm3')),
        'flags',
    ]
    assert len(rows) == 13
    assert 'sub-yy_seg-jointseg_morph.tsv: left out' in caplog.text
    assert rows[5]['run'] == '1'
    assert float(rows[5]['intracranial_mm3']) == 1.25 * float(rows[5]['brain_mm3'])
    assert float(rows[5]['parenchyma_percent']) == 78.9
    assert rows[0]['intracranial_mm3'] == rows[0]['parenchyma_percent'] == 'n/a'
    assert rows[6]['flags'] == 'thick; <slices>'
    assert rows[5]['L_deep_count'] == '5'
    assert (rows[5]['lesion_count'], rows[5]['lesion_count_3mm']) == ('5', '2')
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
    assert text.count('<svg') == 11
    assert 'aria-label="Within the skull: 11 scans' in text
    assert 'median 78.9 %' in text
    assert reports.group_report(tmp_path).read_text(encoding='utf-8') == text


def test_the_page_of_scans_without_skulls_is_silent_about_them(tmp_path):
    for name in ('sub-1', 'sub-2'):
        write_scan(tmp_path, name)
    text = reports.group_report(tmp_path).read_text(encoding='utf-8')
    assert text.count('<svg') == 9
    assert 'skull' not in text


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
