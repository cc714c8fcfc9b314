"""Models of other projects in, ours out: what each format holds, and what it cannot."""
