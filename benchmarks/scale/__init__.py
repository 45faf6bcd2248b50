"""What training at scale costs: time and memory of whole steps, by how the work is laid out."""
