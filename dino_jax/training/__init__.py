"""Training: the loop, the step, schedules, optimizers, metrics."""
