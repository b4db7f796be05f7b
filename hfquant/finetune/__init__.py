"""Fine-tuning of quantized models: adapters that keep the weights packed."""
