"""One file per table of docs/performance.md."""
