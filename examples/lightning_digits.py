"""PyTorch Lightning, with a schedule and clipped gradients: at least 95% of digits that it has not seen.

python examples/lightning_digits.py --optimizer fusedbunw
"""

import argparse

import pytorch_lightning as lightning
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

import fusedbun

OPTIMIZERS = {"adamw": torch.optim.AdamW, "fusedbunw": fusedbun.FusedbunW}
parser = argparse.ArgumentParser()
parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
make = OPTIMIZERS[parser.parse_args().optimizer]


class Classifier(lightning.LightningModule):
    """A small network for handwritten digits."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = make(self.parameters(), lr=2e-3, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


lightning.seed_everything(0, verbose=False)
digits = load_digits()
pixels, labels = torch.tensor(digits.data / 8 - 1, dtype=torch.float32), torch.tensor(digits.target)
train, test = train_test_split(TensorDataset(pixels, labels), test_size=0.3, random_state=0)
model = Classifier()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_epochs=20, accelerator="cpu", gradient_clip_val=1.0, **quiet)
trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True))
inputs, targets = (torch.stack(column) for column in zip(*test, strict=True))
print(f"test accuracy {(model.layers(inputs).argmax(1) == targets).float().mean():.2%}")
