"""The math of the losses, on packed rows."""
