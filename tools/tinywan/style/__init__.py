"""A LoRA for TinyWan that draws outlines instead of filled shapes."""
