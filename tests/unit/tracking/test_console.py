import io
import re
import threading
import time

import pytest

from maskray.tracking import console
from maskray.tracking.console import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(loss: float) -> dict[str, float]:
    return {"pretrain/loss": loss, "throughput/images_per_second": 812.3, "pretrain/lr": 1e-3}


def test_plain_lines_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    out = io.StringIO()
    line = ProgressLine(400, file=out)
    line.update(110, metrics(0.5))
    time.sleep(0.01)
    line.update(120, metrics(0.41))
    line.update(400, metrics(0.2))
    line.close()
    first, second, last = out.getvalue().splitlines()
    assert first == "step 110/400  loss 0.5  812 images/s"
    assert re.fullmatch(r"step 120/400  loss 0.41  812 images/s  \d+:\d\d left", second)
    assert last == "step 400/400  loss 0.2  812 images/s  done"


def test_plain_lines_are_few_and_the_last_is_said() -> None:
    out = io.StringIO()
    line = ProgressLine(400, file=out)
    for step in range(1, 400):
        line.update(step, metrics(1 / step))
    line.close()
    line.close()
    assert [text.split("  ")[0] for text in out.getvalue().splitlines()] == ["step 1/400", "step 399/400"]


def test_one_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    line = ProgressLine(40, file=out)
    for step in (10, 20, 40):
        line.update(step, metrics(0.25))
    line.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "step 40/40" in shown
    assert "loss 0.25  812 images/s  done" in shown
    assert "\n\n" not in shown.strip("\n")
    assert threading.active_count() == 1 or not any("rich" in t.name.lower() for t in threading.enumerate())


def test_metrics_without_a_loss_make_a_line_too() -> None:
    out = io.StringIO()
    line = ProgressLine(10, file=out)
    line.update(0, {"probe/accuracy": 0.5})
    line.close()
    assert out.getvalue().strip() == "step 0/10"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (12.4, "0:12"), (3599, "59:59"), (90000, "25:00:00")])
def test_clock(seconds: float, text: str) -> None:
    assert console._clock(seconds) == text
