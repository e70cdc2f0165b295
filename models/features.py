"""What a ViT knows of an image besides logits: its features."""

import torch
from torch import Tensor, nn


class Features(nn.Module):
    """Wraps a timm ViT of any kind that gives features in the place of logits."""

    def __init__(self, vit: nn.Module, logits: bool = False):
        """
        Args:
            vit: the ViT.
            logits: whether to give the logits of its head, too.
        """
        super().__init__()
        self.vit, self.logits = vit, logits

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Features (batch, 1 + patches, width) of images (batch, channels, height, width), perhaps with the logits.

        The first is the pooled feature that a head reads, the others are those of the patches as timm's
        ``forward_features`` gives them, after the final norm if the ViT has one there. Class token and registers are
        left out.
        """
        tokens = self.vit.forward_features(images)
        pooled = self.vit.forward_head(tokens, pre_logits=True)
        features = torch.cat([pooled[:, None], tokens[:, self.vit.num_prefix_tokens :]], dim=1)
        return (features, self.vit.forward_head(tokens)) if self.logits else features
