"""What a trained model is worth: lm-eval's tasks, and bits per byte of prepared text."""

OWN_SPLIT = "valid"  # in place of a prefix of prepared data: what the run itself evaluates
