"""Speed: SM3's step on an embedding with sparse gradients follows the touched rows rather than the table, in torch.

    python -m benchmarks.sparse_embedding

Beside it are torch's SparseAdam, which also steps only the touched rows, and SM3 with the same gradients made dense.

- The gradients are those of `nn.Embedding(sparse=True)`, not yet coalesced, for rows drawn without repetition; every
  step gets other rows. Only `optimizer.step()` is timed, on one thread, after two steps that allocate and warm up.
- A time is the median of the steps. `grows_by` is the largest table's time divided by the smallest's, for as many
  touched rows: 1 where the step does not depend on the table.
- The state is counted from the tensors that the optimizer holds.

Writes benchmarks/results/sparse_embedding.json.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from fusedbun import SM3
from fusedbun.tools.shared.files import write_json
from fusedbun.tools.shared.machine import versions
from fusedbun.tools.train.in_torch import session

ROWS = (100_000, 1_000_000)
WIDTH = 64
TOUCHED = (100, 1_000, 10_000)
WARM_UP = 2
STEPS = {"SM3": 50, "SparseAdam": 50, "SM3, dense": 7}  # the dense step takes up to seconds
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SM3": lambda params: SM3(params, lr=0.1),
    "SparseAdam": lambda params: torch.optim.SparseAdam(params, lr=1e-3),
    "SM3, dense": lambda params: SM3(params, lr=0.1),
}
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/sparse_embedding.json"


def main() -> None:
    """Runs the benchmark, prints a table and writes the numbers."""
    cases = list(itertools.product(OPTIMIZERS, ROWS, TOUCHED))
    with session("float32"):
        results = [_measure(*case) for case in track(cases, "timing")]
    grows_by = [
        {"optimizer": name, "touched": touched, "grows_by": _growth(results, name, touched)}
        for name, touched in itertools.product(OPTIMIZERS, TOUCHED)
    ]
    _show(results, grows_by)
    protocol = {"width": WIDTH, "dtype": "float32", "threads": 1, "warm_up": WARM_UP, "steps": STEPS}
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(
        RESULTS, {"protocol": protocol, "versions": versions(), "results": results, "from_least_to_most_rows": grows_by}
    )
    print(f"numbers: {RESULTS.relative_to(ROOT)}")


def _measure(name: str, rows: int, touched: int) -> dict[str, Any]:
    torch.manual_seed(0)
    embedding = nn.Embedding(rows, WIDTH, sparse=True)
    optimizer = OPTIMIZERS[name]([embedding.weight])
    seconds = []
    for _ in range(WARM_UP + STEPS[name]):
        grad = _gradient(embedding, touched)
        embedding.weight.grad = grad.to_dense() if name.endswith("dense") else grad
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    held = optimizer.state[embedding.weight].values()
    return {
        "optimizer": name,
        "rows": rows,
        "touched": touched,
        "ms": 1e3 * statistics.median(seconds[WARM_UP:]),
        "state_bytes": sum(value.nbytes for value in held if isinstance(value, Tensor)),
    }


def _gradient(embedding: nn.Embedding, touched: int) -> Tensor:
    tokens = torch.randperm(embedding.num_embeddings)[:touched]
    output = embedding(tokens)
    (grad,) = torch.autograd.grad(output, embedding.weight, torch.randn_like(output))
    return grad


def _time(results: list[dict[str, Any]], name: str, rows: int, touched: int) -> float:
    key = (name, rows, touched)
    (found,) = [row["ms"] for row in results if (row["optimizer"], row["rows"], row["touched"]) == key]
    return float(found)


def _growth(results: list[dict[str, Any]], name: str, touched: int) -> float:
    return _time(results, name, max(ROWS), touched) / _time(results, name, min(ROWS), touched)


def _show(results: list[dict[str, Any]], grows_by: list[dict[str, Any]]) -> None:
    table = Table(title=f"step of an embedding of width {WIDTH}, ms (median, one thread)")
    table.add_column("rows", justify="right")
    table.add_column("touched", justify="right")
    for name in OPTIMIZERS:
        table.add_column(name, justify="right")
    for rows, touched in itertools.product(ROWS, TOUCHED):
        times = [f"{_time(results, name, rows, touched):.3g}" for name in OPTIMIZERS]
        table.add_row(f"{rows:,}", f"{touched:,}", *times)
    for touched in TOUCHED:
        growth = [f"x {row['grows_by']:.2f}" for row in grows_by if row["touched"] == touched]
        table.add_row(f"{max(ROWS) // min(ROWS)} times the rows", f"{touched:,}", *growth)
    held = {(row["optimizer"], row["rows"]): row["state_bytes"] for row in results}
    table.add_row(f"state of {max(ROWS):,}, MB", "", *(f"{held[name, max(ROWS)] / 1e6:,.0f}" for name in OPTIMIZERS))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
