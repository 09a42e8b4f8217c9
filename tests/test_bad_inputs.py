"""Bad inputs of many kinds, made by code: each has to end well.

*Well* is a right result (with a warning that names the file where something is questionable), or
one clear line that names the file and says what to do, with the documented exit code: never a
traceback on the terminal, never a silent wrong answer. A good scan beside a bad one is always
completed. ``docs/reliability.md`` has the table of what is tried here; the last test counts.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import pickle
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import pytest
from conftest import describe_dataset, draw_head, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bids_jointseg import bids, card, cli, image, quality, recipe
from bids_jointseg.bids import BidsError, Scan
from bids_jointseg.card import ModelCard, ModelError, read_card
from bids_jointseg.config import Settings, SettingsError
from bids_jointseg.image import Grid, ImageError, Volume
from bids_jointseg.labels import CLASSES, LABELS
from bids_jointseg.recipe import RecipeError, read_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SMALL = {'shape': (24, 28, 24), 'spacing_mm': (8.0, 8.0, 8.0)}
HEAD = draw_head('T1w', **SMALL)
DATA = np.asarray(HEAD.dataobj).astype(np.float32)
AFFINE = HEAD.affine
ROOT = os.geteuid() == 0

# --- the ledger ---------------------------------------------------------------------------------

LEDGER: dict[str, str] = {}
"""Kind of input -> 'right', 'wrong' or 'traceback'."""


@contextmanager
def tried(kind: str) -> Iterator[None]:
    """Note how a kind of input ends."""
    assert LEDGER.get(kind) is None, f'{kind} is tried twice'
    LEDGER[kind] = 'wrong'
    try:
        yield
    except (AssertionError, pytest.fail.Exception):
        raise
    except Exception:
        LEDGER[kind] = 'traceback'
        raise
    LEDGER[kind] = 'right'


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str


def jointseg(capfd: pytest.CaptureFixture[str], kind: str, *arguments: str | Path) -> Answer:
    """Run the command in this process."""
    capfd.readouterr()
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's way
        code = int(stop.code or 0)
    answer = Answer(code, *capfd.readouterr())
    if 'Traceback' in answer.out + answer.err or code == cli.Exit.INTERNAL:
        LEDGER[kind] = 'traceback'
        pytest.fail(f'{kind}: {answer}')
    return answer


def table(*kinds: tuple[str, Any, Any]) -> Any:
    """Parametrize a test with kinds of input: what it is, how to make it, what has to come."""
    return pytest.mark.parametrize(
        ('kind', 'make', 'says'), kinds, ids=[kind.replace(' ', '-') for kind, *_ in kinds]
    )


# --- images -------------------------------------------------------------------------------------


def scan(
    path: Path,
    data: np.ndarray = DATA,
    affine: np.ndarray | None = AFFINE,
    *,
    dtype: Any = np.float32,
    order: str = '<',
    make: type = nib.Nifti1Image,
    **fields: Any,
) -> Path:
    """Write a scan, then change some fields of its header as they lie on disk."""
    stored = data.astype(dtype)
    picture = make(stored, affine, make.header_class(endianness=order), dtype=stored.dtype)
    put(picture, path)
    return patch(path, order, **fields) if fields else path


def patch(path: Path, order: str = '<', **fields: Any) -> Path:
    opened = gzip.open if path.suffix == '.gz' else open
    with opened(path, 'rb') as stream:
        content = bytearray(stream.read())
    kind = nib.nifti1.header_dtype.newbyteorder(order)
    header = np.frombuffer(content, kind, count=1).copy()
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.tobytes()
    with opened(path, 'wb') as stream:
        stream.write(content)
    return path


def raw(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def cut(path: Path, keep: float) -> Path:
    return raw(path, path.read_bytes()[: int(path.stat().st_size * keep)])


def damaged(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(range(40))
    return raw(path, bytes(content))


def big(path: Path, size: int = 30_000) -> Path:
    """Write a header that promises terabytes."""
    path = scan(path, affine=np.diag([0.2, 0.2, 0.2, 1]))
    return patch(path, dim=[3, size, size, size, 1, 1, 1, 1])


def colour(path: Path, names: str) -> Path:
    kind = np.dtype([(name, 'u1') for name in names])
    return put(nib.Nifti1Image(np.zeros(DATA.shape, kind), AFFINE), path)


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


def other_format(path: Path, make: type) -> Path:
    nib.save(make(DATA, AFFINE), path)
    return path


def renamed(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


def noise(low: float = 0.0) -> np.ndarray:
    return low + np.abs(np.random.default_rng(1).normal(0, 10, DATA.shape)).astype(np.float32)


def matrix(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array([*rows, (0, 0, 0, 1)], float)


SHEARED = AFFINE + matrix((0, 0.9, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)) * [[1], [1], [1], [0]]
POINTER = b'/annex/objects/MD5E-s11430912--0123456789abcdef0123456789abcdef.nii.gz\n'
EXTENSION = b'\1\0\0\0' + b'\7\0\0\0' + b'\6\0\0\0' + bytes(8)
"""What follows a header that has extensions: one, which says that it is 7 bytes long."""
SCAN = 'a.nii.gz'


@table(
    ('a truncated gzip file', lambda d: cut(scan(d / SCAN), 0.5), 'truncated'),
    ('a truncated plain file', lambda d: cut(scan(d / 'a.nii'), 0.5), 'truncated'),
    ('a gzip file cut within its first bytes', lambda d: cut(scan(d / SCAN), 0.002), 'readable'),
    ('a damaged gzip file', lambda d: damaged(scan(d / SCAN)), 'damaged'),
    ('an empty .nii.gz', lambda d: raw(d / SCAN, b''), 'Empty file'),
    ('an empty .nii', lambda d: raw(d / 'a.nii', b''), 'Empty file'),
    ('a text called .nii.gz', lambda d: raw(d / SCAN, b'not a scan'), 'not a readable NIfTI'),
    ('a text called .nii', lambda d: raw(d / 'a.nii', b'not a scan' * 99), 'not a readable'),
    ('a text in gzip', lambda d: raw(d / SCAN, gzip.compress(b'no scan' * 99)), 'not a readable'),
    ('gzip in a .nii', lambda d: renamed(scan(d / SCAN), 'a.nii'), 'not a readable'),
    ('a plain NIfTI called .nii.gz', lambda d: renamed(scan(d / 'a.nii'), SCAN), 'not a readable'),
    ('another magic', lambda d: scan(d / 'a.nii', magic=b'n+9'), 'NIfTI'),
    ('zeros', lambda d: raw(d / 'a.nii', bytes(4000)), 'NIfTI'),
    ('only NaN', lambda d: scan(d / SCAN, DATA * np.nan), 'no voxel is a finite number'),
    ('only infinity', lambda d: scan(d / SCAN, DATA + np.inf), 'no voxel is a finite number'),
    ('a constant', lambda d: scan(d / SCAN, DATA * 0 + 7), 'every voxel is 7'),
    ('all zero', lambda d: scan(d / SCAN, DATA * 0), 'every voxel is 0'),
    ('nothing above zero', lambda d: scan(d / SCAN, -DATA), 'no intensity is above zero'),
    ('a slope that inverts', lambda d: scan(d / SCAN, scl_slope=-1), 'no intensity is above zero'),
    ('one dimension', lambda d: scan(d / SCAN, DATA[:, 3, 3]), '1 dimensions'),
    ('two dimensions', lambda d: scan(d / SCAN, DATA[..., 3]), '2 dimensions'),
    ('several volumes', lambda d: scan(d / SCAN, np.stack([DATA] * 2, -1)), '4 dimensions'),
    (
        'five dimensions with vectors',
        lambda d: scan(d / SCAN, np.stack([DATA] * 3, -1)[..., None, :]),
        '5 dimensions',
    ),
    ('a single slice', lambda d: scan(d / SCAN, DATA[..., :1]), 'do not cover a brain'),
    ('a slab', lambda d: scan(d / SCAN, DATA[..., :7]), 'do not cover a brain'),
    ('a small field of view', lambda d: scan(d / SCAN, affine=AFFINE / 4), 'do not cover a brain'),
    ('RGB', lambda d: colour(d / SCAN, 'RGB'), 'a colour'),
    ('RGBA', lambda d: colour(d / SCAN, 'RGBA'), 'a colour'),
    ('complex64', lambda d: scan(d / SCAN, dtype=np.complex64), 'an image of complex64'),
    ('complex128', lambda d: scan(d / SCAN, dtype=np.complex128), 'an image of complex128'),
    ('float128', lambda d: scan(d / 'a.nii', datatype=1536, bitpix=128), 'NIfTI|numbers'),
    ('one bit per voxel', lambda d: scan(d / 'a.nii', datatype=1, bitpix=1), 'NIfTI'),
    ('an unknown datatype', lambda d: scan(d / 'a.nii', datatype=9999), 'NIfTI'),
    ('huge voxels', lambda d: scan(d / SCAN, affine=AFFINE * 10), 'cannot be a scan of a head'),
    ('tiny voxels', lambda d: scan(d / SCAN, affine=AFFINE / 200), 'cannot be a scan of a head'),
    ('metres', lambda d: scan(d / SCAN, affine=AFFINE / 1e3, xyzt_units=1), 'are its units mm'),
    ('micrometres', lambda d: scan(d / SCAN, affine=AFFINE * 1e3, xyzt_units=3), 'are its units'),
    (
        'voxels of size zero',
        lambda d: scan(d / SCAN, sform_code=0, qform_code=1, pixdim=[1, 0, 0, 0, 0, 0, 0, 0]),
        'no size',
    ),
    ('a zero affine', lambda d: scan(d / SCAN, srow_x=0, srow_y=0, srow_z=0), 'affine'),
    ('a singular affine', lambda d: scan(d / SCAN, srow_x=[0, 8, 0, 9]), 'affine'),
    ('a NaN in the affine', lambda d: scan(d / SCAN, srow_x=np.nan), 'affine'),
    ('infinity in the affine', lambda d: scan(d / SCAN, srow_z=np.inf), 'affine'),
    ('terabytes promised by a .nii', lambda d: big(d / 'a.nii'), 'cannot be in a file of this'),
    ('terabytes promised by a .nii.gz', lambda d: big(d / SCAN), 'cannot be in a file of this'),
    ('a negative size', lambda d: scan(d / 'a.nii', dim=[3, -24, 28, 24, 1, 1, 1, 1]), 'do not'),
    ('no dimension', lambda d: scan(d / 'a.nii', dim=0), '1 dimensions'),
    ('nine dimensions', lambda d: scan(d / 'a.nii', dim=[9, 24, 28, 24, 1, 1, 1, 1]), 'NIfTI'),
    ('data far behind the end', lambda d: scan(d / 'a.nii', vox_offset=1e9), 'in a file of this'),
    ('data at NaN', lambda d: scan(d / 'a.nii', vox_offset=np.nan), 'NIfTI'),
    ('an intercept of NaN', lambda d: scan(d / 'a.nii', scl_slope=1, scl_inter=np.nan), 'NIfTI'),
    (
        'a header extension of a wrong size',
        lambda d: raw(
            d / 'a.nii',
            (lambda content: content[:348] + EXTENSION + content[352:])(
                scan(d / 'b.nii', vox_offset=352 + 16).read_bytes()
            ),
        ),
        'NIfTI',
    ),
    ('an ANALYZE pair', lambda d: other_format(d / 'a.img', nib.Spm2AnalyzeImage), 'convert'),
    ('MGZ', lambda d: other_format(d / 'a.mgz', nib.MGHImage), 'convert'),
    (
        'MGZ called .nii.gz',
        lambda d: renamed(other_format(d / 'a.mgz', nib.MGHImage), SCAN),
        'not a readable NIfTI',
    ),
    ('DICOM called .nii', lambda d: raw(d / 'a.nii', bytes(128) + b'DICM' + bytes(900)), 'NIfTI'),
    ('a folder called .nii.gz', lambda d: folder(d / SCAN), 'not a readable NIfTI'),
    ('a pipe called .nii.gz', lambda d: fifo(d / SCAN), 'not a readable'),
    ('no such file', lambda d: d / SCAN, 'no such file'),
    ('a link to nothing', lambda d: link(d / SCAN, 'away/MD5E-s3--abc.nii.gz'), 'datalad get'),
    ('a link to itself', lambda d: link(d / SCAN, SCAN), 'link'),
    ('a git-annex pointer', lambda d: raw(d / SCAN, POINTER), 'datalad get'),
)
def test_scans_that_are_refused(tmp_path, kind, make, says):
    with tried(kind):
        path = make(tmp_path)
        begun = time.monotonic()
        with pytest.raises(ImageError, match=says) as caught:
            image.load_scan(path)
        message = str(caught.value)
        assert message.startswith(f'{path}: ')
        assert '\n' not in message
        assert ': ' in message.removeprefix(f'{path}: ')  # what is wrong: what to do
        assert time.monotonic() - begun < 10


@pytest.mark.skipif(ROOT, reason='root may read everything')
def test_a_scan_without_permission(tmp_path):
    path = scan(tmp_path / SCAN)
    path.chmod(0)
    with pytest.raises(ImageError, match='permissions'):
        image.load_scan(path)


def extended(path: Path) -> Path:
    picture = nib.Nifti1Image(DATA, AFFINE)
    picture.header.extensions.append(nib.nifti1.Nifti1Extension('comment', b'\xff\xfe said'))
    return put(picture, path)


def some(value: float) -> np.ndarray:
    data = DATA.astype(np.float64)
    data[3, 4, 5:9] = value
    return data


@table(
    *((f'{kind} numbers', lambda d, kind=kind: scan(d / SCAN, DATA / 8, dtype=kind), '')
      for kind in ('int8', 'uint8', 'int16', 'uint16', 'int32', 'uint32', 'int64', 'uint64',
                   'float32', 'float64')),
    ('big endian', lambda d: scan(d / SCAN, dtype='>i2', order='>'), ''),
    ('NIfTI-2', lambda d: scan(d / SCAN, make=nib.Nifti2Image), ''),
    ('a NIfTI pair', lambda d: scan(d / 'a.hdr', make=nib.Nifti1Pair), ''),
    ('one volume in 4-D', lambda d: scan(d / SCAN, DATA[..., None]), '4 dimensions with one'),
    ('one volume in 5-D', lambda d: scan(d / SCAN, DATA[..., None, None]), '5 dimensions with'),
    ('some NaN', lambda d: scan(d / SCAN, some(np.nan)), '4 voxels are not finite'),
    ('some infinity', lambda d: scan(d / SCAN, some(-np.inf)), '4 voxels are not finite'),
    ('beyond float32', lambda d: scan(d / SCAN, some(1e300), dtype=float), '4 voxels are not fin'),
    ('a few spikes', lambda d: scan(d / SCAN, some(1e30)), '4 voxels .* dimmed'),
    ('values near the limit of float32', lambda d: scan(d / SCAN, DATA * 1e35), ''),
    ('tiny values', lambda d: scan(d / SCAN, DATA * 1e-35), ''),
    ('some negative values', lambda d: scan(d / SCAN, DATA - 200), ''),
    ('a slope of NaN', lambda d: scan(d / SCAN, scl_slope=np.nan, scl_inter=np.nan), ''),
    ('an infinite slope', lambda d: scan(d / SCAN, scl_slope=np.inf), ''),
    ('another header size', lambda d: scan(d / 'a.nii', sizeof_hdr=12345), 'was repaired'),
    ('negative voxel sizes', lambda d: scan(d / 'a.nii', pixdim=[1] + [-8] * 7), 'was repaired'),
    ('a slope of zero', lambda d: scan(d / SCAN, scl_slope=0, scl_inter=5), ''),
    ('slope and intercept', lambda d: scan(d / SCAN, scl_slope=0.01, scl_inter=3), ''),
    ('sheared axes', lambda d: scan(d / SCAN, affine=SHEARED), 'not orthogonal'),
    ('left-handed axes', lambda d: scan(d / SCAN, affine=AFFINE @ np.diag([-1, 1, 1, 1])), ''),
    ('permuted axes', lambda d: scan(d / SCAN, affine=AFFINE[:, [2, 0, 1, 3]]), ''),
    (
        'qform and sform that disagree',
        lambda d: scan(d / SCAN, qform_code=1, qoffset_x=50),
        'disagree by up to .*: the sform is used',
    ),
    ('no orientation', lambda d: scan(d / SCAN, sform_code=0, qform_code=0), 'no orientation'),
    ('a qform that is none', lambda d: scan(d / SCAN, qform_code=1, quatern_b=9), 'a rotation'),
    ('a qform alone', lambda d: scan(d / SCAN, sform_code=0, qform_code=1), ''),
    ('metres in the header, mm in the affine', lambda d: scan(d / SCAN, xyzt_units=1), ''),
    ('a header extension', lambda d: extended(d / SCAN), ''),
    ('a description that is no text', lambda d: scan(d / SCAN, descrip=b'\xff' * 80), ''),
    (
        'garbage after the data',
        lambda d: raw(d / 'a.nii', scan(d / 'a.nii').read_bytes() + b'more' * 99),
        '',
    ),
    (
        'two gzip members',
        lambda d: raw(
            d / SCAN,
            b''.join(
                gzip.compress(part)
                for part in (lambda c: (c[:9000], c[9000:]))(scan(d / 'b.nii').read_bytes())
            ),
        ),
        '',
    ),
    ('2048 voxels wide', lambda d: scan(
        d / SCAN, np.repeat(DATA[:, :12, :12], 86, axis=0)[:2048], np.diag([0.1, 8, 8, 1])
    ), ''),
)  # fmt: skip
def test_scans_that_are_read(tmp_path, kind, make, says, caplog):
    with tried(kind):
        path = make(tmp_path)
        with caplog.at_level(logging.WARNING, 'bids_jointseg'):
            volume = image.load_scan(path)
        messages = [record.getMessage() for record in caplog.records]
        assert all(message.startswith(f'{path}: ') for message in messages)
        assert len(messages) == bool(says)
        assert re.search(says, ' '.join(messages))
        check_volume(volume)
        if volume.data.shape == DATA.shape:  # not only finite: the same head
            keep = np.ones(DATA.shape, bool)
            keep[3, 4, 5:9] = False
            assert np.corrcoef(volume.data[keep], DATA[keep])[0, 1] > 0.99
        np.testing.assert_array_equal(image.load_grid(path).affine, volume.grid.affine)
        normal = image.normalise(volume.data)
        assert np.isfinite(normal).all()
        assert normal.std() > 0


def check_volume(volume: Volume) -> None:
    assert volume.data.dtype == np.float32
    assert volume.data.shape == volume.grid.shape
    assert np.isfinite(volume.data).all()
    assert np.isfinite(volume.grid.affine).all()
    assert abs(np.linalg.det(volume.grid.affine)) > 0
    assert volume.data.max() > max(0, volume.data.min())


# --- datasets -----------------------------------------------------------------------------------


def touch(root: Path, *names: str) -> Path:
    """Make empty files of a dataset."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def described(root: Path, text: str | None) -> Path:
    (root / 'dataset_description.json').unlink()
    if text is not None:
        (root / 'dataset_description.json').write_text(text)
    return root


def linked(root: Path, name: str, target: str) -> Path:
    path = touch(root, f'{name}.x').joinpath(name)
    path.with_name(f'{path.name}.x').unlink()
    path.symlink_to(target)
    return root


def rotated(root: Path) -> None:
    """Give a dataset two thousand sessions of one person, with T1w and FLAIR."""
    for number in range(1500):
        stem = f'sub-9/ses-{number:04d}/anat/sub-9_ses-{number:04d}'
        touch(root, f'{stem}_T1w.nii.gz', f'{stem}_FLAIR.nii.gz')


GOOD = r'(?m)^sub-good +sub-good_T1w\.nii\.gz'
ANAT = 'sub-x/anat'


@table(
    # It goes on, and the table of --dry-run says what is taken and what is left out.
    ('no dataset_description', lambda r: described(r, None), GOOD),
    ('an empty dataset_description', lambda r: described(r, ''), GOOD),
    ('a broken dataset_description', lambda r: described(r, '{"Name": '), GOOD),
    ('a dataset_description that is an object of nothing', lambda r: described(r, '{}'), GOOD),
    ('a dataset_description that is a list', lambda r: described(r, '[]'), GOOD),
    ('a participant without scans', lambda r: (r / 'sub-x').mkdir(), r'sub-x +no T1w and no'),
    ('a file called like a participant', lambda r: touch(r, 'sub-x'), GOOD),
    ('a file called anat', lambda r: touch(r, 'sub-x/anat'), r'sub-x +no T1w and no FLAIR'),
    ('a participant without a label', lambda r: touch(r, 'sub-/anat/sub-_T1w.nii.gz'), GOOD),
    ('a sidecar alone', lambda r: touch(r, f'{ANAT}/sub-x_T1w.json'), r'sub-x +no T1w and no'),
    ('a FLAIR alone', lambda r: touch(r, f'{ANAT}/sub-x_FLAIR.nii.gz'), r'sub-x +- +sub-x_FLAIR'),
    ('another suffix', lambda r: touch(r, f'{ANAT}/sub-x_T2w.nii.gz'), r'sub-x +no T1w and no'),
    ('a suffix in small letters', lambda r: touch(r, f'{ANAT}/sub-x_t1w.nii.gz'),
     r'sub-x_t1w\.nii\.gz +is no scan by its name'),
    ('a suffix without w', lambda r: touch(r, f'{ANAT}/sub-x_T1.nii.gz'),
     r'sub-x_T1\.nii\.gz +is no scan by its name'),
    ('an extension in capitals', lambda r: touch(r, f'{ANAT}/sub-x_T1w.NII.GZ'),
     r'sub-x_T1w\.NII\.GZ +is no scan by its name'),
    ('an extension in capitals beside a T1w',
     lambda r: touch(r, 'sub-good/anat/sub-good_FLAIR.NII'), r'good_FLAIR\.NII +is no scan'),
    ('MGZ in a dataset', lambda r: touch(r, f'{ANAT}/sub-x_T1w.mgz'), 'x_T1w.mgz +is no scan by'),
    ('an ANALYZE pair in a dataset', lambda r: touch(r, *(f'{ANAT}/sub-x_T1w.{e}' for e in
     ('hdr', 'img'))), r'(?s)sub-x_T1w\.hdr +is no scan.*sub-x_T1w\.img +is no scan'),
    ('no entities', lambda r: touch(r, f'{ANAT}/T1w.nii.gz'), r'T1w\.nii\.gz +is no scan by its'),
    ('the name of another participant', lambda r: touch(r, f'{ANAT}/sub-good_FLAIR.nii.gz'),
     r'(?s)^.*sub-good +sub-good_T1w\.nii\.gz +-.*sub-good_FLAIR\.nii\.gz +lies in sub-x, but'),
    ('the name of another session', lambda r: touch(r, 'sub-x/ses-1/anat/sub-x_ses-2_T1w.nii'),
     r'sub-x_ses-2_T1w\.nii +lies in ses-1, but'),
    ('a name without its session', lambda r: touch(r, 'sub-x/ses-1/anat/sub-x_T1w.nii'),
     r'sub-x_T1w\.nii +lies in ses-1, but'),
    ('entities in another order', lambda r: touch(r, f'{ANAT}/sub-x_run-1_acq-y_T1w.nii'),
     r'sub-x_run-1_acq-y +sub-x_run-1_acq-y_T1w'),
    ('a word that is no entity', lambda r: touch(r, f'{ANAT}/sub-x_defaced_T1w.nii'),
     'sub-x +sub-x_defaced_T1w'),
    ('two runs', lambda r: touch(r, *(f'{ANAT}/sub-x_run-{n}_T1w.nii' for n in (1, 2))),
     r'(?s)sub-x_run-1 .*sub-x_run-2 '),
    ('a phase image', lambda r: touch(r, f'{ANAT}/sub-x_part-phase_T1w.nii'), 'not a magnitude'),
    ('hidden files', lambda r: touch(r, 'sub-good/anat/._sub-good_T1w.nii.gz', '.git/sub-good/a'),
     GOOD),
    ('an unfinished copy', lambda r: touch(r, 'sub-good/anat/sub-good_T1w.nii.gz.part'), GOOD),
    ('a space in a label', lambda r: touch(r, 'sub-x y/anat/sub-x y_T1w.nii'), 'sub-x y_T1w.nii'),
    ('a label beyond ASCII', lambda r: touch(r, 'sub-Zoë/anat/sub-Zoë_T1w.nii'), 'sub-Zoë_T1w'),
    ('a link to nothing in a dataset', lambda r: linked(r, f'{ANAT}/sub-x_T1w.nii.gz', 'away'),
     r'sub-x +sub-x_T1w'),
    ('a folder that links back', lambda r: linked(r, 'sub-good/anat/loop', '..'), GOOD),
    ('a session that links back', lambda r: linked(r, 'sub-good/ses-1', '.'),
     'lies in ses-1, but its name'),
    ('a participant that links back', lambda r: linked(r, 'sub-x', '.'), r'sub-x +no T1w and no'),
    ('a scan that is a folder', lambda r: (touch(r, f'{ANAT}/y') / ANAT / 'sub-x_T1w.nii').mkdir(),
     r'sub-x_T1w\.nii +is a folder'),
    ('scans in deeper folders', lambda r: touch(r, f'{ANAT}/raw/sub-x_T1w.nii'), 'no T1w and no'),
    ('results of others in derivatives',
     lambda r: touch(r, 'derivatives/fs/sub-x/anat/sub-x_T1w.nii'), GOOD),
    ('thousands of sessions', rotated, r'sub-9_ses-1499 +sub-9_ses-1499_T1w'),
)  # fmt: skip
def test_datasets_that_are_planned(tmp_path, capfd, kind, make, says):
    with tried(kind):
        root = touch(describe_dataset(tmp_path / 'bids'), 'sub-good/anat/sub-good_T1w.nii.gz')
        make(root)
        begun = time.process_time()
        answer = jointseg(capfd, kind, root, tmp_path / 'out', 'participant', '--dry-run')
        assert time.process_time() - begun < 20
        assert answer.code == cli.Exit.DONE
        assert answer.err == ''
        assert re.search(GOOD, answer.out)
        assert re.search(says, answer.out)


def both(tmp: Path, *names: str) -> list[Path]:
    root = touch(describe_dataset(tmp / 'bids'), 'sub-good/anat/sub-good_T1w.nii.gz', *names)
    return [root, tmp / 'out']


def emptied(tmp: Path) -> list[Path]:
    (tmp / 'bids').mkdir()
    return [tmp / 'bids', tmp / 'out']


def results_of(tmp: Path, record: object) -> list[Path]:
    """Return a good dataset and an output folder with the description of something else."""
    command = both(tmp)
    bids.write_text(command[1] / 'dataset_description.json', json.dumps(record))
    return command


@table(
    ('no dataset', lambda d: [d / 'nowhere', d / 'out'], (2, 'nowhere is not a folder: give the')),
    ('a dataset that is a file', lambda d: [touch(d, 'file') / 'file', d / 'out'], (2, 'not a')),
    ('a name too long', lambda d: [d / ('a' * 5000), d / 'out'], (2, 'is not a folder')),
    ('an empty folder', emptied, (65, r'bids: no folder sub-\*: give the root')),
    ('a folder of no dataset', lambda d: [touch(d, 'bids/scan.nii.gz') / 'bids', d / 'out'],
     (65, r'no folder sub-\*')),
    ('no scans at all', lambda d: [touch(d, 'bids/sub-1/func/x') / 'bids', d / 'out'],
     (65, 'no T1w and no FLAIR that could be processed: see jointseg --dry-run')),
    ('a dataset_description that is a string',
     lambda d: [described(both(d)[0], '"x"'), d / 'out'], (2, 'check its dataset_description')),
    ('one scan as .nii and .nii.gz', lambda d: both(d, 'sub-good/anat/sub-good_T1w.nii'),
     (2, 'sub-good_T1w.nii and .* would give results of one name .*: leave one out')),
    ('two scans whose results share a name',
     lambda d: both(d, 'sub-good/anat/sub-good_desc-x_T1w.nii'),
     (2, 'would give results of one name .*: leave one out')),
    ('results over the input', lambda d: both(d)[:1] * 2, (2, 'is the input: give another')),
    ('results within the input', lambda d: [both(d)[0], d / 'bids/out'], (2, 'inside the input')),
    ('results within the input by a link',
     lambda d: [linked(both(d)[0].parent, 'link', 'bids') / 'bids', d / 'link/out'],
     (2, 'is inside the input')),
    ('results in a file', lambda d: [both(touch(d, 'file'))[0], d / 'file'], (2, 'be written')),
    ('results below a file', lambda d: [both(touch(d, 'file'))[0], d / 'file/x'], (2, 'written')),
    ('results of another pipeline',
     lambda d: results_of(d, {'GeneratedBy': [{'Name': 'fMRIPrep'}]}),
     (2, 'holds the results of fMRIPrep: give another folder')),
    ('work within the input', lambda d: [*both(d), '-w', d / 'bids/work'], (2, 'another -w')),
)  # fmt: skip
def test_datasets_that_are_refused(tmp_path, capfd, model, kind, make, says):
    with tried(kind):
        where = make(tmp_path)
        options = ['--model', model, '--skip-bids-validation', '-w', tmp_path / 'work']
        bids_dir, out, *more = where
        answer = jointseg(capfd, kind, bids_dir, out, 'participant', *options, *more)
        one_line(answer, *says)


def one_line(answer: Answer, code: int, says: str) -> None:
    assert (answer.code, answer.out) == (code, '')
    assert answer.err.startswith('jointseg: ')
    assert answer.err.count('\n') == 1
    assert re.search(says, answer.err)


@table(
    *((f'an earlier dataset_description of {text}', text, '') for text in
      ('', '[]', '{"GeneratedBy": 3}', '{"GeneratedBy": ["x"]}', 'null')),
)  # fmt: skip
def test_a_damaged_description_of_the_results_is_replaced(tmp_path, model, kind, make, says):
    with tried(kind):
        bids_dir, out = both(tmp_path)
        path = bids.write_text(out / 'dataset_description.json', make)
        bids.create_dataset(Settings(bids_dir, out), read_card(model))
        assert json.loads(path.read_text())['GeneratedBy'][0]['Name'] == bids.NAME


def test_damaged_results_are_not_complete(tmp_path):
    unit = Scan('x', None, Path('sub-x_T1w.nii'), None, 'sub-x')
    for suffix in bids.expected(unit, 'minimal'):
        bids.write_text(bids.derivative(tmp_path, unit, suffix), '')
    summary = bids.derivative(tmp_path, unit, 'seg-jointseg_morph.json')
    for number, text in enumerate(('', '[]', '{', '{"configuration": [3]}', '\x00')):
        with tried(f'an earlier summary of {number}'):
            summary.write_text(text)
            assert not bids.is_complete(tmp_path, unit, 'minimal', {'level': 'minimal'})


@table(
    ('an earlier summary that is broken', 'seg-jointseg_morph.json', b'{'),
    ('an earlier summary that is a list', 'seg-jointseg_morph.json', b'[]'),
    ('an earlier table of something else', 'seg-jointseg_morph.tsv', b'a\tb\n1\t2\n'),
    ('an earlier table that is no text', 'seg-jointseg_morph.tsv', b'\xff\xfe\x00'),
    ('an earlier list of lesions that is no text', 'desc-lesions_morph.tsv', b'\xff\xfe\x00'),
    ('an earlier list of lesions of something else', 'desc-lesions_morph.tsv', b'a\n\x00\n'),
)
def test_a_damaged_table_is_named_by_the_group(tmp_path, capfd, caplog, kind, make, says):
    with tried(kind):
        (tmp_path / 'bids').mkdir()
        for label in ('good', 'x'):
            unit = Scan(label, None, tmp_path / 'bids' / 'T1w.nii', None, f'sub-{label}')
            known = dict.fromkeys((*CLASSES[1:], 'brain'), None)
            bids.write_tables(
                tmp_path / 'out', unit, tmp_path / 'bids', flags=[], lesions=[], configuration={},
                quality={}, volumes=dict.fromkeys(CLASSES[1:], 1.0), intervals=known,
            )  # fmt: skip
        path = raw(bids.derivative(tmp_path / 'out', unit, make), says)
        answer = jointseg(capfd, kind, tmp_path / 'bids', tmp_path / 'out', 'group')
        assert answer.code == cli.Exit.DONE
        rows = (tmp_path / 'out' / 'group_volumes.tsv').read_text().splitlines()[1:]
        assert rows[0].startswith('sub-good')
        if 'of lesions of something else' not in kind:
            assert f'{path.with_suffix(".tsv")}: left out' in caplog.text
            assert 'run its participant again' in caplog.text
            assert len(rows) == 1 + ('lesions' in make)


# --- command lines ------------------------------------------------------------------------------


@table(
    ('an unknown option', ['--nonsense'], (2, 'unrecognized arguments: --nonsense')),
    ('an abbreviated option', ['--particip', 'good'], (2, 'unrecognized arguments')),
    ('an option without its value', ['--nprocs'], (2, 'expected one argument')),
    ('a number that is none', ['--nprocs', 'two'], (2, "invalid int value: 'two'")),
    ('no processors', ['--nprocs', '0'], (2, 'nprocs is 0: give a number above zero')),
    ('negative threads', ['--omp-nthreads', '-3'], (2, 'omp_nthreads is -3')),
    ('half a processor', ['--nprocs', '1.5'], (2, 'invalid int value')),
    ('memory that is no amount', ['--mem', 'much'], (2, 'not an amount of memory')),
    ('memory of NaN', ['--mem', 'nan'], (2, 'not an amount of memory')),
    ('no memory', ['--mem', '0'], (2, 'mem is 0')),
    ('a negative seed', ['--random-seed', '-1'], (2, 'random_seed is -1: give a number from 0')),
    ('a huge seed', ['--random-seed', '9' * 30], (2, 'random_seed is 9')),
    ('an unknown level', ['--level', 'most'], (2, 'invalid choice')),
    ('an unknown device', ['--device', 'tpu'], (2, "device is 'tpu': choose auto")),
    ('a GPU without a number', ['--device', 'cuda:x'], (2, "device is 'cuda:x'")),
    ('a GPU that is not there', ['--device', 'cuda:99'], (2, 'PyTorch sees . GPUs here: choose')),
    ('an unknown space', ['--output-spaces', 'MNI'], (2, 'has no template MNI')),
    ('an unknown modality', ['--ignore', 't2w'], (2, "ignore is 't2w': choose from flair")),
    ('an unknown participant', ['--participant-label', '99'], (2, 'no participant 99')),
    ('a participant with a path', ['--participant-label', '../../etc'], (2, 'no participant ../')),
    ('a participant without letters', ['--participant-label', ''], (2, 'no participant')),
    ('a participant that is a pattern', ['--participant-label', 'go*'], (2, r'no participant go')),
    ('an unknown session', ['--session-label', '7'], (65, 'no T1w and no FLAIR')),
    ('a session with a path', ['--session-label', '../..'], (65, 'no T1w and no FLAIR')),
    ('derivatives without a name', ['--derivatives', '/x'], (2, 'write NAME=PATH')),
    ('derivatives without a path', ['--derivatives', 'x='], (2, 'write NAME=PATH')),
    ('derivatives that are not there', ['--derivatives', 'x=/nowhere'], (2, 'no such folder')),
    ('an unknown model', ['--model', 'nonsense'], (2, "'nonsense' is not in the package")),
    ('a model without a name', ['--model', ''], (2, 'is not in the package')),
    ('a model called /', ['--model', '/'], (2, 'is not in the package')),
    ('a model with a long name', ['--model', 'x' * 999], (2, 'is not in the package')),
    ('a model that segments nothing', ['--model', 'locator'], (2, 'only tells where to look')),
    ('a model that is not there', ['--model', '/nowhere/x.json'], (2, '/nowhere/x.json: cannot')),
    ('no configuration file', ['--config-file', '/nowhere.toml'], (2, '/nowhere.toml: cannot be')),
    ('a folder as configuration', ['--config-file', '/'], (2, '/: cannot be read')),
    ('no filter file', ['--bids-filter-file', '/nowhere.json'], (2, '/nowhere.json: cannot read')),
    ('no plugin file', ['--use-plugin', '/nowhere.yml'], (2, '/nowhere.yml: cannot be read')),
    ('work in a file', ['-w', __file__], (2, 'cannot be written')),
    ('work below /proc', ['-w', '/proc/x'], (2, '/proc/x cannot be written')),
    ('an index in a file', ['--bids-database-dir', __file__], (2, 'cannot be indexed')),
)
def test_command_lines(tmp_path, capfd, model, kind, make, says):
    with tried(kind):
        options = ['--model', model, '--skip-bids-validation', '-w', tmp_path / 'work']
        answer = jointseg(capfd, kind, *both(tmp_path), 'participant', *options, *make)
        one_line(answer, *says)


# --- files that configure -----------------------------------------------------------------------


DEEP = b'[' * 5000


@table(
    ('a configuration that is no TOML', b'=', 'not TOML'),
    ('a configuration that is no text', b'\xff\xfe\x00', "c.x: 'utf-8' codec"),
    ('a configuration too deep', b'x = ' + DEEP, 'not TOML'),
    ('an unknown setting', b'speed = 3', 'no such setting: speed'),
    ('a table as configuration', b'[jointseg]\nnprocs = 1', 'no such setting: jointseg'),
    ('a word for a number', b'nprocs = "two"', "nprocs is 'two': not a int"),
    ('yes for a number', b'nprocs = true', 'nprocs is True: not a int'),
    ('memory of NaN in a configuration', b'mem = nan', 'mem is nan'),
    ('endless memory', b'mem = inf', 'mem is inf'),
    ('a number for a path', b'work_dir = 3', 'work_dir is 3'),
    ('a path with a NUL', b'bids_filter_file = "a\\u0000b"', 'bids_filter_file is'),
    ('a word for a list', b'ignore = "flair"', "ignore is 'flair'"),
    ('a list of numbers', b'participant_label = [1]', 'participant_label is 1'),
    ('a list for a table', b'derivatives = [["a", "b"]]', 'derivatives is'),
    ('a date for a seed', b'random_seed = 2024-01-01', 'random_seed is'),
)
def test_configurations(tmp_path, capfd, model, kind, make, says):
    with tried(kind):
        config = raw(tmp_path / 'c.x', make)
        command = [*both(tmp_path), 'participant', '--dry-run', '--config-file', config]
        answer = jointseg(capfd, kind, *command)
        one_line(answer, 2, f'c.x: .*{says}' if 'c.x' not in says else says)


@table(
    ('filters that are no JSON', b'{', 'not filters in JSON'),
    ('filters that are no text', b'\xff\xfe\x00', 'not filters in JSON'),
    ('filters too deep', DEEP, 'not filters in JSON'),
    ('a list of filters', b'[]', 'not filters in JSON'),
    ('a number as filters', b'{"t1w": 3}', 'not filters in JSON'),
    ('an unknown entity', b'{"t1w": {"nonsense": "1"}}', "'nonsense' is not a recognized entity"),
    ('an option of pybids', b'{"t1w": {"return_type": "id"}}', '--bids-filter-file: t1w'),
    ('an object for a value', b'{"t1w": {"session": {"a": 1}}}', 'give a word, a number'),
    ('a huge number for a value', b'{"t1w": {"run": 1e999}}', None),
    ('a list of lists for a value', b'{"t1w": {"run": [[1]]}}', 'give a word, a number'),
    ('filters that leave nothing', b'{"t1w": {"session": "9"}}', None),
)
def test_filters(tmp_path, capfd, kind, make, says):
    with tried(kind):
        filters = raw(tmp_path / 'f.json', make)
        command = [*both(tmp_path), 'participant', '--dry-run', '--bids-filter-file', filters]
        answer = jointseg(capfd, kind, *command)
        if says is None:
            one_line(answer, 65, 'no T1w and no FLAIR')
        else:
            one_line(answer, 2, f'(f.json|--bids-filter-file): .*{says.split("file: ")[-1]}')


@table(
    ('a plugin file that is no YAML', 'plugin: [', 'not a plugin file'),
    ('a plugin file that is no text', b'\xff\xfe\x00\xff', 'not a plugin file'),
    ('a plugin file without a plugin', 'n_procs: 3', 'not a plugin file'),
    ('an empty plugin file', '', 'not a plugin file'),
    ('an unknown plugin', 'plugin: Nonsense', "Nipype has no plugin 'Nonsense'"),
    ('arguments that are no table', 'plugin: Linear\nplugin_args: 3', 'not a plugin file'),
    ('processes that are no number', 'plugin: MultiProc\nplugin_args: {n_procs: x}', "is 'x'"),
    ('no processes', 'plugin: MultiProc\nplugin_args: {n_procs: 0}', 'n_procs is 0'),
)
def test_plugin_files(tmp_path, capfd, model, kind, make, says):
    with tried(kind):
        plugin = raw(tmp_path / 'p.yml', make if isinstance(make, bytes) else make.encode())
        command = [*both(tmp_path), 'participant', '--use-plugin', plugin, '--model', model]
        answer = jointseg(capfd, kind, *command, '-w', tmp_path / 'work')
        one_line(answer, 2, f'p.yml: .*{says}')


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """Save an untrained network in a folder of its own, and return its card."""
    from bids_jointseg.network import build, save_model

    architecture = {'name': 'unet', 'channels': [2, 4]}
    made = ModelCard('tiny', '0', architecture, in_plane_mm=8.0, slice_mm=(8.0, 8.0))
    return save_model(build(architecture), made, tmp_path_factory.mktemp('tiny'))


def altered(made: ModelCard, folder: Path, **changes: Any) -> Path:
    """Copy a model, with some entries of its card changed; None leaves one out."""
    record = json.loads(made.path.read_text()) | changes
    record = {key: value for key, value in record.items() if value is not Ellipsis}
    shutil.copy(made.weights, folder / 'tiny.safetensors')
    return bids.write_text(folder / 'tiny.json', json.dumps(record))


@table(
    ('a card that is no JSON', b'{', 'the model card is not JSON'),
    ('a card that is no text', b'\xff\xfe\x00', 'the model card is not JSON'),
    ('a card too deep', DEEP, 'the model card is not JSON'),
    ('a card that is null', b'null', 'not a JSON object'),
    ('a card that is a list', b'[]', 'not a JSON object'),
    ('an empty card', b'{}', 'missing 3 required'),
    ('a card without a name', {'name': ...}, "'name'"),
    ('a card without an architecture', {'architecture': ...}, "'architecture'"),
    ('a card of a newer version', {'surprise': 1}, 'unknown entries'),
    ('a number for a name', {'name': 3}, 'name is 3'),
    ('a list for an architecture', {'architecture': ['unet']}, 'architecture is'),
    ('an unknown modality of a card', {'modalities': ['T1w', 'T2w']}, 'modalities are'),
    ('no modality', {'modalities': []}, 'modalities are'),
    ('a word for modalities', {'modalities': 'T1w'}, 'modalities is'),
    ('other classes', {'classes': ['BG', 'WM']}, 'classes are'),
    ('a grid of words', {'in_plane_mm': 'fine'}, 'in_plane_mm is'),
    ('a grid of NaN', {'in_plane_mm': math.nan}, 'positive size'),
    ('an endless grid', {'in_plane_mm': math.inf}, 'positive size'),
    ('one slice distance', {'slice_mm': [1.0]}, 'give 2 of them'),
    ('slice distances that fall', {'slice_mm': [3.0, 1.0]}, 'positive size'),
    ('a window without depth', {'window': [8, 8, 0]}, 'not three sizes'),
    ('a window of two sizes', {'window': [8, 8]}, 'give 3 of them'),
    ('a window of fractions', {'window': [8, 8, 1.5]}, 'window is 1.5'),
    ('a bias of another modality', {'bias': {'T2w': {'L': 1}}}, 'give modalities of the model'),
    ('a bias out of order', {'bias': {'FLAIR+T1w': {'L': 1}}}, 'give modalities of the model'),
    ('a bias of an unknown class', {'bias': {'T1w': {'CSF': 1}}}, 'for each of its classes'),
    ('a bias of NaN', {'bias': {'T1w': {'L': math.nan}}}, 'not a finite number'),
    ('a temperature of zero', {'temperature': 0}, 'temperature is 0'),
    ('a temperature of NaN', {'temperature': math.nan}, 'temperature is nan'),
    ('landmarks that fall', {'landmarks': {'T1w': [*range(10), 0]}}, 'rising numbers'),
    ('too few landmarks', {'landmarks': {'T1w': [1, 2]}}, 'rising numbers'),
    ('landmarks of words', {'landmarks': {'T1w': ['a'] * 11}}, 'landmarks is'),
    ('a SHA-256 of another file', {'sha256': '0' * 64}, 'SHA-256 differs'),
    ('a card without a SHA-256', {'sha256': ...}, 'SHA-256 differs'),
)
def test_cards(tmp_path, capfd, tiny, kind, make, says):
    with tried(kind):
        if isinstance(make, bytes):
            path = raw(altered(tiny, tmp_path), make)
        else:
            path = altered(tiny, tmp_path, **make)
        command = [*both(tmp_path), 'participant', '--model', path, '--skip-bids-validation']
        answer = jointseg(capfd, kind, *command, '-w', tmp_path / 'work')
        one_line(answer, 2, rf'tiny\.(json|safetensors): .*{says}')


class Trap:
    """What a pickle does when it is opened."""

    opened = False

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return setattr_trap, ('opened',)


def setattr_trap(_: str) -> None:
    Trap.opened = True


def with_nan(content: bytes) -> bytes:
    from safetensors.torch import load, save

    tensors = load(content)
    next(iter(tensors.values())).view(-1)[0] = math.nan
    return save(tensors)


@table(
    ('truncated weights', lambda c: (c[:99], {}), 'do not fit the card'),
    ('empty weights', lambda c: (b'', {}), 'do not fit the card'),
    ('a pickle for weights', lambda c: (pickle.dumps(Trap()), {}), 'do not fit the card'),
    ('weights that promise terabytes', lambda c: (b'\xff' * 7 + b'\0' + c[8:], {}), 'do not fit'),
    ('weights with NaN', lambda c: (with_nan(c), {}), 'not finite numbers'),
    ('another architecture', lambda c: (c, {'architecture': {'name': 'vgg'}}), "'vgg' is not one"),
    ('other channels', lambda c: (c, {'architecture': {'name': 'unet', 'channels': [4, 8]}}),
     'do not fit the card'),
    ('huge channels', lambda c: (c, {'architecture': {'name': 'unet', 'channels': [10**5] * 9}}),
     'do not fit the card'),
    ('negative channels', lambda c: (c, {'architecture': {'name': 'unet', 'channels': [-1, 2]}}),
     "architecture 'unet'"),
    ('no channels', lambda c: (c, {'architecture': {'name': 'unet', 'channels': []}}),
     "architecture 'unet'"),
    ('channels in words', lambda c: (c, {'architecture': {'name': 'unet', 'channels': 'many'}}),
     "architecture 'unet'"),
    ('unknown arguments', lambda c: (c, {'architecture': {'name': 'unet', 'depth': 3}}), 'depth'),
    ('an architecture that is a list', lambda c: (c, {'architecture': {'name': [3]}}), 'one of'),
    ('fewer branches than weights', lambda c: (c, {'modalities': ['T1w']}), 'do not fit the card'),
)  # fmt: skip
def test_weights(tmp_path, tiny, kind, make, says):
    """What is found where the network is built, in a worker: each scan has a row that says so."""
    import hashlib

    from bids_jointseg.network import load_model

    with tried(kind):
        content, changes = make(tiny.weights.read_bytes())
        digest = hashlib.sha256(content).hexdigest()
        path = altered(tiny, tmp_path, **changes, sha256=digest)
        raw(path.with_suffix('.safetensors'), content)
        with pytest.raises(ModelError, match=rf'tiny\.(json|safetensors): .*{says}') as caught:
            load_model(read_card(path))
        assert '\n' not in str(caught.value)
        assert not Trap.opened


def test_weights_that_are_missing(tmp_path, capfd, tiny):
    kind = 'no weights beside the card'
    with tried(kind):
        path = altered(tiny, tmp_path)
        path.with_suffix('.safetensors').unlink()
        command = [*both(tmp_path), 'participant', '--model', path, '-w', tmp_path / 'work']
        one_line(jointseg(capfd, kind, *command), 2, r'tiny\.safetensors: cannot read the weights')


def test_a_card_cannot_point_elsewhere(tmp_path, tiny):
    with tried('a card that names weights elsewhere'):
        path = altered(tiny, tmp_path, path='/etc/passwd', name='../../../etc/passwd')
        assert read_card(path).weights == path.with_suffix('.safetensors')


def test_as_many_landmarks_as_percentiles():
    assert len(image.PERCENTILES) == card.LANDMARKS


ITK = (
    '#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n'
    'Parameters: {}\nFixedParameters: 0 0 0\n'
)


@table(
    ('an empty transform', '', 'not an ITK affine'),
    ('a transform of words', ITK.format('a ' * 12), 'not an ITK affine'),
    ('a transform with too few numbers', ITK.format('1 0 0'), 'not an ITK affine'),
    ('a transform of NaN', ITK.format('nan ' * 12), 'cannot be inverted'),
    ('a singular transform', ITK.format('0 ' * 12), 'cannot be inverted'),
    ('a deformation', ITK.replace('Affine', 'BSpline').format('1 ' * 12), 'not an ITK affine'),
    ('a transform that is no text', b'\xff\xfe\x00', 'not an ITK affine'),
)
def test_transforms(tmp_path, kind, make, says):
    with tried(kind):
        path = raw(tmp_path / 'x.txt', make if isinstance(make, bytes) else make.encode())
        with pytest.raises(ImageError, match=rf'x\.txt: .*{says}') as caught:
            image.load_itk(path)
        assert '\n' not in str(caught.value)


RECIPE = """
name = 'a'
version = '0'
licence = 'none'
architecture = {name = 'unet'}
"""
DATASET = """
[[datasets]]
name = 'a'
modalities = ['T1w']
annotation = '.'
protocol = 'freesurfer'
"""
RECIPE += DATASET


@table(
    ('a recipe that is no TOML', b'=', 'not TOML'),
    ('a recipe that is no text', b'\xff\xfe\x00', 'not TOML'),
    ('a recipe too deep', b'x = ' + DEEP, 'not TOML'),
    ('an empty recipe', b'', 'a recipe has to say name'),
    ('an unknown entry of a recipe', b'speed = 3', 'unknown: speed'),
    ('a single dataset', b'[datasets]\nname = "a"', 'write each dataset as'),
    ('datasets that are numbers', b'datasets = [3]', 'of the wrong kind'),
    ('training that is a number', b'training = 3' + RECIPE.encode(), 'write it as a table'),
    ('an unknown protocol', RECIPE.replace('freesurfer', 'nonsense').encode(), 'nonsense'),
    ('a protocol that is not there', RECIPE.replace('freesurfer', 'p.tsv').encode(), 'p.tsv'),
    ('an unknown modality of a recipe', RECIPE.replace('T1w', 'PDw').encode(), 'PDw'),
    ('fractions that are not one', b'fractions = [1.0, 1.0, 1.0]' + RECIPE.encode(), 'together 1'),
    ('fractions in words', b'fractions = ["a", "b", "c"]' + RECIPE.encode(), 'wrong kind'),
    ('no folds', b'folds = 0' + RECIPE.encode(), 'folds is 0'),
    ('folds in words', b'folds = "two"' + RECIPE.encode(), 'of the wrong kind'),
    ('two datasets of one name', f'{RECIPE}{DATASET}'.encode(), 'two datasets are called a'),
)
def test_recipes(tmp_path, kind, make, says):
    with tried(kind):
        path = raw(tmp_path / 'r.toml', make)
        with pytest.raises(RecipeError, match=rf'r\.toml: .*{says}') as caught:
            read_recipe(path)
        assert '\n' not in str(caught.value)


# --- the app ------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def bright(tmp_path_factory):
    """Return the card of a network that calls white matter what is bright, and the rest air."""
    import torch

    from bids_jointseg.network import InstanceNorm, build, save_model

    architecture = {'name': 'unet', 'channels': [1]}
    network = build(architecture)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv3d):
                layer.weight.zero_()
                layer.weight[:, :, layer.kernel_size[0] // 2, layer.kernel_size[1] // 2,
                             layer.kernel_size[2] // 2] = 1  # fmt: skip
            elif isinstance(layer, InstanceNorm):
                assert layer.weight.item() == 1
        network.head.weight.zero_()
        network.head.bias.zero_()
        channel = CLASSES.index('WM')
        network.head.weight[channel], network.head.bias[channel] = 20, -10
        network.head.bias[0] = 5
    made = ModelCard('bright', '0', architecture, in_plane_mm=8.0, slice_mm=(8.0, 8.0))
    return save_model(network, made, tmp_path_factory.mktemp('bright'))


def shell() -> np.ndarray:
    """Return a head of which only the scalp is left."""
    points = np.argwhere(np.ones(DATA.shape)) @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    inside = np.linalg.norm(points / (74, 88, 78), axis=1) < 1
    return np.where(inside.reshape(DATA.shape), noise(), DATA)


def uniform() -> np.ndarray:
    head = 3000 * DATA / DATA.max()
    return np.where(head > 300, head, np.random.default_rng(1).uniform(0, 4095, DATA.shape))


def half() -> np.ndarray:
    return np.ascontiguousarray(DATA[..., :14])


APP = {
    # What a participant has -> how to make it below its folder, and its row in the table.
    'a truncated scan in the app': (lambda f: cut(scan(f('T1w')), 0.5), 'check +.*truncated'),
    'NaN alone in the app': (lambda f: scan(f('T1w'), DATA * np.nan), 'check .*no voxel is a'),
    'several volumes in the app': (
        lambda f: scan(f('T1w'), np.stack([DATA] * 2, -1)),
        'check .*4 dimensions',
    ),
    'a pipe in the app': (lambda f: fifo(f('T1w')), 'check .*not a readable NIfTI'),
    'terabytes promised in the app': (lambda f: big(f('T1w')), 'check .*cannot be in a file of'),
    'a git-annex pointer in the app': (lambda f: raw(f('T1w'), POINTER), 'check .*datalad get'),
    'a link to nothing in the app': (lambda f: link(f('T1w'), 'away'), 'check .*datalad get'),
    'the T1w copied as FLAIR': (
        lambda f: shutil.copy(scan(f('T1w')), f('FLAIR')),
        'check .*a copy of the T1w: replace it',
    ),
    'a FLAIR that is a text beside a good T1w': (
        lambda f: (scan(f('T1w')), raw(f('FLAIR'), b'x')),
        'check .*FLAIR.nii.gz: not a readable NIfTI',
    ),
    'a FLAIR of noise': (
        lambda f: (scan(f('T1w')), scan(f('FLAIR'), noise(50))),
        'register .*cannot be aligned|register .*overlap',
    ),
    'a transform that is singular': (
        lambda f: (
            scan(f('T1w')),
            put(draw_head('FLAIR', **SMALL), f('FLAIR')),
            bids.write_text(
                f('').parents[3]
                / f'pre/{f("").parents[1].name}/anat'
                / f'{f("").parents[1].name}_from-FLAIR_to-T1w_mode-image_xfm.txt',
                ITK.format('0 ' * 12),
            ),
        ),
        'register .*_xfm.txt: not an ITK affine',
    ),
    'the name of another participant in the app': (
        lambda f: scan(f('').parent / 'sub-good_FLAIR.nii.gz'),
        'sub-good_FLAIR.nii.gz +plan +lies in',
    ),
    'an extension in capitals in the app': (
        lambda f: renamed(scan(f('T1w')), f('T1w').name.replace('nii', 'NII')),
        'T1w.NII.gz +plan +is no scan by its name',
    ),
    'a participant without scans in the app': (lambda f: None, 'plan +no T1w and no FLAIR'),
}
FLAGGED = {
    # What a participant has -> how to make it, and what has to be among the flags of its results.
    'a good scan': (lambda f: scan(f('T1w')), r'no FLAIR'),
    'all air': (lambda f: scan(f('T1w'), noise()), 'brain volume|reaches the edge'),
    'the scalp alone': (lambda f: scan(f('T1w'), shell()), 'brain volume|reaches the edge'),
    'a uniform image': (lambda f: scan(f('UNIT1'), uniform()), 'the air is noise as bright'),
    'half a head': (lambda f: scan(f('T1w'), half()), 'the brain reaches the edge'),
    'a few spikes in the app': (lambda f: scan(f('T1w'), some(1e30)), r'T1w.nii.gz: 4 voxels'),
    'values near the limit in the app': (lambda f: scan(f('T1w'), DATA * 1e35), 'no FLAIR'),
    'sheared axes in the app': (lambda f: scan(f('T1w'), affine=SHEARED), 'not orthogonal'),
    'a FLAIR alone in the app': (
        lambda f: put(draw_head('FLAIR', **SMALL), f('FLAIR')),
        '',
    ),
}


def test_bad_scans_in_one_dataset(tmp_path, capfd, bright):
    """Each is in the table or has its flag, and the good ones have the labels of the good."""
    root = describe_dataset(tmp_path / 'a dataset of Zoë' / 'bids')
    labels = {kind: f'b{number}' for number, kind in enumerate(APP)}
    labels |= {kind: f'f{number}' for number, kind in enumerate(FLAGGED)}
    labels['a good scan'] = 'good'

    def put_in(kind: str, make: Callable) -> None:
        name = f'sub-{labels[kind]}'
        (root / name / 'anat').mkdir(parents=True)
        make(lambda suffix: root / name / 'anat' / f'{name}_{suffix}.nii.gz')

    for kind, (make, _) in (APP | FLAGGED).items():
        put_in(kind, make)
    plugin = raw(tmp_path / 'plugin.yml', b'plugin: Linear\n')
    out = tmp_path / 'out'
    command = [root, out, 'participant', '--model', bright.path, '-w', tmp_path / 'work']
    command += ['--level', 'minimal', '--use-plugin', plugin, '--skip-bids-validation']
    command += ['--derivatives', f'pre={root.parent / "pre"}']
    kind = 'a dataset of good and bad scans'
    with tried(kind):
        answer = jointseg(capfd, kind, *command)
        assert answer.code == cli.Exit.SCANS_FAILED
    head, *rows, details = answer.out.splitlines()
    assert head.split() == ['failed', 'at', 'why']
    assert details.startswith('details: ')
    for kind, (_, says) in APP.items():
        with tried(kind):
            own = [row for row in rows if re.search(rf'sub-{labels[kind]}(?!\d)', row)]
            assert any(re.search(says, row) for row in own), own
            assert not list((out / f'sub-{labels[kind]}').glob('anat/*'))
    good = nib.load(out / 'sub-good' / 'anat' / 'sub-good_seg-jointseg_dseg.nii.gz')
    expected = np.asarray(good.dataobj)
    assert expected.any()
    for kind, (_, says) in FLAGGED.items():
        with tried(kind):
            name = f'sub-{labels[kind]}'
            assert not [row for row in rows if row.startswith(f'{name} ')]
            summary = out / name / 'anat' / f'{name}_seg-jointseg_morph.json'
            flags = json.loads(summary.read_text())['flags']
            assert any(re.search(says, flag) for flag in [*flags, '']), flags
            assert (out / f'{name}.html').exists()
            found = np.asarray(
                nib.load(out / name / 'anat' / f'{name}_seg-jointseg_dseg.nii.gz').dataobj
            )
            if re.search('good|spikes|limit', kind):
                assert (found.reshape(expected.shape) == expected).mean() > 0.999


def test_weights_that_do_not_fit_are_told_for_each_scan(tmp_path, capfd, tiny):
    kind = 'a model whose weights do not fit'
    with tried(kind):
        root = describe_dataset(tmp_path / 'bids')
        (root / 'sub-x' / 'anat').mkdir(parents=True)
        scan(root / 'sub-x' / 'anat' / 'sub-x_T1w.nii.gz')
        path = altered(tiny, tmp_path, architecture={'name': 'unet', 'channels': [3, 4]})
        plugin = raw(tmp_path / 'plugin.yml', b'plugin: Linear\n')
        command = [root, tmp_path / 'out', 'participant', '--model', path, '--use-plugin', plugin]
        command += ['--skip-bids-validation', '-w', tmp_path / 'work']
        answer = jointseg(capfd, kind, *command)
        assert answer.code == cli.Exit.SCANS_FAILED
        row = answer.out.splitlines()[1]
        assert re.search(r'^sub-x +segment +.*tiny\.safetensors: the weights do not fit', row)


def drawn_labels() -> np.ndarray:
    index = {label.abbreviation: label.index for label in LABELS}
    labels = np.zeros(DATA.shape, np.uint8)
    labels[(DATA > 550) & (DATA < 700)] = index['CGM']
    labels[DATA > 750] = index['WM']
    return labels


@pytest.mark.parametrize(
    ('kind', 'suffix', 'drawn', 'says'),
    [
        ('a T1w called FLAIR', 'FLAIR', 'T1w', ['the FLAIR does not look like one']),
        ('a FLAIR called T1w', 'T1w', 'FLAIR', ['the T1w does not look like one']),
        ('a T1w called T1w', 'T1w', 'T1w', []),
        ('a FLAIR called FLAIR', 'FLAIR', 'FLAIR', []),
    ],
)
def test_a_scan_of_another_contrast_is_flagged(kind, suffix, drawn, says):
    """As that of another person, which registration cannot tell from the same one's."""
    with tried(kind):
        data = np.asarray(draw_head(drawn, **SMALL, seed=7).dataobj).astype(np.float32)
        volume = Volume(data, Grid(data.shape, AFFINE))
        measures = quality.measure({suffix: volume}, drawn_labels(), between={}, doubt_mm3={})
        found = [reason for reason in quality.judge(measures)[1] if 'look like' in reason]
        assert [reason.split(': ')[1] for reason in found] == says


# --- whatever Hypothesis thinks of --------------------------------------------------------------

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SIZES = st.one_of(st.just((10, 9, 12)), st.lists(st.integers(1, 12), min_size=1, max_size=5))
NUMBERS = st.one_of(
    st.floats(-100, 100), st.sampled_from((0.0, 1.0, math.nan, math.inf, -math.inf, 1e38, -1e-38))
)


def one_error(error: Exception, path: Path) -> None:
    assert str(error).startswith(f'{path}: ')
    assert '\n' not in str(error)


@QUICK
@given(draw=st.data())
def test_any_header_gives_a_volume_or_one_line(tmp_path, draw):
    """A finite float32 volume with a valid affine, or an ImageError that names the file."""
    shape = tuple(draw.draw(SIZES))
    dtype = draw.draw(st.sampled_from('u1 i1 <i2 >i2 <u4 <i8 <f4 >f8 <c8'.split()))
    path = tmp_path / draw.draw(st.sampled_from(('a.nii', 'a.nii.gz')))
    content = draw.draw(st.integers(0, 2**32))
    payload = np.random.default_rng(content).bytes(math.prod(shape) * np.dtype(dtype).itemsize)
    order = '>' if dtype[0] == '>' else '<'
    affine = AFFINE.copy()
    affine[:3, :3] *= draw.draw(st.sampled_from((0.001, 1, 1.25, 10)))
    kind = nib.Nifti1Image.header_class(endianness=order)
    array = np.frombuffer(payload, dtype).reshape(shape, order='F')
    with np.errstate(all='ignore'):
        put(nib.Nifti1Image(array, affine, kind, dtype=array.dtype), path)
    entries = draw.draw(
        st.dictionaries(
            st.sampled_from(
                ('scl_slope', 'scl_inter', 'qoffset_x', 'quatern_b', 'srow_x', 'srow_z', 'pixdim',
                 'sform_code', 'qform_code', 'xyzt_units', 'vox_offset')
            ),
            NUMBERS, max_size=3,
        )
    )  # fmt: skip
    for name in entries.keys() & {'sform_code', 'qform_code', 'xyzt_units'}:
        entries[name] = int(np.nan_to_num(entries[name], posinf=9, neginf=-9)) % 7
    patch(path, order, **entries)
    try:
        with np.errstate(all='ignore'):
            volume = image.load_scan(path)
    except ImageError as error:
        one_error(error, path)
    else:
        check_volume(volume)


@QUICK
@given(content=st.binary(max_size=600), suffix=st.sampled_from(('.nii', '.nii.gz')))
def test_any_bytes_are_no_scan(tmp_path, content, suffix):
    header = nib.Nifti1Header().binaryblock
    for start in (b'', header, header[:100]):
        whole = start + content
        path = raw(tmp_path / f'a{suffix}', gzip.compress(whole) if suffix[-1] == 'z' else whole)
        with pytest.raises(ImageError, match=r'^/') as caught:
            image.load_scan(path)
        assert str(caught.value).startswith(f'{path}: ')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def mutated(text: str) -> st.SearchStrategy[bytes]:
    """Draw a text of which a piece was replaced by something else."""
    content = text.encode()
    cuts = st.tuples(st.integers(0, len(content)), st.integers(0, 20), st.binary(max_size=20))
    return cuts.map(lambda c: content[: c[0]] + c[2] + content[c[0] + c[1] :])


EARLIER = Settings(Path('/in'), Path('/out'), derivatives={'a': Path('/a')}, mem=3.0).to_toml()
NAMES = [entry.name for entry in fields(Settings)]
# JSON's scalars and lists are TOML's, but for null.
LINES = st.dictionaries(
    st.sampled_from(NAMES), JSON.filter(lambda v: 'null' not in json.dumps(v)), max_size=4
).map(lambda record: ''.join(f'{k} = {json.dumps(v)}\n' for k, v in record.items()).encode())


@settings(QUICK, max_examples=150)
@given(content=st.one_of(st.binary(max_size=80), mutated(EARLIER), LINES))
def test_any_configuration_is_settings_or_one_error(content):
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return
    try:
        found = Settings.from_toml(text, bids_dir=Path('/in'), output_dir=Path('/out'))
    except SettingsError:
        pass
    else:
        assert Settings.from_toml(found.to_toml(), run_id=found.run_id) == found


@settings(QUICK, max_examples=150)
@given(data=st.data())
def test_any_card_is_a_card_or_one_error(tmp_path, tiny, data):
    text = tiny.path.read_text()
    known = st.sampled_from([entry.name for entry in fields(ModelCard)])
    entries = st.dictionaries(known, JSON, max_size=3)
    content = data.draw(
        st.one_of(
            st.binary(max_size=80),
            mutated(text),
            entries.map(lambda change: json.dumps(json.loads(text) | change).encode()),
            JSON.map(lambda value: json.dumps(value).encode()),
        )
    )
    path = raw(tmp_path / 'x.json', content)
    try:
        found = read_card(path)
    except ModelError as error:
        one_error(error, path)
    else:
        assert found.weights == tmp_path / 'x.safetensors'
        assert json.loads(found.to_json())


@settings(QUICK, max_examples=150)
@given(
    content=st.one_of(
        st.binary(max_size=80),
        mutated('{"t1w": {"session": ["1", "2"], "run": null}, "flair": {"acquisition": "*"}}'),
        JSON.map(lambda value: json.dumps({'t1w': value}).encode()),
        st.dictionaries(st.text(max_size=5), JSON, max_size=3).map(
            lambda value: json.dumps({'flair': value}).encode()
        ),
    )
)
def test_any_filter_file_is_filters_or_one_error(tmp_path, content):
    path = raw(tmp_path / 'x.json', content)
    try:
        found = bids.read_filters(path)
    except BidsError as error:
        one_error(error, path)
    else:
        assert set(found) == set(bids.QUERIES)


@settings(QUICK, max_examples=100)
@given(data=st.data())
def test_any_recipe_is_a_recipe_or_one_error(tmp_path, data):
    names = [entry.name for entry in fields(recipe.Recipe)]
    values = JSON.filter(lambda value: 'null' not in json.dumps(value))
    lines = st.dictionaries(st.sampled_from(names), values, max_size=3).map(
        lambda record: ''.join(f'{k} = {json.dumps(v)}\n' for k, v in record.items()).encode()
    )
    content = data.draw(st.one_of(mutated(RECIPE), lines.map(lambda c: c + DATASET.encode())))
    path = raw(tmp_path / 'x.toml', content)
    try:
        read_recipe(path)
    except RecipeError as error:
        one_error(error, path)


# --- the sum ------------------------------------------------------------------------------------


def test_all_kinds_ended_well(request):
    """Count what the tests above tried; where only some were run, there is nothing to sum up."""
    option = request.config.option
    if option.keyword or getattr(option, 'lf', False) or '::' in ' '.join(request.config.args):
        pytest.skip('only some kinds were run')
    ends = list(LEDGER.values())
    right, tracebacks = ends.count('right'), ends.count('traceback')
    with request.config.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled():
        print(f'\n{len(ends)} kinds tried, {right} right, {tracebacks} tracebacks')
    assert tracebacks == 0
    assert right == len(ends) >= 80
    document = (Path(__file__).parents[1] / 'docs' / 'reliability.md').read_text(encoding='utf-8')
    document = document.split('\n## Faults')[0]  # the rest is counted by test_reliability.py
    assert sum(map(int, re.findall(r'\| (\d+) \|', document))) == len(ends)
    assert f'{len(ends)} kinds tried, {right} right, 0 tracebacks' in document
    assert set(re.findall(r'`(test_[a-z0-9_]+)`', document)) <= set(globals())
