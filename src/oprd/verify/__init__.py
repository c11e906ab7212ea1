"""Answer checking in worker processes with a hard time limit."""
