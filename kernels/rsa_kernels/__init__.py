"""Per-token log-probabilities and whole-vocabulary risk measures, without materialising fp32 logits."""
