"""From annotated BIDS datasets to a model and what it reaches.

Four workflows, one after the other, each of which goes on where it stopped:

    cache   check - (register) - resample - cache        every scan, as for inference
    paint   one node per test person who has no scans
    train   one node per fold, which resumes from its own checkpoint
    score   check - ... - segment - to_native - score    every test person of every fold

A scan that fails is named and left out; the training begins with the others.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipype.pipeline.engine import Node, Workflow

from bids_jointseg.bids import Scan, annotated_scans
from bids_jointseg.cache import cached_files
from bids_jointseg.card import ModelError, read_card
from bids_jointseg.evaluation import write_tables
from bids_jointseg.image import lies_on, load_grid
from bids_jointseg.interfaces import CacheScan, PaintHead, Score, Train
from bids_jointseg.recipe import RecipeError, read_recipe
from bids_jointseg.workflows import execution, participant
from bids_jointseg.workflows.execution import node_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bids_jointseg.bids import Annotated
    from bids_jointseg.card import ModelCard
    from bids_jointseg.recipe import Recipe, Source

    Masks = Mapping[str, Mapping[str, Path]]

LOGGER = logging.getLogger('bids_jointseg')

STAGES = participant.STAGES | {
    'cache': 'cached',
    'paint': 'painted',
    'train': 'trained',
    'score': 'scored',
}


@dataclass(frozen=True)
class Item:
    """One scan (or label map) of one dataset of a recipe."""

    source: Source
    found: Annotated

    @property
    def name(self) -> str:
        """Name of its workflow."""
        return node_name(f'{self.source.name}_{self.found.name}')


@dataclass(frozen=True)
class Options:
    """How a training runs.

    Attributes
    ----------
    recipe
        Name or path.
    out_dir
        Models, curves, tables.
    data
        Folder of the datasets; by default that of the recipe.
    work_dir
        Cache and intermediate results; by default `work` in `out_dir`.
    smoke
        The recipe's small size, and one test scan of each dataset.
    folds
        Which; all by default.
    device, processes
        For the network, and how many share an iteration.
    nprocs, threads, workers
        Processors, threads of the network, processes that draw samples of each stream.
    seconds
        Stop training, resumable, after this time.
    verbose
        Above 1 Nipype's messages are shown.
    """

    recipe: str
    out_dir: Path
    data: Path | None = None
    work_dir: Path | None = None
    smoke: bool = False
    folds: tuple[int, ...] = ()
    device: str = 'auto'
    processes: int = 1
    nprocs: int = 1
    threads: int = 1
    workers: int = 1
    seconds: float = float('inf')
    verbose: int = 0


def run(options: Options) -> list[execution.Failure]:
    """Train what a recipe says, and write models and tables to the output folder.

    Returns
    -------
    list[Failure]
        Scans that were left out, and folds that were not trained.

    Raises
    ------
    RecipeError
        If the recipe or its data cannot be used.
    """
    from bids_jointseg.training import Settings, first_network

    recipe = read_recipe(options.recipe, smoke=options.smoke)
    try:  # before anything is cached
        first_network(Settings.of(recipe))
    except (ModelError, RecipeError) as error:
        raise RecipeError(f'{options.recipe}: {error}') from error
    folds = options.folds or tuple(range(recipe.folds))
    beyond = [fold for fold in folds if not 0 <= fold < recipe.folds]
    if beyond:
        raise RecipeError(f'{options.recipe}: no fold {beyond[0]}, only 0 to {recipe.folds - 1}')
    items, masks = index(recipe, _data_folder(options))
    failures = _cache(options, recipe, items)
    masks = _copy_masks(options, masks)
    failed = {failure.scan for failure in failures}
    items = [item for item in items if item.name not in failed]
    if not items:
        raise RecipeError(f'{options.recipe}: no scan could be used: see above')
    failures += _paint(options, recipe, items, masks, folds)
    untrained = _train(options, recipe, items, masks, folds)
    failures += untrained
    rows: list[dict[str, Any]] = []
    for fold in folds:
        path = _fold_folder(options, recipe, fold) / f'{recipe.name}.json'
        if f'fold {fold}' in {failure.scan for failure in untrained} or not path.is_file():
            continue
        card = read_card(path)
        if not card.training['finished']:
            LOGGER.info(
                '%s: stopped at step %d; the same command goes on', card.path,
                card.training['steps'],
            )  # fmt: skip
            continue
        more, scored = _score(options, recipe, items, masks, fold, card)
        failures += more
        rows += scored
        LOGGER.info('model %s', card.path)
    if rows:
        for path in write_tables(rows, options.out_dir / 'evaluation'):
            LOGGER.info('wrote %s', path)
    return failures


def index(recipe: Recipe, data: Path) -> tuple[list[Item], dict[str, dict[str, Path]]]:
    """Find the scans and the lesion masks of a recipe's datasets.

    Parameters
    ----------
    recipe
        From :func:`bids_jointseg.recipe.read_recipe`.
    data
        Folder of the datasets.

    Returns
    -------
    tuple[list[Item], dict]
        Scans, and dataset -> subject -> lesion mask in MNI152 space.

    Raises
    ------
    RecipeError
        If a dataset is not there, or two scans would have one name.
    """
    items: list[Item] = []
    masks: dict[str, dict[str, Path]] = {}
    for source in recipe.datasets:
        root = data / source.root
        if not root.is_dir() and '*' in source.test:
            LOGGER.warning('%s: not there: nothing is evaluated on %s', root, source.name)
            continue
        found = annotated_scans(source, root)
        if source.lesion_masks:
            masks[source.name] = {
                item.subject: item.annotation for item in found if item.annotation is not None
            }
        else:
            items += [Item(source, item) for item in found]
    return items, masks


def _data_folder(options: Options) -> Path:
    path = Path(options.recipe)
    if options.data is None and not path.suffix:
        raise RecipeError(f'{path} is a recipe of the package: say where its --data lie')
    return (options.data or path.parent).absolute()


def _work(options: Options) -> Path:
    return (options.work_dir or options.out_dir / 'work').absolute()


def _fold_folder(options: Options, recipe: Recipe, fold: int) -> Path:
    folder = options.out_dir.absolute()
    return folder if recipe.folds == 1 else folder / f'fold-{fold}'


def _run(
    options: Options, workflow: Workflow, names: Mapping[str, str], plugin: str
) -> list[execution.Failure]:
    """Run one of the workflows; its crash reports go to the logs of the output folder."""
    stages = [name for name in workflow.list_node_names() if name.split('.')[-1] in STAGES]
    logs = options.out_dir / 'log' / f'{workflow.name}_{time.strftime("%Y%m%d-%H%M%S")}'
    participant.configure(workflow, dict.fromkeys(workflow._get_all_nodes(), logs))
    Path(workflow.base_dir).mkdir(parents=True, exist_ok=True)
    return execution.run(
        workflow,
        plugin=plugin,
        plugin_args={
            'n_procs': options.nprocs,
            'raise_insufficient': False,
            'mp_context': 'forkserver',
        }
        if plugin == 'MultiProc'
        else {},
        log_file=Path(workflow.base_dir) / 'nipype.log',
        crash_folders=[logs],
        progress=execution.Progress(names, STAGES, total=len(stages)),
        verbose=options.verbose,
    )


# --- cache --------------------------------------------------------------------------------------


def _cache(options: Options, recipe: Recipe, items: Sequence[Item]) -> list[execution.Failure]:
    workflow = Workflow('cache', base_dir=str(_work(options)))
    for item in items:
        workflow.add_nodes([init_cache_wf(item, recipe=recipe, folder=_work(options) / 'scans')])
    return _run(options, workflow, {item.name: item.name for item in items}, 'MultiProc')


def _copy_masks(options: Options, masks: Masks) -> dict[str, dict[str, Path]]:
    """Put the lesion masks beside the cached scans: all that training reads can be moved."""
    folder = _work(options) / 'scans'
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: {
            subject: Path(shutil.copyfile(path, folder / f'{name}_{path.name}'))
            for subject, path in found.items()
        }
        for name, found in masks.items()
    }


def init_cache_wf(item: Item, *, recipe: Recipe, folder: Path) -> Workflow:
    """Build the workflow that caches one scan for training.

    Parameters
    ----------
    item
        Scan and label map.
    recipe
        Says what grid the model takes.
    folder
        Of the cache.

    Returns
    -------
    Workflow

    Outputs
    -------
    cache.files
        For :func:`bids_jointseg.cache.read_person`.
    """
    workflow = Workflow(item.name)
    source, found = item.source, item.found
    cache = Node(
        CacheScan(
            dataset=source.name,
            subject=found.subject,
            name=found.name,
            protocol=source.protocol,
            painted=bool(source.painted),
            folder=str(folder),
        ),
        name='cache',
        mem_gb=2,
        overwrite=None if cached_files(folder, source.name, found.name) else True,
    )
    if found.annotation is not None:
        cache.inputs.annotation = str(found.annotation)
    if found.scan is None:
        workflow.add_nodes([cache])
        return workflow
    low, high = recipe.slice_mm
    check, resample, register = participant.add_preprocessing(
        workflow,
        found.scan,
        modalities=[name for name in source.modalities if name in recipe.modalities],
        in_plane_mm=recipe.in_plane_mm,
        # Thick slices of painted people are painted as such, from voxels of 1 mm.
        slice_mm=(1.0, max(1.0, high)) if source.painted else (low, high),
    )
    _set_scans(check, found.scan)
    workflow.connect([
        (check, cache, [('t1w', 't1w'), ('flair', 'flair')]),
        (resample, cache, [('passes', 'passes')]),
    ])  # fmt: skip
    if register is not None:
        workflow.connect(register, 'transform', cache, 'transform')
    return workflow


def _set_scans(check: Node, scan: Scan) -> None:
    for field in ('t1w', 'flair'):
        path = getattr(scan, field)
        if path is not None:
            check.set_input(field, str(path))


def _paint(
    options: Options,
    recipe: Recipe,
    items: Sequence[Item],
    masks: Masks,
    folds: Sequence[int],
) -> list[execution.Failure]:
    """Paint the test people who have no scans, once for all folds."""
    workflow = Workflow('paint', base_dir=str(_work(options)))
    names = {}
    for fold in folds:
        split = _split(recipe, items, masks, fold)
        # From the last: the first test people may be patients with scans of their own.
        unseen = [
            str(path)
            for name, found in masks.items()
            for subject, path in found.items()
            if split[name][subject] == 'test'
        ][::-1]
        for number, item in enumerate(_test_items(options, items, split)):
            if item.found.scan is not None or item.name in names:
                continue
            names[item.name] = f'{item.source.name} {item.found.name}'
            paint = Node(
                PaintHead(
                    annotation=str(item.found.annotation),
                    protocol=item.source.protocol,
                    masks=unseen,
                    seed=number,
                    stem=str(_painted_stem(options, item)),
                ),
                name='paint',
                mem_gb=3,
                overwrite=None if _painted(options, item).annotation.is_file() else True,
            )
            head = Workflow(item.name)
            head.add_nodes([paint])
            workflow.add_nodes([head])
    return _run(options, workflow, names, 'MultiProc') if names else []


def _painted_stem(options: Options, item: Item) -> Path:
    label = item.found.name.split('_')[0]
    return options.out_dir / 'painted' / item.source.name / label / 'anat' / item.found.name


def _painted(options: Options, item: Item) -> Annotated:
    """Return the painted scan of a test person who has none."""
    stem = _painted_stem(options, item)
    images = {name: stem.with_name(f'{stem.name}_{name}.nii.gz') for name in item.source.painted}
    scan = Scan(
        subject=item.found.subject,
        session=None,
        t1w=images.get('T1w'),
        flair=images.get('FLAIR'),
        stem=item.found.name,
    )
    labels = stem.with_name(f'{stem.name}_desc-painted_dseg.nii.gz')
    return replace(item.found, scan=scan, annotation=labels)


# --- train --------------------------------------------------------------------------------------


def _train(
    options: Options,
    recipe: Recipe,
    items: Sequence[Item],
    masks: Masks,
    folds: Sequence[int],
) -> list[execution.Failure]:
    folder = _work(options) / 'scans'
    files = [
        path for item in items for path in cached_files(folder, item.source.name, item.found.name)
    ]
    failures = []
    for fold in folds:
        out_dir = _fold_folder(options, recipe, fold)
        # Relative to the job, so that it still holds where the folders are moved to.
        own = options.recipe.endswith('.toml')
        job = {
            'recipe': os.path.relpath(options.recipe, out_dir) if own else options.recipe,
            'smoke': options.smoke,
            'fold': fold,
            'cache': [os.path.relpath(path, out_dir) for path in files],
            'masks': {
                name: {subject: os.path.relpath(path, out_dir) for subject, path in found.items()}
                for name, found in masks.items()
            },
            'device': options.device,
            'threads': options.threads,
            'workers': options.workers,
            'seconds': options.seconds,
        }
        node = Node(
            Train(
                job=job,
                name=recipe.name,
                out_dir=str(out_dir),
                processes=options.processes,
                use_gpu=participant.wants_gpu(options.device),
            ),
            name='train',
            # It goes on from its own checkpoint: Nipype must not take a stopped run for done.
            overwrite=True,
        )
        part = Workflow(f'fold_{fold}')
        part.add_nodes([node])
        workflow = Workflow(f'train_{node_name(recipe.name)}', base_dir=str(_work(options)))
        workflow.add_nodes([part])
        # In this process, for the sake of its progress bar and of Ctrl-C.
        failed = _run(options, workflow, {part.name: f'fold {fold}'}, 'Linear')
        if any(failure.reason == execution.INTERRUPTED for failure in failed):
            raise KeyboardInterrupt
        failures += failed
        if not failed and not read_card(out_dir / f'{recipe.name}.json').training['finished']:
            break  # it was told to stop
    return failures


# --- score --------------------------------------------------------------------------------------


def _score(
    options: Options,
    recipe: Recipe,
    items: Sequence[Item],
    masks: Masks,
    fold: int,
    card: ModelCard,
) -> tuple[list[execution.Failure], list[dict[str, Any]]]:
    workflow = Workflow(f'score_{node_name(recipe.name)}_{fold}', base_dir=str(_work(options)))
    names = {}
    for item in _test_items(options, items, _split(recipe, items, masks, fold)):
        painted = item.found.scan is None
        found = _painted(options, item) if painted else item.found
        for inputs, scan in _variants(found.scan, found.annotation):
            name = node_name(f'{item.name}_{inputs}')
            names[name] = f'{item.source.name} {item.found.name} from {inputs}'
            workflow.add_nodes([
                init_score_wf(
                    scan,
                    found.annotation,
                    protocol='jointseg' if painted else item.source.protocol,
                    card=card,
                    identity={
                        'dataset': item.source.name,
                        'scan': found.name + (f'_fold-{fold}' if recipe.folds > 1 else ''),
                        'model': f'{recipe.name} ({inputs})',
                    },
                    device=options.device,
                    threads=options.nprocs,
                    name=name,
                )
            ])  # fmt: skip
    if not names:
        return [], []
    failures = _run(options, workflow, names, 'MultiProc')
    rows = []
    for name in names:
        path = Path(workflow.base_dir) / workflow.name / name / 'score' / 'rows.json'
        if path.is_file():
            rows += json.loads(path.read_text(encoding='utf-8'))['rows']
    return failures, rows


def _split(
    recipe: Recipe, items: Sequence[Item], masks: Masks, fold: int
) -> dict[str, dict[str, str]]:
    people: dict[str, list[str]] = {name: list(found) for name, found in masks.items()}
    for item in items:
        people.setdefault(item.source.name, []).append(item.found.subject)
    return recipe.split(people, fold)


def _test_items(
    options: Options, items: Sequence[Item], split: Mapping[str, Mapping[str, str]]
) -> list[Item]:
    """Return the annotated scans of the people whom a fold tests on: a trial, one per dataset.

    A scan that two datasets show, each in its own way, is tested once; painted scans are each
    dataset's own.
    """
    found: dict[tuple[object, ...], Item] = {}
    for item in items:
        tested = split[item.source.name][item.found.subject] == 'test'
        if tested and item.found.annotation is not None:
            shown = item.found.scan or item.source.name
            found.setdefault((shown, item.found.annotation, item.source.protocol), item)
    if not options.smoke:
        return list(found.values())
    firsts: dict[str, Item] = {}
    for item in found.values():
        firsts.setdefault(item.source.name, item)
    return list(firsts.values())


def _variants(scan: Scan, annotation: Path) -> list[tuple[str, Scan]]:
    """Return the inputs that a scan offers, of those on whose grid it is annotated."""
    paths = {
        name: path for name, path in (('T1w', scan.t1w), ('FLAIR', scan.flair)) if path is not None
    }
    labels = load_grid(annotation)
    variants = []
    for names in (('T1w', 'FLAIR'), ('T1w',), ('FLAIR',)):
        given = {name: paths[name] for name in names if name in paths}
        if len(given) < len(names):
            continue
        grids = {name: load_grid(path) for name, path in given.items()}
        if lies_on(labels, grids) is not None:
            variants.append((
                '+'.join(names),
                replace(scan, t1w=given.get('T1w'), flair=given.get('FLAIR')),
            ))  # fmt: skip
    return variants


def init_score_wf(
    scan: Scan,
    annotation: Path,
    *,
    protocol: str,
    card: ModelCard,
    identity: Mapping[str, str],
    device: str,
    threads: int,
    name: str,
) -> Workflow:
    """Build the workflow that segments one annotated scan as the app does, and compares.

    Parameters
    ----------
    scan, annotation
        Scan and reference.
    protocol
        What the reference's labels say.
    card
        Of the model.
    identity
        Goes into every row: dataset, scan, model.
    device, threads
        For the network.
    name
        Of the workflow.

    Returns
    -------
    Workflow

    Outputs
    -------
    score.rows
        JSON, for :func:`bids_jointseg.evaluation.write_tables`.
    """
    workflow = Workflow(name)
    stages = participant.add_preprocessing(
        workflow,
        scan,
        modalities=card.modalities,
        in_plane_mm=card.in_plane_mm,
        slice_mm=card.slice_mm,
    )
    check = stages[0]
    _set_scans(check, scan)
    to_native = participant.add_segmentation(
        workflow,
        stages,
        card=card,
        level='minimal',
        device=device,
        use_gpu=participant.wants_gpu(device),
        omp_nthreads=threads,
    )
    score = Node(
        Score(annotation=str(annotation), protocol=protocol, identity=dict(identity)),
        name='score',
        mem_gb=2,
    )
    workflow.connect([
        (check, score, [('t1w', 't1w'), ('flair', 'flair')]),
        (to_native, score, [('t1w_labels', 't1w_labels'), ('flair_labels', 'flair_labels')]),
    ])  # fmt: skip
    return workflow
