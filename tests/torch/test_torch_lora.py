"""LoRA with peft on bases in float32, bfloat16 and four bits: it learns as with AdamW, and resumes to the bit."""

import pytest
import torch
from makers import assert_same
from sweeps import only, sweep

from fusedbun import SM3, Fusedbun, FusedbunW

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

WIDTH, VOCABULARY, STEPS = 64, 64, 30
ADAMW = (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.0})
OPTIMIZERS = {
    "fusedbunw": (FusedbunW, {"lr": 1e-2, "weight_decay": 0.0}),
    "int4": (FusedbunW, {"lr": 1e-2, "weight_decay": 0.0, "momentum_dtype": "int4"}),
    "fusedbun": (Fusedbun, {"lr": 3e-3, "centralize": True, "use_rms": True, "nesterov": True, "Lambda": 0.0}),
    "sm3": (SM3, {"lr": 1e-2, "momentum": 0.9, "beta": 0.95, "statistic": "mean"}),
}
BASES = ("float32", "bfloat16", "four bits")
TOKENS = torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a language model of two layers, as one downloads it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=WIDTH, **sizes)
    ).save_pretrained(folder)
    return folder


def adapted(folder, kind, rank):
    """The base, loaded as this kind, with adapters of this rank."""
    settings = {"dtype": torch.bfloat16 if kind == "bfloat16" else torch.float32}
    if kind == "four bits":
        pytest.importorskip("bitsandbytes")
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    if kind == "four bits":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def numbers(model):
    """Copies of the parameters by name, as they are stored."""
    return {name: p.detach().as_subclass(torch.Tensor).clone() for name, p in model.named_parameters()}


def losses(model, optimizer):
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@sweep(
    ("name", "kind", "rank"),
    [(name, kind, rank) for name in OPTIMIZERS for kind in BASES for rank in (1, 4, 64)],
    short=only(("fusedbunw", "four bits", 1), ("fusedbunw", "bfloat16", 64), ("sm3", "float32", 4)),
)
def test_the_loss_falls_as_with_adamw(base, name, kind, rank):
    """The whole model is handed over; the adapters alone are stepped, and alone have state."""
    falls = []
    for make, settings in (ADAMW, OPTIMIZERS[name]):
        model = adapted(base, kind, rank)
        optimizer = make(model.named_parameters(), **settings)
        model(input_ids=TOKENS)  # which on a CPU puts four bits into another order, once
        before = numbers(model)
        found = losses(model, optimizer)
        falls.append(found[0] - found[-1])
    assert falls[1] > 0.95 * falls[0]
    after = numbers(model)
    for n, p in model.named_parameters():
        assert ("lora_" in n) == p.requires_grad == (p in optimizer.state) != torch.equal(after[n], before[n]), n


def trainer(folder, model, name):
    make, settings = OPTIMIZERS[name]
    arguments = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_steps": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**arguments),
        train_dataset=[{"input_ids": x, "labels": x} for x in TOKENS],
        optimizer_cls_and_kwargs=(make, dict(settings)),
    )


@sweep(
    ("name", "kind", "rank"),
    [(name, kind, rank) for name in OPTIMIZERS for kind in BASES for rank in (1, 4, 64)],
    short=only(("fusedbunw", "four bits", 4)),
)
def test_the_trainer_resumes_to_the_bit(base, tmp_path, name, kind, rank):
    whole = trainer(tmp_path, adapted(base, kind, rank), name)
    whole.train()
    resumed = trainer(tmp_path, adapted(base, kind, rank), name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(numbers(resumed.model), numbers(whole.model))
    logs = [[entry["loss"] for entry in x.state.log_history if "loss" in entry] for x in (whole, resumed)]
    assert logs[0] == logs[1]
    assert logs[0][-1] < logs[0][0]
