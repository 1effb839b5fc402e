"""Differentiable rendering behind one protocol."""
