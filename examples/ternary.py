"""Networks whose weights are -1, 0 and +1, trained on handwritten digits in two ways, beside their float twin.

    python examples/ternary.py --framework torch
    python examples/ternary.py --framework flax

- float:  ordinary weights, with SignSGD.
- latent: float weights, with SignSGD, but the network uses them rounded to -1, 0 and +1; the gradient passes the
          rounding as if it were not there (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432).
- vote:   the weights are -1, 0 and +1 from the start and in every step, and nothing else is kept but an int8 of votes
          for each, with TernaryVote.

A layer divides its sums by sqrt(fan-in), so that ternary weights keep the size of the activations.
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

METHODS = ("float", "latent", "vote")
SHAPES = ((64, 256), (256, 10))  # of the weights: pixels x hidden units, hidden units x classes
EPOCHS, BATCH_SIZE, TRAINING_IMAGES = 40, 64, 1258
STEPS = EPOCHS * (TRAINING_IMAGES // BATCH_SIZE)
LR = 0.02  # SignSGD's at the start; it falls to zero along a cosine
THRESHOLD = 32  # votes for a weight to step, in batches of 64


def data(seed):
    """The digits, shuffled: (pixels in [-1, 1], labels) to train on, and to test on."""
    digits = load_digits()
    order = np.random.default_rng([seed, 0]).permutation(len(digits.target))
    pixels, labels = (digits.data[order] / 8 - 1).astype(np.float32), digits.target[order]
    return (pixels[:TRAINING_IMAGES], labels[:TRAINING_IMAGES]), (pixels[TRAINING_IMAGES:], labels[TRAINING_IMAGES:])


def initial_weights(method, seed):
    """The weights of both layers, (inputs, outputs): uniform in [-1, 1], or a third each of -1, 0 and +1."""
    draw = np.random.default_rng([seed, 1])
    if method == "vote":
        return [draw.integers(-1, 2, shape).astype(np.float32) for shape in SHAPES]
    return [draw.uniform(-1, 1, shape).astype(np.float32) for shape in SHAPES]


def batches(pixels, labels, seed):
    """The batches of all epochs."""
    draw = np.random.default_rng([seed, 2])
    for _ in range(EPOCHS):
        order = draw.permutation(len(labels))
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            yield pixels[chosen], labels[chosen]


def train_torch(method, seed=0):
    """The test accuracy, and the network's weights as it uses them."""
    import torch
    from torch.nn import functional

    from fusedbun import SignSGD, TernaryVote

    torch.set_num_threads(1)  # the network is too small to be shared out
    train, test = data(seed)
    params = [torch.nn.Parameter(torch.from_numpy(w)) for w in initial_weights(method, seed)]

    def used(w):
        return w.clamp(-1, 1).round().detach() + (w - w.detach()) if method == "latent" else w

    def network(x):
        w1, w2 = map(used, params)
        return torch.relu(x @ w1 / len(w1) ** 0.5) @ w2 / len(w2) ** 0.5

    if method == "vote":
        optimizer = TernaryVote(params, threshold=THRESHOLD)
    else:
        optimizer = SignSGD(params, lr=LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for pixels, labels in batches(*train, seed):
        optimizer.zero_grad()
        functional.cross_entropy(network(torch.from_numpy(pixels)), torch.from_numpy(labels)).backward()
        optimizer.step()
        if method != "vote":
            schedule.step()
    with torch.no_grad():
        predicted = network(torch.from_numpy(test[0])).argmax(1).numpy()
        return np.mean(predicted == test[1]), [used(w).numpy() for w in params]


def train_flax(method, seed=0):
    """The test accuracy, and the network's weights as it uses them."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from fusedbun_jax import scaled_optum, ternary_vote

    def used(w):
        return (
            jax.lax.stop_gradient(jnp.round(jnp.clip(w, -1, 1))) + (w - jax.lax.stop_gradient(w))
            if method == "latent"
            else w
        )

    class Network(nnx.Module):
        def __init__(self):
            self.w1, self.w2 = (nnx.Param(jnp.asarray(w)) for w in initial_weights(method, seed))

        def __call__(self, x):
            w1, w2 = used(self.w1[...]), used(self.w2[...])
            return jax.nn.relu(x @ w1 / len(w1) ** 0.5) @ w2 / len(w2) ** 0.5

    train, test = data(seed)
    network = Network()
    tx = ternary_vote(THRESHOLD) if method == "vote" else scaled_optum(optax.cosine_decay_schedule(LR, STEPS))
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer, pixels, labels):
        def loss(network):
            return optax.softmax_cross_entropy_with_integer_labels(network(pixels), labels).mean()

        optimizer.update(network, nnx.grad(loss)(network))

    for pixels, labels in batches(*train, seed):
        step(network, optimizer, pixels, labels)
    predicted = np.asarray(network(test[0]).argmax(1))
    return np.mean(predicted == test[1]), [np.asarray(used(w[...])) for w in (network.w1, network.w2)]


def main():
    """Trains in every way and prints the test accuracies."""
    parser = argparse.ArgumentParser(description="Networks with ternary weights on handwritten digits.")
    parser.add_argument("--framework", choices=["torch", "flax"], default="torch")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train = {"torch": train_torch, "flax": train_flax}[options.framework]
    for method in METHODS:
        accuracy, weights = train(method, options.seed)
        values = np.unique(np.concatenate([w.ravel() for w in weights]))
        kinds = " ".join(f"{value:+.0f}" for value in values) if len(values) <= 3 else f"{len(values):,} values"
        print(f"{method:<7} test accuracy {accuracy:.2%}   weights: {kinds}")


if __name__ == "__main__":
    main()
