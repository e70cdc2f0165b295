"""State dicts of tests: names, precisions, prefixes."""

from collections.abc import Mapping

import torch

Weights = dict[str, torch.Tensor]
NAME, WIDER = "deit_nano_patch8_32_L2", "deit_nano_patch8_32_L4_H3"


def cast(value: object, dtype: torch.dtype) -> object:
    """Everything in ``value`` that is a floating-point tensor in another precision, as people save space."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: cast(part, dtype) for key, part in value.items()}
    return value


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor.clone() for name, tensor in weights.items()}


def without(weights: Weights, *prefixes: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(prefixes)}


def equal(found: Weights, expected: Weights) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
