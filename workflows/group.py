"""From the results of all participants to the tables and the report of the cohort.

Gathering takes a second and depends on nothing but the output folder, so there is no graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bids_jointseg.bids import DataError
from bids_jointseg.reports import group_report, group_tables
from bids_jointseg.standard import lesion_maps

if TYPE_CHECKING:
    from pathlib import Path


def gather(output_dir: Path) -> list[Path]:
    """Write the tables, the lesion maps and the report of a cohort.

    Returns
    -------
    list[Path]
        What was written.

    Raises
    ------
    DataError
        If no scan has been segmented.
    """
    if not any(output_dir.glob('sub-*/**/anat/*_seg-jointseg_morph.json')):
        raise DataError(f'{output_dir}: no segmented scans: run the participant level first')
    written = [*group_tables(output_dir), *lesion_maps(output_dir)]
    return [*written, group_report(output_dir)]
