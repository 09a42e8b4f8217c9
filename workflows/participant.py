"""From the scans of each participant to their joint segmentation.

After Dorent et al., MIDL 2019. One workflow per scan (a T1w, a FLAIR, or a pair of them):

    check - (register) - resample - normalise - segment - to_native - quality - write
                                                                 `- figures

The lesion evidence is computed on the FLAIR's slices, the tissue on the T1w's own where they are
finer; :func:`.image.plan_passes` decides whether that takes one pass of the network or two.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipype import config as nipype_config
from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node, Workflow

from bids_jointseg import __version__, bids
from bids_jointseg.card import FIRST_LOOKS, read_card
from bids_jointseg.coil import UNEVEN
from bids_jointseg.config import SettingsError
from bids_jointseg.image import ImageError, load_grid
from bids_jointseg.interfaces import (
    Check,
    DrawFigures,
    MeasureQuality,
    Normalise,
    Register,
    RegisterTemplate,
    Segment,
    ToModelGrid,
    ToNative,
    WriteDerivatives,
    WriteStandard,
)
from bids_jointseg.standard import find_template
from bids_jointseg.workflows import execution

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bids_jointseg.bids import Scan
    from bids_jointseg.card import ModelCard
    from bids_jointseg.config import Settings, StandardSpace
    from bids_jointseg.standard import Template

LOGGER = logging.getLogger('bids_jointseg')

UNFINISHED = 'not all of its results are there: the same command goes on'
STAGE_LIMIT_S = 4 * 3600
"""A stage that takes longer hangs: the slowest takes minutes, on one processor."""

STAGES = {
    'check': 'checked',
    'register': 'FLAIR aligned with the T1w',
    'resample': "brought onto the model's grid",
    'normalise': 'intensities normalised',
    'segment': 'segmented',
    'to_native': 'labelled on the native grids',
    'quality': 'quality measured',
    'write': 'results written',
    'figures': 'figures drawn',
}


def init_participant_wf(
    *,
    scans: Sequence[Scan],
    settings: Settings,
    card: ModelCard,
    name: str = 'jointseg_wf',
) -> Workflow:
    """Build the workflow of all scans.

    Parameters
    ----------
    scans
        Units of work, as :func:`.bids.plan` returns them.
    settings
        Of the run.
    card
        Of the model.
    name
        Of the workflow.

    Returns
    -------
    Workflow
        One workflow per scan, independent of each other, under a work folder that is stamped
        with what decides the results.
    """
    workflow = Workflow(name=name)
    workflow.base_dir = str(work_folder(settings, card))
    templates = {space: find_template(space) for space in settings.standard_spaces}
    scan_wfs = [
        init_scan_wf(
            scan=scan,
            card=card,
            bids_dir=settings.bids_dir,
            output_dir=settings.output_dir,
            level=settings.level,
            fast=settings.fast,
            random_seed=settings.random_seed,
            device=settings.device,
            use_gpu=wants_gpu(settings.device),
            omp_nthreads=min(settings.omp_nthreads, settings.nprocs),
            derivatives=settings.derivatives,
            templates=templates,
            name=workflow_name(scan),
        )
        for scan in scans
    ]
    workflow.add_nodes(scan_wfs)  # Nipype compares names with those of all that are there
    nodes = {
        node: log_folder(settings, scan.subject)
        for scan, scan_wf in zip(scans, scan_wfs, strict=True)
        for node in scan_wf._get_all_nodes()
    }
    configure(workflow, nodes, stop_on_first_crash=settings.stop_on_first_crash)
    paragraphs = [_introduce(card), *dict.fromkeys(scan_wf.__desc__ for scan_wf in scan_wfs)]
    if templates:
        paragraphs.append(_describe_spaces(settings.standard_spaces))
    workflow.__desc__ = '\n\n'.join(paragraphs)
    return workflow


def configure(
    workflow: Workflow, crash_folders: Mapping[Node, Path], *, stop_on_first_crash: bool = False
) -> None:
    """Set how Nipype runs a workflow, and where each node leaves its crash report."""
    for node, folder in crash_folders.items():
        node.config = {'execution': {'crashdump_dir': str(folder)}}
    execution = {
        'check_version': 'false',
        'crashfile_format': 'txt',
        'create_report': 'false',
        'hash_method': 'content',
        'job_finished_timeout': '60',  # network file systems show a new file late
        'parameterize_dirs': 'false',
        'poll_sleep_duration': '0.25',
        # The set of connected outputs must not change what a node's hash is.
        'remove_unnecessary_outputs': 'false',
        'stop_on_first_crash': str(stop_on_first_crash).lower(),
    }
    nipype_config.update_config({'execution': execution})
    workflow.config['execution'] = deepcopy(execution)


def init_scan_wf(
    *,
    scan: Scan,
    card: ModelCard,
    bids_dir: Path,
    output_dir: Path,
    level: str = 'full',
    fast: bool = False,
    random_seed: int = 0,
    device: str = 'auto',
    use_gpu: bool = False,
    omp_nthreads: int = 1,
    derivatives: Mapping[str, Path] | None = None,
    templates: Mapping[StandardSpace, Template] | None = None,
    name: str = 'scan_wf',
) -> Workflow:
    """Build the workflow of one unit of work.

    Parameters
    ----------
    scan
        A T1w, a FLAIR, or both.
    card
        Of the model.
    bids_dir, output_dir
        Datasets that are read and written.
    level
        'minimal' or 'full' results.
    fast
        One pass of the network, without the mirror images.
    random_seed
        Of the registration.
    device
        'auto', 'cpu', 'cuda' or 'cuda:N'.
    use_gpu
        The segmentation takes one of Nipype's GPU slots.
    omp_nthreads
        Most threads of one node.
    derivatives
        Name -> folder of precomputed derivatives.
    templates
        Standard space -> files of its template.
    name
        Of the workflow.

    Inputs
    ------
    t1w
        T1w, or nothing.
    flair
        FLAIR, or nothing.

    Outputs
    -------
    t1w_labels, flair_labels
        Label maps on the native grids, as arrays.
    probabilities, entropy
        On the reference's grid, as arrays.
    transform
        Points of the T1w -> points of the FLAIR.
    summary
        The last file of the results.
    """
    workflow = Workflow(name=name)
    paired = scan.t1w is not None and scan.flair is not None
    precomputed = find_transform(scan, derivatives or {}) if paired else None
    workflow.__desc__ = _describe(scan, precomputed=precomputed is not None)
    configuration = result_configuration(card, level=level, fast=fast, random_seed=random_seed)

    inputnode = Node(IdentityInterface(fields=['t1w', 'flair']), name='inputnode')
    for field in ('t1w', 'flair'):
        path = getattr(scan, field)
        if path is not None:
            inputnode.set_input(field, str(path))
    outputnode = Node(
        IdentityInterface(
            fields=[
                't1w_labels',
                'flair_labels',
                'probabilities',
                'entropy',
                'transform',
                'summary',
            ]
        ),
        name='outputnode',
    )

    check, resample, register = add_preprocessing(
        workflow,
        scan,
        modalities=card.modalities,
        in_plane_mm=card.in_plane_mm,
        slice_mm=card.slice_mm,
        fast=fast,
        random_seed=random_seed,
        precomputed=precomputed,
        omp_nthreads=omp_nthreads,
    )
    to_native = add_segmentation(
        workflow,
        (check, resample, register),
        card=card,
        level='full' if templates else level,  # standard space is reached by probabilities
        fast=fast,
        device=device,
        use_gpu=use_gpu,
        omp_nthreads=omp_nthreads,
    )
    gigabytes = check.mem_gb
    quality = Node(MeasureQuality(), name='quality', mem_gb=gigabytes)
    write = Node(
        WriteDerivatives(
            scan=scan,
            bids_dir=str(bids_dir),
            out_dir=str(output_dir),
            level=level,
            configuration=configuration,
            modalities=list(card.modalities),
            repeatability=dict(card.repeatability),
        ),
        name='write',
        mem_gb=gigabytes,
        # Results that were removed or made otherwise in between are written again.
        overwrite=None if bids.is_complete(output_dir, scan, level, configuration) else True,
    )
    folder = output_dir / f'sub-{scan.subject}' / 'figures'
    figures = Node(
        DrawFigures(stem=scan.stem, folder=str(folder)),
        name='figures',
        mem_gb=gigabytes,
        overwrite=None if any(folder.glob(f'{scan.stem}_desc-*.png')) else True,
    )

    workflow.connect([
        (inputnode, check, [('t1w', 't1w'), ('flair', 'flair')]),
        (check, write, [('t1w', 't1w'), ('flair', 'flair'), ('flags', 'flags')]),
        (to_native, write, [
            ('t1w_labels', 't1w_labels'),
            ('flair_labels', 'flair_labels'),
            ('entropy', 'entropy'),
            ('lesion', 'lesion'),
            ('doubt_mm3', 'doubt_mm3'),
        ]),
        (check, quality, [('t1w', 't1w'), ('flair', 'flair')]),
        (to_native, quality, [
            ('t1w_labels', 't1w_labels'),
            ('flair_labels', 'flair_labels'),
            ('doubt_mm3', 'doubt_mm3'),
        ]),
        (workflow.get_node('segment'), quality, [
            ('consensus', 'consensus'),
            ('inside', 'inside'),
        ]),
        (quality, write, [('quality', 'quality')]),
        (check, figures, [('t1w', 't1w'), ('flair', 'flair')]),
        (to_native, figures, [
            ('t1w_labels', 't1w_labels'),
            ('flair_labels', 'flair_labels'),
            ('entropy', 'entropy'),
        ]),
        (to_native, outputnode, [
            ('t1w_labels', 't1w_labels'),
            ('flair_labels', 'flair_labels'),
            ('probabilities', 'probabilities'),
            ('entropy', 'entropy'),
        ]),
        (write, outputnode, [('summary', 'summary')]),
    ])  # fmt: skip

    if register is not None:
        workflow.connect([
            (register, quality, [('transform', 'transform')]),
            (register, write, [('transform', 'transform'), ('flags', 'alignment_flags')]),
            (register, figures, [('transform', 'transform')]),
            (register, outputnode, [('transform', 'transform')]),
        ])  # fmt: skip
    if level == 'full':
        workflow.connect(to_native, 'probabilities', write, 'probabilities')
    add_standard_spaces(
        workflow,
        scan,
        (check, to_native),
        templates=templates or {},
        bids_dir=bids_dir,
        output_dir=output_dir,
        level=level,
        configuration=configuration,
    )
    return workflow


def add_standard_spaces(
    workflow: Workflow,
    scan: Scan,
    stages: tuple[Node, Node],
    *,
    templates: Mapping[StandardSpace, Template],
    bids_dir: Path,
    output_dir: Path,
    level: str,
    configuration: Mapping[str, Any],
) -> None:
    """Add what brings the results of a scan to standard spaces.

    One registration per template serves all of its resolutions.

    Parameters
    ----------
    workflow
        That of the scan.
    scan
        A T1w, a FLAIR, or both; the T1w is registered if there is one.
    stages
        `check` and `to_native`.
    templates, bids_dir, output_dir, level
        As for :func:`init_scan_wf`.
    configuration
        From :func:`result_configuration`.
    """
    check, to_native = stages
    gigabytes = check.mem_gb
    reference = 't1w' if scan.t1w is not None else 'flair'
    registered: dict[str, Node] = {}
    for space, files in templates.items():
        name = _stage('template', space, resolution=False)
        if name not in registered:
            registered[name] = Node(
                RegisterTemplate(
                    template=str(files.target_image),
                    mask=str(files.target_mask),
                    pair=f'{scan.reference} and {space.name}',
                ),
                name=name,
                mem_gb=gigabytes + 1,
            )
            workflow.connect([
                (check, registered[name], [(reference, reference)]),
                (to_native, registered[name], [(f'{reference}_labels', 'labels')]),
            ])  # fmt: skip
        complete = bids.is_complete_in(space, output_dir, scan, level, configuration)
        write = Node(
            WriteStandard(
                scan=scan,
                space=space,
                bids_dir=str(bids_dir),
                out_dir=str(output_dir),
                level=level,
                configuration=dict(configuration),
                template=str(files.image),
            ),
            name=_stage('standard', space),
            mem_gb=gigabytes + 1.5,
            overwrite=None if complete else True,
        )
        workflow.connect([
            (check, write, [(reference, reference)]),
            (to_native, write, [
                (f'{reference}_labels', 'labels'),
                ('probabilities', 'probabilities'),
            ]),
            (registered[name], write, [('transform', 'transform'), ('fit', 'fit')]),
        ])  # fmt: skip


def _stage(kind: str, space: StandardSpace, *, resolution: bool = True) -> str:
    """Return the name of a node for a space."""
    parts = [kind, space.name]
    parts += [] if space.cohort is None else [f'cohort_{space.cohort}']
    parts += [f'res_{space.resolution}'] if resolution and space.resolution is not None else []
    return '_'.join(parts)


def _stages(spaces: Sequence[StandardSpace]) -> dict[str, str]:
    """Return node -> what is said when it is done."""
    registered = {
        _stage('template', space, resolution=False): f'registered with {space.name}'
        for space in spaces
    }
    return STAGES | registered | {_stage('standard', s): f'results in {s} written' for s in spaces}


def add_preprocessing(
    workflow: Workflow,
    scan: Scan,
    *,
    modalities: Sequence[str],
    in_plane_mm: float,
    slice_mm: tuple[float, float],
    fast: bool = False,
    random_seed: int = 0,
    precomputed: Path | None = None,
    omp_nthreads: int = 1,
) -> tuple[Node, Node, Node | None]:
    """Add what brings a scan onto the grids of the network: for training as for inference.

    Parameters
    ----------
    workflow
        That of the scan.
    scan
        A T1w, a FLAIR, or both.
    modalities, in_plane_mm, slice_mm
        What the network takes.
    fast
        One pass of the network.
    random_seed
        Of the registration.
    precomputed
        Transform between the two scans, if there is one.
    omp_nthreads
        Most threads of one node.

    Returns
    -------
    tuple[Node, Node, Node | None]
        `check` (t1w, flair), `resample` (passes), and `register` (transform) for two scans.
    """
    gigabytes = _memory_gb(scan)
    check = Node(Check(), name='check', mem_gb=gigabytes)
    resample = Node(
        ToModelGrid(
            modalities=list(modalities), in_plane_mm=in_plane_mm, slice_mm=slice_mm, fast=fast
        ),
        name='resample',
        mem_gb=gigabytes,
    )
    workflow.connect([(check, resample, [('t1w', 't1w'), ('flair', 'flair')])])
    if scan.t1w is None or scan.flair is None:
        return check, resample, None
    register = Node(
        Register(pair=f'{scan.t1w} and {scan.flair.name}', seed=random_seed),
        name='register',
        mem_gb=gigabytes,
        n_procs=min(2, omp_nthreads) if precomputed is None else 1,
    )
    if precomputed is not None:
        register.inputs.precomputed = str(precomputed)
        register.inputs.inverse = '_from-T1w_to-FLAIR_' in precomputed.name
    workflow.connect([
        (check, register, [('t1w', 't1w'), ('flair', 'flair')]),
        (register, resample, [('transform', 'transform')]),
    ])  # fmt: skip
    return check, resample, register


def add_segmentation(
    workflow: Workflow,
    stages: tuple[Node, Node, Node | None],
    *,
    card: ModelCard,
    level: str = 'full',
    fast: bool = False,
    device: str = 'auto',
    use_gpu: bool = False,
    omp_nthreads: int = 1,
) -> Node:
    """Add what segments a scan that :func:`add_preprocessing` prepared.

    Parameters
    ----------
    workflow
        That of the scan.
    stages
        From :func:`add_preprocessing`.
    card
        Of the model.
    level, fast, device, use_gpu, omp_nthreads
        As for :func:`init_scan_wf`.

    Returns
    -------
    Node
        `to_native` (t1w_labels, flair_labels, probabilities, entropy).
    """
    check, resample, register = stages
    gigabytes = check.mem_gb
    normalise = Node(Normalise(landmarks=card.landmarks or {}), name='normalise', mem_gb=gigabytes)
    segment = Node(
        Segment(
            model=str(card.path),
            sha256=card.sha256,
            **{name: _first_look(name).sha256 for name in FIRST_LOOKS},
            bias=dict(card.bias),
            temperature=card.temperature,
            fast=fast,
            device=device,
            threads=omp_nthreads,
            use_gpu=use_gpu,
        ),
        name='segment',
        mem_gb=max(2.5, gigabytes),
        # A GPU node takes as many GPU slots as processors.
        n_procs=1 if use_gpu else omp_nthreads,
    )
    to_native = Node(ToNative(level=level), name='to_native', mem_gb=gigabytes)
    workflow.connect([
        (resample, normalise, [('passes', 'passes')]),
        (normalise, segment, [('passes', 'passes')]),
        (check, segment, [('t1w', 't1w')]),
        (segment, to_native, [('passes', 'passes')]),
        (check, to_native, [('t1w', 't1w'), ('flair', 'flair')]),
    ])  # fmt: skip
    if register is not None:
        workflow.connect(register, 'transform', to_native, 'transform')
    return to_native


def run(
    workflow: Workflow,
    scans: Sequence[Scan],
    settings: Settings,
    plugin: str,
    plugin_args: Mapping[str, Any],
) -> list[execution.Failure]:
    """Run the workflow of :func:`init_participant_wf` to its end, whatever fails on the way.

    Parameters
    ----------
    workflow, scans, settings
        The workflow and what it was made from.
    plugin, plugin_args
        Nipype's.

    Returns
    -------
    list[Failure]
        What failed, in the order of the scans; also a scan that has no results, for whatever
        reason.
    """
    names = {workflow_name(scan): scan.stem for scan in scans}
    logs = list(dict.fromkeys(log_folder(settings, scan.subject) for scan in scans))
    bids.remove_unfinished(settings.output_dir, {scan.subject for scan in scans})
    for folder in logs:
        bids.write_text(folder / 'config.toml', settings.to_toml())
    base = Path(workflow.base_dir)
    refuse_foreign(base)
    base.mkdir(parents=True, exist_ok=True)
    if settings.write_graph:
        try:
            workflow.write_graph(graph2use='colored', format='svg', simple_form=True)
        except OSError:
            LOGGER.warning('--write-graph: install graphviz for a drawing; %s has the graph', base)
    alone = sum(scan.t1w is None or scan.flair is None for scan in scans)
    stages = _stages(settings.standard_spaces)
    failures = execution.run(
        workflow,
        plugin=plugin,
        plugin_args=plugin_args,
        log_file=base / 'nipype.log',
        crash_folders=logs,
        progress=execution.Progress(names, stages, total=len(stages) * len(scans) - alone),
        verbose=settings.verbose,
        monitor=settings.resource_monitor,
        limit_s=STAGE_LIMIT_S,
    )
    # All scans have one configuration; nothing counts as complete but what is there.
    configuration = workflow.get_node(f'{workflow_name(scans[0])}.write').inputs.configuration
    known = {failure.scan for failure in failures if failure.stage != 'figures'}
    failures += [
        execution.Failure(scan.stem, 'write', UNFINISHED, base / 'nipype.log')
        for scan in scans
        if scan.stem not in known
        and not bids.is_complete(
            settings.output_dir, scan, settings.level, configuration, settings.standard_spaces
        )
    ]
    return sorted(failures, key=lambda failure: failure.scan)


def refuse_foreign(folder: Path) -> None:
    """Refuse unfinished work of another user: Nipype unpickles it, which runs what it says.

    Raises
    ------
    SettingsError
        If the folder is there and neither the user's own nor root's.
    """
    user = os.geteuid()
    if user and folder.exists() and folder.stat().st_uid not in (user, 0):
        raise SettingsError(f'{folder} belongs to another user: choose another -w')


def result_configuration(card: ModelCard, *, level: str, fast: bool, random_seed: int) -> dict:
    """Return what decides the results of a scan beside the scan; it is kept with them."""
    return {
        'version': __version__,
        'model': card.name,
        'weights': card.sha256,
        **{name: _first_look(name).sha256 for name in FIRST_LOOKS},
        'bias': dict(card.bias),
        'temperature': card.temperature,
        'repeatability': dict(card.repeatability),
        'level': level,
        'fast': fast,
        'random_seed': random_seed,
    }


def workflow_name(scan: Scan) -> str:
    """Return the name of a scan's workflow: 'sub-01_ses-1' -> 'sub_01_ses_1_wf'."""
    return execution.node_name(f'{scan.stem}_wf')


def work_folder(settings: Settings, card: ModelCard) -> Path:
    """Return the folder of intermediate results: another one for another version or model.

    Everything else that matters is an input of a node, whose hash Nipype checks.
    """
    stamp = hashlib.sha256(f'{settings.bids_dir.resolve()}\n{card.sha256}'.encode())
    return settings.work_dir / f'jointseg-{__version__}-{stamp.hexdigest()[:8]}'


def log_folder(settings: Settings, subject: str) -> Path:
    """Return where the logs of this run go."""
    return settings.output_dir / f'sub-{subject}' / 'log' / settings.run_id


def wants_gpu(device: str) -> bool:
    """Tell whether to ask for a GPU slot, without starting CUDA before a fork."""
    if device == 'auto':
        return os.environ.get('CUDA_VISIBLE_DEVICES') != '' and Path('/dev/nvidiactl').exists()
    return device != 'cpu'


def find_transform(scan: Scan, derivatives: Mapping[str, Path]) -> Path | None:
    """Return a precomputed transform between the two scans of a pair, if there is one."""
    for folder in derivatives.values():
        for start, end in (('FLAIR', 'T1w'), ('T1w', 'FLAIR')):
            suffix = f'from-{start}_to-{end}_mode-image_xfm.txt'
            path = bids.derivative(folder, scan, suffix)
            if path.is_file():
                return path
    return None


def _memory_gb(scan: Scan) -> float:
    """Estimate what a stage takes: measured at most, of scans of 8 to 134 million voxels."""
    voxels = 0
    for path in (scan.t1w, scan.flair):
        if path is not None:
            with suppress(ImageError):  # reported by name when the scan is checked
                voxels += math.prod(load_grid(path).shape)
    return round(0.7 + 40e-9 * voxels, 2)


@cache
def _first_look(name: str) -> ModelCard:
    """Return the card of what sees the whole head; it is read once, not for each scan."""
    return read_card(name)


_INTRODUCTION = """\
Brain tissue and white-matter lesions were segmented jointly with *bids_jointseg* {version}, a \
BIDS App [@bids; @bidsapps] built on *Nipype* [@nipype], after @jointseg, with the network \
`{card.name}` {card.version} (SHA-256 `{card.sha256}`, licence {card.licence}) in *PyTorch* \
[@pytorch]. Scans were resampled to the grid of the network along their own slices, and their \
intensities scaled to zero mean and unit variance over the head{landmarks}. The network takes any \
subset of modalities, the features of which are averaged [@hemis]. It was shown the brain and \
what is near it, as found by a smaller network that learned from synthetic heads alone, after \
@synthstrip (`{locator.name}` {locator.version}, SHA-256 `{locator.sha256}`). Scans that a coil \
brightened unevenly, by more than {uneven:.0%} (standard deviation over the brain), were divided \
by the smoothed intensities of the white matter that was found, and segmented again. Volumes are \
those of the labels; what the skull holds, down to the cerebellum, was told by another such \
network (`{intracranial.name}` {intracranial.version}, SHA-256 `{intracranial.sha256}`); lesions \
were counted as 26-connected groups of voxels."""


def _introduce(card: ModelCard) -> str:
    """Return what the description says of all scans."""
    landmarks = ', after matching their histograms to a standard [@nyul]' if card.landmarks else ''
    looks = {name: _first_look(name) for name in FIRST_LOOKS}
    return _INTRODUCTION.format(
        version=__version__, card=card, landmarks=landmarks, uneven=UNEVEN, **looks
    )


def _describe_spaces(spaces: Sequence[StandardSpace]) -> str:
    """Return what the description says of standard spaces."""
    names = ' and '.join(f'*{name}*' for name in dict.fromkeys(space.name for space in spaces))
    return (
        f'Results were brought to standard space, the template {names} of *TemplateFlow* '
        '[@templateflow]: brains were aligned by an affine transform and a free-form deformation '
        '[@ffd], maximising mutual information [@mattes] outside of lesions [@brett]; '
        'probabilities were mapped linearly, and the most probable class was taken there.'
    )


def _describe(scan: Scan, *, precomputed: bool = False) -> str:
    """Return what the description says of scans like this one."""
    if scan.t1w is None or scan.flair is None:
        name = 'T1-weighted' if scan.t1w is not None else 'FLAIR'
        return (
            f'Each {name} scan without a partner in its session was processed alone. The '
            'probabilities of the classes were mapped linearly to its native grid, and the most '
            'probable class was taken there.'
        )
    if precomputed:
        how = 'by a transform that was given'
    else:
        how = (
            'rigidly, by maximising mutual information [@mattes] with *SimpleITK* [@simpleitk] '
            'over a pyramid of three resolutions'
        )
    return (
        'Each T1-weighted scan was processed together with a FLAIR scan of its session, which was '
        f'aligned with it {how}. The probabilities of lesions were computed on the slices of the '
        'FLAIR, those of tissue on the grid of the T1-weighted scan where its slices are finer; '
        'both were mapped linearly to the native grid of each scan and joined, and the most '
        'probable class was taken there.'
    )
