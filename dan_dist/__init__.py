"""Distributed training of DAN (Wen et al., "Distract Your Attention", arXiv 2109.07270)."""

__version__ = "0.1.0"
