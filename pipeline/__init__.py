"""An image from disk to device."""

from common import torchvision_ops  # noqa: F401  before torchvision is imported
