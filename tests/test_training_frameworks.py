"""Training frameworks do with ours what they do with torch's own: schedules, clipping, saving and resuming."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from sweeps import only, sweep
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fusedbun import SM3, DecoupledLionW, Fusedbun, create, param_groups

accelerate = pytest.importorskip("accelerate")
lightning = pytest.importorskip("pytorch_lightning")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),  # Lightning asks torch so
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]
OPTIMIZERS = {
    "fusedbun": (Fusedbun, {"lr": 1e-3, "centralize": True, "use_rms": True, "nesterov": True}),
    "int4": (Fusedbun, {"lr": 1e-3, "use_rms": True, "momentum_dtype": "int4"}),
    "sm3": (SM3, {"lr": 1e-2, "momentum": 0.9}),
    "lion": (DecoupledLionW, {"lr": 1e-3, "weight_decay": 1e-4, "momentum_dtype": "int8"}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
STEPS, BATCH = 12, 16


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.LayerNorm(32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    )


def dataset():
    digits = load_digits()
    chosen = slice(0, STEPS * BATCH)
    return TensorDataset(torch.tensor(digits.data[chosen] / 8 - 1).float(), torch.tensor(digits.target[chosen]))


def loader():
    return DataLoader(dataset(), batch_size=BATCH)


def optimizer_for(model, name):
    make, settings = OPTIMIZERS[name]
    return make(model.parameters(), **settings)


def assert_same(got, expected):
    torch.testing.assert_close(dict(got.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def by_hand(name, clip=1.0, accumulated=1):
    """What a plain loop trains, with a learning rate that falls by a tenth in each step."""
    model = network()
    optimizer = optimizer_for(model, name)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for i, (inputs, targets) in enumerate(loader()):
        (functional.cross_entropy(model(inputs), targets) / accumulated).backward()
        if (i + 1) % accumulated == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model


# Hugging Face's Trainer


class WithLoss(torch.nn.Module):
    """The network as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, inputs, labels):
        logits = self.network(inputs)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def trainer(folder, name):
    arguments = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "max_grad_norm": 1.0,
        "save_steps": 7,  # in the middle of an epoch
        "save_strategy": "steps",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return transformers.Trainer(
        WithLoss(),
        transformers.TrainingArguments(**arguments),
        train_dataset=[{"inputs": inputs, "labels": label} for inputs, label in dataset()],
        optimizer_cls_and_kwargs=(OPTIMIZERS[name][0], dict(OPTIMIZERS[name][1])),
    )


@sweep("name", OPTIMIZERS, short=only("int4"))
def test_the_trainer_resumes_to_the_bit(name, tmp_path):
    whole = trainer(tmp_path / "whole", name)
    whole.train()
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert max(rates) == pytest.approx(OPTIMIZERS[name][1]["lr"])
    assert rates[0] < max(rates) > 50 * rates[-1]
    resumed = trainer(tmp_path / "resumed", name)
    assert resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7")).global_step == 2 * STEPS
    assert_same(resumed.model, whole.model)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_the_trainer_takes_an_optimizer_made_by_name(tmp_path):
    model = WithLoss()
    optimizer = create("fusedbunw", model, 1e-2, weight_decay=0.5)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        lr_scheduler_type="linear",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    samples = [{"inputs": inputs, "labels": label} for inputs, label in dataset()]
    training = transformers.Trainer(model, arguments, train_dataset=samples, optimizers=(optimizer, None))
    before = copy.deepcopy(model.state_dict())
    training.train()
    assert training.optimizer.optimizer is optimizer
    assert optimizer.param_groups[0]["lr"] == 0.0  # the Trainer's schedule has come to its end
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert any((model.state_dict()[name] != x).any() for name, x in before.items())


def test_the_trainer_takes_groups_that_spare_biases_and_norms(tmp_path):
    """By a name that is not the one in its own groups."""
    training = trainer(tmp_path, "fusedbun")
    training.optimizer_cls_and_kwargs[1]["params"] = param_groups(training.model, no_decay="Lambda")
    training.train()
    assert [group["Lambda"] for group in training.optimizer.optimizer.param_groups] == [0.01, 0.0]


def test_the_trainers_weight_decay_is_the_optimizers(tmp_path):
    training = trainer(tmp_path, "fusedbun")
    training.args.weight_decay = 0.3
    training.create_optimizer()
    assert [group["Lambda"] for group in training.optimizer.param_groups] == [0.3, 0.0]
    training.optimizer, training.optimizer_cls_and_kwargs = None, (SM3, {"lr": 0.1})
    with pytest.raises(TypeError, match=r"SM3 does not read weight_decay=0.3 .* it has no weight decay"):
        training.create_optimizer()
    training.args.weight_decay = 0.0
    training.train()


@pytest.mark.parametrize("schedule", [kind.value for kind in transformers.SchedulerType])
def test_schedules_of_transformers_give_the_rates_that_they_give_torchs_sgd(schedule):
    more = {
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 4},
    }.get(schedule)
    rates = []
    for make in (torch.optim.SGD, Fusedbun):
        params = [torch.nn.Parameter(torch.ones(3, 2))]
        optimizer = make(params, lr=0.1)
        found = transformers.get_scheduler(schedule, optimizer, 2, 10, scheduler_specific_kwargs=more)
        rates.append([])
        for i in range(10):
            params[0].grad = torch.ones_like(params[0])
            optimizer.step()
            found.step(*([float(i)] if schedule in ("reduce_lr_on_plateau", "greedy") else []))
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]


# Accelerate


def prepared(name, **settings):
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    model = network()
    optimizer = optimizer_for(model, name)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return accelerator, *accelerator.prepare(model, optimizer, loader(), schedule)


def train(accelerator, model, optimizer, batches, schedule):
    for inputs, targets in batches:
        with accelerator.accumulate(model):
            accelerator.backward(functional.cross_entropy(model(inputs), targets))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            assert not optimizer.step_was_skipped
    return model


@every_optimizer
@pytest.mark.parametrize("accumulated", [1, 3])
def test_accelerate_equals_a_plain_loop(name, accumulated):
    assert_same(train(*prepared(name, gradient_accumulation_steps=accumulated)), by_hand(name, accumulated=accumulated))


@every_optimizer
def test_accelerate_resumes_to_the_bit(name, tmp_path):
    accelerator, model, optimizer, batches, schedule = prepared(name)
    batches = list(batches)
    train(accelerator, model, optimizer, batches[:5], schedule)
    accelerator.save_state(tmp_path)
    kept = copy.deepcopy(optimizer.state_dict())
    resumed, *others = prepared(name)
    resumed.load_state(tmp_path)
    found = others[1].state_dict()
    torch.testing.assert_close(found["state"], kept["state"], rtol=0, atol=0)
    assert found["param_groups"] == kept["param_groups"]
    train(resumed, others[0], others[1], batches[5:], others[3])
    assert_same(others[0], by_hand(name))
    again = optimizer_for(network(), name)
    again.load_state_dict(kept)  # of the wrapper, by the optimizer
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in kept["param_groups"]]


# Lightning


class Lit(lightning.LightningModule):
    """The network with a schedule, stepped by Lightning or by hand."""

    def __init__(self, name, automatic=True):
        super().__init__()
        self.name, self.automatic_optimization = name, automatic
        self.network = network()

    def configure_optimizers(self):
        optimizer = optimizer_for(self.network, self.name)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch):
        loss = functional.cross_entropy(self.network(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            self.lr_schedulers().step()
        return loss


def fit(module, epochs=1, checkpoint=None, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = lightning.Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet, **settings)
    run.fit(module, loader(), ckpt_path=checkpoint)
    return run


@every_optimizer
def test_lightning_equals_a_plain_loop(name):
    expected = by_hand(name)
    automatic, manual = Lit(name), Lit(name, automatic=False)
    fit(automatic, gradient_clip_val=1.0)
    fit(manual)
    assert_same(automatic.network, expected)
    assert_same(manual.network, expected)


@every_optimizer
def test_lightning_accumulates(name):
    module = Lit(name)
    fit(module, gradient_clip_val=1.0, accumulate_grad_batches=3)
    assert_same(module.network, by_hand(name, accumulated=3))


@every_optimizer
def test_lightning_resumes_to_the_bit(name, tmp_path):
    fit(Lit(name), gradient_clip_val=1.0).save_checkpoint(tmp_path / "epoch.ckpt")
    resumed, whole = Lit(name), Lit(name)
    run = fit(resumed, 2, tmp_path / "epoch.ckpt", gradient_clip_val=1.0)
    assert run.global_step == 2 * STEPS
    fit(whole, 2, gradient_clip_val=1.0)
    assert_same(resumed.network, whole.network)
