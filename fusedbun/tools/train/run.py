"""Trains a small network on real digits, with every optimizer in every framework."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from fusedbun.tools.shared.command import CommandError
from fusedbun.tools.shared.files import make_directory, save
from fusedbun.tools.train.network import Images, batches, cosine, digits, initial_weights
from fusedbun.tools.train.optimizers import Entry, in_dtype
from fusedbun.tools.train.results import Display, Results, Run, draw, show
from fusedbun.tools.train.settings import Settings

TRAINING_SHARE = 0.7  # the rest is the test


def train(settings: Settings) -> int:
    """Trains, prints the table and writes the files, which Ctrl-C does not keep it from; returns the exit code."""
    frameworks = {name: import_module(f"fusedbun.tools.train.in_{name}") for name in settings.frameworks}
    images, test = digits(settings.seed, [TRAINING_SHARE])
    if settings.batch_size > len(images.labels):
        raise CommandError(
            f"argument --batch-size: must be at most {len(images.labels)}, the number of training images, "
            f"but it is {settings.batch_size}"
        )
    make_directory(settings.output)
    results = Results(settings, parameters=sum(value.size for value in initial_weights(settings.seed).values()))
    try:
        with Display(settings.epochs) as display:
            for optimizer, learning_rate in settings.learning_rates.items():
                entry = in_dtype(optimizer, settings.dtype)
                for name, framework in frameworks.items():
                    run = Run(optimizer, name, learning_rate, entry.hyperparameters)
                    results.runs.append(run)
                    display.begin(run)
                    _train_one(run, entry, framework, settings, images, test, display)
    except KeyboardInterrupt:
        results.runs = [run for run in results.runs if run.losses]
        if not results.runs:
            raise
        results.interrupted = True
    numbers, curves = settings.output / "results.json", settings.output / "curves.png"
    return save(results, numbers, "curves", curves, draw, show)


def _train_one(
    run: Run, entry: Entry, framework: Any, settings: Settings, images: Images, test: Images, display: Display
) -> None:
    steps_per_epoch = len(images.labels) // settings.batch_size
    rates = cosine(run.learning_rate, settings.epochs * steps_per_epoch)
    with framework.session(settings.dtype):
        trainer = framework.Trainer(entry, initial_weights(settings.seed), rates, settings.dtype)
        try:
            for batch in batches(images, settings.batch_size, settings.epochs, settings.seed):
                began = time.perf_counter()
                loss = trainer.step(batch)
                run.seconds.append(time.perf_counter() - began)
                run.losses.append(loss)
                if len(run.losses) % steps_per_epoch == 0:
                    run.scores.append((len(run.losses), trainer.evaluate(test)))
                    display.end_epoch(run)
            run.weights = trainer.weights()
        finally:
            run.state_bytes = trainer.state_bytes()
