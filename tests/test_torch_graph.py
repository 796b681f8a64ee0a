"""A remote model in graphs: compiled, exported, traced and trained in several processes, by peers true and false.

The numbers in comments are those of the acceptance checks in the notes on remote ops.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from rawpeer import Conversation, Message, Peer, peer, serving  # noqa: E402
from torch import fx, nn  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.library import opcheck  # noqa: E402
from torchpeer import (  # noqa: E402
    ROOT,
    Noted,
    Served,
    agree,
    free_address,
    mix,
    mix_twin,
    pair,
    pair_twin,
    python,
    served,
    spec,
)

from remote_ops import (  # noqa: E402
    FunctionServable,
    InternalError,
    Retry,
    Signature,
    SignatureError,
    graphpipe,
)
from remote_ops.errors import BadStatus, ConnectionLost, DecodeError, ModelUnavailable  # noqa: E402
from remote_ops.torch import RemoteModule, remote, started  # noqa: E402

# What torch itself deprecates and still uses, in inductor, in export and in its tests of ops.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]
BACKENDS = ["aot_eager", "inductor"]
MANY = 20


def words() -> Noted:
    return Noted(
        lambda words: np.array([len(word) for word in words], np.int64),
        [spec("words", "string", (-1,))],
        [spec("n", "int64", (-1,))],
    )


def repeated() -> Noted:
    """As many columns as the largest number says: a size that only the call tells."""
    return Noted(
        lambda x: np.repeat(x[:, :1], max(1, int(x.max(initial=0))), axis=1),
        [spec("x", differentiable=True)],
        [spec("y", shape=(-1, -1))],
        vjp=lambda inputs, cotangents: {
            "x": np.pad(cotangents["y"].sum(1, keepdims=True), ((0, 0), (0, 3))).astype(np.float32)
        },
    )


def twice_the_rows() -> Noted:
    return Noted(
        lambda x: np.concatenate([x, x]),
        [spec("x", differentiable=True)],
        [spec("y")],
        vjp=lambda inputs, cotangents: {"x": cotangents["y"].reshape(2, -1, 4).sum(0)},
    )


@pytest.fixture(scope="module")
def all_served() -> Iterator[Served]:
    models = {
        "mix": mix(), "pair": pair(), "words": words(), "repeated": repeated(), "rows": twice_the_rows(),
        "half": Noted(
            lambda x: x * 2, [spec("x", "bfloat16", differentiable=True)], [spec("y", "bfloat16")],
            vjp=lambda inputs, cotangents: {"x": cotangents["y"] * 2},
        ),
        **{f"mix{number}": mix() for number in range(MANY)},
    }  # fmt: skip
    with served(models) as server:
        yield server


@pytest.fixture
def server(all_served: Served) -> Served:
    torch._dynamo.reset()
    all_served.forget()
    return all_served


def rows(*shape: int, seed: int = 0) -> Any:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def between_layers(servable: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), RemoteModule(servable, **options), nn.Linear(4, 2))


def twin_of(model: Any) -> Any:
    """The same layers around a local copy of the model."""
    return lambda x: model[2](mix_twin(model[0](x)))


# 1: one graph, for every batch size


def test_dynamo_explains_one_graph_without_a_break(server: Served) -> None:
    explained = torch._dynamo.explain(between_layers(server.url("mix")))(rows(3, 4))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_for_one_batch_size_serves_them_all(backend: str, pure: bool, server: Served) -> None:
    model, counter = between_layers(server.url("mix"), pure=pure), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for size in (3, 7, 5, 9):
        agree(compiled, model, rows(size, 4, seed=size))
        agree(compiled, twin_of(model), rows(size, 4, seed=size))
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 3
    assert server["mix"].counts == (12, 12)


@pytest.mark.slow
def test_compiled_without_a_word_on_sizes_learns_that_they_differ(server: Served) -> None:
    model, counter = between_layers(server.url("mix")), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in (3, 7, 5, 9):
        agree(compiled, model, rows(size, 4, seed=size))
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_values_do_not_depend_on_the_layout_in_memory(backend: str, server: Served) -> None:
    module = RemoteModule(server.url("mix"))
    compiled = torch.compile(lambda x: module(x.T).T, fullgraph=True, dynamic=True, backend=backend)
    for x in (rows(4, 5), rows(7, 4).T, rows(4, 1), rows(4, 0), rows(4, 1).expand(4, 6), rows(8, 12)[::2, 1::3]):
        agree(compiled, lambda x: mix_twin(x.T).T, x)


@pytest.mark.slow
@pytest.mark.parametrize("made", [np.asfortranarray, lambda x: x[::-1], lambda x: np.repeat(x, 2, 1)[:, ::2], np.array])
def test_compiled_a_local_model_may_give_back_any_memory(made: Any) -> None:
    torch._dynamo.reset()
    module = RemoteModule(FunctionServable(lambda x: made(x), [spec("x")], [spec("y")]))
    compiled = torch.compile(lambda x: module(x) * 2, fullgraph=True, dynamic=False, backend="inductor")
    for size in (1, 3):
        x = rows(size, 4)
        torch.testing.assert_close(compiled(x), torch.from_numpy(made(x.numpy()).copy()) * 2)
        torch.testing.assert_close(x, rows(size, 4))


@pytest.mark.slow
def test_many_threads_share_a_compiled_module(server: Served) -> None:
    compiled = torch.compile(RemoteModule(server.url("mix")), fullgraph=True, dynamic=True, backend="aot_eager")

    def run(number: int) -> None:
        for again in range(5):
            agree(compiled, mix_twin, rows(number + 2, 4, seed=again))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(run, number) for number in range(8)]:
            done.result()
    assert server["mix"].counts == (40, 40)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own look
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_compiles_as_a_whole(backend: str, server: Served) -> None:
    """Compiled autograd: the forward pass is eager, the backward pass a graph."""
    model = between_layers(server.url("mix"))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
        for size in (3, 5):
            agree(model, twin_of(model), rows(size, 4))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_inputs_and_outputs_compile(backend: str, server: Served) -> None:
    module = RemoteModule(server.url("pair"))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    agree(compiled, pair_twin, rows(3, 4), rows(3, 4, seed=1))
    agree(lambda a, b: compiled(a, b)[1], lambda a, b: pair_twin(a, b)[1], rows(3, 4), rows(3, 4, seed=1))


@pytest.mark.slow
def test_inputs_by_name_and_as_a_dict_compile(server: Served) -> None:
    module, a, b = RemoteModule(server.url("pair")), rows(3, 4), rows(3, 4, seed=1)
    by_name = torch.compile(lambda a, b: module(b=b, a=a), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(by_name(a, b), pair_twin(a, b))
    as_dict = torch.compile(lambda given: module(given), fullgraph=True, backend="aot_eager")
    product, total = pair_twin(a, b)
    torch.testing.assert_close(as_dict({"a": a, "b": b}), {"product": product, "total": total})
    torch.testing.assert_close(module({"a": a, "b": b}), {"product": product, "total": total})


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_under_no_grad_no_gradient_is_asked_for(backend: str, server: Served) -> None:
    model = between_layers(server.url("mix"))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(rows(3, 4)), twin_of(model)(rows(3, 4)))
    assert server["mix"].counts == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_only_the_gradient_that_is_needed_is_asked_for(backend: str, server: Served) -> None:
    compiled = torch.compile(RemoteModule(server.url("pair")), fullgraph=True, backend=backend)
    b = rows(3, 4).requires_grad_()
    compiled(rows(3, 4, seed=1), b)[0].sum().backward()
    assert server["pair"].calls[-1].wanted == ("gradient:b",)
    torch.testing.assert_close(b.grad, rows(3, 4, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_compiles(backend: str, server: Served) -> None:
    layer, module = nn.Linear(4, 4), RemoteModule(server.url("mix"))

    @torch.compile(fullgraph=True, backend=backend)
    def call(x: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return module(layer(x))

    y = call(rows(3, 4))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, mix_twin(layer(rows(3, 4))), atol=0.1, rtol=0.1)
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bfloat16_model_compiles_bit_for_bit(backend: str, server: Served) -> None:
    x = torch.tensor([[1.0, -0.0, float("inf"), 3e-39]] * 3, dtype=torch.bfloat16, requires_grad=True)
    y = torch.compile(RemoteModule(server.url("half")), fullgraph=True, backend=backend)(x)
    y.backward(x.detach())
    for got in (y, x.grad):
        assert torch.equal(got.view(torch.int16), (x * 2).view(torch.int16))


@pytest.mark.slow
def test_a_wrong_dtype_or_shape_is_refused_when_compiled_too(server: Served) -> None:
    compiled = torch.compile(RemoteModule(server.url("mix")), fullgraph=True, backend="aot_eager")
    for wrong in (rows(3, 5), rows(3, 4).double(), rows(4)):
        with pytest.raises(SignatureError, match=r"input 'x': expected float32 \[-1, 4\], got"):
            compiled(wrong)
    assert server["mix"].calls == []


# shapes that only the call tells


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_of_unknown_size_compiles(backend: str, server: Served) -> None:
    module, counter = RemoteModule(server.url("repeated")), CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda x: module(x) * 2, fullgraph=True, dynamic=True, backend=counter)
    for largest in (2.0, 5.0, 3.0):
        x = torch.tensor([[1.0, largest, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
        agree(compiled, lambda x: module(x) * 2, x)
        assert compiled(x).shape == (2, int(largest))
    assert counter.frame_count <= 2


def test_rows_that_come_and_go_are_refused_by_a_name_for_the_cure(server: Served) -> None:
    with pytest.raises(InternalError, match=r"output 'y': expected 3 rows.*got float32 \[6, 4\].*batched=False") as no:
        RemoteModule(server.url("rows"))(rows(3, 4))
    assert server.url("rows") in str(no.value)
    agree(RemoteModule(server.url("rows"), batched=False), lambda x: torch.cat([x, x]), rows(3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_come_and_go_compile_if_they_are_no_batch(backend: str, server: Served) -> None:
    compiled = torch.compile(
        RemoteModule(server.url("rows"), batched=False), fullgraph=True, dynamic=True, backend=backend
    )
    for size in (3, 5):
        agree(compiled, lambda x: torch.cat([x, x]), rows(size, 4))


# a model of strings


def test_a_model_of_strings_is_called_with_a_list_or_an_array(server: Served) -> None:
    module = RemoteModule(server.url("words"))
    for given in (["a", "bcd", ""], np.array(["a", "bcd", ""], object), ("a", "bcd", "")):
        assert module(given).tolist() == [1, 3, 0]
    assert module({"words": ["ab"]})["n"].tolist() == [2]


@pytest.mark.slow
def test_a_model_of_strings_works_in_what_is_compiled(server: Served) -> None:
    """Strings are no tensors, so a break in the graph is fair: a wrong answer or a crash is not."""
    module = RemoteModule(server.url("words"))
    compiled = torch.compile(lambda words, x: module(words) + x, backend="aot_eager")
    assert compiled(["a", "bcd"], torch.tensor([10, 20])).tolist() == [11, 23]


# 7: what compilers may merge


def calls_twice(module: Any) -> Callable[[Any], Any]:
    return lambda x: module(x).square() + module(x)


def calls_in_vain(module: Any) -> Callable[[Any], Any]:
    def call(x: Any) -> Any:
        module(x)
        return x * 2

    return call


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
def test_calls_that_may_be_merged_are_one_or_as_many_as_written(backend: str, server: Served) -> None:
    call = calls_twice(RemoteModule(server.url("mix")))
    agree(torch.compile(call, fullgraph=True, backend=backend), calls_twice(mix_twin), rows(3, 4))
    forwards, backwards = server["mix"].counts
    assert 1 <= forwards <= 2
    assert 1 <= backwards <= 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
def test_calls_that_may_not_be_merged_are_as_many_as_written(backend: str, server: Served) -> None:
    call = calls_twice(RemoteModule(server.url("mix"), pure=False))
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for again in (1, 2):
        agree(compiled, calls_twice(mix_twin), rows(3, 4, seed=again))
        assert server["mix"].counts == (2 * again, 2 * again)
    with torch.no_grad():
        torch.testing.assert_close(compiled(rows(3, 4)), calls_twice(mix_twin)(rows(3, 4)))
    assert server["mix"].counts == (6, 4)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
def test_a_call_that_may_not_be_dropped_runs_though_nobody_looks(backend: str, grad: bool, server: Served) -> None:
    call = calls_in_vain(RemoteModule(server.url("mix"), pure=False))
    x = rows(3, 4).requires_grad_(grad)
    y = torch.compile(call, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(y, x * 2)
    assert server["mix"].counts[0] == 1
    if grad:
        y.sum().backward()
        torch.testing.assert_close(x.grad, torch.full((3, 4), 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_that_do_something_keep_their_order(backend: str) -> None:
    done: list[str] = []

    def noting(name: str) -> FunctionServable:
        return FunctionServable(lambda x: (done.append(name), x)[1], [spec("x")], [spec("y")])

    first, second = (RemoteModule(noting(name), pure=False) for name in ("first", "second"))

    @torch.compile(fullgraph=True, backend=backend)
    def call(x: Any) -> Any:
        b = second(x)
        a = first(x)
        second(x)
        return a - b

    assert call(rows(3, 4)).tolist() == [[0.0] * 4] * 3
    assert done == ["second", "first", "second"]


# 12: many addresses, one graph


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_urls_share_one_compiled_function(backend: str, server: Served) -> None:
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def call(module: Any, x: Any) -> Any:
        return module(x) * 2

    for number in range(MANY):
        module, x = RemoteModule(server.url(f"mix{number}")), rows(3, 4, seed=number)
        agree(lambda x, module=module: call(module, x), lambda x: mix_twin(x) * 2, x)
    assert counter.frame_count == 1
    assert [server[f"mix{number}"].counts for number in range(MANY)] == [(1, 1)] * MANY


@pytest.mark.slow
def test_many_modules_of_a_server_that_came_late_share_a_compiled_function() -> None:
    """A graph for each is allowed, and torch allows eight of them."""
    torch._dynamo.reset()
    address, count = free_address(), 8
    modules = [RemoteModule(f"http://{address}/mix{number}", retry=Retry(1)) for number in range(count)]

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def call(module: Any, x: Any) -> Any:
        return module(x) * 2

    with served({f"mix{number}": mix() for number in range(count)}, address) as server:
        for number, module in enumerate(modules):
            x = rows(3, 4, seed=number)
            torch.testing.assert_close(call(module, x), mix_twin(x) * 2)
        assert [server[f"mix{number}"].counts for number in range(count)] == [(1, 0)] * count


@pytest.mark.slow
def test_one_graph_calls_many_urls(server: Served) -> None:
    modules = nn.ModuleList([RemoteModule(server.url(f"mix{number}")) for number in range(MANY)])
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda x: sum(module(x) for module in modules), fullgraph=True, backend=counter)
    agree(call, lambda x: mix_twin(x) * MANY, rows(3, 4), tolerance=1e-4)
    assert counter.frame_count == 1
    assert [server[f"mix{number}"].counts for number in range(MANY)] == [(1, 1)] * MANY


# a server that comes late


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_server_that_was_down_when_the_module_was_made_is_asked_again(compiled: bool) -> None:
    torch._dynamo.reset()
    address = free_address()
    module = RemoteModule(f"http://{address}/mix", retry=Retry(1))
    call = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else module
    with pytest.raises(Exception, match=address):
        call(rows(3, 4))
    with served({"mix": mix(), "other": mix()}, address) as server:
        agree(call, mix_twin, rows(3, 4))
        agree(call, mix_twin, rows(5, 4))
        assert server["mix"].counts == (2, 2)


def test_a_copy_of_a_module_whose_server_was_down_learns_by_itself() -> None:
    address = free_address()
    module = RemoteModule(f"http://{address}/mix", retry=Retry(1))
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    with served({"mix": mix(), "other": mix()}, address):
        for each in [*copies, module]:
            agree(each, mix_twin, rows(3, 4))


# remote(url, x)


def test_remote_is_a_call(server: Served) -> None:
    agree(lambda x: remote(server.url("mix"), x), mix_twin, rows(3, 4))
    agree(lambda x: remote([server.url("mix"), server.url("mix0")], x), mix_twin, rows(3, 4))
    agree(lambda x: remote(mix(), x), mix_twin, rows(3, 4))
    a, b = rows(3, 4), rows(3, 4, seed=1)
    torch.testing.assert_close(remote(server.url("pair"), b=b, a=a), pair_twin(a, b))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_remote_learns_nothing_from_the_mode_of_its_first_call(mode: Any, server: Served) -> None:
    url = f"{server.url('mix')}?{mode.__name__}"
    with mode():
        torch.testing.assert_close(remote(url, rows(3, 4)), mix_twin(rows(3, 4)))
    agree(lambda x: remote(url, x), mix_twin, rows(3, 4))


@pytest.mark.parametrize("around", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_remote_learns_nothing_from_the_transform_of_its_first_call(around: Any, server: Served) -> None:
    url, x = f"{server.url('mix')}?{around.__name__}", rows(3, 4)
    for _ in range(2):
        got = around(lambda x: remote(url, x).sum())(x)
        torch.testing.assert_close(got, around(lambda x: mix_twin(x).sum())(x))
        agree(lambda x: remote(url, x), mix_twin, x)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_remote_compiles(backend: str, server: Served) -> None:
    url = server.url("mix")
    compiled = torch.compile(lambda x: remote(url, x) * 2, fullgraph=True, dynamic=True, backend=backend)
    for size in (3, 7):
        agree(compiled, lambda x: mix_twin(x) * 2, rows(size, 4))
    assert server["mix"].counts == (2, 2)


# where and how a module is made


MADE = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "the meta device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("where", MADE)
def test_a_module_does_not_depend_on_where_it_is_made(where: str, server: Served) -> None:
    with MADE[where]():
        module = RemoteModule(server.url("mix"))
    agree(module, mix_twin, rows(3, 4))


# 6: a server that answers with something else


X, Y = spec("x", differentiable=True), spec("y")
SIGNATURE = Signature((X,), (Y,), name="liar")


class Liar:
    """A peer that doubles what it gets, until it is told to `say` something else, of outputs or of gradients."""

    def __init__(self) -> None:
        self.say: Callable[[Conversation, Any], None] | None = None
        self.about = "y"

    def answer(self, conversation: Conversation, message: Message) -> None:
        request = graphpipe.decode_request(bytearray(message.body))
        asked = "gradient:x" if "gradient:x" in request.output_names else "y"
        array = 2 * request.tensors[-1]  # the input, or the cotangent that follows it
        if self.say is not None and self.about == asked:
            self.say(conversation, array)
        else:
            tell(array)(conversation, array)


def tell(*arrays: Any) -> Callable[[Conversation, Any], None]:
    return lambda conversation, _: conversation.answer(b"".join(graphpipe.encode_response(arrays)))


def truncated(conversation: Conversation, array: Any) -> None:
    body = b"".join(graphpipe.encode_response([array]))
    conversation.answer(body[:-8])


def cut_off(conversation: Conversation, array: Any) -> None:
    body = b"".join(graphpipe.encode_response([array]))
    conversation.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode(), body[:-8])
    conversation.hang_up()


HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
# What is said; the class of the error; what of the message, beside the URL. {name} is the output or the gradient.
LIES: dict[str, tuple[Callable[[Conversation, Any], None], type[Exception], str]] = {
    "float64 for float32": (
        lambda c, array: tell(array.astype(np.float64))(c, array), InternalError,
        r"'{name}': expected float32 \[-1, 4\], got float64 \[3, 4\]",
    ),
    "whole numbers": (
        lambda c, array: tell(array.astype(np.int32))(c, array), InternalError,
        r"'{name}': expected float32 \[-1, 4\], got int32 \[3, 4\]",
    ),
    "another width": (
        lambda c, array: tell(array[:, :3].copy())(c, array), InternalError,
        r"'{name}': expected float32 \[-1, 4\], got float32 \[3, 3\]",
    ),
    "an axis too many": (
        lambda c, array: tell(array[None])(c, array), InternalError,
        r"'{name}': expected float32 \[-1, 4\], got float32 \[1, 3, 4\]",
    ),
    "a row too many": (
        lambda c, array: tell(np.concatenate([array, array[:1]]))(c, array), InternalError,
        r"'{name}': expected .*3.*, got float32 \[4, 4\]",
    ),
    "a row too few": (
        lambda c, array: tell(array[1:])(c, array), InternalError, r"'{name}': expected .*3.*, got float32 \[2, 4\]",
    ),
    "two for one": (lambda c, array: tell(array, array)(c, array), InternalError, "expected 1 outputs, got 2"),
    "none for one": (lambda c, array: tell()(c, array), InternalError, "expected 1 outputs, got 0"),
    "a truncated tensor": (truncated, DecodeError, "is no GraphPipe message"),
    "half an answer": (cut_off, ConnectionLost, "closed|ended|lost"),
    "an empty body": (lambda c, array: c.answer(b""), BadStatus, "200 with an empty body"),
    "HTML 502": (
        lambda c, array: c.answer(HTML, "502 Bad Gateway", "Content-Type: text/html"), ModelUnavailable,
        "answered 502: 502 Bad Gateway",
    ),
    "HTML 200": (
        lambda c, array: c.answer(HTML, "200 OK", "Content-Type: text/html"), BadStatus, "expected a GraphPipe message",
    ),
    "an error": (
        lambda c, array: c.answer(graphpipe.encode_error(13, "no luck"), "500 Oops"), InternalError, "no luck",
    ),
    "an error of code 200": (
        lambda c, array: c.answer(graphpipe.encode_error(13, "no luck")), InternalError, "no luck",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def liar() -> Iterator[tuple[Liar, Peer, dict[str, Any]]]:
    """What answers, its peer, and the same call through it by the name of how it runs."""
    torch._dynamo.reset()
    answering = Liar()
    with peer(serving(SIGNATURE, answering.answer)) as there:
        module = RemoteModule(there.url, retry=Retry(1), timeout_s=10.0)
        calls: dict[str, Any] = {"eager": lambda x: module(x) + 1}
        yield answering, there, calls


def call_of(calls: dict[str, Any], how: str) -> Any:
    if how not in calls:
        calls[how] = torch.compile(calls["eager"], fullgraph=True, backend=how)
    return calls[how]


@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("about", ["y", "gradient:x"])
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("how", ["eager", *[pytest.param(backend, marks=pytest.mark.slow) for backend in BACKENDS]])
def test_another_answer_is_an_error_of_its_own_and_never_a_number(how: str, lie: str, about: str, liar: Any) -> None:
    answering, there, calls = liar
    call = call_of(calls, how)
    answering.say = None
    agree(call, lambda x: x * 2 + 1, rows(3, 4))
    answering.say, kind, said = LIES[lie]
    answering.about = about
    x = rows(3, 4).requires_grad_()
    if about == "y":
        with pytest.raises(kind, match=said.format(name=about)) as caught:
            call(x)
    else:
        y = call(x)
        torch.testing.assert_close(y, x * 2 + 1)
        with pytest.raises(kind, match=said.format(name=about)) as caught:
            y.sum().backward()
    assert there.url in str(caught.value)
    assert type(caught.value) is kind
    assert x.grad is None
    answering.say = None
    agree(call, lambda x: x * 2 + 1, rows(3, 4))  # what failed has not hurt what follows


class Careless:
    """A servable of this process that checks nothing."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __repr__(self) -> str:
        return "Careless()"

    @property
    def signature(self) -> Signature:
        return SIGNATURE

    def infer(self, inputs: Any, outputs: Sequence[str] | None = None, **options: Any) -> Any:
        names = outputs or ["y"]
        return {name: np.ones((3, 4), np.float32) if name == "y" != self.about else self.result for name in names}

    about = "y"


@pytest.mark.parametrize(
    "wrong",
    [np.ones((3, 4)), np.ones((3, 3), np.float32), np.ones((4, 4), np.float32), None, "text", [[1.0] * 4] * 2],
    ids=["float64", "narrow", "a row too many", "none", "text", "a list"],
)
@pytest.mark.parametrize("about", ["y", "gradient:x"])
def test_a_servable_that_checks_nothing_is_checked(about: str, wrong: Any) -> None:
    careless = Careless(wrong)
    careless.about = about
    x = rows(3, 4).requires_grad_()
    module = RemoteModule(careless)
    with pytest.raises(InternalError, match=f"'{about}'.*Careless"):
        module(x).sum().backward()
    assert x.grad is None


# 4: the ops


def given_to(name: str, module: Any) -> tuple[Any, ...]:
    """Arguments for an op; a ticket among them is of a call that has been started."""
    handle, text = module._handle, module._text
    ops = torch.ops.remote_ops
    x, cotangent = rows(3, 4).requires_grad_(), rows(3, 4, seed=1)
    if name == "wait":
        return ops.start.default(handle, [x.detach()], 0, text), 0, 0, handle, [x], text
    if name == "wait_vjp":
        return ops.start_vjp.default(handle, [x.detach()], [cotangent], [0], [0], 0, text), [x.detach()], [0], text
    return {
        "infer": (handle, [x], text),
        "start": (handle, [x], 0, text),
        "vjp": (handle, [x.detach()], [cotangent], [0], [0], text),
        "start_vjp": (handle, [x.detach()], [cotangent], [0], [0], 0, text),
    }[name]


# Opcheck's last test runs an op eagerly and compiled and compares the numbers. A ticket is another number at each call,
# and can be waited for once, so ops that give or take one sit out that test; so do the ordered ones, of which it would
# compare the tokens of their order. Tests of compiled functions do for them what it does for the others.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("suffix", ["", "_ordered"])
@pytest.mark.parametrize("name", ["infer", "vjp", "start", "wait", "start_vjp", "wait_vjp"])
def test_every_op_passes_the_checks_of_torch(name: str, suffix: str, server: Served) -> None:
    module, op = RemoteModule(server.url("mix")), getattr(torch.ops.remote_ops, f"{name}{suffix}").default
    for check in CHECKS:
        opcheck(op, given_to(name, module), test_utils=check)
    if name in ("infer", "vjp"):
        opcheck(op, given_to(name, module), test_utils="test_aot_dispatch_dynamic")
    for number in list(started._STARTED):  # those of `start` that nobody waits for
        started.give_up(number)


# 4: exported programs

LOAD = """
import json, sys
import torch
if "without" not in sys.argv:
    import remote_ops.torch
program = torch.export.load(sys.argv[1]).module()
found = []
for size in (3, 5):
    x = torch.linspace(0, 1, size * 4).reshape(size, 4).requires_grad_()
    y = program(x)
    y.sum().backward()
    found.append([y.tolist(), x.grad.tolist()])
print(json.dumps(found))
"""


def exported(model: Any, path: Path, *, strict: bool) -> Path:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (rows(3, 4),), dynamic_shapes=({0: batch},), strict=strict)
    torch.export.save(program, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_runs_where_it_is_loaded(strict: bool, pure: bool, server: Served, tmp_path: Path) -> None:
    model = between_layers(server.url("mix"), pure=pure)
    done = python(LOAD, str(exported(model, tmp_path / "model.pt2", strict=strict)))
    assert done.returncode == 0, done.stderr
    for size, (y, gradient) in zip((3, 5), json.loads(done.stdout), strict=True):
        x = torch.linspace(0, 1, size * 4).reshape(size, 4).requires_grad_()
        right = twin_of(model)(x)
        right.sum().backward()
        torch.testing.assert_close(torch.tensor(y), right.detach())
        torch.testing.assert_close(torch.tensor(gradient), x.grad)
    assert server["mix"].counts == (2, 2)


@pytest.mark.slow
def test_an_exported_program_names_the_op_that_nobody_imported(server: Served, tmp_path: Path) -> None:
    path = exported(between_layers(server.url("mix")), tmp_path / "model.pt2", strict=False)
    done = python(LOAD, str(path), "without")
    assert done.returncode == 1
    assert "remote_ops.infer" in done.stderr
    assert "Please import the custom op" in done.stderr


def test_an_exported_program_outlives_the_module(server: Served) -> None:
    for servable in (server.url("mix"), mix()):
        batch = torch.export.Dim("batch")
        program = torch.export.export(
            nn.Sequential(RemoteModule(servable)), (rows(3, 4),), dynamic_shapes=({0: batch},)
        )
        agree(program.module(), mix_twin, rows(5, 4))
        agree(program.run_decompositions().module(), mix_twin, rows(5, 4))


SECRET = "s3cret-token-4711"


def text_of(path: Path) -> bytes:
    """All of a file; if it is an archive, all that is in it too."""
    found = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found += [archive.read(name) for name in archive.namelist()]
    return b"\0".join(found)


@pytest.mark.slow
def test_an_exported_program_keeps_no_secret(server: Served, tmp_path: Path) -> None:
    model = between_layers(server.url("mix"), headers={"Authorization": SECRET})
    path = exported(model, tmp_path / "model.pt2", strict=False)
    text = text_of(path)
    assert SECRET.encode() not in text
    done = python(LOAD, str(path))
    assert done.returncode == 1
    assert "SpecError: header 'Authorization' had a literal value" in done.stderr
    assert SECRET not in done.stderr


@pytest.mark.slow
def test_an_exported_program_reads_its_headers_where_it_runs(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHO", SECRET)
    model = between_layers(server.url("mix"), headers={"X-Who": "${WHO}"})
    path = exported(model, tmp_path / "model.pt2", strict=False)
    assert SECRET.encode() not in text_of(path)
    assert python(LOAD, str(path)).returncode == 0
    monkeypatch.delenv("WHO")
    done = python(LOAD, str(path))
    assert done.returncode == 1
    assert "needs the environment variable WHO" in done.stderr


@pytest.mark.slow
def test_an_exported_program_of_a_local_model_says_that_it_cannot_travel(tmp_path: Path) -> None:
    done = python(LOAD, str(exported(between_layers(mix()), tmp_path / "model.pt2", strict=False)))
    assert done.returncode == 1
    assert "SpecError: this graph calls FunctionServable(mix" in done.stderr
    assert "which lived in the process that made the graph: expected a RemoteModule(URL)" in done.stderr


UNPICKLE = """
import pickle, sys
import torch
module = pickle.load(open(sys.argv[1], "rb"))
print(module(torch.ones(1, 4)).tolist())
"""


@pytest.mark.slow
def test_a_pickled_module_keeps_no_secret_and_runs_in_another_process(server: Served, tmp_path: Path) -> None:
    path = tmp_path / "module.pickle"
    path.write_bytes(pickle.dumps(RemoteModule(server.url("mix"))))
    done = python(UNPICKLE, str(path))
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), mix_twin(torch.ones(1, 4)))

    path.write_bytes(pickle.dumps(RemoteModule(server.url("mix"), headers={"Authorization": SECRET})))
    assert SECRET.encode() not in path.read_bytes()
    done = python(UNPICKLE, str(path))
    assert "SpecError: header 'Authorization' had a literal value" in done.stderr


def test_torch_save_keeps_no_secret(server: Served, tmp_path: Path) -> None:
    model = between_layers(server.url("mix"), headers={"Authorization": SECRET})
    torch.save(model, tmp_path / "model.pt")
    assert SECRET.encode() not in text_of(tmp_path / "model.pt")
    assert SECRET not in repr(model)


# 9: a layer among layers


def test_a_model_with_a_remote_layer_is_a_model(server: Served) -> None:
    model = between_layers(server.url("mix"))
    assert [*model.state_dict()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len([*model.parameters()]) == 4
    other = nn.Sequential(nn.Linear(4, 4), RemoteModule(server.url("mix0")), nn.Linear(4, 2))
    other.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(other(rows(3, 4)), model(rows(3, 4)))
    assert server["mix0"].counts == (1, 0)
    assert f"RemoteModule(Endpoint('{server.url('mix')}'" in repr(model)
    assert not model.eval()[1].training
    assert model.train()[1].training


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_model_that_is_narrowed_keeps_the_dtypes_of_its_remote_layer(kind: Any, server: Served) -> None:
    model = between_layers(server.url("mix")).to(kind)
    with pytest.raises(SignatureError, match="input 'x': expected float32"):
        model(rows(3, 4).to(kind))
    assert model[1](rows(3, 4)).dtype == torch.float32
    whole = nn.Sequential(nn.Linear(4, 4), RemoteModule(server.url("half")), nn.Linear(4, 2)).bfloat16()
    whole(rows(3, 4).bfloat16()).sum().backward()
    assert whole[0].weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.cpu, lambda model: model.to_empty(device="cpu")])
def test_what_moves_parameters_leaves_the_address_alone(move: Any, server: Served) -> None:
    module = RemoteModule(server.url("mix"))
    move(nn.Sequential(nn.Linear(4, 4), module))
    agree(module, mix_twin, rows(3, 4))


def test_state_that_was_saved_brings_no_address_with_it(server: Served, tmp_path: Path) -> None:
    torch.save(between_layers(server.url("mix")).state_dict(), tmp_path / "state.pt")
    other = between_layers(server.url("mix0"))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other(rows(3, 4))
    assert (server["mix"].counts, server["mix0"].counts) == ((0, 0), (1, 0))


class Both(nn.Module):
    """Two inputs and two outputs between local layers."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.remote = RemoteModule(url)

    def forward(self, a: Any, b: Any) -> Any:
        product, total = self.remote(self.layer(a), b=b)
        return product - total


def test_fx_traces_through_a_remote_layer(server: Served) -> None:
    model = between_layers(server.url("mix"))
    traced = fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_function") == 2  # the call, and its only output
    agree(traced, model, rows(3, 4))
    agree(copy.deepcopy(traced), model, rows(3, 4))


def test_fx_traces_several_inputs_and_outputs(server: Served) -> None:
    model = Both(server.url("pair"))
    agree(fx.symbolic_trace(model), model, rows(3, 4), rows(3, 4, seed=1))


def test_fx_keeps_the_address_out_of_the_state(server: Served) -> None:
    model = between_layers(server.url("mix"))
    assert [*fx.symbolic_trace(model).state_dict()] == [*model.state_dict()]


def test_make_fx_traces_a_remote_layer_with_any_batch(server: Served) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    trace = make_fx(RemoteModule(server.url("mix")), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    traced = trace(rows(3, 4))
    torch.testing.assert_close(traced(rows(5, 4)), mix_twin(rows(5, 4)))


TRAIN = """
import os, sys
import torch
from torch import nn
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from remote_ops.torch import RemoteModule

rank, meeting, out, *urls = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
torch.manual_seed(rank)
model = nn.Sequential(nn.Linear(4, 4), RemoteModule(urls[rank]), nn.Linear(4, 2))
model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(10 * step + rank))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
torch.save(model.module.state_dict(), f"{out}.{rank}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_train_in_step_and_each_calls_its_own_url(server: Served, tmp_path: Path) -> None:
    import subprocess
    import sys

    argv = [str(tmp_path / "meeting"), str(tmp_path / "state"), server.url("mix0"), server.url("mix1")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(rank), *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for process in ranks:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    first, second = (torch.load(tmp_path / f"state.{rank}", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert (server["mix0"].counts, server["mix1"].counts) == ((3, 3), (3, 3))
