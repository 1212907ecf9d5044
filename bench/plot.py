#!/usr/bin/env python3
"""Draws the results, by hand and without a library: bench/results.svg and bench/results-targets.svg.

    python bench/plot.py [results.json]

The first shows sync jobs a second, jobqueue and its peers; the second shows every figure that has a target against
it. Both follow the reader's light or dark theme, and stand on whatever background there is.
"""
import json
import math
import sys
from html import escape
from pathlib import Path

STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #3d444d }
.title { font-size: 15px; font-weight: 600; fill: #1f2328 }
.sub, .group, .tick { fill: #656d76 }
.group { font-weight: 600 }
.own { font-weight: 600; fill: #1f2328 }
.end { text-anchor: end }
.middle { text-anchor: middle }
.bar { fill: #b6bec9 }
.ours { fill: #1a6fd4 }
.ours.second { fill: #7fb2ee }
.line { stroke: #d1d9e0; stroke-width: 1 }
.asked { stroke: #656d76; stroke-width: 1.5 }
.reached-aim { fill: #1a6fd4 }
.reached-least { fill: #7fb2ee }
.reached-no { fill: #d9730d }
.reached-unsure { fill: none; stroke: #656d76; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #c4ccd6 }
  .title, .own { fill: #f0f6fc }
  .sub, .group, .tick { fill: #9198a1 }
  .bar { fill: #525b66 }
  .ours { fill: #4c9bf5 }
  .ours.second { fill: #2c5f9e }
  .line { stroke: #3d444d }
  .asked { stroke: #9198a1 }
  .reached-aim { fill: #4c9bf5 }
  .reached-least { fill: #2c5f9e }
  .reached-no { fill: #f0883e }
  .reached-unsure { stroke: #9198a1 }
}
"""
BAR, GAP, COLUMN, LABEL, VALUE = 17, 4, 440, 148, 58
NAMES = {"rq": "RQ", "huey": "Huey", "celery": "Celery", "Redis appendfsync always": "Redis, fsync always"}
OURS = {"next": "jobqueue", "poll": "jobqueue, polling"}


def text(x, y, said, classes=""):
    return f'<text x="{x:g}" y="{y:g}" class="{classes}">{escape(said)}</text>'


def svg(width, height, title, parts):
    """A whole drawing; its size scales with the page."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img"'
    return f"{head} aria-label=\"{escape(title)}\">\n<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"


# -- sync jobs a second ----------------------------------------------------------------------------------------------


def groups(results, rows):
    """{clients: {who: jobs a second}} of these rows, ours first."""
    found = {}
    for figure in results["figures"]:
        if figure["row"] in rows and "clients" in figure["notes"]:
            bars = found.setdefault(figure["notes"]["clients"], {})
            bars.setdefault(OURS[figure["notes"]["style"]], figure["ours"])
            bars.setdefault(NAMES.get(figure["peer"], figure["peer"]), figure["theirs"])
    ordered = lambda bars: dict(sorted(bars.items(), key=lambda item: not item[0].startswith("jobqueue")))  # noqa: E731
    return {clients: ordered(bars) for clients, bars in sorted(found.items())}


def panel(x, title, subtitle, data):
    """One column of bars; returns the parts and the height."""
    parts, y = [text(x, 20, title, "title"), text(x, 38, subtitle, "sub")], 62
    longest = max((value for bars in data.values() for value in bars.values()), default=1)
    room = COLUMN - LABEL - VALUE - 10
    for clients, bars in data.items():
        parts.append(text(x, y, f"{clients} client{'s' * (clients > 1)}", "group"))
        y += 10
        for name, value in bars.items():
            own = "own" if name in OURS.values() else ""
            kind = "bar" if not own else "bar ours second" if name == OURS["poll"] else "bar ours"
            length = max(1, value / longest * room)
            parts.append(text(x + LABEL - 8, y + 13, name, f"end {own}"))
            parts.append(f'<rect x="{x + LABEL:g}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" class="{kind}"/>')
            parts.append(text(x + LABEL + length + 6, y + 13, f"{value:,.0f}", own))
            y += BAR + GAP
        y += 20
    return parts, y


def draw(results):
    """The bars as an SVG text."""
    durable, height = panel(
        0,
        "Sync jobs a second, every one synced to disk",
        "client to worker and back; fsync always",
        groups(results, {"durable"}),
    )
    memory, second = panel(
        COLUMN + 30,
        "Sync jobs a second, in memory",
        "client to worker and back; no fsync",
        groups(results, {"memory", "queues"}),
    )
    height = max(height, second) + 6
    machine = results["machine"]
    foot = f"{machine['cores']} cores {machine['cpu']}, Python {machine['python']}, {results['when'][:10]}"
    foot += "; the load, in Python too, ran on the same machine"
    return svg(2 * COLUMN + 30, height + 8, "jobqueue and its peers", [*durable, *memory, text(0, height, foot, "sub")])


# -- what was to be reached ------------------------------------------------------------------------------------------

LOW, HIGH = 0.2, 10.0


def draw_targets(results):
    """Every figure with a target, by how it stands to what is asked at least (1), as an SVG text."""
    asked = [figure for figure in results["figures"] if figure["at_least"] is not None]
    left, width, top = 330, 430, 66
    place = lambda value: left + width * math.log(min(max(value, LOW), HIGH) / LOW) / math.log(HIGH / LOW)  # noqa: E731
    bottom = top + 19 * len(asked)
    parts = [
        text(0, 20, "Every figure against its target", "title"),
        text(0, 38, "1 is what is asked at least; the short line is the aim; further right is better", "sub"),
        text(left, 20, "hollow: not judged, the machine was busy", "sub"),
    ]
    for tick in (0.25, 0.5, 1, 2, 4, 8):
        kind = "asked" if tick == 1 else "line"
        x = f"{place(tick):.1f}"
        parts.append(f'<line x1="{x}" x2="{x}" y1="{top - 8}" y2="{bottom - 8}" class="{kind}"/>')
        parts.append(text(place(tick), top - 13, f"{tick:g}", "tick middle"))
    for number, figure in enumerate(asked):
        parts += target(figure, top + 19 * number, place, left + width + 14)
    return svg(left + width + 130, bottom + 4, "jobqueue against its targets", parts)


def target(figure, y, place, right):
    """One line of the second drawing."""
    value = figure["ratio"] if figure["judged"] == "ratio" else figure["ours"]
    turn = -1 if figure["less_is_better"] else 1
    stands, aim = (max(part, 1e-9) / figure["at_least"] for part in (value, figure["aim"]))
    stands, aim = stands**turn, aim**turn
    kind = {"aim": "aim", "at least": "least", "no": "no"}[figure["reached"]] if figure["calm"] else "unsure"
    peer = f" / {NAMES.get(figure['peer'], figure['peer'])}" if figure["judged"] == "ratio" else ""
    unit = "x" if figure["judged"] == "ratio" else figure["unit"]
    shown = f"{value:,.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"
    return [
        text(0, y + 4, short(figure["name"]) + peer),
        f'<line x1="{place(aim):.1f}" x2="{place(aim):.1f}" y1="{y - 6}" y2="{y + 6}" class="asked"/>',
        f'<circle cx="{place(stands):.1f}" cy="{y}" r="5" class="reached-{kind}"/>',
        text(right, y + 4, shown),
    ]


def short(name):
    """A name that fits the drawing."""
    return name.replace("RequestJob + CompleteJob", "two calls").replace("poll + complete", "poll")


def main():
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("results.json")
    write(path, json.loads(path.read_text()))


def write(path, results):
    """Writes both drawings beside the results."""
    path.with_suffix(".svg").write_text(draw(results))
    path.with_name(path.stem + "-targets.svg").write_text(draw_targets(results))


if __name__ == "__main__":
    main()
