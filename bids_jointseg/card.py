"""A model's card: what a model file holds, in JSON, readable without PyTorch.

A model is two files side by side: ``NAME.safetensors`` with the weights and ``NAME.json`` with
its card (architecture, classes, modalities, grid, normalisation, training data, licence, SHA-256
of the weights, measured accuracy). Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from bids_jointseg.config import SettingsError, convert
from bids_jointseg.labels import CLASSES

MODELS = Path(__file__).parent / 'data' / 'models'
FIRST_LOOKS = ('locator', 'intracranial')
"""Models in the package that tell a model where to look (:mod:`.locator`) and segment nothing."""
MODALITIES = ('T1w', 'FLAIR')
LANDMARKS = 11
"""Landmarks of a modality: one for each of :data:`.image.PERCENTILES`."""


class ModelError(ValueError):
    """A model file or its card cannot be used; one line that names the file and the remedy."""


@dataclass(frozen=True)
class ModelCard:
    """What a model file holds.

    Attributes
    ----------
    name, version
        As released.
    architecture
        ``{'name': 'unet' | 'highresnet', ...}``: the arguments of the network's constructor.
    classes
        Abbreviations in channel order.
    modalities
        BIDS suffixes that the network has a branch for; any non-empty subset may be given.
    in_plane_mm
        Voxel size of the model's grid within a slice.
    slice_mm
        Smallest and largest slice distance that the model was trained for: a scan's own slices
        are kept where their distance lies between the two.
    window
        Voxels of the windows that the network is used on, or None for whole volumes.
    bias
        Modalities given, as `T1w+FLAIR` -> class -> added to its logit (0 where none is named):
        how ready the model is to see the class depends on what it is shown. Fitted on validation
        people.
    temperature
        Probabilities are sharpened (below 1) or softened (above 1) by it: fitted on validation
        people, so that of the voxels to which 80 % is given 80 % are right.
    repeatability
        Scans as :func:`.interfaces.acquisition` calls them -> label (or `brain`) -> half of the
        95 % interval of its volume, in units of the volume that the probabilities leave in doubt:
        fitted on validation people scanned "again".
    landmarks
        Modality -> intensities at the percentiles of histogram scaling, or None for none.
    licence
        Licence of the weights.
    sha256
        Of the safetensors file.
    training, accuracy, history
        How it was made, what was measured on people never trained on, and earlier releases.
    path
        Where the card was read from.
    """

    name: str
    version: str
    architecture: dict[str, Any]
    modalities: tuple[str, ...] = MODALITIES
    classes: tuple[str, ...] = CLASSES
    in_plane_mm: float = 1.0
    slice_mm: tuple[float, float] = (1.0, 1.0)
    window: tuple[int, int, int] | None = None
    bias: dict[str, dict[str, float]] = field(default_factory=dict)
    temperature: float = 1.0
    repeatability: dict[str, dict[str, float]] = field(default_factory=dict)
    landmarks: dict[str, list[float]] | None = None
    licence: str = ''
    sha256: str = ''
    training: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None

    @property
    def weights(self) -> Path:
        """The safetensors file beside the card."""
        if self.path is None:
            raise ModelError(f'model {self.name!r} has not been saved: it has no weights file')
        return self.path.with_suffix('.safetensors')

    def bias_for(self, modalities: Iterable[str]) -> tuple[float, ...]:
        """Return what is added to the logit of each class where these modalities are given."""
        named = self.bias.get(together(modalities), {})
        return tuple(named.get(name, 0.0) for name in self.classes)

    def to_json(self) -> str:
        """Return the card as indented JSON."""
        record = asdict(self)
        del record['path']
        return json.dumps(record, indent=2, ensure_ascii=False) + '\n'


def together(modalities: Iterable[str]) -> str:
    """Return the name of a set of modalities, `T1w+FLAIR`."""
    return '+'.join(sorted(modalities, key=MODALITIES.index))


def read_weights(card: ModelCard) -> bytes:
    """Return the content of a model's safetensors file.

    Raises
    ------
    ModelError
        If it cannot be read or is not the one that the card names.
    """
    try:
        content = card.weights.read_bytes()
    except OSError as error:
        raise ModelError(f'{card.weights}: cannot read the weights ({error.strerror})') from error
    if hashlib.sha256(content).hexdigest() != card.sha256:
        raise ModelError(
            f'{card.weights}: the weights are not those of the card (SHA-256 differs): '
            'get both files again'
        )
    return content


def read_card(model: str | Path = 'jointseg') -> ModelCard:
    """Read the card of a packaged or a user's model.

    Parameters
    ----------
    model
        Name of a model in the package, or path of a card or of the weights beside it.

    Returns
    -------
    ModelCard

    Raises
    ------
    ModelError
        If there is no such model, or its card is not one that this version can use.
    """
    path = MODELS / f'{model}.json'
    if Path(model).name and ('/' in str(model) or Path(model).suffix):
        path = Path(model).with_suffix('.json')
    elif not os.path.isfile(path):
        stems = {file.stem for file in MODELS.glob('*.json')}
        known = ', '.join(sorted(stems - set(FIRST_LOOKS))) or 'none'
        raise ModelError(
            f'model {str(model)!r} is not in the package ({known}): give a path to one'
        )
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise ModelError(f'{path}: cannot read the model card ({error.strerror})') from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f'{path}: the model card is not JSON ({error})') from error
    try:
        if not isinstance(record, dict):
            raise TypeError('not a JSON object')
        hints = get_type_hints(ModelCard)
        unknown = set(record) - set(hints)
        if unknown:
            raise TypeError(f'unknown entries {sorted(unknown)}')
        record.pop('path', None)  # the weights are beside the card, wherever it says
        values = {name: convert(name, value, hints[name]) for name, value in record.items()}
        card = ModelCard(**values, path=path)
        if card.classes != CLASSES:
            raise TypeError(f'classes are {list(card.classes)}, not {list(CLASSES)}')
        if not card.modalities or not set(card.modalities) <= set(MODALITIES):
            raise TypeError(f'modalities are {list(card.modalities)}')
        low, high = card.slice_mm
        if not (0 < card.in_plane_mm < math.inf and 0 < low <= high < math.inf):
            raise TypeError('the grid is not a positive size')
        for name, shifts in card.bias.items():
            given = name.split('+')
            if not set(given) <= set(card.modalities) or together(given) != name:
                raise TypeError(f'bias of {name!r}: give modalities of the model, as "T1w+FLAIR"')
            named = set(shifts) <= set(card.classes)
            if not (named and all(map(math.isfinite, shifts.values()))):
                raise TypeError(f'bias of {name}: not a finite number for each of its classes')
        if not 0 < card.temperature < math.inf:
            raise TypeError(f'temperature is {card.temperature}, not above zero')
        if card.window is not None and min(card.window) <= 0:
            raise TypeError(f'window is {list(card.window)}, not three sizes')
        for name, landmarks in (card.landmarks or {}).items():
            rising = all(low <= high for low, high in pairwise((-math.inf, *landmarks, math.inf)))
            if len(landmarks) != LANDMARKS or not (rising and all(map(math.isfinite, landmarks))):
                raise TypeError(f'landmarks of {name} are not {LANDMARKS} rising numbers')
    except (TypeError, SettingsError) as error:
        raise ModelError(f'{path}: not a model card of this version: {error}') from error
    return card
