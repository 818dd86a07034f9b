"""Whether a figure can be read: nothing clipped, tiny, or upon something else."""

import io
from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SMALLEST = 7.0  # points


def drawn(figure: Figure) -> list[Text]:
    """All texts that are seen, after the figure was saved once as a png."""
    figure.savefig(io.BytesIO(), format="png", dpi=100)
    found = figure.findobj(lambda x: isinstance(x, Text) and x.get_visible())
    shown = [text for text in found if isinstance(text, Text) and text.get_text().strip()]
    beyond = {id(label) for ax in figure.axes for label in _beyond(ax)}
    return [text for text in shown if id(text) not in beyond]


def _beyond(ax: Axes) -> Iterator[Text]:
    """Labels of ticks beyond the ends of an axis, which it keeps and does not draw."""
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        air = 1e-6 * (high - low)
        for tick in axis.get_major_ticks():
            if not low - air <= tick.get_loc() <= high + air:
                yield from (tick.label1, tick.label2)


def troubles(figure: Figure) -> list[str]:
    """What makes the figure hard to read, in words."""
    texts = drawn(figure)
    found = [f"small: {t.get_text()!r}" for t in texts if float(t.get_fontsize()) < SMALLEST]
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    if min(box.x0, box.y0, width - box.x1, height - box.y1) < 0:
        found.append(f"clipped: {box} of {width} x {height}")
    boxes = [(text.get_text(), _shrunk(text)) for text in texts]
    for n, (name, one) in enumerate(boxes):
        found += [f"{name!r} upon {other!r}" for other, two in boxes[:n] if one.overlaps(two)]
    if figure.get_facecolor() != (1.0, 1.0, 1.0, 1.0):
        found.append("not on white")
    return found


def _shrunk(text: Text) -> Bbox:
    """Without the air around letters, and without blank lines below, which make room for others."""
    box, said = text.get_window_extent(), text.get_text()
    blank = len(said) - len(said.rstrip("\n"))
    below = box.height * blank / (1 + said.count("\n"))
    return Bbox.from_extents(box.x0 + 0.5, box.y0 + below + 1.5, box.x1 - 0.5, box.y1 - 1.5)


def labels(ax: Axes) -> tuple[list[str], list[str]]:
    """The names along both axes."""
    return (
        [text.get_text() for text in ax.get_xticklabels()],
        [text.get_text() for text in ax.get_yticklabels()],
    )


def texts(ax: Axes) -> list[str]:
    """What is written into axes."""
    return [text.get_text() for text in ax.texts]
