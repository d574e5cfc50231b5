from __future__ import annotations

import inspect
from typing import get_args

import pytest

from brokertask import errors
from brokertask.errors import BatchError, BrokertaskError, PublishUnknown, QueueFull, Reason


def _drawn() -> dict[str, str]:
    """Return the parent of each class, as the docstring of `errors` draws the tree."""
    known = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        names = [word.strip(",") for word in line.split()]
        names = names[: next((i for i, word in enumerate(names) if word not in known), None)]
        indent = len(line) - len(line.lstrip())
        if not names or not indent:
            continue
        path = [(depth, name) for depth, name in path if depth < indent]
        for name in names:
            parents[name] = path[-1][1] if path else "Exception"
        path.append((indent, names[-1]))
    return parents


def _real() -> dict[str, str]:
    return {
        name: value.__bases__[0].__name__
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BrokertaskError)
    }


def test_the_tree_that_is_drawn_is_the_real_one() -> None:
    assert _drawn() == _real()


def test_every_class_says_what_it_is() -> None:
    for name in _real():
        assert getattr(errors, name).__doc__, name


def test_every_reason_is_explained() -> None:
    assert set(errors.REASONS) == set(get_args(Reason))


def test_unknown_is_said_where_it_is_unknown() -> None:
    assert PublishUnknown("no answer").unknown
    assert not QueueFull("full").unknown


@pytest.mark.parametrize("unknown", [True, False])
def test_a_batch_counts_its_errors_and_passes_on_the_doubt(unknown: bool) -> None:
    failed = PublishUnknown("no answer") if unknown else QueueFull("full")
    error = BatchError(["run", failed, "run"])
    assert str(error).startswith("1 of 3 runs were not taken")
    assert error.unknown is unknown
    assert error.results[1] is failed
