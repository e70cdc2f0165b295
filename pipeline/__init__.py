"""The data pipeline: files and shards, decoding, loading, augmentation on the device."""

from common import torchvision_ops  # noqa: F401  before torchvision is imported
