"""The demonstration's picture: each ping's round trip over time, both rounds below each other on the same axes.

Owns:        what is drawn, and that matplotlib may be missing.
Never sees:  how it was measured.
Read next:   report.py for what it draws.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from localmig.demo.report import DAEMONS, Naming, Round, milliseconds
from localmig.errors import ConfigError, KernelError
from localmig.testing.traffic import UNANSWERED, percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES: Final = (".png", ".svg", ".pdf")
"""What a picture's name may end with, which says its format."""

_INCHES: Final = (12.0, 7.0)
_DOTS_PER_INCH: Final = 120

_ANSWERED, _LOST, _REPLACED = "#1f5fa8", "#d1242f", "#f2a33a"
_NOTE: Final = "#555555"
"""Blue, red and orange that are told apart without colour vision, too: they differ in brightness."""

_LOWEST_MS: Final = 0.01
"""Where the scale begins: ten microseconds, less than any round trip through two processes."""

_HEADROOM: Final = 6.0
"""The scale ends so many times above the longest round trip: there the lost pings are marked."""

_NOTE_ROOM: Final = 0.85
"""A round that is over before this part of the other one has room for a note behind it."""

_NANOSECONDS: Final = 1e9


def check_path(path: Path) -> None:
    """ConfigError where no picture can be written to `path`, with what would do."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"picture '{path}' ends with '{path.suffix}': it may end with {', '.join(SUFFIXES)}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write a picture into '{path.parent.absolute()}': say --picture FILE or --no-picture")


def unavailable_reason() -> str | None:
    """Why nothing can be drawn here, None where it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"matplotlib is not installed; to have one: {sys.executable} -m pip install matplotlib"
    return None


def draw(path: Path, handovers: Round, restarts: Round, *, guest: str, naming: Naming = DAEMONS) -> None:
    """Writes the picture.

    Args:
        path: the file, which is overwritten; its suffix says the format.
        handovers: the upper half.
        restarts: the lower half.
        guest: what played the guest.
        naming: what the rounds are called.

    Raises:
        KernelError: the file cannot be written.
    """
    try:
        figure_of(handovers, restarts, guest=guest, naming=naming).savefig(path)
    except OSError as error:
        raise KernelError(f"cannot write the picture '{path}': {error.strerror}", errno=error.errno or 0) from error


def figure_of(handovers: Round, restarts: Round, *, guest: str, naming: Naming = DAEMONS) -> Figure:
    """The picture, before it is a file. Arguments as of `draw`."""
    from matplotlib.figure import Figure  # half a second, and it may be missing

    figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    figure.suptitle(f"{guest[0].upper()}{guest[1:]}, pinged every millisecond while {naming.subject} is replaced")
    upper, lower = figure.subplots(2, 1, sharex=True, sharey=True)
    seconds = max(_seconds(handovers), _seconds(restarts))
    top = _HEADROOM * max(_longest_ms(handovers), _longest_ms(restarts))
    for axes, name, result in ((upper, naming.first, handovers), (lower, naming.second, restarts)):
        _draw_round(axes, result, top=top)
        if _seconds(result) < _NOTE_ROOM * seconds:
            axes.text(_seconds(result), top / 2, f"  done after {_seconds(result):.1f} s", color=_NOTE, va="center")
        axes.set_title(f"{name[0].upper()}{name[1:]}: {_summary(result)}", loc="left", fontweight="bold")
        axes.set_ylabel("round trip in milliseconds")
    lower.set_xlabel("seconds since the first ping")
    lower.set_yscale("log")
    lower.yaxis.set_major_formatter("{x:g}")
    lower.set_ylim(_LOWEST_MS, top)
    lower.set_xlim(0, seconds)
    figure.legend(*_legend(naming.gap), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_round(axes: Axes, result: Round, *, top: float) -> None:
    record = result.record
    began = record.sent_ns[0]
    ended = record.sent_ns[-1]
    for gap in result.replacements:
        start, end = gap.stopped_ns - began, (gap.started_ns or ended) - began
        axes.axvspan(start / _NANOSECONDS, end / _NANOSECONDS, facecolor=_REPLACED, alpha=0.35, linewidth=0, zorder=1)
        # A handover is thinner than a dot: the line is there to be seen.
        axes.axvline(start / _NANOSECONDS, color=_REPLACED, linewidth=1, zorder=1)
    answered = [n for n, rtt in enumerate(record.rtt_ns) if rtt != UNANSWERED]
    lost = [n for n, rtt in enumerate(record.rtt_ns) if rtt == UNANSWERED]
    axes.plot(
        [(record.sent_ns[n] - began) / _NANOSECONDS for n in answered],
        [max(record.rtt_ns[n] / 1e6, _LOWEST_MS) for n in answered],
        **_ANSWERED_STYLE,
    )
    axes.plot([(record.sent_ns[n] - began) / _NANOSECONDS for n in lost], [top / 2] * len(lost), **_LOST_STYLE)
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


_ANSWERED_STYLE: Final[dict[str, Any]] = {
    "linestyle": "none",
    "marker": ".",
    "markersize": 2.5,
    "color": _ANSWERED,
    "markeredgewidth": 0,
    "zorder": 3,
    "rasterized": True,
}
_LOST_STYLE: Final[dict[str, Any]] = {
    "linestyle": "none",
    "marker": "|",
    "markersize": 12,
    "color": _LOST,
    "zorder": 3,
    "rasterized": True,
}


def _legend(gap: str) -> tuple[list[Any], list[str]]:
    """Marks larger than those drawn, which are too small for a legend."""
    from matplotlib.lines import Line2D

    answered = Line2D([], [], linestyle="none", marker=".", markersize=8, color=_ANSWERED)
    lost = Line2D([], [], linestyle="none", marker="|", markersize=12, markeredgewidth=2, color=_LOST)
    replaced = Line2D([], [], color=_REPLACED, linewidth=5, alpha=0.8)
    return [answered, lost, replaced], ["a ping's round trip", "a lost ping", gap]


def _summary(result: Round) -> str:
    downtimes = result.downtimes_us
    times = f"{len(downtimes)} times" if not result.guest_lost else f"{len(downtimes)} times, then the guest was lost"
    downtime = f"downtime {milliseconds(percentile(downtimes, 0.5))} at the median, "
    downtime += f"{milliseconds(max(downtimes, default=None))} at most"
    lost = f"{result.pings.lost} of {result.pings.sent} pings lost"
    if result.lost_by_guest:
        lost += f" ({result.lost_by_guest} by the guest itself)"
    return f"{times}, {lost}, {downtime}"


def _seconds(result: Round) -> float:
    return (result.record.sent_ns[-1] - result.record.sent_ns[0]) / _NANOSECONDS


def _longest_ms(result: Round) -> float:
    return max(*result.record.rtt_ns, 1_000_000) / 1e6
