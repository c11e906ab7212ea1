"""The math of the losses, on rows of supervised tokens."""
