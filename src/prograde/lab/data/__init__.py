"""Data: `images` for handwritten digits and MNIST, `texts` for tables and plain text."""

from prograde.lab.data.images import (
    BATCH_SIZE,
    IMAGE_SIZE,
    NUM_CLASSES,
    DataError,
    Dataset,
    load,
    synthetic,
)

__all__ = ["BATCH_SIZE", "IMAGE_SIZE", "NUM_CLASSES", "DataError", "Dataset", "load", "synthetic"]
