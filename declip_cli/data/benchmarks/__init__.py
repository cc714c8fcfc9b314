"""The evaluation sets: where they lie on disk, their classes, prompts, metric and splits."""
