"""Data-efficient language-image pre-training, from the command line."""

__version__ = "0.1.0"
