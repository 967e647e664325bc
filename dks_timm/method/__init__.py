"""Deeply-supervised Knowledge Synergy itself: losses, stages, branches, the model; torch and timm alone."""
