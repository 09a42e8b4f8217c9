"""Nobody gets in, and nothing gets out: code in data, paths that lead away, what names people.

``docs/reliability.md`` has the table of what is tried here; ``tries`` says how often.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import draw_head, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import contents, make_cohort

from bids_jointseg import bids, cli, recipe
from bids_jointseg.bids import BidsError
from bids_jointseg.card import ModelError, read_card
from bids_jointseg.config import Settings, SettingsError
from bids_jointseg.image import ImageError
from bids_jointseg.recipe import RecipeError

TREE = Path(__file__).parents[1]
PRODUCT = sorted([*TREE.glob('bids_jointseg/**/*.py'), *TREE.glob('workflows/*.py')])
SMALL = {'shape': (24, 28, 24), 'spacing_mm': (8.0, 8.0, 8.0)}

# --- code in data -------------------------------------------------------------------------------

MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal', 'jsonpickle'}
CALLS = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'yaml.load',
         'yaml.unsafe_load', 'yaml.full_load', 'tempfile.mktemp', 'torch.jit.load',
         'torch.hub.load', 'pickle_load', 'subprocess.getoutput', 'subprocess.getstatusoutput',
         'tarfile.open', 'zipfile.ZipFile', 'shutil.unpack_archive'}  # fmt: skip


def dangers(source: str) -> list[str]:
    """Return what a module does that could run code which lies in data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or '']
        found += [name for name in names if name.split('.')[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if call in CALLS or call.endswith('.extractall') or given.get('shell', 'False') != 'False':
            found.append(call)
        if call == 'torch.load' and given.get('weights_only') != 'True':
            found.append(call)
        if given.get('allow_pickle', 'False') != 'False':
            found.append(call)
    return found


BAD = ('import pickle', 'from joblib import load', 'import dill as d', 'eval(text)', 'exec(text)',
       'os.system(text)', 'os.popen(text)', 'subprocess.run(text, shell=True)',
       'subprocess.run(text, shell=maybe)', 'yaml.load(text)', 'torch.load(path)',
       'torch.load(path, weights_only=False)', 'np.load(path, allow_pickle=True)',
       'archive.extractall(folder)', 'tempfile.mktemp()', '__import__(name)')  # fmt: skip


@pytest.mark.tries(len(BAD))
def test_the_search_for_dangerous_calls_finds_them():
    assert [text for text in BAD if not dangers(text)] == []


def test_no_module_runs_what_it_reads():
    assert len(PRODUCT) > 25
    found = {path.name: dangers(path.read_text(encoding='utf-8')) for path in PRODUCT}
    assert {name: calls for name, calls in found.items() if calls} == {}


class Payload:
    """Touches a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickles_are_refused(tmp_path, model):
    """In arrays between stages, in a checkpoint, in weights, in a plugin file: never unpickled."""
    import torch

    from bids_jointseg import interfaces, training

    mark = tmp_path / 'mark'
    np.savez(tmp_path / 'a.npz', data=np.array([Payload(mark)], dtype=object))
    with pytest.raises(ImageError, match='is damaged'):
        interfaces._load(str(tmp_path / 'a.npz'))
    torch.save({'identity': Payload(mark)}, tmp_path / 'checkpoint.pt')
    state = object.__new__(training._State)
    with pytest.raises(pickle.UnpicklingError, match=r'[Ww]eights'):
        state.load(tmp_path / 'checkpoint.pt', 'cpu')
    weights = tmp_path / 'x.safetensors'
    weights.write_bytes(pickle.dumps(Payload(mark)))
    forged = replace(
        read_card(model), path=weights.with_suffix('.json'),
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
    )  # fmt: skip
    from bids_jointseg.network import load_model

    with pytest.raises(ModelError, match='do not fit the card'):
        load_model(forged)
    plugin = tmp_path / 'plugin.yml'
    plugin.write_text(f'plugin: !!python/object/apply:pathlib.Path.touch [{mark}]\n')
    with pytest.raises(SettingsError, match='not a plugin file'):
        cli.read_plugin(Settings(tmp_path, tmp_path / 'out', use_plugin=plugin))
    assert not mark.exists()


# --- whole runs ---------------------------------------------------------------------------------

NAMES = ('HEADERdescrip', 'HEADERdbname', 'HEADERauxfile', 'HEADERintent', 'HEADERcomment',
         'SidecarPatientName', '1970-01-31', 'SidecarInstitution', 'SidecarAddress',
         'SidecarOperator', 'SidecarSerial', '2019-12-24', 'TableComment', 'TableAge99',
         'DatasetAuthor')  # fmt: skip
"""What the input says of people, places and times."""


def personal(path: Path, suffix: str, seed: int) -> None:
    """Write a scan whose header and sidecar name a patient."""
    drawn = draw_head(suffix, **SMALL, seed=seed)
    header = drawn.header
    header['descrip'], header['db_name'] = NAMES[0], NAMES[1]
    header['aux_file'], header['intent_name'] = NAMES[2], NAMES[3]
    header.extensions.append(nib.nifti1.Nifti1Extension('comment', NAMES[4].encode()))
    put(drawn, path)
    record = {
        'PatientName': NAMES[5], 'PatientBirthDate': NAMES[6], 'InstitutionName': NAMES[7],
        'InstitutionAddress': NAMES[8], 'OperatorsName': NAMES[9], 'DeviceSerialNumber': NAMES[10],
        'AcquisitionDateTime': f'{NAMES[11]}T12:00:00',
    }  # fmt: skip
    path.with_name(path.name.split('.')[0] + '.json').write_text(json.dumps(record))


@pytest.fixture(scope='module')
def cohort(server, tmp_path_factory):
    """One participant of two sessions, about whom headers, sidecars and tables say too much."""
    made = make_cohort(server, tmp_path_factory.mktemp('security'))
    for session in '12':
        name = f'sub-1_ses-{session}'
        anat = made.bids / 'sub-1' / f'ses-{session}' / 'anat'
        personal(anat / f'{name}_T1w.nii.gz', 'T1w', int(session))
        personal(anat / f'{name}_FLAIR.nii.gz', 'FLAIR', 2 + int(session))
        (anat.parent / f'{name}_scans.tsv').write_text(
            f'filename\tacq_time\tcomment\nanat/{name}_T1w.nii.gz\t{NAMES[11]}\t{NAMES[12]}\n'
        )
    (made.bids / 'participants.tsv').write_text(f'participant_id\tage\nsub-1\t{NAMES[13]}\n')
    description = made.bids / 'dataset_description.json'
    description.write_text(
        json.dumps(json.loads(description.read_text()) | {'Authors': [NAMES[14]]})
    )
    return made


def watch(log: str) -> None:
    """Note whatever this process and its workers change on the disk, start, or connect to."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    changes = ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.symlink', 'os.link',
               'os.chmod', 'os.chown', 'os.truncate', 'shutil.rmtree', 'os.utime')  # fmt: skip
    others = ('socket.connect', 'socket.bind', 'socket.getaddrinfo', 'subprocess.Popen',
              'os.system', 'os.exec', 'os.posix_spawn')  # fmt: skip

    def note(event: str, given: tuple[Any, ...]) -> None:
        paths: list[Any] = []
        if event == 'open' and isinstance(given[0], str | bytes):
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            paths = [given[0]] if given[2] and given[2] & writes else []
        elif event in changes:
            paths = [item for item in given[:2] if isinstance(item, str | bytes | os.PathLike)]
        for path in paths:
            where = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))),
                                 os.path.basename(os.fspath(path)))  # fmt: skip
            os.write(stream, json.dumps([event, os.fsdecode(where)]).encode() + b'\n')
        if event in others:
            os.write(stream, json.dumps([event, repr(given)]).encode() + b'\n')

    sys.addaudithook(note)


@pytest.fixture(scope='module')
def results(cohort, tmp_path_factory):
    """The results of both levels, and what was done to the machine meanwhile."""
    victim = tmp_path_factory.mktemp('victim')
    (victim / 'kept.txt').write_text('kept')
    out, work = cohort.out('run'), cohort.folder / 'run' / 'work'
    # Somebody who may write there has laid traps: what is written must not follow them.
    (out / 'logs').mkdir(parents=True)
    work.mkdir()
    for link in (out / 'sub-1.html', out / 'README.md', out / 'logs' / 'CITATION.md',
                 out / 'dataset_description.json', out / 'group.html'):  # fmt: skip
        link.symlink_to(victim / 'kept.txt')
    (work / 'jointseg-old').symlink_to(victim)
    log = cohort.folder / 'audit.jsonl'
    for level, more in (('participant', ['--clean-workdir']), ('group', [])):
        code, said = cohort.run('run', *more, level=level, before=((watch, [str(log)]),))
        assert code == 0, said
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return out, work, victim, events


def test_nothing_is_written_outside_the_given_folders(cohort, results):
    """Of all that the command does to the machine; its log folder is where it was started."""
    out, work, _, events = results
    given = [str(out.resolve()), str(work.resolve()), str((cohort.folder / 'run').resolve())]
    written = {path for event, path in events if not event.startswith(('socket', 'subprocess'))}
    assert len(written) > 100
    assert [path for path in written if not path.startswith((*given, '/dev/', '/proc/'))] == []


def test_nothing_is_sent_and_no_program_is_started(results):
    *_, events = results
    kinds = ('socket.', 'subprocess', 'os.exec', 'os.posix_spawn', 'os.system')
    found = [given for event, given in events if event.startswith(kinds)]
    assert {given.partition(',')[0] for given in found} <= {"('uname'"}  # Python's platform


@pytest.mark.tries(6)
def test_links_that_somebody_laid_are_not_followed(results):
    out, _, victim, _ = results
    assert [path.name for path in victim.iterdir()] == ['kept.txt']
    assert (victim / 'kept.txt').read_text() == 'kept'
    assert (out / 'sub-1.html').read_text().startswith('<!')
    assert not [path for path in out.rglob('*') if path.is_symlink()]


@pytest.mark.tries(len(NAMES))
def test_nothing_personal_of_the_input_is_in_the_results(cohort, results):
    """Neither in headers, sidecars, tables, reports, logs, nor in unfinished work."""
    out, work, *_ = results
    logs = cohort.folder / 'run' / 'logs'
    said = (logs / 'out.txt').read_text() + (logs / 'err.txt').read_text()
    assert not [name for name in NAMES if name in said]
    files = [path for folder in (out, work) for path in folder.rglob('*') if path.is_file()]
    assert len(files) > 150
    for path in files:
        content = path.read_bytes()
        if path.suffix in ('.gz', '.pklz'):
            content = gzip.decompress(content)
        assert [name for name in NAMES if name.encode() in content] == [], path
    for name, content in contents(out).items():
        if name.endswith('.nii.gz'):
            header = nib.Nifti1Image.from_bytes(gzip.decompress(content)).header
            assert not header.extensions
            for key in ('descrip', 'db_name', 'aux_file', 'intent_name', 'data_type'):
                assert header[key].item() == b'', (name, key)


# --- paths that lead away -----------------------------------------------------------------------

AWAY = ('../secret', '../../secret', '/etc/passwd', 'a/../../secret', '..', '.hidden', 'a/b', '',
        'a\0b', 'a\nb')  # fmt: skip
RECIPE = """
name = '{model}'
version = '1'
licence = 'CC0-1.0'
folds = 1
[architecture]
name = 'unet'
channels = [2, 4]
[[datasets]]
name = '{dataset}'
modalities = ['T1w']
annotation = 'labels'
protocol = 'neuromorphometrics'
"""


@pytest.mark.tries(2 * len(AWAY))
@pytest.mark.parametrize('which', ['model', 'dataset'])
def test_names_in_a_recipe_are_no_paths(tmp_path, which):
    """Files are called after them."""
    path = tmp_path / 'recipe.toml'
    given = {'model': 'm', 'dataset': 'd'}
    path.write_text(RECIPE.format(**given))
    assert recipe.read_recipe(path).name == 'm'
    for name in AWAY:
        escaped = json.dumps(name)[1:-1]
        text = RECIPE.replace("'{model}'", '"{model}"').replace("'{dataset}'", '"{dataset}"')
        path.write_text(text.format(**given | {which: escaped}))
        with pytest.raises(RecipeError, match='name is'):
            recipe.read_recipe(path)


URIS = ('bids:raw:../secret.nii.gz', 'bids:raw:/etc/passwd', 'bids:raw:sub-1/../../secret',
        '/etc/passwd', 'file:///etc/passwd', 'bids::../secret', 'bids:other:sub-1/a.nii',
        'http://example.org/a.nii.gz', '')  # fmt: skip


@pytest.mark.tries(2 * len(URIS))
@pytest.mark.parametrize('entry', ['Sources', 'SpatialReference'])
def test_sources_that_lead_out_of_the_dataset_are_not_read(tmp_path, caplog, entry):
    """Sidecars of results say what they were made of; comparing sessions reads that again."""
    from bids_jointseg import longitudinal

    good = 'bids:raw:sub-1/ses-1/anat/sub-1_ses-1_T1w.nii.gz'
    anat = tmp_path / 'out' / 'sub-1' / 'ses-1' / 'anat'
    anat.mkdir(parents=True)
    (anat / 'sub-1_ses-1_seg-jointseg_dseg.nii.gz').touch()

    def visits(uri: str) -> list[Any]:
        said = {'Sources': [good], 'SpatialReference': good}
        said[entry] = [uri] if entry == 'Sources' else uri
        record = {'Sources': said['Sources'], 'configuration': {}}
        (anat / 'sub-1_ses-1_seg-jointseg_morph.json').write_text(json.dumps(record))
        sidecar = {'SpatialReference': said['SpatialReference']}
        (anat / 'sub-1_ses-1_seg-jointseg_dseg.json').write_text(json.dumps(sidecar))
        caplog.clear()
        return longitudinal.find_visits(tmp_path / 'out', tmp_path / 'bids', '1')

    visits(good)
    assert 'not compared' not in caplog.text
    for uri in URIS:
        assert visits(uri) == []
        assert 'not compared' in caplog.text


@pytest.mark.parametrize('option', [
    ('--participant-label', '../../secret'), ('--participant-label', 'sub-../x'),
    ('--session-label', '../secret'), ('--model', '../secret.json'), ('--model', '..'),
    ('--output-spaces', '../../secret'), ('--output-spaces', 'T1w:res-../x'),
    ('--derivatives', 'a=../secret'), ('--bids-filter-file', '../secret'),
    ('--use-plugin', '../secret.yml'), ('--config-file', '../secret.toml'),
], ids=lambda option: '='.join(option))  # fmt: skip
def test_options_that_lead_nowhere_are_refused(cohort, tmp_path, capfd, option):
    out, work = tmp_path / 'out', tmp_path / 'work'
    command = [cohort.bids, out, 'participant', '-w', work, '--skip-bids-validation', *option]
    try:
        code = cli.main([str(item) for item in command])
    except SystemExit as stop:
        code = stop.code
    assert code in (2, 65)
    assert capfd.readouterr().err.count('\n') == 1
    assert {path.name for path in tmp_path.iterdir()} <= {'out', 'work'}
    assert not list(tmp_path.rglob('*secret*'))


def test_a_configuration_cannot_say_where_logs_go(cohort, tmp_path):
    text = Settings(cohort.bids, tmp_path / 'out', run_id='../../secret').to_toml()
    assert '../../secret' in text
    assert 'secret' not in Settings.from_toml(text).run_id


@pytest.mark.parametrize('name', [
    'sub-1_acq-<script>_T1w.nii.gz', 'sub-1_\x1b[2J_T1w.nii.gz', 'sub-1_run-1\n2_T1w.nii.gz',
    'sub-1_acq-$(touch mark)_T1w.nii.gz', 'sub-1_acq-;touch mark;_FLAIR.nii.gz',
    'sub-1_acq-..%2f..%2f_T1w.nii.gz', 'sub-1_acq-`id`_T1w.nii.gz', '--help_T1w.nii.gz',
], ids=repr)  # fmt: skip
def test_names_of_files_are_only_names(tmp_path, capfd, monkeypatch, name):
    """They are shown without commands to the terminal, and nothing is made of them."""
    from conftest import describe_dataset

    root = describe_dataset(tmp_path / 'bids')
    put(draw_head('T1w', **SMALL), root / 'sub-1' / 'anat' / 'sub-1_T1w.nii.gz')
    put(draw_head('T1w', **SMALL), root / 'sub-1' / 'anat' / name)
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(root), str(tmp_path / 'out'), 'participant', '--dry-run']) == 0
    said = capfd.readouterr()
    assert 'sub-1_T1w.nii.gz' in said.out
    assert not re.search(r'[^\n\x20-\x7e\u00a0-\uffff]', said.out + said.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bids']
    scans, _ = bids.plan(Settings(root, tmp_path / 'out'))
    for scan in scans:
        assert re.fullmatch('[a-zA-Z0-9_+-]+', scan.stem)


@pytest.mark.skipif(os.geteuid() != 0, reason='only root may give a folder away')
def test_the_work_of_somebody_else_is_not_taken_over(cohort, tmp_path, monkeypatch):
    """Nipype unpickles what lies there: it has to be the user's own."""
    from bids_jointseg.workflows import participant

    theirs = tmp_path / 'jointseg-x'
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    participant.refuse_foreign(theirs)  # root may look at everything
    monkeypatch.setattr(os, 'geteuid', lambda: 54321)
    with pytest.raises(SettingsError, match='belongs to another user'):
        participant.refuse_foreign(theirs)
    participant.refuse_foreign(tmp_path / 'nothing')


# --- pages --------------------------------------------------------------------------------------

PAYLOADS = (
    '<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "'><svg onload=alert(1)>",
    '</style><script>alert(1)</script>', '<a href="javascript:alert(1)">x</a>', '{{ 7 * 7 }}',
    '{% raw %}<b>x</b>', '&lt;script&gt;alert(1)&lt;/script&gt;', '<!-- <iframe src=//x> -->',
    '`<script>alert(1)</script>`', '**<script>alert(1)</script>**',
    'https://x.org/"onmouseover="alert(1)',
)  # fmt: skip


class Page(HTMLParser):
    """Collects what a browser would run or fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.wrong: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attributes:
            text = (value or '').strip().lower()
            if name.startswith('on') or text.startswith(('javascript:', 'vbscript:', 'data:text')):
                self.wrong.append(f'{tag} {name}={value}')
            if name == 'src' and not text.startswith('data:image/'):
                self.wrong.append(f'{tag} {name}={value}')

    def handle_data(self, data: str) -> None:
        self.words.append(data)


FORBIDDEN = {'iframe', 'object', 'embed', 'base', 'link', 'form'}


@pytest.mark.tries(len(PAYLOADS))
@pytest.mark.parametrize('payload', PAYLOADS)
def test_pages_escape_what_they_show(results, tmp_path, payload):
    """Wherever a text of data, results or models comes into a page, it stays a text."""
    import shutil

    from bids_jointseg.citation import write_citation
    from bids_jointseg.reports import group_report, group_tables, subject_report

    out = tmp_path / 'out'
    shutil.copytree(results[0], out)
    clean = [subject_report(out, '1', provenance={'a': 'b'}), group_report(out)]
    before = [Page(path.read_text()).tags for path in clean]

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        return [*map(poison, value), payload] if isinstance(value, list) else value

    for path in out.glob('sub-1/**/*_morph.json'):
        record = json.loads(path.read_text())
        for key in ('flags', 'notes'):
            if key in record:
                record[key] = [*record[key], payload]
        if 'quality' in record:
            record['quality'] = poison(record['quality'])
            record['quality']['measures'][payload] = payload
        record['configuration'] = {'model': payload, 'version': payload}
        path.write_text(json.dumps(record))
    for path in out.glob('sub-1/**/*desc-lesions_morph.tsv'):
        head, *rows = path.read_text().splitlines()
        cells = ['1', *[payload.replace('"', "'")] * head.count('\t')]
        path.write_text('\n'.join([head, *rows, '\t'.join(cells)]) + '\n')
    group_tables(out)
    pages = [
        subject_report(out, '1', provenance={'Model': payload, payload: 'x', 'Input': payload}),
        group_report(out),
    ]
    shown = 0
    for path, tags in zip(pages, before, strict=True):
        text = path.read_text()
        page = Page(text)
        assert page.wrong == [], path.name
        assert page.tags.get('script', 0) == tags.get('script', 0), path.name
        assert page.tags.get('style', 0) == tags.get('style', 0), path.name
        assert not FORBIDDEN & page.tags.keys(), path.name
        for tag in ('svg', 'img'):  # as many as its figures need
            assert page.tags.get(tag, 0) <= tags.get(tag, 0) + (tag == 'svg'), path.name
        shown += payload in ''.join(page.words)
    assert shown, 'the text is in none of the pages: what was tried is no longer shown'

    alone = Page(subject_report(out, '1', provenance={}).read_text()).tags
    write_citation(out, f'Written with `{payload}` and **{payload}** {payload}')
    page = Page((out / 'logs' / 'CITATION.html').read_text())
    assert page.wrong == []
    assert not {'script', 'img', 'svg', 'iframe'} & page.tags.keys()
    page = Page(subject_report(out, '1', provenance={}).read_text())
    assert page.wrong == []
    for tag in ('script', 'img', 'svg', 'iframe'):
        assert page.tags.get(tag, 0) == alone.get(tag, 0)


# --- fuzzers ------------------------------------------------------------------------------------

FUZZ = 300
FUZZING = settings(
    max_examples=FUZZ, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow,
                           HealthCheck.filter_too_much, HealthCheck.data_too_large],
)  # fmt: skip
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6),
    st.sampled_from(('../..', '/', '\0', '*', 'Query.ANY', 10**400, -1, 2**63, 'é' * 300)),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip


@st.composite
def altered(draw: Any, record: Any) -> Any:
    """Draw a structure with some of its parts removed, renamed, replaced or wrapped."""
    record = json.loads(json.dumps(record))
    for _ in range(draw(st.integers(1, 3))):
        place, holder = record, None
        key: Any = None
        while isinstance(place, dict | list) and place and (holder is None or draw(st.booleans())):
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            holder, key = place, draw(st.sampled_from(list(keys)))
            place = holder[key]
        if holder is None:
            return draw(ODD)
        what = draw(st.sampled_from(('remove', 'replace', 'wrap', 'rename', 'double')))
        if what == 'remove':
            del holder[key]
        elif what == 'replace':
            holder[key] = draw(ODD)
        elif what == 'wrap':
            holder[key] = draw(st.sampled_from(([place], {'x': place}, [[[place]]])))
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = place
            if what == 'rename':
                holder.pop(key)
        else:
            holder.insert(key, place)
    return record


@st.composite
def bytes_of(draw: Any, content: bytes) -> bytes:
    """Draw a content with some bytes flipped, cut out, doubled or put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        what = draw(st.sampled_from(('flip', 'cut', 'double', 'put', 'end')))
        if what == 'flip' and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif what == 'cut':
            del changed[at : at + draw(st.integers(1, 40))]
        elif what == 'double':
            changed[at:at] = changed[at : at + draw(st.integers(1, 40))]
        elif what == 'put':
            changed[at:at] = draw(st.binary(max_size=8))
        else:
            del changed[at:]
    return bytes(changed)


def one_line(error: Exception, place: Path | str) -> None:
    """Assert that an error says where it is, in one line."""
    assert str(error).startswith(str(place))
    assert '\n' not in str(error)


def toml(record: Any) -> bytes:
    """Write what TOML can hold of a structure."""
    lines = [f'{json.dumps(key)} = {json.dumps(value)}' for key, value in record.items()
             if 'null' not in json.dumps(value) and not isinstance(value, dict)]  # fmt: skip
    return '\n'.join(lines).encode()


@pytest.mark.tries(FUZZ)
@FUZZING
@given(data=st.data())
def test_fuzzed_configurations(tmp_path, data):
    """Settings, or one line that names the file."""
    base = Settings(tmp_path / 'in', tmp_path / 'out', participant_label=('1',), mem=2.0)
    record = {
        entry.name: value for entry in fields(Settings)
        if isinstance(value := getattr(base, entry.name), str | int | float | tuple | Path)
    }  # fmt: skip
    record = {k: str(v) if isinstance(v, Path) else v for k, v in record.items()}
    changed = data.draw(altered(record))
    content = data.draw(st.one_of(
        bytes_of(base.to_toml().encode()),
        st.just(toml(changed) if isinstance(changed, dict) else b'x = '),
    ))  # fmt: skip
    path = tmp_path / 'x.toml'
    path.write_bytes(content)
    try:
        found = cli.read_arguments(['/in', '/out', 'participant', '--config-file', str(path)])
    except SettingsError as error:
        one_line(error, path)
    else:
        assert isinstance(found, Settings)
        assert found.standard_spaces is not None


@pytest.mark.tries(FUZZ)
@FUZZING
@given(data=st.data())
def test_fuzzed_filters(tmp_path, cohort, data):
    """Filters that give scans or none, or one line that names the file or the option."""
    base = {
        't1w': {'session': ['1', '2'], 'run': None, 'suffix': 'T1w', 'extension': '.nii.gz'},
        'flair': {'acquisition': '*', 'part': 'Query.NONE'},
    }
    content = data.draw(st.one_of(
        altered(base).map(lambda value: json.dumps(value).encode()),
        bytes_of(json.dumps(base).encode()),
    ))  # fmt: skip
    path = tmp_path / 'x.json'
    path.write_bytes(content)
    try:
        found = bids.read_filters(path)
    except BidsError as error:
        one_line(error, path)
        return
    assert set(found) == set(bids.QUERIES)
    layout = _layout(cohort.bids)
    for kind, query in bids.QUERIES.items():
        try:
            paths = bids._query(layout, cohort.bids, query | found[kind], kind)
        except BidsError as error:
            one_line(error, '--bids-filter-file')
        else:
            assert all(item.is_relative_to(cohort.bids) for item in paths)


LAYOUTS: dict[Path, Any] = {}


def _layout(root: Path) -> Any:
    if root not in LAYOUTS:
        LAYOUTS[root] = bids._index(Settings(root, root / 'out'))
    return LAYOUTS[root]


@pytest.mark.tries(FUZZ)
@FUZZING
@given(data=st.data())
def test_fuzzed_model_files(tmp_path, model, data):
    """A network, or one line that names a file; what is in the weights is never run."""
    from bids_jointseg.network import load_model

    weights = model.with_suffix('.safetensors').read_bytes()
    record = json.loads(model.read_text())
    kind = data.draw(st.sampled_from(('card', 'card', 'bytes', 'header', 'header')))
    if kind == 'card':
        record = data.draw(altered(record))
    elif kind == 'bytes':
        weights = data.draw(bytes_of(weights))
    else:
        (size,) = struct.unpack('<Q', weights[:8])
        header = data.draw(altered(json.loads(weights[8 : 8 + size])))
        head = json.dumps(header).encode()
        length = data.draw(st.sampled_from((len(head), len(head) - 1, 2**40, 0)))
        weights = struct.pack('<Q', length) + head + weights[8 + size :]
    if kind != 'card' and data.draw(st.booleans()):
        record['sha256'] = hashlib.sha256(weights).hexdigest()  # as who can write both would do
    path = tmp_path / 'x.json'
    path.write_text(json.dumps(record))
    path.with_suffix('.safetensors').write_bytes(weights)
    try:
        network = load_model(read_card(path))
    except ModelError as error:
        one_line(error, tmp_path)
    else:
        assert all(bool(p.isfinite().all()) for p in network.parameters())


FLIPS = 200


@pytest.mark.tries(FLIPS)
@settings(FUZZING, max_examples=FLIPS)
@given(data=st.data())
def test_one_changed_bit_of_the_weights_is_noticed(tmp_path, model, data):
    from bids_jointseg.network import load_model

    content = bytearray(model.with_suffix('.safetensors').read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / 'x.json').write_text(model.read_text())
    (tmp_path / 'x.safetensors').write_bytes(content)
    with pytest.raises(ModelError, match='SHA-256 differs'):
        load_model(read_card(tmp_path / 'x.json'))


# --- what it is built on ------------------------------------------------------------------------


def test_installed_packages_fit_each_other():
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'check'], capture_output=True, text=True, check=False
    )
    if 'No module named pip' in done.stderr:
        pytest.skip('pip is not installed')
    assert done.returncode == 0, done.stdout
