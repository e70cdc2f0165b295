"""A family of Des-Nets from one learngene: the grid of sizes, their measurement and fine-tuning, tables and plots."""

from common import torchvision_ops  # noqa: F401  before torchvision is imported
