"""Timings that anyone can repeat: ratios of things measured side by side in one run."""
