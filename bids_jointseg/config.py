"""Settings of a run: one frozen value that is passed around, never global, kept as TOML."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
import uuid
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

ANALYSES = ('participant', 'group')
LEVELS = ('minimal', 'full')
NATIVE_SPACES = ('T1w', 'FLAIR')


class SettingsError(ValueError):
    """A setting has no such name or value; one line that names it."""


@dataclass(frozen=True)
class StandardSpace:
    """A template of TemplateFlow as an output space.

    Attributes
    ----------
    name
        Of the template: 'MNI152NLin2009cAsym'.
    resolution, cohort
        Its indices in TemplateFlow; None where they are not asked for.
    """

    name: str
    resolution: int | None = None
    cohort: int | None = None

    @classmethod
    def parse(cls, text: str) -> StandardSpace:
        """Read fMRIPrep's notation, ``NAME[:res-N][:cohort-N]``.

        Raises
        ------
        SettingsError
            If it is none.
        """
        name, *modifiers = text.split(':')
        indices = [re.fullmatch(r'(res|cohort)-0*(\d{1,4})', item) for item in modifiers]
        values = {match[1]: int(match[2]) for match in indices if match}
        if not re.fullmatch('[A-Za-z0-9]+', name) or len(values) < len(modifiers):
            raise SettingsError(
                f'output_spaces has {text!r}: write T1w, FLAIR, or a template of TemplateFlow as '
                'NAME[:res-N][:cohort-N]'
            )
        return cls(name, values.get('res'), values.get('cohort'))

    def __str__(self) -> str:
        cohort = '' if self.cohort is None else f':cohort-{self.cohort}'
        resolution = '' if self.resolution is None else f':res-{self.resolution}'
        return f'{self.name}{cohort}{resolution}'


def available_cpus() -> int:
    """Return how many processors this process may use (a scheduler may grant fewer than all)."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def new_run_id() -> str:
    """Return a name for this run's logs that sorts by time and that no other run has."""
    return f'{datetime.now():%Y%m%d-%H%M%S}_{uuid.uuid4().hex[:8]}'


@dataclass(frozen=True)
class Settings:
    """All that a user can choose; each field is a command-line option of the same name.

    Attributes
    ----------
    bids_dir, output_dir
        Dataset to read, dataset to write.
    analysis_level
        'participant' or 'group'.
    participant_label, session_label
        Without ``sub-`` and ``ses-``; empty takes all.
    bids_filter_file
        JSON in fMRIPrep's format with the keys ``t1w`` and ``flair``.
    ignore
        Modalities to leave out: 'flair'.
    derivatives
        Name -> folder of precomputed derivatives: a transform found there is not computed again.
    mem
        Memory that may be used at once, in GB; None leaves it to Nipype (90 % of the machine's).
    fast
        One pass of the network per scan, without its mirror image.
    output_spaces
        The native ones, which are always written, and templates: see :class:`StandardSpace`.
    run_id
        Names the log folder of this run.
    """

    bids_dir: Path
    output_dir: Path
    analysis_level: str = 'participant'
    participant_label: tuple[str, ...] = ()
    session_label: tuple[str, ...] = ()
    bids_filter_file: Path | None = None
    bids_database_dir: Path | None = None
    skip_bids_validation: bool = False
    ignore: tuple[str, ...] = ()
    derivatives: dict[str, Path] = field(default_factory=dict)
    model: str = 'jointseg'
    fast: bool = False
    level: str = 'full'
    output_spaces: tuple[str, ...] = NATIVE_SPACES
    random_seed: int = 0
    work_dir: Path = field(default_factory=lambda: Path('work').absolute())
    clean_workdir: bool = False
    nprocs: int = field(default_factory=available_cpus)
    omp_nthreads: int = field(default_factory=lambda: min(8, available_cpus()))
    mem: float | None = None
    device: str = 'auto'
    n_gpu_procs: int = 1
    use_plugin: Path | None = None
    stop_on_first_crash: bool = False
    write_graph: bool = False
    resource_monitor: bool = False
    reports_only: bool = False
    boilerplate_only: bool = False
    dry_run: bool = False
    verbose: int = 0
    notrack: bool = True
    run_id: str = field(default_factory=new_run_id)

    def __post_init__(self) -> None:
        for name, allowed in (
            ('analysis_level', ANALYSES),
            ('level', LEVELS),
            ('ignore', ('flair',)),
        ):
            value = getattr(self, name)
            for item in (value,) if isinstance(value, str) else value:
                if item not in allowed:
                    raise SettingsError(f'{name} is {item!r}: choose from {", ".join(allowed)}')
        _ = self.standard_spaces  # parsed to see whether they can be
        kind, _, number = self.device.partition(':')
        if self.device not in ('auto', 'cpu', 'cuda') and not (
            kind == 'cuda' and number.isdecimal()
        ):
            raise SettingsError(f'device is {self.device!r}: choose auto, cpu, cuda or cuda:N')
        for name in ('nprocs', 'omp_nthreads', 'n_gpu_procs', 'mem'):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingsError(f'{name} is {value}: give a number above zero')
        if not 0 <= self.random_seed < 2**31 - 1:
            raise SettingsError(f'random_seed is {self.random_seed}: give a number from 0')

    @property
    def standard_spaces(self) -> tuple[StandardSpace, ...]:
        """The output spaces beside the native ones, each once."""
        asked = (text for text in self.output_spaces if text not in NATIVE_SPACES)
        return tuple(dict.fromkeys(map(StandardSpace.parse, asked)))

    def to_toml(self) -> str:
        """Return the settings as TOML; what is None is left out."""
        lines = []
        for entry in fields(self):  # derivatives are an inline table, so the order does not matter
            value = getattr(self, entry.name)
            if value is not None:
                lines.append(f'{entry.name} = {_format(value)}\n')
        return ''.join(lines)

    @classmethod
    def from_toml(cls, text: str, **changes: Any) -> Settings:
        """Return the settings of a TOML text, with some changed (the command line's win).

        Raises
        ------
        SettingsError
            If the text is not TOML, or has a name or a value that is not one of a setting.
        """
        try:
            record = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise SettingsError(f'not TOML: {error}') from error
        record.pop('run_id', None)  # a repeated run is another run
        hints = get_type_hints(cls)
        unknown = sorted(set(record) - set(hints))
        if unknown:
            raise SettingsError(f'no such setting: {", ".join(unknown)}')
        values = {name: convert(name, value, hints[name]) for name, value in record.items()}
        return cls(**values | changes)


def _format(value: object) -> str:
    """Write one value as TOML."""
    if isinstance(value, Path | str):
        return json.dumps(str(value), ensure_ascii=False)  # JSON strings are TOML basic strings
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        items = (f'{_format(key)} = {_format(item)}' for key, item in value.items())
        return '{' + ', '.join(items) + '}'
    if isinstance(value, tuple):
        return '[' + ', '.join(map(_format, value)) + ']'
    return repr(value)


def convert(name: str, value: Any, hint: Any) -> Any:
    """Return a value of TOML or JSON as the type that a field declares.

    Raises
    ------
    SettingsError
        If it is of another kind.
    """
    if hint is Any:
        return value
    if isinstance(hint, UnionType):
        if value is None and NoneType in get_args(hint):
            return None
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    kinds = get_args(hint)
    if hint is Path and isinstance(value, str) and '\0' not in value:
        return Path(os.path.abspath(os.path.expanduser(value)))
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if get_origin(hint) is list and isinstance(value, list):
        return [convert(name, item, kinds[0]) for item in value]
    if get_origin(hint) is tuple and isinstance(value, list):
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise SettingsError(f'{name} is {value!r}: give {len(kinds)} of them')
        return tuple(convert(name, item, kind) for item, kind in zip(value, kinds, strict=True))
    if get_origin(hint) is dict and isinstance(value, dict):
        return {key: convert(name, item, kinds[1]) for key, item in value.items()}
    if type(value) is not hint:
        raise SettingsError(f'{name} is {value!r}: not a {getattr(hint, "__name__", hint)}')
    return value
