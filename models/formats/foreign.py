"""Fit weights of other programs to a model here: prefixes, class tokens, and parts that only training needed.

Functions that drop weights also return remarks for the caller to print, one line for each kind of weight.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor, nn

# wrapper modules of torch, which may also be inside a model
WRAPPER = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# first parts of names that are no part of a classifier: the decoder of MAE, the projections of DINO, iBOT and MoCo
TRAINING_ONLY = re.compile(
    r"(decoder|mask_token|predictor|projector|projection|prototypes|dino_head|ibot_head)(?=[._]|$)"
)
TOKENS = ("cls_token", "dist_token")  # in the order of their positions

Fitted = tuple[dict[str, Tensor], list[str]]


def without_prefix(weights: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """``weights`` without the longest prefix of all names whose removal gives most ``known`` names, if it helps."""
    weights = {WRAPPER.sub("", name): tensor for name, tensor in weights.items()}
    first, last = min(weights), max(weights)
    common = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), 0)

    def fitting(length: int) -> int:
        return sum(name[length:] in known for name in weights)

    length = max(range(common, -1, -1), key=fitting)  # the first of equals, which is the longest
    return {name[length if fitting(length) > fitting(0) else 0 :]: tensor for name, tensor in weights.items()}


def part_for(weights: Mapping[str, Tensor], known: Collection[str]) -> Fitted:
    """The network that fits, of several in one dictionary such as a backbone and its projection head.

    Its names share a prefix. Without the prefix they are at least half of the ``known`` names, or of all names.
    """
    fitting: Counter[str] = Counter()
    for name in weights:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in known:
                fitting[".".join(parts[:i])] += 1
    best, count = max(fitting.items(), key=lambda item: item[1], default=("", 0))
    if count <= fitting[""] or 2 * count < min(len(known), len(weights)):
        return dict(weights), []
    taken = {n.removeprefix(f"{best}."): t for n, t in weights.items() if n.startswith(f"{best}.")}
    others = [name for name in weights if not name.startswith(f"{best}.")]
    remark = f"the weights named {best}.… are taken; left out: {len(others)}, such as {min(others, default=None)}"
    return taken, [remark] if others else []


def fit_names(weights: Mapping[str, Tensor], model: nn.Module) -> Fitted:
    """``weights`` under the names of ``model``, without tokens that it does not have.

    Shapes are left to timm's filter for the architecture.
    """
    own = model.state_dict()
    weights, remarks = part_for(without_prefix(weights, own.keys()), own.keys())
    weights, more = without_tokens(weights, own)
    if (
        "fc_norm.weight" in own
        and "norm.weight" not in own
        and "fc_norm.weight" not in weights
        and "norm.weight" in weights
    ):
        weights = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in weights.items()}
        more += ["its norm, applied before pooling, is taken for fc_norm, which this model applies after it"]
    return weights, remarks + more


def without_tokens(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> Fitted:
    """``weights`` without class and distillation token where the state dict ``own`` has none, nor their positions.

    The second head of a distilled ViT goes with its token.
    """
    tokens = [token for token in TOKENS if token in weights]
    extra = [token for token in tokens if token not in own]
    if not extra or "pos_embed" not in own:
        return weights, []
    weights = {name: tensor for name, tensor in weights.items() if name not in extra}
    left_out = [*extra]
    positions = weights.get("pos_embed")
    if positions is not None and positions.ndim == 3 and has_positions_for(len(tokens), positions, own):
        kept = [i for i in range(positions.shape[1]) if i >= len(tokens) or tokens[i] not in extra]
        weights["pos_embed"] = positions[:, kept]
        left_out += ["its position" if len(extra) == 1 else "their positions"]
    if "dist_token" in extra and any(name.startswith("head_dist.") for name in weights):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head_dist.")}
        left_out += ["head_dist"]
    kinds = " and a ".join({"cls_token": "class token", "dist_token": "distillation token"}[token] for token in extra)
    listed = ", ".join(left_out[:-1]) + " and " * (len(left_out) > 1) + left_out[-1]
    return weights, [f"it has a {kinds}, this model none: {listed} left out"]


def has_positions_for(tokens: int, positions: Tensor, own: Mapping[str, Tensor]) -> bool:
    """Whether the first of ``positions`` (1, positions, width) are those of tokens and not of patches."""
    count = positions.shape[1]
    patches = own["pos_embed"].shape[1] - sum(token in own for token in TOKENS)
    if count <= tokens or count == patches:
        return False
    of_a_square = [math.isqrt(number) ** 2 == number for number in (count - tokens, count)]
    return count - tokens == patches or of_a_square != [False, True]


def without_training_parts(weights: dict[str, Tensor], own: Collection[str]) -> Fitted:
    """``weights`` without the parts of other networks that only training needed, and that this model does not have."""
    parts = {name: TRAINING_ONLY.match(name) for name in weights.keys() - own}
    left_out = sorted({match[1] for match in parts.values() if match})
    kept = {name: tensor for name, tensor in weights.items() if not parts.get(name)}
    return kept, [f"what only its training needed is left out: {', '.join(left_out)}"] if left_out else []


def shapes_in(weights: Mapping[str, Tensor]) -> str:
    """Some names and shapes of a state dict for a message, those of tokens and positions first."""
    names = sorted(weights, key=lambda name: not re.search("token|pos_embed", name))[:6]
    return ", ".join(f"{name[:60]} {tuple(weights[name].shape)}" for name in names) or "no tensors"
