"""regard: attention patterns in transformers."""

__version__ = "0.1.0"
