"""Dropping, merging and repeating tokens."""
