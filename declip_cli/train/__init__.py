"""From a run's configuration to trained weights."""
