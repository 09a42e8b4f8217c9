"""Write what an image holds to standard output: a CycloneDX 1.6 bill of materials, as JSON.

Run in the image by the Python of the app: Debian's packages, Python's, and the model files. It
carries no date and no serial number, so the same packages give the same bytes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote


def debian() -> list[dict[str, Any]]:
    """Return Debian's packages as components."""
    fields = r'${Package}\t${Version}\t${Architecture}\n'
    command = ['/usr/bin/dpkg-query', '--show', f'--showformat={fields}']
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = (line.split('\t') for line in listed.splitlines())
    return [
        {
            'type': 'library',
            'name': name,
            'version': version,
            'purl': f'pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}',
        }
        for name, version, architecture in rows
    ]


def python() -> list[dict[str, Any]]:
    """Return Python's packages as components, with the licences that they declare."""
    components = []
    for found in metadata.distributions():
        name, version = found.metadata['Name'], found.version
        component = {
            'type': 'library',
            'name': name,
            'version': version,
            'purl': f'pkg:pypi/{re.sub("[-_.]+", "-", name).lower()}@{quote(version)}',
        }
        if expression := found.metadata.get('License-Expression'):
            component['licenses'] = [{'expression': expression}]
        elif (text := found.metadata.get('License', '').strip()) and '\n' not in text:
            component['licenses'] = [{'license': {'name': text}}]
        components.append(component)
    return components


def models() -> list[dict[str, Any]]:
    """Return the model files as components, with their hashes."""
    folder = metadata.distribution('bids_jointseg').locate_file('bids_jointseg/data/models')
    cards = [json.loads(path.read_text()) for path in sorted(Path(str(folder)).glob('*.json'))]
    return [
        {
            'type': 'machine-learning-model',
            'name': card['name'],
            'version': card['version'],
            'hashes': [{'alg': 'SHA-256', 'content': card['sha256']}],
            'licenses': [{'license': {'name': card['licence']}}],
        }
        for card in cards
    ]


def main() -> None:
    """Write the bill of materials."""
    components = [*debian(), *python(), *models()]
    for number, component in enumerate(components):
        component['bom-ref'] = component.get('purl', f'{component["name"]}-{number}')
    components.sort(key=lambda component: (component['type'], component['bom-ref']))
    version = metadata.version('bids_jointseg')
    record = {
        'bomFormat': 'CycloneDX',
        'specVersion': '1.6',
        'version': 1,
        'metadata': {
            'component': {'type': 'container', 'name': 'jointseg', 'version': version},
            'lifecycles': [{'phase': 'build'}],
        },
        'components': components,
    }
    sys.stdout.write(json.dumps(record, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
    main()
