"""Errors, files, downloads and processes. Imports nothing else of the project."""
