"""A run's folder read back: its settings, curves and results, its page and its pictures."""
