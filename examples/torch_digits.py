"""A small network in plain torch, with a schedule: at least 95% of handwritten digits that it has not seen.

python examples/torch_digits.py --optimizer fusedbunw
"""

import argparse

import torch
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

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = make(model.parameters(), lr=2e-3, weight_decay=0.1)
loader = DataLoader(train, batch_size=32, shuffle=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=20 * len(loader))
for _ in range(20):
    for inputs, targets in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
inputs, targets = (torch.stack(column) for column in zip(*test, strict=True))
print(f"test accuracy {(model(inputs).argmax(1) == targets).float().mean():.2%}")
