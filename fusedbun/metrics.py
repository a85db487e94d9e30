"""What an optimizer did to a parameter in a step: lengths of the vectors involved, and angles between them.

Everything follows from inner products, which are sums over elements: those of a parameter that is sharded over
processes are the sums of its shards'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fusedbun.transform import Array, Namespace, Slot

VECTORS = ("moment", "param", "update", "grad")  # `update` is the parameter before the step less the one after it
COSINES = (("update", "grad"), ("moment", "grad"))
Pair = tuple[str, str]
PAIRS: tuple[Pair, ...] = (*((v, v) for v in VECTORS), *COSINES)  # whose inner products metrics need
Products = Mapping[Pair, Array]


def inner_products(xp: Namespace, vectors: Mapping[str, Array]) -> dict[Pair, Array]:
    """The sum of `a*b` for every pair that a metric needs, of the vectors that are there; it keeps their axes."""
    return {(a, b): total(xp, vectors[a] * vectors[b]) for a, b in PAIRS if a in vectors and b in vectors}


def total(xp: Namespace, x: Array) -> Array:
    """The sum of all elements, of as many axes."""
    return xp.sum(x, axis=tuple(range(x.ndim)), keepdims=True)


def moments(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """Those slots of a chain that metrics take for the moment, by name."""
    return {key: slot for key, slot in slots.items() if key.endswith(".moment")}


def norm(xp: Namespace, products: Products, vector: str) -> Array:
    """`sqrt(sum(v*v))`."""
    return xp.sqrt(products[vector, vector])


def cosine(xp: Namespace, products: Products, a: str, b: str) -> Array:
    """`sum(a*b) / (norm(a)*norm(b))`, and 0 where either vector is 0."""
    lengths = norm(xp, products, a) * norm(xp, products, b)
    return products[a, b] / xp.where(lengths == 0, 1.0, lengths)


def functions(xp: Namespace) -> dict[str, Callable[[Products], Array]]:
    """Every metric by name, as a function of the inner products."""
    norms = {f"l2_norm/{v}": (lambda products, v=v: norm(xp, products, v)) for v in VECTORS}
    cosines = {f"cosine/{a}_{b}": (lambda products, a=a, b=b: cosine(xp, products, a, b)) for a, b in COSINES}
    return {**norms, **cosines}


def needs(metric: str) -> tuple[tuple[str, str], ...]:
    """The inner products that a metric is computed from."""
    kind, vectors = metric.split("/")[:2]
    a, b = vectors.split("_") if kind == "cosine" else (vectors, vectors)
    return tuple(dict.fromkeys(((a, b), (a, a), (b, b))))


def measured(metrics: Mapping[str, Callable[[Products], Array]], products: Products, name: str) -> dict[str, Array]:
    """Every metric whose vectors are there, by `<metric>/<parameter's name>`."""
    return {f"{m}/{name}": f(products) for m, f in metrics.items() if all(pair in products for pair in needs(m))}
