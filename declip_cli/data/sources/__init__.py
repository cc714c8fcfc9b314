"""One file per kind of input; each yields records."""
