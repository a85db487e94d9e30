"""A process that trains a language model for a few steps and does nothing else: what the benchmark measures.

    python -m benchmarks.memory.training MODEL CONTENDER

It imports no more than the contender needs, holds one batch of few tokens, and prints the number of parameters and the
largest tensor's share of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 4  # so few that what they leave behind is small beside the model
STEPS = 3


@dataclass(frozen=True)
class Size:
    """A transformer's size: its vocabulary, longest text, width and layers."""

    vocabulary: int
    context: int
    width: int
    layers: int


SIZES = {"gpt2": Size(50257, 1024, 768, 12), "1b": Size(50257, 1024, 2048, 18), "none": Size(64, 8, 32, 1)}


def parameters(size: Size) -> int:
    """The number of parameters of a network of this size."""
    with torch.device("meta"):
        return sum(p.numel() for p in Model(size, tied=True).parameters())


class Block(nn.Module):
    """A layer of GPT-2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        batch, length, width = x.shape
        parts = self.inner(self.norms[0](x)).view(batch, length, 3, -1, min(64, width)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.outer(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    """GPT-2's network, whose output weights are those of the embedding if `tied`, and else not trained."""

    def __init__(self, size: Size, tied: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size.width) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.tied = tied

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting each token from those before it; untied, the mean square of the last layer."""
        x = self.norm(self.blocks(self.words(tokens) + self.places.weight[: tokens.shape[1]]))
        if not self.tied:
            return x.float().square().mean()
        scores = x[:, :-1] @ self.words.weight.T
        return nn.functional.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Contender:
    """An optimizer and how a model is trained with it.

    Args:
        title: what tables call it.
        module: where its class is.
        name: of the class.
        settings: its arguments.
        dtype: of the parameters.
        releases: whether gradients are released.
        tied: whether the output weights are the embedding's.
    """

    title: str
    module: str
    name: str
    settings: dict[str, Any]
    dtype: str = "float32"
    releases: bool = False
    tied: bool = False

    def make(self, model: nn.Module) -> tuple[Any, AbstractContextManager[Any]]:
        """The optimizer, and what to train within."""
        cls: Callable[..., Any] = getattr(import_module(self.module), self.name)
        params = model.named_parameters() if self.module == "fusedbun" else model.parameters()
        optimizer = cls(params, **{"lr": 1e-4, **self.settings})
        if not self.releases:
            return optimizer, nullcontext()
        import fusedbun

        return optimizer, fusedbun.release_gradients(model, optimizer)


class Dropped:
    """No optimizer: every gradient is freed as soon as it is complete.

    Args:
        params: the parameters.
        lr: nothing.
    """

    def __init__(self, params: Iterator[nn.Parameter], lr: float) -> None:
        for param in params:
            param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step(self) -> None:
        """Nothing."""

    zero_grad = step


_ROUNDED = {"stochastic_rounding": True}
_RECOMMENDED = {"centralize": True, "use_rms": True, "nesterov": True, **_ROUNDED}
_OURS = [
    ("SM3", "SM3", _ROUNDED),
    ("Fusedbun, int8", "Fusedbun", {**_RECOMMENDED, "momentum_dtype": "int8"}),
    ("Fusedbun, int4", "Fusedbun", {**_RECOMMENDED, "momentum_dtype": "int4"}),
    ("DecoupledLionW, int8", "DecoupledLionW", {**_ROUNDED, "momentum_dtype": "int8"}),
]
BARE = "no optimizer"  # gradients are dropped: what remains beside the model and the largest of them is activations
CONTENDERS: dict[str, Contender] = {
    contender.title: contender
    for contender in (
        Contender(BARE, "benchmarks.memory.training", "Dropped", {}, "bfloat16"),
        *(Contender(title, "fusedbun", name, given, "bfloat16", releases=True) for title, name, given in _OURS),
        *(
            Contender(f"{title}, tied", "fusedbun", name, given, "bfloat16", releases=True, tied=True)
            for title, name, given in _OURS[:1]
        ),
        *(
            Contender(f"{title}, gradients kept", "fusedbun", name, given, "bfloat16")
            for title, name, given in _OURS[:2]
        ),
        Contender("Fusedbun, float32", "fusedbun", "Fusedbun", {"centralize": True, "use_rms": True}),
        Contender("AdamW, fused", "torch.optim", "AdamW", {"fused": True}),
        Contender("AdamW, foreach", "torch.optim", "AdamW", {"foreach": True}),
        Contender("AdamW, fused, bfloat16", "torch.optim", "AdamW", {"fused": True}, "bfloat16"),
        Contender("Adafactor", "torch.optim", "Adafactor", {}),
        Contender("torch-SM3", "SM3", "SM3", {}),
        Contender("torchao AdamW8bit", "torchao.optim", "AdamW8bit", {}, "bfloat16"),
        Contender("bitsandbytes AdamW8bit", "bitsandbytes.optim", "AdamW8bit", {}, "bfloat16"),
    )
}


def main(model: str, contender: str) -> None:
    """Trains."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen, size = CONTENDERS[contender], SIZES[model]
    torch.set_default_dtype(getattr(torch, chosen.dtype))  # so that weights are never held in another one
    net = Model(size, chosen.tied)
    optimizer, training = chosen.make(net)
    counts = [p.numel() for p in net.parameters()]
    tokens = torch.randint(size.vocabulary, (1, min(TOKENS, size.context)))
    with training:
        for _ in range(STEPS):
            net(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(sum(counts), max(counts) / sum(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
