"""Training by timm's factories and Accelerate: flags, data, the loop, checkpoints."""
