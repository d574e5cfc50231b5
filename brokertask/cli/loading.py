"""From MODULE:APP to the App; apart from `console`, so that workers do without its imports."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Final

from brokertask.app import App
from brokertask.errors import BrokertaskError, ConfigurationError


class AppNotFound(ConfigurationError):
    """MODULE:APP does not lead to an App.

    Attributes:
        frames: Where in the user's own module it failed to import, as text.
    """

    def __init__(self, message: str, *, frames: str = "") -> None:
        super().__init__(message)
        self.frames = frames


_PACKAGE: Final = str(Path(__file__).resolve().parents[1])


def load(spec: str) -> App:
    """Return the App that `module:attribute` names; the current folder is importable.

    Raises:
        AppNotFound: There is none, or its module fails to import.
        BrokertaskError: A declaration in it is wrong.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name:
        raise AppNotFound(f"{spec!r} names no module; write MODULE:APP, as in app.tasks:app")
    module = _import(module_name)
    app = getattr(module, attribute or "app", None)
    if not isinstance(app, App):
        apps = [name for name, value in vars(module).items() if isinstance(value, App)]
        hint = f"it has: {', '.join(apps)}" if apps else "it has no App at all"
        raise AppNotFound(
            f"module {module_name!r} has no App called {attribute or 'app'!r}; {hint}"
        )
    return app


def _import(name: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except BrokertaskError as error:
        # Declarations name their place themselves; options are checked before there is one.
        place = _place(error)
        known = place is None or ":" in str(error).partition(" ")[0]
        if known or not isinstance(error, ConfigurationError):
            raise
        raise type(error)(f"{place}: {error}") from None
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise AppNotFound(f"there is no module {error.name!r} here ({folder})") from None
        raise _failed(name, error) from error
    except Exception as error:
        raise _failed(name, error) from error


def _place(error: BrokertaskError) -> str | None:
    """Return the last line of the user's own code that led to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith(_PACKAGE) and "importlib" not in frame.filename
    ]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def _failed(name: str, error: Exception) -> AppNotFound:
    """Return the user's own mistake where it is, without our frames and importlib's."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if "importlib" not in frame.filename]
    text = "".join(traceback.format_list(own))
    if isinstance(error, SyntaxError):
        text += "".join(traceback.format_exception_only(error)[:-1])
    return AppNotFound(
        f"module {name!r} cannot be imported: {type(error).__name__}: {error}", frames=text
    )
