"""The batcher as a proxy of its own: one call for many callers, and none of what graphpipe-batcher got wrong."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rawpeer import WAIT_S, Conversation, Message, peer, serving, until

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, Servable, TensorSpec, graphpipe
from remote_ops.errors import DeadlineExceeded, InternalError, InvalidRequest, ModelUnavailable, SpecError
from remote_ops.signature import Signature
from server_ref.batcher import Upstream, _parser, batcher, main
from server_ref.rowstore import MemoryRows

Array = npt.NDArray[Any]
X = TensorSpec("x", "float32", (-1, 2))
Y, Z = TensorSpec("y", "float32", (-1, 2)), TensorSpec("z", "float32", (-1,))
NO_RETRY = Retry(attempts=1)
LONG_S = 30.0  # never waited for: what a test waits for comes first


class Target:
    """A model that keeps what it was called with; it fails where a row is not a number."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bytes]] = []
        self.servable = FunctionServable(self.run, [X], [Y, Z], name="target", version="5")

    def run(self, x: Array, config: bytes) -> tuple[Array, Array]:
        self.calls.append((len(x), config))
        if np.isnan(x).any():
            raise ValueError("not a number")
        return 2 * x, x.sum(1)


@contextlib.contextmanager
def proxied(model: Servable, **options: Any) -> Iterator[Endpoint]:
    """An endpoint of a batcher in front of a server of a model."""
    with server_ref.running({"m": model}) as url, in_front_of(url, **options) as endpoint:
        yield endpoint


@contextlib.contextmanager
def in_front_of(url: str, **options: Any) -> Iterator[Endpoint]:
    names = {name: options.pop(name) for name in ("workers", "inputs", "outputs") if name in options}
    with (
        Endpoint(url, 20, retry=NO_RETRY) as target,
        server_ref.running({"b": batcher(Upstream(target, **names), **options)}) as base,
        Endpoint(base, 20, retry=NO_RETRY) as endpoint,
    ):
        yield endpoint


def rows(count: int) -> list[Array]:
    return [np.full((1, 2), index, np.float32) for index in range(count)]


def together(endpoint: Endpoint, arrays: Sequence[Array], **more: Any) -> list[Any]:
    """What each of many callers, all at once, gets or raises."""

    def one(array: Array) -> Any:
        try:
            return endpoint.infer({"x": array}, **more)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(arrays)) as pool:
        return list(pool.map(one, arrays))


def test_ten_callers_with_a_row_each_are_one_call_of_ten_rows() -> None:
    target = Target()
    with proxied(target.servable, batch_size=10, timeout_s=LONG_S) as endpoint:
        answers = together(endpoint, rows(10))
        assert [answer["y"].tolist() for answer in answers] == [[[2 * n, 2 * n]] for n in range(10)]
        assert [answer["z"].tolist() for answer in answers] == [[2 * n] for n in range(10)]
    assert target.calls == [(10, b"")]


def test_it_says_what_its_target_says() -> None:
    with proxied(Target().servable) as endpoint:
        signature = endpoint.signature
    assert (signature.inputs, signature.outputs) == ((X,), (Y, Z))
    assert (signature.name, signature.version) == ("target", "5")


def test_the_outputs_that_are_passed_on_may_be_fewer_and_in_another_order() -> None:
    with proxied(Target().servable, outputs=["z", "y"]) as endpoint:
        assert [spec.name for spec in endpoint.signature.outputs] == ["z", "y"]
    with proxied(Target().servable, outputs=["z"], batch_size=1) as endpoint:
        assert list(endpoint.infer({"x": rows(2)[1]})) == ["z"]
        with pytest.raises(ValueError, match="no output 'y'"):
            endpoint.infer({"x": rows(1)[0]}, ["y"])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"inputs": ["w"]}, "the target has no 'w': it has x - at --inputs"),
        ({"outputs": ["yy"]}, "the target has no 'yy': it has y, z"),
        ({"batch_size": 0}, "expected 1 row or more, got 0"),
        ({"timeout_s": -1.0}, "expected 0 s or more"),
    ],
)
def test_names_that_the_target_lacks_and_sizes_that_make_no_sense_are_refused(
    names: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words), proxied(Target().servable, **names):
        pass


def test_an_input_that_the_target_wants_cannot_be_left_out() -> None:
    both = FunctionServable(lambda x, w: x, [X, TensorSpec("w", "float32", (-1,))], [Y])
    with pytest.raises(SpecError, match="wants 'w' too - at --inputs"), proxied(both, inputs=["x"]):
        pass


def test_rows_that_were_computed_before_are_not_asked_for_again_unless_their_config_differs() -> None:
    target = Target()
    with proxied(target.servable, batch_size=1, rows=MemoryRows()) as endpoint:
        for config in (b"", b"", b"c", b"c"):
            assert endpoint.infer({"x": rows(4)[3]}, config=config)["y"].tolist() == [[6, 6]]
        both = np.concatenate(rows(4)[2:])
        assert endpoint.infer({"x": both})["z"].tolist() == [4, 6]
    assert target.calls == [(1, b""), (1, b"c"), (1, b"")]


# --------------------------------------------------------------------------- what graphpipe-batcher got wrong


def test_the_timeout_counts_from_the_oldest_request_however_many_come_after_it() -> None:
    """A caller arrives every few milliseconds: waiting anew after each, the first would get its answer last."""
    target, over = Target(), threading.Event()
    with proxied(target.servable, batch_size=1000, timeout_s=0.3) as endpoint:

        def keep_coming() -> int:
            count = 0
            while not over.is_set():
                endpoint.submit({"x": rows(1)[0]}).add_done_callback(lambda _: None)
                over.wait(0.02)
                count += 1
            return count

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(keep_coming)
            try:
                endpoint.infer({"x": rows(1)[0]})
            finally:
                over.set()
            assert target.calls
            assert coming.result(WAIT_S) < 10 * 0.3 / 0.02
        assert until(lambda: sum(count for count, _ in target.calls) >= coming.result(0))


def test_a_request_that_makes_the_model_fail_fails_alone() -> None:
    target = Target()
    arrays = rows(8)
    arrays[3] = np.full((1, 2), np.nan, np.float32)
    with proxied(target.servable, batch_size=8, timeout_s=LONG_S) as endpoint:
        answers = together(endpoint, arrays)
        assert isinstance(answers[3], InternalError)
        assert "ValueError: not a number" in str(answers[3])
        assert [answer["y"].tolist() for n, answer in enumerate(answers) if n != 3] == [
            [[2 * n, 2 * n]] for n in range(8) if n != 3
        ]
        assert [together(endpoint, rows(8))[n]["z"].tolist() for n in range(8)] == [[2 * n] for n in range(8)]
    assert target.calls[0] == (8, b"")
    assert len(target.calls) <= 8 + 8


def test_a_request_of_another_shape_is_told_so_and_the_worker_goes_on() -> None:
    target = Target()
    with proxied(target.servable, batch_size=4, timeout_s=0.1) as endpoint:
        for _ in range(5):
            with ThreadPoolExecutor(5) as pool:
                wrong = [pool.submit(raw_post, endpoint.url, np.ones((1, 7), np.float32)) for _ in range(2)]
                good = [pool.submit(endpoint.infer, {"x": row}) for row in rows(3)]
                assert [future.result(WAIT_S) for future in wrong] == [400, 400]
                assert [future.result(WAIT_S)["z"].tolist() for future in good] == [[0], [2], [4]]


def raw_post(url: str, array: Array) -> int:
    """The status of an answer to a request that our client would not send."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(url, b"".join(graphpipe.encode_request(("x",), [array])))) as answer:
            return int(answer.status)
    except HTTPError as error:
        error.close()
        return error.code


def test_the_config_of_a_request_reaches_the_model_and_only_equal_ones_share_a_call() -> None:
    target = Target()
    with proxied(target.servable, batch_size=2, timeout_s=LONG_S) as endpoint, ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(endpoint.infer, {"x": row}, config=b"ab"[n % 2 :][:1]) for n, row in enumerate(rows(4))]
        assert [future.result(WAIT_S)["z"].tolist() for future in futures] == [[0], [2], [4], [6]]
    assert sorted(target.calls) == [(2, b"a"), (2, b"b")]


def test_each_request_gets_the_outputs_that_it_names() -> None:
    target = Target()
    with proxied(target.servable, batch_size=2, timeout_s=0.05) as endpoint, ThreadPoolExecutor(6) as pool:
        asked: list[Any] = [["y"], ["z"], ["z", "y"], None, ["y"], ["z"]]
        futures = [pool.submit(endpoint.infer, {"x": row}, names) for row, names in zip(rows(6), asked, strict=True)]
        answers = [future.result(WAIT_S) for future in futures]
    assert [list(answer) for answer in answers] == [["y"], ["z"], ["z", "y"], ["y", "z"], ["y"], ["z"]]
    assert [answer["z"].tolist() for answer in answers if "z" in answer] == [[2], [4], [6], [10]]


def test_strings_are_batched() -> None:
    seen: list[int] = []

    def run(s: Array) -> Array:
        seen.append(len(s))
        return np.array([text.upper() for text in s.ravel()] + [None], object)[:-1].reshape(s.shape)

    spec = (-1, 2)
    model = FunctionServable(run, [TensorSpec("s", "string", spec)], [TensorSpec("t", "string", spec)])
    texts = [np.array([[b"a%d" % n, b"long " * n * 30]], object) for n in range(6)]
    with proxied(model, batch_size=6, timeout_s=LONG_S) as endpoint, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda text: endpoint.infer({"s": text})["t"], texts))
    assert [answer.tolist() for answer in answers] == [[[t.upper() for t in text[0]]] for text in texts]
    assert seen == [6]


def test_no_input_is_named_twice_on_the_way_to_the_target() -> None:
    requests: list[graphpipe.InferRequest] = []

    def answer(conversation: Conversation, message: Message) -> None:
        request = graphpipe.decode_request(message.body)
        assert isinstance(request, graphpipe.InferRequest)
        requests.append(request)
        conversation.answer(b"".join(graphpipe.encode_response([request.tensors[0], request.tensors[0][:, 0].copy()])))

    with peer(serving(Signature((X,), (Y, Z)), answer)) as target, in_front_of(target.url, batch_size=3) as endpoint:
        answers = together(endpoint, rows(3), config=b"c")
    assert [answer["y"].tolist() for answer in answers] == [[[n, n]] for n in range(3)]
    assert [tuple(request.input_names) for request in requests] == [("x",)] * len(requests)
    assert [tuple(request.output_names) for request in requests] == [("y", "z")] * len(requests)
    assert {request.config for request in requests} == {b"c"}
    assert sum(len(request.tensors[0]) for request in requests) == 3


# --------------------------------------------------------------------------- targets of 2018

CAPTURES = Path(__file__).parent / "captures"
UNTYPED = graphpipe.encode_metadata(Signature((TensorSpec("x", "any", None),), (TensorSpec("y", "any", None),)))


def go_server(answer: Any) -> Any:
    """A server that says of its model what Go says, names only, and answers in chunks."""

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            if request.body == graphpipe.METADATA_REQUEST:
                conversation.answer(UNTYPED, "200 OK", "Content-Type: text/plain; charset=utf-8")
            else:
                answer(conversation, graphpipe.decode_request(request.body))

    return peer(script)


def chunked(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def test_a_recorded_answer_of_a_go_server_is_cut_into_its_rows() -> None:
    recorded = (CAPTURES / "reply-go-f32.bin").read_bytes()  # ones, [2, 3]
    seen: list[int] = []

    def answer(conversation: Conversation, request: Any) -> None:
        seen.append(len(request.tensors[0]))
        conversation.send(chunked(recorded))

    with go_server(answer) as target, in_front_of(target.url, batch_size=2, timeout_s=LONG_S) as endpoint:
        answers = together(endpoint, rows(2))
    assert seen == [2]
    assert [answer["y"].tolist() for answer in answers] == [[[1, 1, 1]], [[1, 1, 1]]]


def test_what_a_go_server_refuses_in_plain_text_fails_alone() -> None:
    def answer(conversation: Conversation, request: Any) -> None:
        (x,) = request.tensors
        if (x == 2).any():
            conversation.answer(b"bad row\n", "400 Bad Request", "Content-Type: text/plain; charset=utf-8")
        else:
            conversation.send(chunked(b"".join(graphpipe.encode_response([x]))))

    with go_server(answer) as target, in_front_of(target.url, batch_size=4, timeout_s=LONG_S) as endpoint:
        answers = together(endpoint, rows(4))
    assert isinstance(answers[2], InvalidRequest)
    assert "bad row" in str(answers[2])
    assert [answers[n]["y"].tolist() for n in (0, 1, 3)] == [[[n, n]] for n in (0, 1, 3)]


@pytest.mark.parametrize("status", ["500 Oops", "422 What"])
def test_what_a_server_refuses_with_a_bare_status_fails_alone_too(status: str) -> None:
    def answer(conversation: Conversation, request: Any) -> None:
        (x,) = request.tensors
        if (x == 1).any():
            conversation.answer(b"<html>", status)
        else:
            conversation.send(chunked(b"".join(graphpipe.encode_response([x]))))

    with go_server(answer) as target, in_front_of(target.url, batch_size=3, timeout_s=LONG_S) as endpoint:
        answers = together(endpoint, rows(3))
    assert isinstance(answers[1], Exception)
    assert [answers[n]["y"].tolist() for n in (0, 2)] == [[[n, n]] for n in (0, 2)]


def test_a_target_that_is_gone_is_503_for_all_and_is_not_asked_row_by_row() -> None:
    target = Target()
    with server_ref.running({"m": target.servable}) as url:
        port = url
        upstream = Upstream(Endpoint(port, 20, retry=NO_RETRY))
    with server_ref.running({"b": batcher(upstream, batch_size=4, timeout_s=LONG_S)}) as base:
        with Endpoint(base, 20, retry=NO_RETRY) as endpoint:
            answers = together(endpoint, rows(4))
    assert [type(answer) for answer in answers] == [ModelUnavailable] * 4
    assert "out of reach" in str(answers[0])


def test_a_deadline_travels_through_and_a_batch_goes_early_enough_for_it() -> None:
    target = Target()
    with proxied(target.servable, batch_size=100, timeout_s=LONG_S) as endpoint:
        with Endpoint(endpoint.url, 1.0, retry=NO_RETRY) as hasty:
            with contextlib.suppress(DeadlineExceeded):  # on a machine that is busy, the answer may come too late
                hasty.infer({"x": rows(1)[0]})
    assert target.calls == [(1, b"")]


def test_workers_are_calls_at_a_time() -> None:
    meet = threading.Barrier(3)

    def run(x: Array) -> Array:
        meet.wait(WAIT_S)
        return x

    slow = FunctionServable(run, [X], [Y])
    slow.concurrency = 3  # type: ignore[attr-defined]
    with proxied(slow, batch_size=1, workers=3) as endpoint:
        assert [answer["y"].tolist() for answer in together(endpoint, rows(3))] == [[[n, n]] for n in range(3)]


# --------------------------------------------------------------------------- the command


def test_its_flags_are_those_of_2018_with_their_values() -> None:
    args = _parser().parse_args(["--target-url", "http://h:1"])
    assert (args.listen, args.batch_size, args.timeout, args.workers) == ("127.0.0.1:10000", 10, 250, 1)
    short = _parser().parse_args(["--target-url", "u", "-l", "h:1", "-i", "a,b", "-o", "c", "-c", "-d", "f"])
    assert (short.listen, short.inputs, short.outputs, short.cache, short.cache_dir) == ("h:1", "a,b", "c", True, "f")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--target-url", "http://127.0.0.1:1"], "no connection|refused"),
        (["--target-url", "http://127.0.0.1:1", "--workers", "0"], "--workers"),
        (["--target-url", "ftp://h"], "http"),
    ],
)
def test_the_command_says_what_is_wrong_and_ends_with_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.slow
def test_the_command_serves_until_sigterm(tmp_path: Path) -> None:
    target = Target()
    with server_ref.running({"m": target.servable}) as url:
        command = [sys.executable, "-m", "server_ref.batcher", "--target-url", url, "-l", "127.0.0.1:0", "-o", "z,y"]
        more = ["--batch-size", "4", "--timeout", "10000", "--drain-grace-s", "0"]
        process = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        with process.stderr:
            base = ""
            while not base:
                line = process.stderr.readline()
                assert line, "it ended"
                found = re.search(r"http://127.0.0.1:\d+/", line)
                base = found[0] if found and " at " in line else ""
            with Endpoint(base, 20) as endpoint:
                assert [list(answer) for answer in together(endpoint, rows(4))] == [["z", "y"]] * 4
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
            process.stderr.read()
    assert target.calls == [(4, b"")]


def test_the_page_lists_every_flag_and_its_value() -> None:
    page = (Path(__file__).parents[1] / "docs" / "server-batching.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `-")
    ]
    documented = {flag: given.strip("`") for flags, _, given in rows for flag in re.findall(r"`(-[-\w]+)`", flags)}
    actions = [action for action in _parser()._actions if action.dest != "help"]
    assert set(documented) == {flag for action in actions for flag in action.option_strings}
    for action in actions:
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            assert float(documented[action.option_strings[-1]]) == action.default
