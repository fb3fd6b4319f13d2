"""Training: the task, the Trainer, callbacks, and the run's folder."""
