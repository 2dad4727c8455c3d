"""What all phases share: the training loop with its checkpoints, the optimisers, the averaged weights and the log.

The random numbers of a step depend only on the seed and the step's number, so an interrupted run continues bit for bit
as if it had not been interrupted.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

SAVE_SECONDS = 120.0
LOG_STEPS = 20
MATRIX_RATE = 3.0
"""Learning rate of matrices under Muon, as a multiple of the rate of the other weights."""


@dataclass(frozen=True)
class Plan:
    """How a phase trains, and for how long.

    Attributes:
        steps: Steps of the optimiser.
        batch: Samples per step.
        rate: Peak learning rate, reached after `warmup` steps and then reduced along a cosine to a fiftieth.
        decay: Decay of the averaged weights per step.
        stop_at: Stop after this step; a later run continues.
    """

    steps: int
    batch: int
    rate: float
    warmup: int = 100
    decay: float = 0.998
    seed: int = 0
    stop_at: int | None = None
    muon: bool = False
    """Whether matrices other than lookup tables are trained with Muon, which orthogonalises momentum."""


def generators(phase: str, seed: int, step: int) -> tuple[Generator, torch.Generator]:
    """The generators of numpy's and PyTorch's random numbers for one step."""
    key = [seed, step, *phase.encode()]
    rng = np.random.default_rng(key)
    return rng, torch.Generator().manual_seed(int(rng.integers(1 << 62)))


def train(
    phase: str,
    folder: Path,
    plan: Plan,
    model: nn.Module,
    loss_of: Callable[[Generator, torch.Generator], tuple[Tensor, dict[str, float]]],
    *,
    tell: Callable[[str], None] = print,
) -> nn.Module:
    """Train a model, or continue its training, and return it with its averaged weights.

    Args:
        folder: Where ``<phase>.pt`` and ``<phase>.jsonl`` are kept.
        loss_of: Returns the loss for one step's random numbers, and what else to log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run, log = Run(model, plan, folder / f"{phase}.pt"), Log(phase, folder, tell)
    last = plan.steps if plan.stop_at is None else min(plan.stop_at, plan.steps)
    saved = time.monotonic()
    while run.step < last:
        loss, notes = loss_of(*generators(phase, plan.seed, run.step))
        norm = run.advance(loss)
        log.add({"loss": float(loss.detach()), "norm": norm, **notes})
        if run.step % LOG_STEPS == 0 or run.step == last:
            log.write(run.step)
        if run.step == last or time.monotonic() - saved > SAVE_SECONDS:
            run.save()
            saved = time.monotonic()
    restore(run.parameters, run.averaged)
    return model


class Run:
    """A model that is trained by a plan, resumed from its checkpoint where one exists."""

    def __init__(self, model: nn.Module, plan: Plan, path: Path) -> None:
        self.model, self.plan, self.path, self.step = model, plan, path, 0
        self.parameters = [p.requires_grad_(True) for p in model.parameters()]
        self.optimisers = optimisers_of(model, plan)
        self.averaged = [p.detach().clone() for p in self.parameters]
        if path.exists():
            self.resume()

    def resume(self) -> None:
        state = torch.load(self.path, map_location=self.parameters[0].device)
        self.step = state["step"]
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        restore(self.parameters, state["model"])
        restore(self.averaged, state["averaged"])

    def save(self) -> None:
        state = {
            "step": self.step,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "model": [p.detach() for p in self.parameters],
            "averaged": self.averaged,
        }
        save(self.path, state)

    def advance(self, loss: Tensor) -> float:
        """Take a step that lowers a loss, and return the norm of the gradient before it was clipped to one."""
        for optimiser in self.optimisers:
            factor = MATRIX_RATE if isinstance(optimiser, Matrices) else 1.0
            for group in optimiser.param_groups:
                group["lr"] = factor * self.plan.rate * shape_of_rate(self.step, self.plan)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        follow(self.averaged, self.parameters, min(self.plan.decay, (1 + self.step) / (10 + self.step)))
        return float(norm)


class Log:
    """The mean of what is logged over some steps at a time, as a line of JSON, with the seconds per step."""

    def __init__(self, phase: str, folder: Path, tell: Callable[[str], None]) -> None:
        self.phase, self.path, self.tell = phase, folder / f"{phase}.jsonl", tell
        self.totals: dict[str, float] = {}
        self.count, self.begun = 0, time.monotonic()

    def add(self, notes: dict[str, float]) -> None:
        self.count += 1
        for name, value in notes.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def write(self, step: int) -> None:
        now = time.monotonic()
        line = {"step": step, **{name: round(total / self.count, 6) for name, total in self.totals.items()}}
        line["seconds"] = round((now - self.begun) / self.count, 3)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.tell(f"{self.phase} {json.dumps(line)}")
        self.totals, self.count, self.begun = {}, 0, now


class Matrices(torch.optim.Muon):
    """Muon for weights of any number of dimensions, each seen as a matrix with a row per output."""

    def __init__(self, weights: Sequence[nn.Parameter], rate: float) -> None:
        self.weights = weights
        self.views = [weight.data.flatten(1) for weight in weights]
        super().__init__(self.views, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> Any:
        for view, weight in zip(self.views, self.weights, strict=True):
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        return super().step(closure)  # type: ignore[no-untyped-call]


def optimisers_of(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """AdamW for all weights; with `muon`, Muon for those that multiply and AdamW for the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [
        p
        for name, p in named
        if plan.muon and name.endswith("weight") and p.ndim > 1 and "embedding.weight" not in name
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
    return [adam, Matrices(matrices, plan.rate)] if matrices else [adam]


def shape_of_rate(step: int, plan: Plan) -> float:
    """The learning rate of a step as a share of its peak."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def load_averaged(phase: str, folder: Path, model: Model) -> Model:
    """Load the averaged weights that a phase has reached into a model, and return the model."""
    restore(list(model.parameters()), torch.load(folder / f"{phase}.pt", map_location="cpu")["averaged"])
    return model


@torch.no_grad()
def follow(averaged: list[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - decay)


@torch.no_grad()
def restore(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def save(path: Path, state: Any) -> None:
    """Write a checkpoint, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    torch.save(state, partial)
    partial.replace(path)
