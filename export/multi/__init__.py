"""One graph for many deltas: their tensors are inputs, and every sequence names the delta that it is for."""
