"""How fast it is, how much memory it takes, and how it scales with the cohort.

    python benchmarks/speed.py forward OUT [--monai FOLDER]
    python benchmarks/speed.py app OUT BIDS_DIR LABEL
    python benchmarks/speed.py cohort OUT [--subjects 100 1000 10000]
    python benchmarks/speed.py training OUT [--monai FOLDER]

Each prints one table and writes OUT/<name>.json with machine, versions and settings. Everything is
measured in processes of its own, in the environment that the commands set for themselves, and
processor seconds stand beside wall time, since other work on the machine changes them less.

MONAI is the comparator and no dependency: `pip install --no-deps --target FOLDER monai`. Without
it its rows are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bids_jointseg import __version__
from bids_jointseg.cli import _spare_processors

PATCH = (96, 112, 48)
"""Voxels of a training sample: one of the default recipe's."""


# --- watching a process -------------------------------------------------------------------------


def watch(command: Sequence[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a command; return wall and processor seconds, peak memory (GB) and what it said."""
    said = Path(f'/tmp/speed-{os.getpid()}.txt')
    begun = time.monotonic()
    seconds: dict[int, float] = {}
    peak = 0.0
    with said.open('w') as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
        )
        while process.returncode is None:
            family = list(_descendants(process.pid))
            seconds |= dict(family)
            peak = max(peak, sum(_memory_gb(pid) for pid, _ in family))
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.3)
    wall = time.monotonic() - begun
    text = said.read_text()
    said.unlink()
    if process.returncode:
        raise SystemExit(f'{command}: exit {process.returncode}\n{text}')
    return {'wall_s': wall, 'cpu_s': sum(seconds.values()), 'peak_gb': peak, 'said': text}


def _descendants(root: int) -> Iterator[tuple[int, float]]:
    """Yield a process and all below it, with the processor seconds of each."""
    children: dict[int, list[int]] = {}
    spent = {}
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            fields = (folder / 'stat').read_text().rpartition(')')[2].split()
        except OSError:
            continue
        pid = int(folder.name)
        children.setdefault(int(fields[1]), []).append(pid)
        spent[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        if pid in spent:
            yield pid, spent[pid]
        waiting += children.get(pid, [])


def _memory_gb(pid: int) -> float:
    """Return the memory of a process, its share of what it shares with others (PSS)."""
    try:
        text = Path(f'/proc/{pid}/smaps_rollup').read_text()
    except OSError:
        return 0.0
    found = re.search(r'^Pss:\s+(\d+)', text, re.M)
    return int(found[1]) * 1024 / 1e9 if found else 0.0


def case(function: str, **options: Any) -> dict[str, Any]:
    """Call a function of this file in a process of its own; it returns numbers."""
    command = [sys.executable, __file__, 'case', function, json.dumps(options)]
    found = watch(command, {'OMP_NUM_THREADS': str(options.get('threads', 1))})
    numbers = json.loads(found['said'].splitlines()[-1])
    return {'peak_gb': found['peak_gb'], **numbers}


def timed(run: Callable[[], Any], repeats: int = 1) -> dict[str, float]:
    """Return the least wall and processor seconds of some runs."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.monotonic(), time.process_time()
        run()
        walls.append(time.monotonic() - wall)
        cpus.append(time.process_time() - cpu)
    return {'wall_s': min(walls), 'cpu_s': min(cpus)}


def report(out: Path, name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> None:
    """Print a table and write it with all that it depends on."""
    import numpy
    import SimpleITK
    import torch

    shown = [
        {k: f'{v:.3g}' if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows
    ]
    widths = {key: max(len(key), *(len(row[key]) for row in shown)) for key in shown[0]}
    for row in ({key: key for key in widths}, *shown):
        print('  '.join(row[key].ljust(width) for key, width in widths.items()).rstrip())
    processor = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    record = {
        'date': time.strftime('%Y-%m-%d'),
        'machine': {
            'processor': processor[1] if processor else platform.machine(),
            'processors': os.cpu_count(),
            'memory_gb': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9),
            'load': os.getloadavg(),
        },
        'versions': {
            'bids_jointseg': __version__,
            'python': platform.python_version(),
            'torch': torch.__version__,
            'numpy': numpy.__version__,
            'SimpleITK': SimpleITK.__version__,
        },
        'settings': settings,
        'rows': list(rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f'{name}.json').write_text(json.dumps(record, indent=2) + '\n')


# --- the network --------------------------------------------------------------------------------


def _plain_highresnet() -> Any:
    """Return HighResNet as it is usually written, both modalities as channels of one image."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
            super().__init__()
            self.extra = outputs - inputs
            layers: list[nn.Module] = []
            for width in (inputs, outputs):
                layers += [
                    nn.InstanceNorm3d(width, affine=True),
                    nn.ReLU(),
                    nn.Conv3d(width, outputs, 3, padding=dilation, dilation=dilation, bias=False),
                ]
            self.body = nn.Sequential(*layers)

        def forward(self, x: Any) -> Any:
            return self.body(x) + nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, self.extra))

    layers: list[nn.Module] = [nn.Conv3d(2, 16, 3, padding=1, bias=False)]
    width = 16
    for size, dilation in ((16, 1), (32, 2), (64, 4)):
        for _ in range(3):
            layers.append(Block(width, size, dilation))
            width = size
    return nn.Sequential(
        *layers, nn.InstanceNorm3d(64, affine=True), nn.ReLU(), nn.Conv3d(64, 8, 1)
    )


def _monai(folder: str) -> Any:
    sys.path.append(folder)
    from monai.networks.nets import HighResNet

    return HighResNet(spatial_dims=3, in_channels=2, out_channels=8)


def forward(
    which: str, shape: Sequence[int], threads: int, repeats: int, monai: str
) -> dict[str, float]:
    """Time one network on one volume of noise, and count its multiply-adds."""
    import torch

    from bids_jointseg.card import read_card
    from bids_jointseg.inference import predict
    from bids_jointseg.network import HighResNet, load_model

    torch.set_num_threads(threads)
    images = {name: torch.randn(*shape).numpy() for name in ('T1w', 'FLAIR')}
    if which in ('jointseg', 'highresnet'):
        card = read_card('jointseg')
        ours = which == 'jointseg'
        network = load_model(card) if ours else HighResNet().eval()
        network = network.to(memory_format=torch.channels_last_3d)
        options = {'window': card.window if ours else None, 'device': 'cpu', 'threads': threads}

        def run() -> Any:
            return predict(network, images, **options)
    else:
        network = (_monai(monai) if which == 'monai' else _plain_highresnet()).eval()
        both = torch.stack([torch.from_numpy(image) for image in images.values()])[None]

        def run() -> Any:
            with torch.inference_mode():
                return network(both).softmax(1)

    count = 0

    def add(layer: Any, _: Any, found: Any) -> None:
        nonlocal count
        count += found[0].numel() * layer.weight[0].numel()

    hooks = [
        layer.register_forward_hook(add)
        for layer in network.modules()
        if isinstance(layer, torch.nn.Conv3d)
    ]
    found = timed(run)
    for hook in hooks:
        hook.remove()
    if repeats > 1:
        again = timed(run, repeats - 1)
        found = {key: min(value, again[key]) for key, value in found.items()}
    return found | {'multiply_adds': count}


def number_type(*, ours: bool) -> str:
    """Return the type that a network computes in: ours in the machine's fast one."""
    import torch

    from bids_jointseg.inference import fast_type

    fast = fast_type(torch.device('cpu')) if ours else None
    return str(fast or torch.float32).removeprefix('torch.')


def peak(threads: int, numbers: str) -> dict[str, float]:
    """Return the most multiply-adds per second that PyTorch reaches here in a type of number."""
    import torch

    torch.set_num_threads(threads)
    kind = getattr(torch, numbers)
    last = torch.channels_last_3d
    a = torch.randn(2048, 2048, dtype=kind)
    x = torch.randn(1, 64, 48, 48, 48, dtype=kind).to(memory_format=last)
    w = torch.randn(64, 64, 3, 3, 3, dtype=kind).to(memory_format=last)
    with torch.inference_mode():
        jobs = (
            (2048**3, lambda: a @ a),
            (48**3 * 64 * 64 * 27, lambda: torch.conv3d(x, w, None, 1, 1)),
        )
        rates = []
        for number, job in jobs:
            found = timed(job, 10)
            rates.append((number / found['wall_s'], number * threads / found['cpu_s']))
    return {'per_wall_s': max(r[0] for r in rates), 'per_cpu_s': max(r[1] for r in rates)}


def forward_table(arguments: argparse.Namespace) -> None:
    """Compare networks on one volume."""
    names = {
        'jointseg': 'default model, in windows',
        'highresnet': "HighResNet, this package's",
        'plain': 'HighResNet, plain PyTorch',
        'monai': 'HighResNet, MONAI',
    }
    if not arguments.monai:
        del names['monai']
    options = {
        'shape': arguments.shape, 'threads': arguments.threads, 'monai': arguments.monai,
    }  # fmt: skip
    kinds = {which: number_type(ours=which in ('jointseg', 'highresnet')) for which in names}
    top = {
        numbers: case('peak', threads=arguments.threads, numbers=numbers)
        for numbers in sorted(set(kinds.values()))
    }
    rows = []
    for which, name in names.items():
        repeats = arguments.repeats if which == 'jointseg' else 1
        found = case('forward', which=which, repeats=repeats, **options)
        rate = found['multiply_adds'] / found['cpu_s'] * arguments.threads
        rows.append(
            {
                'network': name,
                'numbers': kinds[which],
                'wall_s': found['wall_s'],
                'cpu_s': found['cpu_s'],
                'peak_gb': found['peak_gb'],
                'giga_multiply_adds': found['multiply_adds'] / 1e9,
                'share_of_peak': rate / top[kinds[which]]['per_cpu_s'],
            }
        )
    for row in rows:
        row['cpu_of_last'] = row['cpu_s'] / rows[-1]['cpu_s']
        row['wall_of_last'] = row['wall_s'] / rows[-1]['wall_s']
    report(arguments.out, 'forward', rows, peak=top, **options)


# --- the app ------------------------------------------------------------------------------------


def app_table(arguments: argparse.Namespace) -> None:
    """Run the whole app on one participant, cold and warm."""
    rows = []
    for mode in ('--fast', ''):
        folder = arguments.out / f'app{mode or "-default"}'
        shutil.rmtree(folder, ignore_errors=True)
        for heat in ('cold', 'warm'):
            command = [
                sys.executable, '-m', 'bids_jointseg.cli', str(arguments.bids_dir),
                str(folder / 'out'), 'participant', '--participant-label', arguments.label,
                '-w', str(folder / 'work'), '--nprocs', str(arguments.threads),
                '--omp-nthreads', str(arguments.threads), '--device', 'cpu', *mode.split(),
            ]  # fmt: skip
            found = watch(command)
            stages = {
                name: float(seconds)
                for name, seconds in re.findall(
                    r'\] \S+  (.+?) \((\d+\.\d) s\)$', found['said'], re.M
                )
            }
            main = sum(stages.get(name, 0) for name in ('FLAIR aligned with the T1w', 'segmented'))
            rows.append(
                {
                    'run': f'{mode or "default"}, {heat}',
                    'wall_s': found['wall_s'],
                    'cpu_s': found['cpu_s'],
                    'peak_gb': found['peak_gb'],
                    'registration_and_model_s': main,
                    'the_rest': 1 - main / found['wall_s'],
                    'stages': stages,
                }
            )
    report(arguments.out, 'app', rows, threads=arguments.threads)


# --- the cohort ---------------------------------------------------------------------------------


def make_cohort(root: Path, subjects: int) -> None:
    """Make a dataset of tiny scans."""
    import gzip

    import nibabel as nib
    import numpy as np

    image = nib.Nifti1Image(np.zeros((8, 8, 8), np.uint8), np.diag([8.0, 8, 8, 1]))
    content = gzip.compress(image.to_bytes())
    root.mkdir(parents=True)
    record = {'Name': 'Tiny', 'BIDSVersion': '1.10.0'}
    (root / 'dataset_description.json').write_text(json.dumps(record))
    for number in range(subjects):
        stem = f'sub-{number:05d}'
        (root / stem / 'anat').mkdir(parents=True)
        for suffix in ('T1w', 'FLAIR'):
            (root / stem / 'anat' / f'{stem}_{suffix}.nii.gz').write_bytes(content)


def make_results(root: Path, bids_dir: Path, subjects: int) -> None:
    """Make the tables of so many segmented scans, with 30 lesions each."""
    from bids_jointseg import bids
    from bids_jointseg.labels import LABELS

    lesion = {
        name: 'deep' if name == 'zone' else 1.0 for name in bids.LESION_COLUMNS if name != 'lesion'
    }
    names = [label.abbreviation for label in LABELS[1:]]
    for number in range(subjects):
        stem = f'sub-{number:05d}'
        t1w = bids_dir / stem / 'anat' / f'{stem}_T1w.nii.gz'
        bids.write_tables(
            root,
            bids.Scan(stem[4:], None, t1w, None, stem),
            bids_dir,
            volumes=dict.fromkeys(names, 1e5),
            intervals=dict.fromkeys([*names, 'brain'], (9e4, 1.1e5)),
            lesions=[{'lesion': i + 1, **lesion} for i in range(30)],
            flags=[],
            quality={'verdict': 'pass', 'reasons': [], 'measures': {}},
            configuration={},
        )


def cohort_table(arguments: argparse.Namespace) -> None:
    """Plan, build the graph of, and gather cohorts of growing size; small ones at their best."""
    rows = []
    before: dict[str, tuple[int, dict[str, Any]]] = {}
    for subjects in arguments.subjects:
        folder = arguments.out / f'cohort-{subjects}'
        shutil.rmtree(folder, ignore_errors=True)
        make_cohort(folder / 'bids', subjects)
        make_results(folder / 'gathered', folder / 'bids', subjects)
        last = f'{subjects - 1:05d}'
        quiet = ['--skip-bids-validation', '-w', str(folder / 'work')]
        jobs = {
            'plan one': ['bids', 'out', 'participant', '--dry-run', '--participant-label', last],
            'plan all': ['bids', 'out', 'participant', '--dry-run'],
            'plan all, with the graph': ['bids', 'out', 'participant', '--boilerplate-only'],
            'group': ['bids', 'gathered', 'group'],
        }
        for job, (source, target, *options) in jobs.items():
            command = [sys.executable, '-m', 'bids_jointseg.cli', str(folder / source),
                       str(folder / target), *options, *quiet]  # fmt: skip
            # The shorter it is, the more a second of other work would count.
            tries = [watch(command) for _ in range(3 if subjects <= 1000 else 1)]
            found = min(tries, key=lambda measured: measured['wall_s'])
            row = {
                'job': job,
                'subjects': subjects,
                'wall_s': found['wall_s'],
                'cpu_s': found['cpu_s'],
                'peak_gb': found['peak_gb'],
                'wall_ms_per_added': '-',
                'cpu_ms_per_added': '-',
                'kb_per_added': '-',
            }
            if job in before:
                fewer, earlier = before[job]
                added = subjects - fewer
                for clock in ('wall', 'cpu'):
                    more = found[f'{clock}_s'] - earlier[f'{clock}_s']
                    row[f'{clock}_ms_per_added'] = 1e3 * more / added
                row['kb_per_added'] = 1e6 * (found['peak_gb'] - earlier['peak_gb']) / added
            before[job] = subjects, found
            rows.append(row)
        shutil.rmtree(folder)
    report(arguments.out, 'cohort', rows)


# --- training -----------------------------------------------------------------------------------


class Noise:
    """Samples of noise, each made when it is asked for."""

    def __init__(self, modalities: Sequence[str], groups: Sequence[frozenset[str]]) -> None:
        self.modalities, self.groups = tuple(modalities), tuple(groups)

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, number: int) -> Any:
        import torch

        from bids_jointseg.sampling import Sample

        draw = torch.Generator().manual_seed(number)
        images = {m: torch.randn(1, *PATCH, generator=draw) for m in self.modalities}
        chosen = torch.randint(len(self.groups), PATCH, generator=draw)
        target = torch.nn.functional.one_hot(chosen, len(self.groups)).movedim(-1, 0).float()
        return Sample(images, target, torch.ones(1, *PATCH), self.groups)


def train(which: str, steps: int, threads: int, monai: str) -> dict[str, float]:
    """Time iterations: one tissue and one lesion sample each, drawn by a process per stream."""
    import tempfile

    import torch
    from torch.utils.data import DataLoader

    from bids_jointseg import training
    from bids_jointseg.labels import CLASSES, PROTOCOLS
    from bids_jointseg.losses import OVERLAPS, supervised_risk
    from bids_jointseg.sampling import collate

    torch.set_num_threads(threads)
    data = {
        'tissue': Noise(['T1w'], [frozenset({name}) for name in CLASSES]),
        'lesions': Noise(['T1w', 'FLAIR'], PROTOCOLS['binary-lesion'].atoms()),
    }
    if which != 'monai':
        architecture: dict[str, Any] = {'name': 'highresnet'}
        if which == 'unet':
            architecture = {'name': 'unet', 'channels': [16, 32, 64, 128, 128]}
        settings = training.Settings(
            architecture=architecture,
            steps=steps,
            consistency_from=steps + 1,
            validate_every=steps + 1,
        )

        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                training.run(settings, data, None, [], Path(folder), workers=1)
    else:
        network = _monai(monai)
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)

        def run() -> None:
            streams = [
                iter(DataLoader(part, collate_fn=collate, num_workers=1)) for part in data.values()
            ]
            for _ in range(steps):
                for stream in streams:
                    batch = next(stream)
                    # A missing modality is a zero image, as there is one input.
                    shown = batch.images
                    both = [shown.get(m, torch.zeros_like(shown['T1w'])) for m in ('T1w', 'FLAIR')]
                    p = network(torch.cat(both, 1)).softmax(1)
                    supervised_risk(
                        p, batch.target, batch.groups, batch.valid,
                        entropy_weight=1.0, overlap=OVERLAPS['soergel'],
                    ).backward()  # fmt: skip
                optimiser.step()
                optimiser.zero_grad()

    found = timed(run)
    return {'wall_s_per_step': found['wall_s'] / steps, 'cpu_s_per_step': found['cpu_s'] / steps}


def training_table(arguments: argparse.Namespace) -> None:
    """Compare the training loop with a straightforward one."""
    names = {'unet': 'default network', 'highresnet': "HighResNet, this package's"}
    if arguments.monai:
        names['monai'] = 'HighResNet of MONAI, straightforward loop'
    options = {'threads': arguments.threads, 'monai': arguments.monai}
    rows = []
    for which, name in names.items():
        steps = arguments.steps * (4 if which == 'unet' else 1)
        rows.append({'training': name, **case('train', which=which, steps=steps, **options)})
    for row in rows:
        row['steps_per_wall_s'] = 1 / row['wall_s_per_step']
        row['times_as_fast_as_last'] = rows[-1]['wall_s_per_step'] / row['wall_s_per_step']
        row['by_cpu'] = rows[-1]['cpu_s_per_step'] / row['cpu_s_per_step']
    report(arguments.out, 'training', rows, patch=PATCH, steps=arguments.steps, **options)


def main() -> None:
    if sys.argv[1:2] == ['case']:
        options = json.loads(sys.argv[3])
        print(json.dumps(CASES[sys.argv[2]](**options)))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    commands = parser.add_subparsers(required=True)
    tables = {
        'forward': forward_table,
        'app': app_table,
        'cohort': cohort_table,
        'training': training_table,
    }
    for name, table in tables.items():
        command = commands.add_parser(name, help=table.__doc__)
        command.set_defaults(table=table)
        command.add_argument('out', type=Path)
        command.add_argument('--threads', type=int, default=2)
        command.add_argument('--monai', default='', help='folder that MONAI is installed in')
        if name == 'forward':
            command.add_argument('--shape', type=int, nargs=3, default=(176, 208, 56))
            command.add_argument('--repeats', type=int, default=3)
        elif name == 'app':
            command.add_argument('bids_dir', type=Path)
            command.add_argument('label')
        elif name == 'cohort':
            command.add_argument('--subjects', type=int, nargs='+', default=(100, 1000, 10_000))
        else:
            command.add_argument('--steps', type=int, default=3)
    arguments = parser.parse_args()
    _spare_processors()
    arguments.out = arguments.out.resolve()
    arguments.table(arguments)


CASES: dict[str, Callable[..., dict[str, float]]] = {
    'forward': forward, 'peak': peak, 'train': train,
}  # fmt: skip


if __name__ == '__main__':
    main()
