"""How long N candidates take, side by side with other ways of scoring them, and with the floor that no way can pass.

    python benchmarks/latency.py                          # the grid at 134 M; hours on two cores; goes on where it stopped
    python benchmarks/latency.py --cells 512x16 --ways "dpo_rank;padded"
    python benchmarks/latency.py --estimate-above 30      # the grid in an hour and a half: longer runs are estimated and marked so

Run on an otherwise idle machine. Every way runs in a process of its own. Writes docs/results/latency.json, .md and .svg. What is not
installed is named as not run; peers need ``pip install 'dpo-rank[optimum]' 'sentence-transformers<6'`` beside the rest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from shapes import SHAPES, artifact, cross_encoder, pair
from ways import WAYS

from dpo_rank.scoring.graph_engine import available_cpus

HERE = Path(__file__).parent
BASELINE = "padded batch, torch fp32"
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "sentence-transformers", "optimum-onnx")
LENGTHS: list[list[int]] = json.loads((HERE / "lengths.json").read_text())
"""Token counts of 16 systems' answers to each of 275 prompts (AlpacaEval, test side), by the starter's tokenizer."""


def cells(full: bool) -> list[dict[str, Any]]:
    """The grid, the 512 x 16 cells first."""
    sizes = [(512, 16)] + [(p, n) for p in (128, 512, 2048) for n in (4, 16, 64) if (p, n) != (512, 16)]
    shapes = ["134M"]
    if full:
        sizes += [(p, 256) for p in (128, 512, 2048)]
        shapes = list(SHAPES)
    return [
        {
            "shape": shape,
            "prompt": prompt,
            "candidates": count,
            "kind": kind,
            "lengths": lengths(count, kind, several=(prompt, count) == (512, 16)),
        }
        for shape in shapes
        for prompt, count in sizes
        for kind in ("equal", "ragged")
    ]


def lengths(count: int, kind: str, several: bool) -> list[list[int]]:
    """The candidates' token counts of each run: 128 each, or real answers of the prompt of median length (of five from short to long)."""
    if kind == "equal":
        return [[128] * count]
    by_total = sorted(LENGTHS, key=sum)
    together = -(-count // 16)
    places = [round(len(by_total) * share) for share in ((0.1, 0.3, 0.5, 0.7, 0.9) if several else (0.5,))]
    return [[n for numbers in by_total[place : place + together] for n in numbers][:count] for place in places]


def name_of(cell: dict[str, Any]) -> str:
    return f"{cell['shape']} {cell['prompt']}x{cell['candidates']} {cell['kind']}"


def size(way: str, cell: dict[str, Any], results: dict[str, Any]) -> list[float]:
    """What a way's time grows with, of each run of a cell: our ways by the floor, others by the positions that they read.

    A count of positions leaves out that attention grows with the prompt: it flatters the peers.
    """
    prompt, runs = cell["prompt"], cell["lengths"]
    if way.startswith("dpo_rank"):
        return [sum(parts.values()) for parts in results[name_of(cell)]["floor"]]
    if way.startswith("prompt cache"):
        return [prompt + len(run) * max(run) for run in runs]
    return [len(run) * (prompt + max(run)) for run in runs]


def predicted(way: str, cell: dict[str, Any], results: dict[str, Any], grid: list[dict[str, Any]]) -> list[float] | None:
    """Seconds of each run, from this way's largest measured run of the shape."""
    measured = [
        (size_of_run, statistics.median(run["seconds"]))
        for other in grid
        if other["shape"] == cell["shape"] and "runs" in (found := results.get(name_of(other), {}).get(way, {}))
        for size_of_run, run in zip(size(way, other, results), found["runs"], strict=True)
    ]
    if not measured:
        return None
    largest, seconds = max(measured)
    return [seconds * own / largest for own in size(way, cell, results)]


def measure(way: str, cell: dict[str, Any], cache: Path, threads: int) -> dict[str, Any]:
    """Run one way in a fresh process."""
    first = cell["prompt"] == 512 and cell["candidates"] == 16
    request = {
        **cell,
        "cache": str(cache),
        "threads": threads,
        "repeats": 5 if cell["kind"] == "equal" else 3,
        "always": first and cell["kind"] == "equal",
    }
    done = subprocess.run([sys.executable, str(HERE / "ways.py"), way, json.dumps(request)], capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return {"not_run": f"killed by signal {-done.returncode}: most likely out of memory"}
    if done.returncode:
        return {"not_run": done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def floor_of(cell: dict[str, Any], threads: int) -> list[dict[str, float]]:
    """The floor of each run of a cell, in a fresh process."""
    code = "import json,sys; from floor import floor; a = json.loads(sys.argv[1]); print(json.dumps([floor(a[0], a[1], n, a[3]) for n in a[2]]))"
    arguments = json.dumps([SHAPES[cell["shape"]], cell["prompt"], cell["lengths"], threads])
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=True, cwd=HERE)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def overview(grid: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """Every measured cell as a line of seconds: the fastest way of all, and where it is not ours, that too is seen."""
    measured = [cell for cell in grid if BASELINE in results.get(name_of(cell), {})]
    ways = [way for way in WAYS if "shared" not in way and any(way in results[name_of(cell)] for cell in measured)]
    lines = [
        "Seconds for policy and reference together (a cross-encoder: one model), median; `~` is estimated from a shorter run of the same way; "
        "the fastest of a cell in bold. In brackets: x faster than the padded batch in fp32.",
        "",
        "| prompt x candidates, kind | floor, fp32 | " + " | ".join(ways) + " |",
        "|---|" + "---|" * (len(ways) + 1),
    ]
    for cell in measured:
        found = results[name_of(cell)]
        taken = {way: seconds for way in ways if (seconds := seconds_of(found.get(way)))}
        best, limit = min(map(statistics.median, taken.values())), statistics.median(sum(part.values()) for part in found["floor"])
        shown = []
        for way in ways:
            if way not in taken:
                shown.append("")
                continue
            value, faster = statistics.median(taken[way]), median_ratio(taken[BASELINE], taken[way])
            figure = f"**{value:.1f}**" if value == best else f"{value:.1f}"
            shown.append(f"{'~' if 'estimated' in found[way] else ''}{figure} ({faster:.1f})")
        lines.append(f"| {name_of(cell)} | {limit:.1f} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", ""])


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median over a cell's prompts."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def table(grid: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """Every measured cell as Markdown."""
    lines: list[str] = []
    for cell in grid:
        found = results.get(name_of(cell))
        if not found:
            continue
        floors = [sum(part.values()) for part in found["floor"]]
        parts = ", ".join(f"{part} {statistics.median(f[part] for f in found['floor']):.2f}" for part in found["floor"][0])
        tokens = statistics.median(cell["prompt"] + sum(run) for run in cell["lengths"])
        lines += [
            f"### {name_of(cell)}",
            "",
            f"Floor, fp32: {statistics.median(floors):.2f} s ({parts}). {tokens:.0f} real tokens in the median prompt.",
            "",
            "| way | seconds (range) | x floor | x faster than the padded batch | ms a candidate | peak MiB |",
            "|---|---|---|---|---|---|",
        ]
        base = seconds_of(found.get(BASELINE))
        for way, entry in found.items():
            if way != "floor":
                lines.append(line(way, entry, floors, base, cell["candidates"]))
        lines.append("")
    return "\n".join(lines)


def seconds_of(entry: dict[str, Any] | None) -> list[float] | None:
    """Median seconds of each run, or None where it was not run."""
    if entry is None or "not_run" in entry:
        return None
    if "estimated" in entry:
        return [float(value) for value in entry["estimated"]]
    return [statistics.median(run["seconds"]) for run in entry["runs"]]


def line(way: str, entry: dict[str, Any], floors: list[float], base: list[float] | None, count: int) -> str:
    found = seconds_of(entry)
    if found is None:
        return f"| {way} | not run: {entry['not_run']} | | | | |"
    median = statistics.median(found)
    if "runs" in entry:
        every = [value for run in entry["runs"] for value in run["seconds"]]
        shown = f"{median:.2f} ({min(every):.2f} to {max(every):.2f})"
    else:
        shown = f"{median:.1f} (estimated)"
    faster = "" if base is None else f"{median_ratio(base, found):.1f}"
    return f"| {way} | {shown} | {median_ratio(found, floors):.2f} | {faster} | {1000 * median / count:.1f} | {entry.get('peak_mib', '')} |"


def plot(grid: list[dict[str, Any]], results: dict[str, Any], path: Path) -> None:
    """Bars of the first measured cell of each kind."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    shown = [cell for cell in grid if name_of(cell) in results][:2]
    figure, axes = plt.subplots(1, len(shown), figsize=(6.5 * len(shown), 4.2), squeeze=False)
    for axis, cell in zip(axes[0], shown, strict=True):
        found = results[name_of(cell)]
        bars = {way: statistics.median(seconds) for way, entry in found.items() if way != "floor" and (seconds := seconds_of(entry))}
        names = sorted(bars, key=bars.__getitem__, reverse=True)
        colours = ["#2f6f4f" if name.startswith("dpo_rank") else "#b8b8b8" for name in names]
        drawn = axis.barh(names, [bars[name] for name in names], color=colours)
        axis.bar_label(drawn, fmt="%.1f s", padding=3, fontsize=8)
        limit = statistics.median(sum(part.values()) for part in found["floor"])
        axis.axvline(limit, color="#c0392b", linewidth=1)
        axis.text(limit, -0.9, " fp32 products", color="#c0392b", fontsize=8)
        axis.set_title(f"{cell['prompt']} tokens + {cell['candidates']} answers, {cell['kind']} ({cell['shape']})", fontsize=10)
        axis.set_xlabel("seconds, policy and reference together")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def machine(threads: int) -> dict[str, Any]:
    def found(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"processor": platform.machine(), "threads": threads, "packages": {name: found(name) for name in PACKAGES}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of dpo_rank and its peers beside the floor.")
    parser.add_argument("--full", action="store_true", help="N = 256 and the 15 M and 0.6 B shapes too")
    parser.add_argument("--cells", default="", help="only cells whose name holds this text")
    parser.add_argument("--ways", default="", help="only ways whose names hold one of these texts, separated by ;")
    parser.add_argument("--again", action="store_true", help="measure again what the results hold already")
    parser.add_argument(
        "--estimate-above", type=float, default=300.0, help="seconds; a run predicted to take longer is estimated from a shorter one"
    )
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--cache", type=Path, default=Path("runs/bench"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    grid = cells(args.full)
    wanted = [way for way in WAYS if any(text in way for text in args.ways.split(";"))]
    path = args.output / "latency.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"results": {}}
    results = data["results"]
    console = Console()
    for cell in grid:
        if args.cells not in name_of(cell):
            continue
        found = results.setdefault(name_of(cell), {})
        pair(cell["shape"], args.cache)
        cross_encoder(cell["shape"], args.cache)
        artifact(cell["shape"], args.cache, ("fp32", "int8"))
        if any("shared" in way for way in wanted):
            artifact(cell["shape"], args.cache, ("fp32", "int8"), sharing=True)
        if "floor" not in found or (args.again and not args.ways):  # some ways again: beside the floor of the others
            found["floor"] = floor_of(cell, args.threads)
        for way in wanted:
            if way in found and not args.again and "estimated" not in found[way]:
                continue
            seconds = predicted(way, cell, results, grid)
            if seconds is not None and max(seconds) > args.estimate_above:
                found[way] = {"estimated": seconds}
            else:
                console.print(f"[dim]{name_of(cell)}: {way}[/]")
                found[way] = {**measure(way, cell, args.cache, args.threads), "on": date.today().isoformat()}
            data["machine"] = machine(args.threads)
            args.output.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        console.print(table([cell], results), markup=False, highlight=False)
    (args.output / "latency.md").write_text(overview(cells(True), results) + table(cells(True), results), encoding="utf-8")
    plot(grid, results, args.output / "latency.svg")


if __name__ == "__main__":
    main()
