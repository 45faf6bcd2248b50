"""Which method lightens the tail of harm: every method of the family on random exact worlds, by exact expectations."""
