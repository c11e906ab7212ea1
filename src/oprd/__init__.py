"""oprd: on-policy distillation for people who ship models."""
