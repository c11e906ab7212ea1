"""A pair of tiny models and a task, embedded in the package."""
