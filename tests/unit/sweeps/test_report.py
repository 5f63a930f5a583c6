"""The page of a sweep: what it says, that it needs nothing beside it, and that it reads well with odd values in it."""

import base64
import re
import shutil
import subprocess
from html import escape as html_escape
from html.parser import HTMLParser

import numpy as np
import pytest

from maskray.data.storage import Storage
from maskray.evaluation.reconstruction import Reconstruction
from maskray.sweeps import report
from maskray.sweeps.record import REPORT, RESULT, TRIALS, keep_painted
from maskray.sweeps.record import painted as painted_of
from maskray.sweeps.record import results as on_record
from sweep_results import accuracy, base, grid, paint, results_of, sweep_config

SPACE = {"mask.ratio": [0.5, 0.75], "model.decoder.depth": [1, 2, 4]}
NOTHING_KEPT = {}.get
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What is shown, and what a browser would fetch for it."""

    def __init__(self, html):
        super().__init__()
        self.words, self.open, self.asked, self.tags, self.rows = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.asked += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset", "poster")]
        self.rows += [[]] if tag == "tr" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)
            if self.open[-1] in ("td", "button"):
                self.rows[-1].append(data)


def build(space=SPACE, outcome=accuracy, seeds=range(3), look=NOTHING_KEPT, points=None, **config):
    made = sweep_config(space, seeds=list(seeds), **config)
    results = results_of(grid(space) if points is None else points, seeds, outcome)
    return report.build(made, base(), results, look)


def looking(**options):
    """What was painted at each point of `SPACE`."""
    results = results_of(grid(SPACE), range(3), accuracy)
    return lambda key: paint(results[key].trial.point, results[key].trial.seed, **options)


def test_all_is_in_it_and_it_needs_nothing_beside_it():
    made = build(look=looking())
    page = Page(made.html)
    assert list(made.figures) == [
        "over_two", "along_mask.ratio", "along_model.decoder.depth", "cost", "paintings"
    ]  # fmt: skip
    inside = [base64.b64decode(each.partition("base64,")[2]) for each in page.asked]
    assert inside == list(made.figures.values())
    assert all(png.startswith(b"\x89PNG") for png in inside)
    written = re.sub(r"base64,[\w+/=]+", "", made.html)
    assert not re.search(r"https?:|//\w|url\(|@import|<link|<iframe|fetch\(|import\(|localStorage", written)
    assert page.tags.count("script") == 1
    for words in ("Best point", "Runner-up", "Noise", "Cheapest of these", "All trials", "How this is judged", "18"):
        assert words in page.text
    assert len(page.rows) == 2 + 6 + 18


def test_what_users_wrote_is_shown_and_not_obeyed():
    evil = "</td><script>alert(1)</script>"
    space = {"mask.kind": ["random", evil], "data.crop": [{"kind": evil}, None]}
    outcome = lambda point, seed: {  # noqa: E731
        "status": "failed" if seed == 2 else "finished", "value": 0.5 + seed / 10, "reason": evil, "run_id": f'"{evil}',
    }  # fmt: skip
    made = build(space, outcome)
    page = Page(made.html)
    assert page.tags.count("script") == 1
    assert "<script>alert(1)</script>" in page.text
    assert evil not in made.html
    assert len(page.rows) == 2 + 4 + 12


def test_the_best_is_said_with_its_interval_and_those_that_may_as_well_be():
    noise = [[0.0, 0.004, -0.004], [0.003, -0.004, 0.001], [-0.002, 0.001, 0.001]]
    means = {(0.75, 4): 0.8, (0.75, 1): 0.798, (0.5, 4): 0.796}

    def outcome(point, seed):
        place = point["mask.ratio"], point["model.decoder.depth"]
        return {"value": means.get(place, 0.6) + noise[sum(place) > 4.4][seed] * 0.9}

    page = Page(build(outcome=outcome).html)
    best = re.search(r"Best point (.*?) Runner-up", page.text)[1]
    assert re.match(r"ratio 0\.75 · decoder\.depth 4 80\.0 ± \d\.\d % 20-NN accuracy", best)
    assert "mean of 3 seeds, 95 % interval over seeds" in best
    assert "ratio 0.75 · decoder.depth 1: 79.8 ± " in page.text
    assert "0.2 points behind. That may be noise." in page.text
    assert re.search(r"Noise up to \d\.\d points may be noise; 2 of 5 other points are not told apart", page.text)
    assert re.search(r"Cheapest of these ratio 0.75 · decoder.depth 1: 79.8 .* at \d\d % of the FLOPs", page.text)
    assert "Gupta 1965" in page.text


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ({"status": "failed", "reason": "DataError: no dataset"}, "18 trials failed: DataError: no dataset"),
        ({"status": "pruned", "value": 0.4, "steps": 100, "reason": "rung 0"}, "On record: 18 stopped early"),
        ({"value": None}, "On record: 18 ran to the end"),
        ({"value": float("nan")}, "nan"),
    ],
)
def test_where_nothing_has_a_value_it_says_so_and_lists_what_there_is(outcome, words):
    made = build(outcome=lambda *_: outcome)
    page = Page(made.html)
    assert "Nothing has run to its end, so there is no best point." in page.text
    assert words in page.text
    assert made.figures == {}
    assert len(page.rows) == 2 + 6 + 18


def test_of_nothing_on_record_there_is_a_page_too():
    made = build(points=[])
    page = Page(made.html)
    assert "No trial is on record yet." in page.text
    assert "0 of 18" in page.text
    assert page.rows == []


def test_of_one_point_there_is_no_figure_but_what_it_paints():
    space = {"mask.ratio": [0.75]}
    made = build(space, look=lambda _: paint({"mask.ratio": 0.75}))
    assert list(made.figures) == ["paintings"]
    assert "there is nothing to compare it with" in Page(made.html).text


@pytest.mark.parametrize(
    ("asked", "words"), [([0], "Of each point one seed was asked for"), ([0, 1, 2], "one of 3 seeds ran to its end")]
)
def test_of_one_seed_there_is_no_interval_and_that_is_said(asked, words):
    page = Page(build(outcome=lambda p, s: accuracy(p, s) if s == 0 else {"status": "failed"}, seeds=asked).html)
    assert f"{words}: there are no intervals" in page.text
    assert "not known: it takes two seeds or more of two points" in page.text
    assert "±" not in page.text.partition("How this is judged")[0]


def test_a_point_of_which_all_seeds_were_stopped_is_no_hole(monkeypatch):
    from maskray.sweeps import drawing

    drawn = []
    real = drawing.heat_map
    monkeypatch.setattr(drawing, "heat_map", lambda cells, **rest: drawn.append(cells) or real(cells, **rest))

    def outcome(point, seed):
        if point["mask.ratio"] == 0.5 and point["model.decoder.depth"] < 4:
            return {"status": "pruned" if point["model.decoder.depth"] == 1 else "failed", "value": 0.3, "steps": 60}
        return {"status": "failed"} if seed == 2 and point["model.decoder.depth"] == 2 else accuracy(point, seed)

    made = build(outcome=outcome)
    cells = drawn[0]
    assert [cell.lines[0] for row in cells for cell in row if cell.value is None] == ["stopped early", "failed"]
    assert cells[1][1].lines[-1] == "2 of 3 seeds"
    assert [cell.is_best for row in cells for cell in row].count(True) == 1
    assert "Saved" in Page(made.html).text
    assert "flatter" in made.html


def test_where_trials_were_stopped_early_it_says_that_noise_is_too_small():
    words = "Some trials were stopped early: ± and noise are those of the others, and so too small."

    def text(of_last_seed):
        def outcome(point, seed):
            is_whole = seed < 2 or point["mask.ratio"] == 0.75
            return accuracy(point, seed) | ({} if is_whole else of_last_seed)

        return Page(build({"mask.ratio": [0.5, 0.75]}, outcome).html).text

    stopped = text({"status": "pruned", "value": 0.3, "steps": 60})
    assert re.search(r" Noise (up to .*?) Cheapest of these ", stopped)[1].endswith(f". {words}")
    assert f"≈ is not told apart from the best. {words}" in stopped
    assert words not in text({})
    assert words not in text({"status": "failed", "value": None}), "nobody chose it by what it was worth"


def test_the_paper_s_curves_stand_beside_accuracies_along_its_axes_and_beside_no_loss(monkeypatch):
    from maskray.sweeps import drawing

    beside, real = {}, drawing.curves

    def curves(points, **rest):
        beside[rest["across"].name] = rest["beside"]
        return real(points, **rest)

    monkeypatch.setattr(drawing, "curves", curves)
    space = {"mask.ratio": [0.5, 0.75], "model.decoder.width": [64, 128], "optim.base_lr": [0.1, 0.2]}
    build(space)
    assert beside["mask.ratio"].title == "The MAE paper, Fig. 5"
    assert dict(beside["mask.ratio"].curves["linear probe"])[0.75] == 73.5
    assert dict(beside["model.decoder.width"].curves["fine-tuning"])[512] == 84.9
    assert beside["optim.base_lr"] is None
    build(space, objective={"metric": "pretrain/loss", "direction": "min", "forced": True})
    assert set(beside.values()) == {None}


def test_a_forced_loss_is_warned_of_before_all_else():
    objective = {"metric": "pretrain/loss", "direction": "min", "forced": True}
    page = Page(build(objective=objective).html)
    assert page.text.index("judged by the loss, which was forced") < page.text.index("Best point")
    assert re.search(r"Best point \S+ \S+ · \S+ \S+ 0\.\d{4} ± 0\.\d{4} pretraining loss", page.text)
    said = page.text[page.text.index("Best point") : page.text.index("Trials")]
    assert [
        words for words in re.findall(r"\S+ %", said) if words != "95 %" and f"{words} of the FLOPs" not in said
    ] == []


def test_values_of_all_kinds_are_axes():
    space = {
        "mask.ratio": [0.5, [0.5, 0.75], None],
        "optim.clip_norm": [None, 1.0, "none"],
        "data.crop": [{"kind": "whole"}, {"kind": "random_resized"}],
    }
    made = build(space, lambda _, seed: {"value": 0.8 + seed / 100}, look=lambda _: paint({}))
    assert {"over_two", "along_mask.ratio", "along_optim.clip_norm", "along_data.crop"} <= made.figures.keys()
    assert '{"kind": "whole"}' in Page(made.html).text


def test_points_that_were_drawn_are_shown_where_they_lie():
    space = {
        "optim.base_lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-1},
        "mask.ratio": {"kind": "uniform", "low": 0.3, "high": 0.9},
    }
    rng = np.random.default_rng(0)
    points = [{"optim.base_lr": 10 ** rng.uniform(-4, -1), "mask.ratio": rng.uniform(0.3, 0.9)} for _ in range(20)]
    made = build(space, points=points, search={"kind": "random", "points": 20}, look=lambda _: paint({}))
    assert list(made.figures) == ["over_two", "along_optim.base_lr", "along_mask.ratio", "cost", "paintings"]


def test_points_that_were_asked_for_and_are_not_there_are_said():
    space = {"model.decoder.depth": {"kind": "choice", "values": [1, 2]}, "mask.ratio": [0.5, 0.75]}
    points = grid({"model.decoder.depth": [1, 2], "mask.ratio": [0.5, 0.75]})
    some, all_ = (Page(build(space, points=points, search={"kind": "random", "points": n}).html) for n in (3, 2))
    assert "Points 4 of 6 asked for, 3 seeds each" in some.text
    assert "Points 4 3 seeds each" in all_.text


def test_where_all_have_spent_the_same_an_image_s_cost_is_shown():
    made = build({"optim.base_lr": [0.1, 0.2, 0.3]})
    assert list(made.figures) == ["along_optim.base_lr", "cost_of_an_image"]


def test_what_is_on_record_makes_the_same_page(tmp_path):
    sweep, space = Storage(tmp_path), {"mask.ratio": [0.5, [0.5, 0.75]], "optim.clip_norm": [None, 1.0]}
    made = sweep_config(space)
    results = results_of(grid(space), range(3), lambda _, seed: {"value": 0.8 + seed / 100, "metrics": {"a": 0.5}})
    looks = {key: paint({}, one.trial.seed) for key, one in results.items()}
    for key, one in results.items():
        folder = sweep.child(TRIALS, key)
        folder.write_bytes(RESULT, one.dump())
        image, visible, painted, _ = (array[None] for array in looks[key].values())
        keep_painted(folder, Reconstruction(image, visible, painted, np.zeros(1, np.float32), False))
    again = report.build(made, base(), on_record(sweep), lambda key: painted_of(sweep.child(TRIALS, key)))
    assert again == report.build(made, base(), results, looks.get)
    assert "paintings" in again.figures


def test_it_is_written_in_place_of_an_older_one(place):
    sweep = Storage(place)
    first, second = build(look=looking()), build(points=[])
    report.write(first, sweep)
    folder = sweep.child(REPORT)
    assert set(folder.list_names()) == {report.PAGE, *(f"{name}.png" for name in first.figures)}
    assert folder.read_bytes("over_two.png") == first.figures["over_two"]
    report.write(second, sweep)
    assert folder.list_names() == [report.PAGE]
    assert folder.read_bytes(report.PAGE).decode() == second.html


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_click_on_a_head_sorts_by_it_in_the_frame_that_mlflow_shows_pages_in(tmp_path):
    """By numbers as numbers, empty ones last, and the other way round at the second click."""

    def outcome(point, seed):
        return {"status": "failed"} if seed == 2 else {"value": [0.1, 0.08][seed] + point["mask.ratio"] / 10}

    html = build({"mask.ratio": [0.5, 0.75]}, outcome).html
    clicks = """
      <script>
        const table = document.querySelectorAll("table")[1], column = 3;
        const shown = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent).join("|");
        const found = [shown()];
        for (const click of [1, 2]) {
          table.tHead.rows[0].cells[column].firstElementChild.click();
          found.push(shown());
        }
        parent.postMessage(found, "*");
      </script>"""
    frame = html_escape(html.replace("</body>", f"{clicks}</body>"))
    page = tmp_path / "page.html"
    page.write_text(f"""<!doctype html><body><iframe sandbox="allow-scripts" srcdoc="{frame}"></iframe><pre></pre>
      <script>onmessage = event => document.querySelector("pre").textContent = event.data.join("\\n")</script>""")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=30000",
        f"--user-data-dir={tmp_path}/u",
    ]
    out = subprocess.run(
        ["chromium", *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    lines = re.search(r"<pre>(.*?)</pre>", out.stdout, re.DOTALL)[1].splitlines()
    cells = [[words for words in line.split("|") if words] for line in lines]
    assert sorted(cells[0]) == sorted(cells[1])
    assert cells[1] == ["13.0 %", "15.0 %", "15.5 %", "17.5 %"]
    assert cells[2] == cells[1][::-1]
    assert all(line.endswith("||") or line.count("|") == 5 for line in lines)
    assert lines[1].endswith("||")
    assert lines[2].endswith("||")
