"""Painted patients and controls as BIDS datasets: the ground on which the risk is measured.

SynthSeg's label maps become clinical scans of 1 x 1 x 3 mm: whole heads, each of another scanner,
or, where they are to be alike, skull-stripped and all of one: tissue then looks the same in
patients and controls, as the bound on the risk assumes (H4). Each patient has a T1w, a FLAIR,
the lesions of one real mask, and a reference of both tissue and lesions; a training that
declares the protocol with `tells = ['L']` never sees the tissue of it.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from bids_jointseg.cache import read_mask
from bids_jointseg.image import load_labels, save
from bids_jointseg.sampling import paint_head


def brain_of(labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return what a good tool leaves of a head: tissue, and the fluid in its folds."""
    brain = ndimage.binary_closing(np.pad(np.isin(labels, range(1, 255)), 8), iterations=4)
    return ndimage.binary_dilation(ndimage.binary_fill_holes(brain))[(slice(8, -8),) * 3]


def paint(
    data: Path,
    root: Path,
    heads: list[str],
    masks: list[str],
    modalities: list[str],
    seed: int,
    *,
    alike: bool = False,
) -> None:
    """Make one dataset, unless it is there.

    Parameters
    ----------
    data
        Folder with the datasets `heads` and `openms-mni`.
    root
        The dataset to make, with label maps in `derivatives/painted`.
    heads
        Subjects of `heads`, who keep their labels.
    masks
        Subjects of `openms-mni`, one for each head, or none for people without lesions.
    modalities
        That are kept.
    seed
        Of the first head; the others follow.
    alike
        Skull-stripped, and all of one scanner.
    """
    if (root / 'dataset_description.json').is_file():
        return
    with ProcessPoolExecutor(2, get_context('forkserver')) as pool:
        mask = masks or [''] * len(heads)
        jobs = [
            pool.submit(
                _paint_one, data, root, head, mask[i % len(mask)], modalities, seed + i, alike
            )
            for i, head in enumerate(heads)
        ]
        for job in jobs:
            job.result()
    for folder, kind in ((root, 'raw'), (root / 'derivatives' / 'painted', 'derivative')):
        record = {'Name': root.name, 'BIDSVersion': '1.10.0', 'DatasetType': kind}
        if kind == 'derivative':
            record |= {'GeneratedBy': [{'Name': 'bids_jointseg benchmarks'}]}
        (folder / 'dataset_description.json').write_text(json.dumps(record))


def _paint_one(
    data: Path, root: Path, head: str, mask: str, modalities: list[str], seed: int, alike: bool
) -> None:
    torch.set_num_threads(1)
    (labels,) = (data / 'heads' / f'sub-{head}').rglob('*_dseg.nii.gz')
    lesions = []
    if mask:
        (path,) = (data / 'openms-mni' / f'sub-{mask}').rglob('*_label-lesion_mask.nii.gz')
        lesions = [read_mask(path)]
    images, found, grid = paint_head(
        load_labels(labels),
        'freesurfer',
        lesions,
        seed=seed,
        slice_mm=3,
        contrast_spread=0.0 if alike else 1.0,
    )
    shown = brain_of(found) if alike else np.ones(found.shape, bool)
    anat = root / f'sub-{head}' / 'anat'
    anat.mkdir(parents=True, exist_ok=True)
    for modality in modalities:
        path = anat / f'sub-{head}_{modality}.nii.gz'
        save(path, np.where(shown, images[modality], 0), grid, dtype=np.int16, slope=1 / 500)
    anat = root / 'derivatives' / 'painted' / f'sub-{head}' / 'anat'
    anat.mkdir(parents=True, exist_ok=True)
    save(anat / f'sub-{head}_dseg.nii.gz', found, grid, dtype=np.uint8)
