"""The embedded miniature: a base model, its teacher and the task they work on."""
