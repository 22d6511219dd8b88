"""What a trained model is worth: lm-eval's tasks, and bits per byte of prepared text."""
