"""Accelerate, with accumulated and clipped gradients and a saved state: at least 95% of digits that it has not seen.

python examples/hf_accelerate.py --optimizer fusedbunw
"""

import argparse
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

import fusedbun

OPTIMIZERS = {"adamw": torch.optim.AdamW, "fusedbunw": fusedbun.FusedbunW}
parser = argparse.ArgumentParser()
parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
make = OPTIMIZERS[parser.parse_args().optimizer]

digits = load_digits()
pixels, labels = torch.tensor(digits.data / 8 - 1, dtype=torch.float32), torch.tensor(digits.target)
train, test = train_test_split(TensorDataset(pixels, labels), test_size=0.3, random_state=0)

set_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = make(model.parameters(), lr=2e-3, weight_decay=0.1)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(train, batch_size=32, shuffle=True))
for _ in range(20):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(torch.nn.functional.cross_entropy(model(inputs), targets))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
with tempfile.TemporaryDirectory() as folder:  # ends where the run would be resumed
    accelerator.save_state(folder)
    accelerator.load_state(folder)
inputs, targets = (torch.stack(column) for column in zip(*test, strict=True))
print(f"test accuracy {(model(inputs).argmax(1) == targets).float().mean():.2%}")
