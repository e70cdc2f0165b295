"""LeViT under its first names: Facebook's downloads, and what the timm of the published programs (0.6.7) writes.

timm has since renamed the modules, and its own filter no longer converts the names.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

FIRST_KEY = "patch_embed.0.c.weight"  # which only the first names have
# a module of the current names that was one entry of the list ``blocks``
BLOCK = re.compile(r"(stages\.\d+\.(?:blocks\.\d+\.(?:attn|mlp)|downsample\.(?:attn_downsample|mlp)))\.")
# (first name, current name) within a block, and of the parts of a layer with batch norm
RENAMED = (
    (r"^m\.0\.", "ln1."),
    (r"^m\.2\.", "ln2."),
    (r"^m\.", ""),
    (r"^(proj|q)\.1\.", r"\1.ln."),
    (r"(^|\.)[cl]\.(weight|bias)$", r"\1linear.\2"),
)


def rename_levit(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a LeViT under the names that timm's ``model`` has now; weights under other names as they are.

    The indices of the attention biases follow from the architecture and are left out. A linear layer that is a 1×1
    convolution in ``model`` gets the two axes of its kernel, and the other way round.
    """
    if FIRST_KEY not in weights:
        return dict(weights)
    own = model.state_dict()
    blocks = list(dict.fromkeys(match[1] for match in map(BLOCK.match, own) if match))
    renamed = {}
    for name, tensor in weights.items():
        if name.endswith("attention_bias_idxs"):
            continue
        new = _current_name(name, blocks)
        if new in own and {tensor.ndim, own[new].ndim} == {2, 4}:
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor.flatten(1)
        renamed[new] = tensor
    return renamed


def _current_name(name: str, blocks: list[str]) -> str:
    if match := re.match(r"patch_embed\.(\d+)\.", name):  # every other entry of the list is an activation
        prefix, rest = f"stem.conv{int(match[1]) // 2 + 1}.", name[match.end() :]
    elif (match := re.match(r"blocks\.(\d+)\.", name)) and int(match[1]) < len(blocks):
        prefix, rest = f"{blocks[int(match[1])]}.", name[match.end() :]
    else:
        prefix, rest = "", name
    for pattern, replacement in RENAMED:
        rest = re.sub(pattern, replacement, rest)
    return prefix + rest
