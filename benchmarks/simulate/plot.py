"""Plots of simulated batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.common.report import Figures
from benchmarks.simulate.lengths import SHAPES


def plot(rows: list[Figures], path: Path) -> None:
    """Plots makespan and queueing delay relative to the bound, by batch, for each policy and shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(SHAPES), figsize=(10, 6.5), sharex=True, sharey="row", layout="constrained")
    names = list(dict.fromkeys(f"{row['engines']}\n{row['waves']:g} waves" for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    for column, shape in enumerate(SHAPES):
        for number, policy in enumerate(policies):
            shown = [row for row in rows if row["lengths"] == shape and row["policy"] == policy]
            places = np.arange(len(shown)) + (number - (len(policies) - 1) / 2) * 0.8 / len(policies)
            width = 0.8 / len(policies)
            panels[0][column].bar(places, [r["ratio_to_bound"] for r in shown], width, label=policy)
            delays = [r["queueing_p95_s"] / r["bound_s"] for r in shown]
            panels[1][column].bar(places, delays, width)
        panels[0][column].set(title=f"{shape} lengths")
        panels[0][column].axhline(1.05, color="black", linewidth=0.8, linestyle=":")
        panels[1][column].set(xticks=range(len(names)), xticklabels=names, xlabel="engines")
        for panel in panels[:, column]:
            panel.grid(alpha=0.3, axis="y")
            panel.set_axisbelow(True)
    panels[0][0].set(ylabel="makespan / lower bound", ylim=(0.9, None))
    panels[1][0].set(ylabel="p95 of queueing / lower bound")
    panels[0][0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
