"""The page in a real browser: what a person sees, and what happens when they click."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chromium_rig import Chromium
from tests.report_rig import attach_fault_detach
from viommu.lab.recording import ConsoleLine
from viommu.report import Run
from viommu.report.html import page
from viommu.report.timeline import build, read_trace

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=http://a.test/x onerror=alert(1)>"
)
FINDING = {
    "severity": "violation",
    "rule": "missing-tlbi",
    "text": "<b>the TLB</b> still has it",
    "command": "CMD_TLBI_NH_VA",
}
DOMAIN = "report.items.find(item => item.kind == 'domain')"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def opened(browser: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Chromium:
    home = tmp_path_factory.mktemp("report")
    trace = home / "trace.jsonl"
    attach_fault_detach(trace)
    events = list(read_trace(trace))
    (record,) = [event["seq"] for event in events if event["kind"] == "EventRecorded"]
    finding = {**FINDING, "stream_id": 16, "evidence": [record]}
    run = Run(
        f"title {HOSTILE}",
        {"kernel": f"6.12 {HOSTILE}"},
        status=0,
        ledger={"verdict": "violated", "findings": [finding], "streams": []},
        console=(
            ConsoleLine(f"{HOSTILE} \x1b[31mred\x1b[0m \u2028", 0.0),
            ConsoleLine("the last line", events[-1]["time"]),
        ),
    )
    path = home / "report.html"
    path.write_text(page(run, build(events, evidence=run.evidence)), encoding="utf-8")
    browser.open(path)
    return browser


@pytest.fixture(autouse=True)
def no_harm(opened: Chromium) -> Iterator[None]:
    opened.run("report.select(null); report.view.all(); scrollTo(0, 0)")
    opened.settle()
    yield
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith("file:///")] == []
    assert len(opened.requests) == 1


def middle_of(browser: Chromium, item: str) -> tuple[float, float]:
    """Where an item is in the window."""
    x, y = browser.run(f"""(() => {{
        const item = {item}, view = report.view, box = view.canvases.lanes.getBoundingClientRect();
        const row = view.rows.find(each => each.lane === item.lane);
        const [left, top, width, height] = view.shape(item, row.top - view.scroll.scrollTop);
        return [box.left + left + width / 2, box.top + top + height / 2];
    }})()""")
    return x, y


def colours(browser: Chromium) -> int:
    """How many different colours the time line is drawn in."""
    count = browser.run("""(() => {
        const { width, height } = report.view.canvases.lanes;
        const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
        copy.drawImage(report.view.canvases.lanes, 0, 0);
        const data = new Uint32Array(copy.getImageData(0, 0, width, height).data.buffer);
        return new Set(data).size;
    })()""")
    return int(count)


def text(browser: Chromium, selector: str) -> str:
    found: str = browser.run(f"document.querySelector({json.dumps(selector)}).innerText")
    return found


def test_the_time_line_is_drawn(opened: Chromium) -> None:
    assert opened.run("report.view.painted") > 0
    assert colours(opened) > 10
    labels = text(opened, "#labels").split("\n")
    assert labels[:4] == ["stream 0x10", "Domain", "DMA", "Faults"]


def test_a_click_shows_the_events_and_what_belongs_to_them(opened: Chromium) -> None:
    opened.run("document.getElementById('scroll').scrollIntoView()")
    opened.click(*middle_of(opened, DOMAIN))
    detail = text(opened, "#detail")
    assert "s1 translate, ASID 7" in detail
    assert "StructureFetched" in detail
    assert "s1_context_ptr" in detail
    kinds = opened.run("[...report.related].map(item => item.kind)")
    assert {"command", "sync", "tables"} <= set(kinds)


def test_a_click_beside_everything_lets_go(opened: Chromium) -> None:
    opened.run(f"report.select({DOMAIN}); document.getElementById('scroll').scrollIntoView()")
    x, y = middle_of(opened, DOMAIN)
    opened.click(x, y - 20)  # the head of the group
    assert "Choose an item" in text(opened, "#detail")


def test_a_finding_leads_to_its_evidence(opened: Chromium) -> None:
    assert "Ledger: violated" in opened.run("document.getElementById('ledger-title').textContent")
    assert "<b>the TLB</b>" in text(opened, "#findings")
    opened.run("document.querySelector('#findings .link').click()")
    opened.settle()
    assert "record F_TRANSLATION" in text(opened, "#detail")


def test_a_record_is_decoded_in_the_table(opened: Chromium) -> None:
    row = text(opened, "#records tbody tr")
    for word in ("F_TRANSLATION", "0x10", "address=0x11000"):
        assert word in row


def test_the_keys_go_from_item_to_item(opened: Chromium) -> None:
    opened.run("document.getElementById('lanes').focus()")
    opened.key("ArrowRight")
    first = opened.run("report.items.indexOf(report.selected)")
    opened.key("ArrowDown")
    assert opened.run("report.items.indexOf(report.selected)") != first
    before = opened.run("report.view.to - report.view.from")
    opened.key("Enter")
    assert opened.run("report.view.to - report.view.from") < before
    opened.key("Escape")
    assert opened.run("report.selected") is None


def test_zoom_keeps_the_middle_and_all_is_all(opened: Chromium) -> None:
    middle = "(report.view.from + report.view.to) / 2"
    before = opened.run(middle)
    opened.run("document.getElementById('zoom-in').click()")
    assert opened.run(middle) == pytest.approx(before)
    assert opened.run("report.view.to - report.view.from < report.view.scale.length")
    opened.run("document.getElementById('zoom-all').click()")
    assert opened.run("report.view.to - report.view.from") == pytest.approx(
        opened.run("report.view.scale.length")
    )


def test_a_kind_can_be_hidden_and_a_search_counts(opened: Chromium) -> None:
    chip = "[...document.querySelectorAll('#kinds .chip')].find(chip => chip.textContent.startsWith('sync'))"
    opened.run(f"{chip}.click()")
    assert "CMD_SYNC" not in text(opened, "#labels")
    opened.run(f"{chip}.click()")
    assert "CMD_SYNC" in text(opened, "#labels")
    search = "document.getElementById('search')"
    opened.run(f"{search}.value = 'F_TRANSLATION'; {search}.dispatchEvent(new Event('input'))")
    # The fault, its record and the DMA, which names it in its reason.
    assert text(opened, "#found").startswith("3 found")
    opened.run(f"{search}.value = ''; {search}.dispatchEvent(new Event('input'))")


def test_the_console_is_text_and_follows_the_time_line(opened: Chromium) -> None:
    first = opened.run("document.querySelector('#console .line span').textContent")
    assert first == f"{HOSTILE} red \u2028"
    opened.run("report.select(report.items.findLast(item => item.kind == 'dma'))")
    assert (
        opened.run("document.querySelector('#console .near span').textContent") == "the last line"
    )


def test_nothing_of_the_guest_is_taken_for_markup(opened: Chromium) -> None:
    assert opened.run("document.title") == f"title {HOSTILE}"
    assert opened.run("document.images.length") == 0
    assert opened.run("document.scripts.length") == 2


def test_dark_is_drawn_dark(opened: Chromium) -> None:
    def paper() -> Any:
        return opened.run("getComputedStyle(document.body).backgroundColor")

    light, painted = paper(), opened.run("report.view.painted")
    opened.scheme(dark=True)
    opened.settle()
    assert paper() != light
    assert opened.run("report.view.painted") > painted
    assert colours(opened) > 10
    opened.scheme(dark=False)
