"""A run: its options, what it is built of, its loop, what it writes."""

from common import torchvision_ops  # noqa: F401  before torchvision is imported
