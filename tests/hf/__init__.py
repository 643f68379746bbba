"""Tiny random checkpoints of every model family, made and evaluated by Hugging Face transformers."""
