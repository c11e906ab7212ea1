"""Engines that let the student write."""
