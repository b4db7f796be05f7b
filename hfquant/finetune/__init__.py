"""Fine-tuning quantized models: adapters on packed weights."""
