"""The flow in C++, compiled at its first use."""
