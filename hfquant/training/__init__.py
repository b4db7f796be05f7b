"""Training with Transformers' Trainer: configuration, trainer and callback."""
