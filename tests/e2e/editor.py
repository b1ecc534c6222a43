"""Label Studio's editor as an annotator uses it: mouse, keys and what is shown, by Playwright.

Spots are fractions of the image. Waits are for what the editor does: a request answered, a suggestion in its store, a
button. What it holds is read from its own store, `window.Htx`, where the page shows no more than a count.

Source: the page of Label Studio 1.23.2.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from playwright.sync_api import Page, Request, Response

from tests.e2e.masks import Spot

VIEWPORT = (1200, 800)
_ANSWER_MS = 30_000
_SAVE_MS = 30_000
_ASK = "/interactive-annotating"
_SELECT_AFTER_CREATE = "Select region after creating it"
_SUGGESTED = "[...(Htx.annotationStore.selected?.suggestions?.keys() ?? [])].map(id => id.split('#')[0]).sort()"
_REGIONS = """(Htx.annotationStore.selected?.regionStore.regions ?? [])
    .map(region => ({id: region.cleanId, type: region.type, labels: region.labels}))"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One interactive request of the editor and its answer."""

    request: dict[str, Any]
    answer: dict[str, Any]
    seconds: float

    @property
    def context(self) -> list[dict[str, Any]]:
        """The results that the request carries."""
        return list(self.request["context"]["result"])

    @property
    def clicks(self) -> list[dict[str, Any]]:
        """The keypoints of the request, the newest last."""
        return [item for item in self.context if item["type"] == "keypointlabels"]

    @property
    def spots(self) -> list[Spot]:
        """Where the clicks went by the request: the editor may place them a pixel beside where we aimed."""
        return [(item["value"]["x"] / 100, item["value"]["y"] / 100) for item in self.clicks]

    @property
    def results(self) -> list[dict[str, Any]]:
        """The results of the answer."""
        return list(self.answer["data"]["result"])

    def regions(self, kind: str) -> list[dict[str, Any]]:
        """Return the answer's results of one type."""
        return [result for result in self.results if result["type"] == kind]

    @property
    def level(self) -> str | None:
        """The level label on the answer's first region."""
        return next((result["value"]["labels"][0] for result in self.regions("labels")), None)


class Editor:
    """The quick view of one task, in one browser page."""

    def __init__(self, page: Page, url: str) -> None:
        """Use a page of a browser for the Label Studio at `url`."""
        self.page = page
        self._url = url
        self.asked = 0  # interactive requests sent so far
        page.on("request", self._count)

    def _count(self, request: Request) -> None:
        self.asked += _ASK in request.url

    def log_in(self, email: str, password: str) -> None:
        """Log in by the form."""
        self.page.goto(f"{self._url}/user/login/")
        self.page.fill("input[name=email]", email)
        self.page.fill("input[name=password]", password)
        self.page.click("button[type=submit]")
        self.page.wait_for_url(lambda url: "/user/login" not in url)

    def open_task(self, project: int, task: int) -> None:
        """Open a task and wait until its image is drawn."""
        self.page.goto(f"{self._url}/projects/{project}/data?task={task}")
        self.page.locator(".konvajs-content canvas").first.wait_for(timeout=60_000)
        self.page.locator(".lsf-label").first.wait_for()
        self.page.wait_for_function(
            "[...document.querySelectorAll('img')].some(i => i.src.includes('/data/') && i.complete && i.naturalWidth)"
        )
        self.page.wait_for_function("Htx.annotationStore.selected?.names.size > 0")

    def switch_on_auto_annotation(self) -> None:
        """Switch Auto-Annotation on, in the bottom bar."""
        toggle = self.page.get_by_test_id("bottombar-auto-annotation-toggle")
        if not toggle.is_checked():
            self.page.get_by_text("Auto-Annotation").click()
        self.page.locator(".lsf-toolbar__smart, .lsf-tool_smart").first.wait_for(state="attached")
        assert toggle.is_checked()

    def switch_on_select_after_create(self, shown: Callable[[], None] | None = None) -> None:
        """Switch 'Select region after creating it' on, in the editor's settings; `shown` is called while they show."""
        self.page.get_by_test_id("bottombar-settings-button").click()
        field = self.page.locator(".lsf-settings__field", has_text=_SELECT_AFTER_CREATE)
        if not field.locator("input").is_checked():
            field.click()
        assert field.locator("input").is_checked()
        if shown:
            shown()
        self.page.locator(".ant-modal-close").click()
        self.page.locator(".ant-modal").wait_for(state="hidden")

    def choose_tool(self, name: str) -> None:
        """Choose a smart tool: key-point-tool or rectangle-tool. Where there is only one, it has no menu."""
        main = self.page.locator(".lsf-toolbar .lsf-tool_smart:visible").first
        main.hover()
        entry = self.page.locator(f'.lsf-toolbar__smart [aria-label="{name}"]')
        (entry if entry.count() else main).click()
        self.page.locator(".lsf-tool_smart.lsf-tool_active").first.wait_for()

    def choose_label(self, text: str, nth: int = 0) -> None:
        """Choose a label; of several with the same text the `nth` in the order of the configuration."""
        label = self.page.locator(".lsf-label", has_text=text).nth(nth)
        label.click()
        label.and_(self.page.locator(".lsf-label_selected")).wait_for()

    def click(self, spot: Spot, *, negative: bool = False) -> None:
        """Click a spot of the image, with Alt held for a negative click."""
        x, y = self._at(spot)
        self.page.mouse.move(x - 3, y - 3)
        self.page.mouse.move(x, y)
        if negative:
            self.page.keyboard.down("Alt")
        self.page.mouse.down()
        self.page.mouse.up()
        if negative:
            self.page.keyboard.up("Alt")

    def drag(self, *spots: Spot) -> None:
        """Press the button at the first spot, move over the others and release it at the last."""
        self.page.mouse.move(*self._at(spots[0]))
        self.page.mouse.down()
        for spot in spots[1:]:
            self.page.mouse.move(*self._at(spot), steps=8)
        self.page.mouse.up()

    def draw_box(self, box: tuple[float, float, float, float]) -> None:
        """Draw a box with the rectangle tool: left, top, right, bottom."""
        left, top, right, bottom = box
        self.drag((left, top), (right, bottom))

    def press(self, key: str) -> None:
        """Press a key, such as the hotkey of a label."""
        self.page.keyboard.press(key)

    def type_phrase(self, phrase: str) -> None:
        """Type a phrase beside the selected click, and Enter."""
        field = self.page.locator("input[name=phrase]")
        field.fill(phrase)
        field.press("Enter")

    def answered(self, action: Callable[[], object]) -> Exchange:
        """Do `action`, wait for the answer to the request it causes and until the editor shows what was answered."""
        start = time.perf_counter()
        with self.page.expect_response(lambda response: _ASK in response.url, timeout=_ANSWER_MS) as caught:
            action()
        response = caught.value
        exchange = Exchange(
            request=json.loads(response.request.post_data or "{}"),
            answer=response.json(),
            seconds=time.perf_counter() - start,
        )
        assert not exchange.answer.get("errors"), exchange.answer["errors"]
        self._wait_for_suggestions({result["id"] for result in exchange.results})
        return exchange

    def suggestions(self) -> list[str]:
        """Return the ids of the suggestions shown."""
        return list(self.page.evaluate(_SUGGESTED))

    def _wait_for_suggestions(self, ids: Iterable[str]) -> None:
        self.page.wait_for_function(f"ids => JSON.stringify({_SUGGESTED}) === JSON.stringify(ids)", arg=sorted(ids))
        if count := len(set(ids)):
            self.page.get_by_text(f"{count} suggestions").wait_for()

    def accept(self) -> None:
        """Accept what is suggested."""
        ids = self.suggestions()
        self.page.get_by_test_id("bottombar-accept-suggestions-button").click()
        self._wait_for_suggestions(())
        self.page.wait_for_function(f"ids => ids.every(id => {_REGIONS}.some(region => region.id === id))", arg=ids)

    def reject(self) -> None:
        """Reject what is suggested."""
        self.page.get_by_test_id("bottombar-reject-suggestions-button").click()
        self._wait_for_suggestions(())

    def regions(self) -> list[dict[str, Any]]:
        """Return the annotation's regions: id, type, labels. Suggestions are not among them."""
        return list(self.page.evaluate(_REGIONS))

    def submit(self) -> dict[str, Any]:
        """Submit the annotation, wait until it can be updated, and return what Label Studio stored."""
        saved = self._saved("POST", "bottombar-submit-button")
        self.page.get_by_test_id("bottombar-update-button").wait_for()
        return saved

    def update(self) -> dict[str, Any]:
        """Update the annotation and return what Label Studio stored."""
        return self._saved("PATCH", "bottombar-update-button")

    def _saved(self, method: str, button: str) -> dict[str, Any]:
        def saves(response: Response) -> bool:
            return "/annotations" in response.url and response.request.method == method

        with self.page.expect_response(saves, timeout=_SAVE_MS) as caught:
            self.page.get_by_test_id(button).click()
        assert caught.value.ok, caught.value.status
        return dict(caught.value.json())

    def erase(self, region: int, *spots: Spot) -> None:
        """Select a region, by its place in the list, and drag the eraser over spots of it."""
        self.page.locator(".lsf-outliner-item__title").nth(region).click()
        self.page.locator(".lsf-toolbar [aria-label=eraser]:not(.lsf-tool_disabled)").click()
        self.page.locator(".lsf-toolbar [aria-label=eraser].lsf-tool_active").wait_for()
        self.drag(*spots)

    def screenshot(self) -> bytes:
        """Return the page as PNG."""
        return self.page.screenshot(animations="disabled")

    def _at(self, spot: Spot) -> tuple[float, float]:
        box = self.page.locator(".konvajs-content").first.bounding_box()
        assert box is not None, "the image is not shown"
        return box["x"] + spot[0] * box["width"], box["y"] + spot[1] * box["height"]
