"""GGUF files through Transformers: loading, tokenizers, writing."""
