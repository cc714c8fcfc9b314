"""From a model and a data set to scores."""
