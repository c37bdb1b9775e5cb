"""Layer-by-layer quantization: data, the runner, and the durable state of a running job."""
