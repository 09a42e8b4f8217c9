"""The description of the method that users may copy into a paper, with its references.

It is written as Markdown with pandoc's citation keys, as BibTeX, and as HTML that needs no pandoc.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from bids_jointseg.bids import write_text

REFERENCES = Path(__file__).parent / 'data' / 'citations.bib'

NOTICE = (
    'The following text describes how the results were made. Copy it unchanged: it is released '
    'under the CC0 licence.'
)


def write_citation(out_dir: Path, prose: str) -> list[Path]:
    """Write ``logs/CITATION.{md,bib,html}``.

    Parameters
    ----------
    out_dir
        The output dataset.
    prose
        Markdown: paragraphs, ``*emphasis*``, `` `code` ``, and citations as ``[@key; @other]``
        or ``@key``.
    """
    page = _PAGE.format(notice=NOTICE, body=to_html(prose, heading='h2'))
    texts = {'md': f'{NOTICE}\n\n{prose}\n', 'bib': _bibliography(), 'html': page}
    return [
        write_text(out_dir / 'logs' / f'CITATION.{suffix}', text) for suffix, text in texts.items()
    ]


def _bibliography() -> str:
    return REFERENCES.read_text(encoding='utf-8')


def parse_bibliography(text: str) -> dict[str, dict[str, str]]:
    """Return key -> fields of the entries of a BibTeX file, one field per line."""
    entries = {}
    for key, body in re.findall(r'@\w+\{(\w+),\n(.*?)\n\}', text, re.DOTALL):
        fields = re.findall(r'^\s*(\w+) = \{(.*)\},?$', body, re.MULTILINE)
        entries[key] = {name: re.sub('[{}]', '', value) for name, value in fields}
    return entries


def to_html(prose: str, *, heading: str) -> str:
    """Return the prose as HTML, citations as author and year, with the list of references.

    Parameters
    ----------
    prose
        See :func:`write_citation`; a key that is none of ours is text.
    heading
        Tag of the headline of the references, ``h2`` or lower.
    """
    entries = parse_bibliography(_bibliography())
    key = rf'@({"|".join(entries)})\b'
    cited = dict.fromkeys(re.findall(key, prose))

    def label(name: str) -> tuple[str, str]:
        authors = entries[name]['author'].split(' and ')
        family = [author.split(',')[0] for author in authors]
        if len(family) > 2:
            return f'{family[0]} et al.', entries[name]['year']
        return ' and '.join(family), entries[name]['year']

    def in_brackets(match: re.Match[str]) -> str:
        links = (
            f'<a href="#ref-{name}">{" ".join(label(name))}</a>'
            for name in re.findall(key, match[0])
        )
        return '(' + '; '.join(links) + ')'

    def in_text(match: re.Match[str]) -> str:
        name, year = label(match[1])
        return f'{name} (<a href="#ref-{match[1]}">{year}</a>)'

    text = html.escape(prose)
    text = re.sub(r'\*(.+?)\*', r'<em>\1</em>', text)
    text = re.sub('`(.+?)`', r'<code>\1</code>', text)
    text = re.sub(rf'\[{key}(; {key})*\]', in_brackets, text)
    text = re.sub(key, in_text, text)
    blocks = [f'<p>{paragraph}</p>' for paragraph in text.split('\n\n')]
    items = []
    for cite in cited:
        entry = {name: html.escape(value) for name, value in entries[cite].items()}
        place = entry.get('journal') or entry.get('booktitle', '')
        doi = (
            f' <a href="https://doi.org/{entry["doi"]}">{entry["doi"]}</a>'
            if 'doi' in entry
            else ''
        )
        authors = entry['author'].replace(' and others', ' et al.').replace(' and ', '; ')
        items.append(
            f'<li id="ref-{cite}">{authors} ({entry["year"]}). {entry["title"]}. '
            f'<em>{place}</em>.{doi}</li>'
        )
    if items:
        blocks += [f'<{heading}>References</{heading}>', '<ol>', *items, '</ol>']
    return '\n'.join(blocks)


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>How the results were made</title>
<style>body{{max-width:45em;margin:2em auto;padding:0 1em;font:1em/1.5 sans-serif}}</style>
</head>
<body>
<p><small>{notice}</small></p>
{body}
</body>
</html>
"""
