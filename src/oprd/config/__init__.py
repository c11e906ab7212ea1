"""A recipe: every choice of a run as plain frozen dataclasses, mirrored by the YAML file key by key.

Pure data: importing it loads no model library, so a bad recipe fails in a fraction of a second.
"""
