"""Is the run learning? Signals of the train step, findings about them, and a verdict."""
