"""What `benchmarks/calibration.py` concludes from its measurements, of made ones."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import norm

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture
def calibration(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module('calibration')


def acquired(calibration, kind: str, spread: float, rng: np.random.Generator) -> dict:
    """An acquisition whose volumes scatter by `spread` times what is in doubt."""
    doubt = dict.fromkeys(calibration.NAMES, 100.0)
    volumes = {name: 1e4 + spread * rng.normal(0, size) for name, size in doubt.items()}
    return {'acquisition': kind, 'verdict': 'pass', 'volumes': volumes, 'doubt': doubt}


def test_intervals_hold_95_of_100(calibration):
    rng = np.random.default_rng(3)
    spreads = {'T1w, thin': 0.5, 'FLAIR, thick': 2.0}
    again = [
        acquired(calibration, kind, spread, rng)
        for kind, spread in spreads.items()
        for _ in range(80 * calibration.DRAWS)
    ]
    found = calibration.fit_repeatability(again)
    for kind, spread in spreads.items():
        # Each kind borrows 4 of 84 visits from both.
        square = (80 * spread**2 + 4 * np.mean(np.square([*spreads.values()]))) / 84
        for name in calibration.NAMES:
            assert found['repeatability'][kind][name] == pytest.approx(
                1.99 * np.sqrt(square), rel=0.25
            )
        inside, pairs = found['held'][kind]
        each = math.comb(calibration.DRAWS, 2)
        assert pairs == 80 * each * len(set(calibration.NAMES) - {'L'})
        within = 1 - 2 * norm.sf(1.99 * np.sqrt(square) / spread)
        assert inside / pairs == pytest.approx(within, abs=0.02)
    assert json.loads(json.dumps(found))['held'] == found['held']


def test_few_visits_lean_on_all(calibration):
    rng = np.random.default_rng(4)
    draws = calibration.DRAWS
    many = [acquired(calibration, 'T1w, thin', 1.0, rng) for _ in range(40 * draws)]
    lucky = [acquired(calibration, 'FLAIR, thin', 1e-6, rng) for _ in range(draws)]
    found = calibration.fit_repeatability([*many, *lucky])['repeatability']
    assert all(k > 1.5 for k in found['FLAIR, thin'].values())


def test_only_sound_pairs_count(calibration):
    rng = np.random.default_rng(5)
    sound, warned, empty = (
        [acquired(calibration, 'T1w, thin', 1.0, rng) for _ in range(calibration.DRAWS)]
        for _ in range(3)
    )
    for each in warned[1:]:  # one that is sound makes no pair
        each['verdict'] = 'check'
    for each in empty:
        each['volumes'] |= {'L': 0.0}
    refused = [None] * calibration.DRAWS
    pairs = calibration.fit_repeatability([*sound, *warned, *refused, *empty])['pairs']
    assert {name: len(visits) for name, visits in pairs['T1w, thin'].items()} == {
        name: 1 if name == 'L' else 2 for name in calibration.NAMES
    }


def test_the_likeliest_temperature_is_chosen(calibration):
    temperatures = calibration.TEMPERATURES

    def visit(off: float, lesions: int) -> dict:
        """All voxels at a probability that is right by 0.7, where the temperature is 0.8."""
        bins = []
        for t in temperatures:
            sure = np.clip(0.7 + (0.8 - t) / 2, 0, 1)
            of = {
                name: np.pad([[count], [count * sure], [count * 0.7]], ((0, 0), (0, 9)))
                for name, count in (('labels', 1000), ('lesions', lesions))
            }
            bins.append(of)
        return {'nll': list((temperatures - 0.8 - off) ** 2), 'bins': bins}

    both = [visit(-0.2, 50), visit(0.2, 0)]
    found = calibration.fit_temperature([], both)
    # Where there are real visits, they decide, and painted ones tell of lesions.
    assert calibration.fit_temperature(both, [visit(0.7, 50)]) == found
    assert found['temperature'] == 0.8
    assert found['negative log-likelihood'] == {'at 1': 0.08, 'calibrated': 0.04}
    # No lesion in the second visit, which then says nothing of them.
    for what in ('labels', 'lesions'):
        assert found['expected calibration error'][what] == {'at 1': 0.1, 'calibrated': 0.0}
    assert found['reliability diagram']['lesions'] == [
        {'probability': 0.7, 'right': 0.7, 'voxels': 50}
    ]
    json.dumps(found)


def test_a_run_that_was_cut_off_goes_on(calibration, monkeypatch, tmp_path):
    class Pool:
        map = staticmethod(map)

    asked = []

    def measure(job):
        asked.append(job)
        return None if job == 2 else {'number': job}

    monkeypatch.setattr(calibration, 'measure', measure)
    path = tmp_path / 'again.jsonl'
    whole = calibration.measured(Pool, range(4), path)
    assert whole == [{'number': 0}, {'number': 1}, None, {'number': 3}]
    text = path.read_text()
    path.write_text(text[:-5])  # the power went while the last line was written
    asked.clear()
    assert calibration.measured(Pool, range(4), path) == whole
    assert asked == [3]
    assert path.read_text() == text
