"""Triton kernels of the operations for few rows; imported when the first of them is launched, for Triton is slow to."""
