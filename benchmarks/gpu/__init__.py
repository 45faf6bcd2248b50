"""What only a GPU can tell, in pieces that can be resumed."""
