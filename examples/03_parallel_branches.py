"""Ask three teams' models at once, forward and backward, and learn how much each team's vote should count.

Needs, in a checkout: pip install '.[torch,server]'"""

import time

import torch
from torch import nn

import server_ref
from remote_ops import TensorSpec
from remote_ops.torch import Parallel, RemoteModule, TorchModel

FAR_S = 0.2  # how long each model takes, as one on a busy machine far away would


class Team(nn.Module):
    """What one team serves: what it sees of the truth, and its own noise."""

    def __init__(self, seed, error):
        super().__init__()
        self.error = error
        self.noise = nn.Linear(16, 3)
        nn.init.normal_(self.noise.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        time.sleep(FAR_S)
        return x[:, :3] + self.error * self.noise(x).sin()


class Vote(nn.Module):
    """Weighs the answers of the branches."""

    def __init__(self, branches):
        super().__init__()
        self.branches = branches
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        answers = torch.stack(self.branches(x), -1)
        return answers @ self.weight.softmax(0)


class OneByOne(Parallel):
    """The same branches without `Parallel`."""

    def forward(self, x):
        return tuple(branch(x) for branch in self.children())


def timed(name, vote, x):
    """Print how long forward and backward take; give the gradient at the inputs."""
    x = x.clone().requires_grad_()
    started = time.perf_counter()
    answer = vote(x)
    forward_s = time.perf_counter() - started
    answer.square().sum().backward()
    print(f"{name:24}{forward_s:12.2f} s{time.perf_counter() - started - forward_s:12.2f} s")
    return x.grad


if __name__ == "__main__":
    torch.manual_seed(0)
    inputs = [TensorSpec("x", "float32", (-1, 16))]
    teams = {name: TorchModel(Team(seed, error), inputs=inputs) for seed, (name, error) in enumerate(
        {"north": 0.1, "south": 1.0, "west": 2.0}.items())}  # fmt: skip
    with server_ref.running(teams) as url:
        modules = [RemoteModule(url + name) for name in teams]
        one_by_one, vote = Vote(OneByOne(*modules)), Vote(Parallel(*modules))
        compiled = torch.compile(vote, fullgraph=True)
        x = torch.randn(8, 16)
        compiled(x.clone().requires_grad_()).sum().backward()  # the first call compiles

        print(f"{f'three models, {FAR_S} s each':24}{'forward':>14}{'backward':>14}")
        gradients = [timed("one by one", one_by_one, x), timed("Parallel", vote, x), timed("compiled", compiled, x)]
        if not all(torch.allclose(gradient, gradients[0], atol=1e-6) for gradient in gradients):
            raise SystemExit("the gradients differ")

        optimizer = torch.optim.Adam(vote.parameters(), lr=0.5)
        for _ in range(8):
            x = torch.randn(64, 16)
            loss = (vote(x) - x[:, :3]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights = vote.weight.softmax(0).tolist()
    print("\nvotes: " + ", ".join(f"{name} {weight:.0%}" for name, weight in zip(teams, weights, strict=True)))
