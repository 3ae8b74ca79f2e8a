"""An SVG picture with the few shapes that the drawings here need, legible on a light and on a dark page."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.sax.saxutils import escape

SANS = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
WIDTH_OF_A_LETTER = 0.6
"""In font sizes: of the widest fonts that a page may fall back to."""

# name -> (fill, line) on a light page, (fill, line) on a dark one
COLORS = {
    "page": (("#ffffff", "#d0d7de"), ("#0d1117", "#3d444d")),
    "box": (("#f6f8fa", "#d0d7de"), ("#161b22", "#3d444d")),
    "core": (("#ddf4ff", "#0969da"), ("#10233f", "#4493f8")),
    "good": (("#dafbe1", "#1a7f37"), ("#12301d", "#3fb950")),
    "bad": (("#ffebe9", "#cf222e"), ("#38181b", "#f85149")),
    "number": (("#fff8c5", "#9a6700"), ("#33290f", "#d29922")),
}
INKS = {"ink": ("#1f2328", "#e6edf3"), "dim": ("#57606a", "#9198a1"), "link": ("#0969da", "#4493f8")}


@dataclass(frozen=True, slots=True)
class Extent:
    """The room that a text takes, at most."""

    text: str
    left: float
    top: float
    right: float
    bottom: float


@dataclass(slots=True, kw_only=True)
class Picture:
    """Shapes are drawn in the order in which they are added."""

    width: int
    height: int
    title: str
    extents: list[Extent] = field(default_factory=list)
    _shapes: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, color: str = "box", *, radius: float = 6) -> None:
        """A filled rectangle with a line around it."""
        self._shapes.append(
            f'<rect class="{color}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        ink: str = "ink",
        mono: bool = False,
        bold: bool = False,
        anchor: str = "start",
    ) -> None:
        """One line, its baseline at ``y``; ``anchor``: start, middle or end of it is at ``x``."""
        wide = len(text) * size * WIDTH_OF_A_LETTER
        left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        self.extents.append(Extent(text, left, y - 0.8 * size, left + wide, y + 0.25 * size))
        style = f' font-family="{MONO}"' if mono else ""
        style += ' font-weight="600"' if bold else ""
        style += f' text-anchor="{anchor}"' if anchor != "start" else ""
        self._shapes.append(
            f'<text class="{ink}" x="{x:g}" y="{y:g}" font-size="{size:g}"{style}>{escape(text)}</text>'
        )

    def chip(self, x: float, y: float, text: str, color: str, *, width: float = 30, height: float = 22) -> None:
        """A small box with a word in it."""
        self.box(x, y, width, height, color, radius=5)
        self.text(x + width / 2, y + height / 2 + 4.3, text, size=12, mono=True, anchor="middle")

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A straight arrow."""
        self._shapes.append(
            f'<line class="arrow" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" marker-end="url(#head)"/>'
        )

    def svg(self, *, dark: bool | None = None) -> str:
        """The file; its colours follow the reader's setting unless ``dark`` is given."""
        light, night = _style(0), _style(1)
        style = f"{light} @media (prefers-color-scheme: dark) {{ {night} }}" if dark is None else (light, night)[dark]
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" font-family="{SANS}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{style}</style>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
                'orient="auto" markerUnits="userSpaceOnUse"><path class="head" d="M0,0 L8,4 L0,8 z"/></marker></defs>',
                f'<rect class="page" x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8"/>',
                *self._shapes,
                "</svg>\n",
            ]
        )


def _style(page: int) -> str:
    boxes = [f".{name}{{fill:{colors[page][0]};stroke:{colors[page][1]}}}" for name, colors in COLORS.items()]
    inks = [f".{name}{{fill:{colors[page]}}}" for name, colors in INKS.items()]
    gray = INKS["dim"][page]
    return " ".join([*boxes, *inks, f".arrow{{stroke:{gray};stroke-width:1.5}}", f".head{{fill:{gray}}}"])
