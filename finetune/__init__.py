"""Stage 2: EfficientSAM, trained on SA-1B from a pretrained encoder (section 4.4)."""
