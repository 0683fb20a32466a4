"""Writes a report as one self-contained page, `report.html`."""

import json
from pathlib import Path

import jinja2

from prograde.lab import store
from prograde.lab.report import Figure, Report, Table, figures


def write(report: Report, path: Path) -> Path:
    """Writes the page; returns its path."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("prograde.lab.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.tests["table"] = lambda part: isinstance(part, Table)
    templates.tests["figure"] = lambda part: isinstance(part, Figure)
    templates.filters["svg"] = figures.svg
    templates.filters["json"] = lambda value: json.dumps(value, indent=1)
    page = templates.get_template("page.html.jinja").render(report=report)
    store.write(path, page.encode())
    return path
