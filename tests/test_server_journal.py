"""What a server writes down of requests: one line each, with nothing in it that is not ours; and ids that go on."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rawpeer import WAIT_S, Conversation, Message, peer, serving, until
from test_front import Raw, ask, request

from remote_ops import Endpoint, FunctionServable, Signature, TensorSpec, graphpipe
from remote_ops.connection import new_loop
from remote_ops.errors import InternalError, Overloaded
from server_ref.correlation import given_id, trace_headers, trace_id
from server_ref.journal import Ended, Journal, JsonLines, TextLines, log_handler
from server_ref.lifecycle import Server, _close_soon

Array = npt.NDArray[Any]
X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
ONES = np.ones((3, 2), np.float32)
BODY = request(arrays=[ONES])
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
SECRET = "4711-Jane-Doe"
REQUESTS = "server_ref.requests"


def fickle(x: Array) -> Array:
    if (x == -1).any():
        raise ValueError(SECRET)
    return 2 * x


class Lines(logging.Handler):
    """The records of requests, in each of the two forms."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def fields(self) -> list[dict[str, Any]]:
        return [json.loads(JsonLines().format(record)) for record in self.records]

    @property
    def texts(self) -> list[str]:
        return [TextLines().format(record) for record in self.records]


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger, handler = logging.getLogger(REQUESTS), Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@contextlib.contextmanager
def observed(models: Mapping[str, Any], *, journal: Journal | None = None) -> Iterator[Server]:
    """A server whose object is at hand, on a loop of its own."""
    loop, server = new_loop(), Server(models, journal=journal)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(WAIT_S)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_close_soon(server), loop).result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


def served(journal: Journal | None = None, **models: Any) -> Any:
    return observed(models or {"m": FunctionServable(fickle, [X], [Y], version="3")}, journal=journal)


def journal_of(server: Server) -> Journal:
    return server.front.journal


# --------------------------------------------------------------------------- lines


def test_a_request_that_goes_well_leaves_no_line_unless_asked(lines: Lines) -> None:
    with served() as server, Raw(server.url) as raw:
        assert raw.post().read().status == 200
        assert ask(server.url).status == 200
    assert lines.records == []


def test_every_request_leaves_a_line_with_all_that_is_known_of_it_if_asked(lines: Lines) -> None:
    with served(Journal(requests=True)) as server, Raw(server.url) as raw:
        answer = raw.post(BODY, "/", "X-Request-Id: mine", f"traceparent: {PARENT}").read()
        assert answer.status == 200
        assert until(lambda: len(lines.records) == 1)
    (told,) = lines.fields
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told.pop("time"))
    queue_ms, compute_ms, total_ms = (told.pop(f"{part}_ms") for part in ("queue", "compute", "total"))
    assert 0 <= queue_ms <= total_ms
    assert 0 < compute_ms <= total_ms
    assert told == {
        "level": "info", "logger": REQUESTS, "model": "m", "version": "3", "status": 200, "request_id": "mine",
        "trace_id": TRACE, "rows": 3, "bytes_in": 24, "bytes_out": len(answer.body),
    }  # fmt: skip
    assert " INFO server_ref.requests: model=m version=3 status=200 request_id=mine " in lines.texts[0]


def test_a_request_that_fails_leaves_a_line_whether_asked_or_not(lines: Lines) -> None:
    with served() as server, Raw(server.url) as raw:
        assert raw.post(request(arrays=[-ONES])).read().status == 500
        assert raw.post(request(arrays=[np.ones((3, 5), np.float32)])).read().status == 400
        assert raw.post(b"no message").read().status == 400
    model, shape, message = lines.fields
    assert (model["level"], model["status"], model["model"], model["version"]) == ("error", 500, "m", "3")
    assert (model["error"], model["message"]) == ("ValueError", "the model raised ValueError")
    assert (shape["level"], shape["error"]) == ("warning", "SignatureError")
    assert "float32 [3, 5]" in shape["message"]
    assert message["error"] == "DecodeError"
    assert len({told["request_id"] for told in lines.fields}) == 3


def test_what_is_no_request_leaves_a_line_too(lines: Lines) -> None:
    with served() as server, Raw(server.url) as raw:
        answer = raw.send(b"\x00\x01 nonsense\r\n\r\n").read()
        assert answer.status == 400
        assert answer.headers["x-request-id"] == lines.fields[0]["request_id"]
    assert (lines.fields[0]["model"], lines.fields[0]["error"]) == ("_unknown", "FramingError")


def test_a_client_that_does_not_wait_leaves_a_line_of_its_own_status(lines: Lines) -> None:
    held, release = threading.Event(), threading.Event()

    def hold(x: Array) -> Array:
        held.set()
        release.wait(WAIT_S)
        return x

    with served(Journal(requests=True), m=FunctionServable(hold, [X], [Y])) as server:
        with Raw(server.url) as raw:
            raw.post()
            assert held.wait(WAIT_S)
        assert until(lambda: len(lines.records) == 1)
        release.set()
    assert (lines.fields[0]["status"], lines.fields[0]["model"]) == (499, "m")


def test_no_tensor_query_header_or_word_of_a_model_is_in_a_line(lines: Lines) -> None:
    with served(Journal(requests=True)) as server, Raw(server.url) as raw:
        for body in (BODY, request(arrays=[-ONES]), b"nonsense"):
            raw.post(body, f"/m?token={SECRET}", f"Authorization: Bearer {SECRET}", f"Cookie: {SECRET}").read()
        assert until(lambda: len(lines.records) == 3)
        told = [*lines.texts, *map(json.dumps, lines.fields), *map(str, journal_of(server).errors())]
    assert not [line for line in told if SECRET in line]


def test_s13_nothing_that_a_client_sends_ends_a_line_or_steers_a_terminal(lines: Lines) -> None:
    evil = "%0d%0aERROR%20forged%1b[2J%00%e2%80%a8"
    models = {name: FunctionServable(fickle, [X], [Y]) for name in "ab"}
    with served(Journal(requests=True), **models) as server, Raw(server.url) as raw:
        raw.post(path=f"/{evil}").read()
        raw.post(request(("x\r\nERROR forged\x1b[2J",)), "/a").read()
        raw.post(BODY, "/a", "X-Request-Id: a b\x1b[2J").read()
        assert until(lambda: len(lines.records) == 3)
    for line in [*lines.texts, *map(JsonLines().format, lines.records)]:
        assert line.isprintable()
        assert len(line.splitlines()) == 1
    assert "\\r\\nERROR forged\\x1b[2J" in lines.fields[1]["message"]


@pytest.mark.parametrize("form", [TextLines(), JsonLines()])
def test_s13_other_records_are_one_line_each_their_tracebacks_set_in(form: logging.Formatter) -> None:
    try:
        raise ValueError("one\r\nERROR forged\x1b[2J")
    except ValueError:
        exc_info = sys.exc_info()
    record = logging.LogRecord("server_ref", logging.ERROR, "f", 1, "a model\nraised %s", ("\x1b[2J",), exc_info)
    first, *others = form.format(record).split("\n")
    assert "raised \\x1b[2J" in first or "raised \\u001b[2J" in first
    assert "\x1b" not in "".join([first, *others])
    assert all(line.startswith("  | ") for line in others)


def ended(error: BaseException | None, status: int = 503, **more: Any) -> Ended:
    return Ended("m", "1", status, "id", "", 0.0, 0.0, 0.0, 1, 0, 0, error, **more)


def test_a_flood_of_errors_is_no_flood_of_lines(lines: Lines) -> None:
    now = [10.5]
    journal = Journal(clock=lambda: now[0])
    for _ in range(1000):
        journal.ended(ended(Overloaded("full"), 429))
    assert len(lines.records) == 100
    now[0] = 11.1
    journal.ended(ended(Overloaded("full"), 429))
    journal.ended(ended(Overloaded("full"), 429))
    assert [told.get("left_out") for told in lines.fields[100:]] == [900, None]
    assert len(journal.errors()) == 50


def test_who_asked_for_every_request_gets_every_request(lines: Lines) -> None:
    journal = Journal(requests=True, clock=lambda: 1.0)
    for _ in range(300):
        journal.ended(ended(Overloaded("full"), 429))
    assert len(lines.records) == 300


# --------------------------------------------------------------------------- the latest errors


def test_the_latest_fifty_errors_are_kept_the_last_one_first() -> None:
    journal = Journal(clock=lambda: 1.0)
    for number in range(60):
        journal.ended(ended(InternalError(f"number {number}"), 500))
    assert [error.message for error in journal.errors()] == [f"number {number}" for number in range(59, 9, -1)]
    first = journal.errors()[0]
    assert (first.model, first.version, first.request_id, first.kind) == ("m", "1", "id", "InternalError")
    assert first.at == pytest.approx(time.time(), abs=60)


def test_errors_of_a_server_are_kept_with_model_version_and_id(lines: Lines) -> None:
    with served() as server, Raw(server.url) as raw:
        told = raw.post(request(arrays=[-ONES]), "/", "X-Request-Id: abc").read()
        assert told.headers["x-request-id"] == "abc"
        assert ask(server.url, "GET", "/control/nothing").status == 404
        (error,) = journal_of(server).errors()
    assert (error.model, error.version, error.request_id, error.kind) == ("m", "3", "abc", "ValueError")
    assert error.message == "the model raised ValueError"


# --------------------------------------------------------------------------- ids and traces


def test_an_id_comes_back_where_one_was_sent_or_something_failed(lines: Lines) -> None:
    with served() as server, Raw(server.url) as raw:
        assert "x-request-id" not in raw.post().read().headers
        assert raw.post(BODY, "/", "X-Request-Id: r-1").read().headers["x-request-id"] == "r-1"
        assert raw.post(request(arrays=[-ONES]), "/", "X-Request-Id: r-2").read().headers["x-request-id"] == "r-2"
        made = raw.post(request(arrays=[-ONES])).read().headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{16}", made)
        assert "x-request-id" not in raw.post().read().headers
        assert ask(server.url, "GET", "/", "X-Request-Id: r-3").headers["x-request-id"] == "r-3"
    assert [told["request_id"] for told in lines.fields] == ["r-2", made]


def test_s11_the_words_of_a_failure_are_found_by_its_id_in_the_log(lines: Lines) -> None:
    with served() as server, Raw(server.url) as raw:
        answer = raw.post(request(arrays=[-ONES])).read()
    assert b"Traceback" not in answer.body
    assert b".py" not in answer.body
    assert lines.fields[0]["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("said", ["", "a b", "a\x1b", "é", "x" * 129])
def test_an_id_that_may_not_stand_in_a_header_is_none(said: str) -> None:
    assert given_id({"x-request-id": said}) == ""
    assert given_id({"x-request-id": "x" * 128}) == "x" * 128


@pytest.mark.parametrize(
    "said",
    [
        "", "00", PARENT[:-3], PARENT.replace("00", "ff", 1), f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-b7ad6b7169203331-01", f"{PARENT}\n", f"{PARENT}, {PARENT}",
    ],
)  # fmt: skip
def test_a_traceparent_that_is_not_valid_is_none(said: str) -> None:
    assert trace_id({"traceparent": said}) == ""
    assert trace_headers({"traceparent": said, "tracestate": "a=1"}) == []


def test_a_tracestate_goes_along_if_it_may_stand_in_a_header() -> None:
    assert trace_headers({"traceparent": PARENT, "tracestate": "a=1"}) == [
        ("traceparent", PARENT),
        ("tracestate", "a=1"),
    ]
    assert trace_headers({"traceparent": PARENT, "tracestate": "a\x00"}) == [("traceparent", PARENT)]


class Heard:
    """A peer's model, which doubles; the headers of every call are kept."""

    def __init__(self) -> None:
        self.headers: list[Mapping[str, str]] = []
        self.script = serving(Signature((X,), (Y,), name="far"), self._answer)

    def _answer(self, conversation: Conversation, message: Message) -> None:
        self.headers.append(message.headers)
        asked = graphpipe.decode_request(message.body)
        assert isinstance(asked, graphpipe.InferRequest)
        conversation.answer(b"".join(graphpipe.encode_response([2 * array for array in asked.tensors])))


def test_trace_and_id_go_on_to_the_server_behind_an_endpoint(lines: Lines) -> None:
    heard = Heard()
    with peer(heard.script) as far, Endpoint(far.url) as endpoint, served(m=endpoint) as server:
        with Raw(server.url) as raw:
            sent = ("X-Request-Id: r-1", f"traceparent: {PARENT}", "tracestate: a=1")
            assert raw.post(BODY, "/", *sent).read().status == 200
            assert raw.post(BODY, "/", f"traceparent: {PARENT}").read().status == 200
            assert raw.post(BODY).read().status == 200
    names = ("x-request-id", "traceparent", "tracestate")
    passed_on = [{name: headers[name] for name in names if name in headers} for headers in heard.headers]
    assert passed_on == [dict(zip(names, ("r-1", PARENT, "a=1"), strict=True)), {"traceparent": PARENT}, {}]


def test_what_an_endpoint_is_told_to_send_is_left_as_it_is() -> None:
    heard, own = Heard(), PARENT.replace("b7", "c8")
    with peer(heard.script) as far, Endpoint(far.url, headers={"Traceparent": own}) as endpoint:
        with served(m=endpoint) as server, Raw(server.url) as raw:
            assert raw.post(BODY, "/", "X-Request-Id: r-1", f"traceparent: {PARENT}").read().status == 200
    assert (heard.headers[0]["traceparent"], heard.headers[0]["x-request-id"]) == (own, "r-1")


def test_with_a_line_for_each_request_one_id_of_ours_goes_all_the_way(lines: Lines) -> None:
    heard = Heard()
    with peer(heard.script) as far, Endpoint(far.url) as endpoint, served(Journal(requests=True), m=endpoint) as server:
        with Raw(server.url) as raw:
            answer = raw.post().read()
        assert until(lambda: len(lines.records) == 1)
    assert answer.headers["x-request-id"] == heard.headers[0]["x-request-id"] == lines.fields[0]["request_id"]


GRAPH = """
ensemble: 1
name: twice
inputs: {{image: {{dtype: float32, shape: [N, 2]}}}}
outputs: {{y: second.y}}
nodes:
  first: {{kind: remote, url: "{url}", inputs: {{x: $inputs.image}}}}
  second: {{kind: remote, url: "{url}", inputs: {{x: first.y}}}}
"""


def test_trace_and_id_go_on_to_every_server_of_a_graph(tmp_path: Path) -> None:
    import ensemble

    heard = Heard()
    with peer(heard.script) as far:
        (tmp_path / "graph.yaml").write_text(GRAPH.format(url=far.url))
        graph = ensemble.load(tmp_path / "graph.yaml")
        with served(m=graph) as server, Raw(server.url) as raw:
            body = request(("image",), [ONES])
            sent = [("X-Request-Id: r-1", f"traceparent: {PARENT}"), ()]
            assert [raw.post(body, "/", *headers).read().status for headers in sent] == [200, 200]
        graph.close()
    assert [headers.get("x-request-id") for headers in heard.headers] == ["r-1", "r-1", None, None]
    assert [headers.get("traceparent") for headers in heard.headers] == [PARENT, PARENT, None, None]


def test_requests_at_the_same_time_keep_their_own_ids() -> None:
    heard = Heard()
    with peer(heard.script) as far, Endpoint(far.url) as endpoint, served(m=endpoint) as server:
        raws = [Raw(server.url).post(request(arrays=[ONES * n]), "/", f"X-Request-Id: r-{n}") for n in range(20)]
        answers = [raw.read() for raw in raws]
        for raw in raws:
            raw.close()
    assert [answer.headers["x-request-id"] for answer in answers] == [f"r-{n}" for n in range(20)]
    assert sorted(headers["x-request-id"] for headers in heard.headers) == sorted(f"r-{n}" for n in range(20))


# --------------------------------------------------------------------------- the form of lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "form", "kind"),
    [
        (io.StringIO(), "", JsonLines),
        (Terminal(), "", TextLines),
        (io.StringIO(), "text", TextLines),
        (Terminal(), "json", JsonLines),
    ],
)
def test_lines_are_text_on_a_terminal_and_json_elsewhere_unless_said(
    stream: io.StringIO, form: str, kind: type[logging.Formatter]
) -> None:
    assert type(log_handler(stream, form).formatter) is kind


def test_the_command_writes_a_line_of_json_for_each_request(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(
        "from remote_ops import FunctionServable, TensorSpec\n"
        "double = FunctionServable(lambda x: 2 * x, [TensorSpec('x', 'float32', (-1, 2))],"
        " [TensorSpec('y', 'float32', (-1, 2))], version='3')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "server_ref", "-m", "made:double", "-l", "127.0.0.1:0", "--log-requests"],
        cwd=tmp_path, env={"PYTHONPATH": f"{Path(__file__).parents[1]}:{tmp_path}", "PATH": ""},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said: list[str] = []
        url = ""
        while not url:
            said.append(process.stderr.readline())
            found = re.search(r" at (http\S+) on ", said[-1])
            url = found[1] if found else ""
        with Raw(url) as raw:
            assert raw.post(BODY, "/", "X-Request-Id: r-1").read().status == 200
        while "r-1" not in said[-1]:
            said.append(process.stderr.readline())
    finally:
        process.kill()
        process.communicate()
    told = json.loads(said[-1])
    assert (told["model"], told["version"], told["status"], told["rows"]) == ("double", "3", 200, 3)


def test_requests_of_every_protocol_leave_the_same_lines(lines: Lines) -> None:
    with served(
        Journal(requests=True), a=FunctionServable(fickle, [X], [Y], version="3"), b=FunctionServable(fickle, [X], [Y])
    ) as server:
        good = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}
        bad = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [-1.0, 2.0]}]}
        with Raw(server.url) as raw:
            for path, body in (
                ("/v2/models/a/infer", good),
                ("/v2/models/a/infer", bad),
                ("/v1/models/a:predict", {"instances": [[1.0, 2.0]]}),
                ("/v2/models/nobody/infer", good),
            ):
                raw.post(json.dumps(body).encode(), path, "X-Request-Id: r").read()
        assert until(lambda: len(lines.records) == 4)
        assert server.front.unknown == 1
    told = [(one["model"], one["version"], one["status"], one["rows"], one["request_id"]) for one in lines.fields]
    assert told == [
        ("a", "3", 200, 1, "r"),
        ("a", "3", 500, 1, "r"),
        ("a", "3", 200, 1, "r"),
        ("_unknown", "", 404, 0, "r"),
    ]
