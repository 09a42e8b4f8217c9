"""A training recipe: which data say what, and how long to learn from them. TOML, no torch.

A recipe declares datasets; what each is good for follows from what its annotation tells apart
(:class:`bids_jointseg.labels.Protocol`). A dataset whose labels are to be hidden from the
training names what it `tells`; one that nothing is learned from names its people in `test`.
"""

from __future__ import annotations

import logging
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, get_type_hints

from bids_jointseg.config import convert
from bids_jointseg.labels import Protocol, ProtocolError, protocol

LOGGER = logging.getLogger('bids_jointseg')
RECIPES = Path(__file__).parent / 'data' / 'recipes'
SUFFIXES = ('dseg', 'mask')
CHOICES = {
    'optimiser': ('adam', 'adamw'),
    'schedule': ('polynomial', 'constant'),
    'overlap': ('soergel', 'tanimoto'),
}
"""Of settings that are one of a few words."""
ABOVE_ZERO = (
    'steps', 'batch', 'rate', 'clip', 'consistency_every', 'lesions_every', 'validate_every',
)  # fmt: skip
SHARES = (
    'average', 'thin_share', 'intact_share', 'lesion_share', 'lesion_centre', 'outside_share',
    'strip_share', 'borrow_share', 'view_share',
)  # fmt: skip
"""Of settings that are a number, those that have a limit beside being at least zero."""
PAINTABLE = ('freesurfer', 'intracranial', 'neuromorphometrics')
"""Protocols of which :mod:`bids_jointseg.synth` knows what tissue every label is."""


class RecipeError(ValueError):
    """A recipe or its data cannot be used; one line that names the file and the remedy."""


@dataclass(frozen=True)
class Source:
    """One dataset of a recipe.

    Attributes
    ----------
    name
        What the logs and the tables call it.
    root
        Its folder below the data folder, by default its name; may be absolute.
    modalities
        Scans that are read.
    painted
        Modalities that are painted from the label map, instead of scans or beside them.
    annotation
        Folder of the label maps, below `root` ('.' is `root` itself); '' says that there are
        none.
    suffix
        Of the label maps: 'dseg' or 'mask'.
    entities
        More entities of the label maps: ``{'desc': 'manual'}``; an empty value asks for files
        without the entity.
    protocol
        What the labels say: a name in :data:`bids_jointseg.labels.PROTOCOLS`, or a table (.tsv)
        beside the recipe.
    tells
        The classes that the training is told apart; by default all that the protocol does.
    lesion_masks
        The annotation is masks in MNI152 space whose lesions are painted into other datasets.
    lesions
        Whether those lesions are painted into this dataset, where it is painted.
    loose_edges
        Its labels meet elsewhere than those of the other datasets: a voxel at the border of two
        may be of either, and where exactly it lies is learned from the others. Lesions are
        exact.
    share
        Weight among the datasets of its stream; by default the number of its scans.
    validation, test
        Subjects that nothing is learned from, without ``sub-``; '*' is everybody.
    """

    name: str
    root: str = ''
    modalities: tuple[str, ...] = ()
    painted: tuple[str, ...] = ()
    annotation: str = ''
    suffix: str = 'dseg'
    entities: dict[str, str] = field(default_factory=dict)
    protocol: str = ''
    tells: tuple[str, ...] = ()
    lesion_masks: bool = False
    lesions: bool = True
    loose_edges: bool = False
    share: float | None = None
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, 'root', self.root or self.name)
        set_(self, 'entities', {key: str(value) for key, value in self.entities.items()})
        for part in ('validation', 'test'):
            people = tuple(str(label).removeprefix('sub-') for label in getattr(self, part))
            set_(self, part, people)

    @property
    def labels(self) -> Protocol | None:
        """What the training is told; None without an annotation.

        Raises
        ------
        ProtocolError
            If there is no such protocol or class.
        """
        if not self.annotation:
            return None
        full = protocol(self.protocol)
        return full.restricted(self.tells) if self.tells else full

    @property
    def stream(self) -> str:
        """`lesions` where lesions are told, `tissue` where only tissue is, else `unlabelled`.

        Masks that are only painted into other datasets are `masks`.
        """
        labels = self.labels
        if self.lesion_masks:
            return 'masks'
        if labels is None:
            return 'unlabelled'
        return 'lesions' if labels.tells_lesions else 'tissue'


@dataclass(frozen=True)
class TrainingSettings:
    """What a recipe says about the optimisation.

    Attributes
    ----------
    steps
        Iterations.
    batch
        Samples of each stream in an iteration, in each process.
    optimiser, rate, betas, decay
        `adam` or `adamw`.
    schedule
        `polynomial`: 100 iterations of warm-up, then the rate falls to zero (power 0.9);
        `constant`.
    clip
        Largest norm of a gradient.
    overlap
        `soergel` or `tanimoto`.
    entropy_weight
        Of the cross-entropy beside the overlap.
    consistency_from, consistency_every
        Warm-up of what asks two answers to agree, and the iterations between two unlabelled terms.
    steadiness
        Weight, after the warm-up, of the agreement in tissue between two acquisitions of each
        window, which differ in contrast, coil and noise. Both learn what is annotated. 0 acquires
        it once.
    lesions_every
        Iterations between two batches of the people whose annotation tells lesions, where there
        are others whose tissue is told: every iteration has one of these.
    subsets
        Sets of modalities whose answer is compared with that of all; by default every one.
    stop_gradient
        The answer of all modalities teaches that of a subset and learns nothing from it.
    spare_lesions
        Leave lesion voxels out of these agreements.
    supervise_subsets
        Lesions are learned from the subset as well.
    average
        Decay of the moving average of the weights, which is what is exported; 0 takes the last.
    validate_every, patience
        Iterations between two looks at the validation people (and checkpoints), and how many
        looks without a better score end the training, which then exports the best weights; 0
        never ends it early.
    seed
        Of weights and samples.
    init
        Name or card of a model to start from, or '' to start from random weights. A U-Net may
        have more channels than that model.
    """

    steps: int = 5000
    batch: int = 1
    optimiser: str = 'adamw'
    rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float = 1e-4
    schedule: str = 'polynomial'
    clip: float = 5.0
    overlap: str = 'soergel'
    entropy_weight: float = 1.0
    consistency_from: int = 800
    consistency_every: int = 8
    steadiness: float = 0.0
    lesions_every: int = 1
    subsets: tuple[tuple[str, ...], ...] = ()
    stop_gradient: bool = False
    spare_lesions: bool = True
    supervise_subsets: bool = True
    average: float = 0.997
    validate_every: int = 100
    patience: int = 0
    seed: int = 2019
    init: str = ''


@dataclass(frozen=True)
class SampleSettings:
    """What a recipe says about samples.

    Attributes
    ----------
    window
        Voxels, slices last.
    thin_window, thin_share
        The same for slices as thin as voxels are wide, and how often these are made of an
        isotropic scan.
    augment
        Bend, turn and degrade what is sampled. Without, windows are cut out as they are.
    intact_share
        How often a person who has scans is shown upright, without anything that degrades these:
        as sharp as the scans to come. Thick slices are still made of isotropic ones.
    lesion_share
        How often lesions are painted into a person who is painted.
    lesion_centre
        How often a window is centred at a lesion, give or take `dilate_mm`.
    outside_share
        How often it shows face or neck.
    strip_share, borrow_share
        How often a painted head loses its skull, a skull-stripped one gets another's.
    view_share
        How often a scan ends within the window.
    coil
        Largest standard deviation of the logarithm of a coil's sensitivity.
    contrast_spread
        How far the contrasts of painted scans stray: 0 is one scanner with one protocol.
    contrast_steps
        Iterations in which they spread from one scanner's to `contrast_spread`.
    coarse_steps, coarse_window
        Iterations, the first, with voxels twice as large in windows of so many of them, never of
        thick slices: random weights learn there what a head looks like, in a fraction of the
        time.
    modalities
        Sets of modalities and their weights, of those that a person has.
    """

    window: tuple[int, int, int] = (112, 128, 32)
    thin_window: tuple[int, int, int] = (96, 112, 48)
    thin_share: float = 0.5
    augment: bool = True
    intact_share: float = 0.0
    lesion_share: float = 0.7
    lesion_centre: float = 0.7
    dilate_mm: float = 16.0
    outside_share: float = 0.2
    strip_share: float = 0.4
    borrow_share: float = 0.4
    view_share: float = 0.15
    coil: float = 0.18
    contrast_spread: float = 1.0
    contrast_steps: int = 0
    coarse_steps: int = 0
    coarse_window: tuple[int, int, int] = (64, 80, 40)
    modalities: tuple[tuple[tuple[str, ...], float], ...] = (
        (('T1w',), 0.35),
        (('FLAIR',), 0.2),
        (('T1w', 'FLAIR'), 0.45),
    )


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Attributes
    ----------
    name, version, licence
        Of the model.
    architecture, modalities, in_plane_mm, slice_mm, window
        See :class:`bids_jointseg.card.ModelCard`.
    datasets
        In the order of the file.
    landmarks
        Histogram scaling (Nyul) before the intensities become zero mean and unit variance.
    folds
        Trainings, each with other people for validation and test.
    fractions
        Of the people in training, validation and test.
    split_seed
        Another one splits other people.
    training, samples
        See there.
    """

    name: str
    version: str
    licence: str
    architecture: dict[str, Any]
    datasets: tuple[Source, ...]
    modalities: tuple[str, ...] = ('T1w', 'FLAIR')
    in_plane_mm: float = 1.0
    slice_mm: tuple[float, float] = (1.0, 1.0)
    window: tuple[int, int, int] | None = None
    landmarks: bool = False
    folds: int = 1
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    split_seed: int = 0
    training: TrainingSettings = TrainingSettings()
    samples: SampleSettings = SampleSettings()

    def split(
        self, people: Mapping[str, Iterable[str]], fold: int = 0
    ) -> dict[str, dict[str, str]]:
        """Say what each person is used for, whatever the number of their scans.

        Datasets of one `root` show the same people. Where one of these lists people, they are
        used so in all folds, and the others are in training; so are all where nothing is
        annotated. Otherwise people are shuffled, the same way for the same folder, and the parts
        move on from fold to fold, so that the test people of two folds differ wherever
        ``folds * fractions[2] <= 1``.

        Parameters
        ----------
        people
            Dataset -> labels without ``sub-``, in any order.
        fold
            From 0.

        Returns
        -------
        dict[str, dict[str, str]]
            Dataset -> subject, in the order of their labels -> `train`, `validation` or `test`.

        Raises
        ------
        RecipeError
            If there are too few people for the parts.
        """
        if not 0 <= fold < self.folds:
            raise ValueError(f'no fold {fold} of {self.folds}')
        found = {}
        for root in dict.fromkeys(source.root for source in self.datasets):
            sources = [s for s in self.datasets if s.root == root and s.name in people]
            together = sorted({person for s in sources for person in people[s.name]})
            parts = self._split_root(sources, together, fold) if sources else {}
            for source in sources:
                found[source.name] = {
                    person: parts[person] for person in sorted(set(people[source.name]))
                }
        return found

    def _split_root(self, sources: list[Source], people: list[str], fold: int) -> dict[str, str]:
        """Split the people of the datasets in one folder."""
        listed = {
            'test': {person for source in sources for person in source.test},
            'validation': {person for source in sources for person in source.validation},
        }
        if any(listed.values()) or all(source.stream == 'unlabelled' for source in sources):
            unknown = sorted((listed['test'] | listed['validation']) - {*people, '*'})
            if unknown:
                LOGGER.warning(
                    '%s: the recipe lists %s for validation or test: not in the dataset',
                    sources[0].root, ', '.join(unknown),
                )  # fmt: skip
            return {
                person: next(
                    (part for part, labels in listed.items() if {person, '*'} & labels), 'train'
                )
                for person in people
            }
        # A hash rather than a random generator: one more person moves few of the others.
        key = f'{self.split_seed}/{sources[0].root}/'
        shuffled = sorted(people, key=lambda person: sha256(f'{key}{person}'.encode()).digest())
        sizes = [
            max(1, round(fraction * len(people))) if fraction else 0
            for fraction in self.fractions[:0:-1]
        ]
        if sum(sizes) > len(people) or (self.fractions[0] and sum(sizes) == len(people)):
            raise RecipeError(
                f'{sources[0].name}: {len(people)} people are too few for training, validation '
                'and test: list people under `validation` and `test` of the dataset'
            )
        first = len(people) * fold // self.folds
        shuffled = shuffled[first:] + shuffled[:first]
        parts = ['test'] * sizes[0] + ['validation'] * sizes[1]
        parts += ['train'] * (len(people) - len(parts))
        return dict(zip(shuffled, parts, strict=True))


def are_cubes(in_plane_mm: float, slice_mm: tuple[float, float]) -> bool:
    """Return whether slices are as thick as voxels are wide, nearly, whatever the scan."""
    return in_plane_mm < 1.5 * slice_mm[0] and slice_mm[1] < 1.5 * in_plane_mm


def tuples(value: Any) -> Any:
    """Return what TOML gives with its arrays as tuples, as frozen settings hold them."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def read_recipe(name_or_path: str | Path, *, smoke: bool = False) -> Recipe:
    """Read a recipe: a file, or the name of one in the package.

    Parameters
    ----------
    name_or_path
        ``jointseg``, or ``/data/mine.toml``.
    smoke
        Take the table ``[smoke]`` over the rest: the same training on the same data, but so
        small that it is a trial.

    Raises
    ------
    RecipeError
        If it cannot be read or does not say what a recipe must.
    """
    file = Path(name_or_path)
    if not file.suffix:
        file = RECIPES / f'{name_or_path}.toml'
    try:
        record = tomllib.loads(file.read_text(encoding='utf-8'))
    except OSError as error:
        known = ', '.join(sorted(path.stem for path in RECIPES.glob('*.toml')))
        raise RecipeError(
            f'{file}: cannot read the recipe ({error.strerror}): '
            f'give a TOML file, or one of {known}'
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f'{file}: not TOML: {error}') from error
    overrides = record.pop('smoke', {})
    if smoke:
        if not overrides:
            raise RecipeError(f'{file}: no table [smoke]: say in it what is small in a trial')
        record = _merge(record, overrides)
    entries = record.pop('datasets', [])
    if not isinstance(entries, list):
        raise RecipeError(f'{file}: a single [datasets]: write each dataset as [[datasets]]')
    try:
        sources = tuple(_source(tuples(entry), file.parent) for entry in entries)
        tables = {
            name: _table(kind, name, record.pop(name, {}))
            for name, kind in (('training', TrainingSettings), ('samples', SampleSettings))
        }
        recipe = _build(Recipe, 'a recipe', {**tuples(record), **tables, 'datasets': sources})
        init = recipe.training.init
        if init.endswith(('.json', '.safetensors')):  # beside the recipe
            init = str(file.parent.absolute() / init)
            recipe = replace(recipe, training=replace(recipe.training, init=init))
        _check(recipe)
    except ValueError as error:
        raise RecipeError(f'{file}: {error}') from error
    except (TypeError, AttributeError) as error:
        raise RecipeError(f'{file}: a value is of the wrong kind ({error})') from error
    return recipe


def _merge(record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `record` with some values changed, table by table."""
    return record | {
        key: _merge(record[key], value)
        if isinstance(value, dict) and isinstance(record.get(key), dict)
        else value
        for key, value in changes.items()
    }


def _build(kind: Any, what: str, record: dict[str, Any]) -> Any:
    """Make a dataclass of a table; a name that it does not have is an error that lists them."""
    known = [entry.name for entry in fields(kind)]
    unknown = [key for key in record if key not in known]
    if unknown:
        raise RecipeError(f'unknown: {", ".join(unknown)}; {what} has {", ".join(known)}')
    missing = [
        entry.name
        for entry in fields(kind)
        if entry.default is MISSING
        and entry.default_factory is MISSING
        and entry.name not in record
    ]
    if missing:
        raise RecipeError(f'{what} has to say {", ".join(missing)}')
    return kind(**record)


def _table(kind: Any, name: str, table: Any) -> Any:
    """Make settings of a table, whose values have to be of the kinds that these declare."""
    what = f'[{name}]'
    if not isinstance(table, dict):
        raise RecipeError(f'{name} is {table!r}: write it as a table {what}')
    hints = get_type_hints(kind)
    values = {
        key: convert(f'{what} {key}', value, hints[key]) if key in hints else value
        for key, value in table.items()
    }
    return _build(kind, what, values)


def _source(record: dict[str, Any], folder: Path) -> Source:
    """Make a dataset of its table; its protocol may be a file beside the recipe."""
    source: Source = _build(Source, 'a dataset', record)
    for key in ('modalities', 'painted', 'tells', 'validation', 'test'):
        if isinstance(record.get(key), str):
            raise RecipeError(f'{source.name}: {key} is {record[key]!r}: give a list')
    if source.protocol.endswith('.tsv'):
        return replace(source, protocol=str(folder.absolute() / source.protocol))
    return source


def _check(recipe: Recipe) -> None:
    """Refuse what contradicts itself, in one line."""
    names = [source.name for source in recipe.datasets]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise RecipeError(f'two datasets are called {", ".join(sorted(doubled))}')
    if not names:
        raise RecipeError('no dataset: declare each in a table [[datasets]]')
    for name in (recipe.name, *names):  # files are called after them
        if not re.fullmatch(r'\w[\w .+-]*', name):
            raise RecipeError(f'name is {name!r}: give letters, digits, and -, +, . or _ between')
    if recipe.folds < 1:
        raise RecipeError(f'folds is {recipe.folds}: give a number from 1')
    good = len(recipe.fractions) == 3 and min(recipe.fractions) >= 0
    if not good or abs(sum(recipe.fractions) - 1) > 1e-6:
        raise RecipeError(
            f'fractions is {list(recipe.fractions)}: give those of training, validation and '
            'test, together 1'
        )
    for key, choices in CHOICES.items():
        if getattr(recipe.training, key) not in choices:
            value = getattr(recipe.training, key)
            raise RecipeError(f'[training] {key} is {value!r}: choose {" or ".join(choices)}')
    for table, settings in (('training', recipe.training), ('samples', recipe.samples)):
        for entry in fields(settings):
            _check_number(table, entry.name, getattr(settings, entry.name))
    if recipe.training.steadiness and not recipe.samples.augment:
        raise RecipeError(
            '[training] steadiness acquires a window twice, which [samples] augment = false '
            'forbids: leave one of them out'
        )
    for source in recipe.datasets:
        try:
            _check_source(source, recipe)
        except ProtocolError as error:
            raise RecipeError(f'{source.name}: {error}') from error
    streams = [source.stream for source in recipe.datasets]
    for source, stream in zip(recipe.datasets, streams, strict=True):
        alone = streams.count(stream) == 1
        if source.share is not None and (alone or stream == 'masks'):
            why = 'no other dataset is of the stream' if alone else 'each patient counts alike in'
            raise RecipeError(
                f'{source.name}: share is {source.share}, but {why} {stream!r}: leave it out'
            )


def _check_number(table: str, key: str, value: Any) -> None:
    """Refuse a number that its setting cannot be; other values pass."""
    if type(value) not in (int, float):
        return
    limits, good = 'from 0', 0 <= value < math.inf
    if key in ABOVE_ZERO:
        limits, good = 'above 0', 0 < value < math.inf
    elif key in SHARES:
        limits, good = 'from 0 to 1', 0 <= value <= 1
    if not good:
        raise RecipeError(f'[{table}] {key} is {value}: give a number {limits}')


def _check_source(source: Source, recipe: Recipe) -> None:
    name, modalities = source.name, recipe.modalities
    for key in ('modalities', 'painted'):
        foreign = [item for item in getattr(source, key) if item not in modalities]
        if foreign:
            known = ', '.join(modalities)
            raise RecipeError(f'{name}: {key} has {", ".join(foreign)}: the model has {known}')
    if source.suffix not in SUFFIXES:
        raise RecipeError(f'{name}: suffix is {source.suffix!r}: choose {" or ".join(SUFFIXES)}')
    if source.painted and source.annotation and source.protocol not in PAINTABLE:
        *others, last = PAINTABLE
        raise RecipeError(
            f'{name}: scans are painted from the protocols {", ".join(others)} and {last} alone'
        )
    fine = recipe.in_plane_mm == 1 or are_cubes(recipe.in_plane_mm, recipe.slice_mm)
    if source.painted and not fine:
        raise RecipeError(
            f'{name}: thick slices are painted at 1 mm: set in_plane_mm = 1.0, or slice_mm as '
            'large as in_plane_mm'
        )
    both = sorted(set(source.validation) & set(source.test))
    if both:
        raise RecipeError(f'{name}: {", ".join(both)} in validation and in test')
    if source.share is not None and source.share <= 0:
        raise RecipeError(f'{name}: share is {source.share}: give a number above 0')
    if bool(source.annotation) != bool(source.protocol):
        raise RecipeError(
            f'{name}: give both annotation, the folder of its label maps, and protocol, what '
            'they say, or neither'
        )
    labels = source.labels
    if labels is None:
        if source.lesion_masks or source.painted or source.tells:
            raise RecipeError(f'{name}: without annotation there is nothing to paint or to tell')
        if not source.modalities:
            raise RecipeError(f'{name}: neither modalities nor annotation: nothing is read of it')
    elif source.lesion_masks:
        if not labels.tells_lesions:
            raise RecipeError(f'{name}: lesion_masks: the protocol tells no lesions')
        if source.modalities or source.painted:
            raise RecipeError(f'{name}: lesion_masks are painted into others: no modalities')
    elif not (source.modalities or source.painted):
        raise RecipeError(f'{name}: name the modalities that are read, or painted')
    elif not (labels.tells_lesions or labels.tells_tissue):
        raise RecipeError(f'{name}: the protocol tells no classes apart')
