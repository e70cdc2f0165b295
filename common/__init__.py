"""Errors, files, downloads, processes: what every part of the project uses, and no part of it."""
