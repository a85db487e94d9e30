"""Torch: the libraries that train with an optimizer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.behaviour.in_torch import (
    INPUTS,
    OUTPUTS,
    assert_same,
    batch,
    loss,
    network,
    train,
)
from benchmarks.behaviour.torch_schedules import FIXED
from benchmarks.behaviour.torch_state import UNDECAYED
from benchmarks.behaviour.uses import Contender, Part

ADAPTERS = Part("LoRA, with peft")
LIBRARIES = Part("Libraries")
STEPS = 4


class Base(nn.Module):
    """A network with layers to adapt."""

    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.first, self.norm, self.last = linear(INPUTS, 64), nn.LayerNorm(64), nn.Linear(64, OUTPUTS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(inputs)).tanh().to(self.last.weight.dtype))


def adapted(contender: Contender, base: nn.Module, rank: int) -> None:
    """A base with adapters, of which half are 0, is trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["first"]))
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in adapters.values():
        p.data = p.data.sign() if contender.ternary else p.data
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = contender(model.named_parameters())
    dtype = base.last.weight.dtype
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, labels = batch(step, dtype)
        nn.functional.cross_entropy(model(inputs).float(), labels).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert bool((p != before[name]).any()) == (name in adapters), name
        assert not p.is_floating_point() or bool(p.isfinite().all())
    assert set(optimizer.state) <= set(adapters.values())


def in_float32() -> nn.Module:
    """A base in float32."""
    torch.manual_seed(0)
    return Base()


def in_bfloat16() -> nn.Module:
    """A base in bfloat16; peft makes the adapters in float32."""
    return in_float32().to(torch.bfloat16)


def in_four_bits() -> nn.Module:
    """A base whose adapted layer is stored in NF4."""
    import bitsandbytes

    torch.manual_seed(0)
    four_bits = {"compute_dtype": torch.float32, "quant_type": "nf4"}
    return Base(lambda *sizes: bitsandbytes.nn.Linear4bit(*sizes, **four_bits)).to("cpu")


BASES = {"float32": in_float32, "bfloat16": in_bfloat16, "4-bit (bitsandbytes)": in_four_bits}


def _adapt(make: Callable[[], nn.Module], rank: int) -> Callable[[Contender], None]:
    return lambda contender: adapted(contender, make(), rank)


for title, make in BASES.items():
    for rank in (1, 4, 64):
        ADAPTERS.use(
            f"rank {rank} on a {title} base",
            works_if="Every adapter moves, and nothing else does; only adapters have state.",
        )(_adapt(make, rank))


class WithLoss(nn.Module):
    """The network as the Trainer wants it."""

    def __init__(self, contender: Contender) -> None:
        super().__init__()
        self.network = network(contender)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(contender: Contender, folder: str, **arguments: Any) -> Any:
    """A Trainer of the network."""
    import transformers

    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    samples = [
        dict(zip(("inputs", "labels"), pair, strict=True)) for i in range(6) for pair in zip(*batch(i), strict=True)
    ]
    return transformers.Trainer(
        WithLoss(contender),
        transformers.TrainingArguments(output_dir=folder, **{**given, **arguments}),
        train_dataset=samples,
        optimizer_cls_and_kwargs=(contender.make, dict(contender.settings)),
    )


@LIBRARIES.use("the Trainer of `transformers`, resumed from a checkpoint")
def by_trainer(contender: Contender) -> None:
    """A run that goes on from its middle ends as the whole one, to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(contender, folder)
        whole.train()
        resumed = trainer(contender, folder)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
        assert_same(resumed.model, whole.model)


@LIBRARIES.use("the Trainer, with a cosine and warm-up", reasons=FIXED)
def by_trainer_scheduled(contender: Contender) -> None:
    """The rates rise and fall."""
    with tempfile.TemporaryDirectory() as folder:
        training = trainer(contender, folder, lr_scheduler_type="cosine", warmup_steps=2, logging_steps=1)
        training.train()
    rates = [entry["learning_rate"] for entry in training.state.log_history if "learning_rate" in entry]
    assert rates[0] < max(rates) > rates[-1]


@LIBRARIES.use("the Trainer, with `weight_decay`", reasons=UNDECAYED)
def by_trainer_decayed(contender: Contender) -> None:
    """Matrices have it in their group, and biases and norms do not."""
    with tempfile.TemporaryDirectory() as folder:
        training = trainer(contender, folder, weight_decay=0.1)
        training.train()
    assert [group["weight_decay"] for group in training.optimizer.optimizer.param_groups] == [0.1, 0.0]


@LIBRARIES.use("Accelerate, with accumulation and clipping")
def by_accelerate(contender: Contender) -> None:
    """No step is skipped, and the run is the one of a plain loop."""
    import accelerate

    def run(model: nn.Module, optimizer: Any, accelerator: Any) -> None:
        for step in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, step))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                assert not optimizer.step_was_skipped
                optimizer.zero_grad()

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network(contender)
    model, optimizer = accelerator.prepare(model, contender(model.parameters()))
    run(model, optimizer, accelerator)
    plain = network(contender)
    optimizer = contender(plain.parameters())
    for step in range(4):
        (loss(plain, step) / 2).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, plain)


@LIBRARIES.use("Lightning, with clipping")
def by_lightning(contender: Contender) -> None:
    """The run is the one of a plain loop."""
    import pytorch_lightning as lightning
    from torch.utils.data import DataLoader

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(contender)

        def configure_optimizers(self) -> Any:
            return contender(self.network.parameters())

        def training_step(self, step: torch.Tensor) -> torch.Tensor:
            return loss(self.network, int(step))

    module = Lit()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    runs = lightning.Trainer(
        max_epochs=1, accelerator="cpu", enable_checkpointing=False, gradient_clip_val=1.0, **quiet
    )
    runs.fit(module, DataLoader(range(3), batch_size=1))
    plain = network(contender)
    optimizer = contender(plain.parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss(plain, step).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    assert_same(module.network, plain)


@LIBRARIES.use("schedules of `transformers.get_scheduler`", reasons=FIXED)
def transformers_schedules(contender: Contender) -> None:
    """The rates are those that `SGD` gets."""
    import transformers

    for name in ("linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"):
        rates: list[list[float]] = []
        for make in (contender, lambda params: torch.optim.SGD(params, lr=1e-2)):
            model = network(contender)
            optimizer = make(model.parameters())
            schedule = transformers.get_scheduler(name, optimizer, 2, 6)
            rates.append([])
            for step in range(6):
                train(model, optimizer, range(step, step + 1), schedule)
                rates[-1].append(optimizer.param_groups[0]["lr"])
        assert rates[0] == rates[1], name
