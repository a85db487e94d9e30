"""Pairs of what people put around an optimizer, drawn at random, with every class and code, on the digits' network."""

import io
import math
import random
from functools import cache, partial

import pytest
import torch
from sweeps import long
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler, swa_utils

import fusedbun
from fusedbun.recipes import RECIPES
from fusedbun.storage.codes import MOMENTS
from fusedbun.tools.train.in_torch import Network
from fusedbun.tools.train.network import batches, digits, initial_weights
from fusedbun.tools.train.optimizers import OPTIMIZERS, mup_type

COUNT, STEPS = 100, 24


@cache
def data():
    (images, _) = digits(0, [0.5])
    found = [*batches(images, 64, 3, 0)][:STEPS]
    return [(torch.from_numpy(x).float().permute(0, 3, 1, 2), torch.from_numpy(y)) for x, y in found]


class Training:
    """A training loop as it is written by hand; what stands around the optimizer overrides a part of it."""

    def __init__(self, make, lr):
        self.make, self.lr, self.at = make, lr, 0
        self.model = Network()
        self.model.load_state_dict({name: torch.from_numpy(x).float() for name, x in initial_weights(0).items()})
        self.optimizer = self.made(self.params())

    def params(self):
        return list(self.model.named_parameters())

    def made(self, params):
        return self.make(params, self.lr)

    def loss(self, x, y):
        return functional.cross_entropy(self.model(x), y)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()

    def clear(self):
        self.optimizer.zero_grad()

    def train(self):
        """The mean loss of the first three batches and of the last three."""
        losses = []
        for x, y in data():
            self.clear()
            loss = self.loss(x, y)
            self.backward(loss)
            self.step()
            losses.append(loss.item())
            self.at += 1
        return sum(losses[:3]) / 3, sum(losses[-3:]) / 3


# ---- of the model


class Frozen(Training):
    def params(self):
        self.model.conv1.requires_grad_(False)
        return super().params()


class WeightNormed(Training):
    def params(self):
        parametrizations.weight_norm(self.model.hidden)
        return super().params()


class ChannelsLast(Training):
    def params(self):
        self.model.to(memory_format=torch.channels_last)
        return super().params()


class Averaged(Training):
    def step(self):
        if not self.at:
            self.average = swa_utils.AveragedModel(self.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        super().step()
        self.average.update_parameters(self.model)


class Autocast(Training):
    def loss(self, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return super().loss(x, y)


class HalfInBfloat16(Training):
    def params(self):
        self.model.hidden.to(torch.bfloat16)
        self.model.hidden.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
        self.model.hidden.register_forward_hook(lambda _, args, out: out.float())
        return super().params()


# ---- of the optimizer


class Scheduled(Training):
    def made(self, params):
        optimizer = super().made(params)
        self.scheduler = self.scheduled(optimizer)
        return optimizer

    def scheduled(self, optimizer):
        return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10)

    def step(self):
        super().step()
        self.scheduler.step()


class OneCycle(Scheduled):
    def scheduled(self, optimizer):
        cycles = "betas" in optimizer.defaults or "momentum" in optimizer.defaults
        return lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=STEPS + 1, cycle_momentum=cycles)


class Cyclic(Scheduled):
    def scheduled(self, optimizer):
        cycles = "betas" in optimizer.defaults or "momentum" in optimizer.defaults
        return lr_scheduler.CyclicLR(optimizer, self.lr / 4, self.lr, step_size_up=5, cycle_momentum=cycles)


class Sequential(Scheduled):
    def scheduled(self, optimizer):
        warm, decay = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 4), lr_scheduler.PolynomialLR(optimizer, STEPS)
        return lr_scheduler.SequentialLR(optimizer, [warm, decay], [4])


class Grouped(Training):
    def made(self, params):
        decayed = [(name, p) for name, p in params if p.ndim > 1]
        spared = [(name, p) for name, p in params if p.ndim <= 1]
        return super().made([{"params": decayed}, {"params": spared, "weight_decay": 0.0, "lr": self.lr / 2}])


class AddedLater(Training):
    def made(self, params):
        optimizer = super().made(params[:-2])
        optimizer.add_param_group({"params": params[-2:]})
        return optimizer


class TensorRate(Training):
    def made(self, params):
        self.lr = torch.tensor(self.lr)
        return super().made(params)


class Resumed(Training):
    """A new optimizer goes on from a checkpoint in the middle."""

    def step(self):
        if self.at == STEPS // 2:
            file = io.BytesIO()
            torch.save(self.optimizer.state_dict(), file)
            self.optimizer = self.made(list(self.model.named_parameters()))
            file.seek(0)
            self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        super().step()


# ---- of a step


class Accumulated(Training):
    def backward(self, loss):
        super().backward(loss / 2)

    def step(self):
        if self.at % 2:
            super().step()

    def clear(self):
        if not self.at % 2:
            super().clear()


class Scaled(Training):
    def backward(self, loss):
        if not self.at:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        super().backward(self.scaler.scale(loss))

    def step(self):
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Clipped(Training):
    def step(self):
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        super().step()


class ByClosure(Training):
    def step(self):
        x, y = data()[self.at]

        def closure():
            self.clear()
            loss = self.loss(x, y)
            loss.backward()
            return loss

        assert math.isfinite(self.optimizer.step(closure).item())


class Compiled(Training):
    def step(self):
        if not self.at:
            self.compiled = torch.compile(self.optimizer.step)
        self.compiled()


class KeptGradients(Training):
    def clear(self):
        self.optimizer.zero_grad(set_to_none=False)


class Hooked(Training):
    def step(self):
        if not self.at:
            self.seen = []
            self.optimizer.register_step_pre_hook(lambda *_: self.seen.append("before"))
            self.optimizer.register_step_post_hook(lambda *_: self.seen.append("after"))
        super().step()
        assert self.seen[-2:] == ["before", "after"]


OF_MODELS = (Frozen, WeightNormed, ChannelsLast, Averaged, Autocast, HalfInBfloat16)
OF_OPTIMIZERS = (Scheduled, OneCycle, Cyclic, Sequential, Grouped, AddedLater, TensorRate, Resumed)
OF_STEPS = (Accumulated, Scaled, Clipped, ByClosure, Compiled, KeptGradients, Hooked)


def drawn(seed):
    """Two that go together, a class, and how it is set up."""
    generator = random.Random(seed)
    pair = [generator.choice(kind) for kind in generator.sample((OF_MODELS, OF_OPTIMIZERS, OF_STEPS), 2)]
    name = generator.choice([name for name in OPTIMIZERS if name in RECIPES])
    codes = [None, *MOMENTS] if "momentum_dtype" in RECIPES[name].defaults else [None]
    codes = [code for code in codes if (name, code) != ("decoupled_lionw", "int4")]  # refused: its sign needs more
    settings = {"momentum_dtype": code} if (code := generator.choice(codes)) else {}
    settings |= generator.choice([{}, {"stochastic_rounding": True}, {"implementation": "definition"}])
    return pair, name, settings


def train(pair, make, lr):
    return type("Both", (*pair, Training), {})(make, lr).train()


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n in (0, 50) else long) for n in range(COUNT)])
@pytest.mark.filterwarnings("ignore")
def test_what_works_with_adamw_works_with_ours(seed):
    """Where it raises, AdamW in the same place does too; where it trains, the loss falls."""
    pair, name, settings = drawn(seed)
    entry, adamw = OPTIMIZERS[name], OPTIMIZERS["adamw"]

    types = {"mup": mup_type} if "mup" in RECIPES[name].defaults else {}
    make = partial(getattr(fusedbun, RECIPES[name].torch_class), **{**entry.settings, **types, **settings})

    try:
        first, last = train(pair, make, entry.learning_rate)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is
            train(pair, adamw.in_torch, adamw.learning_rate)
        return
    assert last < 0.9 * first, (pair, name, settings)
