"""What is learnt: each workload with its contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from benchmarks.quality import contenders, data, in_torch, minilm
from benchmarks.quality.contenders import Contender

Advance = Callable[[], None]
Run = Callable[[Contender, float, int, str, Advance], dict[str, Any]]


@dataclass(frozen=True)
class Workload:
    """Something to learn, and who learns it.

    Args:
        name: of the command line and of the file.
        title: what tables call it.
        about: the network, in words.
        batch: the examples of a batch.
        steps: of a run.
        schedule: the learning rate's, in words.
        run: trains once: with a contender, a learning rate, a seed, the part of the data to look at in the end, and
            what to call after each step.
        contenders: the optimizers.
        seeds: those that are tested.
        tuning_seeds: those that choose the learning rate.
        rates: the learning rates, if they are given and the same for all.
        beside: the workload whose results those of an ablation stand beside, or which gives AdamW's learning rate.
        shares: of AdamW's learning rate there: those that everybody is tested with, where nobody is tuned.
    """

    name: str
    title: str
    about: str
    batch: int
    steps: int
    schedule: str
    run: Run
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    tuning_seeds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] = ()
    beside: str | None = None
    shares: tuple[float, ...] = ()

    @property
    def protocol(self) -> dict[str, Any]:
        """What a run is, for the file: runs of another protocol are not kept."""
        return {name: getattr(self, name) for name in ("about", "batch", "steps", "schedule")}

    @property
    def choices(self) -> dict[str, Any]:
        """Which runs are made, for the file: with other choices the runs that are done are still good."""
        names = ("title", "seeds", "tuning_seeds", "rates", "beside", "shares")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


LINEAR = "linear rise over a tenth, constant, linear fall over the last half"
COSINE = "linear rise over a tenth, then a cosine"
THREE = (1, 2, 3)  # seeds of what takes longer
OF_FEW = (0, 10, 11)  # 270 images to validate on are too few for one seed to choose by
HIDDEN = "784 pixels, 128 hidden units with ReLU, 10 classes"


def _torch(
    name: str, title: str, about: str, task: in_torch.Task, batch: int, who: tuple[Contender, ...], **seeds: Any
) -> Workload:
    return Workload(name, title, about, batch, task.steps, LINEAR, partial(in_torch.run, task), who, **seeds)


def _jax(name: str, title: str, about: str, batch: int, steps: int, **seeds: Any) -> Workload:
    def run(*args: Any) -> dict[str, Any]:
        from benchmarks.quality import in_jax

        return in_jax.run(in_jax.TASKS[name](batch, steps), *args)

    return Workload(name, title, about, batch, steps, LINEAR, run, contenders.IN_JAX, **seeds)


def _ablation(of: Workload) -> Workload:
    return replace(
        of,
        name=f"{of.name}_ablation",
        title=f"{of.title}, settings",
        contenders=contenders.VARIANTS,
        beside=of.name,
    )


def _in_place_of_adamw(of: Workload) -> Workload:
    return replace(
        of,
        name=f"{of.name}_in_place",
        title=f"{of.title}, at AdamW's learning rate",
        contenders=contenders.IN_PLACE,
        seeds=tuple(range(1, 21 if of.tuning_seeds == OF_FEW else 6)),
        tuning_seeds=(),
        beside=of.name,
        shares=(0.5, 1.0, 2.0),
    )


_DIGITS = "two convolutions and two dense layers, as `fusedbun train` has them"
_OF_DIGITS = in_torch.images(data.digits, in_torch.convolutional, 64, 280)
_OF_FASHION = in_torch.images(data.fashion, in_torch.Perceptron, 256, 600)
_OF_MNIST = in_torch.images(data.mnist, in_torch.Perceptron, 256, 600)


def _sigmoid(seed: int) -> nn.Module:
    return in_torch.Perceptron(seed, nn.functional.sigmoid, gain=1.0)


_AS_REPORTED = replace(in_torch.images(data.mnist, _sigmoid, 16, 7813), share=in_torch.cosine)
LEARNT = (
    _torch("digits", "digits", _DIGITS, _OF_DIGITS, 64, contenders.IN_TORCH, tuning_seeds=OF_FEW),
    _jax("digits_jax", "digits, in Flax", _DIGITS, 64, 280, tuning_seeds=OF_FEW),
    _torch("mnist", "MNIST", HIDDEN, _OF_MNIST, 256, contenders.IN_TORCH),
    _jax("mnist_jax", "MNIST, in Flax", HIDDEN, 256, 600),
    _torch("fashion", "Fashion-MNIST", HIDDEN, _OF_FASHION, 256, contenders.IN_TORCH, seeds=THREE),
    _torch(
        "shakespeare",
        "Shakespeare",
        "a transformer that predicts characters, 2 layers of width 64, texts of 64",
        in_torch.shakespeare(width=64, layers=2, context=64, size=8, steps=400),
        8,
        contenders.WITHOUT_TYPES,
        seeds=THREE,
    ),
    _torch(
        "shakespeare_longer",
        "Shakespeare, longer",
        "a transformer that predicts characters, 2 layers of width 128, texts of 64",
        in_torch.shakespeare(width=128, layers=2, context=64, size=16, steps=1200),
        16,
        contenders.LONGER,
        seeds=THREE,
    ),
    _torch(
        "insteval",
        "InstEval",
        "ratings from embeddings of width 16 of 2,972 students and 1,128 lecturers",
        in_torch.ratings(width=16, size=256, steps=690),
        256,
        contenders.WITHOUT_TYPES + contenders.SPARSE,
    ),
    _torch(
        "mails",
        "SpamAssassin",
        "fine-tuning of MiniLM, 22.7 million weights, to tell spam from mails of 32 tokens",
        minilm.task(size=16, steps=40),
        16,
        contenders.TO_FINE_TUNE,
        seeds=THREE,
    ),
    _torch(
        "mails_lora",
        "SpamAssassin, LoRA",
        "the same with adapters of rank 8 on queries and values, 148,226 weights",
        minilm.task(size=16, steps=40, rank=8),
        16,
        contenders.TO_ADAPT,
        seeds=THREE,
    ),
)
IN_PLACE = ("digits", "mnist", "fashion", "shakespeare", "insteval")
TAKEN_APART = ("digits", "fashion", "shakespeare", "insteval")
AS_REPORTED = Workload(
    "as_reported",
    "MNIST, as the first public Fusedbun reported it",
    "784 pixels, 128 hidden units with sigmoid, 10 classes",
    16,
    _AS_REPORTED.steps,
    COSINE,
    partial(in_torch.run, _AS_REPORTED),
    contenders.AS_REPORTED,
    seeds=THREE,
    rates=(4e-6, 1.6e-5, 3e-5, 6.3e-5, 2.5e-4, 1e-3),
)
WORKLOADS = {
    workload.name: workload
    for workload in (
        *LEARNT,
        *(_ablation(x) for x in LEARNT if x.name in TAKEN_APART),
        *(_in_place_of_adamw(x) for x in LEARNT if x.name in IN_PLACE),
        AS_REPORTED,
    )
}
