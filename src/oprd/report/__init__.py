"""HTML pages about runs, from their files alone."""
