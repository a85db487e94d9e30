"""What is compared: how each optimizer is made in torch and in optax, and the middle of its first learning rates.

Every optimizer has the settings of its name and else its own defaults; nothing decays the weights, so that it is the
rules that are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

import fusedbun
from benchmarks.quality.altered import Cautious, RoundedMomentum
from benchmarks.quality.making import Make, Named, altered, in_jax, in_optax, of, own, own_chain
from fusedbun import Transform
from fusedbun.transforms import Centralize, Momentum, RMSScale, ScaleByAdam, SM3Accumulate, SparseMask

RECOMMENDED = {"centralize": True, "use_rms": True, "nesterov": True, "Lambda": 0.0}
PLAIN = {"Lambda": 0.0}
NO_MOMENTUM = {"momentum_beta": 0.0, "nesterov": False}
MEANS = {"beta": 0.95, "statistic": "mean"}
ADAMW, FUSEDBUN, SM3 = "AdamW", "Fusedbun, recommended", "SM3, momentum"
INT4, WITHOUT_MOMENTUM, OF_MEANS = "Fusedbun, momentum int4", "Fusedbun without momentum", "SM3 of means"
PUBLIC = "Fusedbun, first public"


@dataclass(frozen=True)
class Contender:
    """An optimizer.

    Args:
        title: what tables call it.
        rate: the middle of the learning rates that are tried first.
        make: makes it.
        ours: whether it is of this package.
        sparse: whether embeddings give it sparse gradients.
        schedule: its own share of the learning rate, from a step and the number of all; None: the workload's.
        dtype: what the network is trained in.
    """

    title: str
    rate: float
    make: Make
    ours: bool = True
    sparse: bool = False
    schedule: Callable[[int, int], float] | None = None
    dtype: str = "float32"

    @property
    def settings(self) -> str:
        """What it is, for the file."""
        schedule = f" under {self.schedule.__name__}" if self.schedule else ""
        dtype = "" if self.dtype == "float32" else f" in {self.dtype}"
        return f"{self.make.text}{' of sparse gradients' if self.sparse else ''}{schedule}{dtype}"


def _adagrad(params: Named, lr: float) -> torch.optim.Optimizer:
    torch.sparse.check_sparse_tensor_invariants.disable()  # as it is; but torch warns where nobody says so
    return torch.optim.Adagrad([p for _, p in params], lr)


def mup_type(path: tuple[str, ...], param: Any) -> str:
    """The u-muP type of a parameter of the networks here."""
    if path[-1] == "bias":
        return "bias"
    return "output" if "output" in path else "weight"


_MUP = Contender("MupAdamW", 0.06, own("MupAdamW", mup=mup_type))
IN_TORCH = (
    Contender(FUSEDBUN, 4e-4, own("Fusedbun", **RECOMMENDED)),
    Contender("Fusedbun, default", 0.02, own("Fusedbun", **PLAIN)),
    Contender("Fusedbun, lagged", 4e-4, own("Fusedbun", **RECOMMENDED, lagged=True)),
    Contender(INT4, 4e-4, own("Fusedbun", **RECOMMENDED, momentum_dtype="int4")),
    Contender(WITHOUT_MOMENTUM, 4e-3, own("Fusedbun", **RECOMMENDED | NO_MOMENTUM)),
    Contender(SM3, 0.1, own("SM3", momentum=0.9)),
    Contender("SM3", 0.1, own("SM3")),
    Contender(OF_MEANS, 4e-3, own("SM3", **MEANS)),
    Contender("ScaledOptum", 1e-3, own("ScaledOptum")),
    _MUP,
    Contender("DecoupledLionW", 4e-4, own("DecoupledLionW")),
    Contender(ADAMW, 4e-3, of("torch.optim", "AdamW", weight_decay=0.0), ours=False),
    Contender("NAdamW", 4e-3, of("torch.optim", "NAdam", decoupled_weight_decay=True), ours=False),
    Contender("Adafactor", 0.02, of("torch.optim", "Adafactor"), ours=False),
    Contender("SM3 (torch-SM3), momentum", 0.1, of("SM3", "SM3", momentum=0.9), ours=False),
    Contender("Lion (lion-pytorch)", 4e-4, of("lion_pytorch", "Lion"), ours=False),
    Contender(PUBLIC, 1e-3, of("benchmarks.quality.published", "FirstFusedbun", Lambda=0.0), ours=False),
)
WITHOUT_TYPES = tuple(x for x in IN_TORCH if x is not _MUP)  # u-muP's types are those of dense networks here
SPARSE = (
    Contender("SM3, sparse gradients", 0.1, own("SM3"), sparse=True),
    Contender("SparseAdam, sparse gradients", 4e-3, of("torch.optim", "SparseAdam"), ours=False, sparse=True),
    Contender("Adagrad, sparse gradients", 0.1, Make("torch.optim.Adagrad()", _adagrad), ours=False, sparse=True),
)


def _of_its_authors(step: int, steps: int) -> float:
    """SM3's schedule, with the warm-up of all others."""
    return fusedbun.sm3_schedule(steps // 10, steps)(step)


def _of_titles(*titles: str) -> tuple[Contender, ...]:
    by_title = {x.title: x for x in (*IN_TORCH, *VARIANTS)}
    return tuple(by_title[title] for title in titles)


def _fusedbun(**given: Any) -> Make:
    return own("Fusedbun", **RECOMMENDED | given)


def _like_fusedbun(*scaling: Transform) -> Make:
    """Fusedbun, recommended, from its parts, with another scaling."""
    return own_chain(Centralize(), SparseMask(), *scaling, Momentum(0.9, nesterov=True))


def _like_sm3(accumulate: SM3Accumulate, nesterov: bool = False) -> Make:
    """SM3 with momentum, from its parts, with another accumulation or momentum."""
    return own_chain(accumulate, RMSScale(0.0, 1e-30), Momentum(0.9, dampening=0.9, nesterov=nesterov))


VARIANTS = (
    Contender("Fusedbun without nesterov", 4e-4, _fusedbun(nesterov=False)),
    Contender("Fusedbun without centralize", 4e-4, _fusedbun(centralize=False)),
    Contender("Fusedbun, clip_rms=1", 4e-4, _fusedbun(clip_rms=1.0)),
    Contender("Fusedbun, cautious", 4e-4, altered(Cautious, _fusedbun())),
    Contender("Fusedbun, momentum in 3 bits", 4e-4, altered(RoundedMomentum, _fusedbun(), bits=3)),
    Contender("Fusedbun, beta_decay=0.95", 4e-4, _fusedbun(beta_decay=0.95)),
    Contender("Fusedbun without momentum or centralize", 4e-3, _fusedbun(**NO_MOMENTUM, centralize=False)),
    Contender("Fusedbun without centralize, beta_decay=0.95", 4e-4, _fusedbun(centralize=False, beta_decay=0.95)),
    Contender("Fusedbun, beta_decay=0.999", 4e-4, _fusedbun(beta_decay=0.999)),
    Contender("Fusedbun, combine minimum", 4e-4, _like_fusedbun(SM3Accumulate(0.8, "mean", "min"), RMSScale(1e-8))),
    Contender("Fusedbun, full second moment", 4e-4, _like_fusedbun(ScaleByAdam(0.0, 0.8))),
    Contender("SM3, nesterov", 0.1, _like_sm3(SM3Accumulate(), nesterov=True)),
    Contender("SM3, its authors' schedule", 0.1, own("SM3", momentum=0.9), schedule=_of_its_authors),
    Contender("SM3, beta 0.95", 4e-3, own("SM3", momentum=0.9, beta=0.95)),
    Contender("SM3, mean and minimum, beta 0.95", 4e-3, own("SM3", momentum=0.9, **MEANS)),
    Contender("SM3, mean and product, beta 0.95", 4e-3, _like_sm3(SM3Accumulate(0.95, "mean", "product"))),
    Contender("AdamW, betas 0.9, 0.95", 4e-3, of("torch.optim", "AdamW", betas=(0.9, 0.95), weight_decay=0.0), False),
)
# A run takes long: few take part, and their learning rates begin at a twentieth of those for networks from scratch.
_FINE = (FUSEDBUN, INT4, WITHOUT_MOMENTUM, SM3, "SM3", OF_MEANS, "DecoupledLionW", ADAMW, "Adafactor")
TO_FINE_TUNE = tuple(replace(x, rate=x.rate / 20) for x in _of_titles(*_FINE))
# Longer runs: who ended first in the short ones, what makes Fusedbun's state smaller, and what restores SM3.
LONGER = _of_titles(
    *(FUSEDBUN, "Fusedbun, lagged", INT4, WITHOUT_MOMENTUM),
    *(SM3, "SM3", OF_MEANS, "SM3, mean and minimum, beta 0.95", "SM3, mean and product, beta 0.95"),
    *(ADAMW, "NAdamW", "Adafactor"),
)
TO_ADAPT = tuple(replace(x, rate=x.rate / 2) for x in _of_titles(FUSEDBUN, INT4, ADAMW))


def _fusedbunw(title: str, dtype: str = "float32", **given: Any) -> Contender:
    return Contender(title, 4e-3, own("FusedbunW", weight_decay=0.0, **given), dtype=dtype)


# At AdamW's learning rate, in its place: nobody is tuned.
IN_PLACE = (
    _fusedbunw("FusedbunW"),
    _fusedbunw("FusedbunW, momentum float32", momentum_dtype=None),
    _fusedbunw("FusedbunW, momentum int4", momentum_dtype="int4"),
    _fusedbunw("FusedbunW in bfloat16", "bfloat16", stochastic_rounding=True),
    _fusedbunw("FusedbunW, not lagged", lagged=False),
    _fusedbunw("FusedbunW without clip", clip=None),
    *_of_titles(ADAMW, "NAdamW", "Adafactor"),
    Contender(
        "AdamW in 8 bits (bitsandbytes)", 4e-3, of("bitsandbytes.optim", "AdamW8bit", weight_decay=0.0), ours=False
    ),
)
AS_REPORTED = (
    Contender("AdamW", 0, of("torch.optim", "AdamW", weight_decay=0.01), ours=False),
    Contender("Fusedbun, recommended", 0, own("Fusedbun", **RECOMMENDED | {"Lambda": 0.01})),
    *(
        Contender(f"{PUBLIC}, {how}", 0, of("benchmarks.quality.published", "FirstFusedbun", rule=how), ours=False)
        for how in ("described", "written", "before the mask")
    ),
)


def _optax_sm3(schedule: Any) -> Any:
    """`optax.sm3`, which takes no schedule itself, from its parts."""
    optax = import_module("optax")
    return optax.chain(optax.scale_by_sm3(0.9), optax.scale_by_learning_rate(schedule))


IN_JAX = (
    Contender(FUSEDBUN, 4e-4, in_jax("fusedbun", **RECOMMENDED)),
    Contender("Fusedbun, default", 0.02, in_jax("fusedbun", **PLAIN)),
    Contender("Fusedbun, lagged", 4e-4, in_jax("fusedbun", **RECOMMENDED, lagged=True)),
    Contender("Fusedbun, lagged, clip_rms=1", 4e-4, in_jax("fusedbun", **RECOMMENDED, lagged=True, clip_rms=1.0)),
    Contender(INT4, 4e-4, in_jax("fusedbun", **RECOMMENDED, momentum_dtype="int4")),
    Contender(WITHOUT_MOMENTUM, 4e-3, in_jax("fusedbun", **RECOMMENDED | NO_MOMENTUM)),
    Contender(SM3, 0.1, in_jax("sm3", momentum=0.9)),
    Contender("SM3", 0.1, in_jax("sm3")),
    Contender(OF_MEANS, 4e-3, in_jax("sm3", **MEANS)),
    Contender("ScaledOptum", 1e-3, in_jax("scaled_optum")),
    Contender("MupAdamW", 0.06, in_jax("mup_adamw", mup=mup_type)),
    Contender("DecoupledLionW", 4e-4, in_jax("decoupled_lionw")),
    Contender(ADAMW, 4e-3, in_optax("adamw", weight_decay=0.0), ours=False),
    Contender("NAdamW", 4e-3, in_optax("nadamw", weight_decay=0.0), ours=False),
    Contender("Adafactor", 0.02, in_optax("adafactor"), ours=False),
    Contender("SM3 (optax), momentum", 0.1, Make("optax.scale_by_sm3(0.9)", _optax_sm3), ours=False),
    Contender("Lion (optax)", 4e-4, in_optax("lion", weight_decay=0.0), ours=False),
)
