"""Pages that stand alone: one HTML file with its curves and pictures inside, which loads nothing from anywhere.

Whatever comes from a run, a prompt or a path is a text here and never markup. The page's own policy forbids what would
be needed to reach a network, and allows no script but the one below.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from diffdistill.errors import UserError, first_line
from diffdistill.eval.report import cell, numeric
from diffdistill.files import atomic_write

PICTURE_BYTES = 800_000
"""A picture of more is brought to `PICTURE_WIDTH` and JPEG."""
PICTURE_WIDTH = 1200
POINTS = 400  # of a curve, at most; more are averaged

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--soft:#5b6472;--paper:#fff;--panel:#f4f5f7;--rule:#d9dce1;--line:#2457a6}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8ec;--soft:#9aa3b2;--paper:#14171c;--panel:#1d2128;--rule:#343a44;
--line:#7fb0ff}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.6rem;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem}
p,li{overflow-wrap:anywhere}p.soft,figcaption{color:var(--soft);font-size:.9rem}
nav a{margin-right:1rem}a{color:var(--line)}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:.8rem}
figure{margin:0;background:var(--panel);border-radius:6px;padding:.6rem}svg{display:block;width:100%;height:auto}
svg path{fill:none;stroke:var(--line);stroke-width:1.5;vector-effect:non-scaling-stroke}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}svg .frame{stroke:var(--rule);stroke-width:1}
figcaption b{color:var(--ink);font-weight:600}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem}
th,td{padding:.25rem .7rem .25rem 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600}.number{text-align:right;font-variant-numeric:tabular-nums}
pre{background:var(--panel);padding:.8rem;border-radius:6px;overflow-x:auto;font-size:.85rem}
.pictures{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}.pictures figure{max-width:100%}
img{max-width:100%;height:auto;background:#fff;display:block}img.small{image-rendering:pixelated}
.frames figure{display:none}.frames figure.shown{display:inline-block}input[type=range]{width:min(100%,480px)}
.warning{border-left:4px solid #d08700;padding-left:.7rem}details>summary{cursor:pointer;color:var(--soft)}
"""

# Without it the last frame is shown. `#frame=K` begins at another one.
_SCRIPT = """
document.querySelectorAll('.frames').forEach(function(box){
var slider=box.querySelector('input'),frames=box.querySelectorAll('figure'),said=box.querySelector('output');
function show(){frames.forEach(function(f,i){f.classList.toggle('shown',i==slider.value)});
said.textContent=frames[slider.value].dataset.name}
var asked=/^#frame=(\\d+)$/.exec(location.hash);if(asked)slider.value=asked[1];
slider.addEventListener('input',show);show()});
"""


def text(value: object) -> str:
    """A text as HTML that shows it letter by letter."""
    return html.escape(str(value), quote=True)


def page(title: str, sections: Iterable[tuple[str, str]], path: str | os.PathLike[str], lead: str = "") -> Path:
    """Write a page of (heading, HTML) sections, those that are empty left out; whole or not at all.

    `lead` is HTML below the title. OSError where it cannot be written.
    """
    kept = [(heading, body) for heading, body in sections if body]
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = " ".join(f'<a href="#part{i}">{text(heading)}</a>' for i, (heading, _) in enumerate(kept))
    body = "\n".join(
        f'<section id="part{i}"><h2>{text(heading)}</h2>\n{part}</section>' for i, (heading, part) in enumerate(kept)
    )
    whole = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n<body><main><h1>{text(title)}</h1>\n{lead}\n"
        f"<nav>{links}</nav>\n{body}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )
    return atomic_write(path, whole)


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """A table of the named columns, numbers to the right. A missing key or None is a dash."""
    sides = [' class="number"' if numeric(rows, column) else "" for column in columns]
    head = "".join(f"<th{side}>{text(column)}</th>" for column, side in zip(columns, sides, strict=True))
    lines = (
        "".join(f"<td{side}>{text(cell(row.get(c)))}</td>" for c, side in zip(columns, sides, strict=True))
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def pairs(values: Mapping[str, object]) -> str:
    """A table of names and values."""
    lines = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in values.items())
    return f'<div class="scroll"><table>{lines}</table></div>' if lines else ""


def code(lines: str) -> str:
    """A block of code."""
    return f"<pre>{text(lines)}</pre>"


def items(texts: Iterable[str], kind: str = "") -> str:
    """A list; "" if it is empty."""
    lines = "".join(f"<li>{text(each)}</li>" for each in texts)
    return f'<ul class="{text(kind)}">{lines}</ul>' if lines else ""


def curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    """A small picture of a curve by (step, value), whose values are drawn by their logarithm if they span 1000."""
    points = _thinned([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
    if not points:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    logarithmic = low > 0 and high >= 1000 * low

    def height(y: float) -> float:
        return math.log10(y) if logarithmic else y

    left, right = points[0][0], points[-1][0]
    wide, tall = right - left or 1.0, height(high) - height(low) or 1.0
    places = [
        (f"{4 + 292 * (x - left) / wide:.1f}", f"{106 - 98 * (height(y) - height(low)) / tall:.1f}") for x, y in points
    ]
    if len(places) == 1:
        places.append(("296", places[0][1]))
    drawn = "M" + "L".join(f"{x} {y}" for x, y in places)
    scale = ", logarithmic" if logarithmic else ""
    return (
        f'<figure><svg viewBox="0 0 300 126" role="img" aria-label="{text(name)}"><path class="frame" d="M4 108H296"/>'
        f'<path d="{drawn}"/><text x="4" y="122">step {left:g}</text>'
        f'<text x="296" y="122" text-anchor="end">{right:g}</text></svg><figcaption><b>{text(name)}</b> '
        f"{points[-1][1]:.4g}, between {low:.4g} and {high:.4g}{scale}</figcaption></figure>"
    )


def curves(by_name: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """All curves beside one another."""
    drawn = "".join(curve(name, points) for name, points in by_name.items())
    return f'<div class="curves">{drawn}</div>' if drawn else ""


def picture(path: Path, caption: str = "") -> str:
    """An image of a file inside the page, made smaller where it has more than `PICTURE_BYTES`.

    UserError, which names the file, for one that is no image.
    """
    data, kind, width = _image(path)
    small = ' class="small"' if width <= PICTURE_WIDTH // 2 else ""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img{small} alt="{text(caption or path.stem)}" src="{source}">{below}</figure>'


def frames(pictures: Sequence[tuple[str, Path]], what: str) -> str:
    """Pictures of one thing over time, one of them at a time, with a slider; `what` is the slider's label."""
    if not pictures:
        return ""
    drawn = []
    for i, (name, path) in enumerate(pictures):
        shown = ' class="shown"' if i == len(pictures) - 1 else ""
        drawn.append(picture(path).replace("<figure>", f'<figure{shown} data-name="{text(name)}">', 1))
    last = len(pictures) - 1
    return (
        f'<div class="frames"><p><label>{text(what)} <input type="range" min="0" max="{last}" value="{last}" step="1">'
        f"</label> <output>{text(pictures[-1][0])}</output></p>{''.join(drawn)}</div>"
    )


def _image(path: Path) -> tuple[bytes, str, int]:
    """The bytes of an image, its kind and its width."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.format in ("PNG", "JPEG") and len(data) <= PICTURE_BYTES:
                return data, str(image.format).lower(), image.width
            smaller = image.convert("RGB")
            smaller.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
            file = io.BytesIO()
            smaller.save(file, format="JPEG", quality=85)
            return file.getvalue(), "jpeg", smaller.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"picture: {path} is no whole image ({first_line(error)}); remove it or make it anew") from None


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` points, each the mean of as many."""
    if len(points) <= POINTS:
        return list(points)
    parts = (points[len(points) * k // POINTS : len(points) * (k + 1) // POINTS] for k in range(POINTS))
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
