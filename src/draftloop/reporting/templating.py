"""The templates of the pages and pictures: everything put in is escaped, and nothing may be missing.

Contract: `render` is pure. Must not know what is drawn.
"""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """The template of this name in `reporting/templates`, with its values."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("draftloop.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
