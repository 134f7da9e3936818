"""Pictures of a run. Drawn without a display and without pyplot's global state."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leaven.recipes.common.run_folder import writing


def loss_curve(
    rows: Sequence[Mapping[str, Any]], path: Path, title: str, level: tuple[float, str] | None = None
) -> None:
    """Loss by update, and its running mean over a fiftieth of the run.

    Args:
        rows: of metrics.jsonl.
        path: a .png file; missing folders are made.
        title: of the picture.
        level: a loss worth a horizontal line, and what it means.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [row["step"] for row in rows]
    losses = torch.tensor([row["loss"] for row in rows], dtype=torch.float64)
    window = max(1, len(rows) // 50)
    smooth = losses.unfold(0, window, 1).mean(1).tolist()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    light: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.4} if window > 1 else {"linewidth": 1.5}
    axes.plot(steps, losses.tolist(), label="each update", **light)
    if window > 1:
        axes.plot(steps[window - 1 :], smooth, linewidth=1.5, label=f"mean of {window}")
    if level is not None:
        axes.axhline(level[0], color="grey", linestyle="--", linewidth=0.8, label=level[1])
    axes.set(title=title, xlabel="update", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def image_table(
    columns: Mapping[str, Tensor], path: Path, *, mean: Sequence[float], std: Sequence[float], caption: str
) -> None:
    """Images side by side, one row per image.

    Args:
        columns: heading -> normalised images (N, C, H, W), the same N in each; one or three channels.
        path: a .png file; missing folders are made.
        mean, std: what the images were normalised with.
        caption: below the picture.
    """
    from matplotlib.figure import Figure

    rows = min(len(images) for images in columns.values())
    height, width = next(iter(columns.values())).shape[-2:]
    cell = 1.6
    size = (cell * len(columns) * max(1.0, width / height), cell * rows * max(1.0, height / width) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    for column, (heading, images) in enumerate(columns.items()):
        pixels = (images[:rows].float().cpu() * scale + shift).clamp(0, 1)
        grid[0, column].set_title(heading, fontsize=8)
        for row in range(rows):
            picture = pixels[row].permute(1, 2, 0).squeeze(-1).numpy()
            grid[row, column].imshow(picture, cmap="gray", vmin=0, vmax=1)
            grid[row, column].set_axis_off()
    figure.supxlabel(caption, fontsize=7, wrap=True)
    _save(figure, path)


def bars(rows: Mapping[str, Mapping[str, float]], path: Path, title: str, label: str) -> None:
    """Groups of bars: for every name in the rows one bar of each row.

    Args:
        rows: of what is compared, values by name; the names are those of the first row.
        path: a .png file; missing folders are made.
        title: of the picture.
        label: of the values.
    """
    from matplotlib.figure import Figure

    names = list(next(iter(rows.values())))
    figure = Figure(figsize=(max(5, 1.2 * len(names)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for number, (who, row) in enumerate(rows.items()):
        places = [i + (number - (len(rows) - 1) / 2) * width for i in range(len(names))]
        axes.bar(places, [row[name] for name in names], width, label=who)
    axes.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
    axes.set(title=title, ylabel=label)
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside right upper")  # beside the bars, not on them
    _save(figure, path)


def scatter(
    x: Sequence[float] | None,
    points: Mapping[str, Any],
    path: Path,
    xlabel: str,
    ylabel: str,
) -> None:
    """Points of several kinds.

    Args:
        x: for all kinds; None: each kind has its own, as a pair (x, y).
        points: name -> y, or the pair.
        path: a .png file; missing folders are made.
        xlabel, ylabel: of the axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in points.items():
        across, up = (x, values) if x is not None else values
        axes.scatter(across, up, s=12, label=name, alpha=0.7)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def heatmap(values: Mapping[str, Mapping[str, float]], path: Path, title: str) -> None:
    """A table of percentages in colours, with its numbers.

    Args:
        values: rows of columns by name, shares in [0, 1]; the columns are those of the first row.
        path: a .png file; missing folders are made.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    names = list(next(iter(values.values())))
    table = [[row[name] for name in names] for row in values.values()]
    figure = Figure(figsize=(2 + 0.7 * len(names), 1.5 + 0.4 * len(values)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(table, aspect="auto")
    low, high = min(map(min, table)), max(map(max, table))
    axes.set_xticks(range(len(names)), names, rotation=60, fontsize=7)
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            ink = "black" if value - low > 0.6 * (high - low) else "white"  # the upper colours are bright
            axes.text(x, y, f"{100 * value:.1f}", ha="center", va="center", fontsize=6, color=ink)
    axes.set_title(title, fontsize=9)
    _save(figure, path)


def curves(x: Tensor, panels: Mapping[str, Tensor], path: Path, label: str) -> None:
    """Lines side by side, over the same axis.

    Args:
        x: (N,).
        panels: heading -> lines (n, N).
        path: a .png file; missing folders are made.
        label: of the axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels) + 1, 3.5), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (heading, lines) in zip(grid[0], panels.items(), strict=True):
        axes.plot(x.tolist(), lines.mT.tolist(), linewidth=0.8)
        axes.set_title(heading, fontsize=9)
        axes.grid(alpha=0.3)
    figure.supxlabel(label, fontsize=8)
    _save(figure, path)


def histograms(panels: Mapping[str, Tensor], path: Path, label: str) -> None:
    """Numbers between 0 and 1, how often they are what, side by side.

    Args:
        panels: heading -> numbers (N,).
        path: a .png file; missing folders are made.
        label: of the numbers.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (heading, numbers) in zip(grid[0], panels.items(), strict=True):
        axes.hist(numbers.tolist(), bins=25, range=(0, 1), density=True)
        axes.set_title(heading, fontsize=9)
    figure.supxlabel(label, fontsize=8)
    _save(figure, path)


def band(x: Tensor, mean: Tensor, std: Tensor, data: tuple[Tensor, Tensor], path: Path, label: str) -> None:
    """A predicted mean with two standard deviations around it, and what it was learnt from.

    Args:
        x, mean, std: (N,).
        data: inputs and targets (M,).
        path: a .png file; missing folders are made.
        label: of the inputs.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    low, high = (mean - 2 * std).tolist(), (mean + 2 * std).tolist()
    axes.fill_between(x.tolist(), low, high, alpha=0.25, label="two standard deviations")
    axes.plot(x.tolist(), mean.tolist(), label="mean")
    axes.scatter(data[0].tolist(), data[1].tolist(), s=6, color="black", label="training rows")
    axes.set(xlabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
