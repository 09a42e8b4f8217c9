"""What the documents show can be done as it is written there."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from bids_jointseg import quality, recipe, sampling, training

ROOT = Path(__file__).parents[1]
TRAINING = (ROOT / 'docs' / 'training.md').read_text(encoding='utf-8')


def block(language):
    return re.search(rf'^```{language}\n(.*?)^```', TRAINING, re.DOTALL | re.MULTILINE)[1]


@pytest.mark.parametrize('smoke', [False, True])
def test_the_example_is_a_recipe(tmp_path, smoke):
    file = tmp_path / 'mine.toml'
    file.write_text(block('toml'))
    (tmp_path / 'tissue.tsv').write_text(block('tsv'))
    read = recipe.read_recipe(file, smoke=smoke)
    assert [source.stream for source in read.datasets] == ['tissue', 'lesions']
    training.Settings(read.architecture, **recipe.tuples(read.training))
    sampling.Settings(**recipe.tuples(read.samples))


@pytest.mark.parametrize(
    ('heading', 'kind'),
    [
        ('At the top', recipe.Recipe),
        ('`[[datasets]]`', recipe.Source),
        ('`[training]`', training.Settings),
        ('`[samples]`', sampling.Settings),
    ],
)
def test_every_field_of_a_recipe_is_explained(heading, kind):
    table = TRAINING.split(f'\n{heading}')[1].split('\n\n')[1]
    rows = [line.split('|')[1] for line in table.splitlines()[2:]]
    explained = {name for row in rows for name in re.findall(r'`(\w+)`', row)}
    # Tables of their own, and what the top of a recipe says of the model.
    elsewhere = {'datasets', 'training', 'samples'}
    if kind is training.Settings:
        elsewhere = {'architecture', 'modalities'}
    assert explained == {entry.name for entry in fields(kind)} - elsewhere


def test_every_rule_of_the_quality_control_is_explained():
    text = (ROOT / 'docs' / 'quality.md').read_text(encoding='utf-8')
    for rule in quality.RULES:
        limits = ['' if limit is None else f'{limit:g}' for limit in (rule.check, rule.fail)]
        side = 'above' if rule.above else 'below'
        assert f'| `{rule.measure}` | {side} | {limits[0]} | {limits[1]} |' in text, rule.measure
