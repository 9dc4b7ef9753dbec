"""One self-contained HTML page about a pipeline's results."""
