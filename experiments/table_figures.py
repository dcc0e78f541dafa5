"""The figures of experiments/paper_table.py: quality against speed-up, and the error of x_t along
the trajectory. They take what that command writes into table.json.
"""

import math

from matplotlib.figure import Figure

import command

# Colours that the colour-blind can tell apart (Okabe and Ito), and a mark for each method; FORA's
# two and HarmoniCa's two starts share one colour
LOOKS = {"no cache": ("black", "*"), "fewer steps": ("black", "o"),
         "FORA, released code": ("#56B4E9", "v"), "FORA, as reported": ("#56B4E9", "^"),
         "random": ("#999999", "x"), "Learning-to-Cache": ("#E69F00", "s"),
         "SDT + LTC": ("#009E73", "D"), "HarmoniCa": ("#D55E00", "P"),
         "HarmoniCa, cumulative": ("#CC79A7", "X"),
         "HarmoniCa from alternation": ("#D55E00", "h"), "direct": ("#0072B2", "p"),
         "sensitivity": ("#F0C000", "D"), "sensitivity, forecast 1": ("#F0C000", "d"),
         "DeepCache, m = 1": ("#56B4E9", "s"), "DeepCache, m = 2": ("#56B4E9", "D"),
         "DeepCache, m = 1, keys at starts": ("#56B4E9", "P"),
         "Faster Diffusion": ("#E69F00", "<"),
         "Faster Diffusion, keys at starts": ("#E69F00", ">"),
         "even": ("#0072B2", "v"), "even, forecast 1": ("#0072B2", "<"),
         "even, forecast 2": ("#0072B2", ">"), "searched": ("#D00000", "*")}


def draw_quality(table, path, title):
    """Quality against speed-up, a point a line of the table (the paper's figure)."""
    figure = Figure(figsize=(11, 4.5))
    axes = figure.subplots(1, 2)
    for axis, (key, name) in zip(axes, (("fid", "FID"), ("error", "error to the uncached image")),
                                 strict=True):
        for method, (colour, mark) in LOOKS.items():
            points = sorted((line["less"][0], *line[key]) for line in table
                            if line["method"] == method)
            if points and not (key == "error" and method == "no cache"):
                x, y, deviation = zip(*points, strict=True)
                axis.errorbar(x, y, yerr=[d or 0 for d in deviation], color=colour, marker=mark,
                              label=method, linewidth=1, markersize=8, capsize=3)
        axis.set_xlabel("speed-up by arithmetic")
        axis.set_ylabel(f"{name} (lower is better)")
        axis.set_yscale("log")  # or one bad schedule would press all others together
        if key == "fid":
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.suptitle(title)
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    save(figure, path)


def draw_error(errors, timesteps, path, title):
    """The mean squared error of x_t to the uncached x_t, step by step: errors {name: (method, list
    of T)}."""
    figure = Figure(figsize=(7.5, 4.5))
    axis = figure.subplots()
    for name, (method, values) in errors.items():
        colour, mark = LOOKS[method]
        values = [value or math.nan for value in values]  # no mark for an error of 0
        axis.plot(values, color=colour, marker=mark, label=name, linewidth=1.2, markersize=6)
    steps = range(0, len(timesteps), math.ceil(len(timesteps) / 10))
    axis.set_xticks(steps, [f"{i}\n{timesteps[i]:.0f}" for i in steps])
    axis.set_xlabel("step, and below it its timestep")
    axis.set_ylabel("squared error of x after the step")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    axis.set_title(title, fontsize=11)
    figure.tight_layout()
    save(figure, path)


def save(figure, path):
    with command.replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
