"""What the comparison of sessions makes of patients in whom nothing has changed.

    python benchmarks/noise.py DATA OUT [--model NAME_OR_CARD] [--seed N]

Every raw visit of `openms` is "scanned again" twice (`scanned_again` of calibration.py: position,
coil, contrast, calibration and noise, other ones each time), so that both are interpolated
alike, and the app compares the two as sessions of one person. Prints and writes OUT/noise.md:
lesions by what is said to have become of them, and volumes that are said to have changed. Then
each lesion of the second session is taken out of the first, which makes it new: what is it called?
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from accuracy import read_table, run
from calibration import scanned_again
from scipy import ndimage

from bids_jointseg import longitudinal
from bids_jointseg.bids import annotated_scans
from bids_jointseg.image import load_scan, save
from bids_jointseg.lesions import fill_lesions
from bids_jointseg.quality import INDEX
from bids_jointseg.recipe import read_recipe

LEAST_MM3 = 25.0
"""Of a lesion that is taken out."""


def write_sessions(data: Path, folder: Path, seed: int) -> None:
    """Make a dataset in which each visit is a person with two sessions."""
    (source,) = (s for s in read_recipe('jointseg').datasets if s.name == 'openms')
    for number, item in enumerate(annotated_scans(source, data / source.root)):
        label = item.name.replace('sub-', '').replace('_ses-', 'v')
        scans = {'T1w': load_scan(item.scan.t1w), 'FLAIR': load_scan(item.scan.flair)}
        for session in (1, 2):
            anat = folder / f'sub-{label}' / f'ses-{session}' / 'anat'
            anat.mkdir(parents=True, exist_ok=True)
            for suffix, again in scanned_again(scans, seed, number, session).items():
                target = anat / f'sub-{label}_ses-{session}_{suffix}.nii.gz'
                save(target, again.data, again.grid, dtype=np.float32)
    record = {'Name': 'scanned again', 'BIDSVersion': '1.10.0'}
    (folder / 'dataset_description.json').write_text(json.dumps(record))


def rows(out: Path, name: str) -> list[dict[str, str]]:
    """Return the lines of all tables of a name."""
    paths = sorted(out.glob(f'sub-*/**/*_desc-{name}_morph.tsv'))
    return [row for path in paths for row in read_table(path)]


def taken_out(bids: Path, out: Path, subject: str) -> list[str]:
    """Take lesions of both sessions out of the first, and return what each is called then.

    Its voxels become white matter, and up to two voxels around them nothing shows a lesion,
    neither the probabilities nor the FLAIR. Those that touch another one afterwards are left out.
    """
    ((earlier, later),) = longitudinal.find_visits(out, bids, subject)
    record = json.loads(later.file('desc-longitudinal_morph.json').read_text())
    matrix = np.array(record['comparisons'][0]['later_to_earlier'])
    before, after = earlier.segmentation(), later.segmentation()
    assert before.probability is not None
    assert before.flair is not None
    numbers, _ = before.numbered()
    called = []
    for row in longitudinal.compare_lesions(before, after, matrix):
        if row['before_lesions'] == 'n/a' or row['after_mm3'] < LEAST_MM3:
            continue
        lesion = np.isin(numbers, [int(number) for number in row['before_lesions'].split()])
        around = ndimage.binary_dilation(lesion, np.ones((3, 3, 3)), iterations=2)
        labels = np.where(lesion, INDEX['WM'], before.labels)
        # What is filled is called L for that, and no other lesion lends its brightness.
        other = np.where(labels == INDEX['L'], INDEX['CGM'], labels)
        hole = np.where(lesion | (around & (labels == INDEX['WM'])), INDEX['L'], other)
        without = longitudinal.Segmentation(
            labels,
            before.grid,
            np.where(around, np.minimum(before.probability, 0.03), before.probability),
            fill_lesions(before.flair, hole, before.grid),
        )
        called += [
            found['change']
            for found in longitudinal.compare_lesions(without, after, matrix)
            if found['after_lesions'] == row['after_lesions']
        ]
    return called


def main() -> None:
    """Scan again, compare, count."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--model', default='jointseg')
    parser.add_argument('--seed', type=int, default=1, help='of the acquisitions')
    options = parser.parse_args()
    out = options.out.resolve()
    write_sessions(options.data.resolve(), out / 'bids', options.seed)
    run(out / 'bids', out / 'results', options.model, '--level', 'full')
    lesions = Counter(row['change'] for row in rows(out / 'results', 'lesionchange'))
    volumes = rows(out / 'results', 'longitudinal')
    changed = Counter(row['changed'] for row in volumes)
    names = Counter(row['name'] for row in volumes if row['changed'] == 'yes')
    text = f'{sum(lesions.values())} lesions: '
    text += ', '.join(f'{count} {kind}' for kind, count in lesions.most_common())
    text += f'\n{changed["yes"]} of {changed["yes"] + changed["no"]} volumes changed'
    text += f' ({", ".join(f"{n} {name}" for name, n in names.items())})\n' if names else '\n'
    called = Counter(
        change
        for path in sorted((out / 'bids').glob('sub-*'))
        for change in taken_out(out / 'bids', out / 'results', path.name.removeprefix('sub-'))
    )
    text += f'of {sum(called.values())} lesions taken out: '
    text += ', '.join(f'{count} {kind}' for kind, count in called.most_common()) + '\n'
    print(text, end='')
    (out / 'noise.md').write_text(text)


if __name__ == '__main__':
    main()
