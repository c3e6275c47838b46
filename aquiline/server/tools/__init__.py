"""Tools: how models are told of functions, and how they call them."""
