"""`Parallel`, `start` and `max_rows`: what should be on its way at the same time is, and nothing stays behind.

That calls overlap is never a matter of time here: the models wait until all of them have been asked.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import server_ref  # noqa: E402
from remote_ops import FunctionServable, InternalError, SignatureError, SpecError, TensorSpec  # noqa: E402
from remote_ops.deadline import deadline  # noqa: E402
from remote_ops.errors import DeadlineExceeded, NotDifferentiable  # noqa: E402
from remote_ops.signature import DTYPES  # noqa: E402
from remote_ops.torch import Parallel, RemoteModule, started  # noqa: E402

# torch's own, where it imports its compiler and its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

PATIENCE_S = 20.0
FLOATS = ["float16", "bfloat16", "float32", "float64"]
TORCH_DTYPES = [name for name in DTYPES if hasattr(torch, name)]


class Meeting:
    """Where calls wait for each other: `parties` of a kind go on together, or fail. It counts them, too."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.calls: Counter[str] = Counter()
        self.barriers: dict[str, threading.Barrier] = {}
        self.hold = threading.Event()
        self.held = threading.Semaphore(0)

    def expect(self, **parties: int) -> None:
        self.barriers = {kind: threading.Barrier(count) for kind, count in parties.items()}

    def join(self, kind: str) -> None:
        self.calls[kind] += 1
        if kind in self.barriers:
            self.barriers[kind].wait(PATIENCE_S)

    def hold_on(self) -> None:
        """Let the test know that a call is here, and keep it until the test is over."""
        hold = self.hold
        self.held.release()
        hold.wait(PATIENCE_S)

    def await_held(self) -> None:
        assert self.held.acquire(timeout=PATIENCE_S)


MEETING = Meeting()
BRANCHES = 8


def floats(name: str, *, differentiable: bool = False, shape: tuple[int, ...] | None = (-1, 4)) -> TensorSpec:
    return TensorSpec(name, "float32", shape, differentiable=differentiable)


def at_once(servable: FunctionServable, calls: int = 2 * BRANCHES) -> FunctionServable:
    servable.concurrency = calls  # type: ignore[attr-defined]
    return servable


def squares(scale: float) -> FunctionServable:
    """`scale * x ** 2`: a call of it meets the others of its kind."""

    def run(x: Any) -> Any:
        MEETING.join("forward")
        return np.float32(scale) * x * x

    def vjp(primals: Any, cotangents: Any) -> Any:
        MEETING.join("backward")
        return {"x": np.float32(2 * scale) * primals["x"] * cotangents["y"]}

    return at_once(FunctionServable(run, [floats("x", differentiable=True)], [floats("y")], name="square", vjp=vjp))


class Squares(nn.Module):
    """The same, here."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Any) -> Any:
        return self.scale * x * x


def hold(x: Any) -> Any:
    MEETING.hold_on()
    return x


def hold_backward(primals: Any, cotangents: Any) -> Any:
    MEETING.hold_on()
    return {"x": cotangents["y"]}


def fail(x: Any) -> Any:
    MEETING.join("forward")
    raise RuntimeError("no luck")


def fail_backward(primals: Any, cotangents: Any) -> Any:
    MEETING.join("backward")
    raise RuntimeError("no luck")


def polar(radius: Any, angle: Any) -> Any:
    MEETING.join("forward")
    return radius * np.cos(angle), radius * np.sin(angle)


def polar_backward(primals: Any, cotangents: Any) -> Any:
    MEETING.join("backward")
    radius, angle = primals["radius"], primals["angle"]
    x, y = (cotangents.get(name, np.zeros_like(radius)) for name in "xy")
    return {
        "radius": x * np.cos(angle) + y * np.sin(angle),
        "angle": radius * (y * np.cos(angle) - x * np.sin(angle)),
    }


def local_polar(radius: Any, angle: Any) -> Any:
    return radius * torch.cos(angle), radius * torch.sin(angle)


def rows_times(x: Any, weight: Any) -> Any:
    MEETING.join("forward")
    return x * weight


def rows_times_backward(primals: Any, cotangents: Any) -> Any:
    MEETING.join("backward")
    y = cotangents["y"]
    return {"x": y * primals["weight"], "weight": (y * primals["x"]).sum(0)}


def refuse_13(x: Any) -> Any:
    if (x == 13).any():
        raise RuntimeError("no luck")
    MEETING.hold_on()
    return x


def same(name: str) -> FunctionServable:
    """`x * x` of any shape where that has a gradient, else `x`."""
    inputs = [TensorSpec("x", name, None, differentiable=name in FLOATS)]
    outputs = [TensorSpec("y", name, None)]
    if name not in FLOATS:
        return FunctionServable(lambda x: x, inputs, outputs)
    return FunctionServable(
        lambda x: x * x, inputs, outputs, vjp=lambda primals, given: {"x": 2 * primals["x"] * given["y"]}
    )


X = floats("x", differentiable=True)
MODELS = {
    **{f"square{index}": squares(index + 1.0) for index in range(BRANCHES)},
    "hold": at_once(FunctionServable(hold, [floats("x")], [floats("y")])),
    "hold-backward": at_once(FunctionServable(lambda x: x, [X], [floats("y")], vjp=hold_backward)),
    "fail": at_once(FunctionServable(fail, [floats("x")], [floats("y")])),
    "fail-backward": at_once(FunctionServable(lambda x: x, [X], [floats("y")], vjp=fail_backward)),
    "polar": at_once(
        FunctionServable(
            polar,
            [floats("radius", differentiable=True), floats("angle", differentiable=True)],
            [floats("x"), floats("y")],
            vjp=polar_backward,
        )
    ),
    "pick": FunctionServable(
        lambda x, index, scale: (x * np.float32(scale))[:, index],
        [X, TensorSpec("index", "int64", (-1,)), TensorSpec("scale", "float64", ())],
        [floats("y", shape=(-1, -1))],
        vjp=lambda primals, given: {
            "x": _scattered(primals["x"], primals["index"], given["y"] * np.float32(primals["scale"]))
        },
    ),
    "rows": at_once(
        FunctionServable(
            rows_times, [X, floats("weight", differentiable=True, shape=(4,))], [floats("y")], vjp=rows_times_backward
        )
    ),
    "refuse-13": at_once(FunctionServable(refuse_13, [floats("x")], [floats("y")])),
    **{f"same-{name}": same(name) for name in TORCH_DTYPES},
}


def _scattered(x: Any, index: Any, values: Any) -> Any:
    gradient = np.zeros_like(x)
    np.add.at(gradient, (slice(None), index), values)
    return gradient


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A real server of all `MODELS`; each at `<url><name>`."""
    with server_ref.running(MODELS) as url:
        yield url


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Whatever a test does, no call stays behind."""
    MEETING.reset()
    torch.manual_seed(0)
    yield
    MEETING.hold.set()
    for barrier in MEETING.barriers.values():
        barrier.abort()
    try:
        assert until(lambda: started.in_flight() == 0 or in_flight() == 0), f"{started.in_flight()} calls are left"
    finally:
        for number in list(started._STARTED):
            started.give_up(number)


def until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true; looked at until it does."""
    give_up_at = time.monotonic() + 5
    while not condition():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.01)
    return True


def in_flight() -> int:
    gc.collect()
    return started.in_flight()


def clients(url: str) -> int:
    """How many connections the server has, besides the one that asks."""
    with urllib.request.urlopen(f"{url}control/client_count") as answer:
        return int(answer.read()) - 1


def remotes(url: str, count: int, **options: Any) -> list[RemoteModule]:
    return [RemoteModule(f"{url}square{index}", **options) for index in range(count)]


def leaves(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple | list) else [value]


def total(value: Any) -> Any:
    """A number that every element of every output counts in, each output differently."""
    return sum((place + 1) * leaf.sin().sum() for place, leaf in enumerate(leaves(value)))


def batch(rows: int = 3) -> Any:
    return torch.rand(rows, 4, requires_grad=True)


# overlap: the models answer only once all branches have asked


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 4)


def around(layers: list[nn.Module]) -> tuple[nn.Module, ...]:
    return tuple(
        nn.Sequential(linear(index), nn.Sequential(nn.Tanh(), layer), linear(index + 50))
        for index, layer in enumerate(layers)
    )


def two_deep(layers: list[nn.Module]) -> tuple[nn.Module, ...]:
    return tuple(nn.Sequential(layer, nn.Tanh(), layers[-1 - index]) for index, layer in enumerate(layers))


SHAPES: dict[str, Callable[[list[nn.Module]], tuple[nn.Module, ...]]] = {
    "alone": tuple,
    "between local layers": around,
    "two in a row": two_deep,
    "nested": lambda layers: (layers[0], Parallel(*layers[1:])),
}


def eager(model: nn.Module, x: Any) -> Any:
    model_total = total(model(x))
    model_total.backward()
    return model_total.detach(), x.grad


def compiled(backend: str) -> Callable[..., Any]:
    def way(model: nn.Module, x: Any) -> Any:
        torch._dynamo.reset()
        result = torch.compile(lambda x: total(model(x)), backend=backend, fullgraph=True)(x)
        result.backward()
        return result.detach(), x.grad

    return way


def checkpointed(use_reentrant: bool) -> Callable[..., Any]:
    return lambda model, x: eager(lambda x: checkpoint(model, x, use_reentrant=use_reentrant), x)


def functional(model: nn.Module, x: Any) -> Any:
    gradient, value = torch.func.grad_and_value(lambda x: total(model(x)))(x.detach())
    return value, gradient


WAYS: dict[str, Any] = {
    "eager": eager,
    "aot_eager": compiled("aot_eager"),
    "inductor": compiled("inductor"),
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
    "torch.func.grad": functional,
}
ANY_WAY = [pytest.param(way, marks=pytest.mark.slow) if way == "inductor" else way for way in WAYS]


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ANY_WAY)
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("shape", ["alone", "between local layers"])
def test_branches_overlap_forward_and_backward(shape: str, count: int, way: str, url: str) -> None:
    expected = eager(Parallel(*SHAPES[shape]([Squares(index + 1.0) for index in range(count)])), x := batch())
    model = Parallel(*SHAPES[shape](remotes(url, count)))
    MEETING.expect(forward=count, backward=count)
    close(WAYS[way](model, x.detach().requires_grad_()), expected)
    assert MEETING.calls["backward"] == count
    assert MEETING.calls["forward"] == count * (2 if "checkpoint" in way else 1)


@pytest.mark.parametrize("way", ["eager", "aot_eager", "checkpoint", "torch.func.grad"])
@pytest.mark.parametrize(("shape", "calls"), [("two in a row", 8), ("nested", 4)])
def test_branches_of_several_calls_overlap(shape: str, calls: int, way: str, url: str) -> None:
    expected = eager(Parallel(*SHAPES[shape]([Squares(index + 1.0) for index in range(4)])), x := batch())
    model = Parallel(*SHAPES[shape](remotes(url, 4)))
    MEETING.expect(forward=4, backward=4)
    close(WAYS[way](model, x.detach().requires_grad_()), expected)
    assert MEETING.calls["backward"] == calls


@pytest.mark.slow
def test_a_compiled_checkpoint_overlaps_too(url: str) -> None:
    expected = eager(Parallel(Squares(1.0), Squares(2.0)), x := batch())
    MEETING.expect(forward=2, backward=2)
    model = Parallel(*remotes(url, 2))
    way = compiled("inductor")
    close(way(lambda x: checkpoint(model, x, use_reentrant=False), x.detach().requires_grad_()), expected)


def test_eight_branches_under_vmap_are_one_request_each(url: str) -> None:
    x = torch.rand(5, 4)
    MEETING.expect(forward=8, backward=8)
    model = Parallel(*remotes(url, 8))
    gradient = torch.func.vmap(torch.func.grad(lambda row: total(model(row[None]))))(x)
    twin = Parallel(*[Squares(index + 1.0) for index in range(8)])
    close(gradient, torch.func.vmap(torch.func.grad(lambda row: total(twin(row[None]))))(x))
    assert MEETING.calls == {"forward": 8, "backward": 8}


class Local(nn.Module):
    """A layer here that meets the remote ones, forward and backward."""

    def forward(self, x: Any) -> Any:
        return meet(x)


@torch.library.custom_op("remote_ops_tests::meet", mutates_args=())
def meet(x: torch.Tensor) -> torch.Tensor:
    MEETING.join("forward")
    return x.clone()


@torch.library.custom_op("remote_ops_tests::meet_backward", mutates_args=())
def meet_backward(gradient: torch.Tensor) -> torch.Tensor:
    MEETING.join("backward")
    return gradient.clone()


meet.register_fake(torch.empty_like)
meet_backward.register_fake(torch.empty_like)
meet.register_autograd(lambda ctx, gradient: meet_backward(gradient))


@pytest.mark.parametrize("way", [way for way in ANY_WAY if way != "torch.func.grad"])  # which knows no such op
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_local_branch_runs_while_the_remote_ones_are_on_their_way(place: int, way: str, url: str) -> None:
    branches: list[nn.Module] = [*remotes(url, 2)]
    branches.insert(place, Local())
    twins: list[nn.Module] = [Squares(1.0), Squares(2.0)]
    twins.insert(place, nn.Identity())
    expected = eager(Parallel(*twins), x := batch())
    MEETING.expect(forward=3, backward=3)
    close(WAYS[way](Parallel(*branches), x.detach().requires_grad_()), expected)


def test_what_is_local_before_a_remote_layer_runs_while_other_branches_are_on_their_way(url: str) -> None:
    behind = RemoteModule(FunctionServable(lambda x: x * x, [floats("x")], [floats("y")]))  # it meets nobody
    x = batch()
    MEETING.expect(forward=2)
    one, other = Parallel(nn.Sequential(Local(), behind), *remotes(url, 1))(x.detach())
    close((one, other), (x * x, x * x))


def test_branches_of_one_module_are_calls_of_their_own(url: str) -> None:
    model = Parallel(*[RemoteModule(f"{url}square1")] * 3)
    MEETING.expect(forward=3, backward=3)
    x = batch()
    sum(model(x)).sum().backward()
    close(x.grad, 12 * x.detach())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pure", [True, False])
def test_branches_of_one_module_compile(pure: bool, backend: str, url: str) -> None:
    torch._dynamo.reset()
    model = torch.compile(Parallel(*[RemoteModule(f"{url}square1", pure=pure)] * 3), backend=backend, fullgraph=True)
    x = batch()
    sum(model(x)).sum().backward()
    close(x.grad, 12 * x.detach())
    if not pure:
        assert MEETING.calls == {"forward": 3, "backward": 3}


def test_the_same_branch_in_two_parallels_compiles(url: str) -> None:
    torch._dynamo.reset()
    first, second, third = remotes(url, 3)
    pair, other_pair = Parallel(first, second), Parallel(first, third)
    x = batch()
    call = torch.compile(lambda x: sum(pair(x)) + sum(other_pair(x)), backend="aot_eager", fullgraph=True)
    call(x).sum().backward()
    close(x.grad, 14 * x.detach())


def test_impure_branches_overlap_when_compiled(url: str) -> None:
    MEETING.expect(forward=2, backward=2)
    expected = eager(Parallel(Squares(1.0), Squares(2.0)), x := batch())
    close(compiled("aot_eager")(Parallel(*remotes(url, 2, pure=False)), x.detach().requires_grad_()), expected)


def test_autocast_changes_no_answer(url: str) -> None:
    layer = linear(0)
    x = batch()
    with torch.autocast("cpu", torch.bfloat16):
        first, second = Parallel(nn.Sequential(layer, RemoteModule(f"{url}square0")), RemoteModule(f"{url}square1"))(x)
        (first.sum() + second.sum()).backward()
        expected = layer(x.detach()).float() ** 2
    assert (first.dtype, second.dtype) == (torch.float32, torch.float32)
    close(first.detach(), expected)
    assert x.grad is not None


def test_a_parallel_can_be_exported(url: str) -> None:
    rows = torch.export.Dim("rows")
    program = torch.export.export(Parallel(*remotes(url, 2)), (torch.rand(2, 4),), dynamic_shapes=[({0: rows},)])
    x = torch.rand(5, 4)
    MEETING.expect(forward=2)
    close(program.module()(x), (x * x, 2 * x * x))


def test_a_parallel_can_be_traced_by_fx(url: str) -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), Parallel(*remotes(url, 2))))
    x = torch.rand(2, 4)
    close(traced(x), (x * x, 2 * x * x))


# which gradients are asked for


def test_backward_runs_twice_if_the_graph_is_retained(url: str) -> None:
    x = batch()
    result = total(Parallel(*remotes(url, 2))(x))
    result.backward(retain_graph=True)
    once = x.grad.clone()
    MEETING.expect(backward=2)
    result.backward()
    close(x.grad, 2 * once)


def test_a_branch_that_nothing_depends_on_is_not_asked_for_a_gradient(url: str) -> None:
    x = batch()
    first, _, third = Parallel(*remotes(url, 3))(x)
    MEETING.expect(backward=2)
    (first + third).sum().backward()
    close(x.grad, 8 * x.detach())
    assert MEETING.calls == {"forward": 3, "backward": 2}


def test_the_layers_of_an_unused_branch_get_no_gradient_or_zeros(url: str) -> None:
    used, unused = linear(0), linear(1)
    first, second = remotes(url, 2)
    y, _ = Parallel(nn.Sequential(used, first), nn.Sequential(unused, second))(torch.rand(3, 4))
    y.sum().backward()
    assert used.weight.grad.abs().sum() > 0
    assert unused.weight.grad is None or not unused.weight.grad.any()
    assert MEETING.calls["backward"] == 1


def test_branches_have_losses_of_their_own(url: str) -> None:
    """As they do when the branches are called one by one: backward through one leaves the other as it was."""
    x = batch()
    first, second = Parallel(*remotes(url, 2))(x)
    first.sum().backward()
    close(x.grad, 2 * x.detach())
    second.sum().backward()
    close(x.grad, 6 * x.detach())


def test_a_backward_that_is_refused_leaves_nothing_behind(url: str) -> None:
    x = batch()
    result = total(Parallel(*remotes(url, 2))(x))
    result.backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()
    assert until(lambda: in_flight() == 0)


def test_inputs_that_need_no_gradient_cause_no_backward_request(url: str) -> None:
    parameter = torch.ones(4, requires_grad=True)
    (sum(Parallel(*remotes(url, 2))(torch.rand(3, 4))) * parameter).sum().backward()
    assert MEETING.calls == {"forward": 2}


@pytest.mark.parametrize("name", ["square1", "hold"])
@pytest.mark.parametrize("way", ["eager", "aot_eager", "checkpoint", "torch.func.grad"])
def test_one_branch_is_trained_and_the_others_are_as_they_are(way: str, name: str, url: str) -> None:
    """A branch that nothing is trained in has no gradient, and its model need not know any."""
    MEETING.hold.set()
    layer, x = linear(0), torch.rand(3, 4)
    model = Parallel(nn.Sequential(layer, RemoteModule(f"{url}square0")), RemoteModule(f"{url}{name}"))
    twin = Parallel(nn.Sequential(layer, Squares(1.0)), Squares(2.0) if name == "square1" else nn.Identity())
    weight = layer.weight.detach()
    expected = torch.func.grad(lambda weight: total(torch.func.functional_call(twin, {"0.0.weight": weight}, (x,))))
    if way == "torch.func.grad":
        call = torch.func.grad(lambda weight: total(torch.func.functional_call(model, {"0.0.weight": weight}, (x,))))
        close(call(weight), expected(weight))
    else:
        WAYS[way](model, x)
        close(layer.weight.grad, expected(weight))
    assert MEETING.calls["backward"] == 1


def test_a_branch_that_needs_no_gradient_gives_what_needs_none(url: str) -> None:
    model = Parallel(nn.Sequential(linear(0), RemoteModule(f"{url}square0")), RemoteModule(f"{url}square1"))
    assert [y.requires_grad for y in model(torch.rand(3, 4))] == [True, False]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_branches_overlap_and_keep_nothing(mode: Any, url: str) -> None:
    model = Parallel(*remotes(url, 2))
    x = batch()
    MEETING.expect(forward=2)
    with mode():
        results = model(x)
    assert not any(result.requires_grad for result in results)
    close(results[1], 2 * x.detach() ** 2)


def test_a_second_derivative_is_refused_by_name(url: str) -> None:
    x = batch()
    (gradient,) = torch.autograd.grad(total(Parallel(*remotes(url, 2))(x)), x, create_graph=True)
    with pytest.raises(NotDifferentiable, match="no second derivative"):
        gradient.sum().backward()


def test_forward_mode_is_refused_by_name(url: str) -> None:
    model, x = Parallel(*remotes(url, 2)), torch.rand(2, 4)
    with pytest.raises(NotDifferentiable, match="no forward-mode derivative"):
        torch.func.jvp(model, (x,), (x,))


@pytest.mark.parametrize("how", ["position", "name", "dict"])
def test_inputs_by_position_by_name_or_as_a_dict(how: str, url: str) -> None:
    radius, angle = batch(), batch()
    model = Parallel(RemoteModule(f"{url}polar"), RemoteModule(f"{url}polar", outputs=["y"]))
    MEETING.expect(forward=2, backward=2)
    if how == "dict":
        first, second = model({"radius": radius, "angle": angle})
        x, y, again = first["x"], first["y"], second["y"]
    else:
        (x, y), again = model(radius, angle) if how == "position" else model(angle=angle, radius=radius)
    total((x, y, again)).backward()
    twins = [leaf.detach().requires_grad_() for leaf in (radius, angle)]
    x, y = local_polar(*twins)
    total((x, y, y)).backward()
    close([radius.grad, angle.grad], [twin.grad for twin in twins])


def test_only_some_outputs_of_a_branch_may_be_used(url: str) -> None:
    radius, angle = batch(), batch()
    (_, y), (x, _) = Parallel(*[RemoteModule(f"{url}polar")] * 2)(radius, angle)
    total((x, y)).backward()
    twins = [leaf.detach().requires_grad_() for leaf in (radius, angle)]
    total(local_polar(*twins)).backward()
    close([radius.grad, angle.grad], [twin.grad for twin in twins])


# a good citizen among modules


def test_parallel_shows_the_parameters_of_its_branches(url: str) -> None:
    model = Parallel(nn.Sequential(RemoteModule(f"{url}square0"), nn.Linear(4, 2)), nn.Linear(4, 3))
    assert [*model.state_dict()] == ["0.1.weight", "0.1.bias", "1.weight", "1.bias"]
    assert len([*model.parameters()]) == 4
    assert f"{url}square0" in repr(model)
    twin = Parallel(nn.Sequential(RemoteModule(f"{url}square1"), nn.Linear(4, 2)), nn.Linear(4, 3))
    twin.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_overlap_as_well(again: Any, url: str) -> None:
    model = Parallel(nn.Sequential(linear(0), RemoteModule(f"{url}square0")), RemoteModule(f"{url}square1"))
    expected = eager(model, x := batch())
    MEETING.expect(forward=2, backward=2)
    close(eager(again(model), x.detach().requires_grad_()), expected)


def doubled(module: Any, inputs: Any, result: Any) -> Any:
    return 2 * result


@pytest.mark.parametrize("place", ["remote", "sequential"])
def test_hooks_of_a_branch_run(place: str, url: str) -> None:
    remote = RemoteModule(f"{url}square0")
    branch = nn.Sequential(remote, nn.Identity())
    (remote if place == "remote" else branch).register_forward_hook(doubled)
    x = batch()
    first, second = Parallel(branch, RemoteModule(f"{url}square1"))(x)
    (first + second).sum().backward()
    close(first, 2 * x * x)
    close(x.grad, 8 * x.detach())


def test_hooks_of_all_modules_run(url: str) -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        Parallel(nn.Sequential(RemoteModule(f"{url}square0"), nn.Tanh()), RemoteModule(f"{url}square1"))(
            torch.rand(1, 4)
        )
    finally:
        handle.remove()
    assert sorted(seen) == ["Parallel", "RemoteModule", "RemoteModule", "Sequential", "Tanh"]


class Scaled(RemoteModule):
    """A remote model with something of its own around it."""

    def forward(self, x: Any) -> Any:
        return 100 * super().forward(x)


def test_a_forward_of_ones_own_is_called(url: str) -> None:
    x = torch.rand(2, 4)
    close(Parallel(Scaled(f"{url}square0"), RemoteModule(f"{url}square1"))(x), (100 * x * x, 2 * x * x))


def in_func_grad(make: Callable[[], Any]) -> Any:
    made: list[Any] = []
    torch.func.grad(lambda x: (made.append(make()), x.sum())[1])(torch.ones(1))
    return made[0]


def in_inference_mode(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


@pytest.mark.parametrize("mode", [in_func_grad, in_inference_mode])
def test_a_module_may_be_made_in_any_mode(mode: Any, url: str) -> None:
    """As `remote(url, x)` makes it, at its first call."""
    model = mode(lambda: Parallel(*remotes(url, 2)))
    expected = eager(Parallel(Squares(1.0), Squares(2.0)), x := batch())
    close(eager(model, x.detach().requires_grad_()), expected)


# start and wait


def test_a_started_call_gives_what_calling_gives(url: str) -> None:
    module = RemoteModule(f"{url}polar")
    radius, angle = torch.rand(2, 4), torch.rand(2, 4)
    close(module.start(radius, angle=angle).wait(), module(radius, angle))
    close(module.start({"radius": radius, "angle": angle}).wait(), module({"radius": radius, "angle": angle}))


def test_started_calls_have_gradients(url: str) -> None:
    x = batch()
    first, second = (module.start(x) for module in remotes(url, 2))
    total((first.wait(), second.wait())).backward()
    close(x.grad, eager(Parallel(Squares(1.0), Squares(2.0)), x.detach().requires_grad_())[1])


def test_started_calls_overlap_with_what_runs_here(url: str) -> None:
    MEETING.expect(forward=2)
    call = RemoteModule(f"{url}square0").start(torch.ones(1, 4))
    MEETING.join("forward")
    assert call.wait().tolist() == [[1.0] * 4]


def test_a_call_is_waited_for_once(url: str) -> None:
    call = RemoteModule(f"{url}square0").start(torch.ones(1, 4))
    call.wait()
    with pytest.raises(SpecError, match="expected one wait for each start"):
        call.wait()


def test_another_thread_may_wait_for_a_call_and_go_backward(url: str) -> None:
    x = batch()
    call = RemoteModule(f"{url}square0").start(x)
    thread = threading.Thread(target=lambda: call.wait().sum().backward())
    thread.start()
    thread.join()
    close(x.grad, 2 * x.detach())


def test_a_compiled_function_may_start_and_wait_with_work_between(url: str) -> None:
    torch._dynamo.reset()
    module = RemoteModule(f"{url}square0")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(x: Any) -> Any:
        started_call = module.start(x)
        here = meet(x)
        return started_call.wait() + here

    MEETING.expect(forward=2)
    x = batch()
    y = call(x)
    y.sum().backward()
    close(y, x * x + x)
    close(x.grad, 2 * x.detach() + 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, at a graph break
def test_a_graph_may_break_between_start_and_wait(url: str) -> None:
    torch._dynamo.reset()
    module = RemoteModule(f"{url}square0")

    @torch.compile(backend="aot_eager")
    def call(x: Any) -> Any:
        started_call = module.start(x)
        torch._dynamo.graph_break()
        return started_call.wait()

    x = batch()
    call(x).sum().backward()
    close(x.grad, 2 * x.detach())


def test_a_dropped_call_is_cancelled_and_its_connection_closed(url: str) -> None:
    module = RemoteModule(f"{url}hold")
    before = clients(url)
    call = module.start(torch.ones(1, 4))
    MEETING.await_held()
    assert (started.in_flight(), clients(url)) == (1, before + 1)
    del call
    assert started.in_flight() == 0
    assert until(lambda: clients(url) <= before)


def test_a_dropped_call_that_was_answered_is_forgotten(url: str) -> None:
    call = RemoteModule(f"{url}square0").start(torch.ones(1, 4))
    next(iter(started._STARTED.values())).future.result(PATIENCE_S)
    assert started.in_flight() == 1
    del call
    assert started.in_flight() == 0


def test_an_unanswered_call_expires_whether_or_not_somebody_waits(url: str) -> None:
    module = RemoteModule(f"{url}hold", timeout_s=0.2)
    before = clients(url)
    with pytest.raises(DeadlineExceeded, match=r"no answer from .* in 0\.\d+ s"):
        module.start(torch.ones(1, 4)).wait()
    call = module.start(torch.ones(1, 4))
    assert until(lambda: clients(url) <= before)
    with pytest.raises(DeadlineExceeded):
        call.wait()


def test_an_answer_that_a_compiled_graph_does_not_wait_for_is_dropped(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(started, "KEEP_S", 0.05)
    monkeypatch.setattr(started, "_sweep_is_due", False)  # or the first look comes when the old KEEP_S is over
    torch._dynamo.reset()
    model = Parallel(*remotes(url, 2))
    first = torch.compile(lambda x: model(x)[0], backend="aot_eager", fullgraph=True)
    assert first(torch.ones(1, 4)).tolist() == [[1.0] * 4]
    assert until(lambda: started.in_flight() == 0)


@pytest.mark.parametrize("bad", [torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 5), torch.ones(4)])
def test_what_does_not_fit_is_refused_at_the_start(bad: Any, url: str) -> None:
    module = RemoteModule(f"{url}square0")
    with pytest.raises(SignatureError, match=r"input 'x': expected float32 \[-1, 4\], got float"):
        module.start(bad)
    with pytest.raises(SignatureError):
        Parallel(module, module)(bad)
    assert (MEETING.calls["forward"], started.in_flight()) == (0, 0)


def test_the_surrounding_deadline_bounds_a_start(url: str) -> None:
    module = RemoteModule(f"{url}hold", timeout_s=PATIENCE_S)
    with deadline(0.2):
        call = module.start(torch.ones(1, 4))
    with pytest.raises(DeadlineExceeded):
        call.wait()


def test_the_surrounding_deadline_bounds_a_wait(url: str) -> None:
    call = RemoteModule(f"{url}hold", timeout_s=6).start(torch.ones(1, 4))
    with deadline(0.2), pytest.raises(DeadlineExceeded) as caught:
        call.wait()
    assert "in 6.0" not in str(caught.value)


def test_the_surrounding_deadline_bounds_a_parallel_forward_and_backward(url: str) -> None:
    with deadline(0.2), pytest.raises(DeadlineExceeded):
        Parallel(RemoteModule(f"{url}hold"), RemoteModule(f"{url}square0"))(torch.ones(1, 4))
    x = batch()
    result = sum(Parallel(RemoteModule(f"{url}hold-backward"), RemoteModule(f"{url}square0"))(x)).sum()
    with deadline(0.2), pytest.raises(DeadlineExceeded):
        result.backward()


def test_local_models_are_started_too() -> None:
    module = RemoteModule(squares(2.0))
    x = torch.rand(2, 4)
    MEETING.expect(forward=3)
    calls = [module.start(x * factor) for factor in (1, 2)]
    MEETING.join("forward")
    close([call.wait() for call in calls], [2 * x * x, 8 * x * x])


@pytest.mark.parametrize("way", ["eager", "aot_eager", "torch.func.grad"])
def test_local_models_overlap_as_branches(way: str) -> None:
    expected = eager(Parallel(*[Squares(index + 1.0) for index in range(8)]), x := batch())
    model = Parallel(*[RemoteModule(squares(index + 1.0)) for index in range(8)])
    MEETING.expect(forward=8, backward=8)
    close(WAYS[way](model, x.detach().requires_grad_()), expected)


@pytest.mark.slow
def test_a_cotangent_is_sent_as_it_was(url: str) -> None:
    """A compiler writes other values to its memory as soon as the call has started."""
    torch._dynamo.reset()
    model = Parallel(*around(remotes(url, 2)))
    call = torch.compile(lambda x: total(model(x)), backend="inductor", fullgraph=True)
    x = torch.rand(500_000, 4, requires_grad=True)
    expected = eager(Parallel(*around([Squares(1.0), Squares(2.0)])), x.detach().requires_grad_())[1]
    for _ in range(3):
        x.grad = None
        call(x).backward()
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


class _Clearing(torch.autograd.Function):
    """Writes zeros to a tensor in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Any, victim: Any) -> Any:
        ctx.victim = victim
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        MEETING.join("cleared")
        ctx.victim.zero_()
        return gradient, None


class Clearing(nn.Module):
    def __init__(self, victim: Any) -> None:
        super().__init__()
        self.victim = victim

    def forward(self, x: Any) -> Any:
        return _Clearing.apply(x, self.victim)


def test_writing_to_a_cotangent_once_its_call_has_started_changes_nothing(url: str) -> None:
    """The backward of a local branch runs while the cotangent, 32 MB, is being sent."""
    x, cotangent = batch(2_000_000), torch.rand(2_000_000, 4)
    given = cotangent.clone()
    results = Parallel(RemoteModule(f"{url}square0"), Clearing(cotangent))(x)
    torch.autograd.backward(results, [cotangent, torch.zeros(()).expand_as(x)])
    assert MEETING.calls["cleared"] == 1
    assert not cotangent.any()
    close(x.grad, 2 * x.detach() * given)


@pytest.mark.parametrize("inference", [False, True])
def test_an_input_that_is_written_to_while_it_is_on_its_way_is_an_error_and_not_a_wrong_number(
    inference: bool, url: str
) -> None:
    """Under inference_mode torch counts no versions, so there what is sent is a copy."""
    x = -torch.rand(500_000, 4)
    expected = x * x
    model = Parallel(RemoteModule(f"{url}square0"), nn.ReLU(inplace=True))
    if not inference:
        with torch.no_grad(), pytest.raises(SpecError, match="an input was written to while it was on its way"):
            model(x)
        assert in_flight() == 0
        return
    with torch.inference_mode():
        close(model(x.clone())[0], expected)


# failures


@pytest.mark.parametrize("way", ["eager", "torch.func.grad"])
def test_a_branch_that_fails_ends_the_call_and_the_others_are_given_up(way: str, url: str) -> None:
    model = Parallel(RemoteModule(f"{url}fail"), *[RemoteModule(f"{url}hold")] * 2)
    before = clients(url)
    with pytest.raises(InternalError, match="no luck") as caught:
        WAYS[way](model, batch())
    # Whoever still holds the error does not keep the calls.
    assert until(lambda: in_flight() == 0)
    assert until(lambda: clients(url) <= before + 1)
    assert caught.value.code
    assert Parallel(*remotes(url, 2))(torch.ones(1, 4))[1].tolist() == [[2.0] * 4]


def test_a_branch_that_fails_last_waits_for_the_others_only(url: str) -> None:
    MEETING.expect(forward=3)
    with pytest.raises(InternalError, match="no luck"):
        Parallel(*remotes(url, 2), RemoteModule(f"{url}fail"))(torch.ones(1, 4))
    assert until(lambda: in_flight() == 0)


@pytest.mark.parametrize(
    ("name", "error"), [("", "shapes cannot be multiplied"), ("polar", "angle"), ("same-float64", "float64")]
)
def test_a_branch_that_cannot_start_gives_the_others_up(name: str, error: str, url: str) -> None:
    failing = RemoteModule(f"{url}{name}") if name else nn.Linear(5, 1)
    model = Parallel(RemoteModule(f"{url}hold"), failing)
    before = clients(url)
    with pytest.raises((RuntimeError, SignatureError), match=error):
        model(torch.ones(1, 4))
    assert until(lambda: in_flight() == 0)
    assert until(lambda: clients(url) <= before)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_gradient_that_fails_ends_the_backward_and_the_others_are_given_up(place: int, url: str) -> None:
    branches = remotes(url, 2)
    branches.insert(place, RemoteModule(f"{url}fail-backward"))
    x = batch()
    result = total(Parallel(*branches)(x))
    MEETING.expect(backward=3)
    with pytest.raises(InternalError, match="no luck"):
        result.backward()
    assert until(lambda: in_flight() == 0)
    MEETING.reset()  # and the next one works
    expected = eager(Parallel(Squares(1.0), Squares(2.0)), x.detach().requires_grad_())
    close(eager(Parallel(*remotes(url, 2)), x.detach().requires_grad_()), expected)


def test_a_branch_without_gradients_is_refused_and_the_others_are_given_up(url: str) -> None:
    x = batch()
    plain = RemoteModule(FunctionServable(lambda x: x, [floats("x")], [floats("y")]))
    result = total(Parallel(RemoteModule(f"{url}square0"), plain, RemoteModule(f"{url}square1"))(x))
    with pytest.raises(NotDifferentiable, match="gives no gradient"):
        result.backward()
    assert until(lambda: in_flight() == 0)


# any tensor


def some(dtype: str, *shape: int) -> Any:
    values = torch.arange(int(np.prod(shape))).reshape(shape) % 3 if shape else torch.tensor(2)
    return values.to(getattr(torch, dtype))


def bits(tensor: Any) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "rows": lambda x: x,
    "transposed": lambda x: x.transpose(2, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other": lambda x: x[::2, :, 1::2, ::2],
    "a slice": lambda x: x[1:3, :, 2:, :-1],
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
    "one element expanded": lambda x: x[0, 0, 0, 0].expand(2, 3),
    "no axes": lambda x: x[0, 0, 0, 0],
    "no rows": lambda x: x[:0],
    "no columns": lambda x: x[..., :0],
    "overlapping windows": lambda x: x.flatten().unfold(0, 6, 2),
    "diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
    "flipped": lambda x: x.flip(0),
}


def by_call(module: RemoteModule, x: Any) -> Any:
    return module(x)


def by_start(module: RemoteModule, x: Any) -> Any:
    return module.start(x).wait()


@pytest.mark.parametrize("call", [by_call, by_start])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("where", ["remote", "local"])
def test_every_dtype_goes_there_and_back(where: str, dtype: str, call: Any, url: str) -> None:
    module = RemoteModule(f"{url}same-{dtype}" if where == "remote" else MODELS[f"same-{dtype}"])
    for x in (some(dtype, 2, 4), some(dtype), some(dtype, 0, 4), some(dtype, 3, 4).T, some(dtype, 1, 4).expand(3, 4)):
        expected = x * x if dtype in FLOATS else x
        y = call(module, x)
        assert (y.dtype, y.shape, y.is_contiguous()) == (x.dtype, x.shape, True)
        assert bits(y) == bits(expected)
        before = bits(x)
        y.view(torch.uint8 if x.element_size() == 1 else x.dtype).zero_()
        assert bits(x) == before


@pytest.mark.parametrize("call", [by_call, by_start])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_of_any_layout_has_the_gradient_of_a_local_model(layout: str, dtype: str, call: Any, url: str) -> None:
    base = torch.rand(4, 3, 6, 8, dtype=torch.float64).to(getattr(torch, dtype)).requires_grad_()
    twin = base.detach().clone().requires_grad_()
    view, expected = LAYOUTS[layout](base), LAYOUTS[layout](twin) ** 2
    y = call(RemoteModule(f"{url}same-{dtype}"), view)
    torch.testing.assert_close(y, expected)
    # A cotangent that is no block of memory either.
    cotangent = torch.rand(*y.shape, 2, dtype=torch.float64).to(y.dtype)[..., 1]
    y.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(base.grad, twin.grad)
    assert base.grad.dtype == base.dtype


@pytest.mark.parametrize("way", ["eager", "aot_eager"])
def test_inputs_of_several_dtypes_have_gradients_where_they_are_floats(way: str, url: str) -> None:
    x, index, scale = batch(), torch.tensor([3, 0, 0]), torch.tensor(1.5, dtype=torch.float64)
    module = RemoteModule(f"{url}pick", batched=False)
    call = torch.compile(module, backend=way, fullgraph=True) if way != "eager" else module
    y = call(x, index, scale)
    y.sin().sum().backward()
    twin = x.detach().requires_grad_()
    (twin * 1.5)[:, index].sin().sum().backward()
    close(x.grad, twin.grad)
    assert (index.grad, scale.grad) == (None, None)


def test_a_float_without_a_gradient_says_so(url: str) -> None:
    x, scale = batch(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    y = RemoteModule(f"{url}pick", batched=False)(x, torch.tensor([0]), scale)
    with pytest.raises(NotDifferentiable, match="scale"):
        y.sum().backward()


@pytest.mark.parametrize("call", [by_call, by_start])
def test_gradients_of_a_local_model_share_no_memory(call: Any) -> None:
    """Nor do they with the cotangent, though the model gives that back, twice."""

    def vjp(primals: Any, cotangents: Any) -> Any:
        return {"a": cotangents["y"], "b": cotangents["y"]}

    model = FunctionServable(
        lambda a, b: a + b, [floats("a", differentiable=True), floats("b", differentiable=True)], [floats("y")], vjp=vjp
    )
    a, b, cotangent = batch(), batch(), torch.rand(3, 4)
    module = RemoteModule(model)
    y = module(a, b) if call is by_call else module.start(a, b).wait()
    first, second = torch.autograd.grad(y, [a, b], cotangent)
    expected = cotangent.clone()
    first.zero_()
    close(second, expected)
    close(cotangent, expected)


# pieces


def test_pieces_are_on_their_way_together_and_keep_their_order(url: str) -> None:
    module = RemoteModule(f"{url}square0", max_rows=4)
    x = torch.arange(120.0).reshape(30, 4).requires_grad_()
    MEETING.expect(forward=8, backward=8)
    y = module(x)
    y.sum().backward()
    close(y, x * x)
    close(x.grad, 2 * x.detach())
    assert MEETING.calls == {"forward": 8, "backward": 8}


def test_pieces_of_several_branches_overlap(url: str) -> None:
    model = Parallel(*remotes(url, 2, max_rows=4))
    x = batch(16)
    MEETING.expect(forward=8, backward=8)
    sum(model(x)).sum().backward()
    close(x.grad, 6 * x.detach())


def test_a_batch_that_is_small_enough_goes_whole(url: str) -> None:
    module = RemoteModule(f"{url}square0", max_rows=4)
    for rows in (0, 1, 4):
        assert module(torch.ones(rows, 4)).shape == (rows, 4)
    assert MEETING.calls == {"forward": 3}


def test_pieces_of_a_local_model_overlap() -> None:
    module = RemoteModule(squares(1.0), max_rows=1)
    x = batch(8)
    MEETING.expect(forward=8, backward=8)
    module(x).sum().backward()
    close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("call", ["call", "start", "aot_eager"])
def test_an_input_without_rows_goes_with_every_piece_and_its_gradients_add_up(call: str, url: str) -> None:
    module = RemoteModule(f"{url}rows", max_rows=2)
    x, weight = batch(7), torch.rand(4, requires_grad=True)
    MEETING.expect(forward=4, backward=4)
    if call == "start":
        y = module.start(x, weight).wait()
    else:
        y = (module if call == "call" else torch.compile(module, backend=call, fullgraph=True))(x, weight)
    cotangent = torch.rand(7, 4)
    y.backward(cotangent)
    close(y, x * weight)
    close([x.grad, weight.grad], [cotangent * weight.detach(), (cotangent * x.detach()).sum(0)])


def test_a_piece_that_fails_ends_the_call_and_the_others_are_given_up(url: str) -> None:
    module = RemoteModule(f"{url}refuse-13", max_rows=1)
    x = torch.ones(20, 4)
    x[5] = 13
    before = clients(url)
    with pytest.raises(InternalError, match="no luck"):
        module(x)
    assert until(lambda: clients(url) <= before + 1)
    MEETING.hold.set()  # and the next one works
    assert module(torch.ones(3, 4)).shape == (3, 4)
