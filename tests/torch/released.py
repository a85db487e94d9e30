"""What the tests of gradient release train, and how it is compared."""

from functools import partial

import torch
from makers import MAKERS, recommended
from torch import nn

from fusedbun import SM3, DecoupledLionW, FusedbunW, MupAdamW, TernaryVote, release_gradients

WORDS, WIDTH = 13, 8
NAN, INF = float("nan"), float("inf")


class Network(nn.Module):
    """A network whose first and last layers are one parameter, with parameters of 0, 1 and 2 axes."""

    def __init__(self, dtype=torch.float32, sparse=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(WORDS, WIDTH, sparse=sparse)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if not sparse:
            self.head.weight = self.embedding.weight
        self.to(dtype)

    def forward(self, words):
        x = self.embedding(words)
        return self.head(self.norm(torch.tanh(self.hidden(x)) * self.scale))


def loss_of(model, step, part=0):
    words = torch.randint(WORDS, (6, 2), generator=torch.Generator().manual_seed(100 * step + part))
    return nn.functional.cross_entropy(model(words[:, 0]).float(), words[:, 1])


def train(model, optimizer, steps, parts=1, scheduler=None, before_step=lambda: None):
    """Steps as one writes them; returns nothing that depends on a release."""
    for step in range(steps) if isinstance(steps, int) else steps:
        for part in range(parts):
            loss_of(model, step, part).backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def pair(make, named=False, **options):
    """Two networks of the same values, each with its optimizer."""
    models = [Network(**options) for _ in range(2)]
    if make is TernaryVote:
        for model in models:
            for param in model.parameters():
                param.data.sign_()
    return [(model, make(model.named_parameters() if named else model.parameters())) for model in models]


def released(model, optimizer, **options):
    return release_gradients(model, optimizer, **options)


def grads(model):
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def with_rate(make, **options):
    return partial(make, lr=0.05, **options)


SETTINGS = {
    **{name: (with_rate(make), torch.float32) for name, make in MAKERS.items()},
    "fusedbunw int8": (with_rate(FusedbunW), torch.float32),
    "fusedbunw bfloat16": (with_rate(FusedbunW, stochastic_rounding=True), torch.bfloat16),
    "fusedbun int8": (with_rate(recommended, momentum_dtype="int8"), torch.float32),
    "fusedbun bfloat16 int8": (
        with_rate(recommended, momentum_dtype="int8", stochastic_rounding=True),
        torch.bfloat16,
    ),
    "fusedbun bfloat16 int4": (
        with_rate(recommended, momentum_dtype="int4", stochastic_rounding=True, seed=3),
        torch.bfloat16,
    ),
    "fusedbun bfloat16 bfloat16": (with_rate(recommended, momentum_dtype="bfloat16"), torch.bfloat16),
    "sm3 bfloat16": (with_rate(SM3, stochastic_rounding=True), torch.bfloat16),
    "lion bfloat16 int8": (
        with_rate(DecoupledLionW, momentum_dtype="int8", stochastic_rounding=True),
        torch.bfloat16,
    ),
    "mup-adamw bfloat16": (
        with_rate(MupAdamW, mup=lambda path, param: "norm", momentum_dtype="int4", second_moment_dtype="bfloat16"),
        torch.bfloat16,
    ),
}


def clip_each(model, norm):
    for param in model.parameters():
        torch.nn.utils.clip_grad_norm_([param], norm)
