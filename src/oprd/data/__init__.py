"""Prompts, chat templates, batches, and the alignment of two tokenizations."""
