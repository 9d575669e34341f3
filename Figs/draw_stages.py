"""Draw Figs/stages.png, the README's picture of the method.

python Figs/draw_stages.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

LEARNED, FROZEN, EXPERT = "#e07b39", "#9aa5b1", "#3a6ea5"


def box(axes, x, y, text, colour, width=0.55, height=0.42):
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.06", facecolor=colour, lw=0)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=11)


def arrow(axes, start, end, text=None, where=(0, 0)):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color="#444444", lw=1.3))
    if text:
        middle = [(a + b) / 2 + d for a, b, d in zip(start, end, where, strict=True)]
        axes.text(*middle, text, ha="center", va="center", fontsize=8.5, color="#333333")


def main():
    figure, axes = pyplot.subplots(figsize=(10, 3.9))
    axes.set_xlim(-0.15, 10.2)
    axes.set_ylim(-0.35, 3.75)
    axes.axis("off")
    for stage in range(1, 4):
        left = 3.45 * (stage - 1)
        axes.text(left + 1.2, 3.55, f"stage {stage}", ha="center", fontsize=12, weight="bold")
        box(axes, left + 0.2, 2.65, f"experts of stage {stage}", EXPERT, width=2.0)
        for subset in range(1, stage + 1):
            colour = LEARNED if subset == stage else FROZEN
            box(axes, left + 0.2 + 0.7 * (subset - 1), 1.15, f"$S_{subset}$", colour)
        arrow(axes, (left + 1.2, 2.6), (left + 1.2, 1.68), "match", (-0.42, 0))
        union = " ∪ ".join(f"$S_{subset}$" for subset in range(1, stage + 1))
        axes.text(left + 0.2, 0.78, f"union: {union}", fontsize=9.5, va="center")
        if stage < 3:
            arrow(
                axes,
                (left + 2.25, 1.36),
                (left + 3.6, 2.6),
                "transition:\ntrain on the union,\nthen on real data",
                (-0.56, 0.32),
            )
    arrow(axes, (0.2, 0.42), (9.8, 0.42))
    axes.text(
        5, 0.12, "evaluation: one network trains on union 1, then union 2, then union 3, …", ha="center", fontsize=10
    )
    for place, (colour, words) in enumerate(((LEARNED, "learned"), (FROZEN, "frozen"), (EXPERT, "trajectories"))):
        axes.add_patch(
            FancyBboxPatch((3.2 + 1.5 * place, -0.3), 0.18, 0.14, boxstyle="round,pad=0.02", fc=colour, lw=0)
        )
        axes.text(3.48 + 1.5 * place, -0.23, words, fontsize=9, va="center")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("stages.png"), dpi=110)


if __name__ == "__main__":
    main()
