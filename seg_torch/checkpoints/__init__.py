"""Networks in files: checkpoints, the Hugging Face Hub, exported graphs."""
