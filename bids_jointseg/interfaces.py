"""Nipype interfaces: each loads its inputs, calls one function, and saves what it returns.

Between nodes, arrays travel as uncompressed NumPy files in the work folder:

- a scan is ``{data (X, Y, Z), affine}``,
- a pass of the network is named after its reference modality and holds one image per modality
  on one grid, ``{T1w, FLAIR, affine}``, and then ``{probabilities (C, X, Y, Z), affine}``.

One pass or two, T1w or FLAIR or both: everything here loops over what there is.
"""

from __future__ import annotations

import hashlib
import logging
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import BadZipFile

import numpy as np
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    InputMultiObject,
    OutputMultiObject,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    specs,
    traits,
)
from nipype.utils.filemanip import hash_infile

from bids_jointseg import bids, figures, image, lesions, quality, registration, standard
from bids_jointseg.card import ModelError, read_card
from bids_jointseg.image import Grid, ImageError, Volume
from bids_jointseg.labels import CLASSES, LABELS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

LOGGER = logging.getLogger('bids_jointseg')

# What a stage is given is hashed to tell whether it must run. Processors have SHA-1 built in;
# Nipype's MD5, of 8 kB at a time, takes three times as long.
specs.hash_infile = partial(hash_infile, chunk_len=2**20, crypto=hashlib.sha1)

LESION = next(label.index for label in LABELS if label.abbreviation == 'L')
LEAST_COVERAGE, FULL_COVERAGE = 0.1, 0.7
"""Share of the head on the T1w that the FLAIR shows: less is an error, or worth a look.

A clinical FLAIR leaves out the neck and the lower face, which a sagittal T1w shows.
"""


# --- files between nodes ------------------------------------------------------------------------


def _save(name: str, **arrays: NDArray[Any]) -> str:
    path = Path.cwd() / f'{name}.npz'
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def _load(path: str) -> dict[str, NDArray[Any]]:
    with _damage(path), np.load(path) as arrays:
        return dict(arrays)


def _save_array(name: str, array: NDArray[Any]) -> str:
    path = Path.cwd() / f'{name}.npy'
    np.save(path, array)
    return str(path)


def _load_array(path: str, *, mmap_mode: Literal['r'] | None = None) -> NDArray[Any]:
    with _damage(path):
        return np.load(path, mmap_mode=mmap_mode)


@contextmanager
def _damage(path: str) -> Iterator[None]:
    """Say what helps where unfinished work was cut off: by a power cut, or a disk's fault."""
    try:
        yield
    except (ValueError, EOFError, BadZipFile) as error:
        raise ImageError(
            f'{path}: unfinished work that is damaged: the same command with --clean-workdir '
            'makes it again'
        ) from error


def _load_volume(path: str) -> Volume:
    arrays = _load(path)
    return Volume(arrays['data'], Grid(arrays['data'].shape, arrays['affine']))


def _load_volumes(inputs: Any) -> dict[str, Volume]:
    """Return modality -> scan of those that there are."""
    given = {'T1w': inputs.t1w, 'FLAIR': inputs.flair}
    return {name: _load_volume(path) for name, path in given.items() if isdefined(path)}


def _between(transform: Any) -> dict[tuple[str, str], NDArray[Any]]:
    """Return (from, to) -> matrix that maps points, RAS mm, of one scan to the other."""
    return image.transforms(image.load_itk(transform) if isdefined(transform) else np.eye(4))


# --- the nodes ----------------------------------------------------------------------------------


class _CheckInput(BaseInterfaceInputSpec):
    t1w = File(desc='T1w as found')
    flair = File(desc='FLAIR as found')


class _CheckOutput(TraitedSpec):
    t1w = File(desc='conformed T1w')
    flair = File(desc='conformed FLAIR')
    flags = traits.List(traits.Str, desc='what is questionable')


class Check(SimpleInterface):
    """Check the scans of one unit of work and conform them (:func:`.image.load_scan`)."""

    input_spec = _CheckInput
    output_spec = _CheckOutput

    def _run_interface(self, runtime: Any) -> Any:
        volumes: list[Volume] = []
        with _warnings() as flags:
            for name in ('t1w', 'flair'):
                path = getattr(self.inputs, name)
                if isdefined(path):
                    volume = image.load_scan(path)
                    if any(np.array_equal(volume.data, other.data) for other in volumes):
                        raise ImageError(
                            f'{path}: a copy of the T1w: replace it, or run with --ignore flair'
                        )
                    volumes.append(volume)
                    self._results[name] = _save(name, data=volume.data, affine=volume.grid.affine)
                    flags[:] = [flag.replace(str(path), Path(path).name) for flag in flags]
        self._results['flags'] = flags
        return runtime


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the warnings that are logged; they are shown as well."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect(logging.WARNING)
    LOGGER.addHandler(handler)
    try:
        yield messages
    finally:
        LOGGER.removeHandler(handler)


class _RegisterInput(BaseInterfaceInputSpec):
    t1w = File(mandatory=True, desc='conformed T1w')
    flair = File(mandatory=True, desc='conformed FLAIR')
    precomputed = File(desc='transform to use instead of registering')
    inverse = traits.Bool(False, usedefault=True, desc='the precomputed one is from T1w to FLAIR')
    pair = traits.Str(desc='how to call the two in a message')
    seed = traits.Int(0, usedefault=True)


class _RegisterOutput(TraitedSpec):
    transform = File(desc='points of the T1w -> points of the FLAIR, ITK affine')
    flags = traits.List(traits.Str, desc='what is questionable')


class Register(SimpleInterface):
    """Align the FLAIR with the T1w rigidly (:func:`.registration.register`)."""

    input_spec = _RegisterInput
    output_spec = _RegisterOutput

    def _run_interface(self, runtime: Any) -> Any:
        inputs = self.inputs
        volumes = _load_volumes(inputs)
        if isdefined(inputs.precomputed):
            matrix: NDArray[Any] = image.load_itk(inputs.precomputed)
            matrix = np.linalg.inv(matrix) if inputs.inverse else matrix
        else:
            try:
                matrix = registration.register(volumes['T1w'], volumes['FLAIR'], seed=inputs.seed)
            except ImageError as error:
                raise ImageError(f'{inputs.pair}: {error}') from error
        share = coverage(volumes['T1w'], volumes['FLAIR'], matrix)
        if share < LEAST_COVERAGE:
            raise ImageError(
                f'{inputs.pair}: the two scans do not overlap (only {share:.0%} of the head): '
                'check that they are of one person and session'
            )
        self._results['flags'] = []
        if share < FULL_COVERAGE:
            self._results['flags'] = [f'the FLAIR covers only {share:.0%} of the head on the T1w']
        path = Path.cwd() / 'transform.txt'
        image.save_itk(matrix, path)
        self._results['transform'] = str(path)
        return runtime


def coverage(fixed: Volume, moving: Volume, matrix: NDArray[Any]) -> float:
    """Return which share of the head on one scan lies within the field of view of another.

    Parameters
    ----------
    fixed, moving
        The scans.
    matrix
        (4, 4), RAS mm of `fixed` -> RAS mm of `moving`.
    """
    head = np.argwhere(fixed.data[::2, ::2, ::2] > image.foreground(fixed.data)) * 2
    to_moving = np.linalg.inv(moving.grid.affine) @ matrix @ fixed.grid.affine
    voxels = image.transformed(to_moving, head)
    inside = (voxels >= -0.5) & (voxels <= np.array(moving.grid.shape) - 0.5)
    return float(inside.all(axis=1).mean()) if len(head) else 0.0


class _ToModelGridInput(BaseInterfaceInputSpec):
    t1w = File(desc='conformed T1w')
    flair = File(desc='conformed FLAIR')
    transform = File(desc='T1w -> FLAIR')
    modalities = traits.List(traits.Str, mandatory=True, desc='that the model takes')
    in_plane_mm = traits.Float(mandatory=True)
    slice_mm = traits.Tuple(traits.Float, traits.Float, mandatory=True)
    fast = traits.Bool(False, usedefault=True, desc='one pass')


class _PassesOutput(TraitedSpec):
    passes = OutputMultiObject(File(), desc='one file per pass of the network')


class ToModelGrid(SimpleInterface):
    """Bring the scans onto the grid of every pass (:func:`.image.to_model_grids`)."""

    input_spec = _ToModelGridInput
    output_spec = _PassesOutput

    def _run_interface(self, runtime: Any) -> Any:
        inputs = self.inputs
        volumes = _load_volumes(inputs)
        usable = {name: item for name, item in volumes.items() if name in inputs.modalities}
        if not usable:
            raise ModelError(
                f'the model takes {" and ".join(inputs.modalities)}, '
                f'there is only {" and ".join(volumes)}: choose another --model'
            )
        passes = image.to_model_grids(
            usable,
            _between(inputs.transform),
            in_plane_mm=inputs.in_plane_mm,
            slice_mm=inputs.slice_mm,
            fast=inputs.fast,
            threads=1,
        )
        self._results['passes'] = [
            _save(look, affine=grid.affine, **images) for look, (images, grid) in passes.items()
        ]
        return runtime


class _NormaliseInput(BaseInterfaceInputSpec):
    passes = InputMultiObject(File(), mandatory=True)
    landmarks = traits.Dict(desc='modality -> landmarks of histogram scaling')


class Normalise(SimpleInterface):
    """Scale the histograms, then to zero mean and unit variance (:func:`.image.normalise`)."""

    input_spec = _NormaliseInput
    output_spec = _PassesOutput

    def _run_interface(self, runtime: Any) -> Any:
        landmarks = self.inputs.landmarks if isdefined(self.inputs.landmarks) else {}
        passes = []
        for path in self.inputs.passes:
            arrays = _load(path)
            affine = arrays.pop('affine')
            images = {
                name: image.normalise(data, landmarks.get(name)) for name, data in arrays.items()
            }
            passes.append(_save(Path(path).stem, affine=affine, **images))
        self._results['passes'] = passes
        return runtime


class _SegmentInput(BaseInterfaceInputSpec):
    passes = InputMultiObject(File(), mandatory=True)
    t1w = File(desc='conformed T1w')
    model = traits.Str(mandatory=True, nohash=True, desc="the model's card")
    sha256 = traits.Str(mandatory=True, desc='of the weights: they decide, not where they lie')
    locator = traits.Str(mandatory=True, desc='SHA-256 of what says where the brain is')
    intracranial = traits.Str(mandatory=True, desc='SHA-256 of what says what the skull holds')
    bias = traits.Dict({}, usedefault=True, desc='of the card')
    temperature = traits.Float(1.0, usedefault=True, desc='of the card')
    fast = traits.Bool(False, usedefault=True, desc='without the mirror images')
    device = traits.Str('auto', usedefault=True, nohash=True)
    threads = traits.Int(1, usedefault=True, nohash=True)
    # Nipype gives GPU slots only to a node with a trait of this name.
    use_gpu = traits.Bool(False, usedefault=True, nohash=True)


class _SegmentOutput(_PassesOutput):
    consensus = traits.Float(desc='least Dice between the members, of any pass')
    inside = File(desc='what the skull holds by the T1w, share of each cube')


class Segment(SimpleInterface):
    """Run the network on the brain in every pass (:func:`.locator.predict_brain`).

    Another one tells what the skull holds (:func:`.locator.find_inside`).
    """

    input_spec = _SegmentInput
    output_spec = _SegmentOutput

    def _run_interface(self, runtime: Any) -> Any:
        from bids_jointseg.inference import agreement, combine, consensus
        from bids_jointseg.locator import find_inside, predict_brain
        from bids_jointseg.network import load_model

        inputs = self.inputs
        card = read_card(inputs.model)
        network = load_model(card)
        passes, agreed = [], []
        where: dict[str, Any] = {'device': inputs.device, 'threads': inputs.threads}
        for path in inputs.passes:
            images = _load(path)
            affine = images.pop('affine')
            members, grid = predict_brain(
                network,
                images,
                Grid(next(iter(images.values())).shape, affine),
                window=card.window,
                mirror=not inputs.fast,
                **where,
            )
            # Half precision resolves far more than the 1/255 that is written in the end.
            half = combine(members, inputs.temperature).astype(np.float16)
            votes = agreement(members, 'L').astype(np.float16)
            agreed.append(consensus(members))
            passes.append(
                _save(Path(path).stem, affine=grid.affine, probabilities=half, agreement=votes)
            )
        self._results['consensus'] = min(agreed)
        self._results['passes'] = passes
        if isdefined(inputs.t1w):
            inside = find_inside(_load_volume(inputs.t1w), **where)
            self._results['inside'] = _save('inside', affine=inside.grid.affine, data=inside.data)
        return runtime


class _ToNativeInput(BaseInterfaceInputSpec):
    passes = InputMultiObject(File(), mandatory=True)
    t1w = File(desc='conformed T1w')
    flair = File(desc='conformed FLAIR')
    transform = File(desc='T1w -> FLAIR')
    level = traits.Enum('full', 'minimal', usedefault=True)


class _ToNativeOutput(TraitedSpec):
    t1w_labels = File(desc='(X, Y, Z) uint8 on the grid of the T1w')
    flair_labels = File(desc='(X, Y, Z) uint8 on the grid of the FLAIR')
    probabilities = File(desc='(C, X, Y, Z) uint8, 255 is 1, on the grid of the reference')
    entropy = File(desc='(X, Y, Z) float16 on the grid of the reference')
    lesion = File(desc='(2, X, Y, Z) float16 there: probability of L, agreement on it')
    doubt_mm3 = traits.Dict(desc='label -> volume that the probabilities leave in doubt')


class ToNative(SimpleInterface):
    """Map the probabilities to the native grids and label (:func:`.image.joint_probabilities`)."""

    input_spec = _ToNativeInput
    output_spec = _ToNativeOutput

    def _run_interface(self, runtime: Any) -> Any:
        inputs = self.inputs
        between = _between(inputs.transform)
        passes, votes = {}, {}
        for path in inputs.passes:
            arrays = _load(path)
            grid = Grid(arrays['probabilities'].shape[1:], arrays['affine'])
            passes[Path(path).stem] = (image.keep_brain(arrays['probabilities'], grid), grid)
            votes[Path(path).stem] = Volume(arrays['agreement'].astype(np.float32), grid)
        lesional = 'FLAIR' if 'FLAIR' in votes else 'T1w'
        looked_at = {name: grid for name, (_, grid) in passes.items()}
        for number, (target, volume) in enumerate(_load_volumes(inputs).items()):
            to = {name: between[target, name] for name in passes}
            part = image.covered(volume.grid, looked_at, to)
            grid = volume.grid.part(part)
            whole = partial(image.spread, part=part, shape=volume.grid.shape)
            joint = image.joint_probabilities(passes, grid, to, threads=1)
            name = f'{target.lower()}_labels'
            labels = image.label_map(joint)
            self._results[name] = _save_array(name, whole(labels))
            if number == 0:  # the reference
                self._results['doubt_mm3'] = image.doubt_mm3(joint, labels, grid)
                agreed = image.resample(votes[lesional], grid, to[lesional], threads=1)
                lesion = np.stack([joint[CLASSES.index('L')], agreed]).astype(np.float16)
                self._results['lesion'] = _save_array('lesion', whole(lesion))
                unsure = entropy(joint).astype(np.float16)
                self._results['entropy'] = _save_array('entropy', whole(unsure))
                if inputs.level == 'full':
                    rounded = np.stack([np.rint(p * 255).astype(np.uint8) for p in joint])
                    nothing = np.reshape([255] + [0] * len(CLASSES[1:]), (-1, 1, 1, 1))
                    self._results['probabilities'] = _save_array(
                        'probabilities', whole(rounded, outside=nothing)
                    )
        return runtime


def entropy(probabilities: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the normalised entropy, ``-sum_c p_c log p_c / log C``: 0 certain, 1 all even.

    Parameters
    ----------
    probabilities
        (C, X, Y, Z), summing to 1 over classes.

    Returns
    -------
    NDArray[np.float32]
        (X, Y, Z).
    """
    total = np.zeros(probabilities.shape[1:], np.float32)
    for p in probabilities:
        total -= p * np.log(np.maximum(p, np.float32(1e-9)))
    return np.clip(total / np.float32(np.log(len(probabilities))), 0, 1)


class _QualityInput(BaseInterfaceInputSpec):
    t1w = File(desc='conformed T1w')
    flair = File(desc='conformed FLAIR')
    transform = File(desc='T1w -> FLAIR')
    t1w_labels = File()
    flair_labels = File()
    doubt_mm3 = traits.Dict(mandatory=True)
    consensus = traits.Float(mandatory=True, desc='of the members of the ensemble')
    inside = File(desc='of :class:`Segment`')


class _QualityOutput(TraitedSpec):
    quality = traits.Dict(desc='verdict, reasons, measures')


class MeasureQuality(SimpleInterface):
    """Measure a scan and its segmentation, and judge them (:mod:`.quality`)."""

    input_spec = _QualityInput
    output_spec = _QualityOutput

    def _run_interface(self, runtime: Any) -> Any:
        inputs = self.inputs
        volumes = _load_volumes(inputs)
        reference, scan = next(iter(volumes.items()))
        labels = _load_array(getattr(inputs, f'{reference.lower()}_labels'))
        measures = quality.measure(
            volumes,
            labels,
            between=_between(inputs.transform),
            doubt_mm3=inputs.doubt_mm3,
            agreement=inputs.consensus,
        )
        if isdefined(inputs.inside):
            held = quality.intracranial_ml(_load_volume(inputs.inside), labels, scan)
            if held is not None:
                measures['intracranial_ml'] = held
        verdict, reasons = quality.judge(measures)
        self._results['quality'] = {
            'verdict': verdict,
            'reasons': reasons,
            'measures': {name: round(value, 4) for name, value in measures.items()},
        }
        return runtime


class _WriteInput(BaseInterfaceInputSpec):
    scan = traits.Any(mandatory=True, desc='the unit of work, a Scan')
    bids_dir = traits.Str(mandatory=True)
    out_dir = traits.Str(mandatory=True)
    level = traits.Enum('full', 'minimal', usedefault=True)
    configuration = traits.Dict(desc='what decides the result beside the scans')
    t1w = File(desc='conformed T1w')
    flair = File(desc='conformed FLAIR')
    transform = File(desc='T1w -> FLAIR')
    t1w_labels = File()
    flair_labels = File()
    probabilities = File()
    entropy = File(mandatory=True)
    lesion = File(mandatory=True, desc='probability of L and agreement on it')
    doubt_mm3 = traits.Dict(mandatory=True)
    modalities = traits.List(traits.Str, mandatory=True, desc='that the model takes')
    repeatability = traits.Dict({}, usedefault=True, desc='of the card')
    quality = traits.Dict(mandatory=True, desc='of :class:`MeasureQuality`')
    flags = traits.List(traits.Str, [], usedefault=True, desc='of the check')
    alignment_flags = traits.List(traits.Str, [], usedefault=True, desc='of the registration')


class _WriteOutput(TraitedSpec):
    summary = File(desc='the file that is written last')


class WriteDerivatives(SimpleInterface):
    """Write all results of one scan; the summary comes last and says that they are complete."""

    input_spec = _WriteInput
    output_spec = _WriteOutput

    def _run_interface(self, runtime: Any) -> Any:
        inputs = self.inputs
        scan: bids.Scan = inputs.scan
        bids_dir, out_dir = Path(inputs.bids_dir), Path(inputs.out_dir)
        summary = bids.derivative(out_dir, scan, 'seg-jointseg_morph.json')
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.unlink(missing_ok=True)  # what is there now is about to be replaced

        volumes = _load_volumes(inputs)
        reference = next(iter(volumes))
        grid = volumes[reference].grid
        files = {'T1w': scan.t1w, 'FLAIR': scan.flair}
        labels = {name: _load_array(getattr(inputs, f'{name.lower()}_labels')) for name in volumes}
        own = labels[reference]
        brain = own > 0

        def write(suffix: str, data: NDArray[Any], name: str = reference, **options: Any) -> None:
            path = bids.derivative(out_dir, scan, suffix)
            record = bids.sidecar(scan, suffix, bids_dir)
            if re.search('desc-(preproc|lesionfilled)', suffix):
                record['SkullStripped'] = stripped
            options.setdefault('dtype', np.uint8)
            image.save(path, data, volumes[name].grid, like=files[name], **options)
            bids.write_json(path.with_name(path.name.split('.')[0] + '.json'), record)

        for name, array in labels.items():
            space = '' if name == reference else f'space-{name}_'
            write(f'{space}seg-jointseg_dseg.nii.gz', array, name)
            write(f'{space}label-L_mask.nii.gz', (array == LESION).astype(np.uint8), name)
        if inputs.level == 'full':
            stripped = quality.skull_stripped(volumes[reference], brain)
            write('desc-brain_mask.nii.gz', brain.astype(np.uint8))
            probabilities = _load_array(inputs.probabilities, mmap_mode='r')
            for name, array in zip(CLASSES[1:], probabilities[1:], strict=True):
                write(f'seg-jointseg_label-{name}_probseg.nii.gz', array, slope=1 / 255)
            uncertainty = _load_array(inputs.entropy).astype(np.float32)
            write('seg-jointseg_desc-entropy_probseg.nii.gz', uncertainty, slope=1 / 255)
            between = _between(inputs.transform)
            for name, volume in volumes.items():
                space, data = '', volume.data
                if name != reference:
                    space = f'space-{reference}_'
                    data = image.resample(volume, grid, between[reference, name], threads=1)
                slope = (float(np.abs(data).max()) or 1.0) / np.iinfo(np.int16).max
                write(f'{space}desc-preproc_{name}.nii.gz', data, dtype=np.int16, slope=slope)
            if 'T1w' in volumes:
                filled = lesions.fill_lesions(volumes['T1w'].data, own, grid)
                slope = (float(np.abs(filled).max()) or 1.0) / np.iinfo(np.int16).max
                write('desc-lesionfilled_T1w.nii.gz', filled, dtype=np.int16, slope=slope)
            if len(volumes) == 2:
                for start, end in (('FLAIR', 'T1w'), ('T1w', 'FLAIR')):
                    # ITK maps points against the direction in which the image moves.
                    suffix = f'from-{start}_to-{end}_mode-image_xfm.txt'
                    path = bids.derivative(out_dir, scan, suffix)
                    image.save_itk(between[end, start], path)

        probability, agreement = _load_array(inputs.lesion)
        found = lesions.measure_lesions(own, grid, probability=probability, agreement=agreement)
        flags = [
            *scan.notes,
            *inputs.flags,
            *inputs.alignment_flags,
            *inputs.quality['reasons'],
            *limitations(volumes),
        ]
        sizes = image.volumes_mm3(own, grid)
        taken = {
            name: volume.grid.slice_mm
            for name, volume in volumes.items()
            if name in inputs.modalities
        }
        factors = inputs.repeatability.get(acquisition(taken), {})
        bids.write_tables(
            out_dir,
            scan,
            bids_dir,
            volumes=sizes,
            intervals=intervals(sizes, inputs.doubt_mm3, factors),
            lesions=found,
            flags=flags,
            quality=dict(inputs.quality),
            configuration=dict(inputs.configuration),
        )
        self._results['summary'] = str(summary)
        return runtime


def acquisition(slice_mm: Mapping[str, float]) -> str:
    """Return what a card calls scans of these modalities and slices, such as 'T1w+FLAIR, thick'.

    One with thick slices makes the whole of them thick.
    """
    thick = max(slice_mm.values()) >= image.THICK_MM
    return f'{"+".join(slice_mm)}, {"thick" if thick else "thin"}'


def intervals(
    volumes: Mapping[str, float], doubt_mm3: Mapping[str, float], factors: Mapping[str, float]
) -> dict[str, tuple[float, float] | None]:
    """Return label (or `brain`) -> the interval in which 95 % of repeated scans' volumes lie.

    Half of it is the volume in doubt times the factor of the model's card for the scans that
    were given; None without one.
    """
    found: dict[str, tuple[float, float] | None] = {}
    for name, value in {**volumes, 'brain': sum(volumes.values())}.items():
        half = factors[name] * doubt_mm3[name] if name in factors else None
        found[name] = None if half is None else (max(0.0, value - half), value + half)
    return found


def limitations(volumes: Mapping[str, Volume]) -> list[str]:
    """Return what the result cannot be, for want of a scan, one line each."""
    if 'FLAIR' in volumes:
        return []
    return ['no FLAIR: lesions are judged on the T1w alone and many are missed']


class _FiguresInput(BaseInterfaceInputSpec):
    stem = traits.Str(mandatory=True)
    folder = traits.Str(mandatory=True)
    t1w = File()
    flair = File()
    transform = File()
    t1w_labels = File()
    flair_labels = File()
    entropy = File(mandatory=True)


class _FiguresOutput(TraitedSpec):
    figures = OutputMultiObject(traits.Str(), desc='outside the work folder')


class DrawFigures(SimpleInterface):
    """Draw the figures of one scan (:func:`.figures.draw_scan`)."""

    input_spec = _FiguresInput
    output_spec = _FiguresOutput

    def _run_interface(self, runtime: Any) -> Any:
        inputs = self.inputs
        volumes = _load_volumes(inputs)
        arrays: dict[str, Any] = {'entropy': _load_array(inputs.entropy).astype(np.float32)}
        for name in volumes:
            key = f'{name.lower()}_labels'
            arrays[key] = _load_array(getattr(inputs, key))
        if len(volumes) == 2:
            flair, grid = volumes['FLAIR'], volumes['T1w'].grid
            after = _between(inputs.transform)['T1w', 'FLAIR']
            arrays['flair_on_t1w'] = image.resample(flair, grid, after, threads=1)
            arrays['flair_on_t1w_before'] = image.resample(flair, grid, threads=1)
        written = figures.draw_scan(
            Path(inputs.folder),
            inputs.stem,
            t1w=volumes.get('T1w'),
            flair=volumes.get('FLAIR'),
            **arrays,
        )
        self._results['figures'] = [str(path) for path in written]
        return runtime


# --- standard space -----------------------------------------------------------------------------


class _TemplateInput(BaseInterfaceInputSpec):
    template = File(exists=True, mandatory=True, desc='T1w of the template')
    mask = File(exists=True, mandatory=True, desc='its brain')
    t1w = File(desc='conformed T1w')
    flair = File(desc='conformed FLAIR, where there is no T1w')
    labels = File(mandatory=True, desc='(X, Y, Z) uint8 on the grid of the scan')
    pair = traits.Str(desc='how to call the two in a message')


class _TemplateOutput(TraitedSpec):
    transform = File(desc='points of the template -> points of the scan, ITK text')
    fit = traits.Dict(desc='of :func:`.standard.measure_fit`')


class RegisterTemplate(SimpleInterface):
    """Register a scan with a template (:func:`.standard.register`)."""

    input_spec = _TemplateInput
    output_spec = _TemplateOutput

    def _run_interface(self, runtime: Any) -> Any:
        inputs = self.inputs
        volume = next(iter(_load_volumes(inputs).values()))
        labels = _load_array(inputs.labels)
        try:
            template, inside = standard.load_template(Path(inputs.template), Path(inputs.mask))
            transform = standard.register(template, inside, volume, labels > 0, labels == LESION)
        except ImageError as error:
            raise ImageError(f'{inputs.pair}: {error}') from error
        path = standard.save_transform(transform, Path.cwd() / 'transform.txt')
        self._results['transform'] = str(path)
        self._results['fit'] = standard.measure_fit(
            transform, template.grid, inside, volume.grid, labels
        )
        return runtime


class _StandardInput(BaseInterfaceInputSpec):
    scan = traits.Any(mandatory=True, desc='the unit of work, a Scan')
    space = traits.Any(mandatory=True, desc='a StandardSpace')
    bids_dir = traits.Str(mandatory=True)
    out_dir = traits.Str(mandatory=True)
    level = traits.Enum('full', 'minimal', usedefault=True)
    configuration = traits.Dict(desc='what decides the result beside the scans and the template')
    template = File(exists=True, mandatory=True, desc='on whose grid results are written')
    t1w = File(desc='conformed T1w')
    flair = File(desc='conformed FLAIR, where there is no T1w')
    labels = File(mandatory=True, desc='(X, Y, Z) uint8 on the grid of the scan')
    probabilities = File(mandatory=True, desc='(C, X, Y, Z) uint8, 255 is 1')
    transform = File(mandatory=True, desc='template -> scan, ITK text')
    fit = traits.Dict(desc='of the registration')


class WriteStandard(SimpleInterface):
    """Write the results of one scan in one standard space; the labels' sidecar comes last."""

    input_spec = _StandardInput
    output_spec = _WriteOutput

    def _run_interface(self, runtime: Any) -> Any:
        inputs = self.inputs
        scan: bids.Scan = inputs.scan
        bids_dir, out_dir = Path(inputs.bids_dir), Path(inputs.out_dir)
        names = bids.expected_in(inputs.space, scan, inputs.level)
        summary = bids.derivative(out_dir, scan, names[-1])
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.unlink(missing_ok=True)  # what is there now is about to be replaced

        template = image.load_scan(inputs.template)
        grid = template.grid
        ((reference, volume),) = list(_load_volumes(inputs).items())[:1]
        transform = standard.load_transform(Path(inputs.transform))
        pull = standard.Puller(transform, grid, volume.grid)
        probabilities = _load_array(inputs.probabilities, mmap_mode='r')
        joint = standard.bring_probabilities(
            pull, (part / np.float32(255) for part in probabilities)
        )
        labels = image.label_map(joint)
        uri = standard.template_uri(Path(inputs.template))

        def write(name: str, data: NDArray[Any], *, last: bool = False, **options: Any) -> None:
            path = bids.derivative(out_dir, scan, bids.in_space(inputs.space, name) + '.nii.gz')
            record = bids.sidecar_in(
                inputs.space,
                scan,
                name,
                bids_dir,
                template=uri,
                grid=' x '.join(f'{mm:g}' for mm in grid.spacing_mm) + ' mm',
            )
            if 'desc-preproc' in name:
                brain = _load_array(inputs.labels) > 0
                record['SkullStripped'] = quality.skull_stripped(volume, brain)
            if last:
                record['configuration'] = dict(inputs.configuration)
            options.setdefault('dtype', np.uint8)
            image.save(path, data, grid, **options)
            bids.write_json(path.with_name(path.name.split('.')[0] + '.json'), record)

        path = bids.derivative(out_dir, scan, names[0])
        standard.save_transform(transform, path)
        record = {
            'Description': f'From the {reference} to the template {inputs.space.name}, for images',
            'Sources': [bids.raw_uri(scan.reference, bids_dir), uri],
            **inputs.fit,
        }
        bids.write_json(path.with_suffix('.json'), record)
        moved = pull(volume.data)
        folder = out_dir / f'sub-{scan.subject}' / 'figures'
        template_figure, figure = (
            folder / f'{scan.stem}_{bids.in_space(inputs.space, f"desc-{what}_T1w")}.png'
            for what in ('template', 'standard')
        )
        figures.draw_standard((template_figure, figure), template, Volume(moved, grid), labels)
        write('label-L_mask', (labels == LESION).astype(np.uint8))
        if inputs.level == 'full':
            write('desc-brain_mask', (labels > 0).astype(np.uint8))
            for name, array in zip(CLASSES[1:], joint[1:], strict=True):
                write(f'seg-jointseg_label-{name}_probseg', array, slope=1 / 255)
            slope = (float(np.abs(moved).max()) or 1.0) / np.iinfo(np.int16).max
            write(f'desc-preproc_{reference}', moved, dtype=np.int16, slope=slope)
        write('seg-jointseg_dseg', labels, last=True)
        self._results['summary'] = str(summary)
        return runtime


# --- training -----------------------------------------------------------------------------------


class _CacheInput(BaseInterfaceInputSpec):
    dataset = traits.Str(mandatory=True)
    subject = traits.Str(mandatory=True)
    name = traits.Str(mandatory=True, desc='of the scan, unique in its dataset')
    passes = InputMultiObject(File(), desc='of the network; a head is painted if there are none')
    t1w = File(desc='conformed T1w')
    flair = File(desc='conformed FLAIR')
    transform = File(desc='T1w -> FLAIR')
    annotation = File(exists=True, desc='label map on the grid of one of them')
    protocol = traits.Str('', usedefault=True, desc='what its labels say')
    painted = traits.Bool(False, usedefault=True, desc='modalities are painted from the labels')
    folder = traits.Str(mandatory=True, nohash=True, desc='of the cache')


class _CacheOutput(TraitedSpec):
    files = OutputMultiObject(traits.Str(), desc='for bids_jointseg.cache.read_person')


class CacheScan(SimpleInterface):
    """Cache one scan for training, each pass by itself (:func:`.cache.write_person`)."""

    input_spec = _CacheInput
    output_spec = _CacheOutput

    def _run_interface(self, runtime: Any) -> Any:
        from bids_jointseg import cache

        inputs = self.inputs
        folder = Path(inputs.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for old in cache.cached_files(folder, inputs.dataset, inputs.name):
            old.unlink()
        written = []
        for reference, grid, arrays in self._passes():
            path = cache.cached_file(folder, inputs.dataset, inputs.name, reference)
            cache.write_person(
                path,
                dataset=inputs.dataset,
                subject=inputs.subject,
                name=inputs.name,
                grid=grid,
                **arrays,
            )
            written.append(str(path))
        self._results['files'] = written
        return runtime

    def _passes(self) -> Iterator[tuple[str, Grid, dict[str, Any]]]:
        """Yield the reference, the grid and the arrays of each pass."""
        from bids_jointseg import cache
        from bids_jointseg.labels import protocol

        inputs = self.inputs
        volumes, between = _load_volumes(inputs), _between(inputs.transform)
        annotated = isdefined(inputs.annotation)
        if annotated:
            labels, said = image.load_labels(inputs.annotation), protocol(inputs.protocol)
        if not isdefined(inputs.passes):
            grid, kinds = cache.painted_grid(labels, inputs.protocol)
            sets = cache.sets_on(grid, labels, said)
            yield 'painted', grid, {'images': {}, 'sets': sets, 'kinds': kinds}
            return
        for path in inputs.passes:
            images = _load(path)
            affine = images.pop('affine')
            grid = Grid(next(iter(images.values())).shape, affine)
            arrays: dict[str, Any] = {'images': images}
            if annotated:
                space = annotated_space(inputs.annotation, labels, volumes)
                matrix = between[Path(path).stem, space]
                arrays['sets'] = cache.sets_on(grid, labels, said, matrix)
                if inputs.painted:
                    arrays['kinds'] = cache.kinds_on(grid, labels, inputs.protocol, matrix)
            yield Path(path).stem, grid, arrays


def annotated_space(path: str, labels: Volume, volumes: Mapping[str, Volume]) -> str:
    """Return the modality on whose grid a label map was drawn.

    Raises
    ------
    ImageError
        If it lies on none of their grids.
    """
    found = image.lies_on(labels.grid, {name: volume.grid for name, volume in volumes.items()})
    if found is not None:
        return found
    raise ImageError(
        f'{path}: the labels are not on the grid of the {" or the ".join(volumes)}: '
        'resample them to it (nearest neighbour)'
    )


class _PaintInput(BaseInterfaceInputSpec):
    annotation = File(exists=True, mandatory=True, desc='whole-head label map')
    protocol = traits.Str(mandatory=True)
    masks = traits.List(traits.Str, [], usedefault=True, desc='lesion masks in MNI152 space')
    seed = traits.Int(0, usedefault=True)
    intact = traits.Bool(False, usedefault=True, desc='without noise, coil and blur')
    stem = traits.Str(mandatory=True, nohash=True, desc='path of the files without suffix')


class _PaintOutput(TraitedSpec):
    t1w = traits.Str()
    flair = traits.Str()
    labels = traits.Str()


class PaintHead(SimpleInterface):
    """Paint a whole head, to test on (:func:`.sampling.paint_head`)."""

    input_spec = _PaintInput
    output_spec = _PaintOutput

    def _run_interface(self, runtime: Any) -> Any:
        from bids_jointseg.cache import read_mask
        from bids_jointseg.sampling import paint_head

        inputs = self.inputs
        images, labels, grid = paint_head(
            image.load_labels(inputs.annotation),
            inputs.protocol,
            [read_mask(Path(path)) for path in inputs.masks],
            seed=inputs.seed,
            intact=inputs.intact,
        )
        stem = Path(inputs.stem)
        stem.parent.mkdir(parents=True, exist_ok=True)
        for name, array in images.items():
            path = stem.with_name(f'{stem.name}_{name}.nii.gz')
            image.save(path, array, grid, dtype=np.int16, slope=1 / 500)
            self._results[name.lower()] = str(path)
        path = stem.with_name(f'{stem.name}_desc-painted_dseg.nii.gz')
        image.save(path, labels, grid, dtype=np.uint8)
        self._results['labels'] = str(path)
        return runtime


class _TrainInput(BaseInterfaceInputSpec):
    job = traits.Dict(mandatory=True, desc='see bids_jointseg.training.train_job')
    name = traits.Str(mandatory=True, desc='of the model')
    out_dir = traits.Str(mandatory=True, desc='checkpoints, curve and model')
    processes = traits.Int(1, usedefault=True, nohash=True, desc='that share an iteration')
    # Nipype gives GPU slots only to a node with a trait of this name.
    use_gpu = traits.Bool(False, usedefault=True, nohash=True)


class _TrainOutput(TraitedSpec):
    card = File(desc='of the trained model')


class Train(SimpleInterface):
    """Train one fold from cached scans (:func:`.training.train_job`).

    Checkpoints live in the output folder, outside of the node, whose folder Nipype empties.
    """

    input_spec = _TrainInput
    output_spec = _TrainOutput

    def _run_interface(self, runtime: Any) -> Any:
        from bids_jointseg.training import train_job

        inputs = self.inputs
        folder = Path(inputs.out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        job = bids.write_json(folder / 'job.json', dict(inputs.job))
        if inputs.processes == 1:
            train_job(dict(inputs.job), folder)
        else:
            launch = ['torch.distributed.run', '--standalone', '--nproc-per-node']
            subprocess.run(
                [sys.executable, '-m', *launch, str(inputs.processes),
                 '-m', 'bids_jointseg.training', str(job)],
                check=True,
            )  # fmt: skip
        self._results['card'] = str(folder / f'{inputs.name}.json')
        return runtime


class _ScoreInput(BaseInterfaceInputSpec):
    t1w = File(desc='conformed T1w')
    flair = File(desc='conformed FLAIR')
    t1w_labels = File(desc='on the grid of the T1w')
    flair_labels = File(desc='on the grid of the FLAIR')
    annotation = File(exists=True, mandatory=True, desc='reference, on one of these grids')
    protocol = traits.Str(mandatory=True)
    identity = traits.Dict(mandatory=True, desc='dataset, scan and model, for the tables')


class _ScoreOutput(TraitedSpec):
    rows = File(desc='JSON, for bids_jointseg.evaluation.write_tables')


class Score(SimpleInterface):
    """Compare a whole scan with its annotation (:func:`.evaluation.score`)."""

    input_spec = _ScoreInput
    output_spec = _ScoreOutput

    def _run_interface(self, runtime: Any) -> Any:
        from bids_jointseg import evaluation
        from bids_jointseg.labels import PROTOCOLS, protocol

        inputs = self.inputs
        volumes = _load_volumes(inputs)
        labels = image.load_labels(inputs.annotation)
        space = annotated_space(inputs.annotation, labels, volumes)
        found = _load_array(getattr(inputs, f'{space.lower()}_labels'))
        said = protocol(inputs.protocol)
        rows = evaluation.score(
            PROTOCOLS['jointseg'].encode(found),
            said.encode(labels.data.astype(np.int64)),
            labels.grid.spacing_mm,
            reference=said,
            **inputs.identity,
        )
        path = Path.cwd() / 'rows.json'
        bids.write_json(path, {'rows': rows})
        self._results['rows'] = str(path)
        return runtime
