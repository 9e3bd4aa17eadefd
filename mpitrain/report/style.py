"""How figures look: drawn once in the colours of paper, then given to the page with colours that follow its own."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mpitrain.observe.ledger import PARTS
from mpitrain.report.recorded import Recorded

Draw = Callable[[Any, Sequence[Recorded]], bool]  # into axes of matplotlib; False if there is nothing to draw
SMALL, WIDE = (4.8, 2.6), (9.6, 1.0)  # inches
# By role: on paper and in the light, and in the dark. No two of the first are equal: they are told apart by them.
COLORS = {
    "ink": ("#1f2328", "#e6e8eb"),
    "muted": ("#667180", "#9aa4b1"),
    "grid": ("#e4e7eb", "#2d333b"),
    "card": ("#fefefe", "#1a1f26"),
    "s1": ("#3b6fd4", "#6f9bf0"),
    "s2": ("#e8833a", "#f09b5a"),
    "s3": ("#2fa189", "#45bfa4"),
    "s4": ("#a45fc7", "#bd85dc"),
    "s5": ("#d64f6a", "#ec7289"),
    "s6": ("#c9a227", "#dcb94a"),
    "s7": ("#5aa9d6", "#7cc2ea"),
    "s8": ("#8a6d55", "#b0927a"),
    "s9": ("#7d8a99", "#8e9bab"),
}
LIGHT = {role: colors[0] for role, colors in COLORS.items()}
SERIES = [LIGHT[role] for role in COLORS if role.startswith("s")]
HOURS = dict(zip(PARTS, ("s1", "s7", "s2", "s4", "s8", "s3", "s6", "s5", "s9"), strict=True))
SETTINGS: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": LIGHT["grid"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.formatter.limits": (-4, 6),
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": False,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a name may hold dollars
    "xtick.color": LIGHT["grid"],
    "ytick.color": LIGHT["grid"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": LIGHT["muted"],
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "patch.linewidth": 0,
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "mpitrain",  # the same figure, the same bytes
}


def color_of(number: int) -> str:
    """The role of the colour of a run, or a stage."""
    return f"s{1 + number % len(SERIES)}"


def short(name: str, length: int = 36) -> str:
    """A name with its middle left out."""
    half = length // 2 - 1
    return name if len(name) <= length else f"{name[:half]} … {name[-half:]}"


@contextmanager
def styled() -> Iterator[None]:
    """Have matplotlib draw as the page wants it to."""
    import matplotlib
    from cycler import cycler

    settings: Any = {**SETTINGS, "axes.prop_cycle": cycler(color=SERIES)}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fonts without the letters of a name, numbers without a sensible axis
        yield


def png_of(figure: Any) -> bytes:
    """The figure on white paper."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def svg_of(figure: Any, key: str) -> str:
    """The figure as an element of a page that has variables named like COLORS; its ids begin with `key`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{key}-", text)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
    return re.sub(r'style="[^"]*"', _by_role, text).strip()


def _by_role(attribute: re.Match[str]) -> str:
    text = attribute[0]
    for role, color in LIGHT.items():
        text = text.replace(color, f"var(--{role})")
    return text
