"""The models and settings that the planner is tested with."""

import math

import fusedbun
from fusedbun.tools.plan import Setting
from fusedbun.tools.plan.settings import USUAL

SM3 = Setting("sm3")
OURS = [setting for setting in USUAL if not setting.is_torch_adamw]
SHAPES = {"embed.weight": (50, 70), "layer.weight": (70, 33), "layer.bias": (70,), "kernel": (3, 4, 5, 6), "scale": ()}
ELEMENTS = sum(map(math.prod, SHAPES.values()))


def the_one(model, setting=SM3, **options):
    """The estimates of one setting, without and with gradient release."""
    return fusedbun.plan(model, setting, threads=1, **options).estimates


def seven_billion():
    block = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
    return [(32000, 4096), *block * 32, (4096,), (32000, 4096)]
