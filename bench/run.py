#!/usr/bin/env python3
"""Measures jobqueue side by side with its peers, in one run on this machine.

    python bench/run.py                     # every row, about ten minutes; writes bench/results.json and results.svg
    python bench/run.py --list              # the rows
    python bench/run.py --only durable,cpu  # single rows, printed only
    python bench/run.py --long              # with 10,000 held clients, 1,000,000 pending jobs

A peer that is not installed is skipped by name. bench/README.md says how to read the table.
"""
import argparse
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import load
import peers
import plot
from protocols import Failure
from rows import ROWS, Options

HERE = Path(__file__).resolve().parent


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="ROW[,ROW]", help="these rows alone; nothing is written without --out")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--long", action="store_true", help="the heavy figures too")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side of a comparison (default 3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a run (default 2)")
    parser.add_argument("--server", type=Path, help="the jobqueue.py to measure")
    parser.add_argument("--scratch", type=Path, default="/var/tmp", help="where data folders go; must be a real disk")
    parser.add_argument("--out", type=Path, help="where the results go (default bench/results.json)")
    return parser.parse_args()


def number(value):
    """A figure for people: three digits that mean something."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def line(figure):
    """A row of the printed table."""
    ratio = f"{number(figure.ratio)}x" if figure.ratio else ""
    unit = "x" if figure.judged == "ratio" else ""
    peer = f"{figure.peer} {number(figure.theirs)}{figure.unit}" if figure.peer else ""
    asked = [f"{number(value)}{unit}" if value is not None else "" for value in (figure.at_least, figure.aim)]
    said = figure.reached.replace("no", "NO")
    said = f"({said})" if said and not figure.calm else said
    return [figure.name, f"{number(figure.ours)}{figure.unit}", peer, ratio, *asked, said]


HEAD = ["figure", "jobqueue", "peer", "ratio", "at least", "aim", "reached"]


def table(lines):
    """The lines as a Markdown table, padded so that it reads well in a terminal too."""
    lines = [HEAD, *lines]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(HEAD))]
    padded = [[cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] for cells in lines]
    text = ["| " + " | ".join(cells) + " |" for cells in padded]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def run_row(name, options, out):
    """Measures one row; a row that fails is reported and does not stop the others."""
    print(f"{name}: {ROWS[name].title}", file=sys.stderr, flush=True)
    try:
        for figure in ROWS[name](options):
            figure.row = name
            out["figures"].append(figure)
            print("   " + "  ".join(cell for cell in line(figure) if cell), file=sys.stderr, flush=True)
    except Exception as error:
        if not isinstance(error, (Failure, OSError)):
            traceback.print_exc()
        out["failures"][name] = f"{error}"
        print(f"   FAILED: {error}", file=sys.stderr, flush=True)


def as_json(figure):
    """A figure for results.json."""
    kept = ["row", "name", "unit", "ours", "peer", "theirs", "ratio", "at_least", "aim"]
    kept += ["judged", "less_is_better", "reached", "calm"]
    return {name: getattr(figure, name) for name in kept} | {"notes": figure.notes}


def report(out, versions):
    """Prints the table and what is to be known beside it."""
    print(table([line(figure) for figure in out["figures"]]))
    asked = [figure for figure in out["figures"] if figure.at_least is not None]
    unsure = len(asked)
    asked = [figure for figure in asked if figure.calm]
    unsure -= len(asked)
    reached = {what: sum(figure.reached == what for figure in asked) for what in ("aim", "at least", "no")}
    print(f"\n{len(asked)} figures with a target: {reached['aim']} reach the aim, {reached['at least']} what is asked "
          f"at least, {reached['no']} do not.")  # fmt: skip
    if unsure:
        print(f"{unsure} more, in brackets, are not judged: the machine was busy with something else meanwhile.")
    skipped = [f"{name}: {said}" for name, said in versions.items() if "not installed" in said]
    if skipped:
        print("Skipped, not installed here: " + "; ".join(skipped))
    for name, reason in out["failures"].items():
        print(f"Row {name} failed: {reason}")
    busy = max((share for figure in out["figures"] for share in noted(figure.notes, "others_used_percent")), default=0)
    if busy > 15:
        print(f"Other processes used up to {busy} % of this machine during a run: look at others_used_percent.")
    slow = max((value for figure in out["figures"] for value in noted(figure.notes, "disk_sync_ms")), default=0)
    if slow > 3 * load.scratch["best_sync_ms"]:
        best = load.scratch["best_sync_ms"]
        print(f"The disk was not ours alone: a sync took {best:.2f} to {slow:.2f} ms; look at disk_sync_ms.")


def noted(value, wanted):
    """All figures under this key, wherever they stand in the notes."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from inner if key == wanted else noted(inner, wanted)


def main():
    args = arguments()
    if args.list:
        for name, function in ROWS.items():
            print(f"{name:10} {function.title}")
        return 0
    names = args.only.split(",") if args.only else list(ROWS)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        print(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    load.scratch["folder"] = args.scratch
    if args.server:
        peers.config["server"] = args.server.resolve()
    load.raise_file_limit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    versions, machine = peers.versions(), peers.machine()
    if machine["filesystem"] in ("tmpfs", "ramfs"):
        print(f"{args.scratch} is in memory, a sync is free there: use --scratch DIR on a disk", file=sys.stderr)
    out = {"figures": [], "failures": {}}
    began, at = time.time(), os.getloadavg()[0]
    for name in names:
        run_row(name, Options(args.runs, args.seconds, args.long), out)
    report(out, versions)
    path = args.out or (None if args.only else HERE / "results.json")
    if path:
        save(path, out, machine | {"load_before": round(at, 2)}, versions, began, args)
    return 1 if out["failures"] else 0


def save(path, out, machine, versions, began, args):
    """Writes the results and the plot beside them."""
    results = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "took_seconds": round(time.time() - began),
        "machine": machine,
        "versions": versions,
        "options": {"runs": args.runs, "seconds": args.seconds, "long": args.long},
        "figures": [as_json(figure) for figure in out["figures"]],
        "failures": out["failures"],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    plot.write(path, results)
    print(f"\nWritten: {path}, and its drawings beside it")


if __name__ == "__main__":
    sys.exit(main())
