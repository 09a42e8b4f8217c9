"""From annotated datasets to a model file.

    cache_people, cache_pairs - train

One node per person prepares what training needs with the code that prepares scans for inference;
the training itself keeps its checkpoints in the output folder and goes on from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nipype.interfaces.utility import Merge
from nipype.pipeline.engine import Node, Workflow

from bids_jointseg.interfaces import CachePair, CachePerson, Train
from bids_jointseg.recipe import RecipeError, read_recipe, subject_of

if TYPE_CHECKING:
    from bids_jointseg.recipe import Source


def init_training_wf(
    *,
    recipe: str,
    data: Path,
    out_dir: Path,
    work_dir: Path,
    device: str = 'auto',
    threads: int = 1,
    workers: int = 1,
    seconds: float = float('inf'),
    name: str = 'jointseg_training_wf',
) -> Workflow:
    """Build the workflow that trains what a recipe says.

    Parameters
    ----------
    recipe
        Name or path.
    data
        Folder that holds the recipe's datasets.
    out_dir
        For checkpoint, curve and model.
    work_dir
        For the cache.
    device, threads, workers, seconds
        See :func:`bids_jointseg.training.run`.
    name
        Of the workflow.

    Returns
    -------
    Workflow

    Raises
    ------
    RecipeError
        If a dataset of the recipe is not in `data`.

    Outputs
    -------
    train.card
        Card of the trained model.
    """
    settings = read_recipe(recipe)
    workflow = Workflow(name=name, base_dir=str(work_dir))
    train = Node(
        Train(
            recipe=recipe,
            out_dir=str(out_dir),
            device=device,
            threads=threads,
            workers=workers,
            seconds=seconds,
            use_gpu=device != 'cpu',
            lesions={},
        ),
        name='train',
        n_procs=threads + workers,
        # It goes on from its own checkpoint: Nipype must not take a run that stopped for done.
        overwrite=True,
    )
    found: dict[str, list[Node]] = {'people': [], 'pairs': []}
    for source in settings.datasets:
        root = data / source.name
        paths = sorted(root.glob(source.annotation or source.image))
        if not paths:
            raise RecipeError(
                f'{root}: no file matches {source.annotation or source.image!r}: '
                f'the recipe {settings.name!r} expects the dataset there'
            )
        if source.role == 'lesions':
            train.inputs.lesions = {subject_of(path): str(path) for path in paths}
        elif source.role == 'unlabelled':
            found['pairs'] += [_pair_node(path, settings.slice_mm) for path in paths]
        else:
            found['people'] += [_person_node(path, root, source) for path in paths]
    for field, output in (('people', 'person'), ('pairs', 'pair')):
        if found[field]:
            merge = Node(Merge(len(found[field])), name=f'gather_{field}')
            for number, node in enumerate(found[field], start=1):
                workflow.connect(node, output, merge, f'in{number}')
            workflow.connect(merge, 'out', train, field)
    return workflow


def _person_node(path: Path, root: Path, source: Source) -> Node:
    subject = subject_of(path)
    scan = str(root / source.image.format(subject=subject)) if source.image else None
    cache = CachePerson(
        annotation=str(path),
        protocol=source.protocol,
        scan=scan,
        name=f'{source.name}_sub-{subject}',
    )
    return Node(cache, name=f'cache_{source.name.replace("-", "_")}_{subject}')


def _pair_node(path: Path, slice_mm: tuple[float, float]) -> Node:
    t1w = path.with_name(path.name.replace('_FLAIR', '_T1w'))
    name = path.name.split('.', maxsplit=1)[0].replace('-', '_')
    return Node(CachePair(flair=str(path), t1w=str(t1w), slice_mm=slice_mm), name=f'cache_{name}')
