"""Pages about runs, from their files alone."""
