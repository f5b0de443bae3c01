"""The picture of docs/method.md: one-sided removal and the cone, in two dimensions.

    python -m docs.figures            # draws docs/plots/method.png

Every arrow is what `projection.project` and `projection.project_cone` return: nothing is drawn by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from faults.errors import command
from projection import project, project_cone

matplotlib.use("Agg")  # no display is needed, and none may be there

OUT = Path(__file__).parent / "plots" / "method.png"
HACK, GRADIENT, KEPT, GREY = "#c0392b", "#2c3e50", "#1e8449", "#8d99a6"
SHADE = "#fbe9e7"  # where moving raises what a row or v measures
LIMIT = 3.4  # of both axes
ORIGIN = torch.zeros(2)


def arrow(
    axis: Axes, end: Tensor, color: str, text: str, shift: tuple[float, float], start: Tensor = ORIGIN, **style: Any
) -> None:
    """An arrow from `start` to `end`, both [2], with `text` at its end moved by `shift`. style: matplotlib's, of the arrow."""
    props = dict(arrowstyle="-|>", color=color, lw=2.2, shrinkA=0, shrinkB=0, mutation_scale=14) | style
    x, y = end.tolist()
    axis.annotate("", xy=(x, y), xytext=tuple(start.tolist()), arrowprops=props)
    axis.text(x + shift[0], y + shift[1], text, color=color, fontsize=10, ha="center", va="center")


def shade(axis: Axes, rows: Tensor) -> None:
    """Tints every point that some row of `rows` [n, 2] calls hack-ward."""
    grid = torch.linspace(-LIMIT, LIMIT, 401)
    x, y = torch.meshgrid(grid, grid, indexing="xy")
    worst = (torch.stack([x, y], -1) @ rows.T).max(-1).values  # [401, 401]
    axis.contourf(x, y, worst, levels=[0.0, 1e9], colors=[SHADE], zorder=0)
    axis.contour(x, y, worst, levels=[0.0], colors=[HACK], linewidths=0.8, linestyles="dashed", zorder=1)


def frame(axis: Axes, title: str) -> None:
    """Equal axes without numbers: only angles and lengths mean something."""
    axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=11, loc="left")
    axis.plot(0, 0, "o", color="black", ms=4, zorder=5)


def one_direction(axis: Axes) -> None:
    """g with a hack-ward part loses it and keeps its length; g that points away is left alone."""
    v, g, away = torch.tensor([1.0, 0.0]), torch.tensor([1.8, 2.0]), torch.tensor([-2.2, -1.3])
    removed, kept, untouched = project(g, v, renorm=False).g, project(g, v).g, project(away, v).g
    shade(axis, v[None])
    axis.add_patch(plt.Circle((0, 0), g.norm().item(), fill=False, color=GREY, lw=0.8, ls=":"))
    arrow(axis, kept, KEPT, "g'  (as long as g)", (-1.3, 0.2))
    arrow(axis, removed, KEPT, "g minus\nthat part", (-0.8, -0.25), lw=1.4, ls="--")
    arrow(axis, removed, GREY, "", (0, 0), start=g, lw=1.4)
    axis.text(0.75, 1.75, "removed", color=GREY, fontsize=10, ha="center")
    arrow(axis, g, GRADIENT, "g", (0.25, 0.1))
    arrow(axis, v, HACK, "v", (0.25, 0.0))
    arrow(axis, untouched, GRADIENT, "another g\npoints away:\nuntouched", (1.2, -0.45))
    axis.text(1.75, -2.9, "hack-ward: <x, v> > 0", color=HACK, fontsize=9, ha="center")
    frame(axis, "One direction: project(g, v)")


def two_rows(axis: Axes) -> None:
    """The nearest point to g that no row calls hack-ward, and the same at the length of g."""
    J = torch.tensor([[1.0, 0.15], [-0.35, 1.0]])
    J = J / J.norm(dim=1, keepdim=True)
    g = torch.tensor([2.6, -0.9])
    nearest, kept = project_cone(g, J, ridge=0.0, renorm=False).g, project_cone(g, J, ridge=0.0).g
    shade(axis, J)
    axis.add_patch(plt.Circle((0, 0), g.norm().item(), fill=False, color=GREY, lw=0.8, ls=":"))
    arrow(axis, kept, KEPT, "g'  (as long as g)", (1.35, -0.28))
    arrow(axis, nearest, KEPT, "nearest point", (-0.95, 0.0), lw=1.4, ls="--")
    arrow(axis, nearest, GREY, "", (0, 0), start=g, lw=1.4)
    axis.text(1.75, -1.45, r"$\lambda_1 J_1$", color=GREY, fontsize=10, ha="center")
    arrow(axis, g, GRADIENT, "g", (0.25, 0.05))
    arrow(axis, J[0], HACK, "$J_1$", (0.3, 0.1))
    arrow(axis, J[1], HACK, "$J_2$", (0.0, 0.28))
    axis.text(-0.75, -1.95, "the cone:\nJ x <= 0", color=KEPT, fontsize=9, ha="center", va="center")
    axis.text(1.7, 2.75, "hack-ward for a row", color=HACK, fontsize=9, ha="center")
    frame(axis, "Two rows: project_cone(g, J)")


@command
def main() -> None:
    """Draws both panels; the file holds no date, so that the same code gives the same bytes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    one_direction(left)
    two_rows(right)
    figure.savefig(OUT, dpi=160, metadata={"Software": None})
    plt.close(figure)
    print(OUT)


if __name__ == "__main__":
    sys.exit(main())
