"""The files that tokenizers are read from, by kind."""

FILES = {"bpe": "tokenizer.json", "huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}  # usual names
NAMED_BY_PATH = ("huggingface", "sentencepiece")  # there is no default, and a path may be a name on the Hub
