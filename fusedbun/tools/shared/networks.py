"""The shapes of real networks; no network is needed for them."""

from __future__ import annotations

from fusedbun.transform import Shape


def gpt2() -> tuple[Shape, ...]:
    """GPT-2 small: 148 tensors, as its code stores them (inputs first)."""
    width, layers = 768, 12
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return ((50257, width), (1024, width), *((*norm, *attention, *norm, *mlp) * layers), *norm)


def resnet50() -> tuple[Shape, ...]:
    """ResNet-50: 161 tensors, as torchvision stores them (output channels first)."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, repeats in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(repeats):
            convolutions: list[Shape] = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if index == 0:
                convolutions.append((4 * width, channels, 1, 1))
            for convolution in convolutions:  # each with the weight and the bias of its normalisation
                shapes += [convolution, convolution[:1], convolution[:1]]
            channels = 4 * width
    return (*shapes, (1000, channels), (1000,))
