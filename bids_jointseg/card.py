"""A model's card: what a model file holds, in JSON, readable without PyTorch.

A model is two files side by side: ``NAME.safetensors`` with the weights and ``NAME.json`` with
its card (architecture, classes, modalities, grid, normalisation, training data, licence, SHA-256
of the weights, measured accuracy). Nothing is unpickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bids_jointseg.labels import CLASSES

MODELS = Path(__file__).parent / 'data' / 'models'
MODALITIES = ('T1w', 'FLAIR')


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
    temperature
        Probabilities are sharpened (below 1) or softened (above 1) by it: fitted on validation
        people, so that of the voxels to which 80 % is given 80 % are right.
    repeatability
        Label (or `brain`) -> half of the 95 % interval of its volume, in units of the volume
        that the probabilities leave in doubt: fitted on validation people scanned "twice".
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
    temperature: float = 1.0
    repeatability: dict[str, float] = field(default_factory=dict)
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

    def to_json(self) -> str:
        """Return the card as indented JSON."""
        record = asdict(self)
        del record['path']
        return json.dumps(record, indent=2, ensure_ascii=False) + '\n'


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
    if '/' in str(model) or Path(model).suffix:
        path = Path(model).with_suffix('.json')
    elif not path.is_file():
        known = ', '.join(sorted(file.stem for file in MODELS.glob('*.json'))) or 'none'
        raise ModelError(
            f'model {str(model)!r} is not in the package ({known}): give a path to one'
        )
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise ModelError(f'{path}: cannot read the model card ({error.strerror})') from error
    except ValueError as error:
        raise ModelError(f'{path}: the model card is not JSON ({error})') from error
    try:
        unknown = set(record) - {entry.name for entry in fields(ModelCard)}
        if unknown:
            raise TypeError(f'unknown entries {sorted(unknown)}')
        for name in ('modalities', 'classes', 'slice_mm', 'window'):
            if record.get(name) is not None:
                record[name] = tuple(record[name])
        card = ModelCard(**record | {'path': path})
        if card.classes != CLASSES:
            raise TypeError(f'classes are {list(card.classes)}, not {list(CLASSES)}')
        if not card.modalities or not set(card.modalities) <= set(MODALITIES):
            raise TypeError(f'modalities are {list(card.modalities)}')
        if not (card.in_plane_mm > 0 and 0 < card.slice_mm[0] <= card.slice_mm[1]):
            raise TypeError('the grid is not a positive size')
        if not card.temperature > 0:
            raise TypeError(f'temperature is {card.temperature}, not above zero')
        if card.window is not None and not (len(card.window) == 3 and min(card.window) > 0):
            raise TypeError(f'window is {list(card.window)}, not three sizes')
    except (TypeError, IndexError) as error:
        raise ModelError(f'{path}: not a model card of this version: {error}') from error
    return card
