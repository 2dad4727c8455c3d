"""Train the text encoder alone, until everything that a scene shows can be read from every row of its caption.

Training with the denoiser would teach it the same, but only through a clip's error, and much more slowly.
"""

from pathlib import Path

import torch
from numpy.random import Generator
from tokenizers import Tokenizer as Tokens
from torch import Tensor, nn
from torch.nn import functional as F

from tools.tinywan.networks import Network, token_ids
from tools.tinywan.scenes import BACKGROUNDS, SIZES, Scene, caption, draw_scene
from tools.tinywan.training import Plan, train
from wanforge.runtime.measure.quality.figures import COLOURS, DIRECTIONS, SHAPES, SPEEDS

THING = (list(COLOURS), list(SHAPES), list(DIRECTIONS), list(SPEEDS), list(SIZES))
THINGS = 2


class Reader(nn.Module):
    """A text encoder with a linear layer that answers questions about the scene: the properties of each thing, with one
    more answer for a thing that does not exist, and the background."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.text_encoder, self.embed = network.text_encoder, network.embed
        self.choices = [len(names) + 1 for _ in range(THINGS) for names in THING] + [len(BACKGROUNDS)]
        self.answers = nn.Linear(network.model.dit.text_dim, sum(self.choices))

    def loss(self, prompts: list[list[int]], answers_BQ: Tensor) -> Tensor:
        """Mean cross entropy over all questions and all rows that are words."""
        rows_BTE = self.embed(prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        words = torch.arange(rows_BTE.shape[1]) < lengths[:, None]
        place = words.nonzero()[:, 0].to(rows_BTE.device)
        logits = self.answers(rows_BTE[words.to(rows_BTE.device)]).split(self.choices, -1)
        losses = [F.cross_entropy(one, answers_BQ[place, question]) for question, one in enumerate(logits)]
        return torch.stack(losses).mean()


def answers(scene: Scene) -> list[int]:
    """The right answers to a reader's questions about a scene."""
    found = []
    for place in range(THINGS):
        if place < len(scene.things):
            thing = scene.things[place]
            subject = thing.subject
            said = (subject.colour, subject.shape, subject.direction, subject.speed, thing.size)
            found += [names.index(name) for names, name in zip(THING, said, strict=True)]
        else:
            found += [len(names) for names in THING]
    return [*found, list(BACKGROUNDS).index(scene.background)]


def train_words(network: Network, tokens: Tokens, folder: Path, plan: Plan) -> Network:
    """Train the text encoder on captions alone."""
    video = network.model.video
    reader = Reader(network)

    def loss_of(rng: Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes = [draw_scene(rng, video.size_wh, video.frames) for _ in range(plan.batch)]
        prompts = [token_ids(tokens, caption(rng, scene)) for scene in scenes]
        right = torch.tensor([answers(scene) for scene in scenes], device=reader.answers.weight.device)
        return reader.loss(prompts, right), {}

    train("words", folder, plan, reader, loss_of)
    return network
