"""The page in a real browser: sort, filter, open a cell, wipe; by mouse, by keyboard, on a phone, in print.

Needs Chromium (Debian's ``chromium``), which the tests do not install.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="the page is tested with playwright: pip install 'ramdefense[test]'")

from paged import ATTACKS, CURVES, MODELS, TUNE, VERDICTS, make_run
from playwright.sync_api import Browser, Page, sync_playwright

from evaluation import experiment, report
from evaluation.results import Results

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser found: apt-get install chromium")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-default-apps", "--disable-dev-shm-usage", "--disable-extensions", "--disable-sync", "--no-first-run",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a page that has every section, and names that are markup."""
    folder = tmp_path_factory.mktemp("page") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "save_figure", lambda *args, **kwargs: None)
        patch.setattr(report, "RESAMPLES", 50)
        make_run(folder)
    (folder / "curves.csv").write_text(CURVES)
    (folder / "tune.csv").write_text(TUNE)
    results = Results.load(folder)
    results.verdicts = VERDICTS
    path = folder / "report.html"
    path.write_text(report.page(results, [folder], resamples=50))
    return path.as_uri()


class Opened:
    """The page in a tab, with everything that it complained of or asked for."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.said, self.asked = page, [], []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))

        def judge(route: Any) -> None:
            if route.request.url.startswith(("file:", "data:")):
                route.continue_()
            else:
                self.asked.append(route.request.url)
                route.abort()

        page.route("**/*", judge)
        page.goto(address)

    def quiet(self) -> None:
        assert self.said == []
        assert self.asked == []


@pytest.fixture
def opened(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Opened]:
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1280, "height": 900}}))
    tab = Opened(context.new_page(), address)
    yield tab
    tab.quiet()
    context.close()


def column(page: Page, number: int) -> list[str]:
    cells = page.locator(f"#all-cells tbody tr:not([hidden]) > :nth-child({number})")
    return list(cells.evaluate_all("cells => cells.map(cell => cell.dataset.value)"))


def width(page: Page) -> tuple[int, int]:
    found = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    return int(found[0]), int(found[1])


def test_the_table_is_sorted_by_mouse_and_by_keyboard(opened: Opened) -> None:
    page = opened.page
    fooled = page.locator("#all-cells th", has_text="fooled").first
    numbers = sorted((float(v) for v in column(page, 4) if v), reverse=True)
    assert numbers
    missing = [""] * (len(column(page, 4)) - len(numbers))
    assert missing, "a defence that does not apply"
    fooled.get_by_role("button").click()
    assert fooled.get_attribute("aria-sort") == "descending"
    assert column(page, 4) == [*map(str, numbers), *missing]
    page.keyboard.press("Enter")
    assert fooled.get_attribute("aria-sort") == "ascending"
    assert column(page, 4) == [*map(str, reversed(numbers)), *missing], "what has no number stays last"
    attack = page.locator("#all-cells th", has_text="attack").first
    attack.get_by_role("button").focus()
    page.keyboard.press("Space")
    assert attack.get_attribute("aria-sort") == "ascending"
    assert fooled.get_attribute("aria-sort") is None
    assert column(page, 2) == sorted(column(page, 2), key=str.lower)


def test_the_table_is_filtered_by_words_and_by_choice(opened: Opened) -> None:
    page = opened.page
    count = page.locator("[data-count]")
    assert count.inner_text() == "12 cells"
    page.get_by_label("Find").fill("SHIFTED aimed")
    assert count.inner_text() == "2 of 12 cells"
    assert set(column(page, 2)) == {ATTACKS[1]}
    page.get_by_label("Find").fill("more steps")
    assert count.inner_text() == "1 of 12 cells", "by a failed check, too"
    page.get_by_label("Find").fill("")
    page.locator("select[data-axis=model]").select_option(MODELS[1])
    assert count.inner_text() == "6 of 12 cells"
    assert set(column(page, 1)) == {MODELS[1]}
    page.locator("select[data-axis=attack]").select_option(ATTACKS[0])
    page.locator("select[data-axis=defence]").select_option("none")
    assert count.inner_text() == "1 of 12 cells"
    page.get_by_label("Find").fill("nothing like it")
    assert count.inner_text() == "0 of 12 cells"


def test_a_cell_is_opened_and_closed_by_mouse(opened: Opened) -> None:
    page = opened.page
    page.locator("table.heat td.tile button").nth(3).click()
    dialog = page.locator("dialog[open]")
    assert dialog.count() == 1
    assert dialog.locator("h2").inner_text().endswith(f"{MODELS[0]} · {ATTACKS[1]} · shifted")
    titles = ["Image", "Image under attack", "Ground truth", "What the attacker wants", "Prediction without attack",
              "Prediction under attack", "Changed pixels"]  # fmt: skip
    shown = dialog.locator(".picture").first.locator("figure:not(.wipe) figcaption")
    assert shown.all_inner_texts() == titles
    drawn = dialog.locator("svg").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert min(drawn) > 100
    dialog.get_by_role("button", name="Next cell").click()
    assert page.locator("dialog[open]").count() == 1
    assert page.locator("dialog[open]").get_attribute("id") != "cell-3"
    page.locator("dialog[open]").get_by_role("button", name="Close").click()
    assert page.locator("dialog[open]").count() == 0


def test_all_of_it_goes_by_keyboard_alone(opened: Opened) -> None:
    page = opened.page
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("Boolean(document.activeElement.closest('table.heat td'))"):
            break
    name = "document.activeElement.getAttribute('aria-label')"
    first = page.evaluate(name)
    assert first.startswith(f"{MODELS[0]} · {ATTACKS[0]} · none: ")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(name).startswith(f"{MODELS[0]} · {ATTACKS[1]} · shifted: ")
    assert page.evaluate(name).endswith("unreliable")
    page.keyboard.press("ArrowRight")
    assert ATTACKS[1] in page.evaluate(name), "the edge"
    page.keyboard.press("Enter")
    assert page.locator("dialog[open]").count() == 1
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('[data-wipe]')"):
            break
    wiped = "getComputedStyle(document.activeElement.closest('.wipe').querySelector('.over')).clipPath"
    before = page.evaluate(wiped)
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    assert page.evaluate(wiped) != before
    assert page.evaluate(wiped) == "inset(0px 0px 0px 30%)"
    assert page.evaluate("document.activeElement.getAttribute('aria-valuetext')") == "30 % no defence, 70 % shifted"
    page.keyboard.press("End")
    assert page.evaluate(wiped) == "inset(0px 0px 0px 100%)"
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert ATTACKS[1] in page.evaluate(name), "back where one was"


def test_the_wipe_shows_one_prediction_or_the_other(opened: Opened) -> None:
    page = opened.page
    page.locator("table.heat td.tile button").nth(3).click()
    stack, slider = page.locator("dialog[open] .stack").first, page.locator("dialog[open] [data-wipe]").first
    seen = []
    for value in ("0", "100"):
        slider.fill(value)
        seen.append(stack.screenshot())
    assert seen[0] != seen[1]
    box = slider.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    assert 20 <= int(slider.input_value()) <= 30


@pytest.mark.parametrize("opened", [{"color_scheme": scheme} for scheme in ("light", "dark")], indirect=True)
def test_light_and_dark_are_both_easy_to_read(opened: Opened) -> None:
    page = opened.page
    ground, text, quiet, bad, link = (
        page.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}")
        for where, what in (
            ("body", "backgroundColor"), ("body", "color"), ("#all-cells .interval", "color"),
            (".notice.bad h2", "color"), ("nav a", "color"),
        )
    )  # fmt: skip

    def rgb(colour: str) -> tuple[int, ...]:
        return tuple(int(part) for part in colour[4:-1].split(","))

    from evaluation.heat_map import contrast, luminance

    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (luminance(rgb(ground)) < 0.1) == dark
    assert all(contrast(rgb(ground), rgb(colour)) >= 4.5 for colour in (text, quiet, bad, link))
    for series in range(6):
        colour = page.evaluate(f"getComputedStyle(document.body).getPropertyValue('--line-{series}')").strip()
        line = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert contrast(rgb(ground), line) >= 3, "WCAG's least for what is drawn"


@pytest.mark.parametrize(
    "opened", [{"viewport": {"width": 375, "height": 812}, "has_touch": True, "is_mobile": True}], indirect=True
)
def test_on_a_phone_nothing_sticks_out(opened: Opened) -> None:
    page = opened.page
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
    scroll, inner = width(page)
    assert scroll <= inner == 375
    page.locator("table.heat td.tile button").nth(3).tap()
    box = page.evaluate("(d => [d.scrollWidth, d.clientWidth])(document.querySelector('dialog[open]'))")
    assert box[0] <= box[1] <= 375
    wide = page.evaluate(
        "[...document.querySelectorAll('main table')].every(t => t.getBoundingClientRect().width <= innerWidth"
        " || t.closest('.scroll'))"
    )
    assert wide, "a wide table has a box of its own to scroll in"


def test_print_shows_every_image_and_no_control(opened: Opened) -> None:
    page = opened.page
    assert page.locator("dialog .picture svg").first.is_hidden()
    page.emulate_media(media="print")
    for where in ("dialog .picture svg", "dialog .figures", "details table", "#heat-map table"):
        assert all(found.is_visible() for found in page.locator(where).all()[:12]), where
    for where in ("nav", "form", "[data-wipe]", "[data-close]"):
        assert all(found.is_hidden() for found in page.locator(where).all()[:12]), where
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("opened", [{"reduced_motion": "reduce"}], indirect=True)
def test_nothing_moves_for_who_wants_no_motion(opened: Opened) -> None:
    page = opened.page
    page.locator("table.heat td.tile button").first.click()
    assert page.evaluate("getComputedStyle(document.querySelector('dialog[open]')).animationName") == "none"
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_a_folder_of_the_page_alone_is_enough(browser: Browser, address: str, tmp_path: Path) -> None:
    from urllib.parse import unquote, urlsplit

    alone = tmp_path / "elsewhere.html"
    alone.write_bytes(Path(unquote(urlsplit(address).path)).read_bytes())
    context = browser.new_context(java_script_enabled=False)
    tab = Opened(context.new_page(), alone.as_uri())
    assert tab.page.locator("dialog .picture svg").first.is_visible(), "without a script, too"
    tab.quiet()
    context.close()
