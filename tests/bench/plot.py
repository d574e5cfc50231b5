"""A plot of bars, as SVG that reads well on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

LABELS: Final = 240
BARS: Final = 400
NUMBERS: Final = 90
ROW: Final = 24
BAR: Final = 15
HEAD: Final = 46
GAP: Final = 26
STYLE: Final = """\
text { font: 13px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; font-size: 14px; }
.note { fill: #57606a; font-size: 12px; }
.end { text-anchor: end; }
.own { font-weight: 600; }
.a { fill: #8c959f; } .b { fill: #d0d7de; } .own.a { fill: #1a7f64; } .own.b { fill: #7cc8b2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .note { fill: #9198a1; }
  .a { fill: #8b949e; } .b { fill: #484f58; } .own.a { fill: #3fb68b; } .own.b { fill: #1f6f56; }
}"""


@dataclass(frozen=True, slots=True)
class Bar:
    """One row: a label, and the parts of its bar from left to right, two at most."""

    label: str
    parts: tuple[float, ...]
    own: bool = False

    @property
    def whole(self) -> float:
        return sum(self.parts)


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars below one another, on one scale that begins at 0."""

    title: str
    note: str
    bars: Sequence[Bar]

    @property
    def height(self) -> int:
        return HEAD + ROW * len(self.bars)


def svg(panels: Sequence[Panel]) -> str:
    """Return the panels, one below the other."""
    width = LABELS + BARS + NUMBERS
    height = sum(panel.height + GAP for panel in panels)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">',
        f"<style>\n{STYLE}\n</style>",
    ]
    top = 0
    for panel in panels:
        lines += _panel(panel, top)
        top += panel.height + GAP
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(panel: Panel, top: int) -> list[str]:
    lines = [
        f'<text class="title" x="0" y="{top + 15}">{escape(panel.title)}</text>',
        f'<text class="note" x="0" y="{top + 32}">{escape(panel.note)}</text>',
    ]
    longest = max((bar.whole for bar in panel.bars), default=0.0) or 1.0
    for row, bar in enumerate(panel.bars):
        lines += _bar(bar, top + HEAD + row * ROW, BARS / longest)
    return lines


def _bar(bar: Bar, top: int, scale: float) -> list[str]:
    own, left, middle = "own " if bar.own else "", float(LABELS), top + BAR - 3
    label = escape(bar.label)
    lines = [f'<text class="{own}end" x="{LABELS - 10}" y="{middle}">{label}</text>']
    for shade, part in zip("ab", bar.parts, strict=False):
        wide = part * scale
        lines.append(
            f'<rect class="{own}{shade}" x="{left:.1f}" y="{top}" width="{wide:.1f}" '
            f'height="{BAR}"/>'
        )
        left += wide
    number = f"{bar.whole:,.0f}"
    lines.append(f'<text class="{own}" x="{left + 8:.1f}" y="{middle}">{number}</text>')
    return lines
