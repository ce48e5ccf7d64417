"""Fused operators in C++ for a CPU: their source, its compilation, and their form in MindSpore."""
