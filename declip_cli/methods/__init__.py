"""One file per method: its views, its heads, its objective."""
