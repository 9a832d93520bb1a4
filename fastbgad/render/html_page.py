"""Pages from templates: self-contained HTML, without scripts, in a common style."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any

from ..errors import MissingDependencyError


def require_jinja2() -> Any:
    """Return the jinja2 package; raise `MissingDependencyError` where it is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("jinja2", "report", "the HTML report") from error
    return jinja2


def render(package: str | None, template: str, **values: Any) -> str:
    """Return the page of a template with `values`, which are all escaped.

    Args:
        package: the package whose folder holds the template, `__package__` for the caller's own. Templates that it
            includes or imports are searched there and in this package.
        template: file name.
        values: variables of the template.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    jinja2 = require_jinja2()
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(partial(_source, (package, __package__))),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _source(packages: Sequence[str | None], name: str) -> str | None:
    for package in filter(None, packages):
        file = resources.files(package).joinpath(name)
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return None


def css_color(color: tuple[int, int, int]) -> str:
    """Return red, green and blue in 0 ... 255 as a CSS color."""
    return f"rgb({color[0]} {color[1]} {color[2]})"


def flat_items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield keys and values of nested mappings, each key a path such as training.flow.clamp."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
