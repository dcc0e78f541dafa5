"""The words of experiments/paper_table.py's tables: rows and seeds become lines, lines become
Markdown, with the paper's own figures beside them."""

import csv
import statistics
from pathlib import Path

PAPER = Path(__file__).parent.parent / "data" / "paper_tables.csv"

COLUMNS = [  # key, title, how it is printed
    ("cur", "CUR %", lambda v: f"{100 * v:.1f}"), ("fid", "FID", lambda v: f"{v:.2f}"),
    ("sfid", "sFID", lambda v: f"{v:.2f}"), ("is", "IS", lambda v: f"{v:.2f}"),
    ("precision", "prec.", lambda v: f"{v:.3f}"), ("recall", "recall", lambda v: f"{v:.3f}"),
    ("clip", "CLIP", lambda v: f"{v:.2f}"), ("error", "error", lambda v: f"{1000 * v:.2f}"),
    ("seconds", "ms / image", lambda v: f"{1000 * v:.0f}"),
    ("faster", "real", lambda v: f"{v:.2f} x"), ("less", "arithmetic", lambda v: f"{v:.2f} x"),
    ("cache_mb", "cache MB", lambda v: f"{v:.0f}"),
    ("training_images", "images", lambda v: f"{v:,.0f}"),
    ("training_seconds", "train s", lambda v: f"{v:.0f}"),
    ("training_mb", "train MB", lambda v: f"{v:.0f}"),
]


def summary(rows, values):
    """Rows and their values -> one dict a line of the table: method, steps, target, seeds, and for
    every column the mean and the standard deviation over seeds (None for one seed)."""
    full = values[0]
    lines = {}
    for row, value in zip(rows, values, strict=True):
        training = value["training"]
        value = {key: number for key, number in value.items() if isinstance(number, float)}
        value["less"] = full["gflop"] / value["gflop"]
        if training:
            value |= {f"training_{key}": training[key] for key in ("seconds", "images")}
            if training["peak_memory"] is not None:
                value["training_mb"] = training["peak_memory"] / 1e6
        lines.setdefault((row.method, row.steps, row.target, row.speedup), []).append(value)
    table = []
    for (method, steps, target, speedup), seeds in lines.items():
        line = {"method": method, "steps": steps, "target": target, "speedup": speedup,
                "seeds": len(seeds)}
        for key in [key for key in seeds[0] if all(key in value for value in seeds)]:
            numbers = [value[key] for value in seeds]
            line[key] = [statistics.mean(numbers),
                         statistics.stdev(numbers) if len(numbers) > 1 else None]
        table.append(line)
    return table


def markdown(table, paper):
    """The table as Markdown: mean +- standard deviation; `paper` gives what the paper reports for
    a line, or nothing."""
    columns = [column for column in COLUMNS if any(column[0] in line for line in table)]
    words = [paper(line) for line in table]
    titles = ["method", "T", *(title for _, title, _ in columns)]
    titles += ["paper"] if any(words) else []
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for line, word in zip(table, words, strict=True):
        cells = [line["method"], str(line["steps"])]
        for key, _, form in columns:
            mean, deviation = line.get(key, (None, None))
            text = "" if mean is None else form(mean)
            if deviation is not None and key in ("fid", "sfid", "is", "clip", "error", "cur"):
                text += f" ± {form(deviation)}"
            cells.append(text)
        lines.append("| " + " | ".join(cells + ([word] if any(words) else [])) + " |")
    return "\n".join(lines) + "\n"


PAPER_MODELS = {"dit256": ("DiT-XL/2", "256"), "dit512": ("DiT-XL/2", "512"),
                "pixart256": ("PixArt-alpha", "256"), "pixart512": ("PixArt-alpha", "512"),
                "pixart1024": ("PixArt-alpha", "1024"), "uvit256": ("U-ViT", "256")}
# The paper does not say DeepCache's depth, nor which evaluations are keys. That its 1.62 x is
# m = 2, which is 1.63 x by arithmetic, is a guess.
PAPER_METHODS = {"no cache": "none", "fewer steps": "none", "FORA, as reported": "FORA",
                 "DeepCache, m = 2": "DeepCache"}
PAPER_SAMPLERS = {"ddim": "DDIM", "ddpm": "IDDPM", "dpm-solver++": "DPM-Solver++",
                  "sa-solver": "SA-Solver", "dpm-solver-2s": "DPM-Solver"}


def paper_figures(model, sampler):
    """-> a function: a line of the table -> what the paper reports for it, in words, or ''."""
    with open(PAPER, newline="") as file:
        known = [entry for entry in csv.DictReader(file)
                 if entry["table"] in ("class-conditional", "text-to-image", "other-caching")]

    def words(line):
        method = PAPER_METHODS.get(line["method"], line["method"])
        wanted = (*PAPER_MODELS.get(model, (None, None)), PAPER_SAMPLERS.get(sampler), method,
                  str(line["steps"]))
        for entry in known:
            if wanted == tuple(entry[key] for key in ("model", "resolution", "sampler", "method",
                                                      "steps")):
                cells = [f"{title} {entry[key]}" for key, title in (
                    ("CUR_percent", "CUR"), ("FID", "FID"), ("sFID", "sFID"), ("IS", "IS"),
                    ("CLIP", "CLIP"), ("speedup", "x")) if entry[key]]
                return ", ".join(cells)
        return ""

    return words
