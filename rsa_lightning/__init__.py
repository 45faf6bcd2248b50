"""Risk-aware Stepwise Alignment (arXiv:2512.24263) and its family as PyTorch Lightning stages."""

__version__ = "0.1.0"
