"""What clients may send, one file a family of routes."""
