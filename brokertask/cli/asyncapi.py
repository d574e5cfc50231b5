"""`brokertask asyncapi`: what an app takes from the broker and tells there, for other languages."""

from __future__ import annotations

from brokertask import __version__
from brokertask.asyncapi import document
from brokertask.cli import console
from brokertask.cli.broker import AnApp


def asyncapi(spec: AnApp) -> None:
    """Print an app's AsyncAPI 3.0 document: its triggers with JSON Schema, and its events."""
    app = console.load_app(spec)
    names = app.settings.names
    console.show_json(document(app.name, __version__, app.tasks.values(), names))
