"""A training recipe: which data say what, and how long to learn from them. TOML, no torch."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bids_jointseg.labels import PROTOCOLS

RECIPES = Path(__file__).parent / 'data' / 'recipes'
ROLES = ('tissue', 'lesions', 'unlabelled')


class RecipeError(ValueError):
    """A recipe or its data cannot be used; one line that names the file and the remedy."""


@dataclass(frozen=True)
class Source:
    """One dataset of a recipe.

    Attributes
    ----------
    name
        Its folder under the data folder.
    role
        `tissue`: label maps, with scans or to be painted; `lesions`: masks in MNI space;
        `unlabelled`: pairs of T1w and FLAIR.
    protocol
        What its labels say (:data:`bids_jointseg.labels.PROTOCOLS`).
    annotation, image
        Patterns below the dataset's folder; `{subject}` in `image` is that of the annotation.
    validation, test
        Subjects that nothing is learned from.
    """

    name: str
    role: str
    protocol: str = ''
    annotation: str = ''
    image: str = ''
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def part(self, subject: str) -> str:
        """Return `test`, `validation` or `train`."""
        parts = {'test': self.test, 'validation': self.validation}
        return next((part for part, people in parts.items() if subject in people), 'train')


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; `training` and `samples` are the arguments of their settings."""

    name: str
    version: str
    licence: str
    architecture: dict[str, Any]
    datasets: tuple[Source, ...]
    modalities: tuple[str, ...] = ('T1w', 'FLAIR')
    in_plane_mm: float = 1.0
    slice_mm: tuple[float, float] = (1.0, 1.0)
    window: tuple[int, int, int] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)


def tuples(record: dict[str, Any]) -> dict[str, Any]:
    """Return a TOML table with its arrays as tuples, as frozen settings hold them."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}


def subject_of(path: Path) -> str:
    """Return the subject label of a BIDS file name."""
    return path.name.split('_', maxsplit=1)[0].removeprefix('sub-')


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe: a file, or the name of one in the package.

    Raises
    ------
    RecipeError
        If it cannot be read or does not say what a recipe must.
    """
    file = Path(path)
    if not file.suffix:
        file = RECIPES / f'{path}.toml'
    try:
        record = tomllib.loads(file.read_text(encoding='utf-8'))
    except OSError as error:
        raise RecipeError(f'{file}: cannot read the recipe ({error.strerror})') from error
    except ValueError as error:
        raise RecipeError(f'{file}: not TOML: {error}') from error
    try:
        record['datasets'] = tuple(
            Source(**tuples(source)) for source in record.get('datasets', ())
        )
        recipe = Recipe(**tuples(record))
    except TypeError as error:
        known = ', '.join(entry.name for entry in fields(Recipe))
        raise RecipeError(f'{file}: {error}; a recipe has {known}') from error
    for source in recipe.datasets:
        if source.role not in ROLES:
            raise RecipeError(f'{file}: role {source.role!r} is not one of {", ".join(ROLES)}')
        if source.role == 'tissue' and source.protocol not in PROTOCOLS:
            known = ', '.join(PROTOCOLS)
            raise RecipeError(f'{file}: protocol {source.protocol!r} is not one of {known}')
    return recipe
