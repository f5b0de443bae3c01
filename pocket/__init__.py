"""The embedded default: a tiny base model, its tokenizer and problems, and the script that makes them again."""
