"""`Parallel`: branches on their way at the same time, forward and backward.

It orders starts and waits; how a call is made is `module`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook

from remote_ops.errors import SpecError
from remote_ops.torch.module import RemoteModule, Started

__all__ = ["Parallel"]


class Parallel(nn.Module):
    """Modules that take the same inputs; the remote ones among them answer at the same time.

    A branch is any module. A `RemoteModule`, alone or inside an `nn.Sequential`, is started with those of the other
    branches and waited for after them; everything else runs here, while the remote models compute. The backward pass
    overlaps the same way, in eager mode, compiled and under checkpointing. A module with hooks, or with a `forward` of
    its own, is called as a whole; so is a `Parallel` inside a branch, which waits for its own branches.

    Args:
        branches: two or more, as a rule.

    Raises:
        SpecError: a branch is no module.
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        for index, branch in enumerate(branches):
            if not isinstance(branch, nn.Module):
                what = "Parallel(a, b), without the list" if isinstance(branch, list | tuple) else "RemoteModule(URL)"
                raise SpecError(f"expected modules, got a {type(branch).__name__}; say {what}", path="branches")
            self.add_module(str(index), branch)

    def forward(self, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        """Call every branch with these inputs.

        Returns:
            What each branch gives, in order.

        Raises what the branches raise; the calls that are then on their way are given up.
        """
        branches = [branch for branch in self._modules.values() if branch is not None]
        if any(isinstance(value, fx.Proxy) for value in (*inputs, *named.values())):
            return tuple(branch(*inputs, **named) for branch in branches)  # the graph of torch.fx has no tickets
        lanes = [_Lane(branch, inputs, named) for branch in branches]
        if torch.compiler.is_compiling():
            return _run(lanes)
        try:
            return _run(lanes)
        except BaseException:
            for lane in lanes:
                lane.give_up()
            raise


def _run(lanes: list[_Lane]) -> tuple[Any, ...]:
    while True:
        waiting = [lane for lane in lanes if lane.is_remote()]
        for lane in waiting:
            lane.start_at_once()
        for lane in waiting:
            lane.start()
        for lane in lanes:
            lane.run_local()
        if not waiting:
            return tuple([lane.inputs[0] for lane in lanes])
        # In eager mode autograd runs the backward of the waits first by itself: they were recorded later.
        calls = [lane.call for lane in waiting if lane.call is not None]
        tickets = torch.cat([call.ticket for call in calls]) if torch.compiler.is_compiling() else None
        for index, (lane, call) in enumerate(zip(waiting, calls, strict=True)):
            lane.finish(call.wait() if tickets is None else call.wait(tickets, index))


class _Lane:
    """A branch on its way: what is left of it, the value it has come to, and the call that it waits for."""

    def __init__(self, branch: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.steps = _steps(branch)
        self.inputs = inputs
        self.named = named
        self.call: Started | None = None

    def is_remote(self) -> bool:
        """Whether a remote call is still to come."""
        return any(_is_remote(step) for step in self.steps)

    def start_at_once(self) -> None:
        """Start the next remote call, if nothing has to run before it."""
        if self.call is None and _is_remote(self.steps[0]):
            self.call = self.steps[0].start(*self.inputs, **self.named)  # type: ignore[operator]

    def start(self) -> None:
        """Run up to the next remote call, and start it."""
        while self.call is None:
            self.start_at_once()
            if self.call is None:
                self._step_over(self.steps[0](*self.inputs, **self.named))

    def run_local(self) -> None:
        """Run to the end, if no remote call is to come."""
        while self.steps and not self.is_remote():
            self._step_over(self.steps[0](*self.inputs, **self.named))

    def finish(self, value: Any) -> None:
        """Take the answer of the remote call."""
        self.call = None
        self._step_over(value)

    def give_up(self) -> None:
        """Cancel the call, if there is one."""
        if self.call is not None:
            self.call.give_up()

    def _step_over(self, value: Any) -> None:
        self.steps = self.steps[1:]
        self.inputs, self.named = (value,), {}


def _steps(branch: nn.Module) -> list[nn.Module]:
    """The modules that run one after the other."""
    if type(branch) is nn.Sequential and len(branch) and "forward" not in branch.__dict__ and not _has_hooks(branch):
        return [step for module in branch for step in _steps(module)]
    return [branch]


def _is_remote(module: nn.Module) -> bool:
    """Whether starting it and waiting for it is all that calling it would do."""
    if not isinstance(module, RemoteModule) or type(module).forward is not RemoteModule.forward:
        return False
    return "forward" not in module.__dict__ and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or bool(_has_any_global_hook())  # type: ignore[no-untyped-call]
