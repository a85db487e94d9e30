"""A small vision transformer with Hugging Face's Trainer: at least 95% of handwritten digits that it has not seen.

python examples/hf_trainer.py --optimizer fusedbunw
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import fusedbun

OPTIMIZERS = {"adamw": torch.optim.AdamW, "fusedbunw": fusedbun.FusedbunW}
parser = argparse.ArgumentParser()
parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
make = OPTIMIZERS[parser.parse_args().optimizer]

digits = load_digits()
images = (digits.images[:, None] / 8 - 1).astype(np.float32)  # one channel of 8 x 8, in [-1, 1]
samples = [{"pixel_values": image, "labels": label} for image, label in zip(images, digits.target, strict=True)]
train, test = train_test_split(samples, test_size=0.3, random_state=0)

set_seed(0)
size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 64, "intermediate_size": 128}
model = ViTForImageClassification(ViTConfig(**size, num_hidden_layers=2, num_attention_heads=4, num_labels=10))
trainer = Trainer(
    model,
    TrainingArguments(
        num_train_epochs=15,
        per_device_train_batch_size=32,
        lr_scheduler_type="cosine",
        warmup_steps=40,
        weight_decay=0.1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    ),
    train_dataset=train,
    eval_dataset=test,
    compute_metrics=lambda found: {"accuracy": np.mean(found.predictions.argmax(-1) == found.label_ids)},
    optimizer_cls_and_kwargs=(make, {"lr": 3e-3}),
)
trainer.train()
print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.2%}")
