"""What is written on a figure, and where."""

import numpy as np
import pytest
from matplotlib.text import Text

_TOUCHING = 0.5


class Letters(list):
    """Each text that was drawn, its box in pixels, and the box of its figure."""

    def misplaced(self):
        """Texts that leave the figure, and pairs that lie over each other."""
        low, high = (np.array([ends(box) for _, box, _ in self]) for ends in (lambda b: b.min, lambda b: b.max))
        size = np.array([figure.max for _, _, figure in self])
        out = ((low < -_TOUCHING) | (high > size + 1)).any(axis=1)
        shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
        pairs = np.argwhere(np.triu((shared > _TOUCHING).all(axis=2), k=1))
        return [self[n][0] for n in np.flatnonzero(out)] + [(self[a][0], self[b][0]) for a, b in pairs]

    def words(self):
        return [words for words, _, _ in self]


@pytest.fixture
def letters(monkeypatch):
    """All that is drawn while the test runs."""
    found, draw = Letters(), Text.draw

    def drawn(self, renderer):
        draw(self, renderer)
        if self.get_visible() and self.get_text().strip():
            found.append((self.get_text(), self.get_window_extent(renderer), self.get_figure().bbox.frozen()))

    monkeypatch.setattr(Text, "draw", drawn)
    return found
