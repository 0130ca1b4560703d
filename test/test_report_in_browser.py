"""The report of a plan in a real browser: nothing is asked for or fails, all fits, and zoom, hints and filter work."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from browsers import CHROMIUM, NO_BROWSER, ask_page
from test_html_report import chain_plan, chain_timeline, sharded_plan

from bactrian.driver.report import html_report
from bactrian.driver.report.html_report import render_report

IN_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)

LOOK = """
const style = (element, name) => getComputedStyle(element).getPropertyValue(name);
return {
  requests: performance.getEntriesByType("resource").length,
  overflow: document.documentElement.scrollWidth - innerWidth,
  page: style(document.body, "background-color"),
  controls: !document.querySelector(".zoom").hidden && !document.querySelector(".filter").hidden,
  numbers: document.querySelectorAll(".lane text.fits").length,
  lanes: [...document.querySelectorAll(".lane:not(.axis) svg")].map((svg) => Math.round(svg.getBoundingClientRect().width)),
};
"""

USE = """
const lanes = document.querySelector(".lanes"), scroller = document.querySelector(".scroller");
const width = () => Math.round(lanes.getBoundingClientRect().width / scroller.clientWidth);
const key = (name) => scroller.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
const zooms = [width()];
document.querySelector("[data-zoom=in]").click(); zooms.push(width());
key("+"); zooms.push(width());
document.querySelector("[data-zoom=out]").click(); zooms.push(width());
key("0"); zooms.push(width());
for (let i = 0; i < 20; i++) key("+");
zooms.push(width(), document.querySelector(".zoom output").textContent);
key("0");
const bar = document.querySelectorAll(".lane rect.backward")[1], tip = document.getElementById("tip");
const before = tip.hidden;
bar.dispatchEvent(new MouseEvent("mousemove", { bubbles: true, clientX: 100, clientY: 100 }));
const hint = tip.textContent;
lanes.dispatchEvent(new MouseEvent("mouseleave"));
const input = document.querySelector(".filter input");
input.value = "['W"; input.dispatchEvent(new Event("input"));
const rows = [...document.querySelectorAll("details.shardings tbody tr")];
return {
  zooms, hint, hidden: [before, tip.hidden],
  shown: rows.filter((row) => !row.hidden).map((row) => row.querySelector("code").textContent),
  told: document.querySelector(".filter output").textContent,
};
"""


def page() -> str:
    plan = sharded_plan()
    stages = tuple(dataclasses.replace(s, forward_flops=1, backward_flops=2) for s in plan.stages)
    return render_report(dataclasses.replace(plan, stages=stages), chain_timeline(chain_plan(2)), name="step")


@IN_BROWSER
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)])
def test_the_page_fits_its_window_and_asks_for_nothing(tmp_path: Path, width: int, dark: bool) -> None:
    found: Any = ask_page(page(), LOOK, tmp_path, width=width, dark=dark)
    assert found["requests"] == 0 and found["overflow"] <= 0 and found["controls"]
    red, green, blue = map(int, re.findall(r"\d+", found["page"]))
    assert (red + green + blue < 200) == dark
    assert len(set(found["lanes"])) == 1 and found["lanes"][0] > width / 2
    assert found["numbers"] == 12  # 8 forwards and backwards of stage 0, 4 of both at once of stage 1


@IN_BROWSER
def test_zoom_hint_and_filter(tmp_path: Path) -> None:
    found: Any = ask_page(page(), USE, tmp_path)
    assert found["zooms"] == [1, 2, 4, 2, 1, 256, "256 ×"]
    assert found["hint"] == "stage 0: backward of microbatch 1\n200 ms, from 700 ms to 900 ms"
    assert found["hidden"] == [True, True]
    assert found["shown"] == ["state['w']"] * 2 and found["told"] == "2 of 6"


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2): 1 to 21."""
    lower, higher = sorted((luminance(one), luminance(other)))
    return (higher + 0.05) / (lower + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_ground(scheme: str) -> None:
    css = (Path(html_report.__file__).parent / "templates" / "plan.css").read_text()
    light, dark = css.split("prefers-color-scheme: dark")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))
    for ground in ("page", "card", "wash", "warn"):
        for text in ("ink", "quiet", "accent"):
            assert contrast(colours[text], colours[ground]) >= 4.5, f"{text} on {ground}"
    for axis in range(4):
        assert contrast(colours[f"axis-{axis}"], colours["card"]) >= 4.5
    for bar in ("forward", "backward", "both", "update"):
        assert contrast(colours["on-bar"], colours[bar]) >= 4.5, bar
    for bar in ("forward", "backward", "both", "update", "setup", "talk"):
        assert contrast(colours[bar], colours["card"]) >= 3, bar
