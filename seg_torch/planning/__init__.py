"""What a dataset, a machine and the user's time call for: settings, each with its reason."""
