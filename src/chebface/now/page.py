"""Pages made of few kinds of blocks, each written as HTML and as Markdown."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

_STYLE = """
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color:#222;
background:#fff;max-width:60rem;margin:2.5rem auto;padding:0 1.25rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem}h2{font-size:1.25rem;margin:2.4rem 0 .6rem}
h3{font-size:1rem;margin:1.4rem 0 .4rem}p{margin:.5rem 0;max-width:46rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6rem 0}
th,td{padding:.28rem .9rem .28rem 0;text-align:right;border-bottom:1px solid #e4e4e4;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere}
thead th{border-bottom:2px solid #888;font-weight:600}tr.strong td{font-weight:700;background:#f3f6fa}
.row{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:.4rem 0;flex:0 1 auto;max-width:100%}
.row figure:not(:only-child){max-width:19rem}
figcaption{font-size:.85rem;color:#555;overflow-wrap:anywhere}img{max-width:100%;height:auto;display:block}
li{overflow-wrap:anywhere}details{margin:.5rem 0}
"""


@dataclass(frozen=True)
class Table:
    """A table of text; the first column is left-aligned, row `strong` stands out."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    strong: int | None = None


@dataclass(frozen=True)
class Picture:
    """A picture, and where it lies beside the page."""

    file: str
    content: bytes
    caption: str


@dataclass(frozen=True)
class Items:
    """A list under a line of its own, folded where it is long."""

    title: str
    lines: list[str]


Block = str | Table | Items | list[Picture]  # a str is a paragraph; "## " and "### " begin headings


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML page that asks for nothing from anywhere: pictures are data URIs."""
    parts = []
    for block in blocks:
        match block:
            case Table():
                head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.head)
                rows = [
                    f"<tr{' class=strong' if index == block.strong else ''}>"
                    + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
                    + "</tr>"
                    for index, row in enumerate(block.rows)
                ]
                parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")
            case Items():
                lines = "".join(f"<li>{html.escape(line)}</li>" for line in block.lines)
                state = " open" if len(block.lines) <= 10 else ""
                parts.append(f"<details{state}><summary>{html.escape(block.title)}</summary><ul>{lines}</ul></details>")
            case str():
                kind = "h3" if block.startswith("### ") else "h2" if block.startswith("## ") else "p"
                parts.append(f"<{kind}>{html.escape(block.lstrip('# ') if kind != 'p' else block)}</{kind}>")
            case _:
                figures = [
                    f'<figure><img alt="{html.escape(picture.caption)}" src="{_data_uri(picture)}">'
                    f"<figcaption>{html.escape(picture.caption).replace('/', '/<wbr>')}</figcaption></figure>"
                    for picture in block
                ]
                parts.append(f'<div class="row">{"".join(figures)}</div>')
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{name}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as Markdown; pictures are links to the files beside it."""
    parts = [f"# {_plain(title)}"]
    for block in blocks:
        match block:
            case Table():
                rule = "|".join(["---", *["---:"] * (len(block.head) - 1)])
                lines = [f"| {' | '.join(map(_plain, block.head))} |", f"|{rule}|"]
                for index, row in enumerate(block.rows):
                    cells = [f"**{_plain(cell)}**" if index == block.strong and cell else _plain(cell) for cell in row]
                    lines.append(f"| {' | '.join(cells)} |")
                parts.append("\n".join(lines))
            case Items():
                parts.append("\n".join([f"{_plain(block.title)}:", "", *(f"- {_plain(line)}" for line in block.lines)]))
            case str():
                parts.append(_plain(block))
            case _:
                parts += [
                    f"![{_plain(picture.caption)}]({picture.file})\n{_plain(picture.caption)}" for picture in block
                ]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown leaves alone, in a table too."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _data_uri(picture: Picture) -> str:
    kind = "image/svg+xml" if picture.file.endswith(".svg") else "image/png"
    return f"data:{kind};base64,{base64.b64encode(picture.content).decode()}"
