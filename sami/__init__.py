"""SAMI: SAM-leveraged masked image pretraining (EfficientSAM, arXiv 2312.00863, section 3.2)."""

__version__ = "0.1.0"
