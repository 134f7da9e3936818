"""Pictures of a run: what hides something else."""

from pathlib import Path
from typing import Any

import pytest

from leaven.recipes.common import plots


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures, in place of files."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def test_few_updates_have_no_running_mean_and_whole_ticks(drawn: list[Any]) -> None:
    plots.loss_curve([{"step": step, "loss": 1.0 / step} for step in range(1, 5)], Path("x.png"), "title")
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["each update"]
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_numbers_are_dark_on_bright_colours(drawn: list[Any]) -> None:
    plots.heatmap({"t = 1": {"a": 0.1, "b": 0.9}}, Path("x.png"), "title")
    dark, bright = drawn[0].axes[0].texts
    assert (dark.get_color(), bright.get_color()) == ("white", "black")


def test_the_legend_is_beside_the_bars(drawn: list[Any]) -> None:
    plots.bars({who: {"a": 1.0, "b": 1.0} for who in ("one", "two")}, Path("x.png"), "title", "share")
    figure = drawn[0]
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())
