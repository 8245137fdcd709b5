"""Small blocks whose wiring is plain to see."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """One layer that reads every token, then two experts that read half of them each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Linear(8, 8)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(8, 16), "gate": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
            for _ in range(3)
        )
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x_BTD: Tensor) -> Tensor:
        tokens_MD = self.mix(x_BTD).flatten(0, 1)
        halves = []
        for expert, half_MD in zip(list(self.experts)[:2], tokens_MD.chunk(2), strict=True):
            halves.append(expert["fc2"](expert["fc1"](half_MD) * expert["gate"](half_MD)))
        return torch.cat(halves).view_as(x_BTD)


class Two(nn.Module):
    """x + first(x), and that plus second of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.first(x_BTD)
        return x_BTD + self.second(x_BTD)
