"""What calls tell the log and OpenTelemetry: every sending, in its place; no tensor, secret or word of a server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rawpeer import WAIT_S, Conversation, Message, peer, serving, until

import server_ref
from remote_ops import Endpoint, FunctionServable, Hedge, Retry, Signature, TensorSpec, graphpipe
from remote_ops.errors import ConnectError, DeadlineExceeded, ModelUnavailable, brief

Array = npt.NDArray[Any]

X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
SIGNATURE = Signature((X,), (Y,), name="m")
ONES = np.ones((3, 2), np.float32)
QUICK = Retry(base_s=0.001)
WORDS = "the row of Jane Doe, account-no-4711"
Answer = Callable[[Conversation, Message], None]


def doubling(conversation: Conversation, message: Message) -> None:
    request = graphpipe.decode_request(message.body)
    conversation.answer(b"".join(graphpipe.encode_response([2 * array for array in request.tensors])))


def refusing(conversation: Conversation, _: Message) -> None:
    conversation.answer(graphpipe.encode_error(14, WORDS), "503 X")


def in_turn(*answers: Answer) -> Answer:
    """Each answers once, and the last one ever after."""
    left = list(answers)
    return lambda conversation, message: (left.pop(0) if len(left) > 1 else left[0])(conversation, message)


class Heard:
    """The headers of every call for the model."""

    def __init__(self, answer: Answer) -> None:
        self.headers: list[dict[str, str]] = []
        self._answer = answer

    def __call__(self, conversation: Conversation, message: Message) -> None:
        self.headers.append(message.headers)
        self._answer(conversation, message)


@contextlib.contextmanager
def calling(answer: Answer, **options: Any) -> Iterator[tuple[Endpoint, Heard]]:
    """An endpoint that knows its signature, and what its server hears."""
    heard = Heard(answer)
    with peer(serving(SIGNATURE, heard)) as there:
        with Endpoint(there.url, **{"timeout_s": WAIT_S, "retry": QUICK, **options}) as endpoint:
            assert endpoint.signature.inputs == (X,)
            yield endpoint, heard


# --------------------------------------------------------------------------- spans


class Spans:
    """What a program with OpenTelemetry in it has collected."""

    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        trace.set_tracer_provider(provider)
        self.tracer = trace.get_tracer("test")

    def clear(self) -> None:
        self._exporter.clear()

    @property
    def all(self) -> list[Any]:
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time)

    def named(self, prefix: str) -> list[Any]:
        return [span for span in self.all if span.name.startswith(prefix)]


@pytest.fixture(scope="module")
def loaded() -> Iterator[Spans]:
    """OpenTelemetry, for these tests only: what comes after them runs as programs without it do."""
    pytest.importorskip("opentelemetry.sdk", reason="needs OpenTelemetry: pip install opentelemetry-sdk")
    yield Spans()
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        del sys.modules[name]


@pytest.fixture
def spans(loaded: Spans) -> Spans:
    loaded.clear()
    return loaded


def parent_of(span: Any) -> int:
    assert span.parent is not None
    return int(span.parent.span_id)


def header_of(span: Any) -> str:
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"


HOW: dict[str, Callable[[Endpoint], Any]] = {
    "infer": lambda endpoint: endpoint.infer({"x": ONES})["y"],
    "call": lambda endpoint: endpoint(ONES),
    "ainfer": lambda endpoint: asyncio.run(endpoint.ainfer({"x": ONES}))["y"],
    "submit": lambda endpoint: endpoint.submit({"x": ONES}).result(WAIT_S)["y"],
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("hedge", [None, Hedge(after_s=30)])
def test_a_call_is_a_span_with_its_sending_inside_the_callers(how: str, hedge: Hedge | None, spans: Spans) -> None:
    with calling(doubling, hedge=hedge) as (endpoint, heard):
        spans.clear()
        with spans.tracer.start_as_current_span("mine") as mine:
            np.testing.assert_array_equal(HOW[how](endpoint), 2 * ONES)
    (call,), (sending,) = spans.named("infer /m"), spans.named("POST /m")
    assert parent_of(call) == mine.get_span_context().span_id
    assert parent_of(sending) == call.context.span_id
    assert heard.headers[0]["traceparent"] == header_of(sending)
    assert (call.kind.name, sending.kind.name) == ("INTERNAL", "CLIENT")
    assert call.status.is_ok is not False
    assert call.attributes == {"remote_ops.endpoint": endpoint.url}


def test_a_sending_tells_where_it_went_how_much_and_how_long_each_phase_took(spans: Spans) -> None:
    with calling(doubling) as (endpoint, _):
        spans.clear()
        endpoint(ONES)
    (sending,) = spans.named("POST /m")
    told = dict(sending.attributes)
    page = (Path(__file__).parents[1] / "docs" / "observe.md").read_text("utf-8")
    assert [name for name in told if f"`{name}`" not in page] == []
    lasted_s = (sending.end_time - sending.start_time) / 1e9
    phases = [told.pop(f"remote_ops.{phase}_s") for phase in ("sending", "waiting", "receiving")]
    assert all(0 <= phase_s <= lasted_s for phase_s in phases)
    assert told.pop("server.port") == int(endpoint.url.split(":")[2].split("/")[0])
    request = graphpipe.encode_request(("x",), [ONES], ("y",), b"")
    assert told == {
        "http.request.method": "POST",
        "http.request.body.size": sum(map(len, request)),
        "http.response.status_code": 200,
        "http.response.body.size": sum(map(len, graphpipe.encode_response([2 * ONES]))),
        "url.full": endpoint.url,
        "server.address": "127.0.0.1",
        "remote_ops.replica": endpoint.url,
        "remote_ops.message": "infer",
        "remote_ops.attempt": 1,
        "remote_ops.hedge": False,
        "remote_ops.outcome": "answered",
    }


@pytest.mark.parametrize("how", ["infer", "ainfer"])
def test_only_a_new_connection_takes_time_to_connect(how: str, spans: Spans) -> None:
    model = FunctionServable(lambda x: 2 * x, [X], [Y])
    with server_ref.running({"m": model}) as url, Endpoint(url) as endpoint:

        async def twice() -> None:
            for _ in range(2):
                await endpoint.ainfer({"x": ONES})

        if how == "ainfer":
            asyncio.run(twice())
        else:
            for _ in range(2):
                endpoint.infer({"x": ONES})
    metadata, first, second = [dict(span.attributes) for span in spans.named("POST")]
    assert [told["remote_ops.message"] for told in (metadata, first, second)] == ["metadata", "infer", "infer"]
    assert metadata["remote_ops.connecting_s"] > 0
    assert "remote_ops.connecting_s" not in first
    assert "remote_ops.connecting_s" not in second


@pytest.mark.parametrize("how", HOW)
def test_a_call_that_is_sent_again_shows_each_sending(how: str, spans: Spans) -> None:
    with calling(in_turn(refusing, refusing, doubling)) as (endpoint, heard):
        spans.clear()
        np.testing.assert_array_equal(HOW[how](endpoint), 2 * ONES)
    sendings = spans.named("POST")
    told = [dict(span.attributes) for span in sendings]
    assert [one["remote_ops.attempt"] for one in told] == [1, 2, 3]
    assert [one.get("http.request.resend_count") for one in told] == [None, 1, 2]
    assert [one["http.response.status_code"] for one in told] == [503, 503, 200]
    assert [one.get("error.type") for one in told] == ["ModelUnavailable", "ModelUnavailable", None]
    assert [span.status.is_ok for span in sendings] == [False, False, True]
    assert [headers["traceparent"] for headers in heard.headers] == [header_of(span) for span in sendings]
    assert [span.status.is_ok for span in spans.named("infer")] == [True]


@pytest.mark.parametrize("how", HOW)
def test_a_call_that_fails_is_a_span_that_failed(how: str, spans: Spans) -> None:
    with Endpoint("http://127.0.0.1:1/m", retry=QUICK) as endpoint:
        endpoint._signature = SIGNATURE
        with pytest.raises(ConnectError):
            HOW[how](endpoint)
    assert len(spans.named("POST")) == 3
    for span in spans.all:
        assert not span.status.is_ok
        assert span.status.description.startswith("ConnectError: cannot connect to 127.0.0.1:")
        assert span.attributes["error.type"] == "ConnectError"
        assert span.events == ()


def test_a_hedge_is_a_span_of_its_own_and_the_loser_says_that_it_was_outrun(spans: Spans) -> None:
    def never(conversation: Conversation, _: Message) -> None:
        conversation.read()  # which ends when the loser is cancelled

    with calling(in_turn(never, doubling), hedge=Hedge(after_s=0.02, budget=1.0)) as (endpoint, heard):
        spans.clear()
        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        assert until(lambda: len(spans.named("POST")) == 2)
    told = [dict(span.attributes) for span in spans.named("POST")]
    assert [(one["remote_ops.hedge"], one["remote_ops.attempt"]) for one in told] == [(False, 1), (True, 1)]
    assert [one["remote_ops.outcome"] for one in told] == ["outrun", "answered"]
    assert len({headers["traceparent"] for headers in heard.headers}) == 2


@pytest.mark.parametrize("name", ["traceparent", "Traceparent"])
def test_a_traceparent_of_the_callers_own_is_left_as_it_is(name: str, spans: Spans) -> None:
    own = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with calling(doubling, headers={name: own}) as (endpoint, heard):
        endpoint(ONES)
    assert heard.headers[0]["traceparent"] == own  # two would be joined by a comma
    assert len(spans.named("infer")) == 1


def test_without_a_recording_span_the_trace_goes_on_all_the_same(spans: Spans) -> None:
    from opentelemetry import context, trace

    remote = trace.SpanContext(1, 2, is_remote=True, trace_flags=trace.TraceFlags(0))
    token = context.attach(trace.set_span_in_context(trace.NonRecordingSpan(remote)))
    try:
        with calling(doubling) as (endpoint, heard):
            endpoint(ONES)
    finally:
        context.detach(token)
    assert heard.headers[0]["traceparent"].startswith(f"00-{1:032x}-")
    assert heard.headers[0]["traceparent"].endswith("-00")
    assert spans.all == []


def test_a_gradient_is_in_the_trace_of_its_forward_pass(spans: Spans) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("remote_ops.torch").RemoteModule
    soft = TensorSpec("x", "float32", (-1, 2), differentiable=True)
    model = FunctionServable(lambda x: 3 * x, [soft], [Y], vjp=lambda inputs, cotangents: {"x": 3 * cotangents["y"]})
    with server_ref.running({"m": model}) as url, spans.tracer.start_as_current_span("step") as step:
        x = torch.ones(3, 2, requires_grad=True)
        module(url)(x).sum().backward()
        assert x.grad.tolist() == [[3, 3]] * 3
    calls = spans.named("infer")
    assert len(calls) == 2
    assert {span.context.trace_id for span in calls} == {step.get_span_context().trace_id}


def test_the_calls_of_a_served_model_are_in_the_trace_of_its_request(spans: Spans) -> None:
    with calling(doubling) as (behind, heard), server_ref.running({"m": behind}) as url:
        with Endpoint(url) as endpoint, spans.tracer.start_as_current_span("step") as step:
            endpoint(ONES)
        assert until(lambda: len(spans.named("infer")) == 2)
    outer, inner = spans.named("infer")
    (sent,) = [span for span in spans.named("POST") if span.parent and parent_of(span) == outer.context.span_id]
    (passed_on,) = [span for span in spans.named("POST") if header_of(span) == heard.headers[0]["traceparent"]]
    assert parent_of(outer) == step.get_span_context().span_id
    assert parent_of(inner) == sent.context.span_id
    assert parent_of(passed_on) == inner.context.span_id


def test_no_secret_tensor_or_word_of_a_server_is_in_a_span(spans: Spans) -> None:
    with calling(refusing, headers={"Authorization": "Bearer s3cr3t"}) as (endpoint, _):
        there = Endpoint(f"{endpoint.url}?token=s3cr3t", headers={"Authorization": "Bearer s3cr3t"}, retry=QUICK)
        with there, pytest.raises(ModelUnavailable, match="Jane Doe"):
            there(ONES)
    told = "".join(span.to_json() for span in spans.all)
    assert "ModelUnavailable" in told
    for secret in ("s3cr3t", "Jane", "account-no-4711"):
        assert secret not in told


def test_opentelemetry_is_not_loaded_by_us() -> None:
    code = """
import sys
import numpy as np
import server_ref
from remote_ops import Endpoint, FunctionServable, TensorSpec
spec = [TensorSpec("x", "float32", (-1, 2))]
with server_ref.running({"m": FunctionServable(lambda x: x, spec, [TensorSpec("y", "float32", (-1, 2))])}) as url:
    Endpoint(url)(np.ones((1, 2), np.float32))
    assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --------------------------------------------------------------------------- log


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "remote_ops" and record.levelno >= level]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "remote_ops")
    return caplog


@pytest.mark.parametrize("how", HOW)
def test_each_sending_is_a_line_of_debugging(how: str, log: pytest.LogCaptureFixture) -> None:
    with calling(doubling) as (endpoint, _):
        log.clear()
        HOW[how](endpoint)
    assert lines(log, logging.INFO) == []
    (line,) = lines(log, logging.DEBUG)
    sent = sum(map(len, graphpipe.encode_request(("x",), [ONES], ("y",), b"")))
    received = sum(map(len, graphpipe.encode_response([2 * ONES])))
    assert line.startswith(f"POST {endpoint.url}, attempt 1: answered after 0.0")
    assert line.endswith(f" s; {sent} bytes sent, {received} received")


def test_a_retry_is_a_line_of_information(log: pytest.LogCaptureFixture) -> None:
    with calling(in_turn(refusing, doubling)) as (endpoint, _):
        endpoint(ONES)
    (line,) = lines(log, logging.INFO)
    assert line.startswith(f"attempt 1 of 3 at {endpoint.url} failed: ModelUnavailable; the next in 0.00")
    assert line.endswith(f" s at {endpoint.url}")


def test_an_ejection_is_a_warning_and_its_end_is_told(log: pytest.LogCaptureFixture) -> None:
    from remote_ops.policy import Breaker
    from remote_ops.replicas import Replicas
    from remote_ops.url import Url

    now = [100.0]
    urls = [Url.parse("http://a/m"), Url.parse("http://b/m")]
    replicas = Replicas(urls, Retry(), None, Breaker(faults=2), clock=lambda: now[0])
    bad = replicas.next(())
    for _ in range(3):  # what was on its way when it was ejected says nothing new
        replicas.failed(bad, replicas.begin(bad, first=True), ConnectError("cannot connect to a:80 (refused)"))
    replicas.answered(bad, replicas.begin(bad, first=True))
    assert lines(log, logging.DEBUG) == [
        f"{bad.url.text} is left alone for 1.0 s: 2 faults in a row, the last a ConnectError: cannot connect to a:80 "
        "(refused)",
        f"{bad.url.text} answers again",
    ]
    assert len(lines(log, logging.WARNING)) == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ConnectError("cannot connect to a:80 (refused) - at http://a/m"),
            "ConnectError: cannot connect to a:80 (refused)",
        ),
        (ModelUnavailable(WORDS, endpoint="http://a/m"), "ModelUnavailable"),
        (DeadlineExceeded(WORDS), "DeadlineExceeded"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_what_is_told_of_an_error_is_not_what_a_peer_wrote(error: BaseException, told: str) -> None:
    assert brief(error) == told


def test_no_secret_tensor_or_word_of_a_server_is_in_the_log(log: pytest.LogCaptureFixture) -> None:
    with calling(refusing) as (endpoint, _):
        url = f"{endpoint.url}?token=s3cr3t"
        with Endpoint(url, headers={"Authorization": "Bearer s3cr3t"}, retry=QUICK) as there:
            with pytest.raises(ModelUnavailable, match="Jane Doe"):
                there(ONES)
    told = "\n".join(lines(log, logging.DEBUG))
    assert told.count("ModelUnavailable") == 5
    for secret in ("s3cr3t", "Jane", "account-no-4711"):
        assert secret not in told


def test_nothing_is_printed_unless_the_program_wants_to_hear() -> None:
    code = """
import numpy as np
from remote_ops import Endpoint, RemoteOpsError
try:
    Endpoint(["http://127.0.0.1:1/m", "http://127.0.0.1:2/m"])(1)
except RemoteOpsError as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ConnectError\n", "")


def test_what_is_not_wanted_costs_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call asks whether it is to tell, and then does not even measure."""
    seen: list[float] = []
    with calling(doubling) as (endpoint, _):
        monkeypatch.setattr(logging.getLogger("remote_ops"), "debug", lambda *args: seen.append(time.monotonic()))
        endpoint(ONES)
        assert seen == []
