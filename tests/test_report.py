"""The page of a run, without a browser: what it says, and that nothing of a run becomes part of its markup."""

from __future__ import annotations

import csv
import html
import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import ATTACKS, CURVES, DEFENCES, IMAGE, IMAGES, MODELS, SCRIPT, TUNE, VERDICTS, make_run
from PIL import Image
from tiny import files
from typer.testing import CliRunner

from evaluation import experiment, heat_map, report, statistics
from evaluation.cell_pictures import Sprites, cell_picture, outline
from evaluation.charts import Datum, Look, line_chart, nice_ticks, scatter
from evaluation.cli import app
from evaluation.files import DamagedError
from evaluation.lead import unfinished
from evaluation.palette import paint
from evaluation.pictures import LONGEST, Picture, View, chosen, decoded, png
from evaluation.results import Results


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; copied where a test changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)
        return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def page_of(folder: Path, **change: object) -> str:
    results = replace(Results.load(folder), **change)  # type: ignore[arg-type]
    return report.page(results, [folder], resamples=20)


class Read(HTMLParser):
    """Elements and attributes of a page, and its text by the element that has an id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def dialogs(text: str) -> list[str]:
    return re.findall(r"<dialog .*?</dialog>", text, flags=re.S)


def words(text: str) -> str:
    return " ".join(Read(text).text.split())


# ------------------------------------------------------------------------------------------------------------- numbers


def test_every_number_of_the_summary_is_on_the_page(finished: Path) -> None:
    with (finished / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = (finished / "report.html").read_text()
    cells = dialogs(text)
    assert len(cells) == len(rows) == len(MODELS) * len(ATTACKS) * len(DEFENCES)
    columns = set(rows[0]) - {"model", "attack", "defence", "failed_checks", "note"}
    whole = {"images", "seeds", "steps", "forwards", "backwards"}
    for row, cell in zip(rows, cells, strict=True):
        assert html.escape(row["model"]) in cell.replace("&#34;", "&quot;")
        if row["note"]:
            assert "Not applicable" in words(cell)
            continue
        shown = dict(re.findall(r'<dd data-figure="(\w+)">([^< ]*)', cell))
        assert set(shown) == columns
        for column in columns - {"seconds"}:
            if row[column] == "" or (column == "success_drop" and row["defence"] == "none"):
                assert shown[column] == "—", column
                continue
            value = float(row[column])
            expected = f"{value:.0f}" if column in whole else f"{round(100 * value, 1) + 0.0:.1f}".replace("-", "−")
            assert shown[column] == expected, column


def test_the_table_has_the_intervals_of_the_statistics(finished: Path) -> None:
    from evaluation import statistics

    results = Results.load(finished)
    ends = statistics.intervals(results)
    compared = statistics.paired_differences(results)
    p_values = compared[compared["figure"] == "success"]["p_holm"]
    (table,) = re.findall(r'<table class="sortable".*?</table>', (finished / "report.html").read_text(), flags=re.S)
    text = words(table)
    for low, high in zip(ends["success_low"], ends["success_high"], strict=True):
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in text
    assert not p_values.empty
    for p in p_values:
        assert f" {p:.3f} " in text


def test_success_by_distance_is_on_the_page(finished: Path) -> None:
    text = words(page_of(finished))
    for row in statistics.success_by_distance(Results.load(finished), resamples=20).to_dict("records"):
        if not math.isnan(row["success_low"]):
            told = f"{100 * row['success']:.1f} [{100 * row['success_low']:.1f}, {100 * row['success_high']:.1f}]"
            assert told in text


def test_the_page_is_made_again_to_the_byte_without_a_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.models.load_model", None)
    made = ["report.html", "rows.csv", "summary.csv", "summary.json"]
    before = {name: (run / name).read_bytes() for name in made}
    for name in made:
        (run / name).unlink()
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0, done.output
    assert done.output.replace("\n", "") == f"Page: {run / 'report.html'}"
    assert {name: (run / name).read_bytes() for name in made} == before
    elsewhere = run.parent / "elsewhere" / "page.html"
    assert CliRunner().invoke(app, ["report", str(run), "--out", str(elsewhere)]).exit_code == 0
    assert elsewhere.read_bytes() == before["report.html"]


# -------------------------------------------------------------------------------------------------------------- markup


def test_nothing_of_a_run_becomes_markup_and_nothing_is_asked_of_the_network(run: Path) -> None:
    (run / "curves.csv").write_text(CURVES)
    (run / "tune.csv").write_text(TUNE.replace("m,permute", '"<b onclick=x>m",permute'))
    text = page_of(run, verdicts=VERDICTS)
    read = Read(text)
    tags = [tag for tag, _ in read.elements]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert "b" not in tags
    for tag, attributes in read.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")) or value == "data:,"
    for raw in (SCRIPT, IMAGE, DEFENCES[2], MODELS[1], ATTACKS[1], "<b>strip</b>", "<b onclick=x>m"):
        assert raw in read.text, "shown as text"
    policy = next(a["content"] for _, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    style, script = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", text, flags=re.S)[::2]
    assert "url(" not in style
    assert "@import" not in style
    assert "innerHTML" not in script
    assert "fetch" not in script


# ----------------------------------------------------------------------------------------------------- what is lacking


def test_a_run_from_before_there_were_pictures_has_a_page_that_says_so(run: Path) -> None:
    shutil.rmtree(run / "pictures")
    text = page_of(run)
    assert "This run kept no pictures" in text
    assert "<image" not in text
    assert not any(part in text for part in ('id="curves"', 'id="sweep"'))
    assert "No check was made of this run." in text


def test_a_damaged_picture_is_named_by_a_page_and_made_again_by_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)
    monkeypatch.setattr(report, "RESAMPLES", 20)
    before = files(run)
    path = sorted((run / "pictures").rglob("worst.jsonl"))[0]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedError, match=r"worst\.jsonl is damaged"):
        page_of(run)
    make_run(run)
    assert files(run) == before
    # of other rows: what a kill between new rows and their pictures leaves
    picture = Picture.load(path)
    assert picture is not None
    picture.save(path, "other rows")
    make_run(run)
    assert files(run) == before


def test_what_is_not_finished_or_was_left_out_is_in_plain_sight(run: Path) -> None:
    assert unfinished(Results.load(run)) == []
    gone = next((run / "cells").glob("m/plain/shifted/transfer-*.jsonl"))
    gone.unlink()
    results = Results.load(run)
    assert unfinished(results) == ["m · plain · shifted"]
    text = words(page_of(run))
    assert "Not finished: 1 cell lacks images (m · plain · shifted)" in text
    assert f"Not applicable: {DEFENCES[2]} on m: no {IMAGE} in it" in text
    text = words(page_of(run, interrupted=True, configuration={}))
    assert "Interrupted: Only what was finished is here." in text


def test_a_folder_without_rows_has_no_page(run: Path) -> None:
    shutil.rmtree(run / "cells")
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 2
    assert "holds no rows yet" in done.stderr
    assert CliRunner().invoke(app, ["report", str(run), str(run)]).exit_code == 2


# -------------------------------------------------------------------------------------------------------------- checks


def test_an_unreliable_cell_is_marked_wherever_it_is_shown(run: Path) -> None:
    assert "⚠</span> " not in page_of(run).split('class="scale"')[0], "none failed"
    (run / "curves.csv").write_text(CURVES.replace("ram", "shifted").replace("permute", ATTACKS[0]))
    failing = [replace(VERDICTS[1], model="m"), replace(VERDICTS[2], model="m"), *VERDICTS]
    text = page_of(run, verdicts=failing)
    doubtful = [(m, a, "shifted") for a in ATTACKS for m in MODELS if (m, a) != (MODELS[0], "x")]
    assert f"{len(doubtful)} of 12 cells are unreliable" in text
    assert text.index('id="unreliable"') < text.index('id="findings"') < text.index('id="heat-map"')
    assert len(re.findall(r'<td class="tile doubtful".*?⚠</span> ', text)) == len(doubtful)
    assert len(re.findall(r'<tr [^>]*class="doubtful"', text)) == len(doubtful)
    marked = [cell for cell in dialogs(text) if "Unreliable:" in cell]
    assert len(marked) == len(doubtful)
    for section in ("rings", "classes"):
        tables = text[text.index(f'<section aria-labelledby="{section}-title"') :].split("</section>")[0]
        assert len(re.findall(r"shifted <span class=\"sign\">⚠ unreliable", tables)) == len(doubtful), section
    assert text.count("m · shifted ⚠ unreliable") == 1, "the curves' legend"
    assert "m, shifted ⚠ unreliable:" in text, "and its points"
    section = words(text[text.index('id="checks"') : text.index('id="curves"')])
    assert section.index("✗ failed") < section.index("– not tried") < section.index("✓ passed")
    assert "every attack" in section


# ------------------------------------------------------------------------------------------------------------ heat map


def test_colours_can_be_read_and_told_apart_by_lightness() -> None:
    scale = [heat_map.colour_of(share) for share in np.linspace(0, 1, 201)]
    light = [heat_map.luminance(colour) for colour in scale]
    assert all(one <= two + 1e-3 for one, two in itertools.pairwise(light)), "greater is lighter"
    inks = {"#000000": (0, 0, 0), "#ffffff": (255, 255, 255)}
    assert all(heat_map.contrast(colour, inks[heat_map.ink_on(colour)]) >= 4.5 for colour in scale)
    assert heat_map.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)


def test_the_longer_side_of_the_heat_map_goes_down(finished: Path) -> None:
    from evaluation.cell_table import cell_rows

    cells = cell_rows(Results.load(finished), resamples=20)
    wide = heat_map.heat_map(cells)
    assert not wide.turned
    assert [len(row) for row in wide.tiles] == [len(ATTACKS)] * 6
    few = [cell for cell in cells if cell.model == "m" and cell.defence == "none"]
    tall = heat_map.heat_map(few)
    assert tall.turned
    assert [[tile.cell for tile in row] for row in tall.tiles] == [[cell] for cell in few]
    rates = [cell.values["success"].number for cell in cells if not cell.note]
    assert max(rates) <= wide.top <= max(rates) + 0.1


# ------------------------------------------------------------------------------------------------------------ pictures


def picture_of(size: tuple[int, int], classes: int, masked: bool = True) -> tuple[Picture, View, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    maps = {name: rng.integers(0, classes, size) for name in ("label", "target", "clean", "attacked")}
    maps["label"][0, 0] = 255
    photo = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = np.zeros(size, dtype=bool)
    mask[2:5, 3:9] = True
    mask[2, 3] = False
    patched = np.where(mask[..., None] | (not masked), rng.integers(0, 256, (*size, 3), dtype=np.uint8), photo)
    view = View("none", "plain", 0.25, patched, mask if masked else None, maps["clean"], maps["attacked"])
    named = tuple(f"class {c}" for c in range(classes))
    colors = [(c % 256, 7 * c % 256, 31 * c % 256) for c in range(classes)]
    record = type("Record", (), {"model": "m", "attack": "a", "image": 3, "name": "n", "seed": 0})()
    made = Picture.of(
        record, "worst", photo=photo, label=maps["label"], target=maps["target"], views=[view, view], classes=named,
        colors=colors,
    )  # fmt: skip
    return made, view, {**maps, "photo": photo}


@pytest.mark.parametrize(("classes", "masked"), [(4, True), (4, False), (300, True)])
def test_a_picture_holds_what_it_was_given(tmp_path: Path, classes: int, masked: bool) -> None:
    made, view, arrays = picture_of((16, 20), classes, masked)
    made.save(tmp_path / "x.jsonl", "rows")
    assert Picture.load(tmp_path / "x.jsonl", "other") is None
    held = Picture.load(tmp_path / "x.jsonl", "rows")
    assert held is not None
    assert (held.photo == arrays["photo"]).all()
    assert (held.label == arrays["label"]).all()
    assert held.target is not None
    assert (held.target == arrays["target"]).all()
    for one in held.views():
        assert (one.patched == view.patched).all()
        assert (one.attacked == view.attacked).all()
        assert one.mask is None if view.mask is None else one.mask is not None and (one.mask == view.mask).all()
    sprites = Sprites()
    shown = cell_picture(held, "none", sprites)
    assert shown is not None
    colours = decoded(next(s.data for s in sprites.held.values() if s.name == shown.after.sprites[0]))
    if classes < 256:  # a palette's picture says its classes, and its colours are those of the classes
        assert (colours == arrays["attacked"]).all()
        (tmp_path / "p.png").write_bytes(png(arrays["attacked"], held.colors))
        seen = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
        assert (seen == paint(arrays["attacked"], held.colors)).all()
    else:
        assert (colours == paint(arrays["attacked"], held.colors)).all()


def test_a_large_picture_is_shrunk_and_says_so() -> None:
    made, view, arrays = picture_of((20, 3 * LONGEST - 1), 4)
    assert max(made.photo.shape) <= LONGEST
    assert made.photo.shape[:2] == made.label.shape == made.view(0).clean.shape == (7, LONGEST)
    assert (made.label == arrays["label"][::3, ::3]).all()
    assert view.mask is not None
    assert (made.view(0).mask == view.mask[::3, ::3]).all()
    shown = cell_picture(made, "none", Sprites())
    assert shown is not None
    assert "Shown at 1/3 of its size" in shown.told


def test_changed_pixels_are_those_that_count() -> None:
    made, view, arrays = picture_of((16, 20), 4)
    counted = (arrays["label"] != 255) & ~np.asarray(view.mask)
    for region, counts in (("outside", counted), ("everywhere", arrays["label"] != 255)):
        sprites = Sprites()
        shown = cell_picture(made, "none", sprites, region=region)
        assert shown is not None
        drawn = decoded(next(s.data for s in sprites.held.values() if s.name == shown.layers[-1].sprites[0]))
        assert shown.layers[-1].title == "Changed pixels"
        changed = (arrays["clean"] != arrays["attacked"]) & counts
        assert ((drawn[..., 3] > 0) == changed).all()
        on_target = (drawn[..., 0] == 213) & (drawn[..., 3] > 0)
        assert (on_target == changed & (arrays["attacked"] == arrays["target"])).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_an_outline_is_every_edge_between_inside_and_outside(rows: list[list[bool]]) -> None:
    mask = np.array(rows)
    edges = set()
    for line, start, stop in re.findall(r"M(?:\d+) (\d+)()H(\d+)", outline(mask)):
        assert start == ""
        assert line
        assert stop
    for x, y, way, end in re.findall(r"M(\d+) (\d+)([HV])(\d+)", outline(mask)):
        first = int(x) if way == "H" else int(y)
        edges |= {(way, int(y if way == "H" else x), at) for at in range(first, int(end))}
    held = np.pad(mask, 1)
    expected = {
        ("H", r, c) for r in range(len(mask) + 1) for c in range(5) if held[r, c + 1] != held[r + 1, c + 1]
    } | {("V", c, r) for r in range(len(mask)) for c in range(6) if held[r + 1, c] != held[r + 1, c + 1]}
    assert edges == expected


def test_the_images_kept_are_the_worst_and_the_median_one(finished: Path) -> None:
    records = [r for r in Results.load(finished).records if (r.model, r.attack, r.defence) == ("m", "plain", "none")]
    assert len(records) == IMAGES
    ranked = sorted(records, key=lambda r: r.success)
    kept = chosen(records)
    assert (kept["worst"], kept["median"]) == (ranked[-1], ranked[IMAGES // 2])
    for which, record in kept.items():
        picture = Picture.load(finished / f"pictures/m/plain/{which}.jsonl")
        assert picture is not None
        assert picture.facts["image"] == record.image
        assert [told["defence"] for told in picture.facts["views"]] == ["none", "shifted"]
        assert picture.facts["views"][0]["success"] == pytest.approx(record.success)


def test_a_png_is_on_the_page_once(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    held = re.findall(r'href="data:image/png;base64,([^"]+)"', text)
    assert len(held) == len(set(held)) > 10
    names = set(re.findall(r'<image id="(p\d+)"', text))
    assert names == set(re.findall(r'<use href="#(p\d+)"', text))


# -------------------------------------------------------------------------------------------------------------- charts


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_ticks_are_round_few_and_hold_both_ends(one: float, two: float) -> None:
    low, high = sorted((one, two))
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert high - 1e-9 <= ticks[-1]
    steps = np.diff(ticks)
    assert 1 <= len(steps) <= 6
    assert np.allclose(steps, steps[0])
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-6


def test_a_curve_goes_where_its_numbers_say() -> None:
    data = [Datum(x, y, y - 0.05, y + 0.05) for x, y in ((100, 0.3), (1, 0.1), (10, 0.2))]
    chart = line_chart("t", "x", "y", [("a", Look.of(0, 0), data), ("nothing", Look.of(0, 1), [Datum(1, math.nan)])])
    marks = chart.lines[0].marks
    assert [m.x for m in marks] == sorted(m.x for m in marks)
    assert marks[1].x - marks[0].x == pytest.approx(marks[2].x - marks[1].x, abs=0.2), "logarithmic"
    assert [m.y for m in marks] == sorted((m.y for m in marks), reverse=True), "more is higher"
    place = {text: at for at, text in chart.y_ticks}
    assert marks[0].y == place["10"]
    assert marks[2].y == place["30"]
    assert all(m.low is not None and m.high is not None and m.high < m.y < m.low for m in marks)
    assert chart.lines[1].marks == []
    even = line_chart("t", "x", "y", [("a", Look.of(0, 0), [Datum(0, 0.1), Datum(5, 0.1), Datum(20, 0.1)])])
    x = [m.x for m in even.lines[0].marks]
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(0.25, abs=0.01), "linear, since there is a 0"
    (alone,) = scatter("t", "x", "y", [("a", Look.of(0, 0), [Datum(0.5, 0.5)])]).lines
    assert alone.path == ""
    assert len(alone.marks) == 1


def test_curves_and_the_sweep_are_drawn(run: Path) -> None:
    (run / "curves.csv").write_text(CURVES)
    (run / "tune.csv").write_text(TUNE)
    text = page_of(run)
    curves = text[text.index('id="curves"') : text.index('id="sweep"')]
    assert curves.count('<figure class="chart">') == 4, "two axes, two attacks"
    assert len(re.findall(r'd="M[^"]*" class="line" stroke-dasharray="[^"]*"/>\s*<g>', curves)) == 16
    line = r'<g class="(colour-\d)">\s*<path d="[^"]*" class="line" stroke-dasharray="([^"]*)"'
    looks = set(re.findall(line, curves))
    assert len(looks) == 4, "each model and defence has its own colour and dashes"
    assert "m, ram: 10.0 % fooled at 20" in curves
    sweep = text[text.index('id="sweep"') : text.index('id="classes"')]
    assert re.search(r"clamp, T = 3/N, p = 0\.1</td>.*?chosen, Pareto front", sweep, flags=re.S)
    (path,) = re.findall(r'<path d="(M[^"]*)" class="line" stroke-dasharray="[^"]*"/>\s*<g>', sweep.split("<figure")[1])
    assert path.count("L") == 2, "three settings on the front, the undefended model among them"


# ------------------------------------------------------------------------------------------------------------ several


def test_runs_that_differ_in_their_models_make_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)
    monkeypatch.setattr(report, "RESAMPLES", 20)
    from paged import Markup, noise, shifted
    from tiny import NB_CLASSES, SHAPE, linear_cnn

    from evaluation.experiment import evaluate
    from ramdefense.segmenter import PyTorchSegmenter

    for seed, name in enumerate(("one", "two")):
        model = PyTorchSegmenter(linear_cnn(seed=seed), NB_CLASSES, SHAPE)
        evaluate({name: model}, {"plain": noise}, {"shifted": shifted}, Markup(), images=2, out=tmp_path / name,
                 verbose=False)  # fmt: skip
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert len(dialogs(text)) == 4
    assert "Not finished" not in text
    assert all('class="wipe"' in cell for cell in dialogs(text))


def test_the_configuration_and_the_run_file_are_told(finished: Path) -> None:
    text = words((finished / "report.html").read_text())
    assert f"data: {SCRIPT}" in text
    held = json.loads((finished / "config.json").read_text())
    assert f"versions · torch {held['versions']['torch']}" in text
    assert "data · images [0, 1, 2, 3, 4]" in text
