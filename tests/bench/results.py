"""The samples of one or several runs, on disk, and the medians and ratios over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tests.bench.round import Sample


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and what lies around it."""

    middle: float
    least: float
    most: float

    @staticmethod
    def of(numbers: Sequence[float]) -> Spread | None:
        """Return that of some numbers, or None if there are none."""
        return Spread(median(numbers), min(numbers), max(numbers)) if numbers else None


class Results:
    """What has been measured. A later run of a case replaces what an earlier one found."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._samples = list(samples)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Return what a file holds, or nothing if there is none."""
        if not path.exists():
            return cls()
        return cls(Sample(**json.loads(line)) for line in path.read_text().splitlines())

    def save(self, path: Path) -> None:
        """Write the file anew."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(asdict(each))}\n" for each in self._samples))

    def forget(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Drop the samples of these cases with these systems."""
        dropped = set(pairs)
        self._samples = [each for each in self._samples if (each.case, each.system) not in dropped]

    def add(self, sample: Sample) -> None:
        """Take in one more."""
        self._samples.append(sample)

    def rounds(self, case: str) -> int:
        """Return how many rounds of a case there are, at most, of one system."""
        return len({each.round for each in self._samples if each.case == case})

    def next_round(self, case: str) -> int:
        """Return the number of the round after the last one of a case."""
        return max((each.round + 1 for each in self._samples if each.case == case), default=0)

    def spread(self, case: str, system: str, figure: str) -> Spread | None:
        """Return the median of one figure over the rounds."""
        return Spread.of(list(self.figures(case, system, figure).values()))

    def figures(self, case: str, system: str, figure: str) -> dict[int, float]:
        """Return one figure in each round."""
        return {
            each.round: each.figures[figure]
            for each in self._samples
            if (each.case, each.system) == (case, system) and figure in each.figures
        }

    def paired(
        self,
        ours: dict[int, float],
        theirs: dict[int, float],
        combine: Callable[[float, float], float],
    ) -> Spread | None:
        """Return the median of a ratio or difference: of the two sides of the same round each."""
        both = [combine(ours[number], theirs[number]) for number in ours if number in theirs]
        return Spread.of(both)
