"""The trained model as a Hugging Face model: the two files that are copied beside exported weights and opened as remote code."""
