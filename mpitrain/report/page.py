"""The page: one file with all its figures, which asks for nothing else, and runs no script."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from mpitrain import __version__
from mpitrain.report import facts
from mpitrain.report.figures import Picture
from mpitrain.report.recorded import Recorded
from mpitrain.report.style import COLORS, HOURS, color_of

HERE = Path(__file__).parent


def render(runs: Sequence[Recorded], sections: dict[str, list[Picture]]) -> str:
    """HTML, of which all that comes from files is escaped; `sections` are figures by heading."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((HERE / "page.html").read_text(encoding="utf-8"))
    drawn = {
        heading: [(each.key, each.title, each.caption, Markup(each.svg)) for each in pictures]  # our own, escaped there
        for heading, pictures in sections.items()
        if pictures
    }
    told = [facts.facts(run) for run in runs]
    return template.render(
        title=" · ".join(run.name for run in runs),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        colors=COLORS,
        runs=[(run.name, color_of(number), *facts.state(run)) for number, run in enumerate(runs)],
        notes=[(run.name, note) for run in runs for note in run.notes],
        facts={name: [each[name] for each in told] for name in told[0]},
        sections=drawn,
        types=facts.type_table(runs),
        bars=facts.hour_bars(runs),
        hour_colors=HOURS,
        hours=facts.hour_table(runs),
        settings=facts.setting_table(runs),
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
