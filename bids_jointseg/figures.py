"""Figures: what a person looks at before trusting a number.

:func:`draw_scan` cuts one scan into mosaics, :func:`draw_changes` two scans of one person,
:func:`draw_comparison` and :func:`draw_agreement` show a segmentation against a reference,
:func:`draw_standard` and :func:`draw_frequency` what lies in standard space. Equal input gives
equal bytes.

Every array is turned to RAS by its affine before it is cut, so a figure looks the same whatever
the native axes are. The left of an axial or coronal slice is the patient's left (neurological
convention), and every figure says so.
"""

from __future__ import annotations

import io
import logging
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from bids_jointseg.files import write_bytes
from bids_jointseg.image import Grid, Volume, foreground
from bids_jointseg.labels import INDICES, LABELS, Label
from bids_jointseg.metrics import bland_altman

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

LOGGER = logging.getLogger('bids_jointseg')

CLASSES = LABELS[1:]
CHANNEL = {label.abbreviation: channel for channel, label in enumerate(LABELS)}
LESION = LABELS[CHANNEL['L']]

FIGURES = (
    ('scan', 'T1w'),
    ('contours', 'T1w'),
    ('labels', 'T1w'),
    ('scan', 'FLAIR'),
    ('lesions', 'FLAIR'),
    ('labels', 'FLAIR'),
    ('closeup', 'T1w'),
    ('closeup', 'FLAIR'),
    ('registrationfixed', 'T1w'),
    ('registrationbefore', 'FLAIR'),
    ('registrationafter', 'FLAIR'),
    ('entropy', 'probseg'),
)
"""What is drawn, as the ``desc`` entity and the suffix of its file."""

WIDTH = 1200  # pixels of every figure: the width of a 1280-pixel page, 170 dpi on paper
GAP = 4  # pixels between two slices
MARGIN_MM = 8.0  # shown around the brain
PLANES = ('sagittal', 'coronal', 'axial')  # the plane of a slice across RAS axis 0, 1, 2
COLUMNS = (4, 5, 5)  # slices in one row of each plane: brains are longer than they are wide
EDGES = (('P', 'A'), ('L', 'R'), ('L', 'R'))  # what lies left and right of a slice
UNCERTAIN = 0.5  # normalised entropy that gets the last colour; two even classes give 1/3
CONVENTION = 'Neurological: the left of axial and coronal slices is the left of the patient.'
# Black, purple, orange, pale yellow: lightness rises evenly, in gray scale too (after inferno).
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)]) / 255
LINE = '#56b4e9'

Tag = tuple[int, int, str]
"""Column, row and text of a word in a picture."""


@dataclass(frozen=True)
class Tile:
    """One slice of a mosaic.

    Attributes
    ----------
    axis, index
        The RAS axis that the slice crosses, and where.
    corner_mm
        Smallest coordinates shown, of the two other axes (left, then bottom), from the centre
        of the first voxel.
    origin, size
        Row and column of the upper left pixel; rows and columns of pixels.
    """

    axis: int
    index: int
    corner_mm: tuple[float, float]
    origin: tuple[int, int]
    size: tuple[int, int]

    @property
    def place(self) -> tuple[slice, slice]:
        """Rows and columns in the picture."""
        (row, column), (height, width) = self.origin, self.size
        return slice(row, row + height), slice(column, column + width)


@dataclass(frozen=True, eq=False)
class Mosaic:
    """Where the slices of one picture lie; arrays cut by the same mosaic match pixel by pixel.

    Attributes
    ----------
    grid
        Grid of the arrays to be cut, axes in RAS order (see :func:`upright`).
    tiles
        The slices.
    shape
        Rows and columns of the picture, in pixels.
    scale
        Pixels per mm, the same along every axis.
    """

    grid: Grid
    tiles: tuple[Tile, ...]
    shape: tuple[int, int]
    scale: float

    def cut(self, array: NDArray[Any], *, kernel: str = 'cubic') -> NDArray[np.float32]:
        """Return the picture of one array.

        Parameters
        ----------
        array
            Values on the grid, `(X, Y, Z)`.
        kernel
            ``'cubic'`` for intensities, ``'linear'`` where overshoot would be wrong.

        Returns
        -------
        NDArray[np.float32]
            `(rows, columns)`; 0 between the slices and outside of the array.
        """
        canvas = np.zeros(self.shape, np.float32)
        for tile in self.tiles:
            canvas[tile.place] = self._projected(tile, _slice(array, tile)[None], kernel)[0]
        return canvas

    def memberships(self, labels: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return how much of each pixel is of each class, `(classes, rows, columns)`, 0 to 1.

        Labels are never interpolated: the indicator of each class is.
        """
        canvas = np.zeros((len(LABELS), *self.shape), np.float32)
        for tile in self.tiles:
            section = _slice(labels, tile)
            indicators = section == INDICES[1:, None, None]
            there = np.flatnonzero(indicators.any(axis=(1, 2)))
            canvas[(1 + there, *tile.place)] = self._projected(tile, indicators[there], 'linear')
        canvas[0] = 1 - canvas.sum(axis=0)
        return canvas

    def position_mm(self, tile: Tile) -> float:
        """Return where a slice's centre lies along its axis, in scanner RAS mm."""
        half_mm = np.array(tile.size[::-1]) / self.scale / 2
        voxel = np.zeros(3)
        voxel[list(_others(tile.axis))] = tile.corner_mm + half_mm
        voxel /= self.grid.spacing_mm
        voxel[tile.axis] = tile.index
        return float(self.grid.affine[tile.axis] @ (*voxel, 1))

    def _projected(self, tile: Tile, sections: NDArray[Any], kernel: str) -> NDArray[np.float32]:
        """Interpolate slices separably: weights of the rows, times each, times the columns'."""
        across, down = (
            _weights(
                (corner + (np.arange(pixels) + 0.5) / self.scale) / self.grid.spacing_mm[axis],
                voxels,
                1 / (self.scale * self.grid.spacing_mm[axis]),
                kernel,
            )
            for corner, pixels, voxels, axis in zip(
                tile.corner_mm,
                tile.size[::-1],
                sections.shape[1:],
                _others(tile.axis),
                strict=True,
            )
        )
        values = np.nan_to_num(sections.astype(np.float32))
        # Superior, or anterior, is up.
        return np.asarray((across @ values @ down.T).swapaxes(1, 2)[:, ::-1])


def _slice(array: NDArray[Any], tile: Tile) -> NDArray[Any]:
    return np.moveaxis(array, tile.axis, 0)[tile.index]  # a view, which `take` would not be


def _weights(
    centres: NDArray[np.floating], voxels: int, pixel: float, kernel: str
) -> NDArray[np.float32]:
    """Return the `(pixels, voxels)` weights of one axis; all 0 for a pixel outside the array.

    `centres` and `pixel`, the pixels' centres and size, are in voxels.
    """
    distance = np.abs(centres[:, None] - np.arange(voxels)) / max(1.0, pixel)
    if kernel == 'linear':
        weights = np.clip(1 - distance, 0, None)
    else:  # Catmull and Rom
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    inside = (centres > -0.5) & (centres < voxels - 0.5)
    total = np.where(inside, weights.sum(axis=1), np.inf)
    return np.asarray(weights / total[:, None], dtype=np.float32)


def draw_scan(
    figures: Path,
    stem: str,
    *,
    t1w: Volume | None = None,
    flair: Volume | None = None,
    t1w_labels: NDArray[np.integer] | None = None,
    flair_labels: NDArray[np.integer] | None = None,
    flair_on_t1w: NDArray[np.floating] | None = None,
    flair_on_t1w_before: NDArray[np.floating] | None = None,
    entropy: NDArray[np.floating] | None = None,
) -> list[Path]:
    """Draw the figures of one scan.

    Parameters
    ----------
    figures
        Folder of the PNG files; made if absent.
    stem
        Start of the files' names.
    t1w, flair
        The scans, each on its own grid; at least one.
    t1w_labels, flair_labels
        Label maps on the grids of `t1w` and `flair`.
    flair_on_t1w, flair_on_t1w_before
        The FLAIR on the T1w's grid, registered, and by the headers alone.
    entropy
        Normalised entropy (0 certain, 1 all classes even) on the grid of the reference scan:
        the T1w if there is one.

    Returns
    -------
    list[Path]
        ``<stem>_desc-<what>_<suffix>.png`` in the order of :data:`FIGURES`.

    Raises
    ------
    ValueError
        If there is no scan, or an array has another shape than its scan.
    """
    if t1w is None and flair is None:
        raise ValueError(f'{stem}: nothing to draw: give a T1w or a FLAIR')

    def turn(name: str, array: NDArray[Any] | None, scan: Volume | None) -> NDArray[Any] | None:
        if array is None:
            return None
        if scan is None or array.shape != scan.data.shape:
            raise ValueError(f'{stem}: {name} does not have the shape of its scan')
        return upright(array, scan.grid)[0]

    t1w_labels = turn('t1w_labels', t1w_labels, t1w)
    flair_labels = turn('flair_labels', flair_labels, flair)
    after = turn('flair_on_t1w', flair_on_t1w, t1w)
    before = turn('flair_on_t1w_before', flair_on_t1w_before, t1w)
    entropy = turn('entropy', entropy, t1w or flair)
    t1w = t1w and Volume(*upright(t1w.data, t1w.grid))
    flair = flair and Volume(*upright(flair.data, flair.grid))

    pictures: dict[tuple[str, str], NDArray[np.uint8]] = {}
    for suffix, scan, labels in (('T1w', t1w, t1w_labels), ('FLAIR', flair, flair_labels)):
        if scan is None:
            continue
        lesional = scan is flair or flair is None  # where lesions are seen best
        mosaic = plan_mosaic(scan, labels, follow_lesions=lesional)
        bare = mosaic.cut(_window(scan.data, labels))
        pictures['scan', suffix] = _finish(mosaic, _gray(bare))
        if labels is not None:
            soft = mosaic.memberships(labels)
            what, shown = ('contours', CLASSES) if scan is t1w else ('lesions', (LESION,))
            pictures[what, suffix] = _finish(mosaic, _outlined(bare, soft, shown), shown)
            pictures['labels', suffix] = _finish(mosaic, *_filled(mosaic, bare, soft))
            if lesional and (labels == LESION.index).any():
                pictures['closeup', suffix] = _closeup(scan, labels)
        if entropy is not None and scan is (t1w or flair):
            heat = np.clip(mosaic.cut(entropy, kernel='linear') / UNCERTAIN, 0, 1)
            opacity = np.clip(6 * heat, 0, 0.9)[..., None]
            canvas = 0.8 * _gray(bare) * (1 - opacity) + _heat(heat) * opacity
            pictures['entropy', 'probseg'] = _finish(mosaic, canvas, heat=True)
    if t1w is not None and after is not None:
        pictures |= _registration(t1w, t1w_labels, after, before)

    figures.mkdir(parents=True, exist_ok=True)
    paths = []
    for what, suffix in FIGURES:
        if (what, suffix) in pictures:
            paths.append(figures / f'{stem}_desc-{what}_{suffix}.png')
            write_bytes(paths[-1], _png(pictures[what, suffix]))
    LOGGER.debug('Drew %d figures of %s', len(paths), stem)
    return paths


def upright(array: NDArray[Any], grid: Grid) -> tuple[NDArray[Any], Grid]:
    """Return a view of an array, and its grid, with the axes closest to R, A, S in this order."""
    turn = nib.orientations.io_orientation(grid.affine)
    affine = grid.affine @ nib.orientations.inv_ornt_aff(turn, grid.shape)
    turned = nib.orientations.apply_orientation(array, turn)
    return turned, Grid(turned.shape, affine)


def plan_mosaic(
    volume: Volume,
    labels: NDArray[np.integer] | None,
    *,
    rows: int = 2,
    follow_lesions: bool = False,
) -> Mosaic:
    """Choose slices in three planes and lay them out.

    Parameters
    ----------
    volume
        The scan, upright; its foreground says where the brain is if the labels do not.
    labels
        Label map on the scan's grid.
    rows
        Rows of slices in the plane in which the scan was acquired; the other planes get one.
    follow_lesions
        Take the slices with the most lesion first.

    Returns
    -------
    Mosaic
        The plane of acquisition comes first.
    """
    grid = volume.grid
    brain = labels > 0 if labels is not None and labels.any() else None
    if brain is None:
        brain = volume.data > foreground(volume.data)
    areas = [brain.sum(axis=_others(axis)) for axis in range(3)]
    weights = [None, None, None]
    if follow_lesions and labels is not None:
        weights = [(labels == LESION.index).sum(axis=_others(axis)) for axis in range(3)]
    ends = [np.flatnonzero(area)[[0, -1]] if area.any() else (0, len(area) - 1) for area in areas]
    low, high = np.array(ends).T * grid.spacing_mm
    low, size = low - MARGIN_MM, high - low + 2 * MARGIN_MM

    pitches = [(WIDTH - GAP) / columns for columns in COLUMNS]
    scale = min((pitches[axis] - GAP) / size[_others(axis)[0]] for axis in range(3))
    tiles, top = [], GAP
    for axis in sorted(range(3), key=lambda axis: (axis != grid.thick_axis, -axis)):
        across, down = _others(axis)
        height, width = int(size[down] * scale), int(size[across] * scale)
        lines = rows if axis == grid.thick_axis else 1
        chosen = _choose(areas[axis], weights[axis], lines * COLUMNS[axis])
        for number, index in enumerate(chosen):
            line, column = divmod(number, COLUMNS[axis])
            left = GAP + int(column * pitches[axis] + (pitches[axis] - GAP - width) / 2)
            origin = (top + line * (height + GAP), left)
            tiles.append(Tile(axis, index, (low[across], low[down]), origin, (height, width)))
        top += lines * (height + GAP)
    return Mosaic(grid, tuple(tiles), (top, WIDTH), scale)


def _others(axis: int) -> tuple[int, int]:
    """Return the two other axes: across and down a slice."""
    return ((1, 2), (0, 2), (0, 1))[axis]


def _choose(
    area: NDArray[np.integer], weight: NDArray[np.integer] | None, count: int
) -> list[int]:
    """Return up to `count` slices: peaks of the weight first, then evenly through the brain."""
    inner = np.flatnonzero(area >= 0.1 * area.max())
    first, last = inner[0], inner[-1]
    chosen: list[int] = []
    if weight is not None:
        left = weight.astype(float)
        while len(chosen) < count and left.any():
            chosen.append(int(left.argmax()))
            apart = np.abs(np.arange(left.size) - chosen[-1])
            left[apart <= (last - first) / (2.5 * count)] = 0
    even = list(dict.fromkeys(np.rint(np.linspace(first, last, count + 2)[1:-1]).astype(int)))
    while len(chosen) < count and (even := [index for index in even if index not in chosen]):
        farthest = max(even, key=lambda index: min((abs(index - c) for c in chosen), default=0))
        chosen.append(int(farthest))
    return sorted(chosen)


def _window(
    data: NDArray[np.floating],
    labels: NDArray[np.integer] | None,
    like: NDArray[np.floating] | None = None,
) -> NDArray[np.float32]:
    """Scale intensities so that the brain (else the foreground) spans 0 to 1.

    `like` gives the intensities to look at where `data` is not in place.
    """
    seen = data if like is None else like
    brain = seen[labels > 0] if labels is not None and labels.any() else None
    if brain is None:
        brain = seen[seen > foreground(seen)]
    brain = brain[np.isfinite(brain)]
    if not brain.size:
        return np.zeros(data.shape, np.float32)
    low, high = np.percentile(brain, (0.5, 99.7))
    low = min(low, 0.4 * np.median(brain))  # keep fluid and air apart from tissue
    return np.asarray((data - low) / max(high - low, 1e-6), np.float32)


def _registration(
    t1w: Volume,
    labels: NDArray[np.integer] | None,
    after: NDArray[np.floating],
    before: NDArray[np.floating] | None,
) -> dict[tuple[str, str], NDArray[np.uint8]]:
    """Return the T1w and the FLAIR before and after, all under the lines of the T1w's labels."""
    mosaic = plan_mosaic(t1w, labels, rows=1)
    lines = []
    if labels is not None:
        soft = mosaic.memberships(labels)
        lines = [1 - soft[0], soft[CHANNEL['VEN']]]
    text = 'Lines: brain and ventricles as the T1w shows them. ' if lines else ''
    pictures = {}
    for what, suffix, data in (
        ('fixed', 'T1w', _window(t1w.data, labels)),
        ('before', 'FLAIR', None if before is None else _window(before, labels, after)),
        ('after', 'FLAIR', _window(after, labels)),
    ):
        if data is not None:
            canvas = _gray(mosaic.cut(data))
            for line in lines:
                _draw_line(canvas, line, LINE)
            pictures[f'registration{what}', suffix] = _finish(mosaic, canvas, text=text)
    return pictures


def _closeup(
    volume: Volume, labels: NDArray[np.integer], *, count: int = 6, extent_mm: float = 40.0
) -> NDArray[np.uint8]:
    """Return the largest lesions, each in the slice where it is largest, bare and outlined."""
    axis, spacing = volume.grid.thick_axis, volume.grid.spacing_mm
    numbered, found = ndimage.label(labels == LESION.index, np.ones((3, 3, 3)))
    sizes = np.bincount(numbered.ravel(), minlength=found + 1)[1:]
    largest = np.argsort(-sizes, kind='stable')[:count] + 1
    boxes = ndimage.find_objects(numbered)
    side = (WIDTH - GAP) // count - GAP
    tiles = []
    for column, number in enumerate(largest):
        box = boxes[number - 1]
        inside = numbered[box] == number
        index = int(inside.sum(axis=_others(axis)).argmax())
        centre = np.argwhere(inside.take(index, axis)).mean(axis=0)
        centre += [box[other].start for other in _others(axis)]
        corner = centre * spacing[list(_others(axis))] - extent_mm / 2
        origin = (GAP, GAP + column * (side + GAP))
        tiles.append(
            Tile(axis, box[axis].start + index, (corner[0], corner[1]), origin, (side, side))
        )
    mosaic = Mosaic(volume.grid, tuple(tiles), (side + 2 * GAP, WIDTH), side / extent_mm)
    scan = mosaic.cut(_window(volume.data, labels))
    outlined = _outlined(scan, mosaic.memberships(labels), (LESION,))
    below = [f'{sizes[number - 1] * spacing.prod():.0f} mm3' for number in largest]
    text = f'Each frame is {extent_mm:.0f} mm wide; volumes are those on this scan. '
    return np.concatenate(
        [
            _finish(mosaic, _gray(scan), caption=False),
            _finish(mosaic, outlined, (LESION,), text=text, below=below),
        ]
    )


def _gray(scan: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(np.repeat(np.clip(scan, 0, 1)[..., None], 3, axis=-1), np.float32)


def _rgb(color: str) -> NDArray[np.float32]:
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)], np.float32)


def _heat(values: NDArray[np.floating]) -> NDArray[np.float32]:
    steps = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values, steps, HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _outlined(
    scan: NDArray[np.floating], soft: NDArray[np.floating], shown: Sequence[Label] = CLASSES
) -> NDArray[np.float32]:
    """Draw the outlines of classes over a scan; what is inside goes over what is around it."""
    canvas = _gray(scan)
    for name in ('CGM', 'CBM', 'BS', 'WM', 'SGM', 'VEN', 'L'):
        label = LABELS[CHANNEL[name]]
        if label in shown:
            # A low level keeps the outline of a lesion of one voxel, and lies outside of it.
            level = 0.3 if label is LESION else 0.5
            _draw_line(canvas, soft[CHANNEL[name]], label.color, level=level)
    return canvas


def _draw_line(
    canvas: NDArray[np.float32], field: NDArray[np.floating], color: str, *, level: float = 0.5
) -> None:
    """Draw the isoline of a field in place, smooth, over a dark rim that parts it from the scan.

    The distance from a pixel to the isoline is, to first order, `|field - level| / |gradient|`.
    """
    field = ndimage.gaussian_filter(field, 0.6)
    slope = np.hypot(*np.gradient(field))
    distance = np.abs(field - level) / np.maximum(slope, 1e-3)
    for half_width, opacity, ink in ((1.5, 0.6, '#000000'), (0.6, 1.0, color)):
        near = distance < half_width + 0.5
        alpha = opacity * np.clip(half_width + 0.5 - distance[near], 0, 1)[:, None]
        canvas[near] += alpha * (_rgb(ink) - canvas[near])


def _filled(
    mosaic: Mosaic, scan: NDArray[np.floating], soft: NDArray[np.floating]
) -> tuple[NDArray[np.float32], Sequence[Label], Sequence[Tag]]:
    """Colour each pixel by its class, part the classes by dark lines, and name each one once."""
    winner = soft.argmax(axis=0)
    paint = np.stack([np.ones(3, np.float32), *(_rgb(label.color) for label in CLASSES)])
    shade = np.where(winner > 0, 0.5 + 0.5 * np.clip(scan, 0, 1), scan)
    canvas = _gray(shade) * paint[winner]
    edge = np.zeros(winner.shape, bool)
    edge[1:] |= winner[1:] != winner[:-1]
    edge[:, 1:] |= winner[:, 1:] != winner[:, :-1]
    canvas[edge] *= 0.45

    tags = []
    for label in CLASSES:
        drawn = [winner[tile.place] == CHANNEL[label.abbreviation] for tile in mosaic.tiles]
        area, best = max((int(mask.sum()), -number) for number, mask in enumerate(drawn))
        if area:
            depth = ndimage.distance_transform_edt(np.pad(drawn[-best], 1))
            row, column = np.unravel_index(int(depth.argmax()), depth.shape)
            top, left = mosaic.tiles[-best].origin
            words = 'lesion' if label is LESION else label.abbreviation  # L is left
            tags.append((int(left + column - 1), int(top + row - 1), words))
    return canvas, CLASSES, tags


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # built into Pillow: no search, no cache on disk


def _finish(
    mosaic: Mosaic,
    canvas: NDArray[np.floating],
    legend: Sequence[Label] = (),
    tags: Sequence[Tag] = (),
    *,
    heat: bool | str = False,
    text: str = '',
    below: Sequence[str] = (),
    caption: bool = True,
) -> NDArray[np.uint8]:
    """Return the picture as 8-bit RGB with positions, sides, legend and convention."""
    # 64 levels look the same and halve the file.
    picture = np.asarray(np.rint(np.clip(canvas, 0, 1) * 63) * (255 / 63), np.uint8)
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)

    def write(x: float, y: float, words: str, anchor: str, ink: str = '#ffffff') -> None:
        draw.text(
            (x, y), words, ink, _font(13), anchor=anchor, stroke_width=2, stroke_fill='#000000'
        )

    rows_seen = set()
    for number, tile in enumerate(mosaic.tiles):
        (top, left), (height, width) = tile.origin, tile.size
        name = 'xyz'[tile.axis]
        words = f'{name} {round(mosaic.position_mm(tile))} mm'
        if top not in rows_seen:
            words = f'{PLANES[tile.axis]}  {words}'
            for x, side, anchor in ((left + 3, 0, 'lm'), (left + width - 3, 1, 'rm')):
                write(x, top + height / 2, EDGES[tile.axis][side], anchor)
        rows_seen.add(top)
        write(left + 3, top + height - 3, below[number] if below else words, 'ls')
    for x, y, words in tags:
        write(x, y, words, 'mm')
    if not caption:
        return np.asarray(image)

    framed = Image.new('RGB', (image.width, image.height + (52 if legend or heat else 28)))
    framed.paste(image)
    draw = ImageDraw.Draw(framed)
    x, y = 12, image.height + 14
    entries = [
        (label.color, f'{label.abbreviation} {label.name}' if tags else label.name)
        for label in legend
    ]
    _write_legend(draw, x, y, entries, half=6 if tags else 1)
    if heat:
        ramp = np.rint(_heat(np.linspace(0, 1, 160)) * 255).astype(np.uint8)
        framed.paste(Image.fromarray(np.repeat(ramp[None], 12, axis=0)), (x, y - 6))
        words = f'uncertainty, normalised entropy: 0 to {UNCERTAIN} and above'
        words = heat if isinstance(heat, str) else words
        write(x + 170, y, words, 'lm')
    write(12, framed.height - 14, text + CONVENTION, 'lm', '#c8c8c8')
    return np.asarray(framed)


def _write_legend(
    draw: ImageDraw.ImageDraw,
    x: int,
    y: int,
    entries: Sequence[tuple[str, str]],
    *,
    half: int,
    ink: str = '#ffffff',
) -> None:
    """Write colours and what they stand for in one line; `half` is half of a mark's height."""
    for color, words in entries:
        draw.rectangle((x, y - half, x + 16, y + half), color)
        draw.text((x + 22, y), words, ink, _font(13), anchor='lm')
        x += 22 + int(draw.textlength(words, _font(13))) + 18


def _png(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    if (picture[..., :1] == picture).all():
        image = Image.fromarray(picture[..., 0])
    else:
        image = _with_palette(picture)
    image.save(buffer, 'PNG', compress_level=4)  # 6 takes twice the time for one per cent
    return buffer.getvalue()


def _with_palette(picture: NDArray[np.uint8]) -> Image.Image:
    """Reduce a picture to 256 colours, which takes a third off the file and hardly shows.

    The gray levels and the colours of the legend have their place; the rest is for blends.
    """
    fixed = [(level, level, level) for level in np.rint(np.arange(64) * 255 / 63).astype(int)]
    fixed += [tuple(np.rint(_rgb(label.color) * 255).astype(int)) for label in CLASSES]
    red, green, blue = np.moveaxis(picture, -1, 0)
    vivid = (red != green) | (green != blue)
    blends = Image.fromarray(picture[vivid][None]).quantize(256 - len(fixed)).getpalette() or []
    palette = Image.new('P', (1, 1))
    palette.putpalette([*np.ravel(fixed).tolist(), *blends][: 3 * 256])
    return Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE)


# ---------------------------------------------------------------------------------- comparisons

MARK = '#ff2d55'
"""Colour of voxels that differ; no class has one like it."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a strip: the bare scan, or what is painted over it.

    Attributes
    ----------
    labels
        Label map `(X, Y, Z)` on the strip's grid.
    marked
        Voxels that get one colour, :data:`MARK`, instead of labels.
    words
        Written below, such as a score.
    """

    labels: NDArray[np.integer] | None = None
    marked: NDArray[np.bool_] | None = None
    words: str = ''


@dataclass(frozen=True, eq=False)
class Strip:
    """One slice of one scan, shown several times side by side.

    Attributes
    ----------
    title
        Written above.
    grid
        Of all arrays, upright (see :func:`upright`).
    axis, index
        The RAS axis that the slice crosses, and where.
    scan
        Intensities; None leaves the background black.
    panels
        From left to right.
    """

    title: str
    grid: Grid
    axis: int
    index: int
    scan: NDArray[np.floating] | None
    panels: Sequence[Panel]


def draw_comparison(
    path: Path, headings: Sequence[str], strips: Sequence[Strip], *, text: str = ''
) -> Path:
    """Draw segmentations side by side, one strip below the other, with a legend.

    Parameters
    ----------
    path
        The PNG file.
    headings
        Of the columns.
    strips
        At least one; each has as many panels as there are headings.
    text
        Written at the bottom, before the convention.

    Returns
    -------
    Path
        The file.
    """
    width = max(WIDTH, GAP + len(headings) * 170)
    pitch = min(300, (width - GAP) // len(headings))
    first = (width - pitch * len(headings) + GAP) // 2
    lefts = [first + pitch * column for column in range(len(headings))]
    top, pieces, shown, marked = 34, [], set(), False
    for strip in strips:
        seen = [panel.labels for panel in strip.panels if panel.labels is not None]
        tile, scale = _fit(strip, seen, pitch - GAP, top + 24)
        mosaic = Mosaic(strip.grid, (tile,), (tile.size[0], pitch - GAP), scale)
        brain = np.maximum.reduce(seen) if seen else None
        scan = None if strip.scan is None else mosaic.cut(_window(strip.scan, brain))
        pictures = []
        for panel in strip.panels:
            soft = None if panel.labels is None else mosaic.memberships(panel.labels)
            if scan is not None:
                bare = scan
            else:  # flat colours where there are labels, black elsewhere
                bare = np.zeros(mosaic.shape, np.float32) if soft is None else 1 - soft[0]
            canvas = _gray(bare)
            if soft is not None:
                canvas = _filled(mosaic, bare, soft)[0]
                shown |= set(np.unique(soft.argmax(axis=0)))
            if panel.marked is not None:
                alpha = mosaic.cut(panel.marked, kernel='linear')[..., None]
                canvas = 0.6 * canvas * (1 - alpha) + _rgb(MARK) * alpha
                marked = True
            pictures.append(np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8))
        pieces.append((top, tile, mosaic, strip, pictures))
        top += 24 + tile.size[0] + 30

    legend = [
        (label.color, f'{label.abbreviation} {label.name}')
        for channel, label in enumerate(LABELS)
        if channel and channel in shown
    ] + ([(MARK, 'differs')] if marked else [])
    image = Image.new('RGB', (width, top + 56))
    draw = ImageDraw.Draw(image)
    for left, heading in zip(lefts, headings, strict=True):
        middle = left + (pitch - GAP) / 2
        words = _short(draw, heading, pitch - 8)
        draw.text((middle, 18), words, '#ffffff', _font(16), anchor='mm')
    for above, tile, mosaic, strip, pictures in pieces:
        where = f'{PLANES[strip.axis]}, {"xyz"[strip.axis]} {round(mosaic.position_mm(tile))} mm'
        words = f'{strip.title}   {where}' if strip.title else where
        draw.text((max(first, 12), above + 12), words, '#c8c8c8', _font(13), anchor='lm')
        for left, panel, picture in zip(lefts, strip.panels, pictures, strict=True):
            image.paste(Image.fromarray(picture), (left, above + 24))
            below = (left + (pitch - GAP) / 2, above + 24 + tile.size[0] + 12)
            draw.text(below, panel.words, '#ffffff', _font(13), anchor='mm')
        for x, side, anchor in ((first + 3, 0, 'lm'), (first + pitch - GAP - 3, 1, 'rm')):
            middle = above + 24 + tile.size[0] / 2
            draw.text((x, middle), EDGES[strip.axis][side], '#ffffff', _font(13), anchor=anchor)
    _write_legend(draw, 12, top + 14, legend, half=6)
    draw.text((12, top + 42), text + CONVENTION, '#c8c8c8', _font(13), anchor='lm')
    return write_bytes(path, _png(np.asarray(image)))


def _fit(
    strip: Strip, seen: Sequence[NDArray[np.integer]], side: int, top: int
) -> tuple[Tile, float]:
    """Return the part of a slice that shows what is labelled, centred in a frame; pixels a mm."""
    others = list(_others(strip.axis))
    spacing = strip.grid.spacing_mm[others]
    shape = np.array(strip.grid.shape)[others]
    inside = np.zeros(shape, bool)
    for labels in seen:
        inside |= np.moveaxis(labels, strip.axis, 0)[strip.index] > 0
    if inside.any():
        corners = np.argwhere(inside)
        low, high = corners.min(axis=0) * spacing, corners.max(axis=0) * spacing
    else:
        low, high = np.zeros(2), (shape - 1) * spacing
    low, size = low - MARGIN_MM, high - low + 2 * MARGIN_MM
    scale = float(min(side / size[0], 1.3 * side / size[1]))
    low[0] -= (side / scale - size[0]) / 2
    height = int(size[1] * scale)
    return Tile(strip.axis, strip.index, (low[0], low[1]), (0, 0), (height, side)), scale


def _short(draw: ImageDraw.ImageDraw, words: str, width: float, size: int = 16) -> str:
    """Cut what does not fit."""
    if draw.textlength(words, _font(size)) <= width:
        return words
    while words and draw.textlength(words + '…', _font(size)) > width:
        words = words[:-1]
    return words + '…'


def draw_agreement(
    path: Path, title: str, models: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Path:
    """Draw Bland-Altman plots of volumes, one for each model, on the same axes.

    Parameters
    ----------
    path
        The PNG file.
    title
        Written above.
    models
        Name -> predicted and reference volumes in ml, in the same order.

    Returns
    -------
    Path
        The file.
    """
    plots = []
    for name, (found, truth) in models.items():
        a, b = np.asarray(found, float), np.asarray(truth, float)
        known = np.isfinite(a) & np.isfinite(b)
        plots.append((name, (a + b)[known] / 2, (a - b)[known], bland_altman(a, b)))
    columns = min(3, len(plots))
    pitch, height = min(560, WIDTH // columns), 330
    means = np.concatenate([mean for _, mean, _, _ in plots])
    heights = [0.0, *np.concatenate([difference for _, _, difference, _ in plots])]
    heights += [edge for *_, limits in plots for edge in (limits.lower, limits.upper)]
    x_ticks = round_ticks(means.min(initial=np.inf), means.max(initial=-np.inf))
    low, high = float(np.nanmin(heights)), float(np.nanmax(heights))
    y_ticks = round_ticks(low - 0.03 * (high - low), high + 0.03 * (high - low))
    image = Image.new('RGB', (WIDTH, 44 + -(-len(plots) // columns) * height + 34), '#ffffff')
    draw = ImageDraw.Draw(image)
    draw.text((16, 22), title, '#000000', _font(18), anchor='lm')
    note = 'Lines: mean difference and limits of agreement (Bland and Altman, 1999).'
    draw.text((16, image.height - 17), note, '#505050', _font(13), anchor='lm')
    for number, (name, mean, difference, limits) in enumerate(plots):
        row, column = divmod(number, columns)
        left, top = column * pitch + 84, 44 + row * height + 28
        right, bottom = (column + 1) * pitch - 104, 44 + (row + 1) * height - 52
        x, y = axis_scale(x_ticks, left, right), axis_scale(y_ticks, bottom, top)
        heading = _short(draw, f'{name}  (n = {limits.n})', pitch - 90)
        draw.text((left, top - 14), heading, '#000000', _font(16), anchor='lm')
        for tick in x_ticks:
            draw.line((x(tick), bottom, x(tick), bottom + 4), '#606060')
            draw.text((x(tick), bottom + 14), f'{tick:g}', '#303030', _font(12), anchor='mm')
        for tick in y_ticks:
            draw.line((left - 4, y(tick), left, y(tick)), '#606060')
            draw.text((left - 8, y(tick)), f'{tick:g}', '#303030', _font(12), anchor='rm')
        draw.line((left, y(0), right, y(0)), '#b0b0b0')
        for value, words, ink, aside in (
            (limits.upper, '+1.96 SD', '#d55e00', -14),
            (limits.bias, 'mean', '#0072b2', 0),
            (limits.lower, '-1.96 SD', '#d55e00', 14),
        ):
            if math.isfinite(value):
                draw.line((left, y(value), right, y(value)), ink, 2)
                # The words stay apart where the lines do not.
                middle = y(limits.bias) + aside
                at = (min, max)[aside > 0](y(value), middle) if aside else middle
                words = f'{words} {value:.3g}'
                draw.text((right + 6, at), words, ink, _font(12), anchor='lm')
        draw.rectangle((left, top, right, bottom), outline='#606060')
        for a, b in zip(mean, difference, strict=True):
            draw.ellipse((x(a) - 3, y(b) - 3, x(a) + 3, y(b) + 3), '#808080', '#000000')
        words = 'mean of predicted and reference (ml)'
        draw.text(((left + right) / 2, bottom + 34), words, '#303030', _font(12), anchor='mm')
        side = Image.new('RGB', (bottom - top, 16), '#ffffff')
        words = 'predicted - reference (ml)'
        ImageDraw.Draw(side).text((side.width / 2, 8), words, '#303030', _font(12), anchor='mm')
        image.paste(side.rotate(90, expand=True), (left - 78, top))
    return write_bytes(path, _png(np.asarray(image)))


def axis_scale(ticks: NDArray[np.float64], start: float, end: float) -> Callable[[float], float]:
    """Return what maps a value to a pixel: the first tick to `start`, the last to `end`."""
    return lambda value: start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start)


def round_ticks(low: float, high: float, count: int = 5) -> NDArray[np.float64]:
    """Return about `count` round numbers that enclose two values, evenly apart."""
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = 0.0, 1.0
    if high - low < 1e-9:
        low, high = low - max(abs(low) * 0.1, 0.5), high + max(abs(high) * 0.1, 0.5)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return np.round(np.arange(first, last + 1) * step, 10)


# -------------------------------------------------------------------------------------- change

CHANGES = {
    'new': ('#d55e00', 'apart from every earlier lesion, and large and sure enough'),
    'enlarged': ('#f0e442', 'larger, by more than its surface leaves in doubt'),
    'shrunk': ('#009e73', 'smaller, by more than its surface leaves in doubt'),
    'resolved': ('#cc79a7', 'an earlier lesion, large and sure enough, that is no longer there'),
    'unclear': ('#bbbbbb', 'in one scan only, but too small or too doubtful to be a change'),
    'stable': ('#56b4e9', 'in both scans, and no change of volume beyond what is in doubt'),
}
"""What can become of a lesion: its colour (after Okabe and Ito) and what it means."""


def draw_changes(
    path: Path,
    scans: Sequence[tuple[str, Volume]],
    brain: NDArray[np.bool_],
    marked: Mapping[str, NDArray[np.floating]],
    counts: Mapping[str, int],
    places: Sequence[tuple[NDArray[np.floating], str]] = (),
    *,
    slices: int = 5,
    frames: int = 6,
    extent_mm: float = 40.0,
) -> Path:
    """Draw two scans of one person one below the other, and what became of the lesions.

    Parameters
    ----------
    path
        The PNG file.
    scans
        Name and scan, the earlier first, both on one upright grid.
    brain
        (X, Y, Z), true within the brain.
    marked
        Key of :data:`CHANGES` -> how much of each voxel is lesion of this kind, (X, Y, Z).
    counts
        Key of :data:`CHANGES` -> number of lesions, for the legend.
    places
        Where to look closely, RAS mm of the grid, and what to write there; the first `frames`
        are drawn.
    slices, frames, extent_mm
        Slices through the brain, close frames below them, and the width of a frame.

    Returns
    -------
    Path
        The file.
    """
    grid = scans[1][1].grid
    axis = grid.thick_axis
    across, down = _others(axis)
    spacing = grid.spacing_mm
    whole = brain if brain.any() else np.ones(grid.shape, bool)
    box = ndimage.find_objects(whole.astype(np.uint8))[0]
    low = np.array([part.start for part in box]) * spacing - MARGIN_MM
    size = np.array([part.stop for part in box]) * spacing + MARGIN_MM - low
    # Slices with change first, then those with lesion.
    weights = sum(
        array.sum(axis=(across, down)) * (0.05 if name in ('stable', 'unclear') else 1)
        for name, array in marked.items()
    )
    pitch = (WIDTH - GAP) // slices
    scale = (pitch - GAP) / size[across]
    shape = (int(size[down] * scale), pitch - GAP)
    tiles = [
        Tile(axis, index, (low[across], low[down]), (GAP, GAP + column * pitch), shape)
        for column, index in enumerate(
            _choose(whole.sum(axis=(across, down)), np.asarray(weights), slices)
        )
    ]
    rows = [(Mosaic(grid, tuple(tiles), (shape[0] + GAP, WIDTH), scale), ['' for _ in tiles])]
    side = (WIDTH - GAP) // frames - GAP
    tiles, words = [], []
    for column, (place, text) in enumerate(places[:frames]):
        voxel = np.linalg.solve(grid.affine, (*place, 1))[:3]
        index = int(np.clip(round(voxel[axis]), 0, grid.shape[axis] - 1))
        corner = (voxel * spacing - extent_mm / 2)[[across, down]]
        origin = (GAP, GAP + column * (side + GAP))
        tiles.append(Tile(axis, index, (corner[0], corner[1]), origin, (side, side)))
        words.append(text)
    if tiles:
        scale = side / extent_mm
        rows.append((Mosaic(grid, tuple(tiles), (side + GAP, WIDTH), scale), words))

    windows = [_window(scan.data, brain.astype(np.uint8)) for _, scan in scans]
    pictures = []
    for mosaic, words in rows:
        bare = [_gray(mosaic.cut(window)) for window in windows]
        over = bare[-1].copy()
        for name, array in reversed(list(marked.items())):
            field = mosaic.cut(array, kernel='linear')
            if field.any():
                _draw_line(over, field, CHANGES[name][0], level=0.3)
        names = (*(name for name, _ in scans), 'change')
        for name, canvas in zip(names, (*bare, over), strict=True):
            left, top = mosaic.tiles[0].origin[::-1]
            tag = (left + 8 + 4 * len(name), top + 10, name)
            below = words if name == 'change' and any(words) else ()
            pictures.append(_finish(mosaic, canvas, (), [tag], below=below, caption=False))

    framed = Image.new('RGB', (WIDTH, sum(len(picture) for picture in pictures) + 56))
    top = 0
    for picture in pictures:
        framed.paste(Image.fromarray(picture), (0, top))
        top += len(picture)
    draw = ImageDraw.Draw(framed)
    entries = [(CHANGES[name][0], f'{name} ({counts[name]})') for name in CHANGES]
    _write_legend(draw, 12, top + 14, entries, half=1)
    text = ''
    if len(rows) > 1:
        text = f'Each close frame is {extent_mm:.0f} mm wide; volumes are in cubic mm. '
    draw.text((12, top + 40), text + CONVENTION, '#c8c8c8', _font(13), anchor='lm')
    return write_bytes(path, _png(np.asarray(framed)))


def draw_standard(
    paths: tuple[Path, Path], template: Volume, scan: Volume, labels: NDArray[np.integer]
) -> None:
    """Draw a template and a scan in its space, under the same outlines: those of the scan.

    Parameters
    ----------
    paths
        PNG files of the template and of the scan.
    template, scan
        On one grid.
    labels
        (X, Y, Z), the scan's labels on it.
    """
    labels, grid = upright(labels, template.grid)
    mosaic = plan_mosaic(Volume(upright(template.data, template.grid)[0], grid), labels)
    soft = mosaic.memberships(labels)
    for path, volume in zip(paths, (template, scan), strict=True):
        bare = mosaic.cut(_window(upright(volume.data, volume.grid)[0], labels))
        picture = _finish(mosaic, _outlined(bare, soft), CLASSES)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, _png(picture))


def draw_frequency(background: Volume, frequency: NDArray[np.floating], *, people: int) -> bytes:
    """Draw how often each voxel of a template is a lesion.

    Parameters
    ----------
    background
        What it is shown over, 0 to 1; 0 around the brain or the head.
    frequency
        (X, Y, Z) on the same grid, share of people with a lesion there.
    people
        Their number, for the legend.

    Returns
    -------
    bytes
        A PNG file.
    """
    shown = Volume(*upright(background.data, background.grid))
    frequency = upright(frequency, background.grid)[0]
    # The slices are those of a label map, with more lesion where lesions are more frequent.
    often = frequency > 0.3 * frequency.max()
    labels = np.where(often & (frequency > 0), LESION.index, (shown.data > 0.1) * 1)
    mosaic = plan_mosaic(shown, labels.astype(np.uint8), follow_lesions=True)
    top = max(float(frequency.max()), 1e-6)
    heat = np.clip(mosaic.cut(frequency, kernel='linear') / top, 0, 1)
    opacity = np.clip(6 * heat, 0, 0.9)[..., None]
    canvas = 0.8 * _gray(mosaic.cut(shown.data)) * (1 - opacity) + _heat(heat) * opacity
    words = f'lesions: 0 to {top:.0%} of {people} {"person" if people == 1 else "people"}'
    return _png(_finish(mosaic, canvas, heat=words if frequency.any() else 'no lesions'))
