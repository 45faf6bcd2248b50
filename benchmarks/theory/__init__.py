"""Exact computations on enumerable worlds: the numbers and the figures of docs/theory."""
