"""Values as HTML: what anybody wrote is shown as text, and what cannot be seen is made visible."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Final
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from brokertask.durations import readable
from brokertask.events import ENDS
from brokertask.statuses import status_of

MAX_SHOWN: Final = 65_536
"""Characters of a value that a page has; the rest is in the raw one."""
NOTHING: Final = "\N{EN DASH}"
MAX_LINE: Final = 300
"""Characters of a text that stands in a row."""


def plain(text: object, stays: str = " ") -> str:
    """Return a text without any character that cannot be seen: those are escapes in it."""
    return "".join(shown for _, shown in _parts(str(text), stays))


def visible(text: object, *, breaks: bool = False) -> Markup:
    """Return a text for a page: control characters and direction marks as escapes, on their own.

    Line breaks and tabs stay with `breaks`. The direction of the text does not reach what is
    around it.
    """
    marked = (
        escape(shown) if seen else Markup('<span class="unseen">{}</span>').format(shown)
        for seen, shown in _parts(str(text), " \n\t" if breaks else " ")
    )
    return Markup("<bdi>{}</bdi>").format(Markup("").join(marked))


def _parts(text: str, stays: str) -> Iterator[tuple[bool, str]]:
    """Yield a text in parts, and whether each can be seen; those that cannot, as escapes."""
    if text.isprintable():
        yield True, text
        return
    for seen, chars in groupby(text, key=lambda char: char.isprintable() or char in stays):
        part = "".join(chars)
        shown = part.encode("unicode_escape", "surrogatepass").decode()
        yield (True, part) if seen else (False, shown)


def line(text: object) -> Markup:
    """Return a text that stands in a row: the beginning of a long one."""
    whole = str(text)
    return visible(whole if len(whole) <= MAX_LINE else f"{whole[: MAX_LINE - 1]}…")


def block(value: Any) -> tuple[Markup, bool]:
    """Return a JSON value for a page, and whether it is cut; integers have all of their digits."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return visible(text[:MAX_SHOWN], breaks=True), len(text) > MAX_SHOWN


def instant(at_ms: int | None, now_ms: int | None = None) -> Markup:
    """Return an instant in UTC, by the second; without its date if that is today's."""
    if at_ms is None:
        return Markup(NOTHING)
    when = datetime.fromtimestamp(at_ms / 1000, UTC)
    today = now_ms is not None and when.date() == datetime.fromtimestamp(now_ms / 1000, UTC).date()
    shown = f"{when:%H:%M:%S}" if today else f"{when:%Y-%m-%d %H:%M:%S}"
    exact = when.isoformat(timespec="milliseconds")
    return Markup('<time datetime="{}" title="{}">{}</time>').format(exact, exact, shown)


def took(since_ms: int | None, until_ms: int | None) -> str:
    """Return how long something took, or a dash."""
    if since_ms is None or until_ms is None:
        return NOTHING
    return readable(max(0, until_ms - since_ms) / 1000)


def query(values: Any) -> str:
    """Return values as a query string; those that say nothing are left out."""
    given = {key: value for key, value in dict(values).items() if value not in (None, "", [], ())}
    return f"?{urlencode(given, doseq=True)}" if given else ""


def segment(text: object) -> str:
    """Return a text as one segment of a path, whatever is in it."""
    return quote(str(text), safe="")


def environment() -> Environment:
    """Return what renders the templates: everything is escaped, and nothing undefined passes."""
    made = Environment(
        loader=PackageLoader("brokertask.server.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {
        "visible": visible,
        "line": line,
        "plain": plain,
        "instant": instant,
        "query": query,
        "segment": segment,
        "readable": readable,
    }
    made.globals |= {"took": took, "status_of": status_of, "ends": ENDS}
    return made
