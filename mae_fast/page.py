"""A page: HTML, CSS and a little JavaScript in one file that asks no network for anything."""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

CSS = """
:root { color-scheme: light dark; --line: #8884; --mark: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 72rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
nav a { margin-right: .8rem } p.note { opacity: .75; font-size: .9rem }
figure { margin: 1rem 0 } figure { overflow-x: auto }
figure svg { display: block; width: 100%; height: auto; min-width: 34rem; max-width: 56rem }
svg text { fill: currentColor } img { max-width: 100% }
figcaption { font-size: .9rem; opacity: .8 }
.wide { overflow: auto; max-height: 36rem; border: 1px solid var(--line) }
table { border-collapse: collapse; font-size: .85rem; width: 100% }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap }
table { font-variant-numeric: tabular-nums }
th:first-child, td:first-child, .text { text-align: left }
thead th { position: sticky; top: 0; background: Canvas; border-bottom: 1px solid var(--line) }
tbody tr:nth-child(even) { background: var(--mark) }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer }
button.copy { border: 1px solid var(--line); padding: .1rem .6rem; margin: .4rem 0 }
th[aria-sort=ascending] button::after { content: " \\25B2" }
th[aria-sort=descending] button::after { content: " \\25BC" }
pre { overflow-x: auto; padding: .6rem; background: var(--mark) }
"""
# A column is sorted by the numbers that its cells begin with, or as text where one has none.
SCRIPT = """
function cellValue(text) {
  const found = text.trim().match(/^[-+]?\\d[\\d.]*(e[-+]?\\d+)?/i);
  return found ? parseFloat(found[0]) : NaN;
}
function compareCells(a, b) {
  const x = cellValue(a), y = cellValue(b);
  if (!isNaN(x) && !isNaN(y)) return x - y;
  if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
  return a.localeCompare(b);
}
function toCsv(rows) {
  const quote = t => /[",\\n]/.test(t) ? '"' + t.replace(/"/g, '""') + '"' : t;
  return rows.map(r => r.map(quote).join(",")).join("\\n") + "\\n";
}
function sortTable(table, column, header) {
  const up = header.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0], rows = Array.from(body.rows);
  rows.sort((a, b) => (up ? 1 : -1) *
    compareCells(a.cells[column].textContent, b.cells[column].textContent));
  rows.forEach(row => body.appendChild(row));
}
function tableRows(table) {
  return Array.from(table.rows).map(r => Array.from(r.cells).map(c => c.textContent.trim()));
}
function copyText(text, button) {
  const done = () => { const t = button.textContent; button.textContent = "copied";
    setTimeout(() => { button.textContent = t; }, 1200); };
  const byHand = () => { const area = document.createElement("textarea"); area.value = text;
    document.body.appendChild(area); area.select(); document.execCommand("copy"); area.remove();
    done(); };
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, byHand); else byHand();
}
if (typeof document !== "undefined") {
  document.querySelectorAll("table").forEach(table => {
    table.querySelectorAll("thead th").forEach((th, i) =>
      th.querySelector("button").addEventListener("click", () => sortTable(table, i, th)));
  });
  document.querySelectorAll("button.copy").forEach(button =>
    button.addEventListener("click", () => copyText(
      toCsv(tableRows(document.getElementById(button.dataset.table))), button)));
}
"""


MANY_POINTS = 1000  # of a filled area: it is then an image in the SVG


class Page:
    """Sections in order, each with a heading that the contents name."""

    def __init__(self, title: str, lead: Sequence[str]) -> None:
        self.title, self.parts, self.contents, self.tables = title, [], [], 0
        self.figures: dict[str, Any] = {}
        self.lead = "".join(f"<p>{html.escape(line)}</p>\n" for line in lead)

    def section(self, heading: str, *notes: str) -> None:
        """Start a section; notes are said below its heading."""
        name = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")
        if any(f'"#{name}"' in entry for entry in self.contents):  # of another machine
            name += f"-{len(self.contents)}"
        self.contents.append(f'<a href="#{name}">{html.escape(heading)}</a>')
        self.parts.append(f'<h2 id="{name}">{html.escape(heading)}</h2>')
        self.parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes]

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table to sort by its headings and to copy as CSV."""
        self.tables += 1
        name, rows = f"table-{self.tables}", list(rows)
        # A heading stands to the left over a column that has a text.
        kinds = [max(map(_kind, column), default="") for column in zip(*rows, strict=True)]
        heads = "".join(
            f"<th{kind}><button>{html.escape(h)}</button></th>"
            for h, kind in zip(head, kinds or [""] * len(head), strict=True)
        )
        body = "".join(
            "<tr>" + "".join(f"<td{_kind(c)}>{html.escape(c)}</td>" for c in row) + "</tr>\n"
            for row in rows
        )
        self.parts.append(
            f'<button class="copy" data-table="{name}">copy as CSV</button>\n<div class="wide">'
            f'<table id="{name}"><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>'
            "</table></div>"
        )

    def figure(self, name: str, figure: Any, caption: str) -> None:
        """A matplotlib figure as SVG in the page; `name` is also that of its PNG."""
        self.figures[name] = figure
        self.parts.append(
            f'<figure role="img" aria-label="{html.escape(caption)}">{svg(figure, name)}'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def image(self, content: bytes, kind: str, caption: str) -> None:
        """A picture or a film of a file's content, where there is any, of the kind that its name's
        end says."""
        data, said = base64.b64encode(content).decode(), html.escape(caption)
        image = f'<img alt="{said}" src="data:image/{kind};base64,{data}">' if data else ""
        self.parts.append(f"<figure>{image}<figcaption>{said}</figcaption></figure>")

    def text(self, *paragraphs: str) -> None:
        self.parts += [f"<p>{html.escape(text)}</p>" for text in paragraphs]

    def code(self, text: str) -> None:
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def html(self) -> str:
        """The whole document; what is no text in a file's name stands as ?."""
        parts = "\n".join(self.parts).encode("utf-8", "replace").decode()
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
            f"<h1>{html.escape(self.title)}</h1>\n{self.lead}<nav>{''.join(self.contents)}</nav>\n"
            f"{parts}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )


def svg(figure: Any, name: str) -> str:
    """A figure as SVG whose ink is the page's text colour and whose ground is clear; its ids begin
    with `name`, so that many can stand in one page."""
    import matplotlib

    text = io.StringIO()
    for axes in figure.axes:
        for stack in axes.collections:  # of thousands of points
            stack.set_rasterized(sum(len(p.vertices) for p in stack.get_paths()) > MANY_POINTS)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", dpi=130, metadata={"Date": None})
    found = text.getvalue()
    found = found[found.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.S)
    found = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", found)
    return found.replace("#000000", "currentColor").replace("#ffffff", "none")


def _kind(cell: str) -> str:
    return "" if re.match(r"[-+]?[\d-]", cell) else ' class="text"'


def said(value: Any) -> str:
    """A result on a page."""
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.2%}"
