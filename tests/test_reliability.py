"""The page of what was tried names tests that exist, and counts what they try."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / 'docs' / 'reliability.md').read_text(encoding='utf-8')
ROWS = [
    (int(cells[2]), re.findall(r'`(test_[a-z0-9_]+)`', cells[4]))
    for line in PAGE.split('\n## Faults')[1].splitlines()
    if len(cells := line.split(' | ')) == 4 and (cells := ['', *cells]) and cells[2].isdigit()
]


def test_every_row_counts_what_its_tests_try(request):
    """A test tries once, or once for each parameter, or as often as its mark says."""
    found: Counter[str] = Counter()
    marked = {}
    for item in request.session.items:
        name = getattr(item, 'originalname', item.name)
        found[name] += 1
        mark = item.get_closest_marker('tries')
        if mark is not None:
            marked[name] = mark.args[0]
    assert len(ROWS) > 25
    named = {name for _, names in ROWS for name in names}
    if not named <= found.keys():
        written = ''.join(path.read_text() for path in Path(__file__).parent.glob('test_*.py'))
        missing = [name for name in named if f'def {name}(' not in written]
        assert missing == []
        pytest.skip('only some tests were collected: there is nothing to count')
    for times, names in ROWS:
        assert names
        assert sum(marked.get(name, found[name]) for name in names) == times, names
