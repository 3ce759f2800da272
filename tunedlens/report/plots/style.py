"""The style of every figure: for a paper, for colour-blind readers, and in grey."""

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunedlens.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Style = dict[str, Any]
"""Keyword arguments of a matplotlib line."""
Ends = dict[str, tuple[float, Any]]
"""The height at which every line ends, and its colour, by name."""

FORMATS = ("png", "svg", "pdf")
MODEL_COLOR = "0.35"
# Okabe and Ito's colours, which most colour-blind readers can tell apart. Each lens also has
# its own marker and dash, so that it can be recognised in grey.
_KNOWN: dict[str, Style] = {
    "logit": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "tuned": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "closed-form": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "jacobian": {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    "unigram": {"color": "#737373", "marker": "", "linestyle": (0, (5, 2))},
    "mean": {"color": "#999999", "marker": "", "linestyle": (0, (1, 1))},
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's colours, for lines that are not lenses."""
_COLORS = ("#56B4E9", "#E69F00", "#000000", "#7A4FBF")
_MARKERS = ("v", "P", "X", "*", "h")
_DASHES = ("-", "--", "-.")
_SITE_STYLES: dict[str, Style] = {
    "attn_out": {"marker": "^", "linestyle": (0, (1, 1))},
    "resid_mid": {"marker": "D", "linestyle": (0, (4, 1))},
    "mlp_out": {"marker": "v", "linestyle": (0, (3, 1, 1, 1))},
}
_WIDE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "SimHei", "MS Gothic"),
    *("Noto Emoji", "Segoe UI Emoji", "Segoe UI Symbol", "Symbola", "Unifont"),
)
"""Fonts of Debian, Apple and Microsoft for letters that matplotlib's own font lacks."""

_PIXELS_PER_INCH = 100
"""The scale of figures in a notebook, whose letters are larger than those of a paper."""

_RC: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "tunedlens",
    "pdf.fonttype": 42,
}


def styles(lenses: Sequence[str], sites: Mapping[str, str]) -> dict[str, Style]:
    """A different combination of colour, marker and dash for every lens.

    A lens has the same colour at all sites.

    Args:
        lenses: their names.
        sites: the sites of those that read another one than the stream between blocks.
    """
    unknown = [lens for lens in lenses if lens not in _KNOWN and lens not in sites]
    found = _KNOWN | {
        lens: {
            "color": _COLORS[i % len(_COLORS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _DASHES[i % len(_DASHES)],
        }
        for i, lens in enumerate(unknown)
    }
    for lens, site in sites.items():
        own = found[lens.removesuffix(f" {site}")]
        found[lens] = own | _SITE_STYLES[site]
    return found


@contextmanager
def new_figure(width: float, height: float, *, has_tokens: bool = False) -> Iterator["Figure"]:
    """A figure in the common style, with a size in inches.

    Letters of any script, as in tokens, need further fonts.
    """
    import matplotlib

    # The last one is used if an SVG is opened where none of the others is installed.
    fonts = {"font.family": [*_families(), "sans-serif"]} if has_tokens else {}
    with matplotlib.rc_context(_RC | fonts):
        yield _figure_class()(figsize=(width, height), layout="constrained", dpi=200)


@cache
def _figure_class() -> type["Figure"]:
    """A figure that a notebook shows by itself, without `%matplotlib inline`."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
            return rendered(self, "png"), {"width": round(_PIXELS_PER_INCH * self.get_figwidth())}

    return ShownFigure


@cache
def _families() -> list[str]:
    """Matplotlib's own font and the installed ones of `_WIDE_FONTS`."""
    from matplotlib import font_manager

    installed = font_manager.get_font_names()
    return ["DejaVu Sans", *(name for name in _WIDE_FONTS if name in installed)]


@cache
def _is_in_a_font(letter: str) -> bool:
    from matplotlib.font_manager import findfont, get_font

    return any(get_font(findfont(one)).get_char_index(ord(letter)) for one in _families())


@cache
def _width(text: str) -> float:
    """The width of a text in units of its font size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=_families(), size=100)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 100


def drawable(text: str, max_width: float | None = None) -> str:
    """A text as matplotlib can draw it, cut to a width in units of its font size.

    Letters that no installed font has become their code points, and $ starts no formula.
    """
    drawn = "".join(letter if _is_in_a_font(letter) else f"U+{ord(letter):04X}" for letter in text)
    if max_width is not None and _width(drawn) > max_width:
        while drawn and _width(drawn + "…") > max_width:
            drawn = drawn[:-1]
        drawn += "…"
    return drawn.replace("$", r"\$")


def resize(figure: Any, factor: float) -> None:
    """Make a figure larger or smaller, including its letters and lines."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    figure.draw_without_rendering()  # creates all letters
    for text in figure.findobj(Text):
        text.set_fontsize(text.get_fontsize() * factor)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):  # and of ticks that appear later
            for label in axis.get_ticklabels()[:1]:
                axis.set_tick_params(labelsize=label.get_fontsize())
    for line in (*figure.findobj(Line2D), *figure.findobj(Patch)):
        line.set_linewidth(line.get_linewidth() * factor)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width * factor, height * factor)


def rendered(figure: "Figure", kind: str) -> bytes:
    """A figure as the bytes of a PNG, SVG or PDF."""
    import matplotlib

    # Without a date, the same results give the same file.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    buffer = io.BytesIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


def in_all_formats(figure: "Figure") -> dict[str, bytes]:
    """A figure as the bytes of every format. They share one layout, which takes long to find."""
    figure.draw_without_rendering()
    layout = figure.get_layout_engine()
    figure.set_layout_engine(None)
    try:
        return {kind: rendered(figure, kind) for kind in FORMATS}
    finally:
        figure.set_layout_engine(layout)


def in_svg(figure: "Figure") -> bytes:
    """A figure as the bytes of an SVG."""
    return rendered(figure, "svg")


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure as `<path>.png`, `<path>.svg` and `<path>.pdf`.

    Raises:
        InputError: the folder cannot be written.
    """
    path = Path(path)
    for kind, content in in_all_formats(figure).items():
        write(path.with_name(f"{path.name}.{kind}"), content)


def ticks_of(count: int) -> range:
    """At most nine evenly spaced numbers below a count, in steps of 1, 2, 5, 10 and so on."""
    steps = (step * 10**power for power in itertools.count() for step in (1, 2, 5))
    return range(0, count, next(step for step in steps if count <= 9 * step))


def short_number(value: float) -> str:
    """A number as on an axis: 0.05, 200, and powers of ten beyond 10⁵."""
    if 1e-4 <= value < 1e5:
        return f"{value:g}"
    digits, power = f"{value:.0e}".split("e")
    factor = "" if digits == "1" else rf"{digits} \cdot "
    return rf"${factor}10^{{{int(power)}}}$"


def plain_log_ticks(axis: "Axis", shown: Callable[[float], str] = short_number) -> None:
    """Plain numbers as ticks of a logarithmic axis: 1, 2, 5 if it spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axis.set_minor_formatter(NullFormatter())


def short_count(count: float) -> str:
    """A number of tokens as on an axis: 512, 16k, 1.2M."""
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def name_lines(axes: "Axes", ends: Ends, size: float = 8.5) -> None:
    """Write the name of every line at the right edge, moved apart where names would touch.

    Names that had to move are joined to the ends of their lines. Call it last, when the limits
    of the axes are final. The size is that of the font in points.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()  # places the axes
    points = 72 / figure.dpi
    to_height = axes.transData.transform
    low, high = (to_height((0, y))[1] * points for y in axes.get_ylim())
    heights = {name: to_height((0, y))[1] * points for name, (y, _) in ends.items()}
    heights = {name: min(max(height, low), high) for name, height in heights.items()}
    order = sorted(heights, key=lambda name: -heights[name])
    gap = 1.25 * size
    placed = dict(
        zip(order, _apart([heights[name] for name in order], gap, low, high), strict=True)
    )
    has_moved = any(abs(placed[name] - heights[name]) > gap / 3 for name in order)
    leader = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
    for name in order:
        fraction = (heights[name] - low) / (high - low)
        arrow = leader | {"color": ends[name][1]} if has_moved else None
        axes.annotate(name, (1, fraction), (14 if has_moved else 3, placed[name] - heights[name]),
                      xycoords="axes fraction", textcoords="offset points", color=ends[name][1],
                      va="center", fontsize=size, annotation_clip=False,
                      arrowprops=arrow)  # fmt: skip


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The nearest heights, in least squares, that are `gap` apart and within the limits.

    The heights must be in descending order, and so are the results. If there is too little room,
    they exceed `high`.
    """
    # With gap · index added, the only constraint is the order. This is an isotonic regression,
    # which is solved by pooling neighbours that are out of order.
    pools: list[tuple[float, int]] = []
    for index, height in enumerate(heights):
        mean, count = height + gap * index, 1
        while pools and pools[-1][0] < mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    level = low + gap * (len(heights) - 1)
    means = [max(min(mean, high), level) for mean, count in pools for _ in range(count)]
    return [mean - gap * index for index, mean in enumerate(means)]
