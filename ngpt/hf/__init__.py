"""Models of ours as folders that `transformers` opens: tokenizer, model card."""
