"""A step on fake tensors, over processes that are not there: what it holds, and what it sends."""
