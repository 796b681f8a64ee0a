"""The page of the control plane in a browser: what it shows, what it sends, and that it runs nobody else's words."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import ml_dtypes
import numpy as np
import pytest
from rawpeer import WAIT_S, until

import ensemble
import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, TensorSpec
from remote_ops.errors import InvalidRequest, RemoteOpsError, SignatureError
from server_ref import Access, ControlPlane
from server_ref.page import page, picture_of
from server_ref.tryit import MAX_BYTES, array_of, summed_up

pytest.importorskip("uvicorn")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
EVIL = "<img src=x onerror=document.title='got in'>"
ADMIN = "admin-token-0123456789"
X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
PIXELS, SHARES = TensorSpec("pixels", "uint8", (-1, 3, -1, -1)), TensorSpec("shares", "float32", (-1, 3))
GRAPH = """
ensemble: 1
name: sum
inputs: {x: {dtype: float32, shape: [N, 2]}}
outputs: {y: twice.y}
nodes:
  once: {kind: python, call: "steps:once", inputs: {x: $inputs.x}, outputs: {y: {dtype: float32, shape: [N, 2]}}}
  twice: {kind: python, call: "steps:twice", inputs: {x: once.y}, outputs: {y: {dtype: float32, shape: [N, 2]}}}
"""
STEPS = "def once(x):\n    return {'y': x + 1}\n\ndef twice(x):\n    return {'y': 2 * x}\n"


def doubling(name: str = "double") -> FunctionServable:
    return FunctionServable(lambda x: 2 * x, [X], [Y], name=name, version="7")


def models(folder: Path) -> dict[str, Any]:
    """What the tests look at: a function, one of pictures, a graph, and one whose every word is markup."""
    (folder / "steps.py").write_text(STEPS)
    (folder / "sum.yaml").write_text(GRAPH)
    pictures = FunctionServable(
        lambda pixels: (pixels.mean((2, 3)) / 255).astype(np.float32), [PIXELS], [SHARES], name="pictures"
    )

    def refuse(**values: Any) -> Any:
        raise InvalidRequest(f"no {EVIL} here")

    evil = FunctionServable(
        refuse, [TensorSpec(EVIL, "float32", (-1,), EVIL)], [TensorSpec("y", "float32", (-1,))], name=EVIL, version=EVIL
    )
    return {"double": doubling(), "pictures": pictures, "sum": ensemble.load(str(folder / "sum.yaml")), EVIL: evil}


@contextlib.contextmanager
def controlled(served: Any, listen: str = "127.0.0.1:0", **options: Any) -> Iterator[tuple[str, str]]:
    """A server with a control plane: the URL of each."""
    access = options.pop("access", None)
    plane = ControlPlane(listen, **options)
    with server_ref.running(served, access=access, control=plane) as url:
        yield url, plane.url


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    with controlled(models(tmp_path_factory.mktemp("models"))) as urls:
        yield urls


def ask(
    url: str, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Mapping[str, str], bytes]:
    parts = urlsplit(url)
    assert parts.hostname
    with contextlib.closing(HTTPConnection(parts.hostname, parts.port, timeout=WAIT_S)) as connection:
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, sent, dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def tried(url: str, model: str, version: str, body: Any, **headers: str) -> tuple[int, Any]:
    path = f"/api/models/{quote(model, safe='')}/versions/{quote(version, safe='')}/infer"
    status, _, answer = ask(url, "POST", path, body, headers)
    return status, json.loads(answer)


def counters_of(url: str, model: str) -> Any:
    return json.loads(ask(url, "GET", f"/api/models/{model}")[2])["versions"][0]["counters"]


# --------------------------------------------------------------------------- the file and its routes


def test_the_page_is_one_file_whose_policy_lets_it_run_its_own_script_only(both: tuple[str, str]) -> None:
    status, headers, body = ask(both[1], "GET", "/")
    text = body.decode()
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall(r"'sha256-[\w+/]{43}='", policy)) == 2
    assert not re.search(r"""\s(?:on\w+|style)\s*=\s*["']""", re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.S))
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:,|#)""", text)
    assert "innerHTML" not in text
    assert text.count("<script>") == text.count("<style>") == 1
    assert len(body) < 80_000


def test_the_page_is_sent_once_to_a_browser_that_has_it(both: tuple[str, str]) -> None:
    tag = page().headers["ETag"]
    status, _, body = ask(both[1], "GET", "/", headers={"If-None-Match": tag})
    assert (status, body) == (304, b"")


def test_a_picture_of_a_graph_has_shapes_of_three_kinds_and_a_place_for_the_time_of_each_node(
    both: tuple[str, str],
) -> None:
    status, _, body = ask(both[1], "GET", "/api/graph/sum/picture")
    told = json.loads(body)
    assert status == 200
    assert {shape[0] for shape in told["shapes"]} == {"rect", "path", "text"}
    assert [shape[3] for shape in told["shapes"] if len(shape) > 3] == ["once", "twice"]
    assert not any("__" in shape[2] for shape in told["shapes"])
    status, _, body = ask(both[1], "GET", "/api/graph/double/picture")
    assert (status, json.loads(body)["kind"]) == (400, "InvalidRequest")


def test_words_in_a_graph_are_text_of_its_picture_and_no_marks() -> None:
    from ensemble.diagram import Box, Diagram

    told = picture_of(Diagram((Box("a", "python", EVIL, ("f00d0000_______________",)),)))
    texts = [shape for shape in told["shapes"] if shape[0] == "text"]
    assert [shape[2] for shape in texts[:2]] == [EVIL, "python"]
    assert [shape[3] for shape in texts if len(shape) > 3] == ["a"]


# --------------------------------------------------------------------------- trying


def test_a_model_is_tried_with_json_and_its_answer_summed_up(both: tuple[str, str]) -> None:
    status, told = tried(both[1], "double", "7", {"inputs": {"x": [[1, 2], [3, -4.5]]}})
    assert status == 200
    assert told["version"] == "7"
    y = told["outputs"]["y"]
    assert (y["dtype"], y["shape"], y["first"]) == ("float32", [2, 2], [2, 4, 6, -9])
    assert (y["min"], y["max"], y["mean"]) == (-9, 6, 0.75)
    assert y["best"] == [{"at": 1, "value": 4}, {"at": 0, "value": 2}]


def test_a_version_without_a_name_and_a_graph_can_be_tried(both: tuple[str, str]) -> None:
    status, told = tried(both[1], "pictures", "", {"inputs": {"pixels": {"fill": "zeros", "shape": [2, 3, 4, 4]}}})
    assert (status, told["outputs"]["shares"]["first"]) == (200, [0] * 6)
    version = json.loads(ask(both[1], "GET", "/api/models/sum")[2])["versions"][0]["version"]
    status, told = tried(both[1], "sum", version, {"inputs": {"x": [[1, 2]]}})
    assert (status, told["outputs"]["y"]["first"]) == (200, [4, 6])


@pytest.mark.parametrize(
    ("model", "version", "body", "status", "words"),
    [
        ("double", "7", b"nonsense", 400, "expected JSON"),
        ("double", "7", [1], 400, 'expected {"inputs"'),
        ("double", "7", {"inputs": {"x": [1, 2, 3]}}, 400, "expected float32 [-1, 2], got float32 [3]"),
        ("double", "7", {"inputs": {"z": [[1, 2]]}}, 400, "no input 'z'"),
        ("double", "7", {"inputs": {"x": [[1, 2]]}, "outputs": ["no"]}, 400, "no output 'no'"),
        ("double", "8", {"inputs": {}}, 404, "no version '8'"),
        ("treble", "7", {"inputs": {}}, 404, "no model '/treble'"),
        (EVIL, EVIL, {"inputs": {EVIL: [1]}}, 400, "no <img"),
        ("double", "7", b" " * (MAX_BYTES + 1), 400, "at most 16 MiB"),
        ("double", "7", {"inputs": {"x": {"fill": "zeros", "shape": [1 << 22, 2]}}}, 400, "at most 16 MiB"),
        ("double", "7", {"inputs": {"x": {"fill": "zeros", "shape": [0, *[1 << 24] * 3]}}}, 400, "expected float32"),
        ("double", "7", b'{"inputs":{"x":' + b"[" * 900 + b"]" * 900 + b"}}", 400, "expected"),
        ("double", "7", b"[" * 100_000, 400, "expected JSON"),
    ],
)
def test_what_cannot_be_tried_is_refused_with_the_reason(
    both: tuple[str, str], model: str, version: str, body: Any, status: int, words: str
) -> None:
    found, told = tried(both[1], model, version, body)
    assert found == status
    assert words in told["error"]


def test_trying_counts_as_a_request(both: tuple[str, str]) -> None:
    before = counters_of(both[1], "double")
    tried(both[1], "double", "7", {"inputs": {"x": [[1, 2]]}})
    tried(both[1], "double", "7", {"inputs": {"x": [1]}})
    after = counters_of(both[1], "double")
    assert after["success"] - before["success"] == 1
    assert after["failures"]["invalid"] - before["failures"]["invalid"] == 1


def test_trying_wants_the_admin_token_where_there_is_one_and_never_comes_from_another_site() -> None:
    body = {"inputs": {"x": [[1, 2]]}}
    with controlled({"double": doubling()}, access=Access(admin=[ADMIN])) as (_, url):
        assert tried(url, "double", "7", body)[0] == 401
        assert tried(url, "double", "7", body, Authorization=f"Bearer {ADMIN}")[0] == 200
        elsewhere = {"Authorization": f"Bearer {ADMIN}", "Origin": "http://elsewhere.example"}
        assert tried(url, "double", "7", body, **elsewhere)[0] == 403


def test_a_fifth_call_at_once_is_refused() -> None:
    let_go = threading.Event()

    def slow(x: Any) -> Any:
        assert let_go.wait(WAIT_S)
        return x

    slow_model = FunctionServable(slow, [X], [Y], name="slow", version="1")
    statuses: list[int] = []
    body = {"inputs": {"x": [[1, 2]]}}
    with controlled({"slow": slow_model}) as (_, url):
        callers = [threading.Thread(target=lambda: statuses.append(tried(url, "slow", "1", body)[0])) for _ in range(4)]
        for caller in callers:
            caller.start()
        until(lambda: counters_of(url, "slow")["pending"] == 4)
        status, told = tried(url, "slow", "1", body)
        let_go.set()
        for caller in callers:
            caller.join()
    assert (status, told["kind"], statuses) == (429, "Overloaded", [200] * 4)


@pytest.mark.parametrize(
    ("spec", "value", "expected"),
    [
        (TensorSpec("x", "float32", (-1,)), [1, "NaN", "-Infinity"], np.array([1, np.nan, -np.inf], np.float32)),
        (TensorSpec("x", "int64", ()), 7, np.array(7)),
        (TensorSpec("x", "int16", (2, 2)), {"data": [1, 2, 3, 4], "shape": [2, 2]}, np.array([[1, 2], [3, 4]], "i2")),
        (TensorSpec("x", "float32", (0, 3)), {"data": [], "shape": [0, 3]}, np.zeros((0, 3), np.float32)),
        (TensorSpec("x", "uint8", (-1,)), {"base64": "AQL/", "shape": [3]}, np.array([1, 2, 255], np.uint8)),
        (TensorSpec("x", "float32", (1,)), {"base64": "AADAPw==", "shape": [1]}, np.array([1.5], np.float32)),
        (TensorSpec("x", "bool", (2,)), [True, False], np.array([True, False])),
        (TensorSpec("x", "bool", (2,)), {"fill": "zeros", "shape": [2]}, np.zeros(2, bool)),
        (TensorSpec("x", "string", (-1,)), ["a", "é"], np.array(["a", "é"], object)),
    ],
)
def test_values_become_the_array_that_the_input_wants(spec: TensorSpec, value: Any, expected: Any) -> None:
    array = array_of(spec, value)
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8", "uint64", "bool", "string"])
def test_an_input_of_any_dtype_can_be_filled_at_random(dtype: str) -> None:
    spec = TensorSpec("x", dtype, (-1, 3))
    assert array_of(spec, {"fill": "random", "shape": [4, 3]}).shape == (4, 3)
    assert array_of(spec, {"fill": "zeros", "shape": [0, 3]}).shape == (0, 3)


@pytest.mark.parametrize(
    "value",
    [
        1.5, [1.5], "NaN", {"shape": [1]}, {"data": [1], "shape": [2]}, {"data": [1]}, {"data": [1], "shape": [-1]},
        {"data": [1], "shape": [True]}, {"base64": "A", "shape": [1]}, {"base64": "AA==", "shape": [1]},
        {"base64": 7, "shape": [1]}, {"fill": "noise", "shape": [1]}, {"data": {}, "shape": [1]}, None, [None],
    ],
)  # fmt: skip
def test_values_that_are_no_such_array_are_refused(value: Any) -> None:
    with pytest.raises((InvalidRequest, SignatureError)):
        array_of(TensorSpec("x", "int32", (1,)), value)


def test_what_json_or_a_browser_cannot_hold_is_told_as_text() -> None:
    assert summed_up(np.array([np.nan, np.inf, -np.inf]))["first"] == ["NaN", "Infinity", "-Infinity"]
    assert summed_up(np.array([np.inf, -np.inf]))["mean"] == "NaN"
    assert summed_up(np.array([1.5], ml_dtypes.bfloat16))["first"] == [1.5]
    assert summed_up(np.array([2**60]))["first"] == [str(2**60)]
    assert summed_up(np.array([b"\xff", "a", None], object)[:2])["first"] == ["\ufffd", "a"]
    told = summed_up(np.zeros((3, 1000), np.float32))
    assert (told["size"], len(told["first"]), len(told["best"])) == (3000, 256, 5)
    assert "best" not in summed_up(np.zeros((0, 3)))
    assert "best" not in summed_up(np.zeros((2, 3, 4)))
    assert summed_up(np.array(True))["first"] == [True]


# --------------------------------------------------------------------------- in a browser


class Watch:
    """What a page asked for, and what it complained of."""

    def __init__(self, tab: Any) -> None:
        self.asked: list[str] = []
        self.complaints: list[str] = []
        tab.on("request", lambda request: self.asked.append(request.url))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield launched
        launched.close()


@contextlib.contextmanager
def tab(browser: Any, url: str, **options: Any) -> Iterator[tuple[Any, Watch]]:
    """The page, in a profile of its own, asking ten times a second."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(1000 * WAIT_S)
    opened = context.new_page()
    watch = Watch(opened)
    try:
        opened.goto(f"{url}?every=0.1")
        yield opened, watch
    finally:
        context.close()


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect as expected

    return expected(locator)


def card(page: Any, model: str) -> Any:
    return page.get_by_role("article", name=f"model {model}", exact=True)


def cross(tab: Any, keys: Sequence[str]) -> None:
    for key in keys:
        tab.keyboard.press(key)


@pytest.mark.slow
def test_the_page_shows_models_numbers_graphs_and_errors_and_asks_nobody_else(
    browser: Any, both: tuple[str, str]
) -> None:
    url, control = both
    with tab(browser, control) as (page, watch):
        expect(card(page, "double")).to_contain_text("x: float32 [?, 2]")
        expect(card(page, "double").locator(".pill")).to_have_text("ready")
        expect(page.locator("#state")).to_have_text("Ready")
        height = card(page, "double").bounding_box()["height"]
        double, both_steps = Endpoint(f"{url}double"), Endpoint(f"{url}sum")
        for _ in range(20):
            double([[1, 2]])
            both_steps([[1, 2]])
        expect(card(page, "double").locator(".legend .p99 dd")).to_have_text(re.compile(r"^[\d.]+ ms$"))
        expect(card(page, "double").locator(".chart polyline.p99")).to_have_count(1)
        expect(card(page, "sum").locator("svg .took")).to_have_text([re.compile(r"^[\d.,]+ ms, \d+ calls?$")] * 2)
        assert card(page, "double").bounding_box()["height"] == height  # numbers come without a jump
        assert ask(url, "POST", "/double", b"nonsense")[0] == 400
        expect(page.locator("#errors li").first).to_contain_text("DecodeError")
        assert watch.complaints == []
        assert {urlsplit(asked).netloc for asked in watch.asked if not asked.startswith("data:")} == {
            urlsplit(control).netloc
        }


@pytest.mark.slow
def test_a_model_is_tried_with_the_keyboard_alone(browser: Any, both: tuple[str, str]) -> None:
    with tab(browser, both[1]) as (page, watch):
        button = page.get_by_role("button", name="Try it double v7")
        button.focus()
        cross(page, ["Enter"])
        field = page.get_by_label("x as JSON")
        expect(field).to_be_focused()
        expect(field).to_have_value("[[0,0]]")
        cross(page, ["Control+a"])
        page.keyboard.type("[[1.5, -2]]")
        cross(page, ["Control+Enter"])
        expect(page.locator("dialog .answer pre")).to_have_text("[3, -4]")
        expect(page.locator("dialog .best li").first).to_contain_text("#03")
        field.fill("[[1]]")
        cross(page, ["Control+Enter"])
        expect(page.locator("dialog .answer .why")).to_contain_text("expected float32 [-1, 2], got float32 [1, 1]")
        field.fill("[1,")
        cross(page, ["Control+Enter"])
        expect(page.locator("dialog .answer .why")).to_contain_text("expected JSON")
        cross(page, ["Escape"])
        expect(page.locator("#trying")).to_be_hidden()
        expect(button).to_be_focused()
        outlined = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outlined == "solid"
        assert not [said for said in watch.complaints if "400" not in said]  # a refusal is an answer


@pytest.mark.slow
def test_a_picture_is_resized_and_sent_with_its_colours_in_order(
    browser: Any, both: tuple[str, str], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 20), (255, 51, 0)).save(tmp_path / "orange.png")
    with tab(browser, both[1]) as (page, _):
        page.get_by_role("button", name="Try it pictures").click()
        axes = page.locator("dialog input[type=number]")
        page.get_by_label("picture for pixels").set_input_files(tmp_path / "orange.png")
        expect(page.locator("dialog .note", has_text="Sent as it is, 40 x 20")).to_be_visible()
        axes.nth(1).fill("6")
        axes.nth(2).fill("8")
        expect(page.locator("dialog .note", has_text="Resized to 8 x 6")).to_be_visible()
        page.get_by_role("button", name="Send").click()
        expect(page.locator("dialog .answer pre")).to_have_text("[1, 0.2, 0]")
        page.get_by_label("colours").select_option("BGR")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("dialog .answer pre")).to_have_text("[0, 0.2, 1]")


@pytest.mark.slow
def test_names_and_messages_with_markup_are_shown_as_text(browser: Any, both: tuple[str, str]) -> None:
    url, control = both
    with tab(browser, control) as (page, watch):
        expect(card(page, EVIL).locator("h3")).to_have_text(EVIL)
        with contextlib.suppress(RemoteOpsError):
            Endpoint(f"{url}{quote(EVIL, safe='')}", retry=Retry(attempts=1))([1.0])
        expect(page.locator("#errors")).to_contain_text(EVIL)
        card(page, EVIL).get_by_role("button").click()
        page.get_by_role("button", name="Send").click()
        expect(page.locator("dialog .why")).to_have_text(f"no {EVIL} here")
        assert page.locator("img").count() == 0
        assert page.title() == "remote-ops server"
        assert not [said for said in watch.complaints if "400" not in said]


_CONTRAST = """() => {
  const numbers = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = numbers(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] > 0.99) return found;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")].filter((element) => !element.closest("svg, script, .unseen, .skip")
      && element.checkVisibility() && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .map((element) => {
      const [a, b] = [light(numbers(getComputedStyle(element).color)), light(behind(element))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.textContent.slice(0, 30)];
    }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_either_scheme_and_fits_a_phone(browser: Any, both: tuple[str, str], scheme: str) -> None:
    with tab(browser, both[1], color_scheme=scheme, viewport={"width": 360, "height": 800}) as (page, _):
        expect(card(page, "sum").locator("svg rect").first).to_be_visible()
        assert page.evaluate(_CONTRAST) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(14, 18, 24)") == (scheme == "dark")
        theme = page.get_by_role("button", name="Theme")
        for wanted in ("light", "dark"):
            theme.click()
            expect(theme).to_have_text(f"Theme: {wanted}")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 18, 24)"
        card(page, "pictures").get_by_role("button").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("document.querySelector('dialog[open]').getBoundingClientRect().right") <= 360


@pytest.mark.slow
def test_a_reload_that_fails_is_told_with_its_reason(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text(STEPS)
    (tmp_path / "sum.yaml").write_text(GRAPH)
    with controlled(tmp_path, allow_changes=True) as (_, control), tab(browser, control) as (page, _):
        expect(card(page, "sum").locator(".pill")).to_have_text("ready")
        (tmp_path / "sum.yaml").write_text(GRAPH.replace("once.y", "nowhere.y"))
        assert ask(control, "POST", "/api/models/sum/load")[0] >= 400
        expect(card(page, "sum").locator(".why")).to_contain_text("nowhere")
        expect(card(page, "sum").locator(".why")).to_contain_text("still served")
        expect(page.locator("#said")).to_contain_text("nowhere")
        expect(card(page, "sum").locator(".pill")).to_have_text("ready")


@pytest.mark.slow
def test_the_page_says_that_the_server_is_gone_and_goes_on_when_it_is_back(browser: Any) -> None:
    with contextlib.ExitStack() as first:
        _, control = first.enter_context(controlled({"double": doubling()}))
        where = urlsplit(control).netloc
        with tab(browser, control) as (page, _):
            expect(card(page, "double")).to_be_visible()
            first.close()
            expect(page.locator("#lost")).to_contain_text("Connection lost")
            expect(page.locator("#state")).to_have_text("Connection lost")
            with controlled({"double": doubling(), "another": doubling("another")}, where):
                expect(card(page, "another")).to_be_visible()
                expect(page.locator("#lost")).to_be_hidden()
                expect(page.locator("#state")).to_have_text("Ready")


@pytest.mark.slow
def test_the_token_is_asked_for_once_and_kept_in_the_tab(browser: Any) -> None:
    with controlled({"double": doubling()}, "0.0.0.0:0", access=Access(admin=[ADMIN])) as (_, control):
        with tab(browser, control) as (page, _):
            expect(page.locator("#asking")).to_contain_text("this needs a token")
            page.keyboard.type(ADMIN)
            cross(page, ["Enter"])
            expect(card(page, "double")).to_be_visible()
            page.reload()
            page.get_by_role("button", name="Try it double").click()
            page.get_by_role("button", name="Send").click()
            expect(page.locator("dialog .answer pre")).to_have_text("[0, 0]")
            assert ADMIN not in page.url
            assert page.evaluate("JSON.stringify(localStorage)") == "{}"


@pytest.mark.slow
def test_a_tab_that_nobody_sees_asks_for_nothing(browser: Any, both: tuple[str, str]) -> None:
    with tab(browser, both[1]) as (page, watch):
        expect(card(page, "double")).to_be_visible()
        hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
        tell = "document.dispatchEvent(new Event('visibilitychange'))"
        with page.expect_response("**/api/errors"):
            pass
        page.evaluate(hide % "true" + tell)
        page.wait_for_load_state("networkidle")  # half a second without a request
        before = len(watch.asked)
        page.evaluate(hide % "false" + tell)
        with page.expect_response("**/api/errors"):
            pass
        assert len(watch.asked) > before
