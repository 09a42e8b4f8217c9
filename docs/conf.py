"""The site that these pages build: ``make docs``, without a network, into ``site/``.

Two directives fill in what would go stale if it were written by hand: the options of a command,
from its parser, and the cards of the models in the package.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from docutils import nodes
from pygments.lexers.special import TextLexer
from safetensors import safe_open
from sphinx.util.docutils import SphinxDirective

from bids_jointseg import __version__
from bids_jointseg.card import MODELS, read_card

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sphinx.application import Sphinx

project = 'bids_jointseg'
author = 'The bids_jointseg developers'
copyright = author  # noqa: A001 - Sphinx reads it by this name
release = version = __version__

extensions = ['myst_parser']
myst_heading_anchors = 3
exclude_patterns = ['site']
smartquotes = False

html_theme = 'furo'
html_title = f'bids_jointseg {release}'
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {'navigation_with_keys': False}
html_static_path = ['site.css']
html_css_files = ['site.css']
pygments_style = 'default'


def help_of(command: str) -> str:
    """Return what a command of the package answers to ``--help``."""
    (found,) = entry_points(group='console_scripts', name=command)
    answer = io.StringIO()
    width = os.environ.get('COLUMNS')
    os.environ['COLUMNS'] = '92'
    try:
        with contextlib.redirect_stdout(answer), contextlib.suppress(SystemExit):
            found.load()(['--help'])
    finally:
        os.environ.pop('COLUMNS')
        os.environ |= {} if width is None else {'COLUMNS': width}
    return answer.getvalue()


def card_page(name: str) -> str:
    """Return the card of a model of the package in Markdown."""
    card = read_card(name)
    with safe_open(card.weights, framework='numpy') as weights:
        sizes = [math.prod(weights.get_slice(key).get_shape()) for key in weights.keys()]
    low, high = card.slice_mm
    facts = {
        'Name, version': f'{card.name} {card.version}',
        'Licence of the weights': card.licence,
        'Network': _words(card.architecture).removeprefix('name '),
        'Parameters': f'{sum(sizes):,}'.replace(',', ' '),
        'Takes': ', '.join(card.modalities) + '; any of them may be missing',
        'Tells apart': ', '.join(card.classes),
        'Voxels': f'{card.in_plane_mm:g} mm within slices, slices of {low:g} to {high:g} mm',
        'Windows': 'whole volumes'
        if card.window is None
        else ' x '.join(map(str, card.window)) + ' voxels',
        'Histogram scaling': 'none' if card.landmarks is None else 'landmarks in the card',
        'Added to logits': _words(card.bias) or 'nothing',
        'Temperature': f'{card.temperature:g}'
        + ('' if 'calibration' in card.accuracy else ': probabilities are not calibrated'),
        'Half of an interval, per volume in doubt': _words(card.repeatability)
        or 'none: volumes come without intervals',
        'Weights': f'`{card.weights.name}`, SHA-256 `{card.sha256}`',
    }
    lines = [f'## {name}', '', _table(['', name], [[key, value] for key, value in facts.items()])]
    for title, part in (
        ('Training', card.training),
        ('Accuracy', card.accuracy),
        ('Earlier releases', {str(i): entry for i, entry in enumerate(card.history, start=1)}),
    ):
        if part:
            lines += ['', f'### {title} of {name}', '', _described(part)]
    return '\n'.join(lines)


def _described(record: Mapping[str, Any]) -> str:
    """Return a part of a card: measures of sets as a table, the rest as a list."""
    listed, tables = [], []
    for key, value in record.items():
        rows = {name: _flat(row) for name, row in value.items()} if _is_table(value) else {}
        if rows:
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            body = [[name, *(row.get(c, '-') for c in columns)] for name, row in rows.items()]
            tables += ['', f'{key}:', '', _table(['', *columns], body)]
        elif isinstance(value, dict):
            listed += [f'- {key}:', *(f'  - {k}: {_counted(v)}' for k, v in value.items())]
        else:
            listed.append(f'- {key}: {_counted(value)}')
    return '\n'.join([*listed, *tables])


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(row, dict) for row in value.values())


def _flat(row: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in row.items():
        found |= _flat(value) if isinstance(value, dict) else {key: _words(value)}
    return found


def _counted(value: object) -> str:
    count = f' ({len(value)})' if isinstance(value, list) and len(value) > 1 else ''
    return _words(value) + count


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ', '.join(f'{key} {_words(item)}' for key, item in value.items())
    if isinstance(value, list | tuple):
        return ', '.join(map(_words, value))
    return value if isinstance(value, str) else json.dumps(value)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)


class CommandHelp(SphinxDirective):
    """``{command-help}`` with the name of a command: its options, from its own parser."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the help as it stands on a terminal."""
        text = help_of(self.arguments[0])
        block = nodes.literal_block(text, text, language='text')
        return [block]


class ModelCards(SphinxDirective):
    """``{model-cards}``: what the cards of all models in the package say."""

    def run(self) -> list[nodes.Node]:
        """Return one section for each model."""
        found: list[nodes.Node] = []
        for path in sorted(MODELS.glob('*.json')):
            self.env.note_dependency(str(path))
            found += self.parse_text_to_nodes(card_page(path.stem), allow_section_headings=True)
        return found


def setup(app: Sphinx) -> None:
    """Add the directives, and a name for tables that are shown as they are."""
    app.add_lexer('tsv', TextLexer)
    app.add_directive('command-help', CommandHelp)
    app.add_directive('model-cards', ModelCards)
