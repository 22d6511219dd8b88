"""Trained models in the form of Hugging Face's libraries: weights, config, code, tokenizer and card, in both directions."""
