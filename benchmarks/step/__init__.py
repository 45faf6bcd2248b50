"""Whole training steps beside those of TRL."""
