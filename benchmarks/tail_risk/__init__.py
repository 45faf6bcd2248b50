"""Which method of the family lightens the tail of harm, learned on the story world from sampled preferences."""
