"""One module per command, each a short `main(options) -> exit code` that composes the parts below."""
