"""Many processes: how models, gradients and checkpoints are cut up, and who reads, decides and writes."""
